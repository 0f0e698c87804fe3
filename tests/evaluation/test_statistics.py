"""Paired statistics against scipy, against their definitions and against the coverage they promise."""

import itertools
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


def test_differences_that_are_equal_but_for_rounding_have_a_point_for_an_interval():
    interval = paired_bootstrap([0.1 + 0.2, 0.3, 0.6 - 0.3])
    assert interval.low == interval.high == pytest.approx(0.3)


def test_the_interval_is_scipys():
    scipy_stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(3).gamma(2.0, size=120) - 1.0

    interval = paired_bootstrap(values, seed=1)

    reference = scipy_stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert [interval.low, interval.high] == pytest.approx(
        [reference.low, reference.high], abs=0.03 * (reference.high - reference.low)
    )


@pytest.mark.parametrize("count", [2, 3, 5, 8, 20, 49, 50])
def test_intervals_of_few_symmetric_differences_miss_a_mean_of_zero_as_often_as_they_say(count):
    generator = np.random.default_rng(count)
    intervals = [paired_bootstrap(generator.normal(size=count), seed=run, resamples=600) for run in range(1200)]

    # Standard deviation of a share of 0.025 in 1,200 runs: 0.0045.
    for missed in ([interval.low > 0 for interval in intervals], [interval.high < 0 for interval in intervals]):
        assert np.mean(missed) <= (0.04 if count < 50 else 0.045)


@pytest.mark.parametrize("count", [8, 20])
def test_intervals_of_few_skewed_differences_miss_less_often_than_those_of_percentiles_and_of_student(count):
    scipy_stats = pytest.importorskip("scipy.stats")
    generator, reach = np.random.default_rng(0), scipy_stats.t.ppf(0.975, count - 1)
    missed = {"studentised": 0, "percentiles": 0, "student": 0}
    for run in range(800):
        values = 1 - generator.exponential(size=count)  # of mean 0; the few large ones are losses
        missed["studentised"] += paired_bootstrap(values, seed=run, resamples=600).low > 0
        missed["percentiles"] += bootstrap_reference(values, seed=run, resamples=600, level=0.95)[0] > 0
        missed["student"] += values.mean() - reach * values.std(ddof=1) / count**0.5 > 0
    assert missed["studentised"] < 0.8 * missed["student"] < missed["percentiles"]


@pytest.mark.parametrize("distribution", ["normal", "skewed", "ties"])
def test_95_percent_intervals_cover_the_true_mean_95_times_in_100(distribution):
    generator = np.random.default_rng(0)
    draw = {
        "normal": lambda: generator.normal(0.1, 1.0, size=128),
        "skewed": lambda: generator.exponential(0.1, size=128),
        "ties": lambda: generator.choice([0.0, 0.0, 0.4, -0.0], size=128),
    }[distribution]

    intervals = [paired_bootstrap(draw(), seed=run, resamples=400) for run in range(1200)]

    covered = np.mean([interval.low <= 0.1 <= interval.high for interval in intervals])
    assert 0.93 <= covered <= 0.97


@given(st.lists(st.floats(-100, 100), min_size=50, max_size=60))
def test_an_interval_of_percentiles_lies_within_the_differences(differences):
    interval = paired_bootstrap(differences, resamples=50)

    slack = 1e-9
    assert min(differences) - slack <= interval.low <= interval.high <= max(differences) + slack


@given(st.floats(-100, 100), st.integers(2, 50))
def test_the_interval_of_equal_differences_is_a_point(number, count):
    interval = paired_bootstrap([number] * count, resamples=20)

    assert [interval.low, interval.high] == pytest.approx([number, number], abs=1e-12)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    differences = np.random.default_rng(0).normal(size=30)

    assert paired_bootstrap(differences, seed=4) == paired_bootstrap(differences, seed=4)
    assert paired_bootstrap(differences, seed=4) != paired_bootstrap(differences, seed=5)


