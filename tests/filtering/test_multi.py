"""Filters by several scorers, and by similarity."""

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import artaug as aa
from artaug.filtering import judge_pairs
from artaug.scorers import Chroma, Exposure
from artaug.testing import check_filter
from support.strategies import Listed, pair, pairs


@dataclass(frozen=True)
class Darkness(aa.Scorer):
    """Falls where `Listed` rises."""

    def score(self, image, prompt):
        return -image.getpixel((0, 0)) / 10


pair_lists = st.lists(pairs, min_size=1, max_size=8)
tolerances = st.floats(0, 30)


@given(pair_lists, tolerances, tolerances)
def test_nothing_fell_too_far_and_something_rose(pairs, tolerance, dark_tolerance):
    verdicts = judge_pairs(aa.ParetoGain([Listed(), Darkness()], tolerance=[tolerance, dark_tolerance]), pairs)

    gains = [Listed().score(pair.after, "") - Listed().score(pair.before, "") for pair in pairs]
    assert [verdict.keep for verdict in verdicts] == [
        gain >= -tolerance and -gain >= -dark_tolerance and gain != 0 for gain in gains
    ]


@pytest.mark.parametrize(
    ("tolerance", "keep"), [(2.0, True), (math.nextafter(2.0, 0), False), (math.nextafter(2.0, 3), True)]
)
def test_a_fall_of_exactly_the_tolerance_is_allowed_and_any_more_is_not(tolerance, keep):
    assert aa.ParetoGain([Listed(), Darkness()], tolerance=tolerance).judge(pair(10, 30)).keep is keep
    assert aa.ParetoGain([Listed(), Darkness()], tolerance=[0, tolerance]).judge(pair(10, 30)).keep is keep
    assert aa.ParetoGain([Listed(), Darkness()], tolerance=[tolerance, 0]).judge(pair(30, 10)).keep is keep


def test_by_default_no_score_may_fall():
    assert not aa.ParetoGain([Listed(), Darkness()]).judge(pair(10, 11)).keep
    assert aa.ParetoGain([Listed()]).judge(pair(10, 11)).keep


def test_a_fall_within_the_tolerance_is_no_rise():
    assert not aa.ParetoGain([Listed()], tolerance=9.0).judge(pair(30, 10)).keep
    assert not aa.ParetoGain([Listed()], tolerance=9.0).judge(pair(30, 30)).keep


def test_the_smallest_gain_is_a_rise():
    @dataclass(frozen=True)
    class Negligible(aa.Scorer):
        def score(self, image, prompt):
            return math.ulp(0.0) * image.getpixel((0, 0))

    assert aa.ParetoGain([Negligible()]).judge(pair(0, 1)).keep
    assert not aa.ParetoGain([Negligible()]).judge(pair(1, 0)).keep


@pytest.mark.parametrize(("at_least", "keep"), [(0.8, True), (math.nextafter(0.8, 1), False)])
def test_a_similarity_of_exactly_the_threshold_is_kept_and_the_next_number_below_is_not(at_least, keep):
    assert aa.Similarity(lambda *_: 0.8, at_least).judge(pair(0, 1)).keep is keep


@given(pair_lists, tolerances)
def test_more_tolerance_keeps_no_less(pairs, tolerance):
    strict, loose = (
        judge_pairs(aa.ParetoGain([Listed(), Darkness()], tolerance=allowed), pairs)
        for allowed in (tolerance, 2 * tolerance)
    )
    assert all(after.keep or not before.keep for before, after in zip(strict, loose, strict=True))


def test_a_pareto_verdict_names_the_scorers_that_fell_or_says_that_nothing_rose():
    keep = aa.ParetoGain([Listed(), Darkness()], tolerance=0.5)
    assert keep.judge(pair(10, 30)).reason == "Darkness fell by 2, allowed 0.5"
    assert keep.judge(pair(10, 10)).reason == "nothing rose: Listed rose by 0, Darkness rose by 0"
    kept = keep.judge(pair(10, 13))
    assert (kept.keep, kept.reason) == (True, "Listed rose by 0.3, Darkness fell by 0.3")
    assert set(kept.scores) == {
        f"{name} {number}" for name in ("Listed", "Darkness") for number in ("before", "after", "gain")
    }
    assert keep.scorers == {"Listed", "Darkness"}


