"""Encodings kept from drawing to drawing: calls of the encoders saved, nothing stale, the same bits as without."""

import copy
import functools
import gc
import pickle
import weakref
from contextlib import contextmanager

import accelerate
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch import nn
from transformers import T5EncoderModel

import artaug as aa
from artaug import playground
from artaug.diffusion import DiffusersSynthesizer, encodings
from artaug.diffusion.encoder_state import encoder_state
from artaug.diffusion.encodings import kept_encoding
from artaug.diffusion.families.registry import family_of
from support.family_laws import family_of as bound_family
from support.tiny_chroma import tiny_chroma
from support.tiny_flux import TINY_SIZE, tiny_flux
from support.tiny_flux2 import tiny_flux2, tiny_flux2_klein
from support.tiny_qwen_image import tiny_qwen_image
from support.tiny_sd3 import tiny_sd3
from support.tiny_unet import tiny_sd15, tiny_sdxl
from support.tiny_z_image import tiny_z_image

TINY = [
    tiny_chroma,
    tiny_flux,
    tiny_flux2,
    tiny_flux2_klein,
    tiny_qwen_image,
    tiny_sd3,
    tiny_sd15,
    tiny_sdxl,
    tiny_z_image,
]
PROMPTS = ["a red barn", "a lake"]
LEFT, RIGHT = aa.Box(0, 0, 0.5, 1), aa.Box(0.5, 0, 1, 1)


def pixels(images):
    return np.stack([np.asarray(image) for image in images])


@contextmanager
def calls_counted(pipeline):
    """The prompts of every call of the pipeline's encoders in a ``with`` block."""
    calls, plain = [], type(pipeline).encode_prompt

    @functools.wraps(plain)
    def counted(*args, **kwargs):
        prompts = args[1] if len(args) > 1 else kwargs.get("prompt")
        if prompts is not None:  # as a pipeline calls it that was given encoded prompts
            calls.append(list(prompts))
        return plain(*args, **kwargs)

    type(pipeline).encode_prompt = counted
    try:
        yield calls
    finally:
        type(pipeline).encode_prompt = plain


def tiny_family(pipeline, **options):
    return bound_family(family_of(pipeline), pipeline, width=32, height=32, **options)


def guided(pipeline, **options):
    size = {"width": TINY_SIZE, "height": TINY_SIZE, "steps": 2, "max_sequence_length": 48}
    return DiffusersSynthesizer(pipeline=pipeline, guide=aa.RegionalAttention(), **{**size, **options})


def regional_plans(prompts):
    return [
        aa.Plan(prompt, (aa.Region(LEFT, f"ivy {number % 3}"), aa.Region(RIGHT, f"oak {number % 5}")))
        for number, prompt in enumerate(prompts)
    ]


def test_a_guided_batch_of_sixteen_takes_two_calls_of_the_encoders_and_its_second_drawing_none():
    synthesizer = playground.synthesizer(guide=aa.RegionalAttention(), steps=1)
    scenes = playground.prompts(16, seed=0)
    plans = [
        aa.Plan(scene, (aa.Region(LEFT, "a vivid sky"), aa.Region(RIGHT, f"{scene}, softly lit"))) for scene in scenes
    ]
    with calls_counted(synthesizer.pipeline) as calls:
        first = synthesizer.synthesize_batch(plans, seeds=range(16))
        assert calls == [scenes, ["a vivid sky", *(f"{scene}, softly lit" for scene in scenes)]]
        second = synthesizer.synthesize_batch(plans, seeds=range(16))
    assert len(calls) == 2
    assert np.array_equal(pixels(first), pixels(second))


@pytest.mark.parametrize("build", TINY, ids=lambda build: build.__name__)
def test_every_family_encodes_the_same_prompts_once_and_hands_out_copies(build):
    family = tiny_family(build(), max_sequence_length=96)
    with calls_counted(family.pipeline) as calls:
        first, second = family.encode_prompts(PROMPTS), family.encode_prompts(PROMPTS)
    assert len(calls) == 1
    for name, column in first.items():
        assert torch.equal(column, second[name])
        assert column.stride() == second[name].stride()
        column.zero_()
        assert torch.equal(family.encode_prompts(PROMPTS)[name], second[name])


