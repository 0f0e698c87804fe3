"""On a CUDA device: what a CPU would have learned, however the pipeline is placed, within the memory that was said."""

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
RECIPES = {
    "paired": {},
    "two stages": {"objective": aa.TwoStage()},
    "preference": {"objective": aa.DirectPreference()},
    "slider": {"objective": aa.Bipolar()},
    "echo, recomputing, average": {"echo": 2, "gradient_checkpointing": True, "ema": 0.9},
    "LoKr": {"adapter": aa.LoKr(factor=4)},
    "DoRA": {"adapter": aa.DoRA(export_rank=32)},
    "eight bits": {"optimizer": aa.AdamW8bit(), "rank": 16},
    "prodigy": {"optimizer": aa.Prodigy(), "learning_rate": 1.0},
    "schedule-free": {"optimizer": aa.ScheduleFree()},
}


def pair_of(side=TINY_SIZE):
    before = Image.linear_gradient("L").resize((side, side)).convert("RGB")
    return aa.ImagePair(prompt="a red cone", seed=0, before=before, after=ImageChops.invert(before), plan=aa.Plan("a"))


def synthesizer_of(pipeline, *, side=TINY_SIZE, **loras):
    guide = aa.RegionalAttention(method="merged", loras=loras)
    return DiffusersSynthesizer(pipeline=pipeline, width=side, height=side, steps=2, guide=guide)


def training_of(pipeline, **options):
    seams = {name: options.pop(name) for name in ("checkpoints", "on_step") if name in options}
    trainer = aa.DifferentialLoRATrainer(**{"rank": 4, "steps": 6, "batch_size": 2, "learning_rate": 1e-3, **options})
    return trainer.train([pair_of()], synthesizer_of(pipeline), seed=0, progress=False, **seams)


def gap(lora, other):
    """How far apart two LoRAs are, in units of the second."""
    deltas = [(layer.delta().cpu(), other.layers[name].delta().cpu()) for name, layer in lora.layers.items()]
    apart, whole = (
        sum(one.square().sum() for one in some) for some in zip(*((a - b, b) for a, b in deltas), strict=True)
    )
    return float((apart / whole).sqrt())


@pytest.mark.parametrize("options", RECIPES.values(), ids=RECIPES)
def test_a_gpu_learns_what_a_cpu_learns(options):
    here, there = training_of(tiny_flux().to("cuda"), **options), training_of(tiny_flux(), **options)
    assert here.losses == pytest.approx(there.losses, rel=1e-2)
    assert gap(here.lora, there.lora) < 0.05


@pytest.mark.parametrize(
    "kind", ["fp8 stored", "torchao int8", "torchao float8", "bitsandbytes nf4", "bitsandbytes fp4"]
)
def test_on_a_quantized_base_it_learns_what_the_same_numbers_teach(kind):
    here = training_of(quantized(tiny_flux(), kind).to("cuda"), gradient_checkpointing=True)
    there = training_of(dequantized(quantized(tiny_flux(), kind)).to("cuda"))
    assert gap(here.lora, there.lora) < 0.05


def test_a_resumed_training_ends_bit_for_bit_as_one_never_stopped(tmp_path):
    whole = training_of(tiny_flux().to("cuda"), ema=0.9)

    def killed(event):
        if event.step == 5:
            raise KeyboardInterrupt

    checkpoints = aa.Checkpoints(folder=tmp_path, every=2)
    with pytest.raises(KeyboardInterrupt):
        training_of(tiny_flux().to("cuda"), ema=0.9, checkpoints=checkpoints, on_step=killed)
    resumed = training_of(tiny_flux().to("cuda"), ema=0.9, checkpoints=checkpoints)
    assert resumed.losses == whole.losses
    assert gap(resumed.lora, whole.lora) == 0


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
    drawn, wanted = (
        synthesizer_of(one, own=lora).with_lora(lora).synthesize(plan, seed=1) for one in (pipeline, tiny_flux())
    )
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(wanted)).max() <= 2


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
    told = estimate(pipeline, trainer=trainer, width=1024, height=1024)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_per_process_memory_fraction(CARD / torch.cuda.get_device_properties(0).total_memory)
    try:
        training = trainer.train([pair_of(1024)], synthesizer_of(pipeline, side=1024), seed=0, progress=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    most = torch.cuda.max_memory_allocated()
    print(f"{storage}: {most / 2**30:.2f} GiB held, {told.peak_bytes / 2**30:.2f} said")  # noqa: T201 - for -rP
    assert all(layer.up.any() for layer in training.lora.layers.values())
    assert most == pytest.approx(told.peak_bytes, rel=0.1)
