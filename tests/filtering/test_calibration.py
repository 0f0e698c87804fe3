"""Calibrated thresholds keep the fraction they say, of the calibration pairs and of new ones."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import artaug as aa
from artaug.evaluation.statistics import share_interval
from artaug.filtering import judge_pairs
from support.strategies import Listed, pair, pairs


class Shuffled(aa.Scorer):
    """Orders pictures in another way than `Listed`."""

    def score(self, image, prompt):
        return float((image.getpixel((0, 0)) * 37) % 256)


pair_lists = st.lists(pairs, min_size=10, max_size=40)
yield_fractions = st.sampled_from([0.1, 0.25, 0.5, 1.0])


@given(pair_lists, yield_fractions)
def test_the_proposed_filter_keeps_as_many_as_the_calibration_reports(pairs, fraction):
    calibration = aa.calibrate(pairs, [Listed(), Shuffled()], fraction=fraction)

    kept = sum(verdict.keep for verdict in judge_pairs(calibration.keep, pairs))
    assert kept == calibration.kept >= int(fraction * len(pairs)) >= 1
    assert calibration.expected == kept / len(pairs)
    assert calibration.interval == share_interval(kept, len(pairs))


@given(st.permutations(range(60)), yield_fractions)
def test_without_ties_it_keeps_exactly_the_best_of_the_given_share(levels, fraction):
    pairs = [pair(0, level) for level in levels]
    calibration = aa.calibrate(pairs, [Listed()], fraction=fraction)

    kept = [
        kept_pair.after.getpixel((0, 0))
        for kept_pair, verdict in zip(pairs, judge_pairs(calibration.keep, pairs), strict=True)
        if verdict.keep
    ]
    assert sorted(kept) == list(range(60))[-int(fraction * 60) :]


def test_a_filter_that_has_to_agree_counts_into_the_yield():
    pairs = [pair(0, level, seed=level % 2) for level in range(100)]

    class Odd(aa.PairFilter):
        def judge(self, pair):
            return aa.Verdict(keep=pair.seed == 1, reason="by the seed", scores={})

    calibration = aa.calibrate(pairs, [Listed()], fraction=0.1, also=Odd())

    assert calibration.kept == 10
    assert calibration.thresholds == {"Listed": 8.1}
    with pytest.raises(aa.InvalidValueError, match="alone keeps 50 of 100 pairs, and 60 are needed"):
        aa.calibrate(pairs, [Listed()], fraction=0.6, also=Odd())


def test_the_interval_holds_the_fractionof_new_pairs_95_times_in_100():
    generator = np.random.default_rng(1)
    uniform = np.sort(generator.uniform(size=(1000, 200)), axis=1)[:, -8]
    interval = share_interval(8, 200)
    inside = np.mean((interval.low <= 1 - uniform) & (1 - uniform <= interval.high))
    assert 0.93 <= inside <= 0.97


def test_it_prints_a_sentence_and_warns_when_losses_pass():
    pairs = [pair(100, level) for level in range(101)]
    text = str(aa.calibrate(pairs, [Listed()], fraction=0.02))
    assert text.startswith("Listed gain >= -0.1: keeps 2 of 101 pairs, 2.0% (target 2.0%); of new pairs, 0.2% to 5.4%")
    assert text.endswith("It keeps pairs that did not gain by Listed.")


def test_by_default_two_in_a_hundred_pairs_are_wanted():
    calibration = aa.calibrate([pair(0, level) for level in range(200)], [Listed()])
    assert (calibration.fraction, calibration.kept) == (0.02, 4)


def test_equal_pairs_are_kept_together_and_counted():
    calibration = aa.calibrate([pair(0, 5)] * 50, [Listed()], fraction=0.02)
    assert (calibration.kept, calibration.pairs) == (50, 50)


@pytest.mark.parametrize(
    ("fraction", "count", "kept"), [(0.07, 100, 7), (0.5, 3, 1), (0.5, 2, 1), (1, 5, 5), (1 / 3, 10, 3), (0.02, 50, 1)]
)
def test_the_target_count_is_rounded_down_and_at_least_one(fraction, count, kept):
    assert aa.calibrate([pair(0, level) for level in range(count)], [Listed()], fraction=fraction).kept == kept


def test_a_filter_that_keeps_exactly_the_target_count_is_enough():
    pairs = [pair(0, level) for level in range(10)]
    top_half = aa.Floor(Listed(), at_least=0.5)
    assert aa.calibrate(pairs, [Listed()], fraction=0.5, also=top_half).kept == 5
    with pytest.raises(aa.InvalidValueError, match="alone keeps 5 of 10 pairs, and 6 are needed"):
        aa.calibrate(pairs, [Listed()], fraction=0.6, also=top_half)


@pytest.mark.parametrize(("level", "has_warning"), [(9, True), (10, True), (11, False)])
def test_a_threshold_of_zero_or_less_is_reported_to_keep_pairs_that_did_not_gain(level, has_warning):
    text = str(aa.calibrate([pair(10, level)] * 10, [Listed()], fraction=0.5))
    assert text.endswith("It keeps pairs that did not gain by Listed.") is has_warning


def test_several_scorers_are_equally_strict():
    class Reversed(aa.Scorer):
        def score(self, image, prompt):
            return -image.getpixel((0, 0)) / 7

    pairs = [pair(0, level) for level in range(11)]
    calibration = aa.calibrate(pairs, [Listed(), Reversed()], fraction=0.1)
    assert calibration.kept == 1
    assert calibration.thresholds == {"Listed": 0.5, "Reversed": -5 / 7}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scorers": []}, "Expected at least one, and different names"),
        ({"scorers": [Listed(), Listed()]}, "Expected at least one, and different names"),
        ({"fraction": 0.0}, r"need a fraction in \(0, 1\]"),
        ({"fraction": 0.02}, "2.0% of 20 pairs is less than one pair: need at least 50 pairs"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(options, message):
    options = {"scorers": [Listed()], "fraction": 0.5, **options}
    with pytest.raises(aa.InvalidValueError, match=message):
        aa.calibrate([pair(0, level) for level in range(20)], options.pop("scorers"), **options)
