"""How regions divide an image among prompts."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

import artaug as aa
from artaug.regional.region_weights import divided
from support.layouts import layouts

LEFT, FULL = aa.Box(0, 0, 0.5, 1), aa.Box(0, 0, 1, 1)


def weights(*regions, **options):
    return divided(regions, (1, 4), **{"base_weight": 0.0, **options}).weights.tolist()


@settings(max_examples=100)
@given(layout=layouts())
def test_every_token_keeps_a_prompt_and_no_weight_is_negative(layout):
    told = layout.shares.weights
    assert (told >= 0).all()
    assert (told.sum(dim=0) > 0).all()
    assert told.any(dim=1)[1:].all()  # nobody's prompt goes unread


@given(layout=layouts())
def test_unweighted_shares_never_exceed_the_whole(layout):
    regions = tuple(aa.Region(one.area, one.prompt, feather=one.feather) for one in layout.regions)
    plain = replace(layout, regions=regions, isolation=aa.Isolation(base_weight=0.0))
    told = plain.shares.weights
    assert (told.sum(dim=0) <= 1 + 1e-5).all()


def test_without_regions_the_plans_prompt_has_all():
    assert weights() == [[1, 1, 1, 1]]


def test_overlapping_regions_share_or_lie_over_each_other():
    both = aa.Region(FULL, "a"), aa.Region(LEFT, "b")
    assert weights(*both) == [[0, 0, 0, 0], [0.5, 0.5, 1, 1], [0.5, 0.5, 0, 0]]
    assert weights(*both, overlap="over") == [[0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0]]


def test_the_plans_prompt_fades_where_regions_cover():
    half_a_token = aa.Region(aa.Box(0, 0, 0.375, 1), "a", weight=3.0)
    assert weights(half_a_token, base_weight=0.5) == [[0.5, 0.75, 1, 1], [3, 1.5, 0, 0]]


def test_a_region_nobody_would_read_is_refused():
    with pytest.raises(aa.GuideError, match="under other regions everywhere"):
        weights(aa.Region(LEFT, "hidden"), aa.Region(FULL, "above"), overlap="over")
    with pytest.raises(aa.GuideError, match="nobody would read its prompt"):
        weights(aa.Region(aa.Box(0, 0, 0.0001, 1), "a hair"))


def test_the_grid_may_be_odd():
    told = divided([aa.Region(LEFT, "a")], (3, 5), base_weight=0.0).weights.reshape(2, 3, 5)
    assert torch.equal(told[1], torch.tensor([1, 1, 0.5, 0, 0]).expand(3, 5))
