"""Comparisons of small synthesizers whose pictures, and so whose scores, are known."""

import json
import math
import zlib
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import artaug as aa
from artaug.evaluation.statistics import holm, paired_bootstrap, sign_flip, tie_rate, win_rate
from artaug.scorers import Chroma, Photometric, Sharpness
from artaug.synthesis import picture_seeds
from support.clock import FakeTime

PROMPTS = [f"picture {number}" for number in range(20)]


@dataclass(frozen=True)
class Grey(aa.Synthesizer):
    """A flat picture whose brightness depends on prompt, seed and ``offset``."""

    offset: int = 0
    drawn: list[tuple[str, int]] = field(default_factory=list, repr=False)

    def synthesize(self, plan, *, seed):
        self.drawn.append((plan.prompt, seed))
        light = 50 + zlib.crc32(f"{plan.prompt} {seed}".encode()) % 100
        return Image.new("L", (4, 4), light + self.offset * (seed % 3))


class Light(aa.Scorer):
    def score(self, image, prompt):
        return image.getpixel((0, 0)) / 255


@dataclass(frozen=True)
class Constant(aa.Scorer):
    label: str
    value: float = 0.0

    @property
    def name(self):
        return self.label

    def score(self, image, prompt):
        return self.value


def make_comparison(base=Grey(), candidates=None, prompts=PROMPTS, **options):
    candidates = {"round 1": Grey(40), "round 2": Grey(80)} if candidates is None else candidates
    options = {"scorers": [Light()], "progress": False, **options}
    return aa.compare(base, candidates, prompts, **options)


def test_a_row_is_computed_from_the_scores_of_both_arms():
    comparison = make_comparison(seed=5)

    row = comparison.row("Light", "round 2")
    base, enhanced = comparison.base.scores["Light"], comparison.candidates["round 2"].scores["Light"]
    differences = np.subtract(enhanced, base)
    interval = paired_bootstrap(differences, seed=5)
    assert (row.base, row.enhanced, row.delta) == (np.mean(base), np.mean(enhanced), differences.mean())
    assert (row.ci_low, row.ci_high, row.win_rate) == (interval.low, interval.high, win_rate(differences))
    assert row.n == len(PROMPTS)
    assert row.ci_low <= row.delta <= row.ci_high


def test_every_arm_draws_the_same_prompts_with_the_same_seeds_and_the_base_draws_once():
    arms = [Grey(drawn=[]), Grey(1, []), Grey(2, [])]

    comparison = make_comparison(arms[0], {"round 1": arms[1], "round 2": arms[2]}, seed=7, batch_size=3)

    expected = list(zip(PROMPTS, picture_seeds(7, len(PROMPTS)), strict=True))
    assert [arm.drawn for arm in arms] == [expected] * 3
    assert list(zip(comparison.prompts, comparison.seeds, strict=True)) == expected


def test_the_same_synthesizer_is_no_better_than_itself():
    row = make_comparison(candidates={"twin": Grey()}).rows[0]

    assert (row.delta, row.ci_low, row.ci_high, row.win_rate) == (0, 0, 0, 0.5)
    assert row.direction == 0


def test_swapping_base_and_candidate_flips_the_sign():
    forward = make_comparison(Grey(), {"other": Grey(40)}).rows[0]
    backward = make_comparison(Grey(40), {"other": Grey()}).rows[0]

    assert backward.delta == pytest.approx(-forward.delta)
    assert backward.win_rate == pytest.approx(1 - forward.win_rate)
    assert (forward.direction, backward.direction) == (1, -1)


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_the_batch_size_changes_nothing(batch_size):
    assert make_comparison(batch_size=batch_size).to_dict() == make_comparison().to_dict()


def test_another_seed_draws_other_pictures():
    assert make_comparison(seed=1).base.scores != make_comparison(seed=2).base.scores