@pytest.mark.parametrize("build", TINY, ids=lambda build: build.__name__)
def test_what_is_handed_out_is_bit_for_bit_what_the_pipeline_encodes(build, monkeypatch):
    kept = tiny_family(build(), max_sequence_length=96)
    kept.encode_prompts(PROMPTS)
    monkeypatch.setattr(encodings, "encoder_state", lambda _pipeline: None)
    plain = tiny_family(build(), max_sequence_length=96).encode_prompts(PROMPTS)
    monkeypatch.undo()
    for name, column in kept.encode_prompts(PROMPTS).items():
        assert torch.equal(column, plain[name])
        assert (column.dtype, column.device) == (plain[name].dtype, plain[name].device)


@settings(max_examples=4)
@given(history=st.lists(st.lists(st.sampled_from(["a red barn", "a lake", "ivy"]), min_size=1, max_size=3), max_size=3))
def test_what_a_drawing_gives_does_not_depend_on_what_was_drawn_before(history):
    plans = regional_plans(["a red barn", "a lake", "a red barn"])
    fresh = guided(tiny_flux()).synthesize_batch(plans, seeds=[1, 2, 3])
    used = guided(tiny_flux())
    for prompts in history:
        used.synthesize_batch(regional_plans(prompts), seeds=range(len(prompts)))
    assert np.array_equal(pixels(used.synthesize_batch(plans, seeds=[1, 2, 3])), pixels(fresh))


def test_other_prompts_and_another_order_or_number_of_them_are_other_calls():
    family = tiny_family(tiny_flux())
    with calls_counted(family.pipeline) as calls:
        for prompts in (PROMPTS, PROMPTS[::-1], PROMPTS[:1], [*PROMPTS, *PROMPTS], ["a red bar"]):
            family.encode_prompts(prompts)
            family.encode_prompts(prompts)
    assert len(calls) == 5


def test_prompts_cut_at_another_length_are_other_calls():
    pipeline = tiny_flux()
    long, short = tiny_family(pipeline, max_sequence_length=20), tiny_family(pipeline, max_sequence_length=16)
    assert long.encode_prompts(PROMPTS)["prompt_embeds"].shape[1] == 20
    assert short.encode_prompts(PROMPTS)["prompt_embeds"].shape[1] == 16


def test_a_prompt_that_is_cut_is_warned_of_in_every_drawing():
    family = tiny_family(tiny_flux(), max_sequence_length=12)
    for _ in range(3):
        with pytest.warns(UserWarning, match="T5 reads 12 tokens and the prompt 'a red barn by night'") as warned:
            family.encode_prompts(["a red barn by night"])
        assert len(warned) == 1


def test_a_plan_whose_prompt_is_the_negative_prompt_is_still_told_from_it():
    synthesizer = guided(tiny_flux(), negative_prompt="a lake", true_cfg_scale=3.0)
    plain, regional = aa.Plan("a lake"), aa.Plan("a lake", (aa.Region(LEFT, "ivy"),))
    images = [synthesizer.synthesize(plan, seed=0) for plan in (plain, regional, regional)]
    fresh = guided(tiny_flux(), negative_prompt="a lake", true_cfg_scale=3.0).synthesize(regional, seed=0)
    assert np.array_equal(pixels(images[1:]), pixels([fresh, fresh]))
    assert not np.array_equal(pixels(images[:1]), pixels([fresh]))


def t5(pipeline):
    return pipeline.text_encoder_2


def scale_in_place(pipeline):
    with torch.no_grad():
        t5(pipeline).encoder.block[0].layer[0].SelfAttention.q.weight.mul_(2)


def scale_through_data(pipeline):
    t5(pipeline).encoder.block[1].layer[1].DenseReluDense.wo.weight.data *= 2


def change_one_number(pipeline):
    with torch.no_grad():
        t5(pipeline).encoder.block[0].layer[0].SelfAttention.q.weight[3, 1] += 4


def put_a_word_into_the_embedding(pipeline):
    token = pipeline.tokenizer_2("r").input_ids[1]
    t5(pipeline).get_input_embeddings().weight.data[token] = 1.0


