"""On a CUDA device: the results of a CPU, for every placement of the pipeline, within the estimated memory."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

import artaug as aa
from artaug.diffusion import DiffusersSynthesizer, estimate
from artaug.geometry import Box
from artaug.plan import Region
from support.published_flux import published_flux
from support.quantized import dequantized, quantized
from support.tiny_flux import TINY_SIZE, tiny_flux

pytestmark = pytest.mark.gpu

CARD = 24 * 2**30
SETTINGS = {
    "paired": dict,
    "two stages": lambda: {"objective": aa.TwoStage()},
    "preference": lambda: {"objective": aa.DirectPreference()},
    "slider": lambda: {"objective": aa.Bipolar()},
    "echo, gradient checkpointing, moving average": lambda: {"echo": 2, "gradient_checkpointing": True, "ema": 0.9},
    "LoKr": lambda: {"adapter": aa.LoKr(factor=4)},
    "DoRA": lambda: {"adapter": aa.DoRA(export_rank=32)},
    "eight bits": lambda: {"optimizer": aa.AdamW8bit(), "rank": 16},
    "prodigy": lambda: {"optimizer": aa.Prodigy(), "learning_rate": 1.0},
    "schedule-free": lambda: {"optimizer": aa.ScheduleFree()},
}
"""Made when their test runs: where a package of the extras is missing, the other tests of this file run."""


def pair_of(side=TINY_SIZE):
    before = Image.linear_gradient("L").resize((side, side)).convert("RGB")
    return aa.ImagePair(prompt="a red cone", seed=0, before=before, after=ImageChops.invert(before), plan=aa.Plan("a"))


def synthesizer_of(pipeline, *, side=TINY_SIZE, **loras):
    guide = aa.RegionalAttention(method="merged", loras=loras)
    return DiffusersSynthesizer(pipeline=pipeline, width=side, height=side, steps=2, guide=guide)


def training_of(pipeline, **options):
    arguments = {name: options.pop(name) for name in ("checkpoints", "on_step") if name in options}
    trainer = aa.DifferentialLoRATrainer(**{"rank": 4, "steps": 6, "batch_size": 2, "learning_rate": 1e-3, **options})
    return trainer.train([pair_of()], synthesizer_of(pipeline), seed=0, progress=False, **arguments)


def gap(lora, other):
    """The norm of the difference of two LoRAs over that of the second."""
    deltas = [(layer.delta().cpu(), other.layers[name].delta().cpu()) for name, layer in lora.layers.items()]
    difference, norm = (
        sum(delta.square().sum() for delta in side) for side in zip(*((a - b, b) for a, b in deltas), strict=True)
    )
    return float((difference / norm).sqrt())


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_a_gpu_learns_what_a_cpu_learns(options):
    on_gpu, on_cpu = training_of(tiny_flux().to("cuda"), **options()), training_of(tiny_flux(), **options())
    assert on_gpu.losses == pytest.approx(on_cpu.losses, rel=1e-2)
    assert gap(on_gpu.lora, on_cpu.lora) < 0.05


@pytest.mark.parametrize(
    "kind", ["fp8 stored", "torchao int8", "torchao float8", "bitsandbytes nf4", "bitsandbytes fp4"]
)
def test_a_quantized_base_gives_the_lora_of_plain_weights_of_the_same_values(kind):
    learned = training_of(quantized(tiny_flux(), kind).to("cuda"), gradient_checkpointing=True)
    oracle = training_of(dequantized(quantized(tiny_flux(), kind)).to("cuda"))
    assert gap(learned.lora, oracle.lora) < 0.05


def test_a_resumed_training_ends_bit_for_bit_as_one_never_stopped(tmp_path):
    uninterrupted = training_of(tiny_flux().to("cuda"), ema=0.9)

    def killed(event):
        if event.step == 5:
            raise KeyboardInterrupt

    checkpoints = aa.Checkpoints(folder=tmp_path, every=2)
    with pytest.raises(KeyboardInterrupt):
        training_of(tiny_flux().to("cuda"), ema=0.9, checkpoints=checkpoints, on_step=killed)
    resumed = training_of(tiny_flux().to("cuda"), ema=0.9, checkpoints=checkpoints)
    assert resumed.losses == uninterrupted.losses
    assert gap(resumed.lora, uninterrupted.lora) == 0


def by_model(pipeline):
    pipeline.enable_model_cpu_offload()


def by_layer(pipeline):
    pipeline.enable_sequential_cpu_offload()


def by_group(pipeline):
    pipeline.enable_group_offload(
        onload_device=torch.device("cuda"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )


@pytest.mark.parametrize("offloaded", [by_model, by_layer, by_group])
def test_an_offloaded_pipeline_draws_and_draws_with_what_was_learned(offloaded):
    lora = training_of(tiny_flux(), learning_rate=1e-2).lora
    plan = aa.Plan("a barn", (Region(Box(0, 0, 0.5, 1), "a red door", lora="own"),))
    pipeline = tiny_flux()
    offloaded(pipeline)
    drawn, expected = (
        synthesizer_of(pipeline, own=lora).with_lora(lora).synthesize(plan, seed=1)
        for pipeline in (pipeline, tiny_flux())
    )
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(expected)).max() <= 2


@pytest.mark.parametrize("offloaded", [by_model, by_layer])
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True, "ema": 0.9, "optimizer": aa.ScheduleFree()}])
def test_an_offloaded_pipeline_learns(offloaded, options):
    pipeline = tiny_flux()
    offloaded(pipeline)
    assert gap(training_of(pipeline, **options).lora, training_of(tiny_flux(), **options).lora) < 0.05


def test_groups_that_are_swapped_are_refused():
    pipeline = tiny_flux()
    by_group(pipeline)
    with pytest.raises(aa.ModelError, match="takes weights away before a backward pass needs them"):
        training_of(pipeline)


def test_blocks_that_are_compiled_are_trained():
    pipeline = tiny_flux().to("cuda")
    pipeline.transformer.compile_repeated_blocks()
    assert gap(training_of(pipeline).lora, training_of(tiny_flux().to("cuda")).lora) < 0.05


@pytest.mark.parametrize("storage", ["fp8", "nf4"])
def test_a_published_geometry_is_trained_within_a_card_of_24_gibibytes(storage):
    trainer = aa.DifferentialLoRATrainer(rank=16, steps=2, batch_size=1, gradient_checkpointing=True)
    pipeline = published_flux(storage)
    cost = estimate(pipeline, trainer=trainer, width=1024, height=1024)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_per_process_memory_fraction(CARD / torch.cuda.get_device_properties(0).total_memory)
    try:
        training = trainer.train([pair_of(1024)], synthesizer_of(pipeline, side=1024), seed=0, progress=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    peak = torch.cuda.max_memory_allocated()
    print(f"{storage}: {peak / 2**30:.2f} GiB held, {cost.peak_bytes / 2**30:.2f} estimated")  # noqa: T201 - for -rP
    assert all(layer.up.any() for layer in training.lora.layers.values())
    assert peak == pytest.approx(cost.peak_bytes, rel=0.1)
