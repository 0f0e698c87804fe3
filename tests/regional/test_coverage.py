"""Coverage: the part of each image token that a region covers, and its weight there."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import artaug as aa
from artaug.regional import token_weights

unit = st.floats(0, 1, allow_subnormal=False)
grids = st.tuples(st.integers(1, 24), st.integers(1, 24))
FULL = aa.Box(0, 0, 1, 1)


@st.composite
def boxes(draw):
    left, right = sorted(draw(st.lists(st.integers(0, 1000), min_size=2, max_size=2, unique=True)))
    top, bottom = sorted(draw(st.lists(st.integers(0, 1000), min_size=2, max_size=2, unique=True)))
    return aa.Box(left / 1000, top / 1000, right / 1000, bottom / 1000)


@st.composite
def masks(draw):
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    cells = draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=height * width, max_size=height * width))
    cells[draw(st.integers(0, len(cells) - 1))] = 1.0
    return aa.Mask.from_array(np.array(cells).reshape(height, width))


areas = st.one_of(boxes(), masks())


def weights_of(area, grid, *, weight=1.0, feather=0.0):
    return token_weights(aa.Region(area, "anything", weight=weight, feather=feather), grid)


@given(grid=grids, feather=unit)
def test_the_whole_picture_has_the_full_weight_on_every_token(grid, feather):
    torch.testing.assert_close(weights_of(FULL, grid, feather=feather), torch.ones(grid))


@given(grid=grids)
def test_without_feather_the_whole_picture_is_exactly_one(grid):
    assert torch.equal(weights_of(FULL, grid), torch.ones(grid))
    assert torch.equal(weights_of(aa.Mask.from_array(np.ones((5, 7))), grid), torch.ones(grid))


@given(box=boxes(), grid=grids)
def test_the_mean_over_tokens_is_the_area_of_the_box(box, grid):
    assert weights_of(box, grid).mean().item() == pytest.approx(box.area, rel=1e-5)


@given(mask=masks(), grid=grids)
def test_the_mean_over_tokens_is_the_mean_of_the_mask(mask, grid):
    assert weights_of(mask, grid).mean().item() == pytest.approx(mask.to_array().mean(), rel=1e-5)


@given(area=areas, grid=grids, weight=st.floats(0.1, 100), feather=unit)
def test_weights_lie_between_zero_and_the_weight_of_the_region(area, grid, weight, feather):
    weights = weights_of(area, grid, weight=weight, feather=feather)
    assert weights.shape == grid
    assert weights.dtype == torch.float32
    assert weights.min() >= 0
    assert weights.max().item() <= np.float32(weight)


@given(area=areas, grid=grids, weight=st.floats(0.1, 100), feather=unit)
def test_the_weight_is_a_factor(area, grid, weight, feather):
    torch.testing.assert_close(
        weights_of(area, grid, weight=weight, feather=feather), weight * weights_of(area, grid, feather=feather)
    )


@given(box=boxes(), cut=st.floats(0.05, 0.95), grid=grids, feather=unit)
def test_a_box_cut_in_two_has_the_same_weights(box, cut, grid, feather):
    middle = box.left + cut * box.width
    left = aa.Box(box.left, box.top, middle, box.bottom)
    right = aa.Box(middle, box.top, box.right, box.bottom)
    parts = weights_of(left, grid, feather=feather) + weights_of(right, grid, feather=feather)
    torch.testing.assert_close(parts, weights_of(box, grid, feather=feather), atol=1e-6, rtol=1e-5)


@given(data=st.data(), grid=grids, feather=unit)
def test_a_box_as_a_mask_with_fitting_cells_has_the_same_weights(data, grid, feather):
    left, right = sorted(data.draw(st.lists(st.integers(0, 8), min_size=2, max_size=2, unique=True)))
    top, bottom = sorted(data.draw(st.lists(st.integers(0, 8), min_size=2, max_size=2, unique=True)))
    cells = np.zeros((8, 8))
    cells[top:bottom, left:right] = 1
    as_mask = weights_of(aa.Mask.from_array(cells), grid, feather=feather)
    as_box = weights_of(aa.Box(left / 8, top / 8, right / 8, bottom / 8), grid, feather=feather)
    torch.testing.assert_close(as_mask, as_box, atol=1e-6, rtol=1e-5)


@given(mask=masks(), rows=st.integers(1, 6), columns=st.integers(1, 6))
def test_a_finer_mask_of_the_same_area_has_the_same_weights(mask, rows, columns):
    cells = mask.to_array()
    finer = aa.Mask.from_array(np.kron(cells, np.ones((rows, columns))))
    torch.testing.assert_close(weights_of(finer, (5, 3)), weights_of(mask, (5, 3)), atol=1e-6, rtol=1e-5)


@given(mask=masks())
def test_a_mask_on_its_own_grid_is_the_weights(mask):
    assert torch.equal(weights_of(mask, (mask.height, mask.width)), torch.from_numpy(mask.to_array()))


@given(box=boxes(), grid=grids)
def test_a_mirrored_box_has_mirrored_weights(box, grid):
    mirrored = aa.Box(1 - box.right, box.top, 1 - box.left, box.bottom)
    torch.testing.assert_close(
        weights_of(mirrored, grid, feather=0.1), weights_of(box, grid, feather=0.1).flip(1), atol=1e-6, rtol=1e-4
    )


def test_a_feathered_edge_follows_the_gaussian():
    feathered = weights_of(aa.Box(0, 0, 0.5, 1), (64, 64), feather=0.0625)[0]
    sigma = 4.0
    between = [0.5 * math.erfc((column + 0.5 - 32) / (sigma * math.sqrt(2))) for column in range(64)]
    torch.testing.assert_close(feathered, torch.tensor(between), atol=2e-3, rtol=0)


def test_the_feather_is_a_share_of_the_shorter_side():
    wide = weights_of(aa.Box(0, 0, 0.5, 1), (8, 64), feather=0.25)
    square = weights_of(aa.Box(0, 0, 0.5, 1), (64, 64), feather=0.25 * 8 / 64)
    torch.testing.assert_close(wide[0], square[0])


def test_a_token_half_inside_a_box_gets_half_the_weight():
    assert weights_of(aa.Box(0, 0, 0.375, 0.5), (2, 4), weight=2.0).tolist() == [[2, 1, 0, 0], [0, 0, 0, 0]]


def test_a_region_too_small_to_have_a_weight_is_refused():
    with pytest.raises(aa.GuideError, match=r"gives no weight to any of 2 x 4 image tokens"):
        weights_of(aa.Box(0, 0, 1e-300, 1), (2, 4))