def test_the_size_of_the_chunks_changes_nothing(monkeypatch):
    differences = np.random.default_rng(0).normal(size=30)
    one_chunk = paired_bootstrap(differences, resamples=200)

    monkeypatch.setattr(statistics, "_CHUNK_DRAWS", 7 * 30)

    assert paired_bootstrap(differences, resamples=200) == one_chunk


def test_a_wider_level_gives_a_wider_interval():
    differences = np.random.default_rng(0).normal(size=30)

    narrow, wide = (paired_bootstrap(differences, level=level) for level in (0.5, 0.99))

    assert wide.low < narrow.low < narrow.high < wide.high


@given(DIFFERENCES)
def test_a_win_rate_counts_wins_and_half_the_ties(differences):
    wins, ties = sum(d > 0 for d in differences), sum(d == 0 for d in differences)

    assert win_rate(differences) == pytest.approx((wins + ties / 2) / len(differences))


@given(DIFFERENCES)
def test_what_one_side_wins_the_other_side_loses(differences):
    assert win_rate(differences) + win_rate([-d for d in differences]) == pytest.approx(1)


def test_one_difference_has_no_interval():
    with pytest.raises(aa.InvalidValueError, match="received 1 difference, which has no spread: need at least 2"):
        paired_bootstrap([0.5])


@pytest.mark.parametrize("measure", [paired_bootstrap, win_rate])
def test_an_empty_list_a_table_and_nan_are_refused(measure):
    with pytest.raises(aa.InvalidValueError, match=r"a list of differences, one a prompt, received shape \(0,\)"):
        measure([])
    with pytest.raises(aa.InvalidValueError, match=r"received shape \(2, 2\)"):
        measure(np.zeros((2, 2)))
    with pytest.raises(aa.NonFiniteError, match="difference 1 is not finite"):
        measure([0.0, math.nan])


@pytest.mark.parametrize("options", [{"resamples": 0}, {"level": 0.0}, {"level": 1.0}])
def test_resamples_and_levels_out_of_range_are_refused(options):
    with pytest.raises(aa.InvalidValueError, match=r"need at least 1 resample and a level in \(0, 1\)"):
        paired_bootstrap([0.0, 1.0], **options)


def test_an_interval_holds_plain_numbers():
    assert repr(Interval(np.float64(0.25), np.float64(1))) == "Interval(low=0.25, high=1.0)"


@given(DIFFERENCES)
def test_wins_ties_and_losses_add_up_to_1(differences):
    losses = sum(d < 0 for d in differences) / len(differences)
    assert win_rate(differences) + tie_rate(differences) / 2 + losses == pytest.approx(1)


@pytest.mark.parametrize("count", [2, 5, 10])
def test_sign_flips_are_scipys_exact_permutation_test(count):
    scipy_stats = pytest.importorskip("scipy.stats")
    differences = np.random.default_rng(count).normal(0.3, 1, size=count)

    reference = scipy_stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert sign_flip(differences) == pytest.approx(reference.pvalue)


def test_sampled_sign_flips_come_close_to_the_exact_ones():
    differences = np.random.default_rng(1).normal(0.5, 1, size=13)
    assert sign_flip(differences, flips=8000) == pytest.approx(sign_flip(differences, flips=10_000), abs=0.01)


def test_sign_flips_reject_a_true_null_5_times_in_100():
    generator = np.random.default_rng(4)
    p_values = [sign_flip(generator.normal(size=24), seed=run, flips=200) for run in range(1000)]
    assert 0.03 <= np.mean(np.array(p_values) <= 0.05) <= 0.07


@given(DIFFERENCES)
def test_a_p_value_does_not_depend_on_the_direction_and_is_never_zero(differences):
    forward, backward = (sign_flip(np.multiply(differences, sign), flips=100) for sign in (1, -1))
    assert forward == backward
    assert 0 < forward <= 1


def test_without_any_difference_the_p_value_is_one():
    assert sign_flip([0.0] * 30) == sign_flip([0.0] * 3) == 1


