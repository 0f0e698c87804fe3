"""The plan of splits: every visible pair is computed once, and what is copied is as little as possible."""

import pytest
import torch
from hypothesis import given, settings

import artaug as aa
from artaug.regional import ELIGEN
from artaug.regional.attention_mask import GroupMask, joint_mask
from artaug.regional.denoiser import Span
from artaug.regional.region_weights import split_grid
from artaug.regional.split_plan import _copy_cost, _Draft, gather, plan_splits
from support.layouts import layouts, random_tokens


def token_numbers(index, count):
    return torch.arange(count)[index]


@settings(max_examples=60)
@given(layout=layouts())
def test_every_visible_pair_is_in_exactly_one_split_with_its_weight(layout):
    mask = layout.mask
    expected = (mask.weights / mask.weights.amax(dim=1, keepdim=True))[:, mask.groups]
    for method in ("auto", "merged", *(["grouped"] if mask.is_hard else [])):
        total = torch.zeros_like(expected)
        for split in plan_splits(mask, method):
            queries = token_numbers(split.queries, len(expected))
            keys = torch.cat([token_numbers(index, expected.shape[1]) for index in split.keys])
            total[queries[:, None], keys] += 1.0 if split.log_weights is None else split.log_weights.exp()[:, None]
        torch.testing.assert_close(total, expected)


def test_what_most_tokens_attend_to_is_one_split_of_neighbours():
    spans = (Span("text", 2, 1), Span("text", 3, 0), Span("image", 8))
    upper = aa.Region(aa.Box(0, 0, 1, 0.5), "the upper half")
    mask = joint_mask(spans, split_grid([upper], (4, 2), base_weight=1.0), ELIGEN)
    plain, region_prompt, own_prompt = plan_splits(mask, "merged")
    assert (plain.queries, plain.keys, plain.stage) == (slice(2, 13), (slice(2, 13),), "first")
    assert (region_prompt.queries, region_prompt.keys, region_prompt.stage) == (slice(5, 9), (slice(0, 2),), "merge")
    assert (own_prompt.queries, own_prompt.keys) == (slice(0, 2), (slice(0, 2), slice(5, 9)))
    assert own_prompt.stage == "only"


@settings(max_examples=60)
@given(layout=layouts())
def test_every_query_starts_once_and_before_it_is_merged(layout):
    started = torch.zeros(len(layout.mask.weights), dtype=torch.bool)
    for split in plan_splits(layout.mask):
        queries = token_numbers(split.queries, len(started))
        assert (started[queries] == (split.stage == "merge")).all()
        started[queries] = True
    assert started.all()


def test_grouping_soft_weights_is_refused():
    spans = (Span("text", 1, 0), Span("text", 1, 1), Span("image", 4))
    soft = aa.Region(aa.Box(0, 0, 0.4, 1), "a")
    with pytest.raises(aa.GuideError, match="Use 'merged'"):
        plan_splits(joint_mask(spans, split_grid([soft], (1, 4), base_weight=0.0), ELIGEN), "grouped")


def test_gathering_takes_tokens_in_order_and_copies_no_single_slice():
    tensor = random_tokens(6)
    taken = gather(tensor, (slice(4, 6), torch.tensor([0, 2])))
    assert torch.equal(taken, tensor[:, :, [4, 5, 0, 2]])
    assert gather(tensor, (slice(1, 3),)).data_ptr() == tensor[:, :, 1:3].data_ptr()


def draft(queries, keys):
    return _Draft(torch.tensor(queries), torch.tensor(keys), None)


@pytest.mark.parametrize(
    ("drafts", "cost"),
    [
        ([draft([0, 1, 2], [0, 1])], 0),  # slices in, slices out: nothing is copied
        ([draft([0, 2], [0, 1])], 2 * 2),  # two scattered queries, and their results
        ([draft([0, 1, 2], [0, 2, 3])], 2 * 3),  # three scattered keys, and their values
        ([draft([0, 1], [0]), draft([0, 1], [1])], 4 * 2),  # two queries are merged
        ([draft([0, 1], [0]), draft([2, 3], [1])], 0),  # other queries are not
        ([draft([0, 2], [0]), draft([0, 2], [1, 3])], 2 * 2 + (2 + 4) * 2 + 2 * 2),
    ],
)
def test_the_cost_of_a_plan_is_what_it_gathers_and_merges(drafts, cost):
    assert _copy_cost(drafts) == cost


def halves(weight):
    """A mask of four queries in one segment: the first two attend to one half of the keys, the others to the other."""
    weights = torch.tensor([[1.0, weight], [1.0, weight], [weight, 1.0], [weight, 1.0]])
    return GroupMask(weights, torch.tensor([0, 0, 1, 1]), (slice(0, 4),))


def test_the_cheaper_method_is_taken_for_every_segment():
    assert {split.stage for split in plan_splits(halves(0.0))} == {"only"}
    assert {split.stage for split in plan_splits(halves(0.5))} == {"first", "merge"}


def test_up_to_24_patterns_of_weights_are_grouped():
    for patterns, stages in ((24, {"only"}), (25, {"first", "merge"})):
        # Query i attends to the groups i and i + 1: merging needs a split for each group, and merges every query once.
        weights = torch.eye(patterns, patterns + 1) + torch.eye(patterns, patterns + 1).roll(1, dims=1)
        mask = GroupMask(weights, torch.arange(patterns + 1), (slice(0, patterns),))
        assert {split.stage for split in plan_splits(mask)} == stages


def test_up_to_12_runs_of_keys_are_slices_and_more_are_numbers():
    for runs, is_slices in ((12, True), (13, False)):
        groups = torch.tensor([0, 1] * runs)[:-1]
        mask = GroupMask(torch.tensor([[1.0, 0.0]]), groups, (slice(0, 1),))
        (split,) = plan_splits(mask)
        assert all(isinstance(index, slice) for index in split.keys) == is_slices
        assert len(split.keys) == (runs if is_slices else 1)
        assert torch.equal(
            torch.cat([token_numbers(index, len(groups)) for index in split.keys]), torch.arange(runs) * 2
        )
