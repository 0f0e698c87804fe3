"""The filter by a judge: what it keeps, what it says, and that it tells of a judge that only sees positions."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

import artaug as aa
from artaug.filtering import judge_pairs
from artaug.testing import FixedJudge, check_filter
from support.judges import Lighter, light
from support.strategies import Listed, fractions, pair, pairs


@given(st.lists(pairs, min_size=1, max_size=6))
def test_it_keeps_what_the_judge_prefers_in_both_orders(pairs):
    verdicts = judge_pairs(aa.Preferred(Lighter()), pairs)
    assert [verdict.keep for verdict in verdicts] == [light(pair.after) > light(pair.before) for pair in pairs]


@given(pairs)
def test_of_a_pair_and_its_reverse_it_keeps_at_most_one(one):
    reverse = aa.ImagePair(prompt=one.prompt, before=one.after, after=one.before)
    verdicts = judge_pairs(aa.Preferred(Lighter()), [one, reverse])
    assert sum(verdict.keep for verdict in verdicts) == (light(one.after) != light(one.before))
    assert verdicts[0].scores["Lighter"] == pytest.approx(1 - verdicts[1].scores["Lighter"])


@pytest.mark.parametrize("answer", [0.0, 0.5, 1.0])
def test_a_judge_that_sees_only_positions_keeps_nothing(answer):
    assert not aa.Preferred(FixedJudge(answer)).judge(pair(10, 200)).keep


@given(fractions, st.sampled_from([0.0, 0.25, 0.5]))
def test_with_a_threshold_the_mean_of_both_orders_decides(at_least, bias):
    verdict = aa.Preferred(Lighter(bias), at_least=at_least).judge(pair(10, 200))
    assert verdict.keep == (verdict.scores["Lighter"] >= at_least)
    assert f"threshold {at_least:.3g}" in verdict.reason


@pytest.mark.parametrize(
    ("judge", "lights", "words"),
    [
        (Lighter(), (10, 200), "Lighter prefers after in both orders: 1.00 shown first, 1.00 shown second"),
        (Lighter(), (200, 10), "Lighter prefers before in both orders: 0.00 shown first, 0.00 shown second"),
        (Lighter(), (10, 10), "Lighter calls it a tie: 0.50 shown first, 0.50 shown second"),
        (FixedJudge(1.0), (10, 200), "FixedJudge contradicts itself, it leans to the picture shown first: 1.00 shown"),
        (FixedJudge(0.0), (10, 200), "FixedJudge contradicts itself, it leans to the picture shown second: 0.00 shown"),
        (FixedJudge(aa.Abstention("'both!' names no picture")), (10, 200), "FixedJudge had no answer: 'both!' names"),
    ],
    ids=str,
)
def test_the_reason_says_what_the_judge_said(judge, lights, words):
    verdict = aa.Preferred(judge).judge(pair(*lights))
    assert verdict.reason.startswith(words)
    assert verdict.keep == ("prefers after" in words)


def test_a_pair_without_an_answer_has_no_score_and_is_dropped_with_a_threshold_too():
    silent = FixedJudge(aa.Abstention("the server is busy", transient=True))
    assert aa.Preferred(silent, at_least=0.0).judge(pair(10, 200)).scores == {}
    assert not aa.Preferred(silent, at_least=0.0).judge(pair(10, 200)).keep


def test_it_combines_with_other_filters():
    keep = aa.Preferred(Lighter()) & ~aa.Gain(Listed(), at_least=1000) & aa.Preferred(Lighter(0.25), at_least=0.6)
    check_filter(keep)
    check_filter(aa.Preferred(Lighter()))
    assert keep.judge(pair(10, 200)).keep
    assert keep.scorers == {"Lighter", "Listed"}


def test_a_judge_with_a_position_bias_is_reported_once(caplog):
    keep = aa.Preferred(FixedJudge(1.0))
    for _ in range(4):
        judge_pairs(keep, [pair(10, 200)] * 8)
    (record,) = caplog.records
    assert "FixedJudge has a position bias: it contradicts itself about 16 of 16 pairs" in record.message
    assert "prefers the picture shown first in 16 of these 16" in record.message


def test_a_consistent_judge_is_not_reported(caplog):
    judge_pairs(aa.Preferred(Lighter()), [pair(10, 200), pair(200, 10), pair(10, 10)] * 20)
    assert caplog.records == []


def test_the_rehearsal_counts_for_no_bias_and_reports_a_judge_without_an_answer(caplog):
    keep = aa.Preferred(FixedJudge(1.0))
    for _ in range(30):
        keep.rehearse(pair(10, 200))
    assert caplog.records == []
    aa.Preferred(FixedJudge(aa.Abstention("a model that thinks first"))).rehearse(pair(10, 200))
    assert "FixedJudge had no answer about the plain pictures" in caplog.text
    assert "a model that thinks first" in caplog.text


def test_it_can_be_pickled_and_compared():
    keep = aa.Preferred(Lighter(0.25), at_least=0.7)
    assert pickle.loads(pickle.dumps(keep)) == keep
    assert repr(keep) == "Preferred(by=Lighter(bias=0.25, silent=frozenset(), broken=frozenset()), at_least=0.7)"


@pytest.mark.parametrize("at_least", [-0.1, 1.5, float("nan")])
def test_a_threshold_that_is_no_probability_is_refused(at_least):
    with pytest.raises(aa.InvalidValueError, match=r"need a probability in \[0, 1\]"):
        aa.Preferred(Lighter(), at_least=at_least)


def test_what_is_no_judge_is_refused():
    with pytest.raises(aa.InvalidValueError, match=r"Preferred\(by=.*expected an instance of artaug.PairwiseJudge"):
        aa.Preferred(Listed())