def change_a_buffer(pipeline):
    embeddings = pipeline.text_encoder.embeddings
    embeddings.position_ids.copy_(embeddings.position_ids.flip(-1))


def replace_a_module(pipeline):
    block = t5(pipeline).encoder.block[0].layer[1]
    block.DenseReluDense = copy.deepcopy(t5(pipeline).encoder.block[1].layer[1].DenseReluDense)


def replace_an_encoder(pipeline):
    pipeline.text_encoder_2 = t5(tiny_flux(seed=5))


def register_a_hook(pipeline):
    t5(pipeline).encoder.block[0].register_forward_hook(lambda _module, _args, output: (output[0] * 2, *output[1:]))


def register_a_pre_hook(pipeline):
    t5(pipeline).encoder.block[0].register_forward_pre_hook(lambda _module, args: (args[0] * 2, *args[1:]))


def patch_a_forward(pipeline):
    layer = t5(pipeline).encoder.block[0].layer[1]
    plain = layer.forward
    layer.forward = lambda *args, **kwargs: plain(*args, **kwargs) * 2


def patch_the_pipeline(pipeline):
    plain = pipeline.encode_prompt

    def doubled(*args, **kwargs):
        embeds, *others = plain(*args, **kwargs)
        return (2 * embeds, *others)

    pipeline.encode_prompt = doubled


def add_a_lora(pipeline):
    config = LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        t5(pipeline).add_adapter(config)
    t5(pipeline).eval()


def change_a_config(pipeline):
    t5(pipeline).encoder.block[0].layer[0].layer_norm.variance_epsilon = 10.0


def add_a_word_to_the_vocabulary(pipeline):
    pipeline.tokenizer_2.add_tokens(["barn"])
    t5(pipeline).resize_token_embeddings(len(pipeline.tokenizer_2), mean_resizing=False)
    t5(pipeline).get_input_embeddings().weight.data[-1] = 1.0


def pad_with_another_token(pipeline):
    pipeline.tokenizer_2.pad_token = "a"


def round_otherwise(pipeline):
    pipeline.text_encoder_2.double()


CHANGES = [
    scale_in_place,
    scale_through_data,
    change_one_number,
    put_a_word_into_the_embedding,
    change_a_buffer,
    replace_a_module,
    replace_an_encoder,
    register_a_hook,
    register_a_pre_hook,
    patch_a_forward,
    patch_the_pipeline,
    add_a_lora,
    change_a_config,
    add_a_word_to_the_vocabulary,
    pad_with_another_token,
    round_otherwise,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_the_encoders_is_noticed(change):
    pipeline, fresh = tiny_flux(), tiny_flux()
    before = tiny_family(pipeline).encode_prompts(PROMPTS)
    change(pipeline)
    change(fresh)
    after, expected = tiny_family(pipeline).encode_prompts(PROMPTS), tiny_family(fresh).encode_prompts(PROMPTS)
    assert not all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(after[name], expected[name]) for name in after)


def test_the_scale_and_the_merge_of_a_lora_in_an_encoder_are_noticed():
    pipeline = tiny_flux()
    family = tiny_family(pipeline)
    plain = family.encode_prompts(PROMPTS)["prompt_embeds"]
    add_a_lora(pipeline)
    seen = [plain, family.encode_prompts(PROMPTS)["prompt_embeds"]]
    layers = [module for module in t5(pipeline).modules() if hasattr(module, "set_scale")]
    for layer in layers:
        layer.set_scale("default", 3.0)
    seen.append(family.encode_prompts(PROMPTS)["prompt_embeds"])
    t5(pipeline).disable_adapters()
    assert torch.equal(family.encode_prompts(PROMPTS)["prompt_embeds"], plain)
    t5(pipeline).enable_adapters()
    for layer in layers:
        layer.merge()
    t5(pipeline).delete_adapter("default")
    seen.append(family.encode_prompts(PROMPTS)["prompt_embeds"])
    assert not any(torch.equal(seen[i], seen[j]) for i in range(len(seen)) for j in range(i))


STRENGTH = 1.0


def strengthen(_module, _args, output):
    return (output[0] * STRENGTH, *output[1:])


