"""The noise that a picture was drawn from, rebuilt from its seed: what the denoiser of a drawing really gets first."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler

import artaug as aa
from artaug.diffusion.families.unet.family import StableDiffusion, StableDiffusionXL
from support.family_laws import family_of, picture, record_calls, synthesizer_of
from support.family_pipelines import PIPELINES
from support.tiny_unet import ddim, tiny_sd15, tiny_sdxl

PROMPTS, SEEDS = ["a red barn", "a lake"], [3, 2**40 + 5]


def first_latents(family):
    """What the denoiser gets in the first step of a drawing: one row a picture, those with the plans' prompts."""
    plans = [aa.Plan(prompt) for prompt in PROMPTS]
    with record_calls(family.module) as calls:
        synthesizer_of(family).synthesize_batch(plans, seeds=SEEDS)
    call, _ = calls[0]
    latents = call.get("hidden_states", call.get("sample"))
    if latents is None:  # of Z-Image, whose pictures are videos of one frame
        latents = torch.stack(call["x"]).squeeze(2)[: len(PROMPTS)]
    return latents[-len(PROMPTS) :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", PIPELINES, ids=lambda kind: kind.__name__)
def test_it_is_what_the_denoiser_gets_first(kind, dtype):
    family = family_of(kind, PIPELINES[kind]().to(dtype), width=32, height=32)
    latents = first_latents(family)
    noise = family.initial_noise(SEEDS, family.encode_prompts(PROMPTS))
    assert noise.dtype == torch.float32
    assert torch.equal(noise.to(dtype), latents)
    assert noise.shape == family.encode_images([picture(width=32, height=32)] * 2).shape


@pytest.mark.parametrize("kind", PIPELINES, ids=lambda kind: kind.__name__)
def test_a_row_is_the_same_whatever_others_there_are(kind):
    family = family_of(kind, PIPELINES[kind](), width=24, height=32)
    seeds = [5, 0, 2**63]
    conditioning = family.encode_prompts(["a red barn"])
    noise = family.initial_noise(seeds, conditioning)
    for row, seed in zip(noise, seeds, strict=True):
        assert torch.equal(family.initial_noise([seed], conditioning)[0], row)
    assert noise.mean().abs() < 0.2
    assert noise.std() == pytest.approx(1, abs=0.2)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy on diffusers' Euler
@pytest.mark.parametrize("tiny", [tiny_sd15, tiny_sdxl])
@pytest.mark.parametrize("spacing", ["linspace", "leading"])
def test_it_is_standard_normal_where_the_scheduler_scales_it(tiny, spacing):
    scheduler = EulerDiscreteScheduler.from_config(ddim().config, timestep_spacing=spacing)
    kind = StableDiffusion if tiny is tiny_sd15 else StableDiffusionXL
    scaled, plain = (family_of(kind, tiny(scheduler=each), width=32, height=32) for each in (scheduler, ddim()))
    conditioning = plain.encode_prompts(PROMPTS)
    assert scheduler.init_noise_sigma > 2
    noise = plain.initial_noise(SEEDS, conditioning)
    torch.testing.assert_close(scaled.initial_noise(SEEDS, conditioning), noise)
    # The UNet gets s / sqrt(s^2 + 1) of it, at the scheduler's highest level s.
    torch.testing.assert_close(first_latents(scaled), noise, rtol=0.05, atol=1e-3)


def test_it_does_not_touch_the_scheduler():
    family = family_of(StableDiffusion, tiny_sd15(scheduler=EulerDiscreteScheduler.from_config(ddim().config)))
    before = {name: str(value) for name, value in vars(family.pipeline.scheduler).items()}
    family.initial_noise(SEEDS, family.encode_prompts(PROMPTS))
    assert {name: str(value) for name, value in vars(family.pipeline.scheduler).items()} == before
