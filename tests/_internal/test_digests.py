"""Digests tell contents apart, and nothing but contents."""

import pytest
import torch

from artaug._internal.digests import digest, tensors_digest


def test_parts_do_not_run_into_each_other():
    parts = [("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), (b"abc",), ("ab", b"c"), ()]
    assert len({digest(*part) for part in parts}) == len(parts)
    assert len(digest()) == 64


def test_a_tensor_counts_with_its_type_shape_and_bits():
    zeros = torch.zeros(2, 3)
    others = [zeros.half(), zeros.reshape(3, 2), zeros.flatten(), -zeros, torch.tensor(0.0), torch.zeros(0)]
    assert len({digest(tensor) for tensor in (zeros, *others)}) == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool])
def test_strides_and_gradients_do_not_count(dtype):
    tensor = (torch.arange(6).reshape(2, 3) % 2).to(dtype)
    assert digest(tensor.T.contiguous().T) == digest(tensor)
    if dtype.is_floating_point:
        assert digest(tensor.clone().requires_grad_()) == digest(tensor)


def test_the_order_of_names_does_not_count_and_the_names_do():
    one, other = torch.zeros(2), torch.ones(2)
    assert tensors_digest({"a": one, "b": other}) == tensors_digest({"b": other, "a": one})
    assert tensors_digest({"a": one, "b": other}) != tensors_digest({"a": other, "b": one})
    assert tensors_digest({"a": one}) != tensors_digest({"b": one})
