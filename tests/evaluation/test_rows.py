"""Rows and guardrails at their boundaries, where a comparison is decided."""

import math

import numpy as np
import pytest

import artaug as aa
from artaug.evaluation.comparison.rows import FEWEST_PROMPTS, describe_row, exceeds, finite_pairs


def row(*, base=5.0, delta=0.0, low=-1.0, high=1.0, p_value=0.001, filtered_by=False):
    return aa.ScoreRow(
        "taste", "round 1", base, base + delta, delta, low, high, 0.6, 64, filtered_by=filtered_by, p_value=p_value
    )


@pytest.mark.parametrize(
    ("low", "high", "direction"), [(0.1, 0.2, 1), (0.0, 0.2, 0), (-0.2, 0.2, 0), (-0.2, 0.0, 0), (-0.2, -0.1, -1)]
)
def test_an_interval_that_touches_zero_has_no_direction(low, high, direction):
    assert row(low=low, high=high).direction == direction
    assert row(low=low, high=high, p_value=0.0).significant == (direction != 0)


@pytest.mark.parametrize(("p_value", "significant"), [(0.0, True), (0.0499, True), (0.05, False), (0.2, False)])
def test_a_row_is_significant_below_a_p_value_of_0_05(p_value, significant):
    assert row(low=0.1, high=0.2, p_value=p_value).significant is significant


@pytest.mark.parametrize(
    ("half_width", "decimals"), [(9.0, 3), (0.001, 3), (0.00099, 4), (0.0001, 4), (1e-8, 8), (1e-9, 8), (0.0, 3)]
)
def test_decimals_show_the_first_digit_of_the_half_width(half_width, decimals):
    assert row(low=-half_width, high=half_width).decimals == decimals


def test_an_interval_as_narrow_as_a_rounding_error_has_no_digits_to_show():
    """All differences are 60/255; their mean depends on the order in which they are added."""
    assert row(base=0.2427, delta=60 / 255, low=0.23529411764705882, high=0.23529411764705885).decimals == 3


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize(
    ("delta", "low", "status"),
    [
        (0.3, 0.1, "inside"),
        (-0.25, -0.5, "inside"),  # the interval reaches the limit, and not beyond
        (-0.25, -0.51, "inconclusive"),
        (-0.5, -0.75, "inconclusive"),  # the mean reaches the limit, and not beyond
        (-0.51, -0.75, "outside"),
    ],
)
def test_a_guardrail_is_crossed_beyond_its_limit_and_not_at_it(relative, delta, low, status):
    guardrail = aa.Guardrail("taste", 0.125 if relative else 0.5, relative=relative)
    assert guardrail.margin(row(base=4.0)) == 0.5
    assert guardrail.status(row(base=4.0, delta=delta, low=low, high=0.75)) == status


def test_a_relative_guardrail_needs_a_base_above_zero_and_an_absolute_one_does_not():
    assert aa.Guardrail("taste", 0.1).status(row(base=1e-9, delta=0.1, low=0.05, high=0.2)) == "inside"
    assert aa.Guardrail("taste", 0.1).status(row(base=0.0, delta=0.1, low=0.05, high=0.2)) == "undefined"
    assert aa.Guardrail("taste", 0.1, relative=False).status(row(base=0.0, delta=-0.2)) == "outside"


def test_a_guardrail_may_allow_no_drop_and_has_to_be_finite():
    assert aa.Guardrail("taste", 0.0).status(row(delta=0.0, low=0.0, high=0.0)) == "inside"
    with pytest.raises(aa.InvalidValueError, match="need a finite max_drop of at least 0"):
        aa.Guardrail("taste", math.inf)


@pytest.mark.parametrize(
    ("low", "high", "start"),
    [(-0.5, 0.5, "taste unchanged"), (-0.51, 0.5, "taste not clearly"), (-0.5, 0.51, "taste not clearly")],
)
def test_unchanged_means_within_the_margin_on_both_sides(low, high, start):
    assert describe_row(row(low=low, high=high), aa.Guardrail("taste", 0.1)).startswith(start)


def test_only_a_gain_is_called_no_evidence_of_one():
    note = "no evidence of a gain"
    assert note in describe_row(row(delta=0.1, low=-0.1, filtered_by=True))
    assert note not in describe_row(row(delta=0.0, low=-0.1, filtered_by=True))
    assert note not in describe_row(row(delta=-0.1, low=-0.2, filtered_by=True))
    assert note not in describe_row(row(delta=0.1, low=-0.1))


def test_a_change_is_printed_in_percent_only_under_a_relative_guardrail():
    change = row(base=4.0, delta=0.5, low=0.25, high=0.75)
    assert describe_row(change) == "taste up 0.50 [0.25, 0.75]"
    assert describe_row(change, aa.Guardrail("taste", 0.1)).startswith("taste up 12% (0.50) [0.25, 0.75], inside")
    assert describe_row(change, aa.Guardrail("taste", 0.1, relative=False)).startswith("taste up 0.50 [0.25, 0.75],")


@pytest.mark.parametrize("count", [2, 5, 6, 8, 20])
def test_a_candidate_without_effect_exceeds_zero_at_most_one_time_in_forty(count):
    generator = np.random.default_rng(count)
    # Skewed scores, means of two pictures a prompt; base and candidate draw from the same distribution.
    exceeded = [exceeds(*generator.exponential(size=(2, 2, count)).mean(axis=0), 0.0, seed=run) for run in range(400)]
    assert np.mean(exceeded) <= (0.04 if count >= FEWEST_PROMPTS else 0.0)  # standard deviation: 0.008


def test_with_fewer_than_six_prompts_nothing_is_significant_and_with_six_something_is():
    assert FEWEST_PROMPTS == 6
    gains = np.array([1.0, 1.1, 0.9, 1.0, 1.2, 0.8])
    assert exceeds(np.zeros(6), gains, 0.0, seed=0)
    assert not exceeds(np.zeros(5), gains[:5], 0.0, seed=0)
    assert not exceeds(np.zeros(6), -gains, 0.0, seed=0)
    assert not exceeds(np.zeros(6), gains, 1.0, seed=0)
    assert exceeds(np.zeros(6), gains, -1.0, seed=0)


def test_scores_of_a_prompt_that_is_listed_again_count_once_by_their_mean():
    clusters = np.array([0, 1, 0, 2, 1])
    base, enhanced = finite_pairs(np.array([1.0, 2.0, 3.0, 4.0, np.nan]), np.array([2.0, 2.0, 4.0, 5.0, 9.0]), clusters)
    assert (base.tolist(), enhanced.tolist()) == ([2.0, 2.0, 4.0], [3.0, 2.0, 5.0])


def test_pairs_are_finite_in_both_arms_and_stay_paired():
    base, enhanced = finite_pairs(np.array([1.0, np.nan, 3.0, 4.0]), np.array([5.0, 6.0, np.inf, 8.0]))
    assert (base.tolist(), enhanced.tolist()) == ([1.0, 4.0], [5.0, 8.0])
