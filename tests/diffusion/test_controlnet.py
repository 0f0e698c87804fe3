"""ControlNets: the control of a canvas is what diffusers' own pipelines draw with it, exact under regions; without it all is plain."""

import inspect

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FluxControlNetModel
from PIL import Image

import artaug as aa
from artaug.diffusion import DiffusersSynthesizer
from support.guiding import Stays
from support.tiny_controlnet import heard, tiny_controlnet
from support.tiny_flux import tiny_flux
from support.tiny_sd3 import tiny_sd3
from support.tiny_unet import tiny_sd15, tiny_sdxl

PX, STEPS = 32, 3
PROMPT = "a red barn by the lake"
LEFT, FULL = aa.Box(0, 0, 0.5, 1), aa.Box(0, 0, 1, 1)


def noise_picture(seed, size=(PX, PX)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def square(left, top):
    picture = Image.new("RGB", (PX, PX))
    picture.paste((255, 255, 255), (left, top, left + 20, top + 20))
    return picture


EDGES, POSE = square(0, 0), square(12, 12)


def of_unet(build, control_class):
    plain = build()
    return with_controlnet(plain, control_class, tiny_controlnet(plain.unet))


def of_flux():
    plain = tiny_flux()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        controlnet = FluxControlNetModel.from_transformer(
            plain.transformer, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2
        ).eval()
        heard(controlnet)
    return with_controlnet(plain, diffusers.FluxControlNetPipeline, controlnet)


def with_controlnet(plain, control_class, controlnet):
    names = inspect.signature(control_class.__init__).parameters
    available = {**plain.config, **plain.components, "controlnet": controlnet}
    pipeline = control_class(**{name: available[name] for name in names if name in available})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


BUILDS = {
    "SD 1.5": (lambda: of_unet(tiny_sd15, diffusers.StableDiffusionControlNetPipeline), tiny_sd15, "image"),
    "SDXL": (lambda: of_unet(tiny_sdxl, diffusers.StableDiffusionXLControlNetPipeline), tiny_sdxl, "image"),
    "FLUX.1": (of_flux, tiny_flux, "control_image"),
}
OPTIONS = {"FLUX.1": {"max_sequence_length": 80}}


@pytest.fixture(scope="module", params=BUILDS)
def case(request):
    build, plain, argument = BUILDS[request.param]
    return build(), plain, argument, OPTIONS.get(request.param, {})


def drawn(case, plan, **options):
    pipeline, _, _, own = case
    settings = {"width": PX, "height": PX, "steps": STEPS, **own, **options}
    return np.asarray(DiffusersSynthesizer(pipeline=pipeline, **settings).synthesize(plan, seed=3)).astype(int)


def by_pipeline(pipeline, own, **options):
    generator = torch.Generator().manual_seed(3)
    call = {"width": PX, "height": PX, "num_inference_steps": STEPS, **own, **options}
    return np.asarray(pipeline(prompt=PROMPT, generator=generator, **call).images[0]).astype(int)


def controlled(control=EDGES, regions=(), **canvas):
    return aa.Plan(PROMPT, regions, canvas=aa.Canvas(control=control, **canvas))


@pytest.fixture
def encodes_by_mode(monkeypatch):
    """Let FLUX's pipeline take the mode of the VAE, as artaug does: a sample would take numbers from the picture's generator."""
    module = inspect.getmodule(diffusers.FluxControlNetPipeline)
    retrieve = module.retrieve_latents

    def by_mode(encoded, **options):
        return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else retrieve(encoded, **options)

    monkeypatch.setattr(module, "retrieve_latents", by_mode)


@pytest.mark.usefixtures("encodes_by_mode")
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_control_draws_bit_for_bit_what_the_pipeline_draws_with_it(case, scale):
    pipeline, _, argument, own = case
    expected = by_pipeline(pipeline, own, controlnet_conditioning_scale=scale, **{argument: EDGES})
    plan = controlled(control_scale=scale)
    assert (drawn(case, plan) == expected).all()
    assert (drawn(case, plan, guide=aa.RegionalAttention()) == expected).all()
    assert np.abs(drawn(case, controlled(POSE, control_scale=scale)) - expected).max() > 1


def test_a_plan_without_a_control_draws_bit_for_bit_what_the_pipeline_without_a_controlnet_draws(case):
    _, build, _, own = case
    expected = by_pipeline(build(), own)
    assert (drawn(case, aa.Plan(PROMPT)) == expected).all()
    assert (drawn(case, aa.Plan(PROMPT), guide=aa.RegionalAttention()) == expected).all()


def test_a_picture_to_start_from_is_drawn_without_the_controlnet(case):
    _, build, _, own = case
    plan = aa.Plan(PROMPT, canvas=aa.Canvas(noise_picture(5), strength=0.7))
    assert (drawn(case, plan) == drawn((build(), build, "", own), plan)).all()


def test_regions_beside_a_control_equal_the_dense_mask_and_change_nothing_that_they_repeat(case):
    regions = (aa.Region(LEFT, "a blue door", feather=0.05),)
    dense, merged = (
        drawn(case, controlled(regions=regions), guide=aa.RegionalAttention(method=method))
        for method in ("dense", "merged")
    )
    expected = drawn(case, controlled())
    assert np.abs(dense - merged).max() <= 1
    assert (dense != expected).any()
    repeated = controlled(regions=(aa.Region(FULL, PROMPT),))
    exact = aa.RegionalAttention(isolation=aa.Isolation(), trim_padding=False)
    assert np.abs(drawn(case, repeated, guide=exact) - expected).max() <= 1
    assert np.abs(drawn(case, repeated, guide=aa.OutputMix()) - expected).max() <= 1
    assert (drawn(case, controlled(regions=regions), guide=aa.OutputMix()) != expected).any()


def test_pictures_of_a_batch_have_their_own_controls(case):
    plans = [controlled(EDGES), aa.Plan(PROMPT), controlled(POSE), controlled(EDGES, control_scale=0.5)]
    regional = [aa.Plan(PROMPT, (aa.Region(LEFT, "a blue door"),), plan.canvas) for plan in plans]
    pipeline, _, _, own = case
    for guide, batch in ((None, plans), (aa.OutputMix(), regional)):
        synthesizer = DiffusersSynthesizer(pipeline=pipeline, width=PX, height=PX, steps=STEPS, guide=guide, **own)
        together = synthesizer.synthesize_batch(batch, seeds=[3] * 4)
        for one, plan in zip(together, batch, strict=True):
            assert np.abs(np.asarray(one, int) - drawn(case, plan, guide=guide)).max() <= 1


def test_latents_move_and_attention_is_read_beside_a_control(case):
    maps = []
    probe = aa.AttentionProbe(phrases=["barn"], receive=maps.append)
    assert (drawn(case, controlled(), guide=aa.Together((probe, Stays()))) == drawn(case, controlled())).all()
    assert len(maps) == STEPS


def test_a_pipeline_with_a_controlnet_is_trained_as_the_one_without():
    pair = aa.ImagePair(prompt=PROMPT, seed=0, before=noise_picture(1), after=noise_picture(2))
    trainer = aa.DifferentialLoRATrainer(rank=1, steps=1, batch_size=1)
    digests = []
    for pipeline in (BUILDS["SD 1.5"][0](), tiny_sd15()):
        synthesizer = DiffusersSynthesizer(pipeline=pipeline, width=PX, height=PX, steps=STEPS)
        digests.append(trainer.train([pair], synthesizer, seed=0, progress=False).lora.digest)
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("build", "canvas", "message"),
    [
        (tiny_sd15, {}, r"would ignore the control .* has no ControlNet.*StableDiffusionControlNetPipeline"),
        (lambda: tiny_sd3(channels=16), {}, "would ignore the control"),
        (BUILDS["SD 1.5"][0], {"control": noise_picture(1, (32, 48))}, "is of 32 x 48 pixels"),
        (BUILDS["SD 1.5"][0], {"image": EDGES, "strength": 0.5}, "not drawn together here"),
        (BUILDS["SD 1.5"][0], {"references": [EDGES]}, "would ignore the references"),
    ],
)
def test_a_control_that_cannot_be_drawn_from_is_refused_before_anything_is_drawn(build, canvas, message):
    synthesizer = DiffusersSynthesizer(pipeline=build(), width=PX, height=PX, steps=STEPS, max_sequence_length=80)
    plan = aa.Plan(PROMPT, canvas=aa.Canvas(**{"control": EDGES, **canvas}))
    with pytest.raises(aa.ModelError, match=message):
        synthesizer.check_plan(plan)
    with pytest.raises(aa.ModelError, match=message):
        synthesizer.synthesize(plan, seed=0)


def test_several_controlnets_are_refused():
    pipeline = BUILDS["SD 1.5"][0]()
    pipeline.register_modules(controlnet=diffusers.MultiControlNetModel([pipeline.controlnet] * 2).eval())
    synthesizer = DiffusersSynthesizer(pipeline=pipeline, width=PX, height=PX, steps=STEPS)
    with pytest.raises(aa.ModelError, match="with a MultiControlNetModel: expected one ControlNet"):
        synthesizer.check_plan(controlled())
