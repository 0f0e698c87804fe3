"""Segmentation of pictures by color, and the choice of the segments that stand out."""

import numpy as np
import pytest
from hypothesis import given
from PIL import Image

import artaug as aa
from artaug.critics.salience import WORKING_PX, salient_boxes, segment
from support.strategies import images, pixels

GREY, RED, BLUE = (90, 90, 90), (180, 50, 40), (40, 60, 180)


def scene(*patches, size=(64, 64)):
    image = Image.new("RGB", size, GREY)
    for color, box in patches:
        image.paste(color, box)
    return image


@given(pixels())
def test_every_segment_is_connected(picture):
    labels = segment(picture / 255)
    assert labels.shape == picture.shape[:2]
    assert set(np.unique(labels)) == set(range(labels.max() + 1))
    for label in range(labels.max() + 1):
        inside = labels == label
        connected = np.zeros_like(inside)
        connected[tuple(np.argwhere(inside)[0])] = True
        while True:
            grown = connected.copy()
            grown[1:] |= connected[:-1]
            grown[:-1] |= connected[1:]
            grown[:, 1:] |= connected[:, :-1]
            grown[:, :-1] |= connected[:, 1:]
            grown &= inside
            if (grown == connected).all():
                break
            connected = grown
        assert (connected == inside).all()


@given(images())
def test_boxes_are_few_and_do_not_repeat_each_other(image):
    boxes = salient_boxes(image, max_boxes=3)
    assert len(boxes) <= 3
    assert all(box.iou(earlier) <= 0.4 for index, box in enumerate(boxes) for earlier in boxes[:index])


def test_neighbors_of_different_colors_are_two_regions():
    boxes = salient_boxes(scene((RED, (12, 20, 28, 44)), (BLUE, (28, 20, 48, 44))), max_boxes=4)
    assert sorted(boxes, key=lambda box: box.left) == [
        aa.Box.from_pixels(12, 20, 28, 44, size=(64, 64)),
        aa.Box.from_pixels(28, 20, 48, 44, size=(64, 64)),
    ]


def test_background_does_not_stand_out():
    stripes = scene((RED, (0, 0, 64, 20)), (BLUE, (0, 40, 64, 64)))
    assert salient_boxes(stripes, max_boxes=4) == []


def test_a_region_inside_another_is_part_of_it():
    assert len(salient_boxes(scene((RED, (16, 16, 48, 48)), (BLUE, (26, 26, 38, 38))), max_boxes=4)) == 1


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (300, 2), (2, 2)])
def test_pictures_of_any_shape_are_accepted(size):
    assert isinstance(salient_boxes(scene(size=size), max_boxes=2), list)


# --- boundaries: a scene of WORKING_PX is not resized, so its boxes are exact to the pixel ----------------------------

SQUARE = (WORKING_PX, WORKING_PX)


def found(*boxes, size=SQUARE):
    """Whether each red box of a scene is found, exactly."""
    expected = [aa.Box.from_pixels(*box, size=size) for box in boxes]
    boxes_found = salient_boxes(scene(*((RED, box) for box in boxes), size=size), max_boxes=8)
    return [box in boxes_found for box in expected]


def test_a_region_may_touch_one_side_of_the_picture_and_not_two():
    for one_side in ((0, 10, 10, 20), (10, 0, 20, 10), (38, 10, 48, 20), (10, 38, 20, 48)):
        assert found(one_side) == [True]
    for corner in ((0, 0, 10, 10), (38, 0, 48, 10), (0, 38, 10, 48), (38, 38, 48, 48)):
        assert found(corner) == [False]


def test_a_region_has_at_least_a_hundredth_of_the_picture():
    # 1% of 48 x 48 is 23.04 pixels; both rectangles have more pixels than the smallest segment (17)
    assert found((10, 10, 14, 16)) == [True]  # 24 pixels
    assert found((10, 10, 15, 14)) == [False]  # 20 pixels


def test_a_region_covers_at_most_two_fifths_of_the_picture():
    # 40% of 48 x 48 is 921.6 pixels
    assert found((4, 4, 34, 34)) == [True]  # 900 pixels
    assert found((4, 4, 35, 34)) == [False]  # 930 pixels


def test_a_part_of_fewer_than_17_pixels_joins_its_neighbor():
    def segments(width, height):
        pixels = np.asarray(scene((RED, (10, 10, 10 + width, 10 + height)), size=SQUARE)) / 255
        return segment(pixels).max() + 1

    assert segments(17, 1) == 2
    assert segments(16, 1) == 1


