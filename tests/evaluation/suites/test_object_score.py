"""Object checks, on fixed detections and on the playground's own detector."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import artaug as aa
from artaug import playground
from artaug.evaluation.suites import (
    Case,
    Clause,
    Detection,
    Detector,
    ObjectCheck,
    ObjectScore,
    Question,
    QuestionCheck,
    Suite,
)
from artaug.evaluation.suites.object_score import relations
from artaug.testing import check_scorer
from support.playground_eyes import PlaygroundEyes
from support.strategies import boxes

PICTURE = Image.new("RGB", (200, 100))


@dataclass(frozen=True)
class FixedDetections(Detector):
    """Returns always the same detections, and records the labels of each call."""

    detections: tuple
    requests: list | None = None

    def detect(self, image, labels):
        if self.requests is not None:
            self.requests.append(list(labels))
        return self.detections


def box(x, y, size=0.1):
    return aa.Box(x - size / 2, y - size / 2, x + size / 2, y + size / 2)


def detected(label="dog", x=0.5, y=0.5, *, confidence=0.95, color=None, size=0.1):
    return Detection(label=label, box=box(x, y, size), confidence=confidence, color=color)


def outcome_of(check, *detections, colors=None, tag="a tag"):
    case = Case("a picture", check, tag)
    scorer = ObjectScore(suite=Suite("mine", (case,)), detector=FixedDetections(detections), colors=colors)
    outcome = scorer.check_images([PICTURE], [case])[0]
    assert outcome.category_results == ((tag, outcome.score == 1),)
    return outcome


def reference_relations(box, other, size):
    """GenEval's rule on pixel corners, as its paper gives it (appendix): offset of centres less 0.1 of both extents."""
    a, b = (np.array([[b.left, b.top], [b.right, b.bottom]]) * np.array(size) for b in (box, other))
    offset = a.mean(axis=0) - b.mean(axis=0)
    revised = np.maximum(np.abs(offset) - 0.1 * (np.ptp(a, axis=0) + np.ptp(b, axis=0)), 0) * np.sign(offset)
    x, y = revised / np.linalg.norm(offset) if np.abs(revised).max() >= 1e-3 else (0, 0)
    return {
        n for n, yes in {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}.items() if yes
    }


@given(boxes(), boxes(), st.tuples(st.integers(16, 2000), st.integers(16, 2000)))
def test_sides_are_those_of_the_published_rule(first, second, size):
    assert relations(first, second, size_px=size) == reference_relations(first, second, size)


@given(boxes(), boxes())
def test_what_is_left_of_another_has_it_to_the_right(first, second):
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    forward, backward = relations(first, second, size_px=(64, 64)), relations(second, first, size_px=(64, 64))
    assert {opposite[side] for side in forward} == backward


def test_a_corner_lies_on_two_sides_and_a_box_on_none_of_its_own():
    assert relations(box(0.1, 0.1), box(0.8, 0.8), size_px=(100, 100)) == {"left of", "above"}
    assert relations(box(0.1, 0.1), box(0.1, 0.1), size_px=(100, 100)) == set()


def test_the_shape_of_the_picture_counts():
    first, second = box(0.3, 0.2), box(0.6, 0.8)
    assert relations(first, second, size_px=(100, 100)) == {"above"}
    assert relations(first, second, size_px=(400, 100)) == {"left of"}


def test_enough_of_a_kind_is_enough():
    two = ObjectCheck((Clause("dog", 2),))
    assert outcome_of(two, detected(), detected(x=0.2)).score == 1
    assert outcome_of(two, detected(), detected(x=0.2), detected(x=0.8), detected("cat")).score == 1
    assert outcome_of(two, detected(), detected("cat")).reasons == ("expected 2 dog, found 1",)


def test_too_many_of_a_kind_are_wrong_where_they_are_counted():
    counted = ObjectCheck((Clause("dog", 2),), (Clause("dog", 3),), confidence=0.9)
    assert outcome_of(counted, detected(), detected()).score == 1
    assert outcome_of(counted, detected(), detected(), detected()).reasons == ("expected fewer than 3 dog, found 3",)
    assert outcome_of(counted, detected(), detected(), detected(confidence=0.9)).score == 1
    assert outcome_of(counted, detected(), detected(confidence=0.5)).reasons == ("expected 2 dog, found 1",)


def test_the_most_confident_detections_count():
    red = ObjectCheck((Clause("dog", 1, "red"),))
    sure, unsure = detected(confidence=0.8, color="blue"), detected(confidence=0.5, color="red")
    assert outcome_of(red, unsure, sure).reasons == ("expected 1 red dog, found blue",)
    assert outcome_of(red, detected(confidence=0.9, color="red"), sure, unsure).score == 1


