"""Plans, and how a greedy planner makes one of a critique."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import artaug as aa
from support.strategies import critiques, plans, prompts

WHOLE = aa.Box(0, 0, 1, 1)


@given(prompts, critiques, st.integers(1, 4), st.floats(0, 1), st.floats(0, 0.2))
def test_a_greedy_plan_keeps_its_promises(prompt, critique, most, max_iou, min_area):
    plan = aa.GreedyPlanner(max_regions=most, max_iou=max_iou, min_area=min_area).plan(prompt, critique)
    taken = [region.area for region in plan.regions]
    assert plan.prompt == prompt
    assert len(taken) <= most
    assert all(box.area >= min_area for box in taken)
    assert all(one.iou(two) <= max_iou for index, one in enumerate(taken) for two in taken[:index])
    asked = iter((suggestion.box, suggestion.prompt) for suggestion in critique.suggestions)
    assert all((region.area, region.prompt) in asked for region in plan.regions), "the critic's order is kept"


@given(prompts, critiques)
def test_what_is_left_out_repeats_is_tiny_or_too_many(prompt, critique):
    planner = aa.GreedyPlanner(max_regions=2)
    taken = [region.area for region in planner.plan(prompt, critique).regions]
    for suggestion in critique.suggestions:
        repeats = any(suggestion.box.iou(box) > planner.max_iou for box in taken)
        assert suggestion.box in taken or repeats or suggestion.box.area < planner.min_area or len(taken) == 2


def test_nothing_suggested_changes_nothing():
    assert aa.GreedyPlanner().plan("a pear", aa.Critique()) == aa.Plan("a pear")


def test_weight_and_feather_are_handed_on():
    critique = aa.Critique((aa.Suggestion(WHOLE, "a pear, vivid"),))
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
        ({"weight": 0}, "Region: weight: Input should be greater than 0; received 0"),
        ({"weight": float("inf")}, "Region: weight: Input should be a finite number; received inf"),
        ({"feather": 1.5}, "Region: feather: Input should be less than or equal to 1; received 1.5"),
    ],
)
def test_a_region_that_is_none_is_refused(options, message):
    with pytest.raises(aa.InvalidValueError, match=message):
        aa.Region(**{"area": WHOLE, "prompt": "a pear", **options})


# --- preview ---

PICTURE = Image.new("RGB", (64, 48), "#405060")
KITCHEN = aa.Plan("a kitchen", (aa.Region(aa.Box(0, 0, 0.5, 1), "a brightly lit window"),))


@given(plans, st.none() | st.tuples(st.integers(1, 90), st.integers(1, 90)))
def test_a_preview_is_as_wide_as_asked_and_leaves_the_picture_alone(plan, size):
    shown = plan.preview(PICTURE, size=size)

    assert shown.width == (size[0] if size else 64 * 8)
    assert PICTURE.getcolors() == [(64 * 48, (0x40, 0x50, 0x60))]


def test_a_preview_needs_no_picture():
    assert KITCHEN.preview().width == 512
    assert KITCHEN.preview(size=(300, 100)).width == 300


def test_a_preview_says_all_that_a_region_is():
    plain = aa.Region(WHOLE, "ivy")
    others = (
        aa.Region(WHOLE, "ivy", weight=2),
        aa.Region(WHOLE, "ivy", negative_prompt="dry"),
        aa.Region(WHOLE, "ivy", lora="ivy"),
    )

    shown = {aa.Plan("a wall", (region,)).preview().tobytes() for region in (plain, *others)}

    assert len(shown) == 4


def test_a_notebook_shows_regions_as_a_picture_and_a_plain_plan_as_words():
    assert Image.open(io.BytesIO(KITCHEN._repr_png_())).size == KITCHEN.preview().size
    assert aa.Plan("a kitchen")._repr_png_() is None


def test_a_preview_of_nothing_is_refused():
    with pytest.raises(aa.InvalidValueError, match=r"size=\(0, 9\)"):
        KITCHEN.preview(size=(0, 9))
