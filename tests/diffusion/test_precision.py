"""Precision and device of a pipeline that is loaded: those of the checkpoint, part by part, and it draws and learns in them."""

import itertools
import logging
from functools import partial
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file

import artaug as aa
from artaug import playground
from artaug._internal.devices import check_placement, component_dtypes, computed_in, resolve_device
from artaug.critics import VLMCritic
from artaug.diffusion import DiffusersSynthesizer
from artaug.regional import OutputMix, RegionalAttention
from support.tiny_flux import TINY_SIZE, tiny_flux
from support.tiny_sd3 import tiny_sd3
from support.tiny_unet import tiny_sdxl

CPU = torch.device("cpu")
SIZE = {"width": TINY_SIZE, "height": TINY_SIZE, "steps": 2}
MIXED = [
    {"transformer": torch.bfloat16, "vae": torch.bfloat16, "text_encoder": torch.bfloat16},
    {"transformer": torch.bfloat16},
    {"vae": torch.bfloat16},
    {"text_encoder_2": torch.bfloat16},
    {"text_encoder": torch.bfloat16},
]


def saved_in(folder, pipeline, dtypes):
    for name, dtype in dtypes.items():
        getattr(pipeline, name).to(dtype)
    pipeline.save_pretrained(folder)
    return folder