@pytest.mark.parametrize(("keep_images", "kept"), [(0, 0), (5, 5), (100, 20)])
def test_only_the_first_pictures_are_kept(keep_images, kept):
    comparison = make_comparison(keep_images=keep_images, batch_size=3)

    inputs = zip(PROMPTS, comparison.seeds, strict=True)
    expected = [Grey().synthesize(aa.Plan(prompt), seed=seed) for prompt, seed in inputs]
    assert list(comparison.base.images) == expected[:kept]
    assert [len(arm.images) for arm in comparison.candidates.values()] == [kept, kept]


def test_the_table_is_aligned_and_marks_what_filtered_the_pairs():
    table = make_comparison(scorers=[Light(), Constant("Chroma", 0.25)], filtered_by=["Chroma"], seed=3).table()

    heading, rule, *lines = table.splitlines()[:6]
    assert heading.split() == ["scorer", "candidate", "base", "enhanced", "difference", "95%", "interval", "wins"]
    assert [line.split()[0] for line in lines] == ["Light", "round", "Chroma", "round"]
    assert lines[2].startswith("Chroma *  round 1    0.250     0.250      +0.000")
    assert {len(line) for line in (heading, rule, *lines)} == {len(rule)}
    assert "20 prompts" in table
    assert table.endswith("* The training pairs were filtered by this scorer, so it says less than the others.")


def test_a_table_without_filtering_scorers_has_no_dagger():
    assert "*" not in make_comparison().table()


@pytest.mark.parametrize(("half", "decimals"), [(0.0, 3), (2.5, 3), (0.03, 3), (0.0004, 4), (1e-12, 8)])
def test_numbers_are_printed_as_finely_as_the_interval_needs(half, decimals):
    row = aa.ScoreRow("a", "b", 0.0, 0.0, 0.0, -half, half, 0.5, 9)

    assert row.decimals == decimals


def test_the_summary_is_plain_json_from_which_every_number_follows():
    comparison = make_comparison(filtered_by=["Light"])

    summary = json.loads(json.dumps(comparison.to_dict()))

    row, scores = summary["rows"][0], summary["scores"]
    assert row["filtered_by"] is True
    assert np.subtract(scores["round 1"]["Light"], scores["base"]["Light"]).mean() == row["delta"]
    assert summary["synthesizers"] == {
        "base": "Grey(offset=0)",
        "round 1": "Grey(offset=40)",
        "round 2": "Grey(offset=80)",
    }
    assert (summary["prompts"], summary["seeds"]) == (PROMPTS, list(comparison.seeds))


def test_a_notebook_shows_the_table_with_names_escaped():
    page = make_comparison(scorers=[Constant("<i>bold</i>")])._repr_html_()

    assert "&lt;i&gt;bold&lt;/i&gt;" in page
    assert "<i>" not in page
    assert page.count("<tr>") == 3


def test_a_comparison_cannot_be_changed():
    comparison = make_comparison()

    with pytest.raises(TypeError):
        comparison.candidates["round 3"] = comparison.base
    with pytest.raises(TypeError):
        comparison.base.scores["Light"] = ()


def test_a_bar_an_arm_shows_the_progress(capsys):
    make_comparison(progress=True)

    bars = capsys.readouterr().err
    assert all(f"compare {name}: " in bars for name in ("base", "round 1", "round 2"))