@given(st.lists(st.floats(0, 1), max_size=8), st.floats(0.01, 0.2))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values, level):
    rejected, order = set(), sorted(range(len(p_values)), key=lambda index: p_values[index])
    for rank, index in enumerate(order):
        if p_values[index] * (len(p_values) - rank) > level:
            break
        rejected.add(index)
    assert {index for index, adjusted in enumerate(holm(p_values)) if adjusted <= level} == rejected


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_no_correction_and_bonferroni(p_values):
    for raw, adjusted in zip(p_values, holm(p_values), strict=True):
        assert raw <= adjusted <= min(1, len(p_values) * raw)


@given(st.integers(1, 300).flatmap(lambda total: st.tuples(st.integers(1, total), st.just(total))))
def test_the_interval_of_a_share_is_scipys_beta(kept_total):
    scipy_stats = pytest.importorskip("scipy.stats")
    kept, total = kept_total
    interval = share_interval(kept, total)
    assert [interval.low, interval.high] == pytest.approx(
        scipy_stats.beta.ppf([0.025, 0.975], kept, total - kept + 1), abs=1e-9
    )


def test_p_values_counts_and_flips_out_of_range_are_refused():
    with pytest.raises(aa.InvalidValueError, match=r"Expected p-values, all in \[0, 1\]"):
        holm([0.5, 1.5])
    with pytest.raises(aa.InvalidValueError, match="need 1 <= kept <= total"):
        share_interval(0, 5)
    with pytest.raises(aa.InvalidValueError, match="need at least 1"):
        sign_flip([1.0], flips=0)


