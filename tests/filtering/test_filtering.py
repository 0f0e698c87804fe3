"""The algebra of filters, and what their verdicts say."""

import math
from dataclasses import dataclass
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import artaug as aa
from artaug.filtering import judge_pairs
from artaug.scorers import Exposure
from artaug.testing import check_filter
from support.strategies import Listed, pair, pairs

thresholds = st.floats(-20, 20)
fractions = st.floats(0.01, 1)
simple = (
    st.builds(aa.Gain, st.just(Listed()), thresholds)
    | st.builds(aa.Floor, st.just(Listed("Other")), thresholds)
    | st.builds(aa.TopFraction, st.just(Listed("Third")), fractions)
)
filters = st.recursive(
    simple,
    lambda inner: (
        st.builds(lambda one, two: one & two, inner, inner)
        | st.builds(lambda one, two: one | two, inner, inner)
        | st.builds(lambda one: ~one, inner)
    ),
    max_leaves=5,
)
several = st.lists(pairs, min_size=1, max_size=8)


def kept(keep, pairs):
    return [verdict.keep for verdict in judge_pairs(keep, pairs)]


@given(filters, filters, several)
def test_de_morgan(one, two, pairs):
    assert kept(~(one & two), pairs) == kept(~one | ~two, pairs)
    assert kept(~(one | two), pairs) == kept(~one & ~two, pairs)


@given(filters, filters, several)
def test_order_does_not_matter(one, two, pairs):
    assert kept(one & two, pairs) == kept(two & one, pairs)
    assert kept(one | two, pairs) == kept(two | one, pairs)


@given(filters, filters, filters, several)
def test_grouping_does_not_matter(one, two, three, pairs):
    assert kept((one & two) & three, pairs) == kept(one & (two & three), pairs)
    assert kept(one & (two | three), pairs) == kept((one & two) | (one & three), pairs)


@given(filters, several)
def test_twice_not_is_nothing(keep, pairs):
    assert kept(~~keep, pairs) == kept(keep, pairs)
    assert kept(keep & keep, pairs) == kept(keep | keep, pairs) == kept(keep, pairs)
    assert not any(kept(keep & ~keep, pairs))
    assert all(kept(keep | ~keep, pairs))


@given(filters, filters, several)
def test_a_verdict_carries_every_number_and_a_reason(one, two, pairs):
    parts = zip(judge_pairs(one, pairs), judge_pairs(two, pairs), strict=True)
    for (first, second), both in zip(parts, judge_pairs(one & two, pairs), strict=True):
        assert both.scores == first.scores | second.scores
        assert both.reason
        assert all(part.reason in both.reason for part in (first, second) if part.keep == both.keep)


@given(filters, filters)
def test_a_filter_names_the_scorers_it_rests_on(one, two):
    assert (one & two).scorers == (one | two).scorers == (~one).scorers | two.scorers == one.scorers | two.scorers


@given(thresholds, several)
def test_gain_and_floor_keep_exactly_what_they_say(at_least, pairs):
    scores = [(Listed().score(one.before, ""), Listed().score(one.after, "")) for one in pairs]
    assert kept(aa.Gain(Listed(), at_least), pairs) == [after - before >= at_least for before, after in scores]
    assert kept(aa.Floor(Listed(), at_least), pairs) == [after >= at_least for _, after in scores]


@given(fractions, several)
@example(0.1, [pair(0, level) for level in range(30)])
def test_the_top_fraction_is_exact_and_the_best(fraction, pairs):
    gains = [one.after.getpixel((0, 0)) - one.before.getpixel((0, 0)) for one in pairs]
    keeps = kept(aa.TopFraction(Listed(), fraction), pairs)
    assert sum(keeps) == math.ceil(Fraction(str(fraction)) * len(pairs))
    best = [gain for gain, keep in zip(gains, keeps, strict=True) if keep]
    rest = [gain for gain, keep in zip(gains, keeps, strict=True) if not keep]
    assert not rest or min(best) >= max(rest)


def test_a_tenth_of_thirty_is_three():
    assert sum(kept(aa.TopFraction(Listed(), 0.1), [pair(0, level) for level in range(30)])) == 3


def test_a_pair_judged_alone_is_the_best_there_is():
    assert aa.TopFraction(Listed(), 0.01).judge(pair(9, 0)).keep


def test_a_verdict_says_the_numbers_it_rests_on():
    verdict = aa.Gain(Listed(), at_least=0.5).judge(pair(10, 22))
    assert verdict == aa.Verdict(
        keep=True,
        reason="Listed rose by 1.2, threshold 0.5",
        scores={"Listed before": 1.0, "Listed after": 2.2, "Listed gain": 2.2 - 1.0},
    )
    assert aa.Gain(Listed()).judge(pair(22, 10)).reason == "Listed fell by 1.2, threshold 0"
    assert aa.Floor(Listed(), 2).judge(pair(0, 10)).reason == "Listed is 1, threshold 2"
    assert aa.TopFraction(Listed(), 0.5).judge(pair(0, 10)).reason == "Listed rose by 1, rank 1 of 1, keeps the best 1"
    assert (~aa.Floor(Listed(), 2)).judge(pair(0, 10)).reason == "not (Listed is 1, threshold 2)"


