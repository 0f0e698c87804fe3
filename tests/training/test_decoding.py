"""Objectives that look at pixels: trained through the real VAE, counted by estimates, refused where nothing decodes."""

from dataclasses import dataclass

import pytest
import torch

import artaug as aa
from artaug.diffusion import Flux, estimate
from artaug.errors import ModelError
from artaug.testing import check_objective
from artaug.training import TrainingPrompt
from support.family_laws import HEIGHT, WIDTH, family_of, synthesizer_of
from support.tiny_flux import tiny_flux


@dataclass(frozen=True, kw_only=True)
class Darker(aa.Objective):
    """Clean estimates should be black pictures."""

    looks: bool = True
    reads_pictures = False

    @property
    def decodes(self):
        return self.looks

    def loss(self, model, batch):
        noisy = batch.noisy(model.noise_schedule)
        prediction = model.predict(noisy, batch.sigmas, batch.conditioning)
        clean = model.noise_schedule.predict_x0(noisy, prediction, batch.sigmas)
        return (model.decode(clean) if self.looks else clean).square().mean()


PROMPTS = [
    TrainingPrompt(prompt="a red barn", size=(WIDTH, HEIGHT)),
    TrainingPrompt(prompt="a lake", size=(WIDTH, HEIGHT)),
]


def trainer_of(objective):
    return aa.DifferentialLoRATrainer(
        objective=objective, rank=4, steps=10, batch_size=2, learning_rate=5e-2, warmup=0.0, echo=1
    )


def test_a_loss_of_pixels_goes_down_and_leaves_the_vae_alone():
    family = family_of(Flux, tiny_flux())
    weights = [parameter.detach().clone() for parameter in family.pipeline.vae.parameters()]
    result = trainer_of(Darker()).train(PROMPTS, synthesizer_of(family), seed=0, progress=False)
    assert sum(result.losses[-3:]) < sum(result.losses[:3])
    after = list(family.pipeline.vae.parameters())
    assert all(torch.equal(*both) for both in zip(weights, after, strict=True))
    assert all(parameter.grad is None for parameter in after)


def test_the_checks_of_objectives_decode():
    check_objective(Darker())


def test_an_estimate_counts_the_vae_and_its_activations():
    plain, decoding = (
        estimate(tiny_flux(), trainer=trainer_of(Darker(looks=looks)), width=64, height=64) for looks in (False, True)
    )
    vae = sum(parameter.numel() * parameter.element_size() for parameter in tiny_flux().vae.parameters())
    assert decoding.weights_bytes - plain.weights_bytes == vae
    assert decoding.pipeline_bytes == plain.pipeline_bytes
    assert decoding.activations_bytes > plain.activations_bytes
    assert decoding.flops_per_step > plain.flops_per_step


def test_a_model_that_does_not_decode_is_refused_at_the_door(tiny_model):
    with pytest.raises(ModelError, match="TinyModel has no `decode_latents`"):
        trainer_of(Darker()).check(tiny_model, pairs=2)
