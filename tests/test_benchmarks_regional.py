"""The benchmark of a guided step: what it counts is what torch counts, and every method has its row."""

import json

import pytest
import torch
from benchmarks import _flux as flux
from benchmarks import regional
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import artaug as aa
from artaug.regional import ELIGEN, INSTANTX, INVOKEAI, OPEN
from artaug.regional.flex import TILE
from support.tiny_geometry import TINY

SDPA_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 - has no other name


def tiny_setting(*, count=4, side=16, feather=0.0, isolation=ELIGEN):
    regions = tuple(aa.Region(box, "a", feather=feather) for box in flux.boxes(count, side=side))
    return flux.Setting(geometry=TINY, model=TINY.model(), side=side, regions=regions, isolation=isolation)


def flops_by_torch(setting, method):
    """FLOPs of linear layers and of attention; the preparation of the layout is neither."""
    mapping = {SDPA_ON_CPU: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with regional.steering(setting, regional.make_guide(method, setting.isolation)), counter:
        setting.step()
    counts = counter.get_flop_counts()["Global"]
    return counts[torch.ops.aten.addmm], counts[SDPA_ON_CPU]


@pytest.mark.parametrize("method", ["plain", "dense", "merged", "grouped", "output_mix"])
@pytest.mark.parametrize("isolation", [OPEN, ELIGEN, INVOKEAI], ids=["open", "eligen", "invokeai"])
def test_flops_are_those_that_torch_counts(method, isolation):
    if method == "grouped" and isolation is INVOKEAI:
        isolation = aa.Isolation(image_to_image="regions", block_stride=2)
    setting = tiny_setting(isolation=isolation)

    cost = flux.step_cost(setting, method)

    assert (cost.linear_flops, cost.attention_flops) == flops_by_torch(setting, method)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_flops_of_soft_regions_too(count):
    setting = tiny_setting(count=count, feather=0.05)

    cost = flux.step_cost(setting, "merged")

    assert (cost.linear_flops, cost.attention_flops) == flops_by_torch(setting, "merged")


def test_a_tile_with_a_visible_pair_counts_for_flex():
    setting = tiny_setting(isolation=INSTANTX, side=32)
    mask = flux.mask_of(setting, isolated=True)
    flex_mask = flux.FlexMask.of(mask, torch.device("cpu"))
    visible = (mask.weights[:, mask.groups] > 0)[flex_mask.query_order][:, flex_mask.key_order]
    padded = torch.nn.functional.pad(visible, (0, -visible.shape[1] % TILE, 0, -visible.shape[0] % TILE))
    tiles = padded.unfold(0, TILE, TILE).unfold(1, TILE, TILE).any(dim=-1).any(dim=-1)

    cost = flux.step_cost(setting, "flex")

    layers, channels = 3, 32
    assert cost.attention_flops == 4 * int(tiles.sum()) * TILE**2 * channels * layers


def test_only_dense_attention_holds_a_mask_of_queries_times_keys():
    setting = tiny_setting()
    tokens = 16 * 16 + 12 + 4 * 4

    mask_bytes = {method: flux.step_cost(setting, method).mask_bytes for method in regional.METHODS}

    assert mask_bytes["dense"] == 4 * tokens**2
    assert mask_bytes["plain"] == mask_bytes["output_mix"] == 0
    assert 0 < max(mask_bytes["merged"], mask_bytes["grouped"]) < mask_bytes["dense"] / 50


@given(st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([16, 32, 48, 64, 128]))
def test_boxes_lie_along_the_grid_and_apart(count, side):
    boxes = flux.boxes(count, side=side)

    assert len(boxes) == count
    assert all(box.overlap(other) == 0 for number, box in enumerate(boxes) for other in boxes[:number])
    edges = [edge * side for box in boxes for edge in (box.left, box.top, box.right, box.bottom)]
    assert edges == pytest.approx([round(edge) for edge in edges], abs=1e-9)


def test_the_step_benchmark_has_a_row_for_every_method(monkeypatch):
    methods = tuple(method for method in regional.METHODS if method != "flex")  # which takes a compiler half a minute
    monkeypatch.setitem(regional.LAYOUTS, "hard", regional.Layouts(methods=methods))

    rows = list(regional.measured(TINY, [regional.Series(kind="hard", side=16, counts=(1, 2))], rounds=2))

    assert [(row["method"], row["regions"]) for row in rows] == [
        (method, count) for count in (1, 2) for method in methods
    ]
    assert {"method", "regions", "tokens", "seconds", "ratio_to_plain", "peak_bytes"} <= set(rows[0])
    weights = sum(weight.numel() * 4 for weight in TINY.model().parameters())
    assert all(row["peak_bytes"] > weights for row in rows)
    assert {row["ratio_to_plain"] for row in rows if row["method"] == "plain"} == {1}
    peaks = {row["method"]: row["peak_bytes"] for row in rows if row["regions"] == 2}
    assert peaks["dense"] > peaks["merged"] > peaks["plain"]
    json.dumps(rows)
    assert len(regional.plot(rows).axes) == 1
