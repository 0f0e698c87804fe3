"""Drawing with a real, tiny FluxPipeline: compared with diffusers itself, and with the laws of the design."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import warnings
from itertools import pairwise

import accelerate
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FluxPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import artaug as aa
from artaug._internal.images import as_rgb
from artaug.diffusion import DiffusersSynthesizer
from artaug.regional import OutputMix, token_weights
from support.tiny_flux import TINY_SIZE, tiny_flux
from support.traces import hooks_of, weights_of

BARN, LAKE = aa.Plan("a red barn"), aa.Plan("a still lake, fog")
DOOR = aa.Region(aa.Box(0, 0, 0.5, 1), "a blue door")
STORM = aa.Region(aa.Box(0, 0, 1, 0.3), "a stormy sky", weight=2.5, feather=0.1)
DRAWING = {"width": TINY_SIZE, "height": TINY_SIZE, "steps": 3, "max_sequence_length": 24}


def make_synthesizer(pipeline, **options):
    return DiffusersSynthesizer(pipeline=pipeline, **{**DRAWING, "guide": OutputMix(), **options})


@pytest.fixture(scope="module")
def synthesizer():
    return make_synthesizer(tiny_flux())


def draw_by_diffusers(pipeline, prompts, seeds, **options):
    """What diffusers draws when it is called as its documentation says."""
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
    reference = synthesizer.pipeline(
        "a red barn",
        width=TINY_SIZE,
        height=TINY_SIZE,
        num_inference_steps=3,
        max_sequence_length=24,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    assert pixels(synthesizer.synthesize(BARN, seed=7)) == pixels(reference)


def test_a_batch_of_plain_pictures_is_bit_for_bit_what_the_pipeline_draws(synthesizer):
    drawn = synthesizer.synthesize_batch([BARN, LAKE, BARN], seeds=[1, 2, 3])
    prompts = [BARN.prompt, LAKE.prompt, BARN.prompt]
    assert pixels(drawn) == pixels(draw_by_diffusers(synthesizer.pipeline, prompts, [1, 2, 3]))


def test_with_distilled_guidance_too():
    pipeline = tiny_flux(guidance_embeds=True, dynamic_shift=True)
    default = make_synthesizer(pipeline).synthesize(BARN, seed=1)
    strong = make_synthesizer(pipeline, guidance_scale=7.0).synthesize(BARN, seed=1)
    assert pixels(default) == pixels(draw_by_diffusers(pipeline, [BARN.prompt], [1]))
    assert pixels(strong) == pixels(draw_by_diffusers(pipeline, [BARN.prompt], [1], guidance_scale=7.0))
    assert pixels(default) != pixels(strong)


def test_with_classifier_free_guidance_too(synthesizer):
    guided = dataclasses.replace(synthesizer, negative_prompt="blurry", true_cfg_scale=3.0)
    drawn = guided.synthesize_batch([BARN, LAKE], seeds=[1, 2])
    options = {"negative_prompt": ["blurry", "blurry"], "true_cfg_scale": 3.0}
    assert pixels(drawn) == pixels(
        draw_by_diffusers(synthesizer.pipeline, [BARN.prompt, LAKE.prompt], [1, 2], **options)
    )
    assert pixels(drawn) != pixels(synthesizer.synthesize_batch([BARN, LAKE], seeds=[1, 2]))


def test_in_half_precision_too():
    pipeline = tiny_flux().to(torch.bfloat16)
    assert pixels(make_synthesizer(pipeline).synthesize(BARN, seed=1)) == pixels(
        draw_by_diffusers(pipeline, [BARN.prompt], [1])
    )


def test_a_plain_picture_in_a_batch_with_a_regional_one_does_not_change(synthesizer):
    with_region = synthesizer.synthesize_batch([aa.Plan("a red barn", (DOOR,)), LAKE], seeds=[1, 2])
    without = synthesizer.synthesize_batch([BARN, LAKE], seeds=[1, 2])
    assert pixels(with_region[1]) == pixels(without[1])
    assert pixels(with_region[0]) != pixels(without[0])


# Law 1: same arguments, same picture ------------------------------------------------------------


@settings(max_examples=8)
@given(seed=st.integers(0, 2**63 - 1), earlier=st.integers(0, 99))
def test_a_picture_does_not_depend_on_earlier_pictures(synthesizer, seed, earlier):
    plan = aa.Plan("a red barn", (DOOR,))
    first = synthesizer.synthesize(plan, seed=seed)
    synthesizer.synthesize(LAKE, seed=earlier)
    torch.rand(3)
    assert pixels(synthesizer.synthesize(plan, seed=seed)) == pixels(first)


def test_another_seed_is_another_picture(synthesizer):
    assert pixels(synthesizer.synthesize(BARN, seed=1)) != pixels(synthesizer.synthesize(BARN, seed=2))


def test_the_global_random_state_is_neither_read_nor_changed(synthesizer):
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


def test_an_empty_batch_is_an_empty_list(synthesizer):
    assert synthesizer.synthesize_batch([], seeds=[]) == []


def test_each_plan_needs_a_seed(synthesizer):
    with pytest.raises(aa.InvalidValueError, match="received 2 plans and 1 seeds"):
        synthesizer.synthesize_batch([BARN, LAKE], seeds=[1])


# Regions -----------------------------------------------------------------------------------------


@torch.no_grad()
def sample_by_hand(pipeline, plan, *, seed):
    """ArtAug's redraw written out: the paper's equation at every step of an Euler sampler."""
    encoded = {prompt: pipeline.encode_prompt(prompt, max_sequence_length=24) for prompt in prompts_of(plan)}
    latents, image_ids = pipeline.prepare_latents(
        1, 4, TINY_SIZE, TINY_SIZE, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(seed)
    )
    pipeline.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 3, 3))
    sigmas = pipeline.scheduler.sigmas
    for sigma, next_sigma in pairwise(sigmas):
        velocity = {
            prompt: pipeline.transformer(
                hidden_states=latents,
                timestep=sigma[None],
                pooled_projections=pooled,
                encoder_hidden_states=embeds,
                txt_ids=text_ids,
                img_ids=image_ids,
            ).sample
            for prompt, (embeds, pooled, text_ids) in encoded.items()
        }
        masks = [token_weights(region, (8, 8)).reshape(64, 1) for region in plan.regions]
        total = velocity[plan.prompt] + sum(
            mask * velocity[region.prompt] for mask, region in zip(masks, plan.regions, strict=True)
        )
        latents = latents + (next_sigma - sigma) * total / (1 + sum(masks))
    unpacked = pipeline._unpack_latents(latents, TINY_SIZE, TINY_SIZE, 2)  # noqa: SLF001 - what diffusers does
    decoded = pipeline.vae.decode(unpacked / 0.36 + 0.11).sample
    return pipeline.image_processor.postprocess(decoded)[0]


def prompts_of(plan):
    return [plan.prompt, *(region.prompt for region in plan.regions)]


def test_regions_follow_the_papers_equation_through_the_whole_run(synthesizer):
    plan = aa.Plan("a red barn", (DOOR, STORM))
    drawn = np.asarray(synthesizer.synthesize(plan, seed=4)).astype(int)
    reference = np.asarray(sample_by_hand(synthesizer.pipeline, plan, seed=4))
    assert np.abs(drawn - reference).max() <= 1
    assert np.abs(drawn - np.asarray(synthesizer.synthesize(BARN, seed=4))).max() > 1


def test_a_region_with_the_plans_prompt_draws_the_plain_picture(synthesizer):
    same = aa.Plan("a red barn", (aa.Region(aa.Box(0, 0, 1, 1), "a red barn", weight=9),))
    drawn = np.asarray(synthesizer.synthesize(same, seed=4)).astype(int)
    assert np.abs(drawn - np.asarray(synthesizer.synthesize(BARN, seed=4))).max() <= 1


def test_with_classifier_free_guidance_only_the_conditional_branch_has_regions(synthesizer):
    guided = dataclasses.replace(synthesizer, negative_prompt="blurry", true_cfg_scale=3.0)
    calls = []
    hook = synthesizer.pipeline.transformer.register_forward_hook(lambda *_: calls.append(None))
    with hook:
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
    too_strong = synthesizer.with_lora(lora_for(module), scale=1e37)
    with pytest.raises(aa.NonFiniteError, match=r"predicted NaN or infinity for the plan's prompt at step 1"):
        too_strong.synthesize(aa.Plan("a red barn", (DOOR,)), seed=1)
    assert hooks_of(module) == hooks
    assert pixels(synthesizer.synthesize(BARN, seed=1)) == pixels(before)


def test_regions_without_a_guide_are_an_error_not_a_plain_picture():
    unguided = make_synthesizer(tiny_flux(), guide=None)
    assert unguided.synthesize(BARN, seed=1).size == (TINY_SIZE, TINY_SIZE)
    with pytest.raises(aa.GuideError, match=r"1 of 2 plans have regions \(first: 'a red barn', 1 of them\)"):
        unguided.synthesize_batch([LAKE, aa.Plan("a red barn", (DOOR,))], seeds=[1, 2])


# Offload and schedulers ---------------------------------------------------------------------------


def offloaded_by_accelerate(pipeline):
    accelerate.cpu_offload(pipeline.transformer, execution_device=torch.device("cpu"))


def offloaded_by_diffusers(pipeline):
    cpu = torch.device("cpu")
    pipeline.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


@pytest.mark.parametrize("offload", [offloaded_by_accelerate, offloaded_by_diffusers])
def test_an_offloaded_pipeline_draws_the_same_regions_with_the_same_lora(synthesizer, offload):
    plan, lora = aa.Plan("a red barn", (DOOR,)), lora_for(synthesizer.pipeline.transformer)
    pipeline = tiny_flux()
    offload(pipeline)
    expected = synthesizer.with_lora(lora).synthesize(plan, seed=1)
    drawn = make_synthesizer(pipeline).with_lora(lora).synthesize(plan, seed=1)
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # diffusers' DPM solver
def test_a_multistep_scheduler_draws_the_same_picture_again():
    pipeline = tiny_flux()
    pipeline.scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        use_dynamic_shifting=True,
        time_shift_type="exponential",
    )
    synthesizer = make_synthesizer(pipeline)
    plan = aa.Plan("a red barn", (DOOR,))
    first = synthesizer.synthesize(plan, seed=1)
    synthesizer.synthesize(LAKE, seed=2)
    assert pixels(synthesizer.synthesize(plan, seed=1)) == pixels(first)


# LoRA --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, -0.6])
def test_an_active_lora_draws_what_diffusers_draws_with_its_file(tmp_path, scale):
    lora = lora_for(tiny_flux().transformer)
    loaded = tiny_flux()
    loaded.load_lora_weights(lora.save(tmp_path / "lora.safetensors"), adapter_name="file")
    loaded.set_adapters("file", scale)
    reference = draw_by_diffusers(loaded, [BARN.prompt], [1])[0]
    synthesizer = make_synthesizer(tiny_flux())
    drawn = synthesizer.with_lora(lora, scale=scale).synthesize(BARN, seed=1)
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(reference)).max() <= 1
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(synthesizer.synthesize(BARN, seed=1))).max() > 1


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
    reversed_order = synthesizer.with_lora(second, scale=0.5).with_lora(first)
    assert [active.scale for active in both.loras] == [1.0, 0.5]
    drawn = np.asarray(both.synthesize(BARN, seed=1)).astype(int)
    assert np.abs(drawn - np.asarray(reversed_order.synthesize(BARN, seed=1))).max() <= 1
    canceled = both.with_lora(first, scale=-1).with_lora(second, scale=-0.5).synthesize(BARN, seed=1)
    assert np.abs(np.asarray(canceled).astype(int) - np.asarray(synthesizer.synthesize(BARN, seed=1))).max() <= 1


def test_a_lora_of_another_model_is_refused_at_once(synthesizer):
    foreign = aa.LoRA({"down_blocks.0.attn.to_q": aa.LowRank(torch.ones(1, 4), torch.ones(4, 1))})
    with pytest.raises(aa.LoRAMismatchError, match="FluxTransformer2DModel has none of them"):
        synthesizer.with_lora(foreign)


# What cannot be drawn ----------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(30, 32), (32, 6), (0, 32), (-4, 32)])
def test_a_size_that_is_not_whole_tokens_is_refused_before_drawing(width, height):
    with pytest.raises(aa.ModelError, match=f"{width} x {height} pixels .* positive multiples of 4"):
        make_synthesizer(tiny_flux(), width=width, height=height)


def test_a_guidance_scale_that_would_be_ignored_is_refused():
    with pytest.raises(aa.ModelError, match=r"guidance_scale=3.5 would be ignored"):
        make_synthesizer(tiny_flux(guidance_embeds=False), guidance_scale=3.5)


@pytest.mark.parametrize("length", [0, 513])
def test_a_prompt_length_flux_cannot_read_is_refused(length):
    with pytest.raises(aa.ModelError, match=f"max_sequence_length={length}"):
        make_synthesizer(tiny_flux(), max_sequence_length=length)


def test_zero_steps_are_refused():
    with pytest.raises(aa.InvalidValueError, match=r"steps=0"):
        make_synthesizer(tiny_flux(), steps=0)


@pytest.mark.parametrize(("negative", "scale"), [("blurry", 1.0), (None, 3.0), ("blurry", 0.5)])
def test_classifier_free_guidance_that_would_be_ignored_is_refused(negative, scale):
    with pytest.raises(aa.ModelError, match="would have no effect"):
        make_synthesizer(tiny_flux(), negative_prompt=negative, true_cfg_scale=scale)


def test_a_part_in_training_mode_is_refused():
    pipeline = tiny_flux()
    pipeline.text_encoder_2.train()
    with pytest.raises(aa.ModelError, match=r"\['text_encoder_2'\] of the pipeline are in training mode"):
        make_synthesizer(pipeline)


def test_latents_that_are_not_finite_name_the_step():
    pipeline = tiny_flux()
    pipeline.transformer.proj_out.weight.data.fill_(math.nan)
    with pytest.raises(aa.NonFiniteError, match="latents hold NaN or infinity after step 1"):
        make_synthesizer(pipeline).synthesize(BARN, seed=1)


class CountedReads(TorchDispatchMode):
    """Counts the numbers that are read from tensors, for each of which a GPU has to finish all that it was given."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func) == "aten._local_scalar_dense.default"
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_the_device_no_more_often_than_a_step_of_diffusers():
    pipeline = tiny_flux()

    def reads_of_a_step(draw):
        counts = []
        for steps in (3, 5):
            with CountedReads() as reads:
                draw(steps)
            counts.append(reads.count)
        return (counts[1] - counts[0]) / 2

    ours = reads_of_a_step(lambda steps: make_synthesizer(pipeline, steps=steps).synthesize(BARN, seed=1))
    size = {name: value for name, value in DRAWING.items() if name != "steps"}
    assert ours == reads_of_a_step(lambda steps: pipeline(BARN.prompt, num_inference_steps=steps, **size))


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")  # how diffusers finds out
def test_a_broken_vae_is_an_error_and_not_a_black_picture():
    pipeline = tiny_flux()
    pipeline.vae.decoder.conv_out.bias.data.fill_(math.nan)
    assert pixels(draw_by_diffusers(pipeline, [BARN.prompt], [1])) == pixels(Image.new("RGB", (TINY_SIZE, TINY_SIZE)))
    with pytest.raises(aa.NonFiniteError, match="the VAE decoded finite latents to NaN"):
        make_synthesizer(pipeline).synthesize(BARN, seed=1)


