"""Region weights: how regions and the plan's prompt share image tokens, and where a share is too small to count."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st

import artaug as aa
from artaug.regional.region_weights import RegionWeights, split_grid
from support.layouts import layouts

LEFT, FULL = aa.Box(0, 0, 0.5, 1), aa.Box(0, 0, 1, 1)


def weights(*regions, **options):
    return split_grid(regions, (1, 4), **{"base_weight": 0.0, **options}).weights.tolist()


@settings(max_examples=100)
@given(layout=layouts())
def test_every_token_keeps_a_prompt_and_no_weight_is_negative(layout):
    weights = layout.region_weights.weights
    assert (weights >= 0).all()
    assert (weights.sum(dim=0) > 0).all()


@given(layout=layouts())
def test_shares_of_regions_with_weight_one_never_exceed_the_whole(layout):
    regions = tuple(aa.Region(region.area, region.prompt, feather=region.feather) for region in layout.regions)
    plain = replace(layout, regions=regions, isolation=aa.Isolation(base_weight=0.0))
    assert (plain.region_weights.weights.sum(dim=0) <= 1 + 1e-5).all()


def test_without_regions_the_plans_prompt_has_all():
    assert weights() == [[1, 1, 1, 1]]


def test_overlapping_regions_share_or_lie_over_each_other():
    both = aa.Region(FULL, "a"), aa.Region(LEFT, "b")
    assert weights(*both) == [[0, 0, 0, 0], [0.5, 0.5, 1, 1], [0.5, 0.5, 0, 0]]
    assert weights(*both, overlap="over") == [[0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0]]


def test_half_covered_tokens_show_half_of_what_lies_under_them():
    half = aa.Region(aa.Box(0, 0, 1, 0.5), "upper half of every token")
    assert weights(aa.Region(FULL, "under"), half, overlap="over") == [[0] * 4, [0.5] * 4, [0.5] * 4]
    assert weights(aa.Region(FULL, "under"), half, half, overlap="over")[1:] == [[0.25] * 4, [0.25] * 4, [0.5] * 4]


def test_the_plans_prompt_fades_where_regions_cover():
    half_a_token = aa.Region(aa.Box(0, 0, 0.375, 1), "a", weight=3.0)
    assert weights(half_a_token, base_weight=0.5) == [[0.5, 0.75, 1, 1], [3, 1.5, 0, 0]]


def test_a_region_under_others_everywhere_has_no_weight_and_no_members():
    covered = split_grid([aa.Region(LEFT, "hidden"), aa.Region(FULL, "above")], (1, 4), base_weight=0.0, overlap="over")
    assert covered.weights.tolist() == [[0] * 4, [0] * 4, [1] * 4]
    assert not covered.members[:2].any()
    assert covered.members[2].all()


def test_a_region_that_covers_next_to_nothing_is_refused():
    with pytest.raises(aa.GuideError, match=r"covers less than 0\.4% .* its prompt would have no effect"):
        weights(aa.Region(aa.Box(0, 0, 0.0001, 1), "a hair"))


def region_covering(*parts):
    """A region that covers these parts of the tokens of a row, exactly."""
    return aa.Region(aa.Mask.from_array([list(parts)]), "a")


def test_a_share_of_one_256th_of_a_token_counts_and_a_smaller_one_does_not():
    boundary = 1 / 256
    counted = split_grid([region_covering(1, boundary)], (1, 2), base_weight=0.0).weights
    assert counted.tolist() == [[0, 1 - boundary], [1, boundary]]
    below = split_grid([region_covering(1, boundary * (1 - 1e-6))], (1, 2), base_weight=0.0).weights
    assert below.tolist() == [[0, 1], [1, 0]]


def test_a_rest_of_one_256th_for_the_plans_prompt_counts_and_a_smaller_one_does_not():
    boundary = 1 / 256
    counted = split_grid([region_covering(1 - boundary)], (1, 1), base_weight=0.0).weights
    assert counted[:, 0].tolist() == [boundary, 1 - boundary]
    below = split_grid([region_covering(1 - boundary / 2)], (1, 1), base_weight=0.0).weights
    assert below[:, 0].tolist() == [0, 1 - boundary / 2]


def test_a_negligible_rest_counts_as_nothing_on_tokens_that_only_some_regions_cover():
    boundary = 1 / 256
    regions = [region_covering(1 - boundary / 2, 0, 0), region_covering(0, 1, 0)]
    base = split_grid(regions, (1, 3), base_weight=0.0).weights[0]
    assert base.tolist() == [0, 0, 1]


def exact_coverage(region, grid):
    """The part of each token that a region without feather covers, token by token, in plain Python: rows x columns."""
    rows, columns = grid
    if isinstance(region.area, aa.Box):
        box, cells = region.area, None
    else:
        box, cells = None, region.area.to_array()

    def part(low, high, count, index):
        return max(0.0, min((index + 1) / count, high) - max(index / count, low)) * count

    covered = np.zeros(grid)
    for row, column in np.ndindex(grid):
        if cells is None:
            covered[row, column] = part(box.top, box.bottom, rows, row) * part(box.left, box.right, columns, column)
        else:
            height, width = cells.shape
            covered[row, column] = sum(
                cells[y, x]
                * part(y / height, (y + 1) / height, rows, row)
                * part(x / width, (x + 1) / width, columns, column)
                for y, x in np.ndindex(cells.shape)
            )
    return covered.flatten()


@settings(max_examples=60)
@given(layout=layouts(max_regions=4), strength=st.sampled_from([1.0, 0.01, 100.0]))
def test_weights_and_members_are_those_of_the_definition_written_out(layout, strength):
    regions = [aa.Region(region.area, "a", weight=strength * region.weight) for region in layout.regions]
    assume(regions)
    base_weight, over = layout.isolation.base_weight, layout.overlap == "over"
    try:
        actual = split_grid(regions, layout.grid, base_weight=base_weight, overlap=layout.overlap)
    except aa.GuideError:
        reject()
    covered = np.stack([exact_coverage(region, layout.grid) for region in regions])
    uncovered = [np.prod(1 - covered[index + 1 :], axis=0) for index in range(len(regions))]
    shares = covered * uncovered if over else covered / np.maximum(1, covered.sum(axis=0))
    strengths = np.array([[region.weight] for region in regions])
    expected = np.concatenate([1 - (1 - base_weight) * np.minimum(1, shares.sum(axis=0))[None], strengths * shares])
    # What is dropped is less than 1/256 of a token, and less than 1/256 of what it reads, for each region.
    assert (abs(actual.weights.numpy() - expected) <= 2 * len(regions) / 256 * expected.sum(axis=0) + 1e-6).all()
    for members, parts, share in zip(actual.members[1:].numpy(), covered, shares, strict=True):
        surely_seen = share > 1 / 250
        assert members[surely_seen & (parts > 0.5 + 1e-6)].all()
        if (parts[surely_seen] > 1 - 1e-6).any():
            assert not members[parts < 0.5 - 1e-6].any()


def test_a_token_that_three_regions_cover_is_a_member_of_all_three():
    regions = [aa.Region(box, "a") for box in (FULL, FULL, LEFT)]
    assert split_grid(regions, (1, 4), base_weight=0.0).members[1:].tolist() == [[True] * 4] * 2 + [
        [True, True, False, False]
    ]


@settings(max_examples=60)
@given(layout=layouts(max_regions=5))
def test_no_token_that_a_region_covers_by_half_is_background(layout):
    regions = [region for region in layout.regions if region.feather == 0]
    assume(regions)
    try:
        members = split_grid(regions, layout.grid, base_weight=0.0, overlap=layout.overlap).members.numpy()
    except aa.GuideError:
        reject()
    covered = np.stack([exact_coverage(region, layout.grid) for region in regions])
    assert members[1:].any(axis=0)[(covered > 0.5 + 1e-6).any(axis=0)].all()


def test_a_strong_region_keeps_its_small_shares():
    sliver, rest = region_covering(1, 0.003), aa.Region(FULL, "b", weight=0.001)
    strong = replace(sliver, weight=100.0)
    kept = split_grid([strong], (1, 2), base_weight=0.0).weights
    assert torch.allclose(kept, torch.tensor([[0, 1 - 0.003], [100, 0.3]]))
    beside_a_weak_one = split_grid([sliver, rest], (1, 2), base_weight=0.0).weights[1]
    assert beside_a_weak_one[1] == pytest.approx(0.003 / 1.003)  # three times what the weak region weighs there


def test_a_weak_region_keeps_the_tokens_that_are_all_its_own():
    weak = aa.Region(FULL, "a", weight=1e-4)
    assert split_grid([weak], (1, 1), base_weight=0.3).weights[:, 0].tolist() == pytest.approx([0.3, 1e-4])
    assert split_grid([weak], (1, 1), base_weight=1e-4).weights[:, 0].tolist() == pytest.approx([1e-4, 1e-4])


def test_tokens_of_one_class_are_members_of_the_same_prompts():
    members = torch.tensor([[True, False, True, True], [False, True, True, False]])
    region_weights = RegionWeights(members.float(), members)
    first, second, third, fourth = region_weights.token_classes.tolist()
    assert first == fourth
    assert {first, second, third} == {0, 1, 2}
    assert region_weights.num_classes == 3


def test_the_grid_may_be_odd():
    left = split_grid([aa.Region(LEFT, "a")], (3, 5), base_weight=0.0).weights[1].reshape(3, 5)
    assert torch.equal(left, torch.tensor([1, 1, 0.5, 0, 0]).expand(3, 5))
