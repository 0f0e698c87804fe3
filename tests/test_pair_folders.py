"""Pairs that people have, read from folders: matched, checked by their headers, and the same after a way out and back."""

import json
import logging
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import artaug as aa
from artaug.image_files import ImageFile

PLANS = st.sampled_from(
    [None, aa.Plan("wide"), aa.Plan("lit", (aa.Region(aa.Box(0, 0, 0.5, 1), "a lamp \u2028 \u00e9"),))]
)
REWARDS = st.none() | st.tuples(st.floats(0, 1), st.floats(0, 1))
PROMPTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)


def noise(seed, size=(16, 12)):
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(3 * size[0] * size[1]))


def folders(tmp_path, before, after):
    """Two folders with these pictures: a seed, or (seed, size), by file name."""
    for side, pictures in (("before", before), ("after", after)):
        (tmp_path / side).mkdir(exist_ok=True)
        for name, picture in pictures.items():
            path = tmp_path / side / name
            path.parent.mkdir(exist_ok=True)
            (noise(picture) if isinstance(picture, int) else picture).save(path)
    return tmp_path / "before", tmp_path / "after"


def faults(*arguments, **options):
    with pytest.raises(aa.InvalidValueError) as caught:
        aa.pairs_from_folder(*arguments, **options)
    return str(caught.value)


def test_two_pictures_of_one_name_are_a_pair_by_reference(tmp_path):
    two = folders(tmp_path, {"b.png": 1, "pets/a.png": 2}, {"b.webp": 3, "pets/a.png": 4})
    first, second = aa.pairs_from_folder(*two, captions={"b": "a bee", "pets/a.png": "an ant"})
    assert (first.prompt, second.prompt) == ("a bee", "an ant")
    assert (first.seed, first.plan) == (None, aa.Plan("a bee"))
    assert first.before.tobytes() == noise(1).tobytes()
    assert second.after.tobytes() == noise(4).tobytes()
    assert all(isinstance(picture, ImageFile) for picture in first.references)


def test_no_picture_is_decoded_before_it_is_looked_at(tmp_path, monkeypatch):
    two = folders(tmp_path, {"a.png": 1}, {"a.png": 2})
    monkeypatch.setattr(ImageFile, "load", lambda _file: pytest.fail("a picture was read"))
    assert aa.pairs_from_folder(*two, captions={"a": "an ant"})[0].size == (16, 12)


def caption_files(tmp_path):
    (tmp_path / "before" / "a.txt").write_text("an ant\n", encoding="utf-8")
    (tmp_path / "after" / "b.txt").write_text("\ufeffa bee", encoding="utf-8")


def csv_of_names(tmp_path):
    text = 'file_name,mood,text\na.png,x,an ant\n"before/b.png",y,"a bee"\n'
    (tmp_path / "captions.csv").write_text(text, encoding="utf-8")
    return tmp_path / "captions.csv"


