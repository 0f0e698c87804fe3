"""Boxes on pictures are where they should be, and the picture stays as it was."""

import base64
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageColor

import artaug as aa
from artaug.showing import COLOURS, contact_sheet, data_address, draw_boxes

GREY = Image.new("RGB", (40, 20), "#808080")
EDGES = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted).filter(lambda edges: edges[1] - edges[0] > 1e-3)
BOXES = st.tuples(EDGES, EDGES).map(lambda edges: aa.Box(edges[0][0], edges[1][0], edges[0][1], edges[1][1]))


def pixels_of(image, colour):
    return (np.asarray(image) == ImageColor.getrgb(colour)).all(axis=-1)


@given(st.lists(BOXES, max_size=10), st.integers(1, 5))
def test_the_picture_grows_and_the_original_stays(boxes, scale):
    drawn = draw_boxes(GREY, boxes, scale=scale)

    assert drawn.size == (40 * scale, 20 * scale)
    assert GREY.getcolors() == [(800, (128, 128, 128))]


@given(BOXES)
def test_an_outline_touches_all_edges_of_its_box_and_nothing_outside(box):
    drawn = draw_boxes(GREY, [box], labels=[""])

    rows, columns = np.nonzero(pixels_of(drawn, COLOURS[0]))
    left, top, right, bottom = box.to_pixels(drawn.size)
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (left, top, right, bottom)


def test_no_boxes_leave_an_enlarged_picture():
    assert draw_boxes(GREY, []).getcolors() == [(160 * 80, (128, 128, 128))]


def test_boxes_are_told_apart_by_colour_and_numbered_by_default():
    boxes = [aa.Box(0, 0, 0.4, 1), aa.Box(0.5, 0, 1, 1)]

    numbered, named = draw_boxes(GREY, boxes), draw_boxes(GREY, boxes, labels=["1", "2"])
    bare = draw_boxes(GREY, boxes, labels=["", " "])

    assert numbered.tobytes() == named.tobytes()
    assert numbered.tobytes() != bare.tobytes()
    assert pixels_of(bare, COLOURS[0]).any()
    assert pixels_of(bare, COLOURS[1]).any()


def test_a_label_in_the_last_corner_stays_in_the_picture():
    corner = aa.Box(0.9, 0.9, 1, 1)

    drawn = draw_boxes(GREY, [corner], labels=["a window"])

    plate = pixels_of(drawn, COLOURS[0])
    assert plate.any(axis=0).sum() > 30


def test_grey_and_transparent_pictures_are_drawn_on_too():
    for mode in ("L", "RGBA", "P"):
        assert draw_boxes(GREY.convert(mode), [aa.Box(0, 0, 1, 1)]).mode == "RGB"


def test_labels_have_to_match():
    with pytest.raises(aa.InvalidValueError, match="received 1 boxes and 2 labels: need one a box"):
        draw_boxes(GREY, [aa.Box(0, 0, 1, 1)], labels=["a", "b"])


def test_a_picture_cannot_be_drawn_smaller():
    with pytest.raises(aa.InvalidValueError, match="scale=0"):
        draw_boxes(GREY, [], scale=0)


def read(address):
    head, _, body = address.partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(body)))
    assert head == f"data:image/{image.format.lower()};base64"
    return image


@given(st.sampled_from(["RGB", "RGBA", "L", "P", "CMYK"]), st.integers(1, 256), st.integers(1, 256))
def test_a_small_picture_comes_back_without_loss(mode, width, height):
    image = Image.effect_noise((width, height), 60).convert(mode)

    back = read(data_address(image))

    assert back.convert("RGB").tobytes() == image.convert("RGB").tobytes()


def test_a_large_picture_is_reduced_and_the_original_stays():
    image = Image.linear_gradient("L").resize((1600, 800)).convert("RGB")

    back = read(data_address(image))

    assert (back.format, back.size) == ("WEBP", (768, 384))
    assert image.size == (1600, 800)


def test_a_contact_sheet_holds_every_picture_in_its_place():
    colours = ["red", "green", "blue"]
    sheet = contact_sheet([Image.new("RGB", (8, 8), colour) for colour in colours], columns=2, labels=["a", "b", "c"])
    step_x, step_y = 8 * 3 + 8, 8 * 3 + 8 + 23
    places = [(4, 4), (step_x + 4, 4), (4, step_y + 4)]
    assert [sheet.getpixel(place) for place in places] == [ImageColor.getrgb(colour) for colour in colours]
    assert sheet.getpixel((step_x + 4, step_y + 4)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("images", "options"),
    [
        ([], {}),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))], {}),
        ([Image.new("RGB", (8, 8))], {"labels": []}),
        ([Image.new("RGB", (8, 8))], {"scale": 0}),
    ],
    ids=["no pictures", "two sizes", "too few labels", "no scale"],
)
def test_a_contact_sheet_that_cannot_be_made_is_refused(images, options):
    with pytest.raises(aa.InvalidValueError, match="contact_sheet received"):
        contact_sheet(images, **options)
