"""LoRAs, guides and training on pipelines that are compiled, fused or wrapped: they act, or say why they cannot."""

import dataclasses
import functools
import logging
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from PIL import Image
from torch import nn

import artaug as aa
from artaug.diffusion import DiffusersSynthesizer, estimate
from artaug.diffusion.families.flux.family import Flux
from artaug.errors import GuideError, LoRAError, LoRAMismatchError, ModelError
from artaug.training.injection import find_target_layers
from support.quantized import quantized
from support.tiny_flux import tiny_flux
from support.tiny_sd3 import tiny_sd3
from support.tiny_unet import tiny_sd15

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # torch's compiler warns of torch, and takes an error for a fault
]
TO_V = "transformer_blocks.0.attn.to_v"
PLAIN = aa.Plan("a red cone")
LEFT = aa.Plan("a red cone", (aa.Region(aa.Box(0, 0, 0.5, 1), "a blue ball at night"),))

PAIR = aa.ImagePair(
    prompt="a cone",
    seed=0,
    before=Image.new("RGB", (32, 32), "red"),
    after=Image.new("RGB", (32, 32), "blue"),
    plan=PLAIN,
)


@pytest.fixture(autouse=True)
def _nothing_compiled(caplog):
    caplog.set_level(logging.WARNING, logger="torch.__trace")  # whose records would take longer than compiling
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compile_blocks(pipeline):
    pipeline.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)


def compile_in_place(pipeline):
    pipeline.transformer.compile(backend="eager")


def compile_by_wrapping(pipeline):
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")


def wrap_blocks(pipeline):
    blocks = pipeline.transformer.transformer_blocks
    blocks[0] = torch.compile(blocks[0], backend="eager")


ways = pytest.mark.parametrize("way", [compile_blocks, compile_in_place, compile_by_wrapping, wrap_blocks])


def synthesizer_of(pipeline, **options):
    return DiffusersSynthesizer(pipeline=pipeline, **{"width": 32, "height": 32, "steps": 2, **options})


def compiled(way, **options):
    pipeline = tiny_flux()
    way(pipeline)
    return synthesizer_of(pipeline, **options)