def test_a_missing_row_names_those_there_are():
    with pytest.raises(
        aa.InvalidValueError, match=r"no row \('Light', 'round 9'\). There are: \('Light', 'round 1'\), "
    ):
        make_comparison().row("Light", "round 9")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        pytest.param({"prompts": []}, aa.PromptError, "there are no prompts", id="no-prompts"),
        pytest.param({"prompts": ["a hill"]}, aa.PromptError, "at least 2 prompts, received 1", id="one-prompt"),
        pytest.param({"prompts": "a hill"}, aa.PromptError, "Put it in a list: .'a hill'.", id="a-string"),
        pytest.param(
            {"scorers": []}, aa.InvalidValueError, r"scorers named \[\]. Expected at least one", id="no-scorers"
        ),
        pytest.param(
            {"scorers": [Light(), Light()]},
            aa.InvalidValueError,
            "different names: override Scorer.name",
            id="one-name",
        ),
        pytest.param(
            {"candidates": {}}, aa.InvalidValueError, r"candidates \[\]. Expected at least one", id="no-candidate"
        ),
        pytest.param({"candidates": {"base": Grey()}}, aa.InvalidValueError, "none called 'base'", id="base-twice"),
        pytest.param({"filtered_by": "Light"}, aa.InvalidValueError, "received a str", id="no-list"),
        pytest.param({"filtered_by": aa.Gain(Light())}, aa.InvalidValueError, "received a Gain", id="one-filter"),
        pytest.param({"filtered_by": [3]}, aa.InvalidValueError, "received 3 among them", id="no-filter"),
        pytest.param(
            {"batch_size": 0},
            aa.InvalidValueError,
            r"batch_size=0\): expected a whole number of at least 1",
            id="no-batch",
        ),
        pytest.param({"images_per_prompt": 0}, aa.InvalidValueError, r"images_per_prompt=0\): expected", id="no-draw"),
        pytest.param(
            {"diversity": aa.StructuralSimilarity()},
            aa.InvalidValueError,
            "need at least 2 pictures a prompt",
            id="alone",
        ),
        pytest.param(
            {"guardrails": [aa.Guardrail("Sharp", 0.1)]},
            aa.InvalidValueError,
            r"Expected different ones of",
            id="no-row",
        ),
        pytest.param(
            {"keep_images": -1}, aa.InvalidValueError, r"keep_images=-1\): expected a whole", id="less-than-no-picture"
        ),
        pytest.param(
            {"scorers": [Constant("Broken", math.nan)]},
            aa.NonFiniteError,
            r"Broken.score_batch returned nan for picture 0 \('picture 0'\)",
            id="nan",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(options, error, text):
    with pytest.raises(error, match=text):
        make_comparison(**options)


def test_nothing_is_drawn_before_the_arguments_are_sound():
    base = Grey(drawn=[])

    with pytest.raises(aa.InvalidValueError):
        make_comparison(base, filtered_by="Light")

    assert base.drawn == []


def test_a_synthesizer_that_draws_too_little_is_named():
    class Empty(Grey):
        def synthesize_batch(self, plans, *, seeds):
            return []

    with pytest.raises(aa.ContractError, match=r"Empty\.synthesize_batch returned 0 answers for 8 plans"):
        make_comparison(Empty())


def test_a_mean_is_marked_if_the_pairs_were_filtered_by_a_part_of_it():
    comparison = make_comparison(scorers=[Photometric(), Chroma(), Sharpness()], filtered_by=aa.Gain(Chroma()).scorers)
    marked = {row.scorer: row.filtered_by for row in comparison.rows}
    assert marked == {"Photometric": True, "Chroma": True, "Sharpness": False}


def test_the_pairs_may_be_filtered_by_a_scorer_the_comparison_does_without():
    assert not make_comparison(scorers=[Sharpness()], filtered_by=aa.Gain(Chroma()).scorers).rows[0].filtered_by


def test_several_seeds_a_prompt_still_count_it_once():
    base, comparison = Grey(drawn=[]), make_comparison(images_per_prompt=3, seed=2, batch_size=6)
    make_comparison(base, images_per_prompt=3, seed=2, batch_size=6)

    assert sorted(base.drawn) == sorted(zip(PROMPTS * 3, picture_seeds(2, 60), strict=True))
    row = comparison.row("Light", "round 2")
    differences = np.subtract(comparison.candidates["round 2"].scores["Light"], comparison.base.scores["Light"])
    per_prompt = differences.reshape(3, 20).mean(axis=0)
    assert (row.n, comparison.images_per_prompt) == (20, 3)
    assert row.delta == pytest.approx(per_prompt.mean())
    assert (row.win_rate, row.tie_rate) == (win_rate(per_prompt), tie_rate(per_prompt))
    assert "20 prompts, each drawn with the same 3 seeds" in comparison.table()


def test_prompts_that_are_listed_twice_are_one_sample():
    twice = [*PROMPTS[:10], *(f" {prompt.upper()}." for prompt in PROMPTS[:10])]
    comparison = make_comparison(prompts=twice, seed=2)
    row = comparison.row("Light", "round 2")
    differences = np.subtract(comparison.candidates["round 2"].scores["Light"], comparison.base.scores["Light"])
    per_prompt = differences.reshape(2, 10).mean(axis=0)
    interval = paired_bootstrap(per_prompt, seed=2)
    assert (row.n, row.win_rate, row.tie_rate) == (10, win_rate(per_prompt), tie_rate(per_prompt))
    assert [row.delta, row.ci_low, row.ci_high] == pytest.approx([per_prompt.mean(), interval.low, interval.high])
    assert row.p_value == sign_flip(per_prompt, seed=2)
    assert "20 prompts (10 different ones, each counts once), each drawn" in comparison.table()
    base, enhanced = comparison.paired_scores("Light", "round 2")
    assert enhanced - base == pytest.approx(per_prompt)
    with pytest.raises(aa.InvalidValueError, match="has no row"):
        comparison.paired_scores("Light", "round 3")
    with pytest.raises(aa.PromptError, match="at least 2 prompts, received 3, all the same"):
        make_comparison(prompts=["a hill", "A hill", "a hill."])


def test_the_first_seeds_are_those_of_a_comparison_with_one():
    assert make_comparison(images_per_prompt=3).base.scores["Light"][:20] == make_comparison().base.scores["Light"]
    assert make_comparison(images_per_prompt=3).base.images == make_comparison().base.images


def test_p_values_are_corrected_over_the_scorers_of_a_candidate():
    scorers = [Light(), Sharpness(), Constant("still", 1.0)]
    comparison = make_comparison(scorers=scorers, seed=3)

    for name, arm in comparison.candidates.items():
        deltas = [np.subtract(arm.scores[scorer.name], comparison.base.scores[scorer.name]) for scorer in scorers]
        raw = [sign_flip(differences, seed=3) for differences in deltas]
        assert [comparison.row(scorer.name, name).p_value for scorer in scorers] == holm(raw)


def test_diversity_is_one_less_the_similarity_of_the_pictures_of_a_prompt():
    def similarity(first, second):
        return 1 - abs(first.getpixel((0, 0)) - second.getpixel((0, 0))) / 255

    comparison = make_comparison(
        candidates={"wider": Grey(50), "twin": Grey()}, images_per_prompt=2, diversity=similarity
    )

    levels = np.array(comparison.base.scores["Light"]).reshape(2, 20)
    assert comparison.base.scores["diversity"] == pytest.approx(abs(levels[0] - levels[1]))
    assert comparison.row("diversity", "twin").delta == 0
    assert comparison.row("diversity", "wider").n == 20


def test_identical_pictures_are_ties_and_nothing_is_called_a_gain():
    comparison = make_comparison(candidates={"twin": Grey()}, guardrails=[aa.Guardrail("Light", 0.02)])

    row = comparison.rows[0]
    assert (row.tie_rate, row.win_rate, row.p_value) == (1, 0.5, 1)
    assert comparison.verdict("twin") == "Light unchanged [0.00, 0.00], inside the guardrail of -2%"
    assert "50.0% (100.0% ties)" in comparison.table()


def a_row(scorer="taste", *, base=5.0, delta, low, high, p_value=0.001, filtered_by=False):
    return aa.ScoreRow(
        scorer, "round 1", base, base + delta, delta, low, high, 0.6, 64, filtered_by=filtered_by, p_value=p_value
    )


@pytest.mark.parametrize(
    ("row", "guardrail", "verdict"),
    [
        (a_row(delta=0.31, low=0.24, high=0.38), None, "taste up 0.31 [0.24, 0.38]"),
        (a_row(delta=-0.31, low=-0.38, high=-0.24), None, "taste down 0.31 [-0.38, -0.24]"),
        (a_row(delta=0.01, low=-0.02, high=0.04, p_value=0.6), None, "taste not clearly changed: +0.01 [-0.02, 0.04]"),
        (
            a_row(delta=0.3, low=0.1, high=0.5, p_value=0.08),
            None,
            "taste not significant: +0.30 [0.10, 0.50], but p = 0.08 after Holm",
        ),
        (
            a_row(delta=0.3, low=0.1, high=0.5, filtered_by=True),
            None,
            "taste up 0.30 [0.10, 0.50] (no evidence of a gain: the training pairs were filtered by it)",
        ),
        (
            a_row("diversity", base=0.5, delta=-0.02, low=-0.03, high=-0.01),
            aa.Guardrail("diversity", 0.02),
            "diversity down 4% (0.02) [-0.03, -0.01], outside the guardrail of -2%",
        ),
        (
            a_row(delta=0.0, low=-0.05, high=0.05, p_value=1.0),
            aa.Guardrail("taste", 0.02),
            "taste unchanged [-0.05, 0.05], inside the guardrail of -2%",
        ),
        (
            a_row(delta=0.0, low=-0.5, high=0.5, p_value=1.0),
            aa.Guardrail("taste", 0.1, relative=False),
            "taste not clearly changed: +0.00 [-0.50, 0.50], perhaps outside the guardrail of -0.1: more prompts would narrow the interval",
        ),
    ],
)
def test_a_verdict_in_words(row, guardrail, verdict):
    arm = aa.Arm(synthesizer="x", scores={row.scorer: (1.0, 2.0)}, images=())
    comparison = aa.Comparison(
        rows=(row,),
        prompts=("a", "b"),
        seeds=(1, 2),
        base=arm,
        candidates={"round 1": arm},
        guardrails=() if guardrail is None else (guardrail,),
    )
    assert comparison.verdict("round 1") == verdict
    with pytest.raises(aa.InvalidValueError, match="no candidate 'round 2'"):
        comparison.verdict("round 2")


def test_undefined_guardrails_are_refused_or_reported():
    with pytest.raises(aa.InvalidValueError, match="need a finite max_drop"):
        aa.Guardrail("taste", -0.1)
    row = a_row(base=-1.0, delta=0.1, low=0.05, high=0.2)
    assert aa.Guardrail("taste", 0.1).status(row) == "undefined"
    with pytest.raises(aa.InvalidValueError, match=r"is undefined\. Use relative=False"):
        aa.Guardrail("taste", 0.1).margin(row)
    assert aa.Guardrail("taste", 0.1, relative=False).status(row) == "inside"


@pytest.mark.parametrize("base", [0.0, -0.5])
def test_an_undefined_guardrail_does_not_end_the_comparison(base):
    still = Constant("taste", base)
    comparison = make_comparison(scorers=[still, Light()], guardrails=[aa.Guardrail("taste", 0.02)])
    assert comparison.verdict("round 1").startswith(
        f"taste not clearly changed: +0.00 [0.00, 0.00], its guardrail of -2% is undefined, as the base's mean is {base:.3g}: "
        "set one with relative=False; Light up"
    )
    json.dumps(comparison.to_dict())


def test_filters_and_candidates_may_be_given_as_filtered_by():
    keep, candidates = aa.Gain(Chroma()) & aa.Floor(Light(), 0.1), aa.BestOf(4, by=Sharpness())
    scorers = [Light(), Chroma(), Sharpness(), Constant("free")]
    rows = make_comparison(scorers=scorers, filtered_by=[keep, candidates, "Constant"], candidates={"a": Grey(1)}).rows
    assert [row.filtered_by for row in rows] == [True, True, True, False]
    assert [
        row.filtered_by for row in make_comparison(scorers=scorers, filtered_by=[keep], candidates={"a": Grey(1)}).rows
    ] == [
        True,
        True,
        False,
        False,
    ]


@dataclass(frozen=True)
class Brittle(Light):
    """Raises on some pictures: by prompt, and perhaps only lit ones."""

    prompts: tuple = ("picture 3",)
    above: float = 0.0
    error: type = OSError

    def score(self, image, prompt):
        if prompt in self.prompts and super().score(image, prompt) >= self.above:
            raise self.error("no memory card")
        return super().score(image, prompt)


def test_a_scorer_that_raises_on_one_picture_loses_no_other_score_and_is_reported():
    complete = make_comparison(seed=2)
    with pytest.raises(
        aa.ScoringError, match=r"Brittle raised on 3 pictures, first on base's of 'picture 3'"
    ) as caught:
        make_comparison(scorers=[Brittle(), Light()], seed=2)

    comparison, cause = caught.value.comparison, caught.value.__cause__
    assert isinstance(cause, OSError)
    assert [(failure.arm, failure.prompt, failure.error) for failure in comparison.failures] == [
        (arm, "picture 3", "OSError: no memory card") for arm in ("base", "round 1", "round 2")
    ]
    assert comparison.row("Light", "round 1").delta == complete.row("Light", "round 1").delta
    remaining = np.delete(np.subtract(complete.candidates["round 1"].scores["Light"], complete.base.scores["Light"]), 3)
    row = comparison.row("Brittle", "round 1")
    interval = paired_bootstrap(remaining, seed=2)
    assert (row.n, row.delta, row.ci_low, row.ci_high) == (19, remaining.mean(), interval.low, interval.high)
    assert (
        "Brittle raised on 3 pictures, first on base's of 'picture 3' (OSError: no memory card)" in comparison.table()
    )
    summary = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert summary["scores"]["base"]["Brittle"][3] is None
    assert len(summary["failures"]) == 3


def test_a_picture_that_only_one_arm_cannot_be_scored_on_leaves_its_prompt_out_of_that_arms_rows():
    lights = np.array(make_comparison().candidates["round 2"].scores["Light"])
    brightest = PROMPTS[int(lights.argmax())]
    with pytest.raises(aa.ScoringError) as caught:
        make_comparison(scorers=[Brittle(prompts=(brightest,), above=lights.max())], images_per_prompt=1)
    rows = caught.value.comparison.rows
    assert [(row.candidate, row.n) for row in rows] == [("round 1", 20), ("round 2", 19)]


def test_a_nan_on_one_picture_is_a_scoring_failure_too():
    class Undefined(Light):
        def score(self, image, prompt):
            return math.nan if prompt == "picture 3" else super().score(image, prompt)

    with pytest.raises(
        aa.ScoringError, match=r"Undefined.score_batch returned nan for picture \d+ \('picture 3'\)"
    ) as caught:
        make_comparison(scorers=[Undefined()])
    assert caught.value.comparison.rows[0].n == 19


def test_a_scorer_that_fails_on_everything_raises_at_once():
    base = Grey(drawn=[])
    with pytest.raises(aa.ScoringError, match="the scorer 'Brittle' raised KeyError: 'no memory card'") as caught:
        make_comparison(base, scorers=[Brittle(prompts=tuple(PROMPTS), error=KeyError)])
    assert isinstance(caught.value.__cause__, KeyError)
    assert len(base.drawn) == 8


def test_a_scorer_that_stays_away_ends_a_comparison_after_ten_minutes_and_gives_back_what_it_had_scored(monkeypatch):
    clock = FakeTime()
    monkeypatch.setattr("artaug._internal.calls.time", clock)
    with pytest.raises(aa.ScoringError, match="'Brittle' has not answered for 10 minutes") as caught:
        make_comparison(scorers=[Brittle(prompts=tuple(PROMPTS[8:]), error=TimeoutError)])
    assert sum(clock.slept) <= 600
    assert caught.value.scores["base"]["Brittle"][:8] == list(make_comparison().base.scores["Light"][:8])


def test_a_scorer_that_fails_later_gives_back_what_it_had_scored():
    with pytest.raises(aa.ScoringError, match=r"first on base's of 'picture 8'") as caught:
        make_comparison(scorers=[Brittle(prompts=tuple(PROMPTS[8:]))])
    assert caught.value.comparison is None
    scores = np.array(caught.value.scores["base"]["Brittle"])
    assert scores[:8].tolist() == list(make_comparison().base.scores["Light"][:8])
    assert np.isnan(scores[8:]).all()


def test_too_few_scores_for_a_row_are_no_comparison():
    with pytest.raises(aa.ScoringError) as caught:
        make_comparison(scorers=[Brittle(prompts=tuple(PROMPTS[1:]))], batch_size=20)
    assert caught.value.comparison is None
    assert len(caught.value.scores) == 3


def test_two_scores_in_every_row_are_enough_for_a_comparison():
    with pytest.raises(aa.ScoringError) as caught:
        make_comparison(scorers=[Brittle(prompts=tuple(PROMPTS[2:]))], batch_size=20)
    assert [row.n for row in caught.value.comparison.rows] == [2, 2]


def test_running_out_of_memory_on_a_single_picture_is_raised_as_it_is():
    scorers = [Brittle(prompts=tuple(PROMPTS[2:]), error=torch.OutOfMemoryError)]
    with pytest.raises(torch.OutOfMemoryError):
        make_comparison(scorers=scorers, batch_size=20)


def test_a_batch_that_fails_though_its_pictures_do_not_is_reported():
    class Crowded(Light):
        def score_batch(self, images, prompts):
            if len(images) > 1:
                raise RuntimeError("too much at once")
            return super().score_batch(images, prompts)

    with pytest.raises(
        aa.ScoringError, match=r"too much at once, though each picture alone is scored: lower batch_size"
    ) as caught:
        make_comparison(scorers=[Crowded()])
    assert caught.value.comparison.rows[0].n == 20


def test_a_scorer_that_returns_too_few_scores_is_named():
    class Short(Light):
        def score_batch(self, images, prompts):
            return []

    with pytest.raises(aa.ContractError, match=r"Short.score_batch returned 0 answers for 8 pictures"):
        make_comparison(scorers=[Short()])


numbers = st.floats(allow_nan=False, allow_infinity=False)
shares = st.floats(0, 1)
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)


