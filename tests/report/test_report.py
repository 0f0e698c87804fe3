"""The report is complete, runs no foreign script, and needs no other file."""

import base64
import dataclasses
import io
import re
import sys
from dataclasses import dataclass, replace
from html import unescape
from html.parser import HTMLParser
from importlib.metadata import version
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image

import artaug as aa
from artaug._internal.files import _MACHINE
from artaug.critics import Usage
from artaug.images.html import BOX_COLORS
from artaug.report import write_report

EVIL = '<script>alert(1)</script><img src=x onerror="alert(2)">'
PROMPTS = ("a tree", f"a road {EVIL}", "a roof", *(f"a door {number}" for number in range(6)))
LORA = aa.LoRA({"blocks.0.to_q": aa.LowRank(torch.ones(2, 4), torch.ones(4, 2))})


@dataclass(frozen=True)
class Swatch(aa.Synthesizer):
    """A flat picture; the seed changes its light a little."""

    light: int = 60
    side: int = 8

    def synthesize(self, plan, *, seed):
        return Image.new("RGB", (self.side, self.side), (self.light + seed % 5, 90, 120))


class Light(aa.Scorer):
    def score(self, image, prompt):
        return image.getpixel((0, 0))[0] / 255


@dataclass(frozen=True)
class Evil(aa.Scorer):
    @property
    def name(self):
        return EVIL

    def score(self, image, prompt):
        return float(image.width)


def make_pair(prompt, *regions, rewritten=None):
    before, after = (Swatch(light).synthesize(aa.Plan(prompt), seed=3) for light in (60, 120))
    plan = aa.Plan(rewritten or prompt, regions)
    return aa.ImagePair(prompt=prompt, seed=3, before=before, after=after, plan=plan)


LEFT = aa.Region(aa.Box(0.125, 0.25, 0.5, 1), f"a lamp {EVIL}")
SOFT = aa.Region(aa.Mask.from_array(np.eye(4)[:, :2]), "a soft glow")
ATTEMPTS = (
    aa.Kept(make_pair("a harbour", LEFT, SOFT), aa.Verdict(True, f"Light gained 0.23 {EVIL}", {"Light gain": 0.23})),
    aa.Kept(make_pair(f"a hill {EVIL}", LEFT, rewritten="a sunny hill"), aa.Verdict(True, "Light gained 0.20", {})),
    aa.Dropped(make_pair("a door", LEFT), aa.Verdict(False, "Light gained 0.01, need 0.1", {"Light gain": -0.01})),
    aa.Dropped(make_pair("a wall", LEFT), aa.Verdict(False, "Light gained 0.02, need 0.1", {"Light gain": 0.02})),
    aa.Skipped("a moor", 4, "the critic suggested nothing"),
    aa.Skipped(f"a pond {EVIL}", 5, f"the critic abstained: {EVIL}"),
)


def make_round(number=1, *, losses=(0.5, 0.3, 0.2), accepted=True, gain=None):
    training = aa.TrainingResult(lora=LORA, losses=losses, pairs=2, steps=len(losses), seconds=2.5)
    return aa.Round(
        number=number,
        attempts=ATTEMPTS,
        training=training,
        lora=LORA,
        seconds={"draw": 3700.0, "critique": 0.25, "train": 65.0},
        gain=gain,
        accepted=accepted,
    )


def make_comparison(*, light=120, prompts=PROMPTS, **options):
    candidates = {"round 1": Swatch(90), f"round 2 {EVIL}": Swatch(light)}
    options = {"scorers": [Evil(), Light()], "filtered_by": [EVIL], "progress": False, **options}
    return aa.compare(Swatch(), candidates, prompts, **options)


def make_result(*rounds, stop_reason="all 2 rounds ran"):
    return aa.Enhancement(rounds=rounds or (make_round(1), make_round(2)), stop_reason=stop_reason)


VOID = {"meta", "link", "img", "input", "rect", "line", "circle", "path", "polyline", "image"}


