"""The benchmark of single operations: a row for each, and a kernel that is missing does not end it."""

import json

import torch
from benchmarks import _flux as flux
from benchmarks import attention

from artaug.regional.attention import attention_with_lse, dense_attention
from support.tiny_geometry import TINY

LAYER = attention.Layer.of(TINY)
SIZES = attention.Sizes(squares=((1, 12), (2, 20)), pieces=((16, 4),), layouts=((8, 2),), backward=True)


def test_every_operation_has_a_row_with_what_a_fit_needs(monkeypatch):
    monkeypatch.setattr(attention, "_SECONDS_OF_A_SAMPLE", 0)
    rows = list(attention.measure_layer(LAYER, SIZES, flex=False))  # which takes a compiler half a minute
    measured = {row["operation"] for row in rows}
    assert measured >= {"launch", "gather", "scatter", "merge", "linear", "plain", "masked", "masked rows", "with lse"}
    assert measured >= {f"layout {method}" for method in ("plain", "dense", "merged", "grouped", "merged, backward")}
    assert all(row["seconds_low"] <= row["seconds"] <= row["seconds_high"] for row in rows)
    plain = next(row for row in rows if row["operation"] == "plain" and row["batch"] == 2)
    assert plain["flops"] == 4 * 2 * 20 * 20 * 32
    json.dumps(rows)
    assert len(attention.plot(rows).axes) == 2


def test_a_kernel_that_a_device_does_not_have_leaves_its_error_and_the_others_are_measured():
    def missing():
        raise RuntimeError("no kernel")

    absent, present = attention.timed(LAYER, {"absent": missing, "present": int}, batch=1, queries=4, keys=4)
    assert (absent["operation"], absent["error"]) == ("absent", "no kernel")
    assert present["seconds"] > 0


def test_what_is_timed_as_merging_merges():
    query, key, value = torch.randn(3, 1, 2, 6, 8)
    (first, lse), (second, lse_second) = (
        attention_with_lse(query, key[:, :, part], value[:, :, part]) for part in (slice(2), slice(2, 6))
    )
    merged, total = attention.merge(first, second, lse, lse_second)
    torch.testing.assert_close(merged, dense_attention(query, key, value, torch.zeros(6, 6)))
    torch.testing.assert_close(total, attention_with_lse(query, key, value)[1])


def test_the_density_is_the_share_of_tiles_that_the_cost_of_flex_counts():
    side, regions = 32, 4
    mask = attention.mask_of(LAYER, side, regions)
    flex_mask = flux.FlexMask.of(mask, torch.device("cpu"))
    tiles = attention.tile_density(flex_mask) * (-(-len(mask.groups) // flux.TILE)) ** 2
    areas = tuple(attention.aa.Region(box, "a") for box in flux.boxes(regions, side=side))
    setting = flux.Setting(geometry=TINY, model=TINY.model(), side=side, regions=areas, isolation=attention.ELIGEN)
    layers, channels = 3, 32
    counted = flux.step_cost(setting, "flex").attention_flops / (4 * channels * layers * flux.TILE**2)
    assert round(tiles) == counted