class Strength:
    value = 1.0

    def __call__(self, _module, _args, output):
        return (output[0] * self.value, *output[1:])

    hook = __call__


def test_what_a_hook_reads_is_noticed(monkeypatch):
    strength, settings_, tensor = 1.5, {"strength": 1.0}, torch.ones(1)
    steering = Strength()
    steering.value = 1.0

    def by_closure(_module, _args, output):
        return (output[0] * strength * settings_["strength"] * tensor, *output[1:])

    changes = {
        strengthen: [lambda: monkeypatch.setitem(globals(), "STRENGTH", 2.0)],
        by_closure: [lambda: settings_.update(strength=2.0), lambda: tensor.data.mul_(3)],
        steering.hook: [lambda: setattr(steering, "value", 2.0)],
    }
    for hook, changes_of_hook in changes.items():
        pipeline = tiny_flux()
        t5(pipeline).encoder.block[0].register_forward_hook(hook)
        family = tiny_family(pipeline)
        with calls_counted(pipeline) as calls:
            seen = [family.encode_prompts(PROMPTS)["prompt_embeds"]]
            for number, change in enumerate(changes_of_hook, start=1):
                assert torch.equal(family.encode_prompts(PROMPTS)["prompt_embeds"], seen[-1])
                assert len(calls) == number
                change()
                seen.append(family.encode_prompts(PROMPTS)["prompt_embeds"])
                assert not torch.equal(seen[-1], seen[-2])


def test_a_hook_with_an_object_of_its_own_is_not_kept():
    pipeline = tiny_flux()
    t5(pipeline).register_forward_hook(Strength())
    assert encoder_state(pipeline) is None


def test_hooks_that_count_calls_do_not_cause_them():
    synthesizer, counts, per_drawing = guided(tiny_flux()), [], []
    plans = regional_plans(PROMPTS)
    t5(synthesizer.pipeline).register_forward_pre_hook(lambda *_: counts.append(len(counts)))
    for _ in range(3):
        calls = {"t5": 0}

        def count(*_, calls=calls):
            calls["t5"] += 1

        handle = t5(synthesizer.pipeline).register_forward_hook(count)
        synthesizer.synthesize_batch(plans, seeds=[0, 1])
        per_drawing.append(calls["t5"])
        handle.remove()
    assert (per_drawing, len(counts)) == ([2, 0, 0], 2)


def test_methods_patched_to_count_calls_do_not_cause_them():
    pipeline, counts = tiny_flux(), []

    def counted(plain):
        @functools.wraps(plain)
        def wrapper(*args, **kwargs):
            counts.append(plain.__name__)
            return plain(*args, **kwargs)

        return wrapper

    pipeline.encode_prompt = counted(pipeline.encode_prompt)
    t5(pipeline).forward = counted(t5(pipeline).forward)
    for _ in range(2):
        tiny_family(pipeline).encode_prompts(PROMPTS)
    assert counts.count("forward") <= 2


def test_autocast_is_noticed():
    family = tiny_family(tiny_flux())
    plain = family.encode_prompts(PROMPTS)["prompt_embeds"]
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(family.encode_prompts(PROMPTS)["prompt_embeds"], plain)
    assert torch.equal(family.encode_prompts(PROMPTS)["prompt_embeds"], plain)


def test_weights_that_model_offload_moves_stay_the_same():
    pipeline = tiny_flux()
    _, hook = accelerate.cpu_offload_with_hook(t5(pipeline), execution_device=torch.device("cpu"))
    family = tiny_family(pipeline)
    with calls_counted(pipeline) as calls:
        family.encode_prompts(PROMPTS)
        for parameter in t5(pipeline).parameters():
            parameter.data = parameter.data.clone()  # as a move to the device and back leaves it
        family.encode_prompts(PROMPTS)
        assert len(calls) == 1
        hook.remove()
        family.encode_prompts(PROMPTS)
        assert len(calls) == 2  # accelerate moves it, so that it computes elsewhere