def test_the_interval_of_a_mean_of_shares_is_scipys_for_one_picture_a_prompt():
    scipy_stats = pytest.importorskip("scipy.stats")
    right = np.random.default_rng(5).integers(2, size=150).astype(float)
    interval = share_bootstrap([np.array([right, np.ones(150)])], seed=1)
    reference = scipy_stats.bootstrap(
        (right,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert [interval.low, interval.high] == pytest.approx([reference.low, reference.high], abs=0.01)


def test_intervals_of_shares_cover_the_true_share_95_times_in_100():
    generator = np.random.default_rng(1)
    covered = 0
    for run in range(1000):
        easy, hard = (generator.random(80) < chance for chance in (0.8, 0.4))
        questions = generator.integers(1, 6, size=80)  # of each prompt, right with probability 0.7
        groups = [np.array([easy, np.ones(80)]), np.array([hard, np.ones(80)])]
        groups.append(np.array([generator.binomial(questions, 0.7), questions]))
        interval = share_bootstrap(groups, seed=run, resamples=400)
        covered += interval.low <= (0.8 + 0.4 + 0.7) / 3 <= interval.high
    assert 0.93 <= covered / 1000 <= 0.97


@given(st.integers(1, 60), st.integers(1, 4))
def test_if_all_are_right_or_none_the_interval_is_scipys_exact_one(prompts, pictures):
    scipy_stats = pytest.importorskip("scipy.stats")
    denominators = np.full(prompts, pictures)
    for numerators, successes in ((denominators, prompts), (denominators * 0, 0)):
        exact = scipy_stats.binomtest(successes, prompts).proportion_ci(method="exact")
        interval = share_bootstrap([np.array([numerators, denominators])])
        assert [interval.low, interval.high] == pytest.approx([exact.low, exact.high])


def test_the_size_of_the_chunks_changes_no_share(monkeypatch):
    groups = [np.array([np.random.default_rng(0).integers(2, size=30), np.ones(30)])]
    one_chunk = share_bootstrap(groups, resamples=200)
    monkeypatch.setattr(statistics, "_CHUNK_DRAWS", 7 * 30)
    assert share_bootstrap(groups, resamples=200) == one_chunk != share_bootstrap(groups, resamples=200, seed=1)


@pytest.mark.parametrize(
    ("groups", "error", "text"),
    [
        pytest.param([], aa.InvalidValueError, "0 groups", id="none"),
        pytest.param([np.zeros((2, 0))], aa.InvalidValueError, "one a prompt", id="empty"),
        pytest.param([np.ones((3, 2))], aa.InvalidValueError, "one a prompt", id="three-rows"),
        pytest.param([np.array([[2.0], [1.0]])], aa.InvalidValueError, "one a prompt", id="more-than-all"),
        pytest.param([np.array([[0.0], [0.0]])], aa.NonFiniteError, "denominators above zero", id="of-nothing"),
        pytest.param([np.array([[1.0], [math.inf]])], aa.NonFiniteError, "expected finite", id="infinite"),
    ],
)
def test_groups_that_are_not_shares_are_refused(groups, error, text):
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


# Five-line references, on the same random numbers: they pin quantiles, inequalities and chunks to the last digit.


def bootstrap_reference(values, *, seed, resamples, level):
    indices = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    means = np.asarray(values)[indices].mean(axis=1)
    return np.quantile(means, [(1 - level) / 2, 1 - (1 - level) / 2])


def studentised_reference(values, *, seed, resamples, level):
    values, generator = np.asarray(values), np.random.default_rng(seed)
    noise, count, error = generator.spawn(1)[0], len(values), np.std(values, ddof=1) / len(values) ** 0.5
    samples = values[generator.integers(count, size=(resamples, count))]
    samples = samples + error * noise.standard_normal((resamples, count))
    ratios = (samples.mean(axis=1) - values.mean()) / (samples.std(axis=1, ddof=1) / count**0.5)
    return values.mean() - error * np.quantile(ratios, [(1 + level) / 2, (1 - level) / 2])


@pytest.mark.parametrize(("resamples", "level"), [(1, 0.95), (2, 0.95), (999, 0.95), (1000, 0.5), (500, 0.001)])
@pytest.mark.parametrize("count", [2, 17, 49])
def test_the_bootstrap_of_few_is_the_studentised_reference(count, resamples, level):
    values = np.random.default_rng(0).normal(size=count)
    interval = paired_bootstrap(values, seed=3, resamples=resamples, level=level)
    reference = studentised_reference(values, seed=3, resamples=resamples, level=level)
    assert [interval.low, interval.high] == pytest.approx(reference.tolist(), rel=1e-9)


@pytest.mark.parametrize(("resamples", "level"), [(1, 0.95), (2, 0.95), (999, 0.95), (1000, 0.5), (500, 0.001)])
def test_the_bootstrap_of_many_is_the_five_line_reference(resamples, level):
    values = np.random.default_rng(0).normal(size=50)
    interval = paired_bootstrap(values, seed=3, resamples=resamples, level=level)
    reference = bootstrap_reference(values, seed=3, resamples=resamples, level=level)
    assert [interval.low, interval.high] == pytest.approx(reference.tolist(), rel=1e-12)


def test_by_default_ten_thousand_samples_of_seed_0_give_intervals_of_95_percent():
    values = np.random.default_rng(0).normal(size=60)
    reference = bootstrap_reference(values, seed=0, resamples=10_000, level=0.95)
    interval = paired_bootstrap(values)
    assert [interval.low, interval.high] == pytest.approx(reference.tolist(), rel=1e-12)
    group = np.random.default_rng(0).integers([[1], [9]], [[9], [99]], size=(2, 60))
    assert share_bootstrap([group]) == share_bootstrap([group], seed=0, resamples=10_000, level=0.95)
    assert share_bootstrap([group]) != share_bootstrap([group], seed=1)
    assert sign_flip(values) == sign_flip_reference(values, seed=0, flips=10_000)
    assert share_interval(4, 200) == share_interval(4, 200, level=0.95)


def test_the_interval_of_two_differences_is_nearly_students():
    scipy_stats = pytest.importorskip("scipy.stats")
    interval = paired_bootstrap([0.0, 1.0])
    reach = scipy_stats.t.ppf(0.975, 1) * 0.5
    assert [interval.low, interval.high] == pytest.approx([0.5 - reach, 0.5 + reach], rel=0.2)


def sign_flip_reference(values, *, seed, flips):
    signs = np.random.default_rng(seed).integers(2, size=(flips, len(values))) * 2 - 1
    return (1 + int((abs(signs @ values) >= abs(np.sum(values)) - 1e-9).sum())) / (1 + flips)


@pytest.mark.parametrize("flips", [1, 2, 63, 64, 65, 1000])
def test_signs_are_tried_exhaustively_if_there_are_at_most_as_many_as_flips_and_drawn_otherwise(flips, monkeypatch):
    values = np.array([3.0, 1.0, 2.0, -1.0, 2.0, 1.0])  # 64 assignments of signs
    exact = sum(
        abs(sum(sign * value for sign, value in zip(signs, values, strict=True))) >= 8
        for signs in itertools.product((-1, 1), repeat=6)
    )
    expected = exact / 64 if flips >= 64 else sign_flip_reference(values, seed=5, flips=flips)
    assert sign_flip(values, seed=5, flips=flips) == expected
    monkeypatch.setattr(statistics, "_CHUNK_DRAWS", 5 * 6)
    assert sign_flip(values, seed=5, flips=flips) == expected


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=9))
def test_sums_that_differ_by_rounding_alone_count_as_equal(tenths):
    assert sign_flip([number / 10 for number in tenths]) == sign_flip(tenths)


