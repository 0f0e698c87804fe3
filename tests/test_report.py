"""The report holds everything it should, runs nothing it should not, and needs nothing but itself."""

import base64
import io
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

import artaug as aa
from artaug.report import write_report
from artaug.showing import COLOURS

EVIL = '<script>alert(1)</script><img src=x onerror="alert(2)">'
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LORA = aa.LoRA({"blocks.0.to_q": aa.LowRank(torch.ones(2, 4), torch.ones(4, 2))})


@dataclass(frozen=True)
class Swatch(aa.Synthesizer):
    """A picture in one light; the seed shifts it a little."""

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


def pair(prompt, *regions, rewritten=None):
    before, after = (Swatch(light).synthesize(aa.Plan(prompt), seed=3) for light in (60, 120))
    plan = aa.Plan(rewritten or prompt, regions)
    return aa.ImagePair(prompt=prompt, seed=3, before=before, after=after, plan=plan)


LEFT = aa.Region(aa.Box(0.125, 0.25, 0.5, 1), f"a lamp {EVIL}")
SOFT = aa.Region(aa.Mask.from_array(np.eye(4)[:, :2]), "a soft glow")
ATTEMPTS = (
    aa.Kept(pair("a harbour", LEFT, SOFT), aa.Verdict(True, f"Light gained 0.23 {EVIL}", {"Light gain": 0.23})),
    aa.Kept(pair(f"a hill {EVIL}", LEFT, rewritten="a sunny hill"), aa.Verdict(True, "Light gained 0.20", {})),
    aa.Dropped(pair("a door", LEFT), aa.Verdict(False, "Light gained 0.01, need 0.1", {"Light gain": -0.01})),
    aa.Dropped(pair("a wall", LEFT), aa.Verdict(False, "Light gained 0.02, need 0.1", {"Light gain": 0.02})),
    aa.Skipped("a moor", 4, "the critic asked for nothing"),
    aa.Skipped(f"a pond {EVIL}", 5, f"the critic abstained: {EVIL}"),
)


def make_round(number=1, *, losses=(0.5, 0.3, 0.2), accepted=True, gain=None):
    training = aa.Training(lora=LORA, losses=losses, pairs=2, steps=len(losses), seconds=2.5)
    return aa.Round(
        number=number,
        attempts=ATTEMPTS,
        training=training,
        lora=LORA,
        seconds={"draw": 3700.0, "criticise": 0.25, "train": 65.0},
        gain=gain,
        accepted=accepted,
    )


def make_comparison(*, light=120, prompts=("a tree", f"a road {EVIL}", "a roof"), **options):
    candidates = {"round 1": Swatch(90), f"round 2 {EVIL}": Swatch(light)}
    options = {"scorers": [Evil(), Light()], "filtered_by": [EVIL], "progress": False, **options}
    return aa.compare(Swatch(), candidates, prompts, **options)


def make_result(*rounds, stopped="all 2 rounds ran"):
    return aa.Enhancement(rounds=rounds or (make_round(1), make_round(2)), stopped=stopped)