@st.composite
def comparisons(draw):
    prompts = tuple(draw(st.lists(names, min_size=1, max_size=4)))
    scorers = draw(st.lists(names, min_size=1, max_size=3, unique=True))
    candidates = draw(st.lists(names.filter(lambda name: name != "base"), min_size=1, max_size=3, unique=True))

    def arm():
        scores = st.tuples(*[numbers | st.just(math.nan)] * len(prompts))
        return aa.Arm(synthesizer=draw(names), scores={scorer: draw(scores) for scorer in scorers}, images=())

    rows = tuple(
        aa.ScoreRow(scorer, candidate, *(draw(numbers) for _ in range(5)), draw(shares), 3, draw(st.booleans()))
        for scorer in scorers
        for candidate in candidates
    )
    return aa.Comparison(
        rows=rows,
        prompts=prompts,
        seeds=tuple(draw(st.integers(0, 2**53)) for _ in prompts),
        base=arm(),
        candidates={name: arm() for name in candidates},
        guardrails=tuple(draw(st.lists(st.builds(aa.Guardrail, st.sampled_from(scorers), shares), max_size=2))),
        failures=tuple(
            draw(st.lists(st.builds(aa.ScoringFailure, names, names, names, st.integers(), names), max_size=2))
        ),
    )


@given(comparisons())
def test_a_comparison_is_the_same_after_a_round_trip_through_json(comparison):
    content = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    found = aa.Comparison.from_dict(content)
    assert found.to_dict() == content
    assert list(found.candidates) == list(comparison.candidates)
    if not any(
        math.isnan(score)
        for arm in (comparison.base, *comparison.candidates.values())
        for scores in arm.scores.values()
        for score in scores
    ):
        assert found == comparison


@pytest.mark.parametrize("content", [{}, [], {"rows": object()}, None])
def test_something_else_than_a_comparison_is_refused(content):
    with pytest.raises(aa.InvalidValueError, match=r"not what Comparison\.to_dict returns|expected a dict"):
        aa.Comparison.from_dict(content)


def test_a_comparison_without_its_base_is_refused():
    content = make_comparison().to_dict()
    del content["synthesizers"]["base"]
    with pytest.raises(aa.InvalidValueError, match="no base"):
        aa.Comparison.from_dict(content)
