"""Boxes, masks and words on pictures are where they should be, and the picture stays as it was."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageColor

import artaug as aa
from artaug.drawing import BOX_COLORS, Area, draw_areas, draw_boxes, draw_heatmap
from support.strategies import boxes as any_boxes
from support.strategies import masks

GREY = Image.new("RGB", (40, 20), "#808080")
EDGES = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted).filter(lambda edges: edges[1] - edges[0] > 1e-3)
BOXES = st.tuples(EDGES, EDGES).map(lambda edges: aa.Box(edges[0][0], edges[1][0], edges[0][1], edges[1][1]))


def pixels_of(image, color):
    return (np.asarray(image) == ImageColor.getrgb(color)).all(axis=-1)


@given(st.lists(BOXES, max_size=10), st.integers(1, 5))
def test_the_picture_grows_and_the_original_stays(boxes, scale):
    drawn = draw_boxes(GREY, boxes, scale=scale)

    assert drawn.size == (40 * scale, 20 * scale)
    assert GREY.getcolors() == [(800, (128, 128, 128))]


@given(BOXES)
def test_an_outline_touches_all_edges_of_its_box_and_nothing_outside(box):
    drawn = draw_boxes(GREY, [box], labels=[""])

    rows, columns = np.nonzero(pixels_of(drawn, BOX_COLORS[0]))
    left, top, right, bottom = box.to_pixels(drawn.size)
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (left, top, right, bottom)


def test_no_boxes_leave_an_enlarged_picture():
    assert draw_boxes(GREY, []).getcolors() == [(160 * 80, (128, 128, 128))]


def test_boxes_have_different_colours_and_are_numbered_by_default():
    boxes = [aa.Box(0, 0, 0.4, 1), aa.Box(0.5, 0, 1, 1)]

    numbered, named = draw_boxes(GREY, boxes), draw_boxes(GREY, boxes, labels=["1", "2"])
    bare = draw_boxes(GREY, boxes, labels=["", " "])

    assert numbered.tobytes() == named.tobytes()
    assert numbered.tobytes() != bare.tobytes()
    assert pixels_of(bare, BOX_COLORS[0]).any()
    assert pixels_of(bare, BOX_COLORS[1]).any()


def test_a_label_in_the_last_corner_stays_in_the_picture():
    corner = aa.Box(0.9, 0.9, 1, 1)

    drawn = draw_boxes(GREY, [corner], labels=["a window"])

    plate = pixels_of(drawn, BOX_COLORS[0])
    assert plate.any(axis=0).sum() > 30


def test_grey_and_transparent_pictures_are_drawn_on_too():
    for mode in ("L", "RGBA", "P"):
        assert draw_boxes(GREY.convert(mode), [aa.Box(0, 0, 1, 1)]).mode == "RGB"


def test_labels_have_to_match():
    with pytest.raises(aa.InvalidValueError, match=r"received 1 boxes and 2 labels\. Pass one label for each box"):
        draw_boxes(GREY, [aa.Box(0, 0, 1, 1)], labels=["a", "b"])


def test_a_picture_cannot_be_drawn_smaller():
    with pytest.raises(aa.InvalidValueError, match="scale=0"):
        draw_boxes(GREY, [], scale=0)


# --- areas ---

PAGE = Image.new("RGB", (96, 64), "#808080")


def picture_of(drawn):
    """What was drawn on the picture, without the words below."""
    return drawn.crop((0, 0, *PAGE.size))


def changed(drawn):
    return (np.asarray(picture_of(drawn)) != np.asarray(PAGE)).any(axis=-1)


@given(
    st.lists(
        st.builds(Area, shape=any_boxes() | masks(), text=st.text(max_size=80), feather=st.sampled_from([0.0, 0.1]))
    )
)
def test_areas_leave_the_picture_as_it_was_and_widen_nothing(areas):
    drawn = draw_areas(PAGE, areas, heading="a kitchen")

    assert drawn.width == PAGE.width
    assert drawn.height > PAGE.height
    assert PAGE.getcolors() == [(96 * 64, (128, 128, 128))]


def test_nothing_to_show_is_the_picture_alone():
    assert draw_areas(PAGE, []).tobytes() == PAGE.tobytes()


def test_a_mask_tints_where_it_weighs_and_nowhere_else():
    mask = aa.Mask.from_array(np.array([[0, 0, 1], [0, 0, 0.5]]))

    tinted = changed(draw_areas(PAGE, [Area(shape=mask, text="ivy")]))

    assert not tinted[:, :64].any()
    assert tinted[:, 64:].all()


def test_the_stronger_the_weight_the_denser_the_tint():
    mask = aa.Mask.from_array(np.array([[0.2, 0.6, 1.0]]))

    row = np.asarray(draw_areas(PAGE, [Area(shape=mask, text="ivy")]), dtype=int)[60, [8, 40, 72]]

    towards = np.abs(row - 128).sum(axis=1)
    assert towards[0] < towards[1] < towards[2]


def test_the_number_of_a_mask_lies_on_it():
    ring = np.zeros((9, 9))
    ring[1:8, 1:8], ring[3:6, 3:6] = 1, 0
    mask = aa.Mask.from_array(ring)

    drawn = np.asarray(picture_of(draw_areas(PAGE, [Area(shape=mask, text="a ring")])))

    rows, columns = np.nonzero((drawn == ImageColor.getrgb(BOX_COLORS[0])).all(axis=-1))
    assert ring[rows.min() * 9 // 64, columns.min() * 9 // 96] == 1


def test_a_sharp_box_is_framed_and_a_feathered_one_tinted_too():
    box = aa.Box(0.2, 0.2, 0.8, 0.8)

    sharp, soft = (changed(draw_areas(PAGE, [Area(shape=box, text="a", feather=feather)])) for feather in (0, 0.1))

    middle = (40, 60)
    assert not sharp[middle]
    assert soft[middle]
    left, top, right, bottom = box.to_pixels(PAGE.size)
    assert not sharp[:top].any()
    assert sharp[top, left:right].all()
    assert soft[:top, left:right].any(), "the edge is soft"
    assert not sharp[bottom:].any()


def test_every_word_is_below_however_long():
    short, long = (draw_areas(PAGE, [Area(shape=aa.Box(0, 0, 1, 1), text="ivy " * times)]) for times in (1, 40))

    assert long.height > short.height + 5 * 15


def test_every_area_has_its_colour_beside_its_words():
    halves = [Area(shape=aa.Box(0, 0, 0.5, 1), text="a"), Area(shape=aa.Box(0.5, 0, 1, 1), text="b")]

    below = draw_areas(PAGE, halves).crop((0, 64, 96, 200))

    assert pixels_of(below, BOX_COLORS[0]).any()
    assert pixels_of(below, BOX_COLORS[1]).any()


# --- heat maps ---


def test_a_heat_map_is_the_grey_picture_where_weights_are_least_and_warmest_where_they_are_largest():
    drawn = np.asarray(draw_heatmap(Image.new("RGB", (80, 40), "#208020"), np.eye(2)[::-1])).astype(int)
    corners = drawn[[0, -1, 0, -1], [0, 0, -1, -1]]
    cold, warm = corners[[0, 3]], corners[[1, 2]]
    assert (cold.max(axis=1) == cold.min(axis=1)).all()
    assert warm.sum() > 2 * cold.sum()


def test_even_weights_leave_a_grey_picture():
    drawn = np.asarray(draw_heatmap(GREY, np.full((3, 5), 0.25)))
    assert drawn.max() == drawn.min()


def test_a_heading_stands_below_a_heat_map():
    assert draw_heatmap(GREY, np.eye(2), heading="a red cone").height > GREY.height


@pytest.mark.parametrize("weights", [np.ones(3), np.zeros((0, 2)), np.array([[1.0, np.nan]]), np.array([[-1.0, 1.0]])])
def test_what_is_no_grid_of_weights_is_refused(weights):
    with pytest.raises(aa.InvalidValueError, match="rows and columns of finite numbers"):
        draw_heatmap(GREY, weights)
