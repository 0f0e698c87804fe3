"""Maps of keys against the dense matrix of probabilities: values, gradients, blocks, biases, memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from artaug.regional import key_maps as key_maps_module
from artaug.regional.attention import attention_with_lse
from artaug.regional.attention_mask import GroupMask
from artaug.regional.bias import GroupBias, MaskBias, WindowBias
from artaug.regional.key_maps import key_maps


def tokens(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense_maps(query, key, selected, members, *, bias=None, heads=False):
    """The definition: the whole softmax, then the columns of the selected keys."""
    scores = query @ key.mT / query.shape[-1] ** 0.5
    probs = (scores if bias is None else scores + bias).softmax(dim=-1)
    columns = torch.stack([row_probs[:, :, row] for row_probs, row in zip(probs, selected, strict=True)])
    maps = torch.einsum("bhqs,bms->bmhq", columns, members.to(probs))
    return maps if heads else maps.mean(dim=2)


def case(batch=2, heads=3, queries=5, keys=7, selected=4, maps=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(keys, generator=generator)[:selected] for _ in range(batch)])
    members = torch.randint(2, (batch, maps, selected), generator=generator).double()
    query, key = tokens(batch, heads, queries, 4, seed=seed, dtype=dtype), tokens(batch, heads, keys, 4, seed=seed + 1)
    return query.requires_grad_(), key.to(dtype).requires_grad_(), chosen, members


@given(st.integers(0, 10**6), st.booleans(), st.sampled_from([1, 12, 10**6]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_maps_and_their_gradients_are_those_of_the_dense_softmax(seed, heads, block, biased):
    query, key, selected, members = case(seed=seed)
    bias = tokens(2, 1, 5, 7, seed=seed + 2) if biased else None
    original, key_maps_module._BLOCK_SCORES = key_maps_module._BLOCK_SCORES, block  # noqa: SLF001 - small blocks
    try:
        mask = None if bias is None else MaskBias(bias)
        maps = key_maps(query, key, selected, members, bias=mask, heads=heads)
        expected = dense_maps(query, key, selected, members, bias=bias, heads=heads)
        weights = tokens(*maps.shape, seed=seed + 3)
        gradients = torch.autograd.grad((maps * weights).sum(), [query, key])
    finally:
        key_maps_module._BLOCK_SCORES = original  # noqa: SLF001 - likewise
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad((expected * weights).sum(), [query, key]))


def test_gradients_are_finite_differences():
    query, key, selected, members = case(batch=1, heads=2, queries=3, keys=4, selected=2)
    assert torch.autograd.gradcheck(lambda *inputs: key_maps(*inputs, selected, members), (query, key))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_log_sum_exp_of_the_kernel_gives_the_same_maps_and_gradients(dtype):
    query, key, selected, members = case(queries=33, keys=40, dtype=dtype)
    _, lse = attention_with_lse(query, key, key)
    maps = key_maps(query, key, selected, members, lse=lse.detach())
    exact = [tensor.detach().double().requires_grad_() for tensor in (query, key)]
    expected = dense_maps(*exact, selected, members)
    tolerance = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 4e-3, "rtol": 2e-2}
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.double(), expected, **tolerance)
    gradients = torch.autograd.grad(maps.square().sum(), [query, key])
    for gradient, reference in zip(gradients, torch.autograd.grad(expected.square().sum(), exact), strict=True):
        torch.testing.assert_close(gradient.double(), reference, **tolerance)


def test_autocast_does_not_round_the_maps():
    query, key, selected, members = case(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        maps = key_maps(query, key, selected, members)
    assert torch.equal(maps, key_maps(query, key, selected, members))


@pytest.mark.parametrize("rows", [1, 2])
def test_the_weights_of_a_group_mask_are_a_bias(rows):
    query, key, selected, members = case()
    masks = [
        GroupMask(torch.rand(5, 3, generator=torch.Generator().manual_seed(row)) + 0.1, groups, (slice(0, 5),))
        for row, groups in enumerate((torch.tensor([0, 1, 2, 0, 1, 2, 0]), torch.tensor([2, 2, 2, 1, 1, 0, 0])))
    ][:rows]
    masks[0].weights[2, 1] = 0  # hidden
    bias = torch.stack([mask.bias for mask in masks])[:, None].double()
    maps = key_maps(query, key, selected, members, bias=GroupBias.of_masks(masks, query.device))
    torch.testing.assert_close(maps, dense_maps(query, key, selected, members, bias=bias), atol=1e-6, rtol=1e-6)


def test_a_window_of_keys_is_a_softmax_over_what_each_row_sees_of_it():
    query, key, _, members = case()
    selected = torch.tensor([[2, 3, 4, 2], [3, 4, 5, 3]])
    mask = tokens(2, 1, 5, 7, seed=9)
    seen = [slice(2, 5), slice(3, 6)]
    hidden = torch.full((2, 1, 1, 7), -torch.inf)
    for row, part in enumerate(seen):
        hidden[row, ..., part] = 0
    bias = WindowBias.of_keys(MaskBias(mask), slice(2, 6), seen, key.device)
    maps = key_maps(query, key[:, :, 2:6], selected - 2, members, bias=bias)
    expected = dense_maps(query, key, selected, members, bias=mask + hidden)
    torch.testing.assert_close(maps, expected)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_no_matrix_of_queries_and_keys_is_in_memory(monkeypatch):
    monkeypatch.setattr(key_maps_module, "_BLOCK_SCORES", 1 << 14)
    query, key, selected, members = case(batch=1, heads=2, queries=512, keys=600, dtype=torch.float32)
    _, lse = attention_with_lse(query, key, key)
    with Largest() as forward:
        maps = key_maps(query, key, selected, members, lse=lse.detach())
    with Largest() as backward:
        maps.sum().backward()
    assert forward.numel <= 2 * 512 * 4
    assert backward.numel <= 1 << 14
