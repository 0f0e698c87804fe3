"""Region weights: how regions and the plan's prompt share image tokens, and where a share is too small to count."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

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
    assert weights.any(dim=1)[1:].all()  # no region's prompt is without effect


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


def test_a_region_without_effect_is_refused():
    with pytest.raises(aa.GuideError, match="under other regions everywhere"):
        weights(aa.Region(LEFT, "hidden"), aa.Region(FULL, "above"), overlap="over")
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


def test_a_token_is_a_member_of_a_prompt_from_half_of_its_largest_weight_on():
    region_weights = RegionWeights(torch.tensor([[1.0, 0.0, 0.5, 0.49], [0.2, 0.1, 0.05, 0.0]]))
    assert region_weights.members.tolist() == [[True, False, True, False], [True, True, False, False]]


def test_tokens_of_one_class_are_members_of_the_same_prompts():
    region_weights = RegionWeights(torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0]]))
    first, second, third, fourth = region_weights.token_classes.tolist()
    assert first == fourth
    assert {first, second, third} == {0, 1, 2}
    assert region_weights.num_classes == 3


def test_the_grid_may_be_odd():
    left = split_grid([aa.Region(LEFT, "a")], (3, 5), base_weight=0.0).weights[1].reshape(3, 5)
    assert torch.equal(left, torch.tensor([1, 1, 0.5, 0, 0]).expand(3, 5))
