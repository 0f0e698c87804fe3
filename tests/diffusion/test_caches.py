"""Caches of diffusers beside guides: first-block caching under regions is what it is without them; all else is refused by name."""

import dataclasses
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    apply_pyramid_attention_broadcast,
)

import artaug as aa
from artaug.diffusion.families.flux.family import Flux
from artaug.diffusion.families.flux2.family import Flux2
from artaug.diffusion.families.qwen_image.family import QwenImage
from artaug.diffusion.families.unet.family import StableDiffusion
from artaug.identity import identity_of
from support.family_laws import picture, synthesizer_of
from support.family_pipelines import tiny_family
from support.guiding import Stays

PROMPT = "a red barn by the lake"
LEFT, FULL = aa.Box(0, 0, 0.5, 1), aa.Box(0, 0, 1, 1)
PLAN = aa.Plan(PROMPT, (aa.Region(LEFT, "a blue door"),))
STEPS = 4
ALWAYS_REUSED, NEVER_REUSED = (FirstBlockCacheConfig(threshold=threshold) for threshold in (1e9, -1.0))


def name_of(kind):
    return kind.__name__


@contextmanager
def cached(family, config):
    family.module.enable_cache(config)
    try:
        yield
    finally:
        family.module.disable_cache()


def draw(family, plan=PLAN, guide=None):
    guide = aa.RegionalAttention() if guide is None else guide
    return np.asarray(synthesizer_of(family, guide=guide, steps=STEPS).synthesize(plan, seed=0)).astype(int)


@pytest.fixture(scope="module", params=[Flux, QwenImage], ids=name_of)
def family(request):
    """Those whose pipelines tell a cache which pass of guidance they compute, and whose blocks diffusers caches: both compute two."""
    return tiny_family(request.param)


def test_a_cache_that_reuses_nothing_draws_regions_bit_for_bit_as_no_cache(family):
    expected = draw(family)
    with cached(family, NEVER_REUSED):
        assert (draw(family) == expected).all()
    assert (draw(family) == expected).all()


@contextmanager
def first_block_cache_by_hand(family):
    """Two full calls, one for each pass of guidance; then the first block, and what the others added to its image tokens there.

    The passes take turns, so that the calls of one have even numbers.
    """
    module = family.module
    blocks = [*module.transformer_blocks, *getattr(module, "single_transformer_blocks", ())]
    added, firsts, number = {}, {}, [-1]

    def states(output):
        return output if isinstance(output, tuple) else (None, output)

    def after_first(_block, _args, output):
        number[0] += 1
        firsts[number[0] % 2] = states(output)

    def after_last(_block, _args, output):
        branch = number[0] % 2
        first = firsts[branch]
        if number[0] < 2:
            added[branch] = [
                None if late is None else late - early for late, early in zip(states(output), first, strict=True)
            ]
            return output
        reused = [None if early is None else early + more for early, more in zip(first, added[branch], strict=True)]
        return tuple(reused) if isinstance(output, tuple) else reused[1]

    with blocks[0].register_forward_hook(after_first), blocks[-1].register_forward_hook(after_last):
        yield


def test_what_it_reuses_is_what_the_same_pass_computed_with_its_regions(family):
    with first_block_cache_by_hand(family):
        expected = draw(family)
    with cached(family, ALWAYS_REUSED):
        reused = draw(family)
        other = draw(family, aa.Plan(PROMPT, (aa.Region(LEFT, "a green field at night"),)))
        plain = draw(family, aa.Plan(PROMPT))
    assert np.abs(reused - expected).max() <= 1
    assert np.abs(reused - draw(family)).max() > 1, "nothing was reused"
    assert np.abs(reused - other).max() > 1, "the region's prompt has no effect"
    assert np.abs(reused - plain).max() > 1


def test_ways_of_computing_regions_agree_beside_a_cache(family):
    guide = aa.RegionalAttention(trim_padding=False, isolation=aa.Isolation())
    with cached(family, ALWAYS_REUSED):
        dense, merged = (draw(family, guide=aa.RegionalAttention(method=method)) for method in ("dense", "merged"))
        repeated = draw(family, aa.Plan(PROMPT, (aa.Region(FULL, PROMPT),)), guide)
        plain = draw(family, aa.Plan(PROMPT))
    assert np.abs(dense - merged).max() <= 1
    assert np.abs(repeated - plain).max() <= 1


