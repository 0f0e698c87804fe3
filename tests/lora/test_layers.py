"""Updates of convolutions: applied, fused, compressed and baked, each is the dense update of the weight."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import artaug as aa
from artaug.errors import LoRAMismatchError
from artaug.lora.layers import weight_shape

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@st.composite
def convolutions(draw):
    """A random convolution, and an input for it."""
    axes, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    layer = CONVOLUTIONS[axes](
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        stride=draw(st.integers(1, 2)),
        padding=draw(st.integers(0, 1)),
        dilation=draw(st.integers(1, 2)),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "replicate", "circular"])),
    )
    return layer, torch.randn(2, layer.in_channels, *(7,) * axes)


def update_of(layer, *, rank=2, scale=1.0):
    outputs, *rest = weight_shape(layer)
    return aa.LowRank(scale * torch.randn(rank, *rest), torch.randn(outputs, rank))


@given(layer_and_input=convolutions(), scale=st.sampled_from([1.0, -0.5]))
def test_an_applied_update_equals_the_update_of_the_weight(layer_and_input, scale):
    layer, pixels = layer_and_input
    module, update = nn.Sequential(layer), update_of(layer)
    before = module(pixels)
    with aa.LoRA({"0": update}).applied_to(module, scale=scale):
        output = module(pixels)
    assert torch.equal(module(pixels), before)
    layer.weight.data += scale * update.delta()
    torch.testing.assert_close(output, module(pixels), rtol=1e-4, atol=1e-4)


def test_an_update_of_another_kernel_is_refused_before_anything_changes():
    module = nn.Sequential(nn.Conv2d(4, 8, 3))
    for shape in ((2, 4), (2, 4, 1, 1)):
        lora = aa.LoRA({"0": aa.LowRank(torch.ones(shape), torch.ones(8, 2))})
        with pytest.raises(LoRAMismatchError, match=r"in Sequential it has \(8, 4, 3, 3\)"), lora.applied_to(module):
            pytest.fail("the block ran")


def test_convolutions_are_added_exactly_and_compressed_as_matrices():
    layer = nn.Conv2d(6, 8, 3)
    loras = [aa.LoRA({"conv": update_of(layer, rank=rank)}) for rank in (2, 3)]
    total = sum(lora.layers["conv"].delta() for lora in loras)
    exact = aa.ConcatFuser().fuse(loras).layers["conv"]
    torch.testing.assert_close(exact.delta(), total)
    compressed = aa.SvdFuser(rank=2).fuse(loras).layers["conv"]
    assert (compressed.rank, compressed.shape) == (2, (8, 6, 3, 3))
    singular_values = torch.linalg.svdvals(total.flatten(1))
    error = (compressed.delta() - total).norm()
    torch.testing.assert_close(error, singular_values[2:].square().sum().sqrt(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_convolutions_are_baked(tmp_path, dtype):
    weight = torch.randn(8, 6, 3, 3).to(dtype)
    save_file({"conv.weight": weight, "conv.bias": torch.ones(8)}, tmp_path / "in.safetensors")
    update = update_of(nn.Conv2d(6, 8, 3))
    aa.bake(tmp_path / "in.safetensors", aa.LoRA({"conv": update}), tmp_path / "out.safetensors", progress=False)
    baked = load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close(baked["conv.weight"], (weight.float() + update.delta()).to(dtype), rtol=1e-2, atol=1e-5)
    assert torch.equal(baked["conv.bias"], torch.ones(8))
