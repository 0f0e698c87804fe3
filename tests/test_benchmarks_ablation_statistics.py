"""The statistics of the ablation: laws of the interpolation, the bootstrap, and of dominance."""

import numpy as np
import pytest
from benchmarks import _ablation_statistics as statistics
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

STRENGTHS = (0.0, 0.5, 1.0, 2.0, 3.0)
numbers = st.floats(0, 0.01, allow_subnormal=False)
levels = st.floats(1e-6, 0.05)


def rising(size):
    """Sorted numbers from 0."""
    return arrays(np.float64, size - 1, elements=numbers).map(lambda steps: np.concatenate([[0], np.cumsum(steps)]))


@st.composite
def curves(draw, seeds=(0, 1, 2), prompts=4):
    """Any curves: drift from 0, all else anything."""
    shape = (len(seeds), len(STRENGTHS), prompts)
    measures = {name: draw(arrays(np.float64, shape, elements=numbers)) for name in statistics.BETTER}
    measures["drift"] = np.cumsum(measures["drift"], axis=1) * (np.array(STRENGTHS) > 0)[:, None]
    return statistics.Curves(STRENGTHS, seeds, measures, passes=draw(st.floats(1, 3)))


def evenly(gain, drift, *, alignment=1.0, passes=100.0, seeds=(0, 1, 2, 3, 4), noise=0.0):
    """A gain that grows as the strength does and a drift as its square, with noise of seeds and prompts."""
    rng = np.random.default_rng(0)
    shape = (len(seeds), len(STRENGTHS), 6)
    strengths = np.broadcast_to(np.array(STRENGTHS)[:, None], shape)
    spread = noise * rng.standard_normal(shape)
    measures = {
        "gain": gain * strengths + spread,
        "drift": drift * strengths**2,
        "alignment": np.full(shape, alignment),
        "diversity": np.zeros(shape),
    }
    return statistics.Curves(STRENGTHS, seeds, measures, passes)


@given(rising(5), rising(5), levels)
def test_interpolation_is_that_of_numpy_where_the_drift_rises_and_nothing_beyond_it(drifts, values, level):
    drifts = drifts + 1e-7 * np.arange(5)

    found = statistics.at_drift(drifts, values, level)

    roots = np.sqrt(drifts)
    expected = np.interp(np.sqrt(level), roots, values) if level <= drifts[-1] else np.nan
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-12, nan_ok=True)


def test_a_gain_in_proportion_to_the_strength_is_found_between_strengths_far_apart():
    strengths = np.array([0.0, 1.0, 3.0])

    found = statistics.at_drift(1e-3 * strengths**2, 0.05 * strengths, 4e-3)

    assert found == pytest.approx(0.05 * 2)


@given(rising(5), rising(5), levels, levels)
def test_interpolation_is_monotone_on_monotone_curves(drifts, values, first, second):
    low, high = (statistics.at_drift(drifts, values, level) for level in sorted((first, second)))

    assert not low > high
    assert np.isfinite(low) or np.isnan(high), "who reaches a drift has reached those below it"


@given(arrays(np.float64, (3, 2, 5), elements=numbers), levels)
def test_curves_are_interpolated_together_as_alone(drifts, level):
    drifts[..., 0] = 0
    together = statistics.at_drift(drifts, drifts**2, level)

    alone = [[statistics.at_drift(row, row**2, level) for row in block] for block in drifts]
    assert np.array_equal(together, alone, equal_nan=True)


@given(st.lists(st.floats(1, 100), min_size=2, max_size=5, unique=True), levels)
def test_passes_to_a_gain_lie_between_those_before_and_after(passes, gain):
    passes, gains = sorted(passes), [0.02 * (number + 1) for number in range(len(passes))]

    found = statistics.passes_to_gain(passes, gains, gain)

    if gain > gains[-1]:
        assert found is None
    else:
        assert found == pytest.approx(np.interp(gain, [0, *gains], [0, *passes]))


@given(curves(), curves())
def test_dominance_is_antisymmetric_and_no_arm_dominates_itself(arm, other):
    bootstrap = statistics.Bootstrap(60)
    for compare in (bootstrap.at_strength_1, bootstrap.along_the_front):
        assert not compare(arm, arm).dominates
        assert not (compare(arm, other).dominates and compare(other, arm).dominates)


@pytest.mark.parametrize("claim", ["at_strength_1", "along_the_front"])
def test_an_arm_that_is_better_in_something_and_worse_in_nothing_dominates(claim):
    compare = getattr(statistics.Bootstrap(200), claim)
    plain = evenly(0.05, 0.001)

    assert compare(evenly(0.06, 0.001), plain).dominates
    assert compare(evenly(0.05, 0.001, passes=50), plain).dominates
    assert not compare(evenly(0.06, 0.001, alignment=0.9), plain).dominates, "worse in alignment"
    assert not compare(evenly(0.06, 0.001, passes=103), plain).dominates, "more passes"
    assert not compare(evenly(0.05, 0.001, passes=101), plain).dominates, "the passes of rounding are the same"


def test_strength_costs_nothing_along_the_front():
    """Twice as far for four times the drift: the same front, and not the same LoRA."""
    bootstrap = statistics.Bootstrap(200)
    near, far = evenly(0.05, 0.0005), evenly(0.1, 0.002)

    along = bootstrap.along_the_front(far, near)
    assert all(abs(one.mean) < 1e-9 for one in along.advantages)
    assert (along.reaches_as_far, bootstrap.along_the_front(near, far).reaches_as_far) == (True, False)
    as_trained = {one.measure: one.mean for one in bootstrap.at_strength_1(far, near).advantages}
    assert (as_trained["gain"], as_trained["drift"]) == (pytest.approx(0.05), pytest.approx(-0.0015))


def test_a_difference_within_the_noise_of_seeds_and_prompts_is_no_dominance():
    bootstrap = statistics.Bootstrap(500)
    assert not bootstrap.at_strength_1(evenly(0.0501, 0.001, noise=0.02), evenly(0.05, 0.001)).dominates


def test_arms_are_compared_on_the_seeds_that_both_have():
    bootstrap = statistics.Bootstrap(50)
    some, all_of = evenly(0.06, 0.001, seeds=(1, 3)), evenly(0.05, 0.001)

    (gain, *_) = bootstrap.at_strength_1(some, all_of).advantages

    assert gain.mean == pytest.approx(0.01)
    assert not bootstrap.at_strength_1(evenly(0.05, 0.001, seeds=(8,)), all_of).dominates


@pytest.mark.parametrize("spread_of_seeds", [0, 1, 5])
def test_the_bootstrap_spreads_as_seeds_and_prompts_within_them_do(spread_of_seeds):
    """Of seed means m and variances s^2 of P prompts, the variance of a resampled mean is (var(m) + mean(s^2) / P) / S."""
    rng = np.random.default_rng(spread_of_seeds)
    values = rng.standard_normal((5, 3, 8)) + spread_of_seeds * rng.standard_normal((5, 1, 1))
    measures = dict.fromkeys(statistics.BETTER, values) | {"drift": np.abs(values)}
    arm = statistics.Curves((0.0, 0.5, 1.0), range(5), measures, passes=1)

    _, low, high = statistics.Bootstrap(4000).estimate(arm, "gain", None)

    at_1 = values[:, 2]
    variance = (at_1.mean(axis=1).var() + at_1.var(axis=1).mean() / 8) / 5
    assert high - low == pytest.approx(2 * 1.96 * variance**0.5, rel=0.12)