def test_only_those_who_decided_give_the_reason():
    keep = aa.Gain(Listed("A"), at_least=0.5) & aa.Floor(Listed("B"), at_least=9)
    assert keep.judge(pair(0, 10)).reason == "B is 1, threshold 9"
    assert keep.judge(pair(0, 100)).reason == "A rose by 10, threshold 0.5 and B is 10, threshold 9"


def test_two_models_behind_one_name_both_keep_their_numbers():
    @dataclass(frozen=True)
    class Doubled(aa.Scorer):
        name = "Listed"

        def score(self, image, prompt):
            return 2 * Listed().score(image, prompt)

    verdict = (aa.Floor(Listed(), 0) & aa.Floor(Doubled(), 0)).judge(pair(0, 10))
    assert verdict.scores == {"Listed after": 1.0, "Listed after (2)": 2.0}


def test_both_pictures_are_scored_in_one_call():
    calls = []

    class Counting(aa.Scorer):
        def score(self, image, prompt):
            raise NotImplementedError

        def score_batch(self, images, prompts):
            calls.append(len(images))
            return [0.0] * len(images)

    judge_pairs(aa.Gain(Counting()), [pair(0, 1)] * 5)
    assert calls == [10]


def test_filters_print_as_they_were_written():
    keep = aa.Gain(Exposure(), at_least=0.2) & ~aa.Floor(Exposure(), 0.9) | aa.TopFraction(Exposure(), 0.5)
    assert repr(keep) == (
        "((Gain(scorer=Exposure(), at_least=0.2) & ~Floor(scorer=Exposure(), at_least=0.9)) | "
        "TopFraction(scorer=Exposure(), fraction=0.5))"
    )


def test_and_or_not_are_refused_since_python_would_drop_a_part():
    with pytest.raises(aa.ContractError, match=r"Combine filters with &, \| and ~, not and, or and not\."):
        aa.Gain(Listed()) and aa.Floor(Listed(), 0)


@pytest.mark.parametrize("fraction", [0, -0.5, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(fraction):
    with pytest.raises(aa.InvalidValueError, match=r"need a fraction in \(0, 1\]"):
        aa.TopFraction(Listed(), fraction)


@pytest.mark.parametrize("kind", [aa.Gain, aa.Floor])
def test_a_threshold_that_is_no_number_is_refused(kind):
    with pytest.raises(aa.InvalidValueError, match="need a finite at_least"):
        kind(Listed(), float("nan"))


class Broken(aa.PairFilter):
    def __init__(self, *answers):
        self.answers = answers

    def __repr__(self):
        return "Broken()"

    def judge(self, pair):
        return self.answers[0]

    def judge_batch(self, pairs):
        return list(self.answers)


def test_too_few_verdicts_are_counted():
    with pytest.raises(
        aa.ContractError, match=r"Broken\(\)\.judge_batch returned 0 answers for 1 pair\. Expected a list of 1"
    ):
        judge_pairs(Broken(), [pair(0, 1)])


def test_an_answer_that_is_no_verdict_is_quoted_inside_a_combination_too():
    for keep in (Broken(True), ~Broken(True), aa.Gain(Listed()) & Broken(True)):
        with pytest.raises(
            aa.ContractError,
            match=r"Broken\(\)\.judge_batch returned bool True for pair 0 \('a pear'\)\. Expected artaug\.Verdict",
        ):
            judge_pairs(keep, [pair(0, 1)])


def test_no_pairs_no_verdicts():
    assert judge_pairs(Broken(), []) == []
    assert aa.TopFraction(Listed(), 0.5).judge_batch([]) == []


def test_a_filter_of_ones_own_rests_on_no_scorer_and_judges_one_by_one():
    class Seeded(aa.PairFilter):
        def judge(self, pair):
            return aa.Verdict(keep=pair.seed > 0, reason=f"the seed is {pair.seed}", scores={"seed": pair.seed})

    assert Seeded().scorers == frozenset()
    assert kept(Seeded() & ~~Seeded(), [pair(0, 0, seed=0), pair(0, 0, seed=1)]) == [False, True]


@pytest.mark.parametrize(
    "keep",
    [
        aa.Gain(Exposure()),
        aa.Floor(Exposure(), 0.5),
        aa.TopFraction(Exposure(), 0.5),
        aa.Gain(Exposure(), 0.1) & ~aa.Floor(Exposure(), 0.9) | aa.TopFraction(Exposure(), 0.3),
    ],
    ids=repr,
)
def test_every_filter_keeps_the_promises_of_its_seam(keep):
    check_filter(keep)
