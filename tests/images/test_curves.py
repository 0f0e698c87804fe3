"""Curves are where their points are, and their page does not grow with them."""

import re
from xml.etree import ElementTree as ET

import pytest

from artaug.images.curves import curves_svg


def places(svg):
    """The points of each curve, in pixels."""
    lines = ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}polyline")
    return [[tuple(map(float, point.split(","))) for point in line.get("points").split()] for line in lines]


def test_a_larger_number_is_higher_and_a_later_one_is_further_right():
    ((first, second, third),) = places(curves_svg({"loss": [(1, 0.5), (2, 1.5), (3, 1.0)]}, x="step", y="loss"))
    assert first[0] < second[0] < third[0]
    assert second[1] < third[1] < first[1]
    assert third[1] == pytest.approx((first[1] + second[1]) / 2, abs=0.1)


def test_curves_share_their_axes_and_have_their_names():
    svg = curves_svg({"<low>": [(0, 0), (10, 1)], "high": [(0, 1), (10, 2)]}, x="step", y="rate")
    low, high = places(svg)
    assert low[1] == (high[0][0] + (low[1][0] - low[0][0]), high[0][1])
    assert "&lt;low&gt;" in svg
    assert re.findall(r">(0|2|10)</text>", svg)


def test_a_level_line_is_inside_and_numbers_that_are_not_finite_are_left_out():
    ((first, second),) = places(curves_svg({"a": [(1, 1.0), (2, float("nan")), (3, 1.0)]}, x="step", y="rate"))
    assert first[1] == second[1]
    assert 30 < first[1] < 120
    assert curves_svg({"a": [(1, float("inf"))], "b": []}, x="step", y="rate") == ""


def test_a_long_curve_has_as_many_points_as_can_be_seen():
    svg = curves_svg({"loss": [(step, step % 7) for step in range(20_000)]}, x="step", y="loss")
    assert len(svg) < 8_000