def jsonl_of_names(tmp_path):
    rows = [{"before_file_name": "a.png", "caption": "an ant"}, {"file_name": "b", "prompt": "a bee"}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return str(tmp_path / "c.jsonl")


@pytest.mark.parametrize("write", [caption_files, csv_of_names, jsonl_of_names])
def test_captions_are_beside_the_pictures_or_in_a_table(tmp_path, write):
    two = folders(tmp_path, {"a.png": 1, "b.png": 2}, {"a.png": 3, "b.png": 4})
    assert [pair.prompt for pair in aa.pairs_from_folder(*two, captions=write(tmp_path))] == ["an ant", "a bee"]


def test_all_that_does_not_fit_is_named_in_one_error(tmp_path):
    turned, clear = noise(1), noise(1).convert("RGBA")
    turned.getexif()[0x0112] = 6
    clear.putpixel((0, 0), (0, 0, 0, 254))
    before = {
        "alone.png": 1,
        "wide.png": noise(1, (24, 12)),
        "dumb.png": 1,
        "broken.png": 1,
        "clear.png": clear,
        "t.jpg": 1,
    }
    two = folders(tmp_path, before, {name: 2 for name in before if name != "alone.png"} | {"late.png": 3})
    turned.save(two[0] / "t.jpg", exif=turned.getexif())
    (two[0] / "broken.png").write_bytes(b"no picture")
    (two[1] / "raw.heic").write_bytes(b"")
    noise(1).save(two[1] / "dumb.webp")
    (two[1] / ".DS_Store").write_bytes(b"")
    captions = dict.fromkeys(("alone", "wide", "broken", "clear", "t", "late"), "a pear")
    text = faults(*two, captions=captions)
    assert text.startswith("pairs_from_folder: 9 things do not fit:\n- ")
    for words in (
        f"{two[1] / 'raw.heic'} is no picture that Pillow reads",
        f"{two[1] / 'dumb.png'} and {two[1] / 'dumb.webp'} have one name",
        f"{two[0] / 'alone.png'} has no twin in {two[1]}",
        f"{two[1] / 'late.png'} has no twin in {two[0]}",
        f"{two[0] / 'wide.png'} and {two[1] / 'wide.png'} are of 24 x 12 and 16 x 12 pixels. Pass size=",
        f"{two[0] / 'dumb.png'} has no caption",
        f"the picture {two[0] / 'broken.png'} cannot be used: it is no picture, or a damaged one",
        f"{two[0] / 'clear.png'} has transparent pixels",
        f"{two[0] / 't.jpg'} is turned by its EXIF data",
    ):
        assert words in text, text


def test_a_long_list_of_faults_is_cut_with_their_number(tmp_path):
    text = faults(*folders(tmp_path, {f"{number:03}.png": 1 for number in range(40)}, {}))
    assert "40 things do not fit" in text
    assert text.endswith("- and 20 more")


def test_an_opaque_alpha_channel_is_no_fault(tmp_path):
    two = folders(tmp_path, {"a.png": noise(1).convert("RGBA")}, {"a.png": 2})
    assert aa.pairs_from_folder(*two, captions={"a": "an ant"})[0].before.tobytes() == noise(1).tobytes()


def test_two_captions_and_a_wrong_call_are_refused_by_name(tmp_path):
    two = folders(tmp_path, {"a.png": 1}, {"a.png": 2})
    caption_files(tmp_path)
    (tmp_path / "after" / "a.txt").write_text("an aunt", encoding="utf-8")
    assert "has two captions" in faults(*two)
    assert "it is not there. Expected a folder of pictures" in faults(tmp_path / "nowhere", two[1])
    assert "it is no folder" in faults(tmp_path / "after" / "a.txt", two[1])
    assert "pairs_from_folder(captions=['an ant']): expected a dict of texts" in faults(*two, captions=["an ant"])
    assert "is no .csv or .jsonl file" in faults(*two, captions="an ant")
    assert "cannot be read" in faults(*two, captions="nowhere.csv")
    assert "in its metadata.jsonl" in faults(two[0], captions={})
    assert "size=(1, 2, 3)): expected two whole numbers or None" in faults(*two, size=(1, 2, 3))
    assert "size[0]=0" in faults(*two, size=(0, 2))
    (tmp_path / "empty").mkdir()
    assert "there is no picture" in faults(tmp_path / "empty", tmp_path / "empty")


def test_a_resize_crops_to_the_aspect_whenever_a_picture_is_read_and_is_logged_once(tmp_path, caplog):
    tall = Image.new("RGB", (20, 60), "red")
    tall.paste("blue", (0, 20, 20, 40))
    two = folders(tmp_path, {"a.png": tall, "b.png": noise(1, (8, 8))}, {"a.png": noise(2, (10, 10)), "b.png": 3})
    with caplog.at_level(logging.WARNING):
        first, second = aa.pairs_from_folder(*two, captions={"a": "an ant", "b": "a bee"}, size=(8, 8))
    assert [record.getMessage() for record in caplog.records] == [
        "3 of 4 pictures are cropped and resized to 8 x 8 pixels whenever they are read"
    ]
    assert first.size == second.size == first.before.size == first.after.size == (8, 8)
    assert first.before.getpixel((4, 4)) == (0, 0, 255)
    assert second.before.tobytes() == noise(1, (8, 8)).tobytes()


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(PROMPTS, st.none() | st.integers(0, 2**63), PLANS, st.integers(1, 9), st.booleans(), REWARDS),
        min_size=1,
        max_size=4,
    )
)
def test_pairs_are_the_same_after_the_way_to_a_folder_and_back(tmp_path_factory, drawn):
    pairs = [
        aa.ImagePair(
            prompt=prompt,
            seed=seed,
            plan=plan,
            before=noise(side, (side, 3)),
            after=noise(other, (side, 3)),
            rewards=rewards,
        )
        for prompt, seed, plan, side, same, rewards in drawn
        for other in [side if same else side + 100]
    ]
    folder = tmp_path_factory.mktemp("pairs")
    path = aa.pairs_to_folder(pairs, folder)
    back = aa.pairs_from_folder(folder)
    assert back == pairs
    assert [pair.before.tobytes() for pair in back] == [pair.before.tobytes() for pair in pairs]
    assert aa.pairs_to_folder(back, folder) == path
    rows = [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]]
    assert all((folder / row[f"{side}_file_name"]).is_file() for row in rows for side in ("before", "after"))
    assert [row.get("rewards") for row in rows] == [pair.rewards and list(pair.rewards) for pair in pairs]
    assert all("rewards" not in row for row, pair in zip(rows, pairs, strict=True) if pair.rewards is None)


