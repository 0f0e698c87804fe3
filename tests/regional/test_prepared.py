"""Attention prepared for a batch: every method on rows of unlike layouts, the choice by price, and what is kept."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

import artaug as aa
from artaug.regional import ELIGEN, Span, prepared
from artaug.regional.attention_costs import AttentionCosts, AttentionShape, costs_on
from artaug.regional.attention_mask import joint_mask
from artaug.regional.prepared import LayoutCache, PreparedAttention, prepare_attention
from artaug.regional.region_weights import split_grid
from artaug.regional.split_plan import plan_splits
from support.layouts import batches, random_qkv, reference_attention

CPU = torch.device("cpu")


def shape_of(rows, *, dtype=torch.float32, **others):
    return AttentionShape(device=CPU, dtype=dtype, rows=rows, heads=2, channels=8, **others)


@settings(max_examples=60)
@given(batch=batches(), data=st.data())
def test_every_method_computes_rows_of_unlike_layouts_in_any_order(batch, data):
    masks = batch.masks
    # Which layout each row of the batch has: each at least once.
    layout_of = data.draw(
        st.permutations([*range(len(masks)), *data.draw(st.lists(st.integers(0, len(masks) - 1), max_size=2))])
    )
    rows = [[row for row, layout in enumerate(layout_of) if layout == number] for number in range(len(masks))]
    query, key, value = random_qkv(masks[0], batch=len(layout_of))
    expected = torch.cat(
        [
            reference_attention(query[[row]], key[[row]], value[[row]], masks[layout])
            for row, layout in enumerate(layout_of)
        ]
    )
    methods = ("auto", "merged", "dense", *(["grouped"] if all(mask.is_hard for mask in masks) else []))
    for method in methods:
        attention = prepare_attention(masks, rows, method, shape_of(len(layout_of))).attention
        torch.testing.assert_close(attention(query, key, value).double(), expected, atol=1e-5, rtol=0, msg=method)


@settings(max_examples=30)
@given(batch=batches(), needs_grad=st.booleans())
def test_auto_is_never_dearer_than_another_way(batch, needs_grad):
    masks = batch.masks
    rows, shape = [[number] for number in range(len(masks))], shape_of(len(masks), needs_grad=needs_grad)
    options = {option.method: option.seconds for option in prepared.attention_options(masks, rows, "auto", shape)}
    assert {"auto", "dense"} <= set(options) <= {"auto", "dense", "apart"}
    assert prepare_attention(masks, rows, "auto", shape).method == min(options, key=options.get)


@settings(max_examples=30)
@given(batch=batches(), needs_grad=st.booleans())
def test_layouts_are_not_planned_apart_only_where_that_would_be_dearer(batch, needs_grad):
    masks, costs = batch.masks, costs_on(CPU, torch.float32)
    shape = shape_of(1, needs_grad=needs_grad)
    for mask in masks:
        plan = plan_splits([mask], "auto", lambda sizes: costs.split_seconds(sizes, shape))
        copying = prepared._copy_seconds(mask, 1, shape, costs)  # noqa: SLF001
        assert prepared._least_seconds(mask, 1, shape, costs) <= costs.split_seconds(plan.sizes, shape) + copying  # noqa: SLF001


def test_auto_holds_no_large_mask(monkeypatch):
    mask = two_halves(side=32)
    monkeypatch.setattr(prepared, "costs_on", lambda *_: costs_of_kernels_alone())
    assert prepare_attention([mask], [[0]], "auto", shape_of(1)).method == "dense"
    monkeypatch.setattr(prepared, "_MAX_MASK_BYTES", 1 << 20)
    chosen = prepare_attention([mask], [[0]], "auto", shape_of(1))
    assert (chosen.method, chosen.num_bytes <= 1 << 20) == ("auto", True)


def costs_of_kernels_alone():
    """Costs of a processor that computes at once, and takes its time to launch a kernel."""
    names = [item.name for item in fields(AttentionCosts) if item.name != "kernel"]
    return AttentionCosts(kernel=1.0, **dict.fromkeys(names, 0.0))


def two_halves(side):
    regions = [aa.Region(aa.Box(0, 0, 0.5, 1), "a"), aa.Region(aa.Box(0.5, 0, 1, 1), "b")]
    spans = (Span("text", 4, 1), Span("text", 4, 2), Span("text", 8, 0), Span("image", side**2))
    return joint_mask(spans, split_grid(regions, (side, side), base_weight=1.0), ELIGEN)


def test_auto_takes_flex_where_it_pays_back_its_compilation_and_says_so_once(monkeypatch, caplog):
    mask, costs = two_halves(side=16), replace(costs_on(CPU, torch.float32), flex=0.0, flex_compile=20.0)
    monkeypatch.setattr(prepared, "costs_on", lambda *_: costs)
    monkeypatch.setattr(prepared, "_flex_can_win", lambda _shape: True)  # as on CUDA
    prepared._tell_of_compilation.cache_clear()  # noqa: SLF001
    methods = [
        prepare_attention([mask], [[0]], "auto", shape_of(1, calls=calls)).method for calls in (10, 10**7, 10**7)
    ]
    assert methods[0] != "flex"
    assert methods[1:] == ["flex", "flex"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "takes about 20 s" in caplog.text
    prepare_attention([mask], [[0]], "flex", shape_of(1))  # who asks for it knows
    assert len(caplog.records) == 1


def test_rows_of_a_bias_begin_where_cuda_reads_them():
    mask = two_halves(side=3)  # 25 keys
    (split,) = plan_splits([mask], "dense", len).splits(CPU, torch.float32)
    assert split.bias.stride(-2) % 16 == 0
    torch.testing.assert_close(split.bias[0, 0], mask.bias)


def test_what_more_rows_cost_is_linear_in_them_but_for_the_kernels():
    sizes = plan_splits([two_halves(8)], "merged", len).sizes
    costs = costs_on(CPU, torch.float32)
    one, two, three = (costs.split_seconds(sizes, shape_of(rows)) for rows in (1, 2, 3))
    assert three - two == pytest.approx(two - one)
    assert one < two < 2 * one


def test_a_compilation_is_paid_back_over_the_drawings_to_come():
    costs = costs_on(torch.device("cuda"), torch.bfloat16)
    once, often = (costs.flex_seconds(100, 4096, shape_of(1, calls=calls)) for calls in (1, 100_000))
    assert once - often == pytest.approx(costs.flex_compile, rel=1e-3)


def kept(size):
    return PreparedAttention(functional.scaled_dot_product_attention, "dense", [torch.zeros(size, dtype=torch.uint8)])


def test_the_layouts_used_last_are_kept_up_to_a_number_of_bytes():
    cache, made = LayoutCache(100), []

    def get(key, size):
        def prepare():
            made.append(key)
            return kept(size)

        return cache.get_or_prepare(key, prepare)

    first = get("a", 40)
    get("b", 40)
    assert get("a", 40) is first
    get("c", 40)  # b was used longest ago
    assert get("a", 40) is first
    get("b", 40)
    assert made == ["a", "b", "c", "b"]
    get("large", 101)  # never fits, so it is not kept, nor does it push the others out
    get("large", 101)
    assert made[4:] == ["large", "large"]


def test_expected_drawings_below_one_are_refused():
    with pytest.raises(aa.InvalidValueError, match=r"expected_drawings=0\): expected 1 or more"):
        aa.RegionalAttention(expected_drawings=0)