# Loading, training, progress bars --------------------------------------------------------------


def test_a_saved_pipeline_draws_what_it_drew(tmp_path, synthesizer):
    synthesizer.pipeline.save_pretrained(tmp_path)
    loaded = DiffusersSynthesizer.from_pretrained(tmp_path, guide=OutputMix(), device="cpu", **DRAWING)
    plan = aa.Plan("a red barn", (DOOR,))
    assert isinstance(loaded.pipeline, FluxPipeline)
    assert pixels(loaded.synthesize(plan, seed=1)) == pixels(synthesizer.synthesize(plan, seed=1))
    half = DiffusersSynthesizer.from_pretrained(str(tmp_path), dtype=torch.bfloat16, **DRAWING)
    assert half.pipeline.transformer.dtype == torch.bfloat16


def test_a_trainer_gets_a_frozen_model_with_the_loras_active(synthesizer):
    module = synthesizer.pipeline.transformer
    enhanced = synthesizer.with_lora(lora_for(module))
    module.x_embedder.bias.requires_grad_(False)
    flags, hooks = [parameter.requires_grad for parameter in module.parameters()], hooks_of(module)
    with enhanced.training() as model:
        assert model.module is module
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert hooks_of(module) != hooks
    assert [parameter.requires_grad for parameter in module.parameters()] == flags
    assert hooks_of(module) == hooks


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_training_encodes_the_rgb_pixels_that_scorers_see(synthesizer, mode):
    noise = Image.effect_noise((TINY_SIZE, TINY_SIZE), 90)
    image = Image.merge("RGBA", [noise, noise.rotate(90), noise.rotate(180), noise.rotate(270)]).convert(mode)
    with synthesizer.training() as model:
        assert torch.equal(model.encode_images([image]), model.encode_images([as_rgb(image)]))


