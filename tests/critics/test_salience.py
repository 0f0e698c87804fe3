"""Segmentation of pictures by color, and the choice of the segments that stand out."""

import numpy as np
import pytest
from hypothesis import given
from PIL import Image

import artaug as aa
from artaug.critics.salience import salient_boxes, segment
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
