"""Decoded latents: the pipeline's own pictures, with a gradient that is that of finite differences, and a VAE left as it was."""

import pytest
import torch
from PIL import Image

from artaug.diffusion.families.base import Family
from artaug.diffusion.families.flux.family import Flux
from artaug.diffusion.families.unet.family import StableDiffusionXL
from artaug.errors import ModelError
from support.family_laws import family_of
from support.family_pipelines import PIPELINES, tiny_family
from support.tiny_flux import tiny_flux
from support.tiny_unet import tiny_sdxl


def latents_of(family, *, rows=1):
    shape = family.encode_images([Image.new("RGB", (family.width, family.height))] * rows).shape
    return 0.03 * torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", PIPELINES, ids=lambda kind: kind.__name__)
def test_decoded_latents_are_the_pipelines_picture(kind):
    family, final = tiny_family(kind), []

    def keep_latents(_pipeline, _step, _timestep, kwargs):
        final.append(kwargs["latents"])
        return kwargs

    negative = None if family.negative is None else family.encode_prompts([family.negative])
    drawn = family.pipeline(
        **family.pipeline_kwargs(family.encode_prompts(["a red barn"]), negative),
        width=family.width,
        height=family.height,
        num_inference_steps=2,
        generator=[torch.Generator().manual_seed(0)],
        output_type="pt",
        callback_on_step_end=keep_latents,
    ).images
    with torch.no_grad():
        torch.testing.assert_close(family.decode_latents(final[-1]), drawn, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", PIPELINES, ids=lambda kind: kind.__name__)
def test_the_gradient_is_that_of_finite_differences_and_no_weight_gets_one(kind):
    family = tiny_family(kind)
    vae = family.pipeline.vae.double()
    trainable = [parameter.requires_grad for parameter in vae.parameters()]
    latents = latents_of(family).double().requires_grad_()

    def brightness(moved):
        return family.decode_latents(moved).double().square().mean()

    brightness(latents).backward()
    direction = latents.grad / latents.grad.norm()
    with torch.no_grad():
        slope = (brightness(latents + 1e-4 * direction) - brightness(latents - 1e-4 * direction)) / 2e-4
    assert latents.grad.norm().item() == pytest.approx(slope.item(), rel=0.02)
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert [parameter.requires_grad for parameter in vae.parameters()] == trainable


def test_a_vae_with_gradient_checkpointing_has_the_same_gradient_while_decoding():
    family = family_of(Flux, tiny_flux())
    gradients = []
    for checkpointing in (False, True):
        latents = latents_of(family).requires_grad_()
        if checkpointing:
            family.pipeline.vae.enable_gradient_checkpointing()
        with family.decoding():
            family.decode_latents(latents).square().mean().backward()
        gradients.append(latents.grad)
    torch.testing.assert_close(*gradients)


def test_a_vae_that_overflows_in_float16_is_in_float32_until_the_gradient_is_back():
    family = family_of(StableDiffusionXL, tiny_sdxl(), max_sequence_length=77)
    vae = family.pipeline.vae.half()
    vae.register_to_config(force_upcast=True)
    latents = latents_of(family).requires_grad_()
    with pytest.raises(ModelError, match=r"overflows in float16.*with block of decoding\(\)"):
        family.decode_latents(latents)
    with family.decoding():
        assert vae.dtype == torch.float32
        family.decode_latents(latents).square().mean().backward()
    assert vae.dtype == torch.float16
    assert latents.grad.any()


def test_a_family_that_does_not_decode_says_so():
    bare = type("Bare", (Flux,), {"decode_latents": Family.decode_latents})
    with pytest.raises(ModelError, match="Bare does not say how latents are decoded"):
        family_of(bare, tiny_flux()).decode_latents(torch.zeros(1, 4, 16))


def test_a_vae_that_hooks_move_is_refused():
    family = family_of(Flux, tiny_flux())
    family.pipeline.vae._hf_hook = object()  # noqa: SLF001 - accelerate's
    with pytest.raises(ModelError, match="moved to the device for every call"), family.decoding():
        pytest.fail("the block ran")
