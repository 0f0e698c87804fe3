"""Paired statistics against scipy, against their definition and against what they promise."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import artaug as aa
from artaug.evaluation import statistics
from artaug.evaluation.statistics import (
    Interval,
    holm,
    paired_bootstrap,
    share_bootstrap,
    share_interval,
    sign_flip,
    tie_rate,
    win_rate,
)

DIFFERENCES = st.lists(st.floats(-100, 100), min_size=2, max_size=40)


def test_the_interval_is_scipys():
    scipy_stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(3).gamma(2.0, size=120) - 1.0

    ours = paired_bootstrap(values, seed=1)

    theirs = scipy_stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert [ours.low, ours.high] == pytest.approx([theirs.low, theirs.high], abs=0.03 * (theirs.high - theirs.low))


@pytest.mark.parametrize("drawn", ["normal", "skewed", "ties"])
def test_95_percent_intervals_hold_the_truth_95_times_in_100(drawn):
    generator = np.random.default_rng(0)
    draw = {
        "normal": lambda: generator.normal(0.1, 1.0, size=128),
        "skewed": lambda: generator.exponential(0.1, size=128),
        "ties": lambda: generator.choice([0.0, 0.0, 0.4, -0.0], size=128),
    }[drawn]

    intervals = [paired_bootstrap(draw(), seed=run, resamples=400) for run in range(1200)]

    held = np.mean([interval.low <= 0.1 <= interval.high for interval in intervals])
    assert 0.93 <= held <= 0.97


@given(DIFFERENCES)
def test_the_interval_lies_within_the_differences(differences):
    interval = paired_bootstrap(differences, resamples=50)

    slack = 1e-9
    assert min(differences) - slack <= interval.low <= interval.high <= max(differences) + slack


@given(st.floats(-100, 100), st.integers(2, 50))
def test_equal_differences_leave_no_doubt(number, count):
    interval = paired_bootstrap([number] * count, resamples=20)

    assert [interval.low, interval.high] == pytest.approx([number, number], abs=1e-12)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    differences = np.random.default_rng(0).normal(size=30)

    assert paired_bootstrap(differences, seed=4) == paired_bootstrap(differences, seed=4)
    assert paired_bootstrap(differences, seed=4) != paired_bootstrap(differences, seed=5)


def test_drawing_in_small_parts_changes_nothing(monkeypatch):
    differences = np.random.default_rng(0).normal(size=30)
    at_once = paired_bootstrap(differences, resamples=200)

    monkeypatch.setattr(statistics, "_DRAWS_AT_ONCE", 7 * 30)

    assert paired_bootstrap(differences, resamples=200) == at_once


def test_a_wider_level_gives_a_wider_interval():
    differences = np.random.default_rng(0).normal(size=30)

    narrow, wide = (paired_bootstrap(differences, level=level) for level in (0.5, 0.99))

    assert wide.low < narrow.low < narrow.high < wide.high


@given(DIFFERENCES)
def test_a_win_rate_counts_wins_and_half_the_ties(differences):
    wins, ties = sum(one > 0 for one in differences), sum(one == 0 for one in differences)

    assert win_rate(differences) == pytest.approx((wins + ties / 2) / len(differences))


@given(DIFFERENCES)
def test_what_one_side_wins_the_other_loses(differences):
    assert win_rate(differences) + win_rate([-one for one in differences]) == pytest.approx(1)


def test_one_difference_has_no_interval():
    with pytest.raises(
        aa.InvalidValueError, match="received 1 difference, which says nothing about the spread: need 2"
    ):
        paired_bootstrap([0.5])


@pytest.mark.parametrize("measure", [paired_bootstrap, win_rate])
def test_nothing_and_nonsense_are_refused(measure):
    with pytest.raises(aa.InvalidValueError, match=r"a list of differences, one a prompt, received shape \(0,\)"):
        measure([])
    with pytest.raises(aa.InvalidValueError, match=r"received shape \(2, 2\)"):
        measure(np.zeros((2, 2)))
    with pytest.raises(aa.NonFiniteError, match="difference 1 is not finite"):
        measure([0.0, math.nan])


@pytest.mark.parametrize("options", [{"resamples": 0}, {"level": 0.0}, {"level": 1.0}])
def test_settings_without_meaning_are_refused(options):
    with pytest.raises(aa.InvalidValueError, match=r"need at least 1 resample and a level in \(0, 1\)"):
        paired_bootstrap([0.0, 1.0], **options)


def test_an_interval_holds_plain_numbers():
    assert repr(Interval(np.float64(0.25), np.float64(1))) == "Interval(low=0.25, high=1.0)"


@given(DIFFERENCES)
def test_wins_ties_and_losses_are_all_there_are(differences):
    losses = sum(one < 0 for one in differences) / len(differences)
    assert win_rate(differences) + tie_rate(differences) / 2 + losses == pytest.approx(1)


@pytest.mark.parametrize("count", [2, 5, 10])
def test_sign_flips_are_scipys_exact_permutation_test(count):
    scipy_stats = pytest.importorskip("scipy.stats")
    differences = np.random.default_rng(count).normal(0.3, 1, size=count)

    theirs = scipy_stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert sign_flip(differences) == pytest.approx(theirs.pvalue)


def test_sampled_sign_flips_come_close_to_the_exact_ones():
    differences = np.random.default_rng(1).normal(0.5, 1, size=13)
    assert sign_flip(differences, flips=8000) == pytest.approx(sign_flip(differences, flips=10_000), abs=0.01)


def test_sign_flips_err_5_times_in_100_where_nothing_changed():
    generator = np.random.default_rng(4)
    p_values = [sign_flip(generator.normal(size=24), seed=run, flips=200) for run in range(1000)]
    assert 0.03 <= np.mean(np.array(p_values) <= 0.05) <= 0.07


@given(DIFFERENCES)
def test_a_p_value_does_not_depend_on_the_direction_and_is_never_zero(differences):
    there, back = (sign_flip(np.multiply(differences, sign), flips=100) for sign in (1, -1))
    assert there == back
    assert 0 < there <= 1


def test_without_any_difference_the_p_value_is_one():
    assert sign_flip([0.0] * 30) == sign_flip([0.0] * 3) == 1


@given(st.lists(st.floats(0, 1), max_size=8), st.floats(0.01, 0.2))
def test_holm_rejects_what_his_stepwise_procedure_rejects(p_values, level):
    rejected, order = set(), sorted(range(len(p_values)), key=lambda at: p_values[at])
    for rank, at in enumerate(order):
        if p_values[at] * (len(p_values) - rank) > level:
            break
        rejected.add(at)
    assert {at for at, adjusted in enumerate(holm(p_values)) if adjusted <= level} == rejected


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_no_laxer_than_no_correction_and_no_stricter_than_bonferroni(p_values):
    for raw, adjusted in zip(p_values, holm(p_values), strict=True):
        assert raw <= adjusted <= min(1, len(p_values) * raw)


@given(st.integers(1, 300).flatmap(lambda of: st.tuples(st.integers(1, of), st.just(of))))
def test_the_interval_of_a_share_is_scipys_beta(kept_of):
    scipy_stats = pytest.importorskip("scipy.stats")
    kept, of = kept_of
    interval = share_interval(kept, of)
    assert [interval.low, interval.high] == pytest.approx(
        scipy_stats.beta.ppf([0.025, 0.975], kept, of - kept + 1), abs=1e-9
    )


def test_questions_without_meaning_are_refused():
    with pytest.raises(aa.InvalidValueError, match=r"Expected p-values, all in \[0, 1\]"):
        holm([0.5, 1.5])
    with pytest.raises(aa.InvalidValueError, match="need 1 <= kept <= of"):
        share_interval(0, 5)
    with pytest.raises(aa.InvalidValueError, match="need at least 1"):
        sign_flip([1.0], flips=0)


def test_the_interval_of_a_mean_of_shares_is_scipys_for_one_picture_a_prompt():
    scipy_stats = pytest.importorskip("scipy.stats")
    right = np.random.default_rng(5).integers(2, size=150).astype(float)
    ours = share_bootstrap([np.array([right, np.ones(150)])], seed=1)
    theirs = scipy_stats.bootstrap(
        (right,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert [ours.low, ours.high] == pytest.approx([theirs.low, theirs.high], abs=0.01)


def test_intervals_of_shares_hold_the_truth_95_times_in_100():
    generator = np.random.default_rng(1)
    held = 0
    for run in range(1000):
        easy, hard = (generator.random(80) < chance for chance in (0.8, 0.4))
        many = generator.integers(1, 6, size=80)  # questions a prompt, right with 0.7 each
        groups = [np.array([easy, np.ones(80)]), np.array([hard, np.ones(80)])]
        groups.append(np.array([generator.binomial(many, 0.7), many]))
        interval = share_bootstrap(groups, seed=run, resamples=400)
        held += interval.low <= (0.8 + 0.4 + 0.7) / 3 <= interval.high
    assert 0.93 <= held / 1000 <= 0.97


@given(st.integers(1, 60), st.integers(1, 4))
def test_where_all_is_right_or_all_is_wrong_the_interval_is_scipys_exact_one(prompts, pictures):
    scipy_stats = pytest.importorskip("scipy.stats")
    wholes = np.full(prompts, pictures)
    for parts, successes in ((wholes, prompts), (wholes * 0, 0)):
        exact = scipy_stats.binomtest(successes, prompts).proportion_ci(method="exact")
        interval = share_bootstrap([np.array([parts, wholes])])
        assert [interval.low, interval.high] == pytest.approx([exact.low, exact.high])


def test_shares_drawn_in_small_parts_are_the_same(monkeypatch):
    groups = [np.array([np.random.default_rng(0).integers(2, size=30), np.ones(30)])]
    at_once = share_bootstrap(groups, resamples=200)
    monkeypatch.setattr(statistics, "_DRAWS_AT_ONCE", 7 * 30)
    assert share_bootstrap(groups, resamples=200) == at_once != share_bootstrap(groups, resamples=200, seed=1)


@pytest.mark.parametrize(
    ("groups", "error", "text"),
    [
        pytest.param([], aa.InvalidValueError, "0 groups", id="none"),
        pytest.param([np.zeros((2, 0))], aa.InvalidValueError, "one a prompt", id="empty"),
        pytest.param([np.ones((3, 2))], aa.InvalidValueError, "one a prompt", id="three-rows"),
        pytest.param([np.array([[2.0], [1.0]])], aa.InvalidValueError, "one a prompt", id="more-than-all"),
        pytest.param([np.array([[0.0], [0.0]])], aa.NonFiniteError, "wholes above zero", id="of-nothing"),
        pytest.param([np.array([[1.0], [math.inf]])], aa.NonFiniteError, "expected finite", id="infinite"),
    ],
)
def test_shares_of_nothing_are_refused(groups, error, text):
    with pytest.raises(error, match=text):
        share_bootstrap(groups)


# By statsmodels 0.15: multipletests(p_values, method="holm")[1].
STATSMODELS = [
    ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
    ([0.2, 0.2, 0.01], [0.4, 0.4, 0.03]),
    ([1.0, 0.5, 0.9], [1.0, 1.0, 1.0]),
    ([0.04], [0.04]),
    ([0.1274, 0.054, 0.0082, 0.0033, 0.1627, 0.1826, 0.1213], [0.4852, 0.27, 0.0492, 0.0231, 0.4852, 0.4852, 0.4852]),
]


@pytest.mark.parametrize(("p_values", "adjusted"), STATSMODELS)
def test_holm_is_that_of_statsmodels(p_values, adjusted):
    assert holm(p_values) == pytest.approx(adjusted, abs=1e-12)