@pytest.mark.parametrize(
    ("scorers", "tolerance"),
    [
        ([], 0.0),
        ([Listed(), Listed()], 0.0),
        ([Listed()], -1.0),
        ([Listed()], math.nan),
        ([Listed()], [0.1, 0.2]),
        ([Listed(), Darkness()], [0.1, -1.0]),
        ([Listed(), Darkness()], [math.nan, 0.1]),
        ([Listed(), Darkness()], [0.1]),
        ([Listed(), Darkness()], [math.inf, 0.1]),
    ],
)
def test_an_illegal_pareto_filter_is_refused(scorers, tolerance):
    with pytest.raises(
        aa.InvalidValueError, match=r"Expected at least one, and different names|one such number for each scorer"
    ):
        aa.ParetoGain(scorers, tolerance=tolerance)


def test_a_pareto_filter_does_not_change_with_the_lists_it_was_made_of():
    scorers, tolerances = [Listed(), Darkness()], [0.0, 2.0]
    keep = aa.ParetoGain(scorers, tolerance=tolerances)
    scorers.pop()
    tolerances[:] = [9.0, 0.0]
    assert (keep.by, keep.tolerance) == ((Listed(), Darkness()), (0.0, 2.0))
    assert keep.judge(pair(10, 30)).keep


def test_a_similarity_takes_any_function_of_two_pictures():
    def nearness(before, after):
        return 1 - abs(before.getpixel((0, 0)) - after.getpixel((0, 0))) / 255

    keep = aa.Similarity(nearness, at_least=0.9)

    verdict = keep.judge(pair(0, 51))
    assert verdict == aa.Verdict(keep=False, reason="nearness is 0.8, threshold 0.9", scores={"nearness": 0.8})
    assert (~keep).judge(pair(0, 51)).keep
    assert keep.judge(pair(7, 7)).keep
    assert keep.scorers == frozenset()


@given(pair_lists, st.floats(-1, 1))
def test_a_similarity_keeps_exactly_the_pairs_at_or_above_the_threshold(pairs, at_least):
    metric = aa.StructuralSimilarity()
    kept = [verdict.keep for verdict in judge_pairs(aa.Similarity(metric, at_least), pairs)]
    assert kept == [metric.compare(pair.before, pair.after) >= at_least for pair in pairs]


def test_a_similarity_needs_a_finite_threshold():
    with pytest.raises(aa.InvalidValueError, match=r"Similarity\(at_least=inf\): expected a finite number"):
        aa.Similarity(aa.StructuralSimilarity(), math.inf)


def test_a_scorer_that_raises_on_one_picture_says_which_prompt_and_scorer():
    class Brittle(aa.Scorer):
        def score(self, image, prompt):
            return 1 / image.getpixel((0, 0))

    with pytest.raises(
        aa.ScoringError, match=r"'Brittle' raised ZeroDivisionError.*for the picture of 'a pear'"
    ) as caught:
        judge_pairs(aa.ParetoGain([Brittle()]), [pair(1, 2), pair(0, 2)])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    "keep",
    [
        aa.ParetoGain([Chroma(), Exposure()], tolerance=0.1),
        aa.Similarity(aa.StructuralSimilarity(), 0.5),
        aa.Similarity(aa.StructuralSimilarity(side_px=8), 0.5) & aa.ParetoGain([Chroma()]),
    ],
    ids=repr,
)
def test_every_filter_passes_its_check(keep):
    check_filter(keep)


def test_pictures_of_two_sizes_cannot_be_compared():
    with pytest.raises(aa.InvalidValueError, match="differ in size"):
        aa.StructuralSimilarity().compare(Image.new("L", (4, 4)), Image.new("L", (4, 5)))
