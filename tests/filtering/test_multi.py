"""Filters by more than one number."""

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


several = st.lists(pairs, min_size=1, max_size=8)
tolerances = st.floats(0, 30)


@given(several, tolerances, tolerances)
def test_nothing_fell_too_far_and_something_rose(pairs, one, other):
    verdicts = judge_pairs(aa.ParetoGain([Listed(), Darkness()], tolerance=[one, other]), pairs)

    gains = [Listed().score(each.after, "") - Listed().score(each.before, "") for each in pairs]
    assert [verdict.keep for verdict in verdicts] == [gain >= -one and -gain >= -other and gain != 0 for gain in gains]


@given(several, tolerances)
def test_more_tolerance_keeps_no_less(pairs, tolerance):
    strict, loose = (
        judge_pairs(aa.ParetoGain([Listed(), Darkness()], tolerance=allowed), pairs)
        for allowed in (tolerance, 2 * tolerance)
    )
    assert all(after.keep or not before.keep for before, after in zip(strict, loose, strict=True))


def test_a_pareto_verdict_says_who_fell_or_that_nothing_rose():
    keep = aa.ParetoGain([Listed(), Darkness()], tolerance=0.5)
    assert keep.judge(pair(10, 30)).reason == "Darkness fell by 2, allowed 0.5"
    assert keep.judge(pair(10, 10)).reason == "nothing rose: Listed rose by 0, Darkness rose by 0"
    kept = keep.judge(pair(10, 13))
    assert (kept.keep, kept.reason) == (True, "Listed rose by 0.3, Darkness fell by 0.3")
    assert set(kept.scores) == {f"{name} {of}" for name in ("Listed", "Darkness") for of in ("before", "after", "gain")}
    assert keep.scorers == {"Listed", "Darkness"}


@pytest.mark.parametrize(
    ("scorers", "tolerance"),
    [
        ([], 0.0),
        ([Listed(), Listed()], 0.0),
        ([Listed()], -1.0),
        ([Listed()], math.nan),
        ([Listed()], [0.1, 0.2]),
    ],
)
def test_a_pareto_filter_that_means_nothing_is_refused(scorers, tolerance):
    with pytest.raises(
        aa.InvalidValueError, match=r"Expected at least one, and different names|one such number for each scorer"
    ):
        aa.ParetoGain(scorers, tolerance=tolerance)


def test_a_similarity_takes_any_function_of_two_pictures():
    def nearness(one, other):
        return 1 - abs(one.getpixel((0, 0)) - other.getpixel((0, 0))) / 255

    keep = aa.Similarity(nearness, at_least=0.9)

    verdict = keep.judge(pair(0, 51))
    assert verdict == aa.Verdict(keep=False, reason="nearness is 0.8, threshold 0.9", scores={"nearness": 0.8})
    assert (~keep).judge(pair(0, 51)).keep
    assert keep.judge(pair(7, 7)).keep
    assert keep.scorers == frozenset()


@given(several, st.floats(-1, 1))
def test_a_similarity_keeps_exactly_what_it_says(pairs, at_least):
    measure = aa.StructuralSimilarity()
    kept = [verdict.keep for verdict in judge_pairs(aa.Similarity(measure, at_least), pairs)]
    assert kept == [measure.compare(each.before, each.after) >= at_least for each in pairs]


def test_a_similarity_asks_for_a_finite_number():
    with pytest.raises(aa.InvalidValueError, match="need a finite at_least"):
        aa.Similarity(aa.StructuralSimilarity(), math.inf)


def test_a_scorer_that_raises_on_one_picture_says_which_prompt_and_scorer():
    class Brittle(aa.Scorer):
        def score(self, image, prompt):
            return 1 / image.getpixel((0, 0))

    with pytest.raises(ZeroDivisionError) as caught:
        judge_pairs(aa.ParetoGain([Brittle()]), [pair(1, 2), pair(0, 2)])
    assert caught.value.__notes__ == ["Raised by the scorer 'Brittle', for the prompt 'a pear'."]


@pytest.mark.parametrize(
    "keep",
    [
        aa.ParetoGain([Chroma(), Exposure()], tolerance=0.1),
        aa.Similarity(aa.StructuralSimilarity(), 0.5),
        aa.Similarity(aa.StructuralSimilarity(side_px=8), 0.5) & aa.ParetoGain([Chroma()]),
    ],
    ids=repr,
)
def test_every_filter_keeps_the_promises_of_its_seam(keep):
    check_filter(keep)


def test_pictures_of_several_sizes_never_become_a_pair():
    with pytest.raises(aa.InvalidValueError, match="differ in size"):
        aa.StructuralSimilarity().compare(Image.new("L", (4, 4)), Image.new("L", (4, 5)))
