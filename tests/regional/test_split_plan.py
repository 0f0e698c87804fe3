"""The plan of splits: every visible pair is computed once, and what is copied is as little as possible."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import artaug as aa
from artaug.regional import ELIGEN
from artaug.regional.attention_mask import GroupMask, joint_mask
from artaug.regional.denoiser import Span
from artaug.regional.region_weights import split_grid
from artaug.regional.split_plan import plan_splits
from artaug.regional.splits import gather
from support.layouts import batches, layouts, random_tokens

CPU = torch.device("cpu")


def FEW_SCORES(sizes):  # noqa: N802 - a constant
    return sum(size.queries * size.keys * (1 + size.is_masked) for size in sizes)


PRICES = [len, FEW_SCORES, lambda sizes: sum(size.is_masked for size in sizes)]
"""Prices that lead to different plans."""


def token_numbers(index, count):
    return torch.arange(count)[index]


def numbers_of(split, num_keys):
    return torch.cat([token_numbers(index, num_keys) for index in split.keys])


def total_weights(splits, masks):
    """What every pair of query and key counts in the splits together, a row for each mask."""
    rows, (queries, keys) = len(masks), (len(masks[0].weights), len(masks[0].groups))
    total = torch.zeros(rows, queries, keys)
    for split in splits:
        logarithms = torch.zeros(rows, 1, 1)
        for part in (split.log_weights[:, 0, :, None] if split.log_weights is not None else None, split.bias):
            if part is not None:
                logarithms = logarithms + (part[:, 0] if part.dim() == 4 else part)
        total[:, token_numbers(split.queries, queries)[:, None], numbers_of(split, keys)] += logarithms.exp()
    return total


def expected_weights(mask):
    return (mask.weights / mask.weights.amax(dim=1, keepdim=True))[:, mask.groups]


@settings(max_examples=60)
@given(layout=layouts(), price=st.sampled_from(PRICES))
def test_every_visible_pair_is_in_exactly_one_split_with_its_weight(layout, price):
    mask = layout.mask
    for method in ("auto", "merged", "dense", *(["grouped"] if mask.is_hard else [])):
        splits = plan_splits([mask], method, price).splits(CPU, torch.float32)
        torch.testing.assert_close(total_weights(splits, [mask])[0], expected_weights(mask))


@settings(max_examples=40)
@given(batch=batches(), price=st.sampled_from(PRICES))
def test_rows_of_unlike_layouts_share_their_splits(batch, price):
    masks = batch.masks
    for method in ("auto", "merged", "dense"):
        splits = plan_splits(masks, method, price).splits(CPU, torch.float32)
        expected = torch.stack([expected_weights(mask) for mask in masks])
        torch.testing.assert_close(total_weights(splits, masks), expected)


def test_what_most_tokens_attend_to_is_one_split_of_neighbours():
    spans = (Span("text", 2, 1), Span("text", 3, 0), Span("image", 8))
    upper = aa.Region(aa.Box(0, 0, 1, 0.5), "the upper half")
    mask = joint_mask(spans, split_grid([upper], (4, 2), base_weight=1.0), ELIGEN)
    plan = plan_splits([mask], "merged", FEW_SCORES)
    plain, region_prompt, own_prompt = plan.splits(CPU, torch.float32)
    assert (plain.queries, plain.keys, plain.stage) == (slice(2, 13), (slice(2, 13),), "first")
    assert (region_prompt.queries, region_prompt.keys, region_prompt.stage) == (slice(5, 9), (slice(0, 2),), "merge")
    assert (own_prompt.queries, own_prompt.keys) == (slice(0, 2), (slice(0, 2), slice(5, 9)))
    assert own_prompt.stage == "only"
    assert plan.mask_numel == 0


def test_a_strip_masks_the_keys_of_regions_alone_for_all_rows_at_once():
    lengths, boxes = ((2, 3), (4, 1)), (aa.Box(0, 0, 1, 0.5), aa.Box(0, 0.5, 1, 1))
    regions = [aa.Region(box, "a") for box in boxes]
    masks = []
    for first, second in lengths:
        spans = (Span("text", first, 1), Span("text", second, 2), Span("text", 16, 0), Span("image", 64))
        masks.append(joint_mask(_padded(spans, 85), split_grid(regions, (8, 8), base_weight=1.0), ELIGEN))
    plan = plan_splits(masks, "merged", len)
    assert [(size.queries, size.keys, size.is_masked) for size in plan.sizes] == [
        (80, 80, False),
        (64, 5, True),
        (5, 69, True),
    ]
    assert plan.mask_numel == 2 * (64 * 5 + 5 * 69)


def _padded(spans, total):
    padding = total - sum(span.length for span in spans)
    return spans if not padding else (Span("padding", padding), *spans)


@settings(max_examples=60)
@given(batch=batches(), price=st.sampled_from(PRICES))
def test_every_query_starts_once_and_before_it_is_merged(batch, price):
    masks = batch.masks
    started = torch.zeros(len(masks[0].weights), dtype=torch.bool)
    for split in plan_splits(masks, "auto", price).splits(CPU, torch.float32):
        queries = token_numbers(split.queries, len(started))
        assert (started[queries] == (split.stage == "merge")).all()
        started[queries] = True
    assert started.all()


def test_grouping_soft_weights_or_unlike_rows_is_refused():
    spans = (Span("text", 1, 0), Span("text", 1, 1), Span("image", 4))
    soft = aa.Region(aa.Box(0, 0, 0.4, 1), "a")
    with pytest.raises(aa.GuideError, match="Use 'merged'"):
        plan_splits([joint_mask(spans, split_grid([soft], (1, 4), base_weight=0.0), ELIGEN)], "grouped", len)
    with pytest.raises(aa.GuideError, match="one layout at a time, received 2"):
        plan_splits([halves(0.0), halves(0.0)], "grouped", len)


def test_gathering_takes_tokens_in_order_and_copies_no_single_slice():
    tensor = random_tokens(6)
    taken = gather(tensor, (slice(4, 6), torch.tensor([0, 2])))
    assert torch.equal(taken, tensor[:, :, [4, 5, 0, 2]])
    assert gather(tensor, (slice(1, 3),)).data_ptr() == tensor[:, :, 1:3].data_ptr()


def halves(weight):
    """A mask of four queries in one segment: the first two attend to one half of the keys, the others to the other."""
    weights = torch.tensor([[1.0, weight], [1.0, weight], [weight, 1.0], [weight, 1.0]])
    return GroupMask(weights, torch.tensor([0, 0, 1, 1]), (slice(0, 4),))


def test_the_least_price_decides():
    assert {size.stage for size in plan_splits([halves(0.0)], "auto", FEW_SCORES).sizes} == {"only"}
    assert {size.is_masked for size in plan_splits([halves(0.5)], "auto", len).sizes} == {True}
    unmasked = plan_splits([halves(0.5)], "auto", lambda sizes: sum(size.is_masked for size in sizes))
    assert {size.stage for size in unmasked.sizes} == {"first", "merge"}


def test_up_to_24_patterns_of_weights_are_grouped():
    for patterns, is_grouped in ((24, True), (25, False)):
        # Query i attends to the groups i and i + 1: merging needs a split for each group, and merges every query once.
        weights = torch.eye(patterns, patterns + 1) + torch.eye(patterns, patterns + 1).roll(1, dims=1)
        mask = GroupMask(weights, torch.arange(patterns + 1), (slice(0, patterns),))
        stages = {size.stage for size in plan_splits([mask], "auto", FEW_SCORES).sizes}
        assert (stages == {"only"}) == is_grouped


def test_up_to_12_runs_of_keys_are_slices_and_more_are_numbers():
    for runs, is_slices in ((12, True), (13, False)):
        groups = torch.tensor([0, 1] * runs)[:-1]
        mask = GroupMask(torch.tensor([[1.0, 0.0]]), groups, (slice(0, 1),))
        (split,) = plan_splits([mask], "auto", len).splits(CPU, torch.float32)
        assert all(isinstance(index, slice) for index in split.keys) == is_slices
        assert len(split.keys) == (runs if is_slices else 1)
        assert torch.equal(
            torch.cat([token_numbers(index, len(groups)) for index in split.keys]), torch.arange(runs) * 2
        )
