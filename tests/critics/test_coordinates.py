"""Conventions agree with the image processors that make the picture in which a model counts."""

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
    assert resize.output_size(size) == expected[::-1]


@given(st.integers(1, 300), st.integers(201, 9000))
def test_a_picture_that_the_processor_refuses_is_refused(short, factor):
    with pytest.raises(ValueError, match="aspect ratio"):
        smart_resize(short, short * factor)
    for size in ((short, short * factor), (short * factor, short), (0, 5)):
        with pytest.raises(aa.GeometryError, match="cannot be resized for the model"):
            SmartResize().output_size(size)


@pytest.mark.parametrize("size", [(640, 480), (31, 500), (1024, 1024), (2000, 30)])
def test_the_defaults_are_those_of_the_processor_itself(size):
    processor = Qwen2VLImageProcessorPil()
    (_, down, across), *_ = processor(Image.new("RGB", size), return_tensors="np")["image_grid_thw"]
    assert SmartResize().output_size(size) == (across * processor.patch_size, down * processor.patch_size)


@pytest.mark.parametrize("size", [(256, 200), (1500, 1000)])
def test_a_convention_is_fitted_to_the_processor_of_a_checkpoint(size):
    processor = Qwen2VLImageProcessorPil(min_pixels=200 * 28 * 28, max_pixels=400 * 28 * 28)
    fitted = coordinates_for("qwen2_5_vl").fitted_to(processor)

    (_, down, across), *_ = processor(Image.new("RGB", size), return_tensors="np")["image_grid_thw"]

    assert fitted.extent(size) == (across * processor.patch_size, down * processor.patch_size)
    assert fitted.extent(size) != coordinates_for("qwen2_5_vl").extent(size)


def test_a_convention_that_does_not_depend_on_the_processor_is_unchanged():
    for family in ("qwen2_vl", "qwen3_vl", "internvl", "gemma3", "molmo"):
        assert coordinates_for(family).fitted_to(Qwen2VLImageProcessorPil()) == coordinates_for(family)


def test_pixels_cannot_be_fitted_to_a_processor_that_resizes_in_another_way():
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
def test_a_llava_box_lies_where_the_model_sees_the_content(processor, frame, size):
    fitted = coordinates_for("llava").fitted_to(processor)
    box = aa.Box(0.4, 0.3, 0.6, 0.55)
    picture = Image.new("RGB", size)
    picture.paste("white", box.to_pixels(size))

    model_input = _model_input(processor, picture, frame)

    rows, columns = np.nonzero(model_input > 0.5)
    measured = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    written = fitted.encode(box, size=size)
    scale = model_input.shape[1], model_input.shape[0]
    assert fitted.frame == frame
    assert measured == pytest.approx([edge * scale[index % 2] for index, edge in enumerate(written)], abs=1.5)


def _model_input(processor, picture, frame):
    """The picture that the model receives, (height, width) from 0 to 1."""
    if frame == "padded":
        pixels = processor.pad_to_square(np.asarray(picture).transpose(2, 0, 1), background_color=(0, 0, 0))
        return np.asarray(pixels)[0] / 255
    if frame == "whole":
        return np.asarray(picture)[:, :, 0] / 255
    return processor(picture, do_normalize=False, return_tensors="np")["pixel_values"][0][0]


@given(squares, boxes(), sizes)
def test_decoding_inverts_encoding(convention, box, size):
    edges = convention.decode(convention.encode(box, size=size), size=size)
    assert edges == pytest.approx((box.left, box.top, box.right, box.bottom), abs=1e-8)


@given(st.data(), sizes, st.sampled_from(["thousandths", "percent", "pixels"]), st.sampled_from(["xyxy", "yxyx"]))
def test_whole_numbers_survive_decoding_and_encoding_exactly(data, size, unit, order):
    convention = Coordinates(unit, order=order, resize=SmartResize() if unit == "pixels" else None)
    corners = [
        sorted(data.draw(st.sets(st.integers(0, int(limit)), min_size=2, max_size=2)))
        for limit in _limits(convention, size)
    ]
    numbers = (corners[0][0], corners[1][0], corners[0][1], corners[1][1])
    assert convention.encode(aa.Box(*convention.decode(numbers, size=size)), size=size) == numbers


def _limits(convention, size):
    right, bottom = convention.extent(size)
    return (bottom, right) if convention.order == "yxyx" else (right, bottom)


@given(boxes(), sizes)
def test_relative_boxes_are_decoded_bit_for_bit(box, size):
    relative = Coordinates("relative")
    assert aa.Box(*relative.decode(relative.encode(box, size=size), size=size)) == box


@given(boxes(), sizes)
def test_a_point_is_the_center_of_a_box(box, size):
    molmo = coordinates_for("molmo")
    left, top, right, bottom = molmo.decode(molmo.encode(box, size=size), size=size)
    assert ((left + right) / 2, (top + bottom) / 2) == pytest.approx(box.center, abs=1e-9)
    assert (right - left, bottom - top) == pytest.approx((0.25, 0.25))


def test_the_same_numbers_are_different_boxes_in_different_conventions():
    numbers, size = (200, 100, 400, 300), (1000, 500)
    decoded = {family: convention.decode(numbers, size=size) for family, convention in FAMILIES.items()}
    assert decoded["qwen3_vl"] == (0.2, 0.1, 0.4, 0.3)
    assert decoded["gemma3"] == (0.1, 0.2, 0.3, 0.4)
    assert decoded["qwen2_5_vl"] == pytest.approx((200 / 1008, 100 / 504, 400 / 1008, 300 / 504))
    assert len(set(decoded.values())) >= 5


