"""Every method of computing regional attention against the definition: a softmax with weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from artaug.regional.attention import attention_with_lse, dense_attention, split_attention
from artaug.regional.attention_mask import cross_mask, text_mask
from artaug.regional.split_plan import plan_splits
from support.layouts import batches, layouts, random_qkv, random_tokens, reference_attention

PRICES = [len, lambda sizes: sum(size.queries * size.keys * (1 + size.is_masked) for size in sizes)]
"""Few kernels, strips among them; or few scores."""


def splits_of(masks, method="merged", price=PRICES[0], device="cpu", dtype=torch.float32):
    return plan_splits(masks, method, price).splits(torch.device(device), dtype)


def all_methods(mask, query, key, value):
    """Attention under a mask by every method there is."""
    methods = ("auto", "merged", *(["grouped"] if mask.is_hard else []))
    results = {
        (method, number): split_attention(query, key, value, splits_of([mask], method, price))
        for method in methods
        for number, price in enumerate(PRICES)
    }
    results["dense"] = dense_attention(query, key, value, mask.bias)
    return results


@settings(max_examples=150)
@given(layout=layouts(), batch=st.integers(1, 3), seed=st.integers(0, 99))
def test_every_method_is_the_definition(layout, batch, seed):
    query, key, value = random_qkv(layout.mask, seed=seed, batch=batch)
    expected = reference_attention(query, key, value, layout.mask)
    for method, result in all_methods(layout.mask, query, key, value).items():
        torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=0, msg=str(method))


@settings(max_examples=60)
@given(layout=layouts(hard=True))
def test_hard_layouts_are_hard_and_every_method_is_the_definition(layout):
    assert layout.mask.is_hard
    query, key, value = random_qkv(layout.mask)
    expected = reference_attention(query, key, value, layout.mask)
    results = all_methods(layout.mask, query, key, value)
    assert ("grouped", 0) in results
    for method, result in results.items():
        torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=0, msg=str(method))


@settings(max_examples=60)
@given(batch=batches(), seed=st.integers(0, 99))
def test_rows_of_unlike_layouts_are_computed_together_with_gradients(batch, seed):
    masks = batch.masks
    inputs = [tensor.requires_grad_() for tensor in random_qkv(masks[0], seed=seed, batch=len(masks))]
    rows = [[tensor[number : number + 1] for tensor in inputs] for number in range(len(masks))]
    expected = torch.cat([reference_attention(*row, mask) for row, mask in zip(rows, masks, strict=True)])
    dout = random_tokens(len(masks[0].weights), seed=9, batch=len(masks))
    expected_gradients = torch.autograd.grad(expected, inputs, dout.double())
    for method in ("merged", "dense"):
        for price in PRICES:
            result = split_attention(*inputs, splits_of(masks, method, price))
            torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=0)
            gradients = torch.autograd.grad(result, inputs, dout)
            torch.testing.assert_close(gradients, expected_gradients, atol=1e-5, rtol=1e-4)


@settings(max_examples=40)
@given(layout=layouts(max_regions=5))
def test_gradients_are_those_of_the_definition(layout):
    inputs = [tensor.requires_grad_() for tensor in random_qkv(layout.mask)]
    dout = random_tokens(len(layout.mask.weights), seed=9)
    expected = torch.autograd.grad(reference_attention(*inputs, layout.mask), inputs, dout.double())
    for method, result in all_methods(layout.mask, *inputs).items():
        for gradient, expected_gradient in zip(torch.autograd.grad(result, inputs, dout), expected, strict=True):
            torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-4, msg=str(method))


@given(layout=layouts(max_regions=6))
def test_cross_attention_and_attention_among_prompts_are_the_definition(layout):
    for mask in (
        cross_mask(layout.spans, layout.region_weights, layout.isolation),
        cross_mask(layout.spans, layout.region_weights, None),
        text_mask(layout.spans, layout.isolation),
    ):
        query, key, value = random_qkv(mask)
        expected = reference_attention(query, key, value, mask)
        for method, result in all_methods(mask, query, key, value).items():
            torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=0, msg=str(method))


@given(layout=layouts(max_regions=5))
def test_half_precision_stays_near_the_definition(layout):
    query, key, value = (tensor.bfloat16() for tensor in random_qkv(layout.mask))
    expected = reference_attention(query, key, value, layout.mask)
    result = split_attention(query, key, value, splits_of([layout.mask], dtype=query.dtype))
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double(), expected, atol=5e-2, rtol=0)


def test_the_log_sum_exp_is_the_logarithm_of_the_softmax_denominator():
    query, key, value = random_tokens(5), random_tokens(7, seed=1), random_tokens(7, seed=2)
    _, lse = attention_with_lse(query, key, value)
    torch.testing.assert_close(lse, (query @ key.mT / 8**0.5).logsumexp(dim=-1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(layout=layouts(max_regions=4))
def test_cuda_merges_to_the_definition(dtype, layout):
    query, key, value = (tensor.cuda().to(dtype) for tensor in random_qkv(layout.mask))
    splits = splits_of([layout.mask], device="cuda", dtype=dtype)
    expected = reference_attention(query.cpu(), key.cpu(), value.cpu(), layout.mask)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    result = split_attention(query, key, value, splits)
    torch.testing.assert_close(result.cpu().double(), expected, atol=tolerance, rtol=0)
