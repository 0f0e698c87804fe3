"""`check_family` passes for every family, and fails for families with a fault."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d, avg_pool3d

import artaug as aa
from artaug.diffusion import DiffusersSynthesizer, Flux, check_family
from artaug.diffusion.families.flux.family import FluxDenoiser
from support.tiny_flux import tiny_flux
from support.tiny_flux2 import tiny_flux2, tiny_flux2_klein
from support.tiny_qwen_image import tiny_qwen_image
from support.tiny_sd3 import tiny_sd3
from support.tiny_unet import tiny_sd15, tiny_sdxl
from support.tiny_z_image import tiny_z_image

TRUE_CFG = {"negative_prompt": "blurry", "true_cfg_scale": 3.0}
CFG = {"guidance_scale": 4.0}
PLAIN = {"guidance_scale": 1.0}
FAMILIES = {
    "flux": (tiny_flux, {}),
    "flux with CFG": (tiny_flux, TRUE_CFG),
    "flux2": (tiny_flux2, {}),
    "flux2 klein": (tiny_flux2_klein, {"max_sequence_length": 64}),
    "qwen": (tiny_qwen_image, {}),
    "qwen with CFG": (tiny_qwen_image, TRUE_CFG),
    "sd15": (tiny_sd15, PLAIN),
    "sd15 with CFG": (tiny_sd15, CFG),
    "sdxl with CFG": (tiny_sdxl, CFG),
    "sd3": (tiny_sd3, PLAIN),
    "sd3 with CFG": (tiny_sd3, CFG),
    "z-image": (tiny_z_image, {"guidance_scale": 0.0}),
    "z-image with CFG": (tiny_z_image, CFG),
}


def synthesizer(pipeline, *, family=None, **options):
    size = {"width": 24, "height": 32, "steps": 2, "max_sequence_length": 48}
    return DiffusersSynthesizer(pipeline=pipeline, family=family, **{**size, **options})


@pytest.mark.parametrize(("build", "options"), FAMILIES.values(), ids=FAMILIES)
def test_every_family_passes_the_check(build, options):
    check_family(synthesizer(build(), **options))


class CellMeanEncoder:
    """Stands in for a VAE's encoder, where each latent depends on all pixels: here a latent is the mean of its own pixels."""

    def __init__(self, channels, factor):
        self.channels, self.factor, self.latent_dist = channels, factor, self

    def __call__(self, pixels):
        self.pixels = pixels
        return self

    def mode(self):
        luma = self.pixels.mean(dim=1, keepdim=True)
        cells = avg_pool3d if luma.ndim == 5 else avg_pool2d
        size = (1,) * (luma.ndim - 4) + (self.factor, self.factor)
        return cells(luma, size).repeat(1, self.channels, *(1,) * (luma.ndim - 2))


HALVES = {"left": aa.Box(0, 0, 0.5, 1), "top": aa.Box(0, 0, 1, 0.5), "right": aa.Box(0.5, 0, 1, 1)}


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize(("build", "options"), FAMILIES.values(), ids=FAMILIES)
def test_a_mask_of_half_a_picture_is_one_exactly_where_repainting_that_half_changes_latents(
    build, options, half, monkeypatch
):
    pipeline = build()
    factor = pipeline.vae_scale_factor
    side = 8 * factor
    drawing = synthesizer(pipeline, **{**options, "width": side, "height": side})
    config = pipeline.vae.config
    monkeypatch.setattr(pipeline.vae, "encode", CellMeanEncoder(config.get("latent_channels") or config.z_dim, factor))
    mask = np.zeros((side, side), dtype=np.float32)
    left, top, right, bottom = half.to_pixels((side, side))
    mask[top:bottom, left:right] = 1
    grey = np.full((side, side, 3), 90, dtype=np.uint8)
    repainted = np.where(mask[..., None] > 0, np.uint8(200), grey)
    with drawing.training() as family:
        before, after = family.encode_images([Image.fromarray(grey), Image.fromarray(repainted)])
        (inside,) = family.encode_masks(torch.from_numpy(mask)[None])
    assert torch.equal(inside, (before != after).float())


class OtherNoise(Flux):
    def initial_noise(self, seeds, conditioning):
        return super().initial_noise([seed + 1 for seed in seeds], conditioning)


class OtherLayout(Flux):
    def initial_noise(self, seeds, conditioning):
        return super().initial_noise(seeds, conditioning).flatten(1)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (OtherNoise, "OtherNoise: initial_noise gives other noise than the denoiser gets"),
        (OtherLayout, r"OtherLayout: initial_noise gives rows of shape \(\d+,\) for latents of shape \(\d+, \d+\)"),
    ],
)
def test_noise_that_no_drawing_starts_from_is_named(family, message):
    with pytest.raises(AssertionError, match=message):
        check_family(synthesizer(tiny_flux(), family=family))


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(1, 24, 32), aa.ModelError, r"masks of shape \(1, 24, 32\) cannot be encoded at 24 x 32"),
        (torch.full((1, 32, 24), 1.5), aa.InvalidValueError, r"masks run from 1\.5 to 1\.5"),
        (torch.full((1, 32, 24), torch.nan), aa.InvalidValueError, "masks run from nan"),
    ],
)
def test_masks_of_another_size_or_range_are_refused(mask, error, message):
    with synthesizer(tiny_sd15(), **PLAIN).training() as family, pytest.raises(error, match=message):
        family.encode_masks(mask)


def test_a_mask_that_ends_inside_a_cell_counts_by_its_area():
    mask = torch.zeros(1, 32, 24)
    mask[:, :, :2] = 1
    with synthesizer(tiny_sd15(), **PLAIN).training() as family:
        cells = family.encode_masks(mask)[0, 0]
    assert cells.tolist() == [[2 / 8, 0.0, 0.0]] * 4


