"""IP-Adapter: references of a canvas are what diffusers' own pipelines draw with `ip_adapter_image`, and exact under regions."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from PIL import Image

import artaug as aa
from artaug.diffusion import DiffusersSynthesizer
from artaug.identity import identity_of
from artaug.plan import plan_digest
from support.guiding import Stays
from support.tiny_flux import tiny_flux
from support.tiny_ip_adapter import with_ip_adapter
from support.tiny_sd3 import tiny_sd3
from support.tiny_unet import tiny_sd15, tiny_sdxl

PX, STEPS = 32, 3
PROMPT = "a red barn by the lake"
LEFT, RIGHT, FULL = aa.Box(0, 0, 0.5, 1), aa.Box(0.5, 0, 1, 1), aa.Box(0, 0, 1, 1)


def noise_picture(seed, size=(PX, PX)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


ANNA, BEN = noise_picture(1, (48, 40)), noise_picture(2)


@pytest.fixture(scope="module", params=[tiny_sd15, tiny_sdxl], ids=["SD 1.5", "SDXL"])
def pipeline(request):
    return with_ip_adapter(request.param())


def synthesizer_of(pipeline, **options):
    return DiffusersSynthesizer(pipeline=pipeline, **{"width": PX, "height": PX, "steps": STEPS, **options})


def drawn(pipeline, plan, *, seed=3, **options):
    return np.asarray(synthesizer_of(pipeline, **options).synthesize(plan, seed=seed)).astype(int)


def by_pipeline(pipeline, *, seed=3, **options):
    generator = torch.Generator().manual_seed(seed)
    sized = {"width": PX, "height": PX, "num_inference_steps": STEPS, "generator": generator}
    return np.asarray(pipeline(prompt=PROMPT, **sized, **options).images[0]).astype(int)


def referring(*references, regions=(), **canvas):
    return aa.Plan(PROMPT, regions, canvas=aa.Canvas(references=references, **canvas))


@pytest.mark.parametrize("references", [[ANNA], [ANNA, BEN]])
@pytest.mark.parametrize("options", [{}, {"guidance_scale": 1.0}])
def test_references_draw_bit_for_bit_what_the_pipeline_draws_with_them(pipeline, references, options):
    expected = by_pipeline(pipeline, ip_adapter_image=[references], **options)
    plan = referring(*references)
    assert (drawn(pipeline, plan, **options) == expected).all()
    assert (drawn(pipeline, plan, guide=aa.RegionalAttention(), **options) == expected).all()
    assert np.abs(drawn(pipeline, aa.Plan(PROMPT), **options) - expected).max() > 1


def test_a_plan_without_references_draws_bit_for_bit_what_the_pipeline_draws_without_an_adapter():
    for build in (tiny_sd15, tiny_sdxl):
        expected = by_pipeline(build())
        pipeline = with_ip_adapter(build())
        scales = [list(each.scale) for each in pipeline.unet.attn_processors.values() if hasattr(each, "scale")]
        assert (drawn(pipeline, aa.Plan(PROMPT)) == expected).all()
        assert (drawn(pipeline, aa.Plan(PROMPT), guide=aa.RegionalAttention()) == expected).all()
        assert scales == [list(each.scale) for each in pipeline.unet.attn_processors.values() if hasattr(each, "scale")]


def test_each_picture_of_a_batch_has_its_own_references(pipeline):
    plans = [referring(ANNA), aa.Plan(PROMPT), referring(BEN), referring(ANNA, BEN)]
    together = synthesizer_of(pipeline).synthesize_batch(plans, seeds=[3] * 4)
    alone = [drawn(pipeline, plan) for plan in plans]
    for one, other in zip(together, alone, strict=True):
        assert np.abs(np.asarray(one, int) - other).max() <= 1
    assert len({each.tobytes() for each in alone}) == 4


def test_references_beside_a_picture_to_start_from(pipeline):
    start = noise_picture(5)
    plans = [
        aa.Plan(PROMPT, canvas=aa.Canvas(start, strength=0.7, references=references)) for references in ([], [ANNA])
    ]
    plain, referred = (drawn(pipeline, plan) for plan in plans)
    assert np.abs(plain - referred).max() > 1
    masked = aa.Plan(PROMPT, canvas=aa.Canvas(start, mask=LEFT, strength=0.7, references=[ANNA]))
    assert np.abs(drawn(pipeline, masked) - referred).max() > 1


def half(box):
    mask = Image.new("L", (PX, PX))
    mask.paste(255, box.to_pixels((PX, PX)))
    return mask


def test_a_region_that_names_a_reference_masks_it_as_diffusers_does(pipeline):
    # The regions' prompts repeat the plan's, over everything together, so that the pipeline's own drawing has to come out.
    regions = (aa.Region(LEFT, PROMPT, reference=0), aa.Region(RIGHT, PROMPT, reference=1))
    guide = aa.RegionalAttention(isolation=aa.Isolation(), trim_padding=False)
    masks = IPAdapterMaskProcessor().preprocess([half(LEFT), half(RIGHT)], height=PX, width=PX)
    expected = by_pipeline(
        pipeline,
        ip_adapter_image=[[ANNA, BEN]],
        cross_attention_kwargs={"ip_adapter_masks": [masks.reshape(1, 2, PX, PX)]},
    )
    plan = referring(ANNA, BEN, regions=regions)
    assert np.abs(drawn(pipeline, plan, guide=guide) - expected).max() <= 1
    assert np.abs(drawn(pipeline, plan, guide=aa.OutputMix()) - expected).max() <= 1
    swapped = referring(BEN, ANNA, regions=regions)
    assert np.abs(drawn(pipeline, swapped, guide=guide) - expected).max() > 1


def test_a_reference_that_no_region_names_shows_everywhere_and_several_regions_share_one(pipeline):
    guide = aa.RegionalAttention(isolation=aa.Isolation(), trim_padding=False)
    both = (aa.Region(LEFT, PROMPT, reference=0), aa.Region(RIGHT, PROMPT, reference=0))
    masks = [
        (referring(ANNA, BEN, regions=both[:1]), [half(LEFT), half(FULL)]),
        (referring(ANNA, BEN, regions=both), [half(FULL), half(FULL)]),
    ]
    for plan, areas in masks:
        preprocessed = IPAdapterMaskProcessor().preprocess(areas, height=PX, width=PX)
        expected = by_pipeline(
            pipeline,
            ip_adapter_image=[[ANNA, BEN]],
            cross_attention_kwargs={"ip_adapter_masks": [preprocessed.reshape(1, 2, PX, PX)]},
        )
        assert np.abs(drawn(pipeline, plan, guide=guide) - expected).max() <= 1


def test_regions_beside_references_equal_the_dense_mask(pipeline):
    regions = (aa.Region(LEFT, "a blue door", reference=0, feather=0.05), aa.Region(RIGHT, "ivy on a wall"))
    plan = referring(ANNA, regions=regions)
    dense, merged, grouped = (
        drawn(pipeline, plan, guide=aa.RegionalAttention(method=method)) for method in ("dense", "merged", "auto")
    )
    assert np.abs(dense - merged).max() <= 1
    assert np.abs(dense - grouped).max() <= 1
    assert np.abs(dense - drawn(pipeline, aa.Plan(PROMPT, ()), guide=aa.RegionalAttention())).max() > 1


def test_guides_that_read_attention_or_move_latents_work_beside_references(pipeline):
    maps = []
    plan = referring(ANNA)
    probe = aa.AttentionProbe(phrases=["barn"], receive=maps.append)
    expected = drawn(pipeline, plan)
    assert (drawn(pipeline, plan, guide=aa.Together((probe, Stays()))) == expected).all()
    assert len(maps) == STEPS


def test_several_adapters_read_the_same_references():
    pipeline = with_ip_adapter(tiny_sd15(), adapters=2)
    expected = by_pipeline(pipeline, ip_adapter_image=[[ANNA, BEN], [ANNA, BEN]])
    assert (drawn(pipeline, referring(ANNA, BEN)) == expected).all()


def test_a_scale_is_part_of_what_decides_a_picture(pipeline):
    before = identity_of(synthesizer_of(pipeline), "synthesizer")
    pipeline.set_ip_adapter_scale(0.3)
    after = identity_of(synthesizer_of(pipeline), "synthesizer")
    pipeline.set_ip_adapter_scale(0.8)
    assert before != after
    assert identity_of(synthesizer_of(pipeline), "synthesizer") == before


def test_a_pipeline_with_an_adapter_is_not_trained(pipeline):
    with pytest.raises(aa.ModelError, match="unload_ip_adapter"), synthesizer_of(pipeline).training():
        pass


@pytest.mark.parametrize("build", [tiny_sd15, tiny_flux])
def test_references_that_nothing_reads_are_refused_before_anything_is_drawn(build):
    synthesizer = synthesizer_of(build())
    for canvas in (aa.Canvas(references=[ANNA]), aa.Canvas(noise_picture(1), strength=0.5, references=[ANNA])):
        with pytest.raises(aa.ModelError, match="would ignore the references of"):
            synthesizer.check_plan(aa.Plan(PROMPT, canvas=canvas))


@pytest.mark.parametrize(
    ("build", "processor", "layer"),
    [
        (tiny_flux, lambda: FluxIPAdapterAttnProcessor(32, 24), "transformer_blocks.0.attn"),
        (tiny_sd3, lambda: SD3IPAdapterJointAttnProcessor2_0(16, 16, 8), "transformer_blocks.0.attn"),
    ],
    ids=["FLUX.1", "SD3"],
)
def test_an_adapter_whose_pictures_are_not_read_is_refused_with_the_pipeline(build, processor, layer):
    pipeline = build()
    pipeline.transformer.get_submodule(layer).set_processor(processor())
    with pytest.raises(aa.ModelError, match=r"has an IP-Adapter \((Flux|SD3)IPAdapter.*unload_ip_adapter"):
        synthesizer_of(pipeline)


def test_a_scale_for_each_picture_acts_under_regions_as_in_the_pipeline():
    pipeline = with_ip_adapter(tiny_sd15())
    pipeline.set_ip_adapter_scale([[0.9, 0.2]])
    regions = (aa.Region(LEFT, PROMPT, reference=0), aa.Region(RIGHT, PROMPT, reference=1))
    masks = IPAdapterMaskProcessor().preprocess([half(LEFT), half(RIGHT)], height=PX, width=PX).reshape(1, 2, PX, PX)
    kwargs = {"ip_adapter_masks": [masks]}
    expected = by_pipeline(pipeline, ip_adapter_image=[[ANNA, BEN]], cross_attention_kwargs=kwargs)
    guide = aa.RegionalAttention(isolation=aa.Isolation(), trim_padding=False)
    assert np.abs(drawn(pipeline, referring(ANNA, BEN, regions=regions), guide=guide) - expected).max() <= 1


def test_a_region_names_a_reference_that_the_canvas_has():
    region = aa.Region(LEFT, "anna", reference=1)
    with pytest.raises(aa.InvalidValueError, match=r"names reference 1, and the canvas of the plan of .* has 1"):
        referring(ANNA, regions=[region])
    with pytest.raises(aa.InvalidValueError, match="has 0"):
        aa.Plan(PROMPT, (region,))
    assert "reference=1" in repr(region)
    other = dataclasses.replace(region, reference=0)
    plans = [referring(ANNA, BEN, regions=(one,)) for one in (region, other)]
    assert plan_digest(plans[0]) != plan_digest(plans[1])