@given(conventions)
def test_a_convention_survives_json(convention):
    assert from_json(Coordinates, to_json(convention)) == convention


@pytest.mark.parametrize("numbers", [(), (1,), (1, 2, 3), (1, 2, 3, 4, 5)])
def test_a_box_has_four_numbers_and_a_point_two(numbers):
    with pytest.raises(aa.GeometryError, match=f"received {len(numbers)} numbers"):
        Coordinates("relative").decode(numbers, size=(8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": "thousandths", "resize": SmartResize()}, "has a resize, which only the unit 'pixels' uses"),
        ({"unit": "relative", "point_radius": 0}, "need a point_radius in"),
        ({"unit": "relative", "point_radius": math.nan}, "need a point_radius in"),
        ({"unit": "inches"}, r"Coordinates\(unit=\'inches\'\): expected one of"),
        ({"unit": "relative", "key": "place"}, r"Coordinates\(key=\'place\'\): expected one of"),
    ],
)
def test_an_invalid_convention_is_refused(options, message):
    with pytest.raises(aa.InvalidValueError, match=message):
        Coordinates(**options)


def test_a_resize_with_min_above_max_is_refused():
    with pytest.raises(aa.InvalidValueError, match="need min_pixels <= max_pixels"):
        SmartResize(28, 1000, 999)


def test_an_unknown_family_is_refused():
    with pytest.raises(aa.InvalidValueError, match=r"convention of 'molmo9' is not known; known families are qwen2_vl"):
        coordinates_for("molmo9")


# --- boundaries ------------------------------------------------------------------------------------------------------


def test_an_aspect_ratio_of_exactly_200_is_accepted():
    for size in ((200, 1), (1, 200), (600, 3)):
        SmartResize().output_size(size)
    for size in ((201, 1), (1, 201), (601, 3)):
        with pytest.raises(aa.GeometryError, match="cannot be resized for the model"):
            SmartResize().output_size(size)


def test_pixel_counts_at_the_limits_are_not_scaled():
    exact = SmartResize(28, 56 * 56, 56 * 56)
    assert exact.output_size((56, 56)) == (56, 56)
    assert exact.output_size((57, 57)) == (56, 56)
    assert exact.output_size((55, 57)) == (56, 56)  # scaling would round 55 down, or 57 up
    assert smart_resize(57, 55, 28, 56 * 56, 56 * 56) == (56, 56)
    assert SmartResize(28, 28 * 28, 28 * 28).output_size((28, 28)) == (28, 28)


@pytest.mark.parametrize("radius", [0.5, 1e-6])
def test_a_point_radius_at_its_limits_is_accepted(radius):
    edges = Coordinates("relative", point_radius=radius).decode((0.5, 0.25), size=(8, 8))
    assert edges == (0.5 - radius, 0.25 - radius, 0.5 + radius, 0.25 + radius)


def test_a_point_radius_above_a_half_is_refused():
    with pytest.raises(aa.InvalidValueError, match="need a point_radius in"):
        Coordinates("relative", point_radius=0.500001)


def test_a_point_is_decoded_in_the_order_of_its_convention():
    assert Coordinates("relative", order="yxyx").decode((0.25, 0.75), size=(8, 8)) == (0.625, 0.125, 0.875, 0.375)
    assert Coordinates("relative", order="xyxy").decode((0.25, 0.75), size=(8, 8)) == (0.125, 0.625, 0.375, 0.875)


@pytest.mark.parametrize(
    ("frame", "points"), [("padded", ((0.0, 0.25), (1.0, 0.75))), ("cropped", ((0.25, 0), (0.75, 1)))]
)
def test_the_square_frame_is_centered_on_the_picture(frame, points):
    # A picture of 400 x 200: padded it is 400 x 400 with 100 above and below; cropped, the middle 200 x 200.
    convention = Coordinates("relative", frame=frame)
    if frame == "padded":
        decoded = [convention.decode_point(x, y, size=(400, 200)) for x, y in points]
        assert decoded == [(0.0, 0.0), (1.0, 1.0)]
    else:
        decoded = [convention.decode_point(x, y, size=(400, 200)) for x, y in ((0, 0), (1, 1))]
        assert decoded == [tuple(map(float, point)) for point in points]


def test_relative_numbers_are_not_rounded_and_others_are():
    box = aa.Box(0.1, 0.2, 0.30000000000000004, 0.4)
    assert Coordinates("relative").encode(box, size=(8, 8)) == (0.1, 0.2, 0.30000000000000004, 0.4)
    assert Coordinates("thousandths").encode(box, size=(8, 8)) == (100.0, 200.0, 300.0, 400.0)


def test_a_model_that_pads_and_crops_is_fitted_as_cropped():
    # transformers' processors crop after they pad, so the model sees the cropped square.
    class PadsAndCrops:
        do_pad = do_center_crop = True

    assert Coordinates("relative", frame="padded").fitted_to(PadsAndCrops()).frame == "cropped"
    assert Coordinates("relative").fitted_to(PadsAndCrops()).frame == "whole"
