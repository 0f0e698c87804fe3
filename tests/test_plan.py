"""Plans, and what a greedy planner takes of a critique."""

import io
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import artaug as aa
from artaug.drawing import draw_areas
from artaug.plan import run_planner
from support.strategies import critiques, plans, prompts

WHOLE = aa.Box(0, 0, 1, 1)


@given(prompts, critiques, st.integers(1, 4), st.floats(0, 1), st.floats(0, 0.2))
def test_a_greedy_plan_keeps_its_limits(prompt, critique, max_regions, max_iou, min_area):
    plan = aa.GreedyPlanner(max_regions=max_regions, max_iou=max_iou, min_area=min_area).plan(prompt, critique)
    taken = [region.area for region in plan.regions]
    assert plan.prompt == prompt
    assert len(taken) <= max_regions
    assert all(box.area >= min_area for box in taken)
    assert all(box.iou(earlier) <= max_iou for index, box in enumerate(taken) for earlier in taken[:index])
    suggested = iter((suggestion.box, suggestion.prompt) for suggestion in critique.suggestions)
    assert all((region.area, region.prompt) in suggested for region in plan.regions), "the critic's order is kept"


@given(prompts, critiques)
def test_what_is_left_out_overlaps_is_tiny_or_too_many(prompt, critique):
    planner = aa.GreedyPlanner(max_regions=2)
    taken = [region.area for region in planner.plan(prompt, critique).regions]
    for suggestion in critique.suggestions:
        overlaps = any(suggestion.box.iou(box) > planner.max_iou for box in taken)
        assert suggestion.box in taken or overlaps or suggestion.box.area < planner.min_area or len(taken) == 2


def plan_of(planner, *boxes):
    """The boxes that a planner takes of suggestions with these."""
    suggestions = tuple(aa.Suggestion(box, f"part {index}") for index, box in enumerate(boxes))
    return [region.area for region in planner.plan("a pear", aa.Critique(suggestions)).regions]


def test_a_box_of_exactly_the_minimum_area_is_taken_and_a_smaller_one_is_not():
    eighth = aa.Box(0, 0, 0.5, 0.25)
    assert eighth.area == 0.125
    assert plan_of(aa.GreedyPlanner(min_area=0.125), eighth) == [eighth]
    assert plan_of(aa.GreedyPlanner(min_area=math.nextafter(0.125, 1)), eighth) == []


def test_boxes_with_exactly_the_maximum_iou_are_both_taken_and_with_more_only_the_first():
    left, middle = aa.Box(0, 0, 0.5, 1), aa.Box(0.25, 0, 0.75, 1)
    assert left.iou(middle) == 1 / 3
    assert plan_of(aa.GreedyPlanner(max_iou=1 / 3), left, middle) == [left, middle]
    assert plan_of(aa.GreedyPlanner(max_iou=math.nextafter(1 / 3, 0)), left, middle) == [left]


def test_an_overlap_counts_with_any_box_taken_and_with_none_left_out():
    left, middle, right = aa.Box(0, 0, 0.5, 1), aa.Box(0.25, 0, 0.75, 1), aa.Box(0.5, 0, 1, 1)
    strict = aa.GreedyPlanner(max_iou=0)
    assert plan_of(strict, left, right, middle) == [left, right]
    assert plan_of(strict, left, middle, right) == [left, right]


def test_no_more_than_the_maximum_of_regions_is_taken():
    quarters = [aa.Box(x, y, x + 0.5, y + 0.5) for x in (0, 0.5) for y in (0, 0.5)]
    assert plan_of(aa.GreedyPlanner(max_regions=3), *quarters) == quarters[:3]
    assert plan_of(aa.GreedyPlanner(max_regions=1), *quarters) == quarters[:1]
    assert plan_of(aa.GreedyPlanner(), *quarters, WHOLE) == quarters


def test_limits_of_zero_and_one_are_allowed():
    assert plan_of(aa.GreedyPlanner(max_iou=1, min_area=1, feather=1), WHOLE, WHOLE) == [WHOLE, WHOLE]
    assert plan_of(aa.GreedyPlanner(max_iou=0, min_area=0, feather=0), WHOLE, WHOLE) == [WHOLE]


def test_by_default_boxes_may_overlap_by_half_and_cover_one_hundredth_of_the_picture():
    half, whole, between = aa.Box(0, 0, 0.5, 1), aa.Box(0, 0, 1, 1), aa.Box(0, 0, 0.8, 1)
    assert (half.iou(whole), round(half.iou(between), 3)) == (0.5, 0.625)
    assert plan_of(aa.GreedyPlanner(), half, whole) == [half, whole]
    assert plan_of(aa.GreedyPlanner(), half, between) == [half]
    small, tiny = aa.Box(0, 0, 0.1, 0.1), aa.Box(0, 0, 0.1, 0.09)
    assert plan_of(aa.GreedyPlanner(), tiny, small) == [small]


