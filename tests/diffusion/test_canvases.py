"""Drawing from a canvas: what is drawn is what diffusers' own pipelines draw, and the noise is the seed's own."""

import inspect

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import artaug as aa
from artaug.diffusion import DiffusersSynthesizer
from artaug.diffusion.families.registry import family_of
from support.tiny_chroma import tiny_chroma
from support.tiny_flux import tiny_flux
from support.tiny_qwen_image import tiny_qwen_image
from support.tiny_sd3 import tiny_sd3
from support.tiny_unet import tiny_sd15, tiny_sdxl
from support.tiny_z_image import tiny_z_image

PX = 32
STEPS = 4
FAMILIES = {
    "SD 1.5": (tiny_sd15, diffusers.StableDiffusionImg2ImgPipeline, diffusers.StableDiffusionInpaintPipeline),
    "SDXL": (tiny_sdxl, diffusers.StableDiffusionXLImg2ImgPipeline, diffusers.StableDiffusionXLInpaintPipeline),
    "FLUX.1": (tiny_flux, diffusers.FluxImg2ImgPipeline, diffusers.FluxInpaintPipeline),
    "SD3": (
        lambda: tiny_sd3(channels=16),
        diffusers.StableDiffusion3Img2ImgPipeline,
        diffusers.StableDiffusion3InpaintPipeline,
    ),
    "Qwen-Image": (tiny_qwen_image, diffusers.QwenImageImg2ImgPipeline, diffusers.QwenImageInpaintPipeline),
    "Z-Image": (tiny_z_image, diffusers.ZImageImg2ImgPipeline, diffusers.ZImageInpaintPipeline),
    "Chroma": (tiny_chroma, diffusers.ChromaImg2ImgPipeline, None),
}


def noise_picture(seed, size=(PX, PX)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encode_by_mode(monkeypatch, pipeline_class):
    """Let diffusers' pipeline take the mode of the VAE's distribution, which artaug does by other means."""
    module = inspect.getmodule(pipeline_class)

    def by_mode(encoder_output, **_):
        return encoder_output.latent_dist.mode()

    monkeypatch.setattr(module, "retrieve_latents", by_mode)


def plain(pipeline, pipeline_class, seed, **kwargs):
    """What diffusers' own pipeline of the same parts draws."""
    names = inspect.signature(pipeline_class.__init__).parameters
    available = {**pipeline.config, **pipeline.components}
    made = pipeline_class(**{name: available[name] for name in names if name in available})
    made.set_progress_bar_config(disable=True)
    accepted = inspect.signature(pipeline_class.__call__).parameters
    size = {name: PX for name in ("width", "height") if name in accepted}
    generator = torch.Generator().manual_seed(seed)
    return made(num_inference_steps=STEPS, generator=generator, **size, **kwargs).images[0]


CASES = [
    (name, mask)
    for name, (_, _, inpainting) in FAMILIES.items()
    for mask in ([None] if inpainting is None else [None, aa.Box(0, 0, 0.5, 1)])
]


def synthesizer_of(pipeline, **options):
    return DiffusersSynthesizer(
        pipeline=pipeline, **{"width": PX, "height": PX, "steps": STEPS, "max_sequence_length": 80, **options}
    )


@pytest.mark.parametrize(("name", "mask"), CASES)
def test_a_canvas_draws_what_diffusers_own_pipeline_draws(name, mask, monkeypatch):
    build, image_to_image, inpainting = FAMILIES[name]
    pipeline = build()
    synthesizer = synthesizer_of(pipeline)
    canvas = aa.Canvas(noise_picture(1), mask=mask, strength=0.6)

    drawn = synthesizer.synthesize(aa.Plan("a red cone", canvas=canvas), seed=7)

    pipeline_class = image_to_image if mask is None else inpainting
    encode_by_mode(monkeypatch, pipeline_class)
    white = Image.new("L", (PX, PX))
    white.paste(255, (0, 0, PX // 2, PX))
    masked = {} if mask is None else {"mask_image": white}
    family = family_of(pipeline)(
        pipeline=pipeline,
        width=PX,
        height=PX,
        guidance_scale=None,
        negative_prompt=None,
        true_cfg_scale=1,
        max_sequence_length=80,
    )
    conditioning = family.encode_prompts(["a red cone"])
    own = family.pipeline_kwargs(
        conditioning, None if family.negative is None else family.encode_prompts([family.negative])
    )
    expected = plain(pipeline, pipeline_class, 7, image=canvas.image, strength=0.6, **masked, **own)
    assert drawn.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_strength_draws_as_many_steps_as_the_synthesizer_says(name):
    build, _, _ = FAMILIES[name]
    synthesizer = synthesizer_of(build())
    module = getattr(synthesizer.pipeline, "unet", None) or synthesizer.pipeline.transformer
    per_step = 2 if name == "Chroma" else 1  # which calls the denoiser for each branch
    for strength in (0.3, 0.5, 0.75, 1.0):
        canvas = aa.Canvas(noise_picture(1), strength=strength)
        calls = []
        with module.register_forward_hook(lambda *_, calls=calls: calls.append(1)):
            synthesizer.synthesize(aa.Plan("a cone", canvas=canvas), seed=0)
        assert len(calls) == per_step * synthesizer.canvas_steps(canvas), strength


def test_sd_rounds_a_strength_down_and_flow_models_round_it_up():
    third = aa.Canvas(noise_picture(1), strength=0.3)
    steps = {name: synthesizer_of(build()).canvas_steps(third) for name, (build, _, _) in FAMILIES.items()}
    assert steps == {name: 1 if name.startswith("SD ") or name == "SDXL" else 2 for name in FAMILIES}


@pytest.mark.parametrize("name", ["FLUX.1", "SD3", "Qwen-Image", "Z-Image", "Chroma"])
def test_the_noise_over_a_canvas_is_that_of_the_seed_without_one(name):
    # At full strength nothing of the picture is left in a flow model, so that the two drawings have to be the same.
    build, _, _ = FAMILIES[name]
    synthesizer = synthesizer_of(build())
    canvas = aa.Canvas(noise_picture(1), strength=1)
    over, plain_picture = (
        synthesizer.synthesize(plan, seed=3) for plan in (aa.Plan("a cone", canvas=canvas), aa.Plan("a cone"))
    )
    assert over.tobytes() == plain_picture.tobytes()


def test_diffusers_itself_draws_other_noise_over_a_picture_than_without_one():
    pipeline = tiny_flux()
    over = plain(pipeline, diffusers.FluxImg2ImgPipeline, 3, prompt="a cone", image=noise_picture(1), strength=1.0)
    without = plain(pipeline, diffusers.FluxPipeline, 3, prompt="a cone")
    assert over.tobytes() != without.tobytes(), "the VAE's sample takes numbers of the generator no longer"


def test_outside_a_mask_the_latents_are_those_of_the_picture():
    pipeline = tiny_flux()
    canvas = aa.Canvas(noise_picture(1), mask=aa.Box(0, 0, 0.5, 1), strength=0.75)
    seen = []
    with pipeline.vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0])), torch.no_grad():
        synthesizer_of(pipeline).synthesize(aa.Plan("a cone", canvas=canvas), seed=0)
        picture = pipeline.vae.encode(pipeline.image_processor.preprocess(canvas.image)).latent_dist.mode()
    half = picture.shape[-1] // 2
    torch.testing.assert_close(seen[0][..., half:], picture[..., half:])
    assert not torch.allclose(seen[0][..., :half], picture[..., :half])


