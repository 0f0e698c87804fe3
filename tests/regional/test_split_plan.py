"""The plan of passes: what is computed, and that nothing is computed twice for nothing."""

import pytest
import torch
from hypothesis import given, settings

import artaug as aa
from artaug.regional import ELIGEN
from artaug.regional.attention_mask import joint_sight
from artaug.regional.denoiser import Span
from artaug.regional.flex import TILE, FlexSight
from artaug.regional.region_weights import divided
from artaug.regional.split_plan import passes
from support.layouts import layouts


def numbers(tokens, count):
    return torch.arange(count)[tokens]


@settings(max_examples=60)
@given(layout=layouts())
def test_every_pair_that_is_seen_is_in_exactly_one_pass_with_its_weight(layout):
    sight = layout.sight
    whole = sight.weights / sight.weights.amax(dim=1, keepdim=True)
    wanted = whole[:, sight.groups]
    for how in ("auto", "merged", *(["grouped"] if sight.is_hard else [])):
        total = torch.zeros_like(wanted)
        for one in passes(sight, how):
            queries = numbers(one.queries, len(wanted))
            keys = torch.cat([numbers(some, wanted.shape[1]) for some in one.keys])
            total[queries[:, None], keys] += torch.ones(()) if one.bias is None else one.bias.exp()[:, None]
        torch.testing.assert_close(total, wanted)


def test_what_most_tokens_see_is_one_pass_of_neighbours():
    spans = (Span("text", 2, 1), Span("text", 3, 0), Span("image", 8))
    upper = aa.Region(aa.Box(0, 0, 1, 0.5), "the upper half")
    sight = joint_sight(spans, divided([upper], (4, 2), base_weight=1.0), ELIGEN)
    plain, told, added = passes(sight, "merged")
    assert (plain.queries, plain.keys, plain.stage) == (slice(2, 13), (slice(2, 13),), "first")
    assert (told.queries, told.keys, told.stage) == (slice(5, 9), (slice(0, 2),), "later")
    assert (added.queries, added.keys, added.stage) == (slice(0, 2), (slice(0, 2), slice(5, 9)), "alone")


@settings(max_examples=60)
@given(layout=layouts())
def test_every_query_begins_once_and_before_it_is_merged(layout):
    begun = torch.zeros(len(layout.sight.weights), dtype=torch.bool)
    for one in passes(layout.sight):
        queries = numbers(one.queries, len(begun))
        assert (begun[queries] == (one.stage == "later")).all()
        begun[queries] = True
    assert begun.all()


def test_grouping_soft_weights_is_refused():
    spans = (Span("text", 1, 0), Span("text", 1, 1), Span("image", 4))
    soft = aa.Region(aa.Box(0, 0, 0.4, 1), "a")
    with pytest.raises(aa.GuideError, match="Use 'merged'"):
        passes(joint_sight(spans, divided([soft], (1, 4), base_weight=0.0), ELIGEN), "grouped")


@settings(max_examples=40)
@given(layout=layouts(most=5))
def test_the_block_mask_lists_just_the_tiles_somebody_sees(layout):
    flexed = FlexSight.of(layout.sight, torch.device("cpu"))
    sight = layout.sight
    seen = sight.weights[flexed.queries][:, sight.groups[flexed.keys]] > 0
    rows, columns = (-(-length // TILE) for length in seen.shape)
    padded = torch.zeros(rows * TILE, columns * TILE)
    padded[: seen.shape[0], : seen.shape[1]] = seen
    tiles = padded.reshape(rows, TILE, columns, TILE).sum(dim=(1, 3))
    mask = flexed.block_mask
    for counts, listed, wanted in (
        (mask.kv_num_blocks, mask.kv_indices, (tiles > 0) & (tiles < TILE * TILE)),
        (mask.full_kv_num_blocks, mask.full_kv_indices, tiles == TILE * TILE),
    ):
        for row in range(rows):
            assert set(listed[0, 0, row, : counts[0, 0, row]].tolist()) == set(wanted[row].nonzero()[:, 0].tolist())