def test_the_smallest_p_values_are_those_of_their_numbers_of_signs():
    assert [sign_flip([1.0] * count) for count in (1, 2, 5, 6)] == [1.0, 0.5, 2 / 32, 2 / 64]
    assert sign_flip([1.0] * 40, flips=999) == 1 / 1000


def test_holm_takes_p_values_of_0_and_1_and_ties():
    assert holm([0.0, 1.0, 0.0]) == [0.0, 1.0, 0.0]
    assert holm([0.25, 0.25]) == [0.5, 0.5]
    assert holm([0.125, 0.25, 0.25]) == [0.375, 0.5, 0.5]
    assert holm([]) == []
    with pytest.raises(aa.InvalidValueError, match="Expected p-values"):
        holm([-0.01])


@pytest.mark.parametrize("level", [0.5, 0.9, 0.999])
@pytest.mark.parametrize(("kept", "total"), [(1, 1), (1, 20), (20, 20), (7, 20)])
def test_the_interval_of_a_share_has_the_given_level(kept, total, level):
    scipy_stats = pytest.importorskip("scipy.stats")
    interval = share_interval(kept, total, level=level)
    reference = scipy_stats.beta.ppf([(1 - level) / 2, (1 + level) / 2], kept, total - kept + 1)
    assert [interval.low, interval.high] == pytest.approx(reference.tolist(), abs=1e-9)


def test_a_level_next_to_1_reaches_the_ends_of_the_range():
    assert share_interval(3, 3, level=1 - 2**-53).high == 1.0


@pytest.mark.parametrize("arguments", [(0, 5, 0.9), (6, 5, 0.9), (1, 5, 0.0), (1, 5, 1.0)])
def test_shares_and_levels_out_of_range_are_refused(arguments):
    kept, total, level = arguments
    with pytest.raises(aa.InvalidValueError, match=r"need 1 <= kept <= total and a level in \(0, 1\)"):
        share_interval(kept, total, level=level)


def share_reference(groups, *, seed, resamples, level):
    generator, shares = np.random.default_rng(seed), []
    for numerators, denominators in groups:
        indices = generator.integers(len(numerators), size=(resamples, len(numerators)))
        shares.append(numerators[indices].sum(axis=1) / denominators[indices].sum(axis=1))
    return np.quantile(np.mean(shares, axis=0), [(1 - level) / 2, 1 - (1 - level) / 2])


