"""The benchmark of single operations: a row for each, and a kernel that is missing does not end it."""

import json

import torch
from benchmarks import attention

from artaug.regional.attention import attention_with_lse, dense_attention
from artaug.regional.attention_costs import TILE
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


def test_the_density_is_the_share_of_tiles_with_a_visible_pair():
    mask = attention.mask_of(LAYER, 32, 4)
    flex_mask = attention.FlexMask.of([mask], torch.device("cpu"))
    visible = (mask.weights[:, mask.groups] > 0)[flex_mask.query_order[0]][:, flex_mask.key_order[0]]
    padded = torch.nn.functional.pad(visible, (0, -visible.shape[1] % TILE, 0, -visible.shape[0] % TILE))
    tiles = padded.unfold(0, TILE, TILE).unfold(1, TILE, TILE).any(dim=-1).any(dim=-1)
    assert attention.tile_density(flex_mask) == tiles.float().mean()