def test_a_folder_of_other_pairs_is_not_written_over(tmp_path):
    one, other = (aa.ImagePair.unchanged(noise(seed), prompt="a pear") for seed in (1, 2))
    aa.pairs_to_folder([one], tmp_path)
    with pytest.raises(aa.InvalidValueError, match="is there already, with other pairs"):
        aa.pairs_to_folder([other], tmp_path)
    assert aa.pairs_from_folder(tmp_path) == [one]
    assert len(list((tmp_path / "images").rglob("*.webp"))) == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: "),
        ("[]", "line 2: expected a JSON object"),
        ("{}", "line 2: before_file_name or after_file_name is missing"),
        ('{"before_file_name": "../a.png", "after_file_name": "a.png"}', "'../a.png' is not in the folder"),
        ('{"before_file_name": "/a.png", "after_file_name": "a.png"}', "'/a.png' is not in the folder"),
        ('{"before_file_name": "a.png", "after_file_name": "a.png", "seed": "x"}', "prompt and seed cannot be read"),
        ('{"before_file_name": "a.png", "after_file_name": "b.png", "prompt": "p"}', "there is no such file"),
        (
            '{"before_file_name": "a.png", "after_file_name": "a.png", "prompt": "p", "plan": "{}"}',
            "line 2: Plan() lacks prompt",
        ),
        (
            '{"before_file_name": "a.png", "after_file_name": "a.png", "prompt": "p", "rewards": [0.1, 2]}',
            "line 2: ImagePair(rewards=[0.1, 2]): expected two numbers in [0, 1]",
        ),
    ],
)
def test_a_line_that_is_no_pair_is_named(tmp_path, line, words):
    noise(1).save(tmp_path / "a.png")
    good = '{"before_file_name": "a.png", "after_file_name": "a.png", "prompt": "p"}'
    (tmp_path / "metadata.jsonl").write_text(f"{good}\n{line}\n", encoding="utf-8")
    assert words in faults(tmp_path)


def test_a_crop_that_would_move_regions_is_refused(tmp_path):
    plan = aa.Plan("lit", (aa.Region(aa.Box(0, 0, 0.5, 1), "a lamp"),))
    aa.pairs_to_folder([aa.ImagePair(prompt="p", before=noise(1), after=noise(2), plan=plan)], tmp_path)
    assert aa.pairs_from_folder(tmp_path, size=(16, 12))[0].plan == plan
    assert "has a plan with regions, which a crop would move" in faults(tmp_path, size=(8, 8))