@dataclass
class Page(HTMLParser):
    """The page as a browser parses it."""

    def __post_init__(self):
        super().__init__()
        self.tags, self.urls, self.handlers, self.open, self.texts, self.scripts = [], [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.urls += [value for name, value in attrs if name in {"src", "href", "srcset", "action", "poster"}]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        (self.scripts if self.open[-1:] == ["script"] else self.texts).append(data)


def read(path):
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    page.text = re.sub(r"\s+", " ", " ".join(page.texts))
    return page


@pytest.fixture
def report(tmp_path):
    path = write_report(tmp_path / "deep" / "report.html", result=make_result(), comparison=make_comparison())
    return read(path)


def test_the_page_shows_every_prompt_region_and_reason_as_text(report):
    expected = ["a tree", f"a road {EVIL}", "a roof", "a harbour", f"a hill {EVIL}", f"a lamp {EVIL}", "a soft glow"]
    expected += [f"Light gained 0.23 {EVIL}", "redrawn as “a sunny hill”", "Light gain 0.230"]
    expected += ["seed 3", "the critic suggested nothing", f"the critic abstained: {EVIL}", f"round 2 {EVIL}", EVIL]
    missing = [text for text in expected if re.sub(r"\s+", " ", text) not in report.text]
    assert missing == []


def test_no_text_runs_as_script(report):
    assert report.tags.count("script") == 1
    assert "alert" not in "".join(report.scripts)
    assert report.handlers == []


def test_only_the_pages_own_script_is_allowed_to_run(tmp_path):
    path = write_report(tmp_path / "report.html", result=make_result(), comparison=make_comparison())

    text = path.read_text(encoding="utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)[1]
    assert "default-src 'none'; img-src data:" in policy
    assert policy.count("sha256-") == 1
    assert "unsafe-eval" not in policy


def test_the_page_needs_nothing_but_itself(report):
    anchors = {url for url in report.urls if url.startswith("#")}
    assert {url.partition(":")[0] for url in report.urls} - anchors == {"data"}
    assert anchors == {"#pictures", "#comparison", "#round-1", "#round-2", "#provenance"}


def test_every_picture_decodes(report):
    images = [url for url in report.urls if url.startswith("data:image/")]

    sizes = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size for url in images]

    compared, kept, dropped, masks = 9 * 3, 2 * 2 * 2, 2 * 2 * 2, 2
    assert len(sizes) == compared + kept + dropped + masks
    assert sizes.count((2, 4)) == masks


def test_boxes_are_where_the_critic_put_them(tmp_path):
    path = write_report(tmp_path / "report.html", result=make_result(), comparison=make_comparison())

    text = path.read_text(encoding="utf-8")
    assert f'x="0.125" y="0.25" width="0.375" height="0.75" stroke="{BOX_COLORS[0]}"' in text
    assert f'style="left:12.5%;top:25.0%;background:{BOX_COLORS[0]}">1</b>' in text


@pytest.mark.parametrize(
    ("light", "verb", "change"),
    [(120, "rises from", "+0.235"), (60, "does not clearly change, from", "+0.000"), (20, "falls from", "−0.157")],  # noqa: RUF001
)
def test_the_headline_is_about_the_last_candidate_by_a_scorer_that_did_not_filter(light, verb, change, tmp_path):
    comparison = make_comparison(light=light)

    page = read(write_report(tmp_path / "report.html", result=make_result(), comparison=comparison))

    row = comparison.row("Light", f"round 2 {EVIL}")
    assert f"Light {verb} {row.base:.3f} to {row.enhanced:.3f} on 9 prompts." in page.text
    assert f"{change} on average (95% interval {change} to {change}), better on {row.win_rate:.0%} of them" in page.text


def test_a_headline_by_a_scorer_that_filtered_says_so(tmp_path):
    comparison = make_comparison(scorers=[Light()], filtered_by=["Light"])

    page = read(write_report(tmp_path / "report.html", result=make_result(), comparison=comparison))

    assert "The training pairs were filtered by this scorer, so it is weaker evidence than the others." in page.text


def test_every_prompt_is_in_the_funnel_and_reasons_that_differ_in_numbers_are_merged(report):
    assert "prompts 6 drawn 6 critiqued 4" in report.text
    assert "−1 the critic suggested nothing −1 the critic abstained" in report.text  # noqa: RUF001
    assert "redrawn 4 kept 2 −2 Light gained ..., need ..." in report.text  # noqa: RUF001


def test_a_rejected_round_is_marked(tmp_path):
    gain = make_comparison(light=20).row("Light", f"round 2 {EVIL}")
    result = make_result(
        make_round(1), make_round(2, accepted=False, gain=gain), stop_reason="round 2 did not help on held-out prompts"
    )

    page = read(write_report(tmp_path / "report.html", result=result, comparison=make_comparison()))

    assert "Round 2 rejected" in page.text
    assert "Light moved by −0.157 (−0.157 to −0.157) against the previous round" in page.text  # noqa: RUF001
    assert "Stop reason: round 2 did not help on held-out prompts." in page.text
    assert "1 of 2 rounds accepted" in page.text


def test_a_run_without_an_accepted_round_has_a_report(tmp_path):
    result = make_result(make_round(1, accepted=False), stop_reason="round 1 did not help")

    page = read(write_report(tmp_path / "report.html", result=result, comparison=make_comparison(keep_images=0)))

    assert "no LoRA: no round was accepted" in page.text
    assert "Before and after" not in page.text


def test_the_provenance_names_objects_seeds_and_versions(tmp_path):
    about = {"planner": aa.GreedyPlanner(max_regions=2), "note": "a second try"}
    comparison = make_comparison(prompts=[f"tree {number}" for number in range(6)])

    page = read(write_report(tmp_path / "report.html", result=make_result(), comparison=comparison, about=about))

    assert "GreedyPlanner(max_regions=2)" in page.text
    assert "note a second try" in page.text
    assert "round 1 drawn by Swatch(light=90, side=8)" in page.text
    assert f"{comparison.seeds[0]}, {comparison.seeds[1]}" in page.text
    assert "(6 in total, the same for every arm)" in page.text
    assert f"torch {version('torch')}" in page.text


def test_times_are_in_units_that_fit(report):
    assert {"1 h 01 min", "0.2 s", "1 min 05 s"} <= {text.strip() for text in report.texts}


@pytest.mark.parametrize("count", [0, 1, 2, 5000])
def test_a_loss_curve_of_any_length_is_drawn(count, tmp_path):
    losses = tuple(1 / (1 + step) for step in range(count))

    path = write_report(
        tmp_path / "report.html", result=make_result(make_round(losses=losses)), comparison=make_comparison()
    )

    curves = re.findall(r'<polyline class="\w+" points="([^"]*)"', path.read_text(encoding="utf-8"))
    numbers = [float(number) for curve in curves for number in re.split("[ ,]", curve)]
    assert len(curves) == 2 * bool(count)
    assert len(numbers) <= 2 * 2 * 240
    assert all(0 <= number <= 100 for number in numbers[::2])


def test_pairs_on_disk_are_shown_and_a_seed_only_where_it_is_known(tmp_path):
    folder = aa.ImageFolder(tmp_path / "images")
    kept = aa.Kept(
        dataclasses.replace(make_pair("a hill"), seed=None).stored_in(folder), aa.Verdict(True, "it rose", {})
    )
    stored, held = (
        write_report(
            tmp_path / name, result=make_result(dataclasses.replace(make_round(), attempts=(attempt,)))
        ).read_text(encoding="utf-8")
        for name, attempt in (("a.html", kept), ("b.html", aa.Kept(make_pair("a hill"), kept.verdict)))
    )
    assert "seed 3" in held
    assert "seed None" not in stored
    assert stored.count("data:image/") == held.count("data:image/")


def test_at_most_max_pairs_are_shown(tmp_path):
    shown = [
        write_report(tmp_path / "report.html", result=make_result(), comparison=make_comparison(), max_pairs=max_pairs)
        .read_text(encoding="utf-8")
        .count('<details class="annotations">')
        for max_pairs in (0, 1, 50)
    ]

    assert shown == [0, 2 * 2, 2 * 4]


def test_the_same_run_gives_the_same_bytes_and_leaves_no_other_file(tmp_path):
    first, again = (
        write_report(tmp_path / name, result=make_result(), comparison=make_comparison(seed=4)) for name in "ab"
    )

    assert first.read_bytes() == again.read_bytes()
    assert sorted(tmp_path.iterdir()) == [first, again]


def test_the_headline_of_a_run_without_a_comparison_is_its_pairs_and_its_gain(tmp_path):
    gain = make_comparison().row("Light", f"round 2 {EVIL}")

    bare = read(write_report(tmp_path / "bare.html", result=make_result()))
    measured = read(write_report(tmp_path / "measured.html", result=make_result(make_round(gain=gain))))

    assert "4 of 12 prompts became training pairs in 2 rounds." in bare.text
    assert "Whether the model got better was not measured" in bare.text
    assert "2 of 6 prompts became training pairs in 1 round." in measured.text
    assert "On held-out prompts Light last moved by +0.235 (95% interval +0.235 to +0.235)" in measured.text
    assert "95% interval wins" not in measured.text


def test_a_comparison_without_a_run_has_no_rounds(tmp_path):
    page = read(write_report(tmp_path / "report.html", comparison=make_comparison()))

    assert "Light rises from" in page.text
    assert "base drawn by Swatch" in page.text
    assert "Stop reason" not in page.text
    assert "rounds accepted" not in page.text


def test_the_table_has_ties_corrected_p_values_and_guardrails(tmp_path):
    guardrails = [aa.Guardrail("Light", 0.1), aa.Guardrail(EVIL, 0.02)]
    comparison = make_comparison(light=20, guardrails=guardrails)

    page = read(write_report(tmp_path / "report.html", comparison=comparison))

    row = comparison.row("Light", f"round 2 {EVIL}")
    assert f"0% {row.p_value:.2g}" in page.text
    assert "50% 100% ties 1" in page.text
    assert "round 2" in page.text
    assert "outside −10%" in page.text  # noqa: RUF001
    assert "inside −2%" in page.text  # noqa: RUF001
    assert "Outside its guardrail: Light." in page.text
    assert re.sub(r"\s+", " ", comparison.verdict("round 1").split("; ")[1]) in page.text


def test_a_change_that_is_not_significant_is_not_called_one(tmp_path):
    few = make_comparison(prompts=PROMPTS[:3])
    assert few.row("Light", f"round 2 {EVIL}").direction == 1

    page = read(write_report(tmp_path / "report.html", comparison=few))

    assert "Light does not clearly change, from" in page.text


def test_the_usage_of_a_critic_behind_a_server_is_shown(tmp_path):
    class Remote:
        usage = Usage(replies=192, input_tokens=310_000, output_tokens=42_000, uncounted=1)

    page = read(write_report(tmp_path / "report.html", result=make_result(), about={"critic": Remote()}))

    assert "usage of critic 192 replies, at least 310,000 input and 42,000 output tokens" in page.text


def test_the_usage_of_a_filters_scorers_is_shown_once(tmp_path):
    class Remote(aa.Scorer):
        usage = Usage(replies=3, input_tokens=10, output_tokens=3)

        def score(self, image, prompt):
            return 0.0

    remote = Remote()
    keep = aa.Gain(remote, at_least=0) & aa.Floor(remote, at_least=0)
    page = read(write_report(tmp_path / "report.html", result=make_result(), about={"keep": keep}))

    assert "usage of keep 3 replies, 10 input and 3 output tokens" in page.text


def test_pictures_in_a_folder_are_the_same_pictures(tmp_path):
    inline, folder = (
        write_report(
            tmp_path / "a b.html", result=make_result(), comparison=make_comparison(), images=placement
        ).read_text(encoding="utf-8")
        for placement in ("inline", "folder")
    )

    embedded = [base64.b64decode(data) for data in re.findall(r'<img[^>]* src="data:image/png;base64,([^"]+)"', inline)]
    paths = [unquote(url) for url in re.findall(r'<img[^>]* src="([^"]+)"', folder)]
    assert [(tmp_path / path).read_bytes() for path in paths] == embedded
    assert {path.partition("/")[0] for path in paths} == {"a b_images"}
    assert "img-src data: 'self';" in unescape(folder)


def test_many_pictures_go_to_a_folder(tmp_path, monkeypatch):
    small = write_report(tmp_path / "small.html", comparison=make_comparison())
    monkeypatch.setattr("artaug.report.image_store.INLINE_BYTES", 500)
    large = write_report(tmp_path / "large.html", comparison=make_comparison())

    assert sorted(tmp_path.iterdir()) == [large, tmp_path / "large_images", small]


def test_a_page_written_again_keeps_only_its_own_images_and_foreign_files(tmp_path):
    path, folder = tmp_path / "report.html", tmp_path / "report_images"
    write_report(path, comparison=make_comparison(light=110), images="folder")
    (folder / "note.txt").write_text("mine", encoding="utf-8")
    (folder / ".artaug-partial" / f"{_MACHINE}-0123").mkdir(parents=True)
    (folder / ".artaug-partial" / f"{_MACHINE}-0123" / ".lock").touch()  # of a process that was killed

    write_report(path, comparison=make_comparison(light=200), images="folder")

    used = set(re.findall(r"report_images/([^\"]+)", path.read_text(encoding="utf-8")))
    assert {file.name for file in folder.iterdir()} == used | {"note.txt"}
    (folder / "note.txt").unlink()
    write_report(path, comparison=make_comparison(), images="inline")
    assert list(tmp_path.iterdir()) == [path]


def test_a_report_that_fails_does_not_change_the_old_page(tmp_path):
    path = write_report(tmp_path / "report.html", comparison=make_comparison(), images="folder")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.*")}

    class Unprintable:
        def __repr__(self):
            raise RuntimeError("no words")

    with pytest.raises(RuntimeError, match="no words"):
        write_report(path, comparison=make_comparison(light=200), about={"critic": Unprintable()}, images="folder")

    assert all(file.read_bytes() == data for file, data in before.items())
    assert not list(tmp_path.rglob(".artaug-partial"))


def test_all_but_the_first_twelve_pairs_are_folded(tmp_path):
    kept = tuple(aa.Kept(make_pair(f"tree {index}", LEFT), aa.Verdict(True, "ok", {})) for index in range(30))

    text = write_report(
        tmp_path / "report.html", result=make_result(replace(make_round(), attempts=kept)), max_pairs=20
    )
    text = text.read_text(encoding="utf-8")

    unfolded, _, folded = text.partition('<details class="more">')
    assert unfolded.count('<article class="card"') == 12
    assert folded.count('<article class="card"') == 8
    assert "8 more, 20 of 30 in total" in folded


def test_a_title_heads_the_page_as_text(tmp_path):
    path = write_report(tmp_path / "r.html", result=make_result(), comparison=make_comparison(), title=EVIL)

    assert EVIL in read(path).text
    assert EVIL not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_pairs": -1}, "max_pairs=-1"),
        ({"images": "beside"}, "images='beside'"),
        ({"result": None}, "neither a result nor a comparison"),
    ],
)
def test_illegal_options_are_refused(options, message, tmp_path):
    with pytest.raises(aa.InvalidValueError, match=message):
        write_report(tmp_path / "report.html", **{"result": make_result(), **options})
    assert list(tmp_path.iterdir()) == []


def test_without_jinja2_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)

    with pytest.raises(
        aa.MissingExtraError, match=r'write_report needs the jinja2 package. Run: pip install "artaug\[rep'
    ):
        write_report(tmp_path / "report.html", result=make_result(), comparison=make_comparison())


@pytest.mark.parametrize(
    ("canvas", "words"),
    [
        (lambda pair: aa.Canvas(pair.before, strength=0.5), "redrawn from the picture before, at strength 0.5<"),
        (
            lambda pair: aa.Canvas(pair.after, mask=aa.Box(0, 0, 0.5, 1), references=[pair.before]),
            "redrawn from another picture, inside a mask, with 1 reference(s)<",
        ),
    ],
)
def test_a_pair_says_what_it_was_redrawn_from(canvas, words, tmp_path):
    pair = make_pair("a harbour")
    plan = aa.Plan("a harbour", canvas=canvas(pair))
    drawn = aa.ImagePair(prompt=pair.prompt, seed=3, before=pair.before, after=pair.after, plan=plan)
    page = write_report(tmp_path / "a.html", attempts=[aa.Kept(drawn, aa.Verdict(True, "better", {}))])
    assert words in page.read_text(encoding="utf-8")