def test_a_planner_is_called_in_one_place_which_names_it_for_a_wrong_answer():
    class ReturnsText(aa.RegionPlanner):
        def plan(self, prompt, critique):
            return prompt

    assert run_planner(aa.GreedyPlanner(), "a pear", aa.Critique()) == aa.Plan("a pear")
    with pytest.raises(
        aa.ContractError, match=r"^ReturnsText\.plan returned str 'a pear' for 'a pear'\. Expected artaug\.Pl"
    ):
        run_planner(ReturnsText(), "a pear", aa.Critique())


def test_nothing_suggested_changes_nothing():
    assert aa.GreedyPlanner().plan("a pear", aa.Critique()) == aa.Plan("a pear")


def test_every_region_gets_the_weight_and_feather_of_the_planner():
    critique = aa.Critique((aa.Suggestion(WHOLE, "a pear, vivid"),))
    (region,) = aa.GreedyPlanner().plan("a pear", critique).regions
    assert (region.weight, region.feather) == (1, 0)
    assert (aa.Region(WHOLE, "ivy").weight, aa.Region(WHOLE, "ivy").feather) == (1, 0)
    plan = aa.GreedyPlanner(weight=2, feather=0.1).plan("a pear", critique)
    assert plan.regions == (aa.Region(WHOLE, "a pear, vivid", weight=2, feather=0.1),)


@pytest.mark.parametrize(
    "options", [{"max_regions": 0}, {"weight": 0}, {"feather": 2}, {"max_iou": -1}, {"min_area": float("nan")}]
)
def test_a_planner_that_could_plan_nothing_is_refused(options):
    with pytest.raises(aa.InvalidValueError, match=next(iter(options))):
        aa.GreedyPlanner(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": " "}, "a Region needs a prompt that says what is in it"),
        ({"weight": 0}, "Region(weight=0): expected a number greater than 0, received an int."),
        ({"weight": float("inf")}, "Region(weight=inf): expected a finite number, received a float."),
        ({"feather": 1.5}, "Region(feather=1.5): expected a number less than or equal to 1, received a float."),
    ],
)
def test_a_region_with_an_illegal_field_is_refused(options, message):
    with pytest.raises(aa.InvalidValueError, match=re.escape(message)):
        aa.Region(**{"area": WHOLE, "prompt": "a pear", **options})


# --- preview ---

PICTURE = Image.new("RGB", (64, 48), "#405060")
KITCHEN = aa.Plan("a kitchen", (aa.Region(aa.Box(0, 0, 0.5, 1), "a brightly lit window"),))


@given(plans, st.none() | st.tuples(st.integers(1, 90), st.integers(1, 90)))
def test_a_preview_has_the_width_of_its_size_and_does_not_change_the_picture(plan, size):
    preview = plan.preview(PICTURE, size=size)

    assert preview.width == (size[0] if size else 64 * 8)
    assert PICTURE.getcolors() == [(64 * 48, (0x40, 0x50, 0x60))]


@pytest.mark.parametrize(("width", "shown"), [(1, 512), (200, 400), (256, 512), (257, 257), (512, 512), (600, 600)])
def test_a_preview_enlarges_small_pictures_a_whole_number_of_times_and_shrinks_none(width, shown):
    assert KITCHEN.preview(Image.new("RGB", (width, 1))).width == shown


def test_a_preview_may_be_one_pixel_wide():
    assert KITCHEN.preview(size=(1, 1)).width == 1


def test_a_preview_needs_no_picture():
    assert KITCHEN.preview().width == 320
    assert KITCHEN.preview(size=(300, 100)).width == 300


def test_a_preview_shows_every_field_of_a_region():
    plain = aa.Region(WHOLE, "ivy")
    others = (
        aa.Region(WHOLE, "ivy", weight=2),
        aa.Region(WHOLE, "ivy", negative_prompt="dry"),
        aa.Region(WHOLE, "ivy", lora="ivy"),
    )

    previews = {aa.Plan("a wall", (region,)).preview().tobytes() for region in (plain, *others)}

    assert len(previews) == 4


@pytest.mark.parametrize(
    ("options", "caption"),
    [
        ({}, "ivy"),
        ({"weight": 0.5}, "ivy (weight 0.5)"),
        ({"negative_prompt": "dry"}, "ivy; not dry"),
        ({"lora": "leaves"}, "ivy; LoRA leaves"),
        ({"weight": 2, "negative_prompt": "dry", "lora": "leaves"}, "ivy (weight 2); not dry; LoRA leaves"),
    ],
)
def test_a_preview_writes_what_differs_from_a_plain_region(monkeypatch, options, caption):
    captions = []

    def recorded(canvas, areas, *, heading):
        captions.extend(area.text for area in areas)
        return draw_areas(canvas, areas, heading=heading)

    monkeypatch.setattr("artaug.plan.draw_areas", recorded)
    aa.Plan("a wall", (aa.Region(WHOLE, "ivy", **options),)).preview()
    assert captions == [caption]


def test_a_notebook_shows_regions_as_a_picture_and_a_plain_plan_as_text():
    assert Image.open(io.BytesIO(KITCHEN._repr_png_())).size == KITCHEN.preview().size
    assert aa.Plan("a kitchen")._repr_png_() is None


def test_a_preview_without_pixels_is_refused():
    with pytest.raises(aa.InvalidValueError, match=r"size=\(0, 9\)"):
        KITCHEN.preview(size=(0, 9))