def test_a_plain_plan_beside_a_cache_is_what_the_pipeline_draws(family):
    conditioning = family.encode_prompts([PROMPT])
    negative = None if family.negative is None else family.encode_prompts([family.negative])
    with cached(family, ALWAYS_REUSED):
        expected = family.pipeline(
            **family.pipeline_kwargs(conditioning, negative),
            width=family.width,
            height=family.height,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(0),
        ).images[0]
        assert (draw(family, aa.Plan(PROMPT)) == np.asarray(expected)).all()


@pytest.mark.parametrize(
    "config",
    [
        PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500),
        FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            current_timestep_callback=lambda: 500,
            tensor_format="BCHW",
            is_guidance_distilled=True,
        ),
    ],
    ids=lambda config: type(config).__name__,
)
def test_other_caches_are_refused_with_a_guide_before_anything_is_drawn(config):
    flux = tiny_family(Flux)
    with cached(flux, config):
        with pytest.raises(aa.GuideError, match=rf"\({type(config).__name__}\).*Call its disable_cache\(\)"):
            synthesizer_of(flux, guide=aa.RegionalAttention()).check_plan(PLAN)
        with pytest.raises(aa.GuideError, match="Call its disable_cache"):
            draw(flux)


@pytest.mark.parametrize(
    "guide",
    [
        aa.OutputMix(),
        Stays(),
        aa.AttentionProbe(phrases=["barn"], receive=lambda _: None),
        aa.Together((aa.RegionalAttention(), Stays())),
        aa.RegionalAttention(isolation=aa.Isolation(sigma_range=(0.5, 1.0))),
    ],
    ids=["OutputMix", "LatentGuide", "AttentionProbe", "Together", "isolation of some steps"],
)
def test_guides_that_call_the_model_or_read_its_layers_are_refused_beside_any_cache(guide):
    flux = tiny_family(Flux)
    with cached(flux, NEVER_REUSED), pytest.raises(aa.GuideError, match=r"cannot act on a Flux.*FirstBlockCacheConfig"):
        draw(flux, PLAN if guide.reads_regions else aa.Plan(PROMPT), guide)
    assert draw(flux).any()


def test_a_cache_that_was_put_on_without_a_config_of_the_model_is_found_too():
    family = tiny_family(StableDiffusion)
    config = PyramidAttentionBroadcastConfig(cross_attention_block_skip_range=2, current_timestep_callback=lambda: 500)
    apply_pyramid_attention_broadcast(family.module, config)
    with pytest.raises(aa.GuideError, match="PyramidAttentionBroadcastHook"):
        draw(family)


def test_a_pipeline_that_does_not_name_its_passes_is_named():
    family = tiny_family(Flux2)
    with (
        cached(family, ALWAYS_REUSED),
        pytest.raises(aa.ModelError, match=r"Pipeline of diffusers does not say which pass"),
    ):
        draw(family)


def test_a_canvas_beside_a_cache_is_refused_where_its_pipeline_does_not_name_its_passes():
    flux = tiny_family(Flux)
    canvas = aa.Canvas(picture(width=32, height=32), strength=0.5)
    with (
        cached(flux, ALWAYS_REUSED),
        pytest.raises(aa.ModelError, match="FluxImg2ImgPipeline of diffusers does not say"),
    ):
        draw(flux, dataclasses.replace(PLAN, canvas=canvas))


def test_a_model_that_caches_is_not_trained():
    flux = tiny_family(Flux)
    synthesizer = synthesizer_of(flux)
    with cached(flux, NEVER_REUSED), pytest.raises(aa.ModelError, match="disable_cache"), synthesizer.training():
        pass


def test_a_cache_is_part_of_what_decides_a_picture():
    flux = tiny_family(Flux)
    synthesizer = synthesizer_of(flux)
    plain = identity_of(synthesizer, "synthesizer")
    seen = [plain]
    for threshold in (0.1, 0.2):
        with cached(flux, FirstBlockCacheConfig(threshold=threshold)):
            seen.append(identity_of(synthesizer, "synthesizer"))
    assert len({str(sorted(one.items())) for one in seen}) == 3
    assert identity_of(synthesizer, "synthesizer") == plain