def test_every_object_has_to_have_the_color():
    both = ObjectCheck((Clause("dog", 2, "red"),))
    assert outcome_of(both, detected(color="red"), detected(color="red")).score == 1
    assert outcome_of(both, detected(color="red"), detected(color="white")).reasons == (
        "expected 2 red dog, found red, white",
    )


def test_colors_may_be_named_by_a_classifier():
    calls = []

    def black(image, detections):
        calls.append((image, tuple(detections)))
        return ["black"] * len(detections)

    dog = detected(color="red")
    assert outcome_of(ObjectCheck((Clause("dog", 1, "black"),)), dog, colors=black).score == 1
    assert calls == [(PICTURE, (dog,))]


def test_a_position_is_relative_to_every_object_of_an_earlier_clause():
    check = ObjectCheck((Clause("couch", 2), Clause("dog", 1, None, ("left of", 0))))
    couches = (detected("couch", 0.5), detected("couch", 0.8))
    assert outcome_of(check, *couches, detected(x=0.1)).score == 1
    assert outcome_of(check, *couches, detected(x=0.65)).reasons == ("expected dog left of couch, found right of",)
    assert outcome_of(check, *couches, detected(x=0.5)).reasons == (
        "expected dog left of couch, found neither side clearly",
    )


def test_a_position_is_not_met_if_its_target_is_missing():
    check = ObjectCheck((Clause("couch"), Clause("dog", 1, None, ("left of", 0))))
    assert outcome_of(check, detected()).reasons == (
        "expected 1 couch, found 0",
        "dog cannot be left of clause 0, which is not met",
    )


def test_the_detector_gets_each_label_once():
    requests = []
    case = Case("x", ObjectCheck((Clause("dog"), Clause("cat")), (Clause("dog", 2),)))
    ObjectScore(suite=Suite("mine", (case,)), detector=FixedDetections((), requests)).check_images([PICTURE], [case])
    assert requests == [["dog", "cat"]]


def test_a_missing_color_name_is_an_error_and_not_a_wrong_picture():
    with pytest.raises(aa.ContractError, match=r"are the colors of 1 dog: need one each. Give ObjectScore\(colors"):
        outcome_of(ObjectCheck((Clause("dog", 1, "red"),)), detected())
    with pytest.raises(aa.ContractError, match="need one each"):
        outcome_of(ObjectCheck((Clause("dog", 1, "red"),)), detected(), colors=lambda *_: [])


def test_what_is_no_detection_is_named():
    with pytest.raises(
        aa.ContractError,
        match=r"FixedDetections.detect returned str 'dog' for the labels \['dog'\]. Expected artaug.*Detection",
    ):
        outcome_of(ObjectCheck((Clause("dog"),)), "dog")
    with pytest.raises(aa.InvalidValueError, match=r"need a confidence in \[0, 1\]"):
        detected(confidence=95)


def test_questions_are_not_for_a_detector():
    question_case = Case("x", QuestionCheck((Question(1, "?"),)))
    with pytest.raises(aa.InvalidValueError, match="Use QuestionScore"):
        ObjectScore(suite=Suite("mine", (question_case,)), detector=FixedDetections(()))
    scorer = ObjectScore(suite=Suite("mine", (Case("x", ObjectCheck((Clause("dog"),))),)), detector=FixedDetections(()))
    with pytest.raises(aa.InvalidValueError, match="need a case of mine"):
        scorer.check_images([PICTURE], [question_case])


@pytest.mark.parametrize(
    "prompt", ["a red cone on the left and a blue ball on the right at night", "a green ring at noon"]
)
def test_the_playground_passes_its_own_check(prompt):
    scene = playground.parse(prompt)
    clauses = [Clause(thing.shape, 1, thing.color) for thing in scene.things]
    if len(clauses) == 2:
        clauses[1] = Clause(scene.things[1].shape, 1, scene.things[1].color, ("right of", 0))
    scorer = ObjectScore(
        suite=Suite("playground", (Case(prompt, ObjectCheck(tuple(clauses))),)), detector=PlaygroundEyes()
    )
    assert scorer.name == "playground (PlaygroundEyes)"
    assert scorer.score(playground.render(prompt, seed=1), prompt) == 1
    assert scorer.score(playground.render("a purple cube at noon", seed=1), prompt) == 0
    with pytest.raises(aa.PromptError, match="does not have it"):
        scorer.score(PICTURE, "a dog")


def test_the_scorer_keeps_the_promises_of_its_seam():
    class Anydetected(Detector):
        def detect(self, image, labels):
            return [Detection(label=label, box=aa.Box(0, 0, 1, 1)) for label in labels]

    suite = Suite("any", (Case("a lighthouse above the sea, 海の上の灯台", ObjectCheck((Clause("thing"),))),))
    check_scorer(ObjectScore(suite=suite, detector=Anydetected()))