def test_streamed_meta_and_compiled_encoders_are_not_kept():
    streamed, meta, compiled = tiny_flux(), tiny_flux(), tiny_flux()
    accelerate.cpu_offload(t5(streamed), execution_device=torch.device("cpu"))
    t5(meta).to("meta")
    compiled.text_encoder_2 = torch.compile(t5(compiled), backend="eager")
    assert [encoder_state(pipeline) for pipeline in (streamed, meta, compiled)] == [None] * 3
    with calls_counted(streamed) as calls:
        for _ in range(2):
            tiny_family(streamed).encode_prompts(PROMPTS)
    assert len(calls) == 2


def test_weights_made_in_inference_mode_are_not_kept():
    with torch.inference_mode():
        pipeline = tiny_flux()
    assert encoder_state(pipeline) is None


def test_encodings_end_with_their_pipeline_and_do_not_keep_it():
    pipeline = tiny_flux()
    tiny_family(pipeline).encode_prompts(PROMPTS)
    alive = weakref.ref(pipeline), weakref.ref(t5(pipeline))
    del pipeline
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


def test_an_encoder_that_is_replaced_is_not_kept():
    pipeline = tiny_flux()
    tiny_family(pipeline).encode_prompts(PROMPTS)
    replaced = weakref.ref(t5(pipeline))
    replace_an_encoder(pipeline)
    gc.collect()
    assert replaced() is None


def test_a_synthesizer_is_pickled_without_encodings():
    synthesizer = guided(tiny_flux())
    size = len(pickle.dumps(synthesizer))
    synthesizer.synthesize(aa.Plan("a red barn"), seed=0)
    assert abs(len(pickle.dumps(synthesizer)) - size) < 4096
    copied = pickle.loads(pickle.dumps(synthesizer))
    with calls_counted(copied.pipeline) as calls:
        copied.synthesize(aa.Plan("a red barn"), seed=0)
    assert len(calls) == 1


class Encoders:
    """Stands in for a pipeline."""


def test_the_least_recently_used_encodings_are_dropped_first(monkeypatch):
    monkeypatch.setattr(encodings, "encoder_state", lambda _pipeline: "unchanged")
    monkeypatch.setattr(encodings, "MAX_BYTES", 3 * 400)
    pipeline, calls = Encoders(), []

    def encoded(number):
        def encode():
            calls.append(number)
            return {"prompt_embeds": torch.full((1, 100), float(number))}

        return kept_encoding(pipeline, number, encode)["prompt_embeds"][0, 0].item()

    assert [encoded(number) for number in (0, 1, 2, 0, 3, 0, 2, 1)] == [0, 1, 2, 0, 3, 0, 2, 1]
    assert calls == [0, 1, 2, 3, 1]


def test_an_encoding_larger_than_all_that_may_be_kept_is_handed_out_and_not_kept(monkeypatch):
    monkeypatch.setattr(encodings, "MAX_BYTES", 64)
    family = tiny_family(tiny_flux())
    with calls_counted(family.pipeline) as calls:
        assert torch.equal(*(family.encode_prompts(PROMPTS)["prompt_embeds"] for _ in range(2)))
    assert len(calls) == 2


def test_encodings_that_are_no_tensors_are_not_kept(monkeypatch):
    monkeypatch.setattr(encodings, "encoder_state", lambda _pipeline: "unchanged")
    pipeline, lists = Encoders(), iter([["first"], ["second"]])
    handed_out = [kept_encoding(pipeline, (), lambda: {"words": next(lists)}) for _ in range(2)]
    assert handed_out == [{"words": ["first"]}, {"words": ["second"]}]


def test_a_class_that_is_patched_is_noticed(monkeypatch):
    family = tiny_family(tiny_flux())
    before = family.encode_prompts(PROMPTS)["prompt_embeds"]
    plain = T5EncoderModel.forward

    def doubled(*args, **kwargs):
        output = plain(*args, **kwargs)
        return (output[0] * 2,)

    monkeypatch.setattr(T5EncoderModel, "forward", doubled)
    assert torch.equal(family.encode_prompts(PROMPTS)["prompt_embeds"], 2 * before)


def test_hooks_on_all_modules_are_noticed():
    pipeline = tiny_flux()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert encoder_state(pipeline) is None
    finally:
        handle.remove()
    assert encoder_state(pipeline) is not None