def test_plans_that_start_differently_are_drawn_as_they_are_alone():
    synthesizer = synthesizer_of(tiny_flux(), guide=aa.RegionalAttention())
    region = aa.Region(aa.Box(0, 0, 0.5, 1), "a blue door")
    plans = [
        aa.Plan("a cone"),
        aa.Plan("a cone", canvas=aa.Canvas(noise_picture(1), strength=0.5)),
        aa.Plan("a cone", (region,), canvas=aa.Canvas(noise_picture(1), strength=0.5)),
        aa.Plan("a cone", canvas=aa.Canvas(noise_picture(2), mask=aa.Box(0, 0, 0.5, 1), strength=0.5)),
        aa.Plan("a cone", (region,)),
        aa.Plan("a cone", canvas=aa.Canvas(noise_picture(2), strength=0.75)),
    ]
    together = synthesizer.synthesize_batch(plans, seeds=[4] * len(plans))
    alone = [synthesizer.synthesize(plan, seed=4) for plan in plans]
    for one, other in zip(together, alone, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
    assert len({picture.tobytes() for picture in alone}) == len(plans), "each has an effect of its own"


@pytest.mark.parametrize(
    ("canvas", "message"),
    [
        (aa.Canvas(noise_picture(1), strength=0.2), "draws 0 of 4 steps"),
        (aa.Canvas(noise_picture(1, (32, 48)), strength=0.5), "is of 32 x 48 pixels"),
        (aa.Canvas(noise_picture(1)), "expected a strength"),
        (
            aa.Canvas(noise_picture(1), mask=aa.Box(0.5, 0.5, 0.501, 0.501), strength=0.5),
            "covers none of the 32 x 32 pixels",
        ),
        (
            aa.Canvas(noise_picture(1), mask=aa.Mask.from_array(np.full((4, 4), 0.4)), strength=0.5),
            "covers none of the",
        ),
        (aa.Canvas(noise_picture(1), strength=0.5, references=[noise_picture(2)]), "would ignore the references"),
    ],
)
def test_a_canvas_that_cannot_be_drawn_from_is_refused_before_anything_is_drawn(canvas, message):
    synthesizer = synthesizer_of(tiny_sd15())
    calls = []
    watch = synthesizer.pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    with watch, pytest.raises(aa.ModelError, match=message):
        synthesizer.synthesize_batch([aa.Plan("a cone"), aa.Plan("a cone", canvas=canvas)], seeds=[0, 0])
    assert not calls


def test_models_made_to_fill_are_refused_with_the_pipeline():
    flux = tiny_flux()
    transformer = diffusers.FluxTransformer2DModel.from_config({**flux.transformer.config, "in_channels": 24}).eval()
    names = inspect.signature(diffusers.FluxFillPipeline.__init__).parameters
    parts = {name: part for name, part in flux.components.items() if name in names}
    fill = diffusers.FluxFillPipeline(**{**parts, "transformer": transformer})
    with pytest.raises(aa.ModelError, match="artaug does not know FluxFillPipeline"):
        synthesizer_of(fill)
    flux.register_modules(transformer=transformer)
    with pytest.raises(aa.ModelError, match="reads 24 channels, and latents have 16: it was made to read a picture"):
        synthesizer_of(flux)
    sd15 = tiny_sd15()
    config = {name: item for name, item in sd15.unet.config.items() if name[0] != "_"}
    unet = diffusers.UNet2DConditionModel(**{**config, "in_channels": 9}).eval()
    sd15.register_modules(unet=unet)
    with pytest.raises(aa.ModelError, match="reads 9 channels, and latents have 4"):
        synthesizer_of(sd15)


def test_a_latent_guide_moves_what_is_drawn_from_a_canvas():
    class Moves(aa.LatentGuide):
        def __init__(self, by):
            self.by, self.steps = by, []

        def moved(self, latents, step, predict):
            self.steps.append((step.number, step.count))
            return latents + self.by

    for build, mask in ((tiny_flux, None), (tiny_flux, aa.Box(0, 0, 0.5, 1)), (tiny_sd15, aa.Box(0, 0, 0.5, 1))):
        plan = aa.Plan("a cone", canvas=aa.Canvas(noise_picture(1), mask=mask, strength=0.75))
        pipeline = build()
        plain = synthesizer_of(pipeline).synthesize(plan, seed=0)
        still, shifted = Moves(0.0), Moves(0.3)
        assert synthesizer_of(pipeline, guide=still).synthesize(plan, seed=0).tobytes() == plain.tobytes()
        assert synthesizer_of(pipeline, guide=shifted).synthesize(plan, seed=0).tobytes() != plain.tobytes()
        count = synthesizer_of(pipeline).canvas_steps(plan.canvas)
        assert still.steps == [(number, count) for number in range(count)]


def test_a_model_without_a_pipeline_for_pictures_says_so():
    canvas = aa.Canvas(noise_picture(1), mask=aa.Box(0, 0, 0.5, 1), strength=0.5)
    with pytest.raises(aa.ModelError, match="Chroma1 cannot draw from a canvas with a mask"):
        synthesizer_of(tiny_chroma()).canvas_steps(canvas)


def test_a_scheduler_that_cannot_noise_a_picture_is_named():
    pipeline = tiny_flux()
    pipeline.scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    with pytest.raises(aa.ModelError, match="UniPCMultistepScheduler cannot add noise to a picture"):
        synthesizer_of(pipeline).canvas_steps(aa.Canvas(noise_picture(1), strength=0.5))


def test_a_vae_in_float32_beside_half_precision_is_not_rounded():
    pipeline = tiny_sdxl()
    for part in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2):
        part.to(torch.bfloat16)
    before = {name: weight.clone() for name, weight in pipeline.vae.state_dict().items()}
    synthesizer_of(pipeline).synthesize(aa.Plan("a cone", canvas=aa.Canvas(noise_picture(1), strength=0.5)), seed=0)
    for name, weight in pipeline.vae.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, before[name])


def test_the_pipeline_is_as_it_was_after_drawing_from_a_canvas():
    pipeline = tiny_sdxl()
    synthesizer = synthesizer_of(pipeline)
    first = synthesizer.synthesize(aa.Plan("a cone"), seed=0)
    synthesizer.synthesize(aa.Plan("a cone", canvas=aa.Canvas(noise_picture(1), strength=0.5)), seed=0)
    assert synthesizer.synthesize(aa.Plan("a cone"), seed=0).tobytes() == first.tobytes()