def test_regions_far_less_salient_than_the_best_are_dropped():
    strong, weak, faint = (10, 4, 24, 18), (10, 28, 24, 42), (30, 16, 44, 30)
    image = scene((RED, strong), ((120, 84, 84), weak), size=SQUARE)
    assert len(salient_boxes(image, max_boxes=4)) == 1
    assert len(salient_boxes(scene((RED, strong), (BLUE, weak), (RED, faint), size=SQUARE), max_boxes=4)) == 3


def test_the_most_salient_region_comes_first_and_max_boxes_cuts_the_rest():
    small, large = (4, 4, 14, 14), (24, 20, 44, 40)
    boxes = salient_boxes(scene((RED, small), (RED, large), size=SQUARE), max_boxes=2)
    assert boxes == [aa.Box.from_pixels(*box, size=SQUARE) for box in (large, small)]
    assert salient_boxes(scene((RED, small), (RED, large), size=SQUARE), max_boxes=1) == boxes[:1]
    assert salient_boxes(scene((RED, small), size=SQUARE), max_boxes=0) == []


def test_a_large_picture_is_reduced_before_it_is_segmented():
    size = (WORKING_PX * 4, WORKING_PX * 2)
    assert found((64, 32, 112, 64), size=size) == [True]
    assert found((64, 32, 66, 34), size=size) == [False]  # smaller than a pixel of the reduced picture


def test_two_segments_join_up_to_the_threshold_of_the_method():
    # Two columns of 24 equal pixels each: Int = 0, so they join up to a distance of k / 24 = 0.15 / 24 = 0.00625.
    def count(distance):
        colors = np.zeros((24, 2, 3))
        colors[:, 1, 0] = distance
        return segment(colors).max() + 1

    assert count(0.00624) == 1
    assert count(0.00626) == 2


def test_a_joined_segment_tolerates_its_largest_step_plus_its_share_of_k():
    # Columns 0 and 1 join at 0.005, which gives 48 pixels with Int = 0.005 and a tolerance of 0.005 + 0.15 / 48 =
    # 0.008125. The third column's own tolerance is 0.00625, and the smaller of the two decides.
    def count(step):
        colors = np.zeros((24, 3, 3))
        colors[:, 1, 0] = 0.005
        colors[:, 2, 0] = 0.005 + step
        return segment(colors).max() + 1

    assert count(0.00624) == 1
    assert count(0.00626) == 2


def test_boxes_of_a_large_picture_are_whole_pixels_of_the_reduced_one():
    size = (WORKING_PX * 4, WORKING_PX * 2)
    (box,) = salient_boxes(scene((RED, (65, 33, 111, 63)), size=size), max_boxes=4)
    assert (box.left * WORKING_PX).is_integer()
    assert (box.top * WORKING_PX / 2).is_integer()


def test_salience_counts_the_contrast_on_every_side():
    # Two squares on a background that is similar to them in one half and different in the other: the one that touches the
    # different half has the higher contrast, whatever the side, although the other one is a little larger.
    similar, different, square = (150, 70, 60), (60, 150, 70), (180, 50, 40)
    for half, inner, border in (
        ((0, 24, 48, 48), (6, 4, 17, 15), (30, 14, 40, 24)),  # different below
        ((0, 0, 48, 24), (6, 34, 17, 45), (30, 24, 40, 34)),  # above
        ((24, 0, 48, 48), (4, 6, 15, 17), (14, 30, 24, 40)),  # on the right
        ((0, 0, 24, 48), (34, 6, 45, 17), (24, 30, 34, 40)),  # on the left
    ):
        image = Image.new("RGB", SQUARE, similar)
        for color, box in ((different, half), (square, inner), (square, border)):
            image.paste(color, box)
        first, *_ = salient_boxes(image, max_boxes=2)
        assert first == aa.Box.from_pixels(*border, size=SQUARE)


def test_shading_does_not_cut_an_object_in_two():
    image = Image.new("RGB", SQUARE, BLUE)
    for row in range(12):
        image.paste((40 + 14 * row,) * 3, (14, 10 + row, 30, 11 + row))  # steps of about 0.045 in OKLab lightness
    assert salient_boxes(image, max_boxes=4) == [aa.Box.from_pixels(14, 10, 30, 22, size=SQUARE)]


def test_a_difference_in_color_is_more_salient_than_one_in_lightness():
    white, red = (30, 8, 40, 18), (8, 30, 18, 40)
    boxes = salient_boxes(scene(((255, 255, 255), white), (RED, red), size=SQUARE), max_boxes=1)
    assert boxes == [aa.Box.from_pixels(*red, size=SQUARE)]