def test_drawing_shows_no_progress_bar_and_keeps_the_pipelines_setting(synthesizer, capfd):
    synthesizer.pipeline.set_progress_bar_config(desc="mine")
    synthesizer.synthesize(BARN, seed=1)
    assert capfd.readouterr().err == ""
    synthesizer.pipeline(prompt="a", width=4, height=4, num_inference_steps=1, output_type="latent")
    assert "mine" in capfd.readouterr().err


def test_the_repr_names_the_model_and_the_settings_that_are_not_the_defaults(synthesizer):
    assert repr(synthesizer) == (
        "DiffusersSynthesizer(FluxPipeline, guide=OutputMix(), width=32, height=32, steps=3, max_sequence_length=24)"
    )


# The fingerprint that a training is resumed by -------------------------------------------------

PRINT_FINGERPRINT = """
import sys
sys.path[:0] = {path!r}
from artaug.diffusion import DiffusersSynthesizer
from support.tiny_flux import TINY_SIZE, tiny_flux
print(DiffusersSynthesizer(pipeline=tiny_flux(), width=TINY_SIZE, height=TINY_SIZE).fingerprint)
"""


def test_the_fingerprint_is_the_same_in_every_process(synthesizer):
    """The order of a set differs between processes, and every config of diffusers holds one."""
    script = PRINT_FINGERPRINT.format(path=sys.path)
    fingerprints = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "12"
    ]
    assert fingerprints[0] == fingerprints[1] != ""
    lora = lora_for(synthesizer.pipeline.transformer)
    others = [
        synthesizer.with_lora(lora),
        synthesizer.with_lora(lora, scale=2),
        dataclasses.replace(synthesizer, max_sequence_length=8),
    ]
    assert len({other.fingerprint for other in (synthesizer, *others)}) == 4


