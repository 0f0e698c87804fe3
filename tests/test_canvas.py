"""The canvas of a plan: a value among values, whose pictures JSON names by their digests."""

import copy
import pickle
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import artaug as aa
from artaug._internal.values import from_json, to_json
from artaug.identity import identity_of
from artaug.plan import plan_digest, run_planner
from artaug.synthesis import draw
from artaug.testing import SwatchSynthesizer
from support.strategies import boxes, critiques, images, masks

canvases = st.builds(
    lambda image, mask, strength, references: aa.Canvas(image, mask=mask, strength=strength, references=references),
    images(),
    st.none() | boxes() | masks(),
    st.none() | st.floats(0, 1, exclude_min=True),
    st.lists(images(most=4), max_size=2),
) | st.builds(
    lambda control, scale, references: aa.Canvas(control=control, control_scale=scale, references=references),
    images(most=4),
    st.floats(0, 2),
    st.lists(images(most=4), max_size=2),
)
GREY = Image.new("RGB", (64, 64), "grey")
RED = Image.new("RGB", (64, 64), "red")


@given(canvases)
def test_a_canvas_is_the_same_after_json_pickle_and_copy(canvas):
    plan = aa.Plan("a cone", canvas=canvas)
    for other in (from_json(aa.Plan, to_json(plan)), pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan)):
        assert other == plan
        assert hash(other.canvas) == hash(canvas)
        assert plan_digest(other) == plan_digest(plan)
        assert repr(other) == repr(plan)


@given(canvases, canvases)
def test_two_plans_have_one_digest_if_and_only_if_their_canvases_are_equal(first, second):
    plans = aa.Plan("a cone", canvas=first), aa.Plan("a cone", canvas=second)
    assert (plan_digest(plans[0]) == plan_digest(plans[1])) == (first == second)


@pytest.mark.parametrize(
    "change",
    [
        {"image": RED},
        {"mask": aa.Box(0, 0, 0.5, 1)},
        {"strength": 0.75},
        {"references": [RED]},
        {"control": RED},
        {"control": RED, "control_scale": 0.5},
    ],
)
def test_every_field_of_a_canvas_enters_digest_identity_and_equality(change):
    canvas = aa.Canvas(GREY, strength=0.5)
    other = replace(canvas, **change)
    assert other != canvas
    assert repr(other) != repr(canvas)
    assert plan_digest(aa.Plan("a cone", canvas=other)) != plan_digest(aa.Plan("a cone", canvas=canvas))
    assert identity_of(aa.Plan("a cone", canvas=other), "plan") != identity_of(aa.Plan("a cone", canvas=canvas), "plan")


def test_a_control_is_no_reference_and_no_picture_to_start_from():
    pictures = [
        aa.Canvas(RED, control=GREY),
        aa.Canvas(GREY, control=RED),
        aa.Canvas(RED, references=[GREY]),
        aa.Canvas(control=RED, references=[GREY]),
        aa.Canvas(references=[RED, GREY]),
    ]
    assert len({plan_digest(aa.Plan("a cone", canvas=canvas)) for canvas in pictures}) == len(pictures)
    for canvas in pictures:
        assert canvas.holding(canvas.pictures) == canvas
    for wrong in ({}, {"mask": aa.Box(0, 0, 1, 1), "control": RED}, {"strength": 0.5, "references": [RED]}):
        with pytest.raises(aa.InvalidValueError, match="picture to start from, where a mask"):
            aa.Canvas(**wrong)
    for scale in (0.5, -1.0, float("nan")):
        with pytest.raises(aa.InvalidValueError, match="control_scale"):
            aa.Canvas(RED, control_scale=scale)


def test_a_canvas_on_disk_is_the_same_and_is_read_when_it_is_looked_at(tmp_path):
    plan = aa.Plan("a cone", canvas=aa.Canvas(GREY, strength=0.5, references=[RED]))
    stored = plan.stored_in(aa.ImageFolder(tmp_path))
    assert stored == plan
    assert all(isinstance(picture, aa.ImageFile) for picture in stored.canvas.pictures)
    read = from_json(aa.Plan, to_json(stored))
    with pytest.raises(aa.StorageError, match="there is no such file"):
        _ = read.canvas.image
    found = read.found_in(aa.ImageFolder(tmp_path))
    assert found.canvas.image.tobytes() == GREY.tobytes()
    assert [picture.tobytes() for picture in found.canvas.references] == [RED.tobytes()]


@pytest.mark.parametrize("strength", [0, -0.1, 1.1, float("nan"), True, "half"])
def test_a_strength_outside_zero_to_one_is_refused(strength):
    with pytest.raises(aa.InvalidValueError, match=r"Canvas\(strength="):
        aa.Canvas(GREY, strength=strength)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": "picture.png"}, r"Canvas\(image="),
        ({"image": GREY, "mask": np.ones((2, 2))}, r"Canvas\(mask="),
        ({"image": GREY, "references": ["picture.png"]}, r"Canvas\(references\[0\]="),
    ],
)
def test_what_is_no_picture_and_no_mask_is_refused(arguments, message):
    with pytest.raises(aa.InvalidValueError, match=message):
        aa.Canvas(**arguments)


def test_a_plan_takes_nothing_else_for_a_canvas():
    with pytest.raises(aa.InvalidValueError, match=r"Plan\(canvas=.*expected an instance of artaug.Canvas or None"):
        aa.Plan("a cone", canvas=GREY)