def lora_on(module, *names, rank=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layers = {name: module.get_submodule(name) for name in names}
    return aa.LoRA(
        {
            name: aa.LowRank(
                torch.randn(rank, layer.in_features, generator=generator),
                torch.randn(layer.out_features, rank, generator=generator),
            )
            for name, layer in layers.items()
        }
    )


def flux_lora(**options):
    return lora_on(tiny_flux().transformer, TO_V, "single_transformer_blocks.1.proj_out", "x_embedder", **options)


def pixels(synthesizer, plan=PLAIN):
    return np.asarray(synthesizer.synthesize(plan, seed=1)).astype(int)


def assert_near(image, expected, *, other):
    assert np.abs(image - expected).max() <= 1
    assert np.abs(image - other).max() > 5


@ways
def test_a_lora_acts_on_a_compiled_model_before_and_after_a_plain_picture(way):
    reference, synthesizer = synthesizer_of(tiny_flux()), compiled(way)
    plain = pixels(reference)
    for lora in (flux_lora(seed=1), flux_lora(seed=2)):
        assert_near(pixels(synthesizer.with_lora(lora)), pixels(reference.with_lora(lora)), other=plain)
        assert np.abs(pixels(synthesizer) - plain).max() <= 1


@pytest.mark.parametrize("way", [compile_blocks, compile_in_place, compile_by_wrapping])
@pytest.mark.parametrize("guide", [aa.OutputMix, aa.RegionalAttention])
def test_a_guide_with_a_regions_lora_acts_on_a_compiled_model(way, guide):
    options = {"guide": guide(loras={"own": flux_lora()})}
    plan = aa.Plan(PLAIN.prompt, (dataclasses.replace(LEFT.regions[0], lora="own"),))
    reference, synthesizer = synthesizer_of(tiny_flux(), **options), compiled(way, **options)
    plain, guided = pixels(reference), pixels(reference, plan)
    for _ in range(2):
        assert_near(pixels(synthesizer, plan), guided, other=plain)
        assert np.abs(pixels(synthesizer) - plain).max() <= 1


@pytest.mark.parametrize("way", [compile_by_wrapping, wrap_blocks])
def test_training_on_a_compiled_model_learns_the_same_under_plain_names(way):
    trainer = aa.DifferentialLoRATrainer(rank=2, steps=2, batch_size=1, targets="to_q|proj_out")
    reference, synthesizer = synthesizer_of(tiny_flux()), compiled(way)
    synthesizer.synthesize(PLAIN, seed=1)
    plain, learned = (
        trainer.train([PAIR], model.with_lora(flux_lora()), seed=0, progress=False).lora.layers
        for model in (reference, synthesizer)
    )
    assert list(learned) == list(plain)
    for name, layer in learned.items():
        torch.testing.assert_close(layer.delta(), plain[name].delta(), rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("way", [compile_by_wrapping, wrap_blocks])
def test_wrappers_are_in_no_message_and_no_estimate(way):
    synthesizer = compiled(way)
    with pytest.raises(LoRAMismatchError) as caught:
        synthesizer.with_lora(aa.LoRA({"elsewhere": aa.LowRank(torch.ones(1, 4), torch.ones(4, 1))}))
    assert "FluxTransformer2DModel has none" in str(caught.value)
    assert "_orig_mod" not in str(caught.value)
    with pytest.raises(
        LoRAMismatchError, match=r"FluxTransformer2DModel; names there look like 'transformer_blocks|single"
    ):
        estimate(synthesizer.pipeline, width=32, height=32, trainer=aa.DifferentialLoRATrainer(targets="_orig_mod"))


def test_fused_projections_refuse_a_lora_and_a_training_until_they_are_unfused():
    pipeline = tiny_flux()
    synthesizer = synthesizer_of(pipeline).with_lora(flux_lora())
    expected = pixels(synthesizer)
    pipeline.transformer.fuse_qkv_projections()
    with pytest.raises(
        LoRAMismatchError, match=r"'transformer_blocks.0.attn.to_qkv' computes .* unfuse_qkv_projections"
    ):
        synthesizer.synthesize(PLAIN, seed=1)
    for targets in (r"attn\.to_v$", "to_qkv"):
        with pytest.raises(ModelError, match=r"fused projections .* unfuse_qkv_projections"):
            find_target_layers(pipeline.transformer, targets)
    assert find_target_layers(pipeline.transformer, r"ff\.net")
    pipeline.transformer.unfuse_qkv_projections()
    assert (pixels(synthesizer) == expected).all()


@pytest.mark.parametrize(
    ("make", "part", "names"),
    [
        (tiny_sd15, "unet", ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"]),
        (tiny_sd15, "unet", ["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"]),
        (tiny_sd3, "transformer", ["transformer_blocks.0.attn.add_k_proj"]),
    ],
)
def test_layers_left_over_by_unfusing_are_not_trained(make, part, names):
    pipeline = make()
    module = getattr(pipeline, part)
    synthesizer, lora = synthesizer_of(pipeline), lora_on(module, *names)
    targets = list(find_target_layers(module, "attn"))
    expected = pixels(synthesizer.with_lora(lora))
    module.fuse_qkv_projections()
    with pytest.raises(LoRAMismatchError, match="unfuse_qkv_projections"):
        synthesizer.with_lora(lora)
    with pytest.raises(ModelError, match="unfuse_qkv_projections"):
        find_target_layers(module, "attn")
    module.unfuse_qkv_projections()  # leaves the fused layers behind, and the flag that says so
    assert list(find_target_layers(module, "attn")) == targets
    assert (pixels(synthesizer.with_lora(lora)) == expected).all()


def test_a_cross_attention_with_fused_keys_still_takes_a_lora_on_its_queries():
    pipeline = tiny_sd15()
    lora = lora_on(pipeline.unet, "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q")
    synthesizer = synthesizer_of(pipeline)
    pipeline.unet.fuse_qkv_projections()
    assert (pixels(synthesizer.with_lora(lora)) != pixels(synthesizer)).any()


class SkippingProcessor(FluxAttnProcessor):
    """Attention that computes values with weights of its own, as processors of other libraries do."""

    def __call__(self, attn, *args, **kwargs):
        values, attn.to_v = attn.to_v, nn.Linear(attn.to_v.in_features, attn.to_v.out_features)
        try:
            return super().__call__(attn, *args, **kwargs)
        finally:
            attn.to_v = values


def test_a_lora_on_a_layer_that_nobody_calls_is_an_error_after_the_first_step():
    pipeline = tiny_flux()
    pipeline.transformer.transformer_blocks[0].attn.set_processor(SkippingProcessor())
    synthesizer = synthesizer_of(pipeline)
    with pytest.raises(
        LoRAError, match=rf"1 of 3 layers with a LoRA were not called in the first step \(first: '{TO_V}'\)"
    ):
        synthesizer.with_lora(flux_lora()).synthesize(PLAIN, seed=1)
    synthesizer.synthesize(PLAIN, seed=1)


def test_a_regions_lora_on_a_layer_that_nobody_calls_is_an_error():
    pipeline = tiny_flux()
    pipeline.transformer.transformer_blocks[0].attn.set_processor(SkippingProcessor())
    guide = aa.OutputMix(loras={"own": flux_lora()})
    plan = aa.Plan(PLAIN.prompt, (dataclasses.replace(LEFT.regions[0], lora="own"),))
    with pytest.raises(LoRAError, match="not called in the first step"):
        synthesizer_of(pipeline, guide=guide).synthesize(plan, seed=1)


def test_training_on_a_lora_that_does_not_act_is_an_error_after_the_first_step():
    pipeline = tiny_flux()
    pipeline.transformer.transformer_blocks[0].attn.set_processor(SkippingProcessor())
    steps = []
    with pytest.raises(LoRAError, match="not called in the first step"):
        aa.DifferentialLoRATrainer(rank=2, steps=3, batch_size=1, targets=r"ff\.net").train(
            [PAIR], synthesizer_of(pipeline).with_lora(flux_lora()), seed=0, progress=False, on_step=steps.append
        )
    assert not steps


@pytest.mark.parametrize("guide", [aa.OutputMix(), aa.RegionalAttention()])
def test_a_guide_of_a_model_that_the_pipeline_does_not_call_is_an_error(guide):
    pipeline = tiny_flux()
    other = tiny_flux().transformer

    class Stale(Flux):
        module = property(lambda _self: other)

    with pytest.raises(GuideError, match="a step was drawn without a call of the FluxTransformer2DModel"):
        synthesizer_of(pipeline, guide=guide, family=Stale).synthesize(LEFT, seed=1)


def test_attention_that_does_not_ask_its_processor_is_an_error():
    pipeline = tiny_flux()
    attention = pipeline.transformer.transformer_blocks[0].attn
    forward, processor = attention.forward, attention.processor
    attention.forward = lambda *args, **kwargs: processor(attention, *args, **kwargs)
    with pytest.raises(GuideError, match=r"1 of 3 attention layers .* did not compute regional attention"):
        synthesizer_of(pipeline, guide=aa.RegionalAttention()).synthesize(LEFT, seed=1)
    attention.forward = forward


class Whole(aa.Guide):
    """Halves the prediction of every picture, with regions or without."""

    @contextmanager
    def applied(self, run):
        hook = run.denoiser.module.register_forward_hook(lambda _module, _args, output: (output[0] / 2, *output[1:]))
        try:
            yield
        finally:
            hook.remove()


@pytest.mark.parametrize("way", [compile_in_place, compile_by_wrapping])
def test_a_guide_of_ones_own_is_asked_for_every_plan_and_its_hooks_run(way):
    reference, synthesizer = synthesizer_of(tiny_flux()), compiled(way)
    halved, plain = pixels(dataclasses.replace(reference, guide=Whole())), pixels(reference)
    for _ in range(2):
        assert_near(pixels(dataclasses.replace(synthesizer, guide=Whole())), halved, other=plain)
        assert np.abs(pixels(synthesizer) - plain).max() <= 1


def offloaded(pipeline):
    cpu = torch.device("cpu")
    pipeline.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    return pipeline


@pytest.mark.parametrize(
    "change",
    [offloaded, *(functools.partial(quantized, kind=kind) for kind in ("fp8 stored", "int8", "torchao int8"))],
    ids=["offloaded", "fp8", "bitsandbytes", "torchao"],
)
def test_a_lora_acts_on_offloaded_and_quantized_models_and_leaves_no_trace(change):
    synthesizer = synthesizer_of(change(tiny_flux()))
    module = synthesizer.pipeline.transformer
    replaced = {name: vars(layer).get("forward") for name, layer in module.named_modules()}
    changed, plain, again = (
        pixels(synthesizer.with_lora(flux_lora())),
        pixels(synthesizer),
        pixels(synthesizer.with_lora(flux_lora())),
    )
    assert {name: vars(layer).get("forward") for name, layer in module.named_modules()} == replaced
    assert (changed == again).all()
    assert np.abs(changed - plain).max() > 5
    assert (plain == pixels(synthesizer)).all()
