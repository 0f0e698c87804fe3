"""Digests tell contents apart, and nothing but contents."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from artaug._internal.digests import condensed, digest, tensors_digest, tensors_key


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


@given(count=st.integers(1, 20_000), position=st.integers(0, 10**6), bit=st.integers(0, 15))
def test_a_condensed_tensor_differs_in_every_lane_wherever_one_bit_does(count, position, bit):
    tensor = torch.randint(-(2**15), 2**15, (count,), dtype=torch.int16, generator=torch.Generator().manual_seed(count))
    other = tensor.clone()
    other[position % count] ^= -(2**15) if bit == 15 else 2**bit
    first, second = condensed(tensor), condensed(other)
    row = position % count * 2 // 2**14
    assert bool((first[row] != second[row]).all())
    assert torch.equal(first[:row], second[:row])
    assert torch.equal(first[row + 1 :], second[row + 1 :])
    assert torch.equal(condensed(tensor.view(1, -1).T.contiguous().T), first)  # strides do not count


def test_a_condensed_row_is_the_sum_of_its_words_by_python_integers():
    words = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    units = condensed(torch.eye(4096, dtype=torch.int32)).tolist()  # a row each: the weights themselves
    for lane, value in enumerate(condensed(words)[0].tolist()):
        assert (sum(unit[lane] * word for unit, word in zip(units, words.tolist(), strict=True)) - value) % 2**64 == 0


def test_condensing_divides_what_leaves_the_device_by_hundreds():
    text = torch.zeros(1, 512, 4096, dtype=torch.bfloat16)
    hashes = condensed(text)
    assert text.numel() * text.element_size() == 512 * hashes.numel() * hashes.element_size()


def test_a_key_counts_names_types_shapes_and_bits_and_not_the_order():
    one, other = torch.zeros(2), torch.ones(2)
    alike = [{"a": one, "b": other}, {"b": other.clone(), "a": one.clone()}]
    unlike = [{"a": other, "b": one}, {"a": one}, {"b": one}, {"a": one.half()}, {"a": one[None]}, {"a": -one}]
    assert len({tensors_key(tensors) for tensors in alike}) == 1
    assert len({tensors_key(tensors) for tensors in (*alike, *unlike)}) == 1 + len(unlike)
