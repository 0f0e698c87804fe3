"""Drawing with a real, tiny FluxPipeline: against diffusers itself, and against the laws."""

import dataclasses
import math
import os
import subprocess
import sys
from itertools import pairwise

import accelerate
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FluxPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import artaug as aa
from artaug.diffusion import DiffusersSynthesizer
from artaug.regional import OutputMix, token_weights
from support.tiny_flux import TINY_SIZE, tiny_flux
from support.traces import hooks_of, weights_of

BARN, LAKE = aa.Plan("a red barn"), aa.Plan("a still lake, fog")
DOOR = aa.Region(aa.Box(0, 0, 0.5, 1), "a blue door")
STORM = aa.Region(aa.Box(0, 0, 1, 0.3), "a stormy sky", weight=2.5, feather=0.1)
DRAWING = {"width": TINY_SIZE, "height": TINY_SIZE, "steps": 3, "max_sequence_length": 24}


def drawing_with(pipeline, **options):
    return DiffusersSynthesizer(pipeline=pipeline, **{**DRAWING, "guide": OutputMix(), **options})


@pytest.fixture(scope="module")
def synthesizer():
    return drawing_with(tiny_flux())


def direct(pipeline, prompts, seeds, **options):
    """What diffusers draws, asked as its own documentation asks."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompts,
        width=TINY_SIZE,
        height=TINY_SIZE,
        num_inference_steps=3,
        max_sequence_length=24,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        **options,
    ).images


def pixels(images):
    return [np.asarray(image).tolist() for image in ([images] if isinstance(images, Image.Image) else images)]


def lora_for(module, *, rank=2, size=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    names = ["transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.proj_mlp", "x_embedder"]
    linears = {name: module.get_submodule(name) for name in names}
    return aa.LoRA(
        {
            name: aa.LowRank(
                torch.randn(rank, linear.in_features, generator=generator),
                size * torch.randn(linear.out_features, rank, generator=generator),
            )
            for name, linear in linears.items()
        }
    )


# Law 2: no regions, no difference ---------------------------------------------------------------


def test_a_plain_picture_is_bit_for_bit_what_the_pipeline_draws(synthesizer):
    synthesizer.pipeline.set_progress_bar_config(disable=True)
    by_diffusers = synthesizer.pipeline(
        "a red barn",
        width=TINY_SIZE,
        height=TINY_SIZE,
        num_inference_steps=3,
        max_sequence_length=24,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    assert pixels(synthesizer.synthesize(BARN, seed=7)) == pixels(by_diffusers)


def test_a_batch_of_plain_pictures_is_bit_for_bit_what_the_pipeline_draws(synthesizer):
    drawn = synthesizer.synthesize_batch([BARN, LAKE, BARN], seeds=[1, 2, 3])
    asked = [BARN.prompt, LAKE.prompt, BARN.prompt]
    assert pixels(drawn) == pixels(direct(synthesizer.pipeline, asked, [1, 2, 3]))


def test_with_distilled_guidance_too():
    pipeline = tiny_flux(guidance_embeds=True, dynamic_shift=True)
    default = drawing_with(pipeline).synthesize(BARN, seed=1)
    strong = drawing_with(pipeline, guidance_scale=7.0).synthesize(BARN, seed=1)
    assert pixels(default) == pixels(direct(pipeline, [BARN.prompt], [1]))
    assert pixels(strong) == pixels(direct(pipeline, [BARN.prompt], [1], guidance_scale=7.0))
    assert pixels(default) != pixels(strong)


def test_with_classifier_free_guidance_too(synthesizer):
    guided = dataclasses.replace(synthesizer, negative_prompt="blurry", true_cfg_scale=3.0)
    drawn = guided.synthesize_batch([BARN, LAKE], seeds=[1, 2])
    options = {"negative_prompt": ["blurry", "blurry"], "true_cfg_scale": 3.0}
    assert pixels(drawn) == pixels(direct(synthesizer.pipeline, [BARN.prompt, LAKE.prompt], [1, 2], **options))
    assert pixels(drawn) != pixels(synthesizer.synthesize_batch([BARN, LAKE], seeds=[1, 2]))


def test_in_half_precision_too():
    pipeline = tiny_flux().to(torch.bfloat16)
    assert pixels(drawing_with(pipeline).synthesize(BARN, seed=1)) == pixels(direct(pipeline, [BARN.prompt], [1]))


def test_a_plain_picture_beside_a_regional_one_is_what_it_was(synthesizer):
    with_region = synthesizer.synthesize_batch([aa.Plan("a red barn", (DOOR,)), LAKE], seeds=[1, 2])
    without = synthesizer.synthesize_batch([BARN, LAKE], seeds=[1, 2])
    assert pixels(with_region[1]) == pixels(without[1])
    assert pixels(with_region[0]) != pixels(without[0])


# Law 1: same arguments, same picture ------------------------------------------------------------


@settings(max_examples=8)
@given(seed=st.integers(0, 2**63 - 1), earlier=st.integers(0, 99))
def test_a_picture_does_not_depend_on_what_was_drawn_before(synthesizer, seed, earlier):
    plan = aa.Plan("a red barn", (DOOR,))
    first = synthesizer.synthesize(plan, seed=seed)
    synthesizer.synthesize(LAKE, seed=earlier)
    torch.rand(3)
    assert pixels(synthesizer.synthesize(plan, seed=seed)) == pixels(first)


def test_another_seed_is_another_picture(synthesizer):
    assert pixels(synthesizer.synthesize(BARN, seed=1)) != pixels(synthesizer.synthesize(BARN, seed=2))


def test_global_randomness_is_neither_read_nor_moved(synthesizer):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    drawn = synthesizer.synthesize(BARN, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert pixels(synthesizer.synthesize(BARN, seed=1)) == pixels(drawn)


def test_a_picture_of_a_batch_equals_the_one_drawn_alone_up_to_rounding(synthesizer):
    plans = [aa.Plan("a red barn", (DOOR, STORM)), LAKE, aa.Plan(LAKE.prompt, (STORM,))]
    together = synthesizer.synthesize_batch(plans, seeds=[1, 2, 3])
    for plan, seed, image in zip(plans, [1, 2, 3], together, strict=True):
        alone = np.asarray(synthesizer.synthesize(plan, seed=seed)).astype(int)
        assert np.abs(alone - np.asarray(image)).max() <= 1


def test_nothing_to_draw_is_nothing_drawn(synthesizer):
    assert synthesizer.synthesize_batch([], seeds=[]) == []


def test_plans_and_seeds_must_pair_up(synthesizer):
    with pytest.raises(aa.InvalidValueError, match="received 2 plans and 1 seeds"):
        synthesizer.synthesize_batch([BARN, LAKE], seeds=[1])


# Regions -----------------------------------------------------------------------------------------


@torch.no_grad()
def sampled_by_hand(pipeline, plan, *, seed):
    """ArtAug's redraw written out: the paper's equation at every step of an Euler sampler."""
    encoded = {prompt: pipeline.encode_prompt(prompt, max_sequence_length=24) for prompt in prompts_of(plan)}
    latents, places = pipeline.prepare_latents(
        1, 4, TINY_SIZE, TINY_SIZE, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(seed)
    )
    pipeline.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 3, 3))
    sigmas = pipeline.scheduler.sigmas
    for sigma, following in pairwise(sigmas):
        velocity = {
            prompt: pipeline.transformer(
                hidden_states=latents,
                timestep=sigma[None],
                pooled_projections=pooled,
                encoder_hidden_states=embeds,
                txt_ids=ids,
                img_ids=places,
            ).sample
            for prompt, (embeds, pooled, ids) in encoded.items()
        }
        masks = [token_weights(region, (8, 8)).reshape(64, 1) for region in plan.regions]
        total = velocity[plan.prompt] + sum(
            mask * velocity[region.prompt] for mask, region in zip(masks, plan.regions, strict=True)
        )
        latents = latents + (following - sigma) * total / (1 + sum(masks))
    spread = pipeline._unpack_latents(latents, TINY_SIZE, TINY_SIZE, 2)  # noqa: SLF001 - what diffusers does
    decoded = pipeline.vae.decode(spread / 0.36 + 0.11).sample
    return pipeline.image_processor.postprocess(decoded)[0]


def prompts_of(plan):
    return [plan.prompt, *(region.prompt for region in plan.regions)]


def test_regions_follow_the_papers_equation_through_the_whole_run(synthesizer):
    plan = aa.Plan("a red barn", (DOOR, STORM))
    drawn = np.asarray(synthesizer.synthesize(plan, seed=4)).astype(int)
    by_hand = np.asarray(sampled_by_hand(synthesizer.pipeline, plan, seed=4))
    assert np.abs(drawn - by_hand).max() <= 1
    assert np.abs(drawn - np.asarray(synthesizer.synthesize(BARN, seed=4))).max() > 1


def test_a_region_that_says_what_the_plan_says_draws_the_plain_picture(synthesizer):
    same = aa.Plan("a red barn", (aa.Region(aa.Box(0, 0, 1, 1), "a red barn", weight=9),))
    drawn = np.asarray(synthesizer.synthesize(same, seed=4)).astype(int)
    assert np.abs(drawn - np.asarray(synthesizer.synthesize(BARN, seed=4))).max() <= 1


def test_regions_and_classifier_free_guidance_mix_only_the_plans_branch(synthesizer):
    guided = dataclasses.replace(synthesizer, negative_prompt="blurry", true_cfg_scale=3.0)
    calls = []
    watch = synthesizer.pipeline.transformer.register_forward_hook(lambda *_: calls.append(None))
    with watch:
        guided.synthesize(aa.Plan("a red barn", (DOOR, STORM)), seed=1)
    assert len(calls) == 3 * (1 + 2 + 1)


def test_a_guide_leaves_no_trace_after_a_run(synthesizer):
    module = synthesizer.pipeline.transformer
    before, hooks, weights = synthesizer.synthesize(BARN, seed=1), hooks_of(module), weights_of(module)
    synthesizer.synthesize(aa.Plan("a red barn", (DOOR,)), seed=1)
    assert hooks_of(module) == hooks
    assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())
    assert pixels(synthesizer.synthesize(BARN, seed=1)) == pixels(before)


def test_a_guide_and_a_lora_leave_no_trace_after_an_exception(synthesizer):
    module = synthesizer.pipeline.transformer
    before, hooks = synthesizer.synthesize(BARN, seed=1), hooks_of(module)
    too_strong = synthesizer.with_lora(lora_for(module), scale=math.inf)
    with pytest.raises(aa.NonFiniteError, match=r"predicted NaN or infinity for the plan's prompt at step 1"):
        too_strong.synthesize(aa.Plan("a red barn", (DOOR,)), seed=1)
    assert hooks_of(module) == hooks
    assert pixels(synthesizer.synthesize(BARN, seed=1)) == pixels(before)


def test_regions_without_a_guide_are_an_error_not_a_plain_picture():
    unguided = drawing_with(tiny_flux(), guide=None)
    assert unguided.synthesize(BARN, seed=1).size == (TINY_SIZE, TINY_SIZE)
    with pytest.raises(aa.GuideError, match=r"1 of 2 plans have regions \(first: 'a red barn', 1 of them\)"):
        unguided.synthesize_batch([LAKE, aa.Plan("a red barn", (DOOR,))], seeds=[1, 2])


# However its owner runs the pipeline -------------------------------------------------------------


def offloaded_by_accelerate(pipeline):
    accelerate.cpu_offload(pipeline.transformer, execution_device=torch.device("cpu"))


def offloaded_by_diffusers(pipeline):
    here = torch.device("cpu")
    pipeline.transformer.enable_group_offload(onload_device=here, offload_device=here, offload_type="leaf_level")


@pytest.mark.parametrize("ran_as", [offloaded_by_accelerate, offloaded_by_diffusers])
def test_an_offloaded_pipeline_draws_the_same_regions_with_the_same_lora(synthesizer, ran_as):
    plan, lora = aa.Plan("a red barn", (DOOR,)), lora_for(synthesizer.pipeline.transformer)
    pipeline = tiny_flux()
    ran_as(pipeline)
    wanted, drawn = (one.with_lora(lora).synthesize(plan, seed=1) for one in (synthesizer, drawing_with(pipeline)))
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(wanted)).max() <= 1


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # diffusers' DPM solver
def test_a_scheduler_with_a_memory_draws_the_same_picture_again():
    pipeline = tiny_flux()
    pipeline.scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        use_dynamic_shifting=True,
        time_shift_type="exponential",
    )
    several_step = drawing_with(pipeline)
    plan = aa.Plan("a red barn", (DOOR,))
    first = several_step.synthesize(plan, seed=1)
    several_step.synthesize(LAKE, seed=2)
    assert pixels(several_step.synthesize(plan, seed=1)) == pixels(first)


# LoRA --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, -0.6])
def test_a_worn_lora_draws_what_diffusers_draws_with_its_file(tmp_path, scale):
    lora = lora_for(tiny_flux().transformer)
    loaded = tiny_flux()
    loaded.load_lora_weights(lora.save(tmp_path / "lora.safetensors"), adapter_name="theirs")
    loaded.set_adapters("theirs", scale)
    by_diffusers = direct(loaded, [BARN.prompt], [1])[0]
    ours = drawing_with(tiny_flux())
    drawn = ours.with_lora(lora, scale=scale).synthesize(BARN, seed=1)
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(by_diffusers)).max() <= 1
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(ours.synthesize(BARN, seed=1))).max() > 1


def test_the_base_is_the_same_after_drawing_with_a_lora(synthesizer):
    module = synthesizer.pipeline.transformer
    weights, before = weights_of(module), synthesizer.synthesize(BARN, seed=1)
    enhanced = synthesizer.with_lora(lora_for(module))
    assert enhanced.pipeline is synthesizer.pipeline
    assert pixels(enhanced.synthesize(BARN, seed=1)) != pixels(before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())
    assert pixels(synthesizer.synthesize(BARN, seed=1)) == pixels(before)


def test_loras_add_up(synthesizer):
    module = synthesizer.pipeline.transformer
    first, second = lora_for(module, seed=1), lora_for(module, seed=2)
    both = synthesizer.with_lora(first).with_lora(second, scale=0.5)
    other_way = synthesizer.with_lora(second, scale=0.5).with_lora(first)
    assert [worn.scale for worn in both.loras] == [1.0, 0.5]
    drawn = np.asarray(both.synthesize(BARN, seed=1)).astype(int)
    assert np.abs(drawn - np.asarray(other_way.synthesize(BARN, seed=1))).max() <= 1
    off = both.with_lora(first, scale=-1).with_lora(second, scale=-0.5).synthesize(BARN, seed=1)
    assert np.abs(np.asarray(off).astype(int) - np.asarray(synthesizer.synthesize(BARN, seed=1))).max() <= 1


def test_a_lora_of_another_model_is_refused_when_it_is_put_on(synthesizer):
    stranger = aa.LoRA({"down_blocks.0.attn.to_q": aa.LowRank(torch.ones(1, 4), torch.ones(4, 1))})
    with pytest.raises(aa.LoRAMismatchError, match="FluxTransformer2DModel has none of them"):
        synthesizer.with_lora(stranger)


# What cannot be drawn ----------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(30, 32), (32, 6), (0, 32), (-4, 32)])
def test_a_size_that_is_not_whole_tokens_is_refused_before_drawing(width, height):
    with pytest.raises(aa.ModelError, match=f"{width} x {height} pixels .* positive multiples of 4"):
        drawing_with(tiny_flux(), width=width, height=height)


def test_a_guidance_scale_that_would_be_ignored_is_refused():
    with pytest.raises(aa.ModelError, match=r"guidance_scale=3.5 would be ignored"):
        drawing_with(tiny_flux(guidance_embeds=False), guidance_scale=3.5)


@pytest.mark.parametrize("length", [0, 513])
def test_a_prompt_length_flux_cannot_read_is_refused(length):
    with pytest.raises(aa.ModelError, match=f"max_sequence_length={length}"):
        drawing_with(tiny_flux(), max_sequence_length=length)


def test_no_steps_are_refused():
    with pytest.raises(aa.InvalidValueError, match=r"steps=0"):
        drawing_with(tiny_flux(), steps=0)


@pytest.mark.parametrize(("negative", "scale"), [("blurry", 1.0), (None, 3.0), ("blurry", 0.5)])
def test_classifier_free_guidance_that_would_be_ignored_is_refused(negative, scale):
    with pytest.raises(aa.ModelError, match="would have no effect"):
        drawing_with(tiny_flux(), negative_prompt=negative, true_cfg_scale=scale)


def test_a_part_in_training_mode_is_refused():
    pipeline = tiny_flux()
    pipeline.text_encoder_2.train()
    with pytest.raises(aa.ModelError, match=r"\['text_encoder_2'\] of the pipeline are in training mode"):
        drawing_with(pipeline)


def test_latents_that_are_not_finite_name_the_step():
    pipeline = tiny_flux()
    pipeline.transformer.proj_out.weight.data.fill_(math.nan)
    with pytest.raises(aa.NonFiniteError, match="latents hold NaN or infinity after step 1"):
        drawing_with(pipeline).synthesize(BARN, seed=1)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")  # how diffusers finds out
def test_a_broken_vae_is_an_error_and_not_a_black_picture():
    pipeline = tiny_flux()
    pipeline.vae.decoder.conv_out.bias.data.fill_(math.nan)
    assert pixels(direct(pipeline, [BARN.prompt], [1])) == pixels(Image.new("RGB", (TINY_SIZE, TINY_SIZE)))
    with pytest.raises(aa.NonFiniteError, match="the VAE decoded finite latents to NaN"):
        drawing_with(pipeline).synthesize(BARN, seed=1)


# Loading, lending, silence -----------------------------------------------------------------------


def test_a_saved_pipeline_draws_what_it_drew(tmp_path, synthesizer):
    synthesizer.pipeline.save_pretrained(tmp_path)
    loaded = DiffusersSynthesizer.from_pretrained(tmp_path, guide=OutputMix(), device="cpu", **DRAWING)
    plan = aa.Plan("a red barn", (DOOR,))
    assert isinstance(loaded.pipeline, FluxPipeline)
    assert pixels(loaded.synthesize(plan, seed=1)) == pixels(synthesizer.synthesize(plan, seed=1))
    half = DiffusersSynthesizer.from_pretrained(str(tmp_path), dtype=torch.bfloat16, **DRAWING)
    assert half.pipeline.transformer.dtype == torch.bfloat16


def test_a_trainer_gets_a_frozen_model_that_wears_the_loras(synthesizer):
    module = synthesizer.pipeline.transformer
    enhanced = synthesizer.with_lora(lora_for(module))
    module.x_embedder.bias.requires_grad_(False)
    asked, hooks = [one.requires_grad for one in module.parameters()], hooks_of(module)
    with enhanced.training() as model:
        assert model.module is module
        assert not any(one.requires_grad for one in module.parameters())
        assert hooks_of(module) != hooks
    assert [one.requires_grad for one in module.parameters()] == asked
    assert hooks_of(module) == hooks


def test_drawing_shows_no_bar_and_keeps_the_pipelines_own_setting(synthesizer, capfd):
    synthesizer.pipeline.set_progress_bar_config(desc="mine")
    synthesizer.synthesize(BARN, seed=1)
    assert capfd.readouterr().err == ""
    synthesizer.pipeline(prompt="a", width=4, height=4, num_inference_steps=1, output_type="latent")
    assert "mine" in capfd.readouterr().err


def test_its_repr_says_how_it_draws_and_not_what_the_pipeline_holds(synthesizer):
    assert repr(synthesizer) == (
        "DiffusersSynthesizer(guide=OutputMix(), width=32, height=32, steps=3, guidance_scale=None, "
        "negative_prompt=None, true_cfg_scale=1.0, max_sequence_length=24, loras=())"
    )


# What a training is resumed by --------------------------------------------------------------------

KNOWN_AS = """
import sys
sys.path[:0] = {path!r}
from artaug.diffusion import DiffusersSynthesizer
from support.tiny_flux import TINY_SIZE, tiny_flux
print(DiffusersSynthesizer(pipeline=tiny_flux(), width=TINY_SIZE, height=TINY_SIZE).fingerprint)
"""


def test_a_synthesizer_is_known_as_the_same_in_every_process(synthesizer):
    """Sets have another order in each, and diffusers keeps one in every config."""
    script = KNOWN_AS.format(path=sys.path)
    told = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "12"
    ]
    assert told[0] == told[1] != ""
    lora = lora_for(synthesizer.pipeline.transformer)
    others = [
        synthesizer.with_lora(lora),
        synthesizer.with_lora(lora, scale=2),
        dataclasses.replace(synthesizer, max_sequence_length=8),
    ]
    assert len({one.fingerprint for one in (synthesizer, *others)}) == 4
