"""A convention means the same to us as to the processors that make the picture the model counts in."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

import artaug as aa
from artaug._internal.values import from_json, to_json
from artaug.critics import FAMILIES, Coordinates, SmartResize, coordinates_for
from support.strategies import boxes

sides = st.integers(1, 4000)
sizes = st.tuples(sides, sides).filter(lambda size: max(size) <= 200 * min(size))
resizes = st.builds(SmartResize, st.sampled_from([28, 32, 14]), st.integers(1, 10**5), st.integers(10**5, 10**7))
conventions = st.sampled_from(list(FAMILIES.values())) | st.one_of(
    st.builds(
        Coordinates,
        st.sampled_from(["relative", "percent", "thousandths"]),
        order=st.sampled_from(["xyxy", "yxyx", "xywh"]),
        frame=st.sampled_from(["whole", "padded", "cropped"]),
    ),
    st.builds(Coordinates, st.just("pixels"), frame=st.sampled_from(["whole", "padded"]), resize=st.none() | resizes),
)
squares = conventions.filter(lambda convention: convention.order != "points")


@given(sizes, resizes)
def test_the_size_is_the_one_that_qwen_processors_resize_to(size, resize):
    width, height = size
    expected = smart_resize(height, width, resize.multiple, resize.min_pixels, resize.max_pixels)
    assert resize.size_of(size) == expected[::-1]


@given(st.integers(1, 300), st.integers(201, 9000))
def test_a_picture_the_processor_refuses_is_refused(short, factor):
    with pytest.raises(ValueError, match="aspect ratio"):
        smart_resize(short, short * factor)
    for size in ((short, short * factor), (short * factor, short), (0, 5)):
        with pytest.raises(aa.GeometryError, match="cannot be resized for the model"):
            SmartResize().size_of(size)


@pytest.mark.parametrize("size", [(640, 480), (31, 500), (1024, 1024), (2000, 30)])
def test_the_defaults_are_those_of_the_processor_itself(size):
    processor = Qwen2VLImageProcessorPil()
    (_, down, across), *_ = processor(Image.new("RGB", size), return_tensors="np")["image_grid_thw"]
    assert SmartResize().size_of(size) == (across * processor.patch_size, down * processor.patch_size)


@pytest.mark.parametrize("size", [(256, 200), (1500, 1000)])
def test_a_convention_is_fitted_to_the_processor_of_a_checkpoint(size):
    processor = Qwen2VLImageProcessorPil(min_pixels=200 * 28 * 28, max_pixels=400 * 28 * 28)
    fitted = coordinates_for("qwen2_5_vl").fitted_to(processor)

    (_, down, across), *_ = processor(Image.new("RGB", size), return_tensors="np")["image_grid_thw"]

    assert fitted.extent(size) == (across * processor.patch_size, down * processor.patch_size)
    assert fitted.extent(size) != coordinates_for("qwen2_5_vl").extent(size)


def test_a_convention_that_does_not_depend_on_the_processor_stays():
    for family in ("qwen2_vl", "qwen3_vl", "internvl", "gemma3", "molmo"):
        assert coordinates_for(family).fitted_to(Qwen2VLImageProcessorPil()) == coordinates_for(family)


def test_pixels_cannot_be_fitted_to_a_processor_that_resizes_otherwise():
    with pytest.raises(aa.InvalidValueError, match="CLIPImageProcessorPil does not resize as Qwen-VL processors do"):
        coordinates_for("qwen2_5_vl").fitted_to(CLIPImageProcessorPil())


@pytest.mark.parametrize(
    ("processor", "frame"),
    [
        (CLIPImageProcessorPil(), "cropped"),
        (LlavaImageProcessorPil(do_pad=True, do_center_crop=False), "padded"),
        (Qwen2VLImageProcessorPil(), "whole"),
    ],
    ids=["cropped", "padded", "whole"],
)
@pytest.mark.parametrize("size", [(600, 400), (400, 600), (500, 500)])
def test_a_llava_box_lies_where_the_model_sees_it(processor, frame, size):
    fitted = coordinates_for("llava").fitted_to(processor)
    box = aa.Box(0.4, 0.3, 0.6, 0.55)
    picture = Image.new("RGB", size)
    picture.paste("white", box.to_pixels(size))

    seen = _seen(processor, picture, frame)

    rows, columns = np.nonzero(seen > 0.5)
    measured = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    written = fitted.write(box, size=size)
    scale = seen.shape[1], seen.shape[0]
    assert fitted.frame == frame
    assert measured == pytest.approx([at * scale[place % 2] for place, at in enumerate(written)], abs=1.5)


def _seen(processor, picture, frame):
    """The picture as the model is given it, (height, width) from 0 to 1."""
    if frame == "padded":
        pixels = processor.pad_to_square(np.asarray(picture).transpose(2, 0, 1), background_color=(0, 0, 0))
        return np.asarray(pixels)[0] / 255
    if frame == "whole":
        return np.asarray(picture)[:, :, 0] / 255
    made = processor(picture, do_normalize=False, return_tensors="np")["pixel_values"][0]
    return made[0]


@given(squares, boxes(), sizes)
def test_what_is_written_is_read_as_the_same_box(convention, box, size):
    edges = convention.edges(convention.write(box, size=size), size=size)
    assert edges == pytest.approx((box.left, box.top, box.right, box.bottom), abs=1e-8)


@given(st.data(), sizes, st.sampled_from(["thousandths", "percent", "pixels"]), st.sampled_from(["xyxy", "yxyx"]))
def test_whole_numbers_are_written_exactly_as_they_were_read(data, size, unit, order):
    convention = Coordinates(unit, order=order, resize=SmartResize() if unit == "pixels" else None)
    corners = [
        sorted(data.draw(st.sets(st.integers(0, int(far)), min_size=2, max_size=2))) for far in _far(convention, size)
    ]
    numbers = (corners[0][0], corners[1][0], corners[0][1], corners[1][1])
    assert convention.write(aa.Box(*convention.edges(numbers, size=size)), size=size) == numbers


def _far(convention, size):
    across, down = convention.extent(size)
    return (down, across) if convention.order == "yxyx" else (across, down)


@given(boxes(), sizes)
def test_relative_boxes_are_read_bit_for_bit(box, size):
    relative = Coordinates("relative")
    assert aa.Box(*relative.edges(relative.write(box, size=size), size=size)) == box


@given(boxes(), sizes)
def test_a_point_is_the_middle_of_a_box(box, size):
    molmo = coordinates_for("molmo")
    left, top, right, bottom = molmo.edges(molmo.write(box, size=size), size=size)
    assert ((left + right) / 2, (top + bottom) / 2) == pytest.approx(box.center)
    assert (right - left, bottom - top) == pytest.approx((0.25, 0.25))


def test_the_same_numbers_mean_other_places_in_other_conventions():
    numbers, size = (200, 100, 400, 300), (1000, 500)
    read = {family: convention.edges(numbers, size=size) for family, convention in FAMILIES.items()}
    assert read["qwen3_vl"] == (0.2, 0.1, 0.4, 0.3)
    assert read["gemma3"] == (0.1, 0.2, 0.3, 0.4)
    assert read["qwen2_5_vl"] == pytest.approx((200 / 1008, 100 / 504, 400 / 1008, 300 / 504))
    assert len(set(read.values())) >= 5


@given(conventions)
def test_a_convention_survives_json(convention):
    assert from_json(Coordinates, to_json(convention)) == convention


@pytest.mark.parametrize("numbers", [(), (1,), (1, 2, 3), (1, 2, 3, 4, 5)])
def test_a_box_is_four_numbers_and_a_point_two(numbers):
    with pytest.raises(aa.GeometryError, match=f"received {len(numbers)} numbers"):
        Coordinates("relative").edges(numbers, size=(8, 8))


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"unit": "thousandths", "resize": SmartResize()}, "would ignore its resize"),
        ({"unit": "relative", "reach": 0}, "need a reach in"),
        ({"unit": "relative", "reach": math.nan}, "need a reach in"),
        ({"unit": "inches"}, "Coordinates: unit"),
        ({"unit": "relative", "key": "place"}, "Coordinates: key"),
    ],
)
def test_a_convention_that_means_nothing_is_refused(options, fault):
    with pytest.raises(aa.InvalidValueError, match=fault):
        Coordinates(**options)


def test_a_resize_that_leaves_no_size_is_refused():
    with pytest.raises(aa.InvalidValueError, match="need min_pixels <= max_pixels"):
        SmartResize(28, 1000, 999)


def test_an_unknown_family_is_not_guessed():
    with pytest.raises(aa.InvalidValueError, match=r"convention of 'molmo9' is not known; known families are qwen2_vl"):
        coordinates_for("molmo9")