def transposed(self, masks):
    return Flux.encode_masks(self, masks).mT


def halved(self, masks):
    return Flux.encode_masks(self, masks) / 2


@pytest.mark.parametrize(
    ("encode_masks", "message"), [(transposed, "rows of shape"), (halved, "other than ones for a mask of ones")]
)
def test_a_family_with_wrong_masks_fails(encode_masks, message):
    family = type("Wrong", (Flux,), {"encode_masks": encode_masks})
    with pytest.raises(AssertionError, match=message):
        check_family(synthesizer(tiny_flux(), family=family))


def broken(**methods):
    """A FLUX family whose denoiser has a fault."""
    denoiser = dataclasses.dataclass(frozen=True, kw_only=True, eq=False)(type("Wrong", (FluxDenoiser,), methods))

    class Wrong(Flux):
        def denoiser(self, conditioning):
            correct = super().denoiser(conditioning)
            return denoiser(module=correct.module, grid=correct.grid, prompt_embeds=correct.prompt_embeds)

    return Wrong


def leaking(self, kwargs, prompts, *, trim_padding):
    """Give the guide spans in which every prompt is the plan's."""
    kwargs, spans = FluxDenoiser.append_prompts(self, kwargs, prompts, trim_padding=trim_padding)
    shuffled = [
        tuple(dataclasses.replace(span, prompt=0) if span.kind == "text" else span for span in row) for row in spans
    ]
    return kwargs, shuffled


def ignoring(self, kwargs, rows, prompts):
    """Keep the prompt of the call."""
    changed = FluxDenoiser.with_prompt_embeds(self, kwargs, rows, prompts)
    return {
        **changed,
        "encoder_hidden_states": kwargs["encoder_hidden_states"][list(rows)],
        "pooled_projections": kwargs["pooled_projections"][list(rows)],
    }


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"with_prompt_embeds": ignoring}, "OutputMix does not read a region's prompt"),
        ({"noise_level": lambda _self, kwargs: -float(kwargs["timestep"][0])}, "noise levels of a run"),
        ({"append_prompts": leaking}, "predictions differ"),
    ],
)
def test_a_family_with_a_faulty_denoiser_fails(methods, message):
    with pytest.raises(AssertionError, match=message):
        check_family(synthesizer(tiny_flux(), family=broken(**methods)))


class PaddedToTheLongest(Flux):
    """Claims that its encoder does not see padding; T5 does."""

    def encode_prompts(self, prompts):
        encoded = super().encode_prompts(prompts)
        tokens = self.pipeline.tokenizer_2(list(prompts), padding="longest", return_tensors="pt").input_ids
        with torch.no_grad():
            return {**encoded, "prompt_embeds": self.pipeline.text_encoder_2(tokens)[0]}


class PaddedAndCut(PaddedToTheLongest):
    def select_prompt(self, conditioning, row):
        own = super().select_prompt(conditioning, row)
        return {**own, "prompt_embeds": own["prompt_embeds"][:, :4]}

    def token_slices(self, prompts):
        return [slice(0, 4)] * len(prompts)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (
            PaddedToTheLongest,
            r"'a red barn' encoded with other prompts has 'prompt_embeds' of shape .* Expected the same",
        ),
        (
            PaddedAndCut,
            r"'a red barn' encoded with other prompts differs in 'prompt_embeds' by .* rows_are_independent",
        ),
    ],
)
def test_a_family_whose_prompts_depend_on_each_other_fails(family, message):
    with pytest.raises(AssertionError, match=message):
        check_family(synthesizer(tiny_flux(), family=family))


class Elsewhere(Flux):
    """Says that the tokens of a phrase are five further on."""

    def phrase_tokens(self, prompt, phrases):
        return [tuple(token + 5 for token in tokens) for tokens in super().phrase_tokens(prompt, phrases)]


class Nowhere(Flux):
    def phrase_tokens(self, prompt, phrases):
        return [()] * len(phrases)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (Elsewhere, r"gives the tokens \(.*\) for the whole of 'a red barn', whose own tokens are at slice"),
        (Nowhere, "gives no tokens for the whole of 'a red barn'"),
    ],
)
def test_a_family_whose_phrases_are_not_in_its_prompts_fails(family, message):
    with pytest.raises(AssertionError, match=message):
        check_family(synthesizer(tiny_flux(), family=family))


def test_the_check_does_not_change_the_synthesizer():
    drawing = synthesizer(tiny_flux())
    before = drawing.family, drawing.synthesize(aa.Plan("a red barn"), seed=0).tobytes()
    check_family(drawing)
    assert (drawing.family, drawing.synthesize(aa.Plan("a red barn"), seed=0).tobytes()) == before
    assert "step" not in vars(drawing.pipeline.scheduler)


def test_a_model_in_another_precision_is_refused_before_anything_is_drawn():
    half = tiny_flux().to(torch.bfloat16)
    with pytest.raises(aa.ModelError, match=r"the vae in torch\.bfloat16\. Load .* dtype=torch\.float32"):
        check_family(synthesizer(half))


def test_isolation_of_image_tokens_without_effect_is_refused():
    strict = aa.RegionalAttention(isolation=aa.Isolation(image_to_image="regions"))
    drawing = synthesizer(tiny_sd15(), guide=strict, guidance_scale=1.0)
    with pytest.raises(aa.GuideError, match="cross-attention only"):
        drawing.synthesize(aa.Plan("a barn", (aa.Region(aa.Box(0, 0, 0.5, 1), "ivy"),)), seed=0)
