"""Laws of boxes and masks."""

import re

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import artaug as aa
from support.strategies import boxes, masks, pixel_boxes

WHOLE = aa.Box(0, 0, 1, 1)


@given(boxes(), boxes())
@example(aa.Box(0, 0, 1e-200, 1e-200), aa.Box(0, 0, 1e-200, 1e-200))
def test_overlap_is_symmetric_and_no_larger_than_either(box, other):
    assert box.overlap(other) == other.overlap(box)
    assert 0 <= box.overlap(other) <= min(box.area, other.area)
    assert 0 <= box.iou(other) <= 1 + 1e-12
    assert box.iou(other) == pytest.approx(other.iou(box))


@given(boxes())
def test_a_box_is_itself_and_lies_in_the_whole(box):
    assert box.iou(box) == 1
    assert box.overlap(WHOLE) == box.area
    assert 0 <= box.area <= 1
    assert box.left < box.right
    assert box.left <= box.center[0] <= box.right
    assert box.top <= box.center[1] <= box.bottom


@given(boxes(), st.floats(0, 2))
def test_a_padded_box_holds_the_box(box, margin):
    padded = box.padded(margin)
    assert padded.overlap(box) == box.area
    assert box.padded(0) == box
    assert box.padded(1) == WHOLE


@given(pixel_boxes())
def test_whole_pixels_come_back_as_they_were(size_and_edges):
    size, edges = size_and_edges
    assert aa.Box.from_pixels(*edges, size=size).to_pixels(size) == edges


@given(boxes(), st.integers(1, 3000), st.integers(1, 3000))
@example(aa.Box(0.5, 0, 0.5 + 1e-12, 1), 64, 64)
@example(aa.Box(1 - 1e-12, 0, 1, 1), 64, 64)
def test_a_box_in_pixels_is_never_empty_and_never_outside(box, width, height):
    left, top, right, bottom = box.to_pixels((width, height))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert left <= box.left * width + 1e-6
    assert right >= box.right * width - 1e-6


def test_pixel_boxes_are_clipped_to_the_image():
    assert aa.Box.from_pixels(-10, 5, 700, 900, size=(640, 480)) == aa.Box(0, 5 / 480, 1, 1)


@pytest.mark.parametrize(
    "edges", [(640, 0, 700, 10), (10, 10, 10, 20), (30, 0, 20, 10), (float("nan"), 0, 5, 5), (0, 0, float("inf"), 5)]
)
def test_a_pixel_box_without_area_in_the_image_is_refused(edges):
    with pytest.raises(aa.GeometryError, match="has no area inside an image of 640 x 480"):
        aa.Box.from_pixels(*edges, size=(640, 480))


def test_an_image_without_pixels_holds_no_box():
    with pytest.raises(aa.GeometryError, match="received one of 0 x 480"):
        aa.Box.from_pixels(0, 0, 1, 1, size=(0, 480))


def test_pixels_where_fractions_belong_are_refused_with_a_hint():
    with pytest.raises(aa.GeometryError) as caught:
        aa.Box(0, 0, 640, 480)
    assert str(caught.value) == (
        "Box(left=0.0, top=0.0, right=640.0, bottom=480.0) is not relative: need 0 <= left < right <= 1 and "
        "0 <= top < bottom <= 1. For pixels use Box.from_pixels."
    )


@pytest.mark.parametrize(
    "edges", [(0.5, 0, 0.5, 1), (0.6, 0, 0.5, 1), (-0.1, 0, 0.5, 1), (0, 0, float("nan"), 1), (0, 0.2, 1, 0.1)]
)
def test_edges_that_are_no_box_are_refused(edges):
    with pytest.raises(aa.GeometryError, match="is not relative"):
        aa.Box(*edges)


@given(masks())
def test_a_mask_gives_back_its_weights(mask):
    weights = mask.to_array()
    assert weights.shape == (mask.height, mask.width)
    assert weights.dtype == np.float32
    assert aa.Mask.from_array(weights) == mask


def test_a_mask_returns_copies():
    mask = aa.Mask.from_array(np.eye(3))
    mask.to_array()[:] = 0
    assert mask.to_array().sum() == 3


def test_booleans_make_a_mask():
    assert aa.Mask.from_array(np.array([[True, False]])).to_array().tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.zeros((2, 2)), "a Mask without any weight covers nothing: need at least one cell above 0."),
        (np.full((2, 2), 255.0), "a Mask holds weights from 255.0 to 255.0: need finite numbers in [0, 1]. Divide 8"),
        (np.full((2, 2), np.nan), "a Mask holds weights from nan to nan"),
        (np.ones(4), "a Mask needs an array (height, width), received shape (4,)."),
        (np.ones((0, 4)), "a Mask needs an array (height, width), received shape (0, 4)."),
    ],
    ids=["empty", "8 bits", "nan", "one axis", "no cells"],
)
def test_weights_that_are_no_mask_are_refused(weights, message):
    with pytest.raises(aa.GeometryError, match=re.escape(message)):
        aa.Mask.from_array(weights)


@pytest.mark.parametrize("data", ["", "no base64!", "eJwDAAAAAAE=", aa.Mask.from_array(np.eye(3)).data])
def test_data_that_does_not_decode_is_refused(data):
    with pytest.raises(aa.GeometryError, match=re.escape("a Mask of 2 x 2 holds data that does not decode to it")):
        aa.Mask(2, 2, data)
