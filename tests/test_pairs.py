"""Pairs, verdicts and attempts."""

import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest
from PIL import Image

import artaug as aa
from artaug.image_files import ImageFile, ImageFolder, image_digest
from artaug.pairs import pair_digest
from support.strategies import pair


def test_a_pair_has_two_pictures_of_one_size():
    with pytest.raises(aa.InvalidValueError) as caught:
        aa.ImagePair(
            prompt="a pear",
            seed=0,
            before=Image.new("RGB", (8, 8)),
            after=Image.new("RGB", (8, 9)),
            plan=aa.Plan("a pear"),
        )
    assert str(caught.value) == (
        "the two pictures of 'a pear' differ in size: before (8, 8), after (8, 9). A pair needs two pictures of one size."
    )


def test_a_pair_in_which_nothing_changed_has_one_picture_and_a_plan_without_regions():
    picture = Image.new("RGB", (8, 8), "teal")
    assert aa.ImagePair.unchanged(picture, prompt="a pear", seed=3) == aa.ImagePair(
        prompt="a pear", seed=3, before=picture, after=picture, plan=aa.Plan("a pear")
    )


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_verdict_needs_finite_numbers(number):
    with pytest.raises(aa.InvalidValueError, match=r"Verdict\(scores\.gain=.*expected a finite number"):
        aa.Verdict(keep=True, reason="it rose", scores={"gain": number})


def test_kept_dropped_and_skipped_are_attempts():
    verdict = aa.Verdict(keep=True, reason="it rose", scores={})
    for ending in (aa.Kept(pair(1, 2), verdict), aa.Dropped(pair(1, 2), verdict), aa.Skipped("a pear", 0, "why")):
        assert isinstance(ending, aa.Attempt)


def test_the_digest_of_a_pair_covers_prompt_and_pictures_and_the_plan_only_on_request():
    original = pair(1, 2)
    assert pair_digest(dataclasses.replace(original, seed=99, before=original.before.copy())) == pair_digest(original)
    changed = [
        dataclasses.replace(original, prompt="another"),
        dataclasses.replace(original, before=original.after),
        dataclasses.replace(original, before=original.after, after=original.before),
    ]
    assert len({pair_digest(example) for example in (original, *changed)}) == 4
    planned = dataclasses.replace(original, plan=aa.Plan("brighter"))
    assert pair_digest(planned) == pair_digest(original)
    assert pair_digest(planned, include_plan=True) != pair_digest(original, include_plan=True)


def test_the_digest_of_a_pair_covers_rewards_only_on_request():
    original = pair(1, 2)
    good, better = (dataclasses.replace(original, rewards=(0.2, reward)) for reward in (0.8, 0.9))
    assert len({pair_digest(example, include_plan=True) for example in (original, good, better)}) == 1
    assert len({pair_digest(example, include_rewards=True) for example in (original, good, better)}) == 3
    assert pair_digest(original, include_rewards=True) == pair_digest(original)


def test_rewards_go_where_a_pair_goes(tmp_path):
    rewarded = dataclasses.replace(pair(1, 2), rewards=[np.float32(0.25), 1])
    assert rewarded.rewards == (0.25, 1.0)
    assert list(map(type, rewarded.rewards)) == [float, float]
    stored = rewarded.stored_in(ImageFolder(tmp_path))
    for same in (stored, copy.copy(rewarded), pickle.loads(pickle.dumps(stored)), dataclasses.replace(rewarded)):
        assert same == rewarded
        assert same.rewards == (0.25, 1.0)
    assert rewarded != pair(1, 2)
    assert "regions, rewards 0.25 and 1)" in repr(rewarded)
    assert "rewards" not in repr(pair(1, 2))
    assert "before, reward 0.25<" in rewarded._repr_html_()
    assert "after, reward 1<" in rewarded._repr_html_()
    assert "reward" not in pair(1, 2)._repr_html_()


@pytest.mark.parametrize(
    "rewards", [(0.5,), (0.1, 0.2, 0.3), (0.1, 1.1), (-0.1, 0.5), (0.1, math.nan), (False, True), (None, 1.0)]
)
def test_rewards_that_are_not_two_numbers_in_range_are_refused(rewards):
    with pytest.raises(aa.InvalidValueError, match=r"ImagePair\(rewards.*expected (two numbers|a number)"):
        dataclasses.replace(pair(1, 2), rewards=rewards)