def test_a_notebook_shows_a_plan_with_a_canvas_as_a_picture():
    plan = aa.Plan("a cone", canvas=aa.Canvas(RED, mask=aa.Box(0, 0, 0.5, 1), strength=0.5))
    assert plan._repr_png_() is not None
    assert plan.preview().getpixel((500, 250)) == (255, 0, 0)
    assert plan.preview(GREY).getpixel((500, 250)) == (128, 128, 128)


# --- planners ---


@given(critiques)
def test_on_canvas_changes_nothing_but_the_canvas(critique):
    planner = aa.GreedyPlanner()
    plan = planner.plan("a cone", critique)
    made = run_planner(aa.OnCanvas(planner, strength=0.5), "a cone", critique, image=GREY)
    expected = None if plan == aa.Plan("a cone") else aa.Canvas(GREY, strength=0.5)
    assert made == replace(plan, canvas=expected)


@given(critiques)
def test_a_masked_canvas_covers_each_region_and_nothing_else(critique):
    plan = run_planner(aa.OnCanvas(aa.GreedyPlanner(), strength=0.5, masked=True), "a cone", critique, image=GREY)
    if not plan.regions:
        assert plan.canvas is None
        return
    mask = plan.canvas.mask
    covered = np.zeros((64, 64), bool)
    for region in plan.regions:
        left, top, right, bottom = region.area.to_pixels((64, 64))
        covered[top:bottom, left:right] = True
    if isinstance(mask, aa.Box):
        assert mask == plan.regions[0].area
    else:
        np.testing.assert_array_equal(mask.to_array() > 0, covered)


def test_a_planner_that_looks_at_the_picture_gets_it_and_another_one_reads_no_file(tmp_path):
    class Looks(aa.RegionPlanner):
        def plan(self, prompt, critique):
            return aa.Plan(prompt)

        def plan_from(self, image, prompt, critique):
            return aa.Plan(f"{prompt}, not {image.getpixel((0, 0))}")

    file = aa.ImageFolder(tmp_path).add(RED)
    assert run_planner(Looks(), "a cone", aa.Critique(), image=file).prompt == "a cone, not (255, 0, 0)"
    assert run_planner(Looks(), "a cone", aa.Critique()).prompt == "a cone"
    file.path.unlink()
    assert run_planner(aa.GreedyPlanner(), "a cone", aa.Critique(), image=file) == aa.Plan("a cone")


def test_on_canvas_without_a_picture_says_so():
    with pytest.raises(aa.InvalidValueError, match="has no picture to start from"):
        aa.OnCanvas(aa.GreedyPlanner(), strength=0.5).plan("a cone", aa.Critique())


# --- synthesizers ---


class FromNoise(aa.Synthesizer):
    def synthesize(self, plan, *, seed):
        return Image.new("RGB", (8, 8))


def test_a_synthesizer_that_would_ignore_a_canvas_is_refused_before_it_draws():
    with pytest.raises(aa.ModelError, match="FromNoise draws from noise alone"):
        draw(FromNoise(), [aa.Plan("a cone"), aa.Plan("a cone", canvas=aa.Canvas(GREY))], seeds=[0, 1])


def test_a_cached_synthesizer_tells_canvases_apart_and_draws_each_once(tmp_path):
    synthesizer = aa.CachedSynthesizer(SwatchSynthesizer(), folder=tmp_path)
    plans = [
        aa.Plan("a cone"),
        aa.Plan("a cone", canvas=aa.Canvas(GREY, strength=0.5)),
        aa.Plan("a cone", canvas=aa.Canvas(RED, strength=0.5)),
    ]
    drawn = [synthesizer.synthesize(plan, seed=0).tobytes() for plan in plans]
    assert len(set(drawn)) == 3
    assert [synthesizer.synthesize(plan, seed=0).tobytes() for plan in plans] == drawn
    assert len(list(tmp_path.glob("*.json"))) == 3


# --- plans of a subclass with fields of its own ---


@dataclass(frozen=True)
class EditPlan(aa.Plan):
    picture: object = None
    edits: tuple = ()


def test_fields_of_a_subclass_of_plan_enter_its_digest():
    plans = [EditPlan("a cone", picture=GREY), EditPlan("a cone", picture=RED), EditPlan("a cone", edits=("red",))]
    assert len({plan_digest(plan) for plan in [*plans, aa.Plan("a cone")]}) == 4
    assert plan_digest(EditPlan("a cone", picture=GREY.copy())) == plan_digest(plans[0])


def test_a_file_does_not_lose_fields_of_a_subclass_without_a_word(tmp_path):
    pair = aa.ImagePair(prompt="a cone", before=GREY, after=RED, plan=EditPlan("a cone", picture=GREY))
    with pytest.raises(aa.InvalidValueError, match="is a EditPlan with picture, edits, and files keep"):
        aa.pairs_to_folder([pair], tmp_path)


def test_pairs_with_canvases_are_the_same_after_a_folder(tmp_path):
    plans = [aa.Plan("a cone", canvas=aa.Canvas(GREY, strength=0.5, references=[RED])), aa.Plan("a cone")]
    pairs = [aa.ImagePair(prompt="a cone", before=GREY, after=RED, plan=plan) for plan in plans]
    aa.pairs_to_folder(pairs, tmp_path)
    read = aa.pairs_from_folder(tmp_path)
    assert read == pairs
    assert read[0].plan.canvas.image.tobytes() == GREY.tobytes()