def dtypes_of(pipeline):
    return {name: part.dtype for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
def test_each_part_keeps_the_precision_of_its_weights(tmp_path, dtypes):
    saved_in(tmp_path, tiny_flux(), dtypes)
    loaded = DiffusersSynthesizer.from_pretrained(tmp_path, device="cpu", **SIZE)
    expected = dict.fromkeys(("transformer", "vae", "text_encoder", "text_encoder_2"), torch.float32) | dtypes
    assert dtypes_of(loaded.pipeline) == expected
    given = DiffusersSynthesizer.from_pretrained(tmp_path, device="cpu", dtype=torch.float32, **SIZE)
    assert set(dtypes_of(given.pipeline).values()) == {torch.float32}


@pytest.mark.parametrize("make", [tiny_flux, tiny_sd3, tiny_sdxl])
@pytest.mark.parametrize("dtypes", MIXED, ids=str)
def test_parts_of_several_precisions_draw_and_learn_together(make, dtypes):
    pipeline = make()
    side = 64 if make is tiny_sdxl else TINY_SIZE
    size = {"width": side, "height": side, "steps": 2}
    plain = DiffusersSynthesizer(pipeline=pipeline, **size).synthesize(aa.Plan("a red barn"), seed=1)
    for name, dtype in dtypes.items():
        part = getattr(pipeline, "unet", None) if name == "transformer" else None
        (part or getattr(pipeline, name)).to(dtype)
    synthesizer = DiffusersSynthesizer(pipeline=pipeline, **size)
    drawn = synthesizer.synthesize(aa.Plan("a red barn"), seed=1)
    assert mean_difference(drawn, plain) < 12
    pair = aa.ImagePair(prompt="a red barn", before=plain, after=drawn)
    trainer = aa.DifferentialLoRATrainer(rank=2, steps=1, batch_size=1)
    assert trainer.train([pair], synthesizer, seed=0, progress=False).losses
    assert not any(part._forward_pre_hooks for part in modules_of(pipeline))  # noqa: SLF001 - torch has no other way to ask


@pytest.mark.parametrize("guide", [RegionalAttention(), OutputMix()], ids=repr)
@pytest.mark.parametrize("dtypes", MIXED[:2], ids=str)
def test_regions_steer_parts_of_several_precisions(guide, dtypes):
    pipeline = tiny_flux()
    door = aa.Region(aa.Box(0, 0, 0.5, 1), "a green door")
    plans = [aa.Plan("a red barn", (door,)), aa.Plan("a red barn")]
    in_float32 = DiffusersSynthesizer(pipeline=pipeline, guide=guide, **SIZE).synthesize_batch(plans, seeds=[1, 1])
    for name, dtype in dtypes.items():
        getattr(pipeline, name).to(dtype)
    mixed = DiffusersSynthesizer(pipeline=pipeline, guide=guide, **SIZE).synthesize_batch(plans, seeds=[1, 1])
    for image, expected in zip(mixed, in_float32, strict=True):
        assert mean_difference(image, expected) < 12


def modules_of(pipeline):
    parts = (part for part in pipeline.components.values() if isinstance(part, torch.nn.Module))
    return itertools.chain.from_iterable(part.modules() for part in parts)


def mean_difference(image, other):
    pairs = zip(image.tobytes(), other.tobytes(), strict=True)
    return sum(abs(one - two) for one, two in pairs) / len(image.tobytes())


def test_float16_becomes_float32_on_a_cpu_and_stays_on_a_gpu(tmp_path):
    saved_in(tmp_path, tiny_flux(), dict.fromkeys(("transformer", "vae"), torch.float16))
    loaded = DiffusersSynthesizer.from_pretrained(tmp_path, device="cpu", **SIZE)
    assert set(dtypes_of(loaded.pipeline).values()) == {torch.float32}
    assert component_dtypes(tmp_path, torch.device("cuda"))["transformer"] == torch.float16
    assert computed_in(torch.bfloat16, CPU) == torch.bfloat16


def test_weights_of_several_files_count_by_their_bytes_and_those_of_a_variant_do_not(tmp_path):
    folder = tmp_path / "unet"
    folder.mkdir()
    large, small = torch.zeros(64, 64, dtype=torch.bfloat16), {"norm.weight": torch.zeros(8)}
    save_file({"a.weight": large}, folder / "model-00001-of-00002.safetensors")
    save_file(small, folder / "model-00002-of-00002.safetensors")
    save_file({"a.weight": large.half()}, folder / "model.fp16.safetensors")
    index = '{"weight_map": {"a.weight": "model-00001-of-00002.safetensors", "norm.weight": "%s"}}'
    (folder / "model.safetensors.index.json").write_text(index % "model-00002-of-00002.safetensors", encoding="utf-8")
    assert component_dtypes(tmp_path, CPU) == {"unet": torch.bfloat16}


def test_weights_stored_in_eight_bits_are_computed_in_bfloat16(tmp_path):
    (tmp_path / "vae").mkdir()
    weights = {"a.weight": torch.zeros(8, dtype=torch.float8_e4m3fn), "a.weight.absmax": torch.zeros(64)}
    save_file(weights, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    assert component_dtypes(tmp_path, CPU) == {"vae": torch.bfloat16}


def test_what_was_loaded_is_said_once(tmp_path, caplog):
    saved_in(tmp_path, tiny_flux(), {"vae": torch.bfloat16})
    with caplog.at_level(logging.INFO, logger="artaug"):
        DiffusersSynthesizer.from_pretrained(tmp_path, device="cpu", **SIZE)
    (message,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("loaded")]
    assert str(tmp_path) in message
    assert "vae bfloat16" in message
    assert "on cpu, 0.00 GiB" in message


def test_auto_is_the_gpu_where_there_is_one():
    assert resolve_device("meta") == torch.device("meta")
    with patch("torch.accelerator.is_available", return_value=False):
        assert resolve_device("auto") == CPU
    gpu = torch.device("cuda")
    with (
        patch("torch.accelerator.is_available", return_value=True),
        patch("torch.accelerator.current_accelerator", return_value=gpu),
    ):
        assert resolve_device("auto") == gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="it has such a device")
@pytest.mark.parametrize(
    "load",
    [DiffusersSynthesizer.from_pretrained, partial(VLMCritic.from_pretrained, constrained=False)],
    ids=["pipeline", "critic"],
)
def test_a_device_that_this_machine_does_not_have_is_refused_before_anything_is_read(load):
    with pytest.raises(aa.ModelError, match=r"this machine has no device 'cuda:3': .*device='auto'"):
        load("me/nowhere", device="cuda:3")


@pytest.mark.parametrize("option", [{"dtype": None}, {"device": None}, {"dtype": torch.int8}], ids=str)
def test_none_is_neither_a_precision_nor_a_device(option):
    with pytest.raises(aa.InvalidValueError, match="'auto' for"):
        check_placement("load", **{"dtype": "auto", "device": "auto", **option})


def test_the_playground_is_float32_on_the_cpu():
    pipeline = playground.synthesizer().pipeline
    assert set(dtypes_of(pipeline).values()) == {torch.float32}
    assert pipeline.device == CPU