class RunsCode:
    """A pickle that would leave a trace."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


def as_pickle(folder, part="vae"):
    """Replace the safetensors weights of a part by pickled ones."""
    weights = folder / part / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    return weights


def test_pickled_weights_are_read_only_if_asked_for(tmp_path, synthesizer):
    synthesizer.pipeline.save_pretrained(tmp_path)
    as_pickle(tmp_path)
    with pytest.raises(aa.ModelError, match=r"safetensors.*only with allow_pickle=True"):
        DiffusersSynthesizer.from_pretrained(tmp_path, **DRAWING)
    assert DiffusersSynthesizer.from_pretrained(tmp_path, allow_pickle=True, **DRAWING).pipeline.vae is not None


def test_an_index_that_names_pickles_is_refused(tmp_path, synthesizer):
    synthesizer.pipeline.save_pretrained(tmp_path)
    weights = as_pickle(tmp_path)
    torch.save(RunsCode(tmp_path / "trace"), weights.with_suffix(".bin"))
    names = {"weight_map": {"decoder.conv_in.weight": "diffusion_pytorch_model.bin"}}
    weights.with_name(weights.name + ".index.json").write_text(json.dumps(names))
    with pytest.raises(aa.ModelError, match=r"names 'diffusion_pytorch_model\.bin', which is no safetensors file"):
        DiffusersSynthesizer.from_pretrained(tmp_path, **DRAWING)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("tile", [TINY_SIZE // 2, TINY_SIZE, 2 * TINY_SIZE])
def test_a_vae_that_works_in_tiles_is_warned_of_where_it_has_seams(tile):
    pipeline = tiny_flux()
    vae = pipeline.vae
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // pipeline.vae_scale_factor
    synthesizer = make_synthesizer(pipeline)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = synthesizer.synthesize(BARN, seed=0)
        with synthesizer.training() as model:
            model.encode_images([image])
    expected = 2 * (tile < max(image.size))
    assert len([warning for warning in caught if "disable_tiling()" in str(warning.message)]) == expected
    vae.disable_tiling()
    vae.enable_slicing()
    synthesizer.synthesize(BARN, seed=0)  # a warning would be an error