@dataclass
class Page(HTMLParser):
    """What a browser would see."""

    def __post_init__(self):
        super().__init__()
        self.tags, self.addresses, self.handlers, self.open, self.words, self.scripts = [], [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [text for name, text in attrs if name in {"src", "href", "srcset", "action", "poster"}]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag not in {"meta", "link", "img", "rect", "line", "circle", "polyline", "image"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        if tag in {"rect", "line", "circle", "polyline", "image"}:
            return
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        (self.scripts if self.open[-1:] == ["script"] else self.words).append(data)


def read(path):
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    page.text = re.sub(r"\s+", " ", " ".join(page.words))
    return page


@pytest.fixture
def written(tmp_path):
    path = write_report(tmp_path / "deep" / "report.html", result=make_result(), comparison=make_comparison())
    return read(path)


def test_the_page_shows_every_prompt_region_and_reason_as_text(written):
    said = ["a tree", f"a road {EVIL}", "a roof", "a harbour", f"a hill {EVIL}", f"a lamp {EVIL}", "a soft glow"]
    said += [f"Light gained 0.23 {EVIL}", "redrawn as “a sunny hill”", "Light gain 0.230"]
    said += ["the critic asked for nothing", f"the critic abstained: {EVIL}", f"round 2 {EVIL}", EVIL]
    missing = [text for text in said if re.sub(r"\s+", " ", text) not in written.text]
    assert missing == []


def test_nothing_that_was_said_runs(written):
    assert written.tags.count("script") == 1
    assert "alert" not in "".join(written.scripts)
    assert written.handlers == []


def test_only_the_pages_own_script_is_allowed_to_run(tmp_path):
    path = write_report(tmp_path / "report.html", result=make_result(), comparison=make_comparison())

    text = path.read_text(encoding="utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)[1]
    assert "default-src 'none'; img-src data:" in policy
    assert policy.count("sha256-") == 1
    assert "unsafe-eval" not in policy


def test_the_page_needs_nothing_but_itself(written):
    assert {address.partition(":")[0] for address in written.addresses} == {"data", "#pictures"}


def test_every_picture_decodes(written):
    pictures = [address for address in written.addresses if address.startswith("data:image/")]

    sizes = [Image.open(io.BytesIO(base64.b64decode(one.partition(",")[2]))).size for one in pictures]

    compared, learned, refused, masks = 3 * 3, 2 * 2 * 2, 2 * 2 * 2, 2
    assert len(sizes) == compared + learned + refused + masks
    assert sizes.count((2, 4)) == masks


def test_boxes_lie_where_the_critic_put_them(tmp_path):
    path = write_report(tmp_path / "report.html", result=make_result(), comparison=make_comparison())

    text = path.read_text(encoding="utf-8")
    assert f'x="0.125" y="0.25" width="0.375" height="0.75" stroke="{COLOURS[0]}"' in text
    assert f'style="left:12.5%;top:25.0%;background:{COLOURS[0]}">1</span>' in text


@pytest.mark.parametrize(
    ("light", "verb", "change"),
    [(120, "rises from", "+0.235"), (60, "does not clearly change, from", "+0.000"), (20, "falls from", "−0.157")],  # noqa: RUF001
)
def test_the_headline_tells_the_last_candidate_by_a_scorer_that_chose_no_pairs(light, verb, change, tmp_path):
    comparison = make_comparison(light=light)

    page = read(write_report(tmp_path / "report.html", result=make_result(), comparison=comparison))

    row = comparison.row("Light", f"round 2 {EVIL}")
    assert f"Light {verb} {row.base:.3f} to {row.enhanced:.3f} on 3 prompts." in page.text
    assert f"{change} on average (95% interval {change} to {change}), better on {row.win_rate:.1%}" in page.text


def test_a_headline_by_a_scorer_that_chose_the_pairs_says_so(tmp_path):
    comparison = make_comparison(scorers=[Light()], filtered_by=["Light"])

    page = read(write_report(tmp_path / "report.html", result=make_result(), comparison=comparison))

    assert "The training pairs were filtered by this scorer, so it says less than others would." in page.text


def test_every_prompt_is_accounted_for_and_reasons_that_differ_in_numbers_are_one(written):
    assert "2 kept" in written.text
    assert "2 dropped 2 Light gained …, need …" in written.text
    assert "2 skipped 1 the critic asked for nothing 1 the critic abstained" in written.text


def test_a_round_that_did_not_help_is_marked(tmp_path):
    gain = make_comparison(light=20).row("Light", f"round 2 {EVIL}")
    result = make_result(
        make_round(1), make_round(2, accepted=False, gain=gain), stopped="round 2 did not help on held-out prompts"
    )

    page = read(write_report(tmp_path / "report.html", result=result, comparison=make_comparison()))

    assert "Round 2 left out of the result" in page.text
    assert "Light moved by −0.157 (−0.157 to −0.157) against the round before" in page.text  # noqa: RUF001
    assert "How the loop ended: round 2 did not help on held-out prompts." in page.text
    assert "1 of 2 rounds helped" in page.text


def test_a_run_in_which_nothing_helped_has_a_report_too(tmp_path):
    result = make_result(make_round(1, accepted=False), stopped="round 1 did not help")

    page = read(write_report(tmp_path / "report.html", result=result, comparison=make_comparison(pictures=0)))

    assert "no LoRA: no round was accepted" in page.text
    assert "Side by side" not in page.text


def test_the_provenance_names_objects_seeds_and_versions(tmp_path):
    about = {"planner": aa.GreedyPlanner(max_regions=2), "note": "a second try"}
    comparison = make_comparison(prompts=[f"tree {number}" for number in range(6)])

    page = read(write_report(tmp_path / "report.html", result=make_result(), comparison=comparison, about=about))

    assert "GreedyPlanner(max_regions=2, " in page.text
    assert "note a second try" in page.text
    assert "round 1 drawn by Swatch(light=90, side=8)" in page.text
    assert f"{comparison.seeds[0]}, {comparison.seeds[1]}" in page.text
    assert "(6 in all, the same for every arm)" in page.text
    assert f"torch {torch.__version__}" in page.text


def test_times_are_told_in_units_that_fit(written):
    assert {"1 h 01 min", "0.2 s", "1 min 05 s"} <= {word.strip() for word in written.words}


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


def test_as_many_pairs_are_shown_as_asked_for(tmp_path):
    shown = [
        write_report(tmp_path / "report.html", result=make_result(), comparison=make_comparison(), pairs=pairs)
        .read_text(encoding="utf-8")
        .count('class="card pair"')
        for pairs in (0, 1, 50)
    ]

    assert shown == [0, 2 * 2, 2 * 4]


def test_the_same_run_gives_the_same_bytes_and_leaves_no_other_file(tmp_path):
    first, again = (
        write_report(tmp_path / name, result=make_result(), comparison=make_comparison(seed=4)) for name in "ab"
    )

    assert first.read_bytes() == again.read_bytes()
    assert sorted(tmp_path.iterdir()) == [first, again]


def test_a_title_heads_the_page_as_text(tmp_path):
    path = write_report(tmp_path / "r.html", result=make_result(), comparison=make_comparison(), title=EVIL)

    assert EVIL in read(path).text
    assert EVIL not in path.read_text(encoding="utf-8")


def test_fewer_than_no_pairs_are_refused(tmp_path):
    with pytest.raises(aa.InvalidValueError, match="pairs=-1"):
        write_report(tmp_path / "report.html", result=make_result(), comparison=make_comparison(), pairs=-1)


def test_without_jinja2_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)

    with pytest.raises(
        aa.MissingExtraError, match=r'write_report needs the jinja2 package. Run: pip install "artaug\[rep'
    ):
        write_report(tmp_path / "report.html", result=make_result(), comparison=make_comparison())


def opened(path, folder):
    """Open a page in a browser without a window: its final markup, and what its console said."""
    quiet = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-sync"
    flags = [f"--{flag}" for flag in [*quiet.split(), "disable-component-update", "enable-logging=stderr", "dump-dom"]]
    done = subprocess.run(
        [CHROMIUM, *flags, f"--user-data-dir={folder}", "--virtual-time-budget=2000", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH to open the report with")
def test_a_browser_opens_the_report_without_complaint(tmp_path):
    path = write_report(tmp_path / "report.html", result=make_result(), comparison=make_comparison())
    text = path.read_text(encoding="utf-8")
    foreign = path.with_name("foreign.html")
    foreign.write_text(text.replace("</main>", "<script>document.title = 'taken'</script></main>"), encoding="utf-8")

    markup, complaints = opened(path, tmp_path / "profile")
    foreign_markup, foreign_complaints = opened(foreign, tmp_path / "profile")

    assert complaints == []
    assert "<dialog" in markup
    assert "Content Security Policy" in " ".join(foreign_complaints)  # so the first silence means something
    assert "<title>taken</title>" not in foreign_markup
