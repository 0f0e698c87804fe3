"""Cutting pictures into parts, and telling which stand out."""

import numpy as np
import pytest
from hypothesis import given
from PIL import Image

import artaug as aa
from artaug.critics.salience import salient_boxes, segments
from support.strategies import images, pixels

GREY, RED, BLUE = (90, 90, 90), (180, 50, 40), (40, 60, 180)


def scene(*patches, size=(64, 64)):
    image = Image.new("RGB", size, GREY)
    for colour, box in patches:
        image.paste(colour, box)
    return image


@given(pixels())
def test_every_pixel_belongs_to_one_connected_part(picture):
    numbers = segments(picture / 255)
    assert numbers.shape == picture.shape[:2]
    assert set(np.unique(numbers)) == set(range(numbers.max() + 1))
    for number in range(numbers.max() + 1):
        inside = numbers == number
        reached = np.zeros_like(inside)
        reached[tuple(np.argwhere(inside)[0])] = True
        while True:
            grown = reached.copy()
            grown[1:] |= reached[:-1]
            grown[:-1] |= reached[1:]
            grown[:, 1:] |= reached[:, :-1]
            grown[:, :-1] |= reached[:, 1:]
            grown &= inside
            if (grown == reached).all():
                break
            reached = grown
        assert (reached == inside).all()


@given(images())
def test_boxes_are_few_and_do_not_repeat_each_other(image):
    boxes = salient_boxes(image, at_most=3)
    assert len(boxes) <= 3
    assert all(one.iou(two) <= 0.4 for index, one in enumerate(boxes) for two in boxes[:index])


def test_neighbours_of_different_colours_are_two_things():
    boxes = salient_boxes(scene((RED, (12, 20, 28, 44)), (BLUE, (28, 20, 48, 44))), at_most=4)
    assert sorted(boxes, key=lambda box: box.left) == [
        aa.Box.from_pixels(12, 20, 28, 44, size=(64, 64)),
        aa.Box.from_pixels(28, 20, 48, 44, size=(64, 64)),
    ]


def test_background_does_not_stand_out():
    stripes = scene((RED, (0, 0, 64, 20)), (BLUE, (0, 40, 64, 64)))
    assert salient_boxes(stripes, at_most=4) == []


def test_a_thing_inside_a_thing_is_one_thing():
    assert len(salient_boxes(scene((RED, (16, 16, 48, 48)), (BLUE, (26, 26, 38, 38))), at_most=4)) == 1


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (300, 2), (2, 2)])
def test_odd_shapes_are_no_trouble(size):
    assert isinstance(salient_boxes(scene(size=size), at_most=2), list)