@pytest.mark.parametrize(("resamples", "level"), [(1, 0.95), (300, 0.95), (301, 0.5)])
def test_the_bootstrap_of_shares_of_many_prompts_is_the_five_line_reference(resamples, level):
    denominators = np.random.default_rng(1).integers(1, 5, size=(3, 50))
    groups = [np.array([np.random.default_rng(2).integers(0, row + 1), row]) for row in denominators]
    interval = share_bootstrap(groups, seed=2, resamples=resamples, level=level)
    reference = share_reference(groups, seed=2, resamples=resamples, level=level)
    assert [interval.low, interval.high] == pytest.approx(reference.tolist(), rel=1e-12)


@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from([0, 1, 2])), min_size=1, max_size=4))
def test_an_interval_of_shares_is_never_a_point_and_holds_the_share(groups):
    groups = [np.array([[right] * prompts, [2] * prompts]) for prompts, right in groups]
    interval = share_bootstrap(groups)
    share = np.mean([numerators.sum() / denominators.sum() for numerators, denominators in groups])
    assert 0 <= interval.low <= share <= interval.high <= 1
    assert interval.high - interval.low > 0.05


def test_groups_that_are_all_right_or_all_wrong_have_an_interval_between_them():
    right, wrong = np.array([[1.0, 1], [1, 1]]), np.array([[0.0, 0], [1, 1]])
    interval = share_bootstrap([right, wrong])
    bound = 0.025 ** (1 / 2)  # Clopper and Pearson for two of two
    assert [interval.low, interval.high] == pytest.approx([bound / 2, 1 - bound / 2])


@pytest.mark.parametrize("counts", [(3, 3), (2, 1), (2, 100), (1, 4, 30)])
def test_if_all_are_right_the_bound_is_the_smallest_mean_under_which_that_is_likely_enough(counts):
    scipy_optimize = pytest.importorskip("scipy.optimize")
    interval = share_bootstrap([np.ones((2, count)) for count in counts])
    smallest = scipy_optimize.minimize(
        np.mean,
        np.full(len(counts), 0.9),
        bounds=[(1e-9, 1.0)] * len(counts),
        constraints={"type": "ineq", "fun": lambda shares: np.dot(counts, np.log(shares)) - np.log(0.025)},
        method="SLSQP",
        options={"ftol": 1e-12},
    )
    assert (interval.low, interval.high) == (pytest.approx(smallest.fun, abs=1e-4), 1.0)


@pytest.mark.parametrize("prompts", [2, 5, 8, 20])
def test_intervals_of_shares_of_few_prompts_cover_the_true_share(prompts):
    generator = np.random.default_rng(prompts)
    missed = [0, 0]
    for run in range(600):
        chances = generator.beta(4, 1, size=(2, prompts))  # each prompt has a chance of its own, with a mean of 0.8
        groups = [np.array([generator.binomial(4, row), np.full(prompts, 4)]) for row in chances]
        interval = share_bootstrap(groups, seed=run, resamples=400)
        missed[0] += interval.low > 0.8
        missed[1] += interval.high < 0.8
    assert max(missed) / 600 <= 0.06


@pytest.mark.parametrize("options", [{"resamples": 0}, {"level": 0.0}, {"level": 1.0}])
def test_resamples_and_levels_of_shares_out_of_range_are_refused(options):
    with pytest.raises(aa.InvalidValueError, match=r"at least 1 resample and a level in \(0, 1\)"):
        share_bootstrap([np.array([[0.0, 1.0], [1, 1]])], **options)


def test_a_negative_numerator_and_a_denominator_of_zero_are_refused():
    with pytest.raises(aa.InvalidValueError, match="one a prompt"):
        share_bootstrap([np.array([[-1.0, 1.0], [1, 1]])])
    with pytest.raises(aa.NonFiniteError, match="denominators above zero"):
        share_bootstrap([np.array([[1.0, 0.0], [1, 0]])])