def test_the_digest_of_a_pair_sees_the_colours_of_a_palette():
    def striped(first, second):
        image = Image.new("P", (4, 4))
        image.putdata([0, 1] * 8)
        image.putpalette([*first, *second])
        return image

    warm, cold = striped((255, 0, 0), (250, 120, 0)), striped((0, 0, 255), (0, 120, 250))
    assert warm.tobytes() == cold.tobytes()
    original = dataclasses.replace(pair(1, 2), before=Image.new("RGB", (4, 4)), after=warm)
    assert pair_digest(dataclasses.replace(original, after=cold)) != pair_digest(original)
    assert pair_digest(dataclasses.replace(original, after=warm.convert("RGB"))) == pair_digest(original)


@pytest.fixture
def stored(tmp_path):
    """A pair in memory, and the same with its pictures in a folder."""
    original = dataclasses.replace(pair(1, 2), plan=aa.Plan("brighter"))
    return original, original.stored_in(aa.ImageFolder(tmp_path))


@pytest.fixture
def unread(monkeypatch):
    """From now on, a file that is read is an error."""

    def refuse(_file):
        raise AssertionError("a file was read")

    return lambda: monkeypatch.setattr(ImageFile, "load", refuse)


def test_a_pair_by_reference_reads_as_the_pair_it_was_and_keeps_no_picture(stored):
    original, referenced = stored
    for side in ("before", "after"):
        assert getattr(referenced, side).tobytes() == getattr(original, side).convert("RGB").tobytes()
        assert getattr(referenced, side) is not getattr(referenced, side)
    assert all(isinstance(picture, ImageFile) for picture in referenced.references)
    assert original.references == (original.before, original.after)


def test_size_digest_equality_repr_pickle_and_copy_of_a_pair_by_reference_read_no_file(stored, unread):
    original, referenced = stored
    digests = image_digest(original.before), image_digest(original.after)
    unread()
    assert referenced.size == original.size
    assert pair_digest(referenced, include_plan=True) == pair_digest(original, include_plan=True)
    assert tuple(map(image_digest, referenced.references)) == digests
    assert repr(referenced) == repr(original)
    assert referenced == original
    copies = [copy.copy(referenced), copy.deepcopy(referenced), pickle.loads(pickle.dumps(referenced))]
    assert all(other == referenced and other.references == referenced.references for other in copies)
    assert len(pickle.dumps(referenced)) < 2000
    assert referenced.holding(*referenced.references) == original


def test_a_pair_is_equal_by_prompt_seed_plan_and_pixels(stored):
    original, referenced = stored
    for changes in ({"prompt": "another"}, {"seed": 99}, {"plan": aa.Plan("darker")}, {"before": original.after}):
        other = dataclasses.replace(referenced, **changes)
        assert other != referenced
        assert other != original
    assert dataclasses.replace(referenced) == referenced
    assert referenced != "a pair"
    assert {original, referenced} == {original}


def test_a_pair_stays_frozen_and_its_pictures_have_no_default(stored):
    for pair_ in stored:
        with pytest.raises(dataclasses.FrozenInstanceError):
            pair_.before = pair_.after
    with pytest.raises(TypeError, match="missing 2 required keyword-only arguments: 'before' and 'after'"):
        aa.ImagePair(prompt="a pear")
    names = ["prompt", "seed", "before", "after", "plan", "rewards"]
    assert [field.name for field in dataclasses.fields(aa.ImagePair)] == names


def test_a_pair_without_a_plan_or_a_seed_is_a_pair():
    picture = Image.new("RGB", (8, 8))
    bare = aa.ImagePair(prompt="a pear", before=picture, after=picture)
    assert (bare.seed, bare.plan) == (None, aa.Plan("a pear"))
    assert bare == dataclasses.replace(bare, plan=None)
    assert repr(bare) == "ImagePair('a pear', seed=None, 8 x 8 pixels, 0 regions)"


@pytest.mark.parametrize(
    ("name", "value"), [("before", "a.png"), ("after", None), ("plan", "a pear"), ("seed", "1"), ("prompt", None)]
)
def test_a_pair_refuses_a_field_of_another_type(name, value):
    with pytest.raises(aa.InvalidValueError, match=rf"ImagePair\({name}="):
        dataclasses.replace(pair(1, 2), **{name: value})


def test_pictures_of_two_sizes_are_refused_without_reading_them(tmp_path, unread):
    small, large = aa.ImageFolder(tmp_path).add_all([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))])
    unread()
    with pytest.raises(aa.InvalidValueError, match="differ in size"):
        aa.ImagePair(prompt="a pear", before=small, after=large)


def test_a_picture_that_is_gone_is_an_error_of_the_look_not_of_the_pair(stored):
    _, referenced = stored
    referenced.references[0].path.unlink()
    assert referenced.after.size == referenced.size
    with pytest.raises(aa.StorageError, match="there is no such file"):
        _ = referenced.before
