"""Every method of computing regional attention against the definition: a softmax with weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from artaug.regional.attention import attention_with_lse, dense_attention, split_attention
from artaug.regional.attention_mask import cross_mask, text_mask
from artaug.regional.split_plan import plan_splits
from support.layouts import layouts, random_qkv, random_tokens, reference_attention


def all_methods(mask, query, key, value):
    """Attention under a mask by every method there is."""
    results = {method: split_attention(query, key, value, plan_splits(mask, method)) for method in ("auto", "merged")}
    if mask.is_hard:
        results["grouped"] = split_attention(query, key, value, plan_splits(mask, "grouped"))
    results["dense"] = dense_attention(query, key, value, mask.bias)
    return results


@settings(max_examples=150)
@given(layout=layouts(), batch=st.integers(1, 3), seed=st.integers(0, 99))
def test_every_method_is_the_definition(layout, batch, seed):
    query, key, value = random_qkv(layout.mask, seed=seed, batch=batch)
    expected = reference_attention(query, key, value, layout.mask)
    for method, result in all_methods(layout.mask, query, key, value).items():
        torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=0, msg=method)


@settings(max_examples=60)
@given(layout=layouts(hard=True))
def test_hard_layouts_are_hard_and_every_method_is_the_definition(layout):
    assert layout.mask.is_hard
    query, key, value = random_qkv(layout.mask)
    expected = reference_attention(query, key, value, layout.mask)
    results = all_methods(layout.mask, query, key, value)
    assert "grouped" in results
    for method, result in results.items():
        torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=0, msg=method)


@settings(max_examples=40)
@given(layout=layouts(max_regions=5))
def test_gradients_are_those_of_the_definition(layout):
    inputs = [tensor.requires_grad_() for tensor in random_qkv(layout.mask)]
    dout = random_tokens(len(layout.mask.weights), seed=9)
    expected = torch.autograd.grad(reference_attention(*inputs, layout.mask), inputs, dout.double())
    for method, result in all_methods(layout.mask, *inputs).items():
        for gradient, expected_gradient in zip(torch.autograd.grad(result, inputs, dout), expected, strict=True):
            torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-4, msg=method)


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
            torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=0, msg=method)


@given(layout=layouts(max_regions=5))
def test_half_precision_stays_near_the_definition(layout):
    query, key, value = (tensor.bfloat16() for tensor in random_qkv(layout.mask))
    expected = reference_attention(query, key, value, layout.mask)
    result = split_attention(query, key, value, plan_splits(layout.mask))
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
    splits = tuple(split.to(query.device) for split in plan_splits(layout.mask, "merged"))
    expected = reference_attention(query.cpu(), key.cpu(), value.cpu(), layout.mask)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    result = split_attention(query, key, value, splits)
    torch.testing.assert_close(result.cpu().double(), expected, atol=tolerance, rtol=0)
