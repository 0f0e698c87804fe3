"""A device without float64, as Apple's MPS: what needs float64 is computed on the CPU, and goes back in float32."""

import re
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import artaug as aa
from artaug.diffusion import DiffusersSynthesizer
from artaug.training.noise_schedule import EpsilonPrediction, FlowMatching, VPrediction
from support.tiny_unet import tiny_sd15

SOURCES = sorted((Path(__file__).parents[1] / "src" / "artaug").rglob("*.py"))
READ_FROM_FILES = {"lora/formats/verification.py"}
"""Modules whose tensors come from a file, and are on the CPU."""


class Meta32(TorchDispatchMode):
    """The meta device as one that computes in float32: a tensor in float64 is refused, one on its way to the CPU is ones."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        moved = func is torch.ops.aten._to_copy.default and args[0].is_meta  # noqa: SLF001 - the name of the operation
        if moved and torch.device(kwargs.get("device") or "meta").type == "cpu":
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        output = func(*args, **kwargs)
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta and tensor.dtype == torch.float64:
                raise TypeError(
                    "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
                )
        return output


def test_the_stand_in_refuses_float64_and_reads_tensors_on_the_cpu():
    with Meta32():
        tensor = torch.zeros(2, device="meta")
        with pytest.raises(TypeError, match="float64"):
            tensor.double()
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(2, dtype=torch.float64).to("meta")
        assert tensor.cpu().double().tolist() == [1, 1]


def on_meta(*shape):
    return torch.zeros(*shape, device="meta")


WEIGHTINGS = [
    (aa.MinSNR(), EpsilonPrediction()),
    (aa.MinSNR(), VPrediction()),
    (aa.BellShaped(), FlowMatching()),
]


@pytest.mark.parametrize(("weighting", "noise_schedule"), WEIGHTINGS, ids=str)
def test_weights_by_noise_level(weighting, noise_schedule):
    with Meta32():
        weights = weighting.weights(noise_schedule, on_meta(3))
    assert (weights.device.type, weights.dtype) == ("meta", torch.float32)


def test_the_timesteps_of_a_unet():
    pipeline = tiny_sd15()
    family = DiffusersSynthesizer(pipeline=pipeline, width=64, height=64)._bound_family  # noqa: SLF001 - no other way to its timesteps
    with Meta32():
        assert family._nearest_timesteps(on_meta(2)).shape == (2,)  # noqa: SLF001 - likewise


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_what_becomes_float64_is_on_the_cpu(path):
    """A tensor of a model or a LoRA may be anywhere: only one that was made here, or read by ``cpu()``, is on the CPU."""
    text = path.read_text(encoding="utf-8")
    if path.as_posix().endswith(tuple(READ_FROM_FILES)):
        return
    for line in text.splitlines():
        for before in re.findall(r"(\S*)\.double\(\)", line):
            assert before.endswith((".cpu()", "to_array())", ".clamp(min=0)", "cut")), line
