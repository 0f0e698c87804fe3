"""Weights by noise level: the published formulas, at every level of the schedules, and refused where they do not apply."""

import math
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import compute_snr
from hypothesis import given
from hypothesis import strategies as st

import artaug as aa
from artaug.errors import InvalidValueError, ModelError
from artaug.training import EpsilonPrediction, FlowMatching, VPrediction
from support.training_steps import batch_of, perturb, student_of

ZERO_SNR = VPrediction(rescale_betas_zero_snr=True)
OBJECTIVES = [
    aa.PairedDifference,
    partial(aa.PairedDifference, at_before=0.5, reach=2.0),
    aa.SupervisedFineTuning,
    aa.TwoStage,
]


@pytest.mark.parametrize("schedule", [EpsilonPrediction(), VPrediction(), ZERO_SNR], ids=repr)
@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_is_the_formula_of_diffusers_scripts_at_every_timestep(schedule, gamma):
    zero = getattr(schedule, "rescale_betas_zero_snr", False)
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=zero
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    snr = compute_snr(scheduler, torch.arange(1000)).double()
    clipped = torch.minimum(snr, torch.full_like(snr, gamma))
    expected = clipped / (snr if isinstance(schedule, EpsilonPrediction) else snr + 1)
    weights = aa.MinSNR(gamma=gamma).weights(schedule, (1 - scheduler.alphas_cumprod).sqrt())
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-7)


def test_pure_noise_has_a_finite_weight():
    pure = torch.ones(1)
    assert aa.MinSNR().weights(ZERO_SNR, pure).item() == 0  # v: the weight of the clean estimate there
    assert aa.MinSNR().weights(EpsilonPrediction(), pure).item() == 1


def test_epsilon_and_v_weigh_the_same_error_of_the_clean_estimate():
    """An error e of the clean estimate is an error of alpha / sigma e in epsilon, and of e / sigma in v."""
    sigmas = torch.linspace(0.05, 0.99, 50, dtype=torch.float64)
    alpha2, sigma2 = 1 - sigmas**2, sigmas**2
    of_epsilon = aa.MinSNR().weights(EpsilonPrediction(), sigmas) * alpha2 / sigma2
    of_v = aa.MinSNR().weights(VPrediction(), sigmas) / sigma2
    torch.testing.assert_close(of_epsilon, of_v)
    torch.testing.assert_close(of_v, torch.minimum(alpha2 / sigma2, torch.tensor(5.0, dtype=torch.float64)))


def test_the_bell_is_what_diffsynth_studio_trains_flux_with():
    """Its grid: 1,000 levels from 1 to 0.003 / 1.002, shifted by 3; weights less their least, of mean 1."""
    grid = torch.linspace(1.0, 0.003 / 1.002, 1000, dtype=torch.float64)
    grid = 3 * grid / (1 + 2 * grid)
    bell = torch.exp(-2 * ((1000 * grid - 500) / 1000) ** 2)
    expected = (bell - bell.min()) * 1000 / (bell - bell.min()).sum()
    weights = aa.BellShaped().weights(FlowMatching(shift=3.0), grid)
    torch.testing.assert_close(weights, expected, rtol=0.005, atol=1e-9)
    assert weights[0] == 0
    assert weights.max() == pytest.approx(1.8, abs=0.1)


@given(shift=st.floats(0.3, 6), terminal=st.floats(0, 0.1), logit_normal=st.booleans())
def test_the_mean_of_the_bell_over_a_models_levels_is_one(shift, terminal, logit_normal):
    schedule = FlowMatching(shift=shift, shift_terminal=terminal, logit_normal=logit_normal)
    sigmas = schedule.sample_sigmas(20_000, torch.Generator().manual_seed(0)).double()
    assert aa.BellShaped().weights(schedule, sigmas).mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("weighting", "schedule"), [(aa.MinSNR(gamma=0.7), VPrediction()), (aa.BellShaped(), FlowMatching())], ids=repr
)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_the_mean_of_each_pairs_weighted_loss(make_model, pair_of, objective, weighting, schedule):
    model = make_model(noise_schedule=schedule)
    pairs = [pair_of(seed) for seed in range(3)]
    batch = batch_of(model, pairs)
    with student_of(model) as student:
        perturb(student)
        weights = weighting.weights(schedule, batch.sigmas)
        plain = [objective().loss(student, rows(batch, index)) for index in range(3)]
        weighted = objective(weighting=weighting).loss(student, batch)
    expected = sum(weight * loss for weight, loss in zip(weights, plain, strict=True)) / 3
    torch.testing.assert_close(weighted, expected)


def rows(batch, index):
    part = slice(index, index + 1)
    tensors = {name: getattr(batch, name)[part] for name in ("before", "after", "noise", "sigmas")}
    return type(batch)(**tensors, conditioning={name: text[part] for name, text in batch.conditioning.items()})


@pytest.mark.parametrize(
    ("weighting", "schedule"), [(aa.MinSNR(), FlowMatching()), (aa.BellShaped(), EpsilonPrediction())], ids=repr
)
@pytest.mark.parametrize(
    "objective", [*OBJECTIVES, lambda **options: aa.Bipolar(objective=aa.PairedDifference(**options))]
)
def test_a_weighting_of_other_models_is_refused_before_anything_is_encoded(
    make_model, two_pairs, objective, weighting, schedule
):
    model = make_model(noise_schedule=schedule)
    trainer = aa.DifferentialLoRATrainer(rank=2, steps=4, objective=objective(weighting=weighting))
    with pytest.raises(ModelError, match=f"{type(weighting).__name__} is for .*{type(schedule).__name__}"):
        trainer.train(two_pairs, model, seed=0)
    assert model.calls.images == 0


def test_logit_normal_levels_are_refused_before_anything_is_encoded(make_model, two_pairs):
    model = make_model(noise_schedule=EpsilonPrediction())
    with pytest.raises(ModelError, match="logit_normal is for flow models"):
        aa.DifferentialLoRATrainer(rank=2, steps=4, logit_normal=True).train(two_pairs, model, seed=0)
    assert model.calls.images == 0


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.inf, math.nan])
def test_a_gamma_that_weighs_nothing_is_refused(gamma):
    with pytest.raises(InvalidValueError, match="need a finite gamma above 0"):
        aa.MinSNR(gamma=gamma)
