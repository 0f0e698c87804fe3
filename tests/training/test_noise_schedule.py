"""The formulas of noising: levels, mixing, targets, and what a pair makes of them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from artaug.errors import InvalidValueError
from artaug.training import EpsilonPrediction, FlowMatching, VPrediction

VARIANCE_PRESERVING = [
    EpsilonPrediction(),
    VPrediction(),
    EpsilonPrediction(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
    VPrediction(beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True),
]
SCHEDULES = [
    FlowMatching(),
    FlowMatching(shift=3.0, logit_normal=True),
    FlowMatching(shift=2.0, shift_terminal=0.02),
    *VARIANCE_PRESERVING,
]

each_schedule = pytest.mark.parametrize("noise_schedule", SCHEDULES, ids=repr)


def drawn(seed, *, rows=3):
    generator = torch.Generator().manual_seed(seed)
    before, after, noise, prediction = torch.randn((4, rows, 2, 5), generator=generator, dtype=torch.float64)
    sigmas = 0.01 + 0.98 * torch.rand(rows, generator=generator, dtype=torch.float64)
    return before, after, noise, prediction, sigmas


@each_schedule
@given(seed=st.integers(0, 2**32))
def test_the_paired_target_moves_the_clean_estimate_by_exactly_the_difference(noise_schedule, seed):
    before, after, noise, prediction, sigmas = drawn(seed)
    target = noise_schedule.paired_target(prediction, after - before, sigmas)
    moved = noise_schedule.predict_x0(noise_schedule.add_noise(after, noise, sigmas), target, sigmas)
    teacher = noise_schedule.predict_x0(noise_schedule.add_noise(before, noise, sigmas), prediction, sigmas)
    torch.testing.assert_close(moved, teacher + (after - before), rtol=1e-9, atol=1e-9)


@each_schedule
@given(seed=st.integers(0, 2**32))
def test_the_target_stands_for_the_clean_latents_it_was_made_from(noise_schedule, seed):
    clean, _, noise, _, sigmas = drawn(seed)
    estimate = noise_schedule.predict_x0(
        noise_schedule.add_noise(clean, noise, sigmas), noise_schedule.target(clean, noise, sigmas), sigmas
    )
    torch.testing.assert_close(estimate, clean, rtol=1e-9, atol=1e-9)


@each_schedule
@given(seed=st.integers(0, 2**32))
def test_with_a_perfect_teacher_the_target_is_that_of_fine_tuning(noise_schedule, seed):
    before, after, noise, _, sigmas = drawn(seed)
    paired = noise_schedule.paired_target(noise_schedule.target(before, noise, sigmas), after - before, sigmas)
    torch.testing.assert_close(paired, noise_schedule.target(after, noise, sigmas), rtol=1e-9, atol=1e-9)


@each_schedule
@given(
    seed=st.integers(0, 2**32),
    sigma_range=st.tuples(st.floats(0.0, 0.4), st.floats(0.6, 1.0)),
)
def test_sigmas_lie_in_the_given_range_and_are_never_zero(noise_schedule, seed, sigma_range):
    levels = noise_schedule.sample_sigmas(50, torch.Generator().manual_seed(seed), sigma_range=sigma_range)
    low, high = (torch.tensor(bound, dtype=torch.float32) for bound in sigma_range)
    assert levels.shape == (50,)
    assert levels.dtype == torch.float32
    assert (levels > 0).all()
    assert ((levels >= low) & (levels <= high)).all()


@each_schedule
def test_levels_come_from_the_generator_and_from_nowhere_else(noise_schedule):
    state = torch.random.get_rng_state()
    first, again = (noise_schedule.sample_sigmas(8, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_uniform_levels_have_the_shifted_median(shift):
    levels = FlowMatching(shift=shift).sample_sigmas(20_000, torch.Generator().manual_seed(0))
    assert levels.median().item() == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5), abs=0.01)


def test_logit_normal_levels_have_a_standard_normal_logit():
    logits = torch.logit(
        FlowMatching(logit_normal=True).sample_sigmas(20_000, torch.Generator().manual_seed(0)).double()
    )
    assert logits.mean().item() == pytest.approx(0, abs=0.03)
    assert logits.std().item() == pytest.approx(1, abs=0.03)


@given(shift=st.floats(0.2, 12.0), seed=st.integers(0, 2**32))
def test_shifted_logit_normal_levels_have_a_normal_logit_around_the_shifts_logarithm(shift, seed):
    levels, plain = (
        FlowMatching(shift=one, logit_normal=True).sample_sigmas(64, torch.Generator().manual_seed(seed)).double()
        for one in (shift, 1.0)
    )
    torch.testing.assert_close(torch.logit(levels), torch.logit(plain) + math.log(shift), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("terminal", [None, 0.02, 0.1])
@pytest.mark.parametrize("dynamic", [False, True])
def test_uniform_levels_have_the_density_of_a_samplers_levels(terminal, dynamic):
    from diffusers import FlowMatchEulerDiscreteScheduler  # noqa: PLC0415

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic, shift_terminal=terminal)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1e-4, 10_000).numpy(), mu=math.log(3.0) if dynamic else None)
    levels = FlowMatching(shift=3.0, shift_terminal=terminal or 0.0).sample_sigmas(
        20_000, torch.Generator().manual_seed(0)
    )
    quantiles = torch.linspace(0, 1, 21)
    expected_quantiles = scheduler.sigmas[:-1].quantile(quantiles)
    torch.testing.assert_close(levels.quantile(quantiles), expected_quantiles, rtol=0, atol=0.015)
    assert levels.min() >= (terminal or 0.0)


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("schedule", ["scaled_linear", "linear", "squaredcos_cap_v2"])
def test_the_schedule_is_the_one_diffusers_uses(schedule, rescaled):
    from diffusers import DDPMScheduler  # noqa: PLC0415

    betas = {"beta_start": 0.0005, "beta_end": 0.015}
    scheduler = DDPMScheduler(50, beta_schedule=schedule, rescale_betas_zero_snr=rescaled, **betas)
    known = (1 - scheduler.alphas_cumprod).sqrt()
    noise_schedule = VPrediction(
        num_train_timesteps=50, beta_schedule=schedule, rescale_betas_zero_snr=rescaled, **betas
    )
    drawn = noise_schedule.sample_sigmas(2000, torch.Generator().manual_seed(0)).unique()
    torch.testing.assert_close(drawn, known, rtol=1e-4, atol=1e-5)
    assert (drawn[-1] == 1) == rescaled
    if not rescaled:
        plain = EpsilonPrediction(num_train_timesteps=50, beta_schedule=schedule, **betas)
        assert torch.equal(plain.sample_sigmas(2000, torch.Generator().manual_seed(0)).unique(), drawn)


@pytest.mark.parametrize("terminal", [-0.1, 1.0, math.nan])
def test_a_terminal_out_of_range_is_refused(terminal):
    with pytest.raises(InvalidValueError, match=r"need a noise level in \[0, 1\)"):
        FlowMatching(shift_terminal=terminal)


def test_a_range_below_the_terminal_has_no_levels():
    with pytest.raises(InvalidValueError, match=r"no noise level .* they run from 0\.02 to 1"):
        FlowMatching(shift_terminal=0.02).sample_sigmas(1, torch.Generator(), sigma_range=(0.0, 0.02))


@pytest.mark.parametrize("kind", [EpsilonPrediction, VPrediction])
def test_betas_that_grow_in_an_unknown_way_are_refused(kind):
    noise_schedule = kind()
    object.__setattr__(
        noise_schedule, "beta_schedule", "sigmoid"
    )  # the types checked in tests would not let it be constructed
    with pytest.raises(
        InvalidValueError, match=r"need a beta_schedule among \['scaled_linear', 'linear', 'squaredcos_cap_v2'\]"
    ):
        noise_schedule.__post_init__()


@pytest.mark.parametrize("shift", [0.0, -1.0, math.inf, math.nan])
def test_a_shift_out_of_range_is_refused(shift):
    with pytest.raises(InvalidValueError, match="need a finite shift above 0"):
        FlowMatching(shift=shift)


@pytest.mark.parametrize("kind", [EpsilonPrediction, VPrediction])
def test_betas_out_of_order_are_refused(kind):
    with pytest.raises(InvalidValueError, match="need 0 < beta_start <= beta_end < 1"):
        kind(beta_start=0.5, beta_end=0.1)


@each_schedule
@pytest.mark.parametrize("sigma_range", [(0.5, 0.5), (-0.1, 1.0), (0.0, 1.1), (math.nan, 1.0)])
def test_an_empty_range_is_refused(noise_schedule, sigma_range):
    with pytest.raises(InvalidValueError, match="need 0 <= lowest < highest <= 1"):
        noise_schedule.sample_sigmas(1, torch.Generator(), sigma_range=sigma_range)


@pytest.mark.parametrize("noise_schedule", VARIANCE_PRESERVING[:2], ids=repr)
def test_a_range_without_levels_names_the_range_there_is(noise_schedule):
    with pytest.raises(InvalidValueError, match=r"no noise level .* they run from 0\.0292 to 0\.9977"):
        noise_schedule.sample_sigmas(1, torch.Generator(), sigma_range=(0.0, 0.01))
