"""Thresholds for a wanted yield keep what they say, of the pairs seen and of new ones."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import artaug as aa
from artaug.evaluation.statistics import share_interval
from artaug.filtering import judge_pairs
from support.strategies import Listed, pair, pairs


class After(aa.Scorer):
    """Depends on the seeds of a picture in its own way."""

    def score(self, image, prompt):
        return float((image.getpixel((0, 0)) * 37) % 256)


many = st.lists(pairs, min_size=10, max_size=40)
shares = st.sampled_from([0.1, 0.25, 0.5, 1.0])


@given(many, shares)
def test_the_proposed_filter_keeps_what_the_calibration_says(pairs, share):
    found = aa.calibrate(pairs, [Listed(), After()], fraction=share)

    kept = sum(verdict.keep for verdict in judge_pairs(found.keep, pairs))
    assert kept == found.kept >= int(share * len(pairs)) >= 1
    assert found.expected == kept / len(pairs)
    assert found.interval == share_interval(kept, len(pairs))


@given(st.permutations(range(60)), shares)
def test_without_ties_it_keeps_exactly_the_share_asked_for_and_the_best(levels, share):
    pairs = [pair(0, level) for level in levels]
    found = aa.calibrate(pairs, [Listed()], fraction=share)

    kept = [
        one.after.getpixel((0, 0))
        for one, verdict in zip(pairs, judge_pairs(found.keep, pairs), strict=True)
        if verdict.keep
    ]
    assert sorted(kept) == list(range(60))[-int(share * 60) :]


def test_a_filter_that_has_to_agree_counts_into_the_yield():
    pairs = [pair(0, level, seed=level % 2) for level in range(100)]

    class Odd(aa.PairFilter):
        def judge(self, pair):
            return aa.Verdict(keep=pair.seed == 1, reason="by the seed", scores={})

    found = aa.calibrate(pairs, [Listed()], fraction=0.1, also=Odd())

    assert found.kept == 10
    assert found.thresholds == {"Listed": 8.1}
    with pytest.raises(aa.InvalidValueError, match="alone keeps 50 of 100 pairs, and 60 are wanted"):
        aa.calibrate(pairs, [Listed()], fraction=0.6, also=Odd())


def test_the_interval_holds_the_fractionof_new_pairs_95_times_in_100():
    generator = np.random.default_rng(1)
    uniform = np.sort(generator.uniform(size=(1000, 200)), axis=1)[:, -8]
    interval = share_interval(8, 200)
    inside = np.mean((interval.low <= 1 - uniform) & (1 - uniform <= interval.high))
    assert 0.93 <= inside <= 0.97


def test_it_reads_as_a_sentence_and_says_when_losses_pass():
    pairs = [pair(100, level) for level in range(101)]
    text = str(aa.calibrate(pairs, [Listed()], fraction=0.02))
    assert text.startswith("Listed gain >= -0.1: keeps 2 of 101 pairs, 2.0% (wanted 2.0%); of new pairs, 0.2% to 5.4%")
    assert text.endswith("It keeps pairs that did not gain by Listed.")


def test_equal_pairs_are_kept_together_and_counted():
    found = aa.calibrate([pair(0, 5)] * 50, [Listed()], fraction=0.02)
    assert (found.kept, found.pairs) == (50, 50)


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
