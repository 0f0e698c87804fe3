"""Objects found or not, on detections known by heart and on the playground's own eyes."""

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
class Told(Detector):
    """Finds what it was told, and remembers what it was asked for."""

    found: tuple
    asked: list | None = None

    def detect(self, image, labels):
        if self.asked is not None:
            self.asked.append(list(labels))
        return self.found


def box(x, y, size=0.1):
    return aa.Box(x - size / 2, y - size / 2, x + size / 2, y + size / 2)


def thing(label="dog", x=0.5, y=0.5, *, confidence=0.95, colour=None, size=0.1):
    return Detection(label=label, box=box(x, y, size), confidence=confidence, colour=colour)


def judged(check, *found, colours=None, tag="a tag"):
    case = Case("a picture", check, tag)
    judge = ObjectScore(suite=Suite("mine", (case,)), detector=Told(found), colours=colours)
    outcome = judge.outcomes([PICTURE], [case])[0]
    assert outcome.parts == ((tag, outcome.score == 1),)
    return outcome


def reference_relations(one, other, size):
    """GenEval's rule on pixel corners, as its paper gives it (appendix): offset of centres less 0.1 of both extents."""
    a, b = (np.array([[o.left, o.top], [o.right, o.bottom]]) * np.array(size) for o in (one, other))
    offset = a.mean(axis=0) - b.mean(axis=0)
    revised = np.maximum(np.abs(offset) - 0.1 * (np.ptp(a, axis=0) + np.ptp(b, axis=0)), 0) * np.sign(offset)
    x, y = revised / np.linalg.norm(offset) if np.abs(revised).max() >= 1e-3 else (0, 0)
    return {
        n for n, yes in {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}.items() if yes
    }


@given(boxes(), boxes(), st.tuples(st.integers(16, 2000), st.integers(16, 2000)))
def test_sides_are_those_of_the_published_rule(one, other, size):
    assert relations(one, other, size_px=size) == reference_relations(one, other, size)


@given(boxes(), boxes())
def test_what_is_left_of_another_has_it_to_the_right(one, other):
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    there, back = relations(one, other, size_px=(64, 64)), relations(other, one, size_px=(64, 64))
    assert {opposite[side] for side in there} == back


def test_a_corner_lies_on_two_sides_and_a_thing_on_none_of_its_own():
    assert relations(box(0.1, 0.1), box(0.8, 0.8), size_px=(100, 100)) == {"left of", "above"}
    assert relations(box(0.1, 0.1), box(0.1, 0.1), size_px=(100, 100)) == set()


def test_the_shape_of_the_picture_counts():
    one, other = box(0.3, 0.2), box(0.6, 0.8)
    assert relations(one, other, size_px=(100, 100)) == {"above"}
    assert relations(one, other, size_px=(400, 100)) == {"left of"}


def test_enough_of_a_kind_is_enough():
    two = ObjectCheck((Clause("dog", 2),))
    assert judged(two, thing(), thing(x=0.2)).score == 1
    assert judged(two, thing(), thing(x=0.2), thing(x=0.8), thing("cat")).score == 1
    assert judged(two, thing(), thing("cat")).reasons == ("expected 2 dog, found 1",)


def test_too_many_of_a_kind_are_wrong_where_they_are_counted():
    counted = ObjectCheck((Clause("dog", 2),), (Clause("dog", 3),), confidence=0.9)
    assert judged(counted, thing(), thing()).score == 1
    assert judged(counted, thing(), thing(), thing()).reasons == ("expected fewer than 3 dog, found 3",)
    assert judged(counted, thing(), thing(), thing(confidence=0.9)).score == 1
    assert judged(counted, thing(), thing(confidence=0.5)).reasons == ("expected 2 dog, found 1",)


def test_the_surest_are_looked_at():
    red = ObjectCheck((Clause("dog", 1, "red"),))
    sure, unsure = thing(confidence=0.8, colour="blue"), thing(confidence=0.5, colour="red")
    assert judged(red, unsure, sure).reasons == ("expected 1 red dog, found blue",)
    assert judged(red, thing(confidence=0.9, colour="red"), sure, unsure).score == 1


def test_every_thing_has_to_have_the_colour():
    both = ObjectCheck((Clause("dog", 2, "red"),))
    assert judged(both, thing(colour="red"), thing(colour="red")).score == 1
    assert judged(both, thing(colour="red"), thing(colour="white")).reasons == ("expected 2 red dog, found red, white",)


def test_colours_may_be_named_by_another():
    seen = []

    def black(image, found):
        seen.append((image, tuple(found)))
        return ["black"] * len(found)

    dog = thing(colour="red")
    assert judged(ObjectCheck((Clause("dog", 1, "black"),)), dog, colours=black).score == 1
    assert seen == [(PICTURE, (dog,))]


def test_a_position_is_seen_from_every_thing_of_an_earlier_clause():
    check = ObjectCheck((Clause("couch", 2), Clause("dog", 1, None, ("left of", 0))))
    couches = (thing("couch", 0.5), thing("couch", 0.8))
    assert judged(check, *couches, thing(x=0.1)).score == 1
    assert judged(check, *couches, thing(x=0.65)).reasons == ("expected dog left of couch, found right of",)
    assert judged(check, *couches, thing(x=0.5)).reasons == ("expected dog left of couch, found neither side clearly",)


def test_a_position_is_not_met_if_what_it_is_seen_from_is_missing():
    check = ObjectCheck((Clause("couch"), Clause("dog", 1, None, ("left of", 0))))
    assert judged(check, thing()).reasons == (
        "expected 1 couch, found 0",
        "nothing for dog to be left of, since clause 0 is not met",
    )


def test_the_detector_is_asked_for_each_kind_once():
    asked = []
    case = Case("x", ObjectCheck((Clause("dog"), Clause("cat")), (Clause("dog", 2),)))
    ObjectScore(suite=Suite("mine", (case,)), detector=Told((), asked)).outcomes([PICTURE], [case])
    assert asked == [["dog", "cat"]]


def test_nobody_to_name_a_colour_is_an_error_and_not_a_wrong_picture():
    with pytest.raises(aa.ContractError, match=r"are the colours of 1 dog: need one each. Give ObjectScore\(colours"):
        judged(ObjectCheck((Clause("dog", 1, "red"),)), thing())
    with pytest.raises(aa.ContractError, match="need one each"):
        judged(ObjectCheck((Clause("dog", 1, "red"),)), thing(), colours=lambda *_: [])


def test_what_is_no_detection_is_named():
    with pytest.raises(
        aa.ContractError, match=r"Told returned str: 'dog'. Expected artaug.evaluation.suites.Detection"
    ):
        judged(ObjectCheck((Clause("dog"),)), "dog")
    with pytest.raises(aa.InvalidValueError, match=r"need a confidence in \[0, 1\]"):
        thing(confidence=95)


def test_questions_are_not_for_a_detector():
    asking = Case("x", QuestionCheck((Question(1, "?"),)))
    with pytest.raises(aa.InvalidValueError, match="Use QuestionScore"):
        ObjectScore(suite=Suite("mine", (asking,)), detector=Told(()))
    judge = ObjectScore(suite=Suite("mine", (Case("x", ObjectCheck((Clause("dog"),))),)), detector=Told(()))
    with pytest.raises(aa.InvalidValueError, match="need a case of mine"):
        judge.outcomes([PICTURE], [asking])


@pytest.mark.parametrize(
    "prompt", ["a red cone on the left and a blue ball on the right at night", "a green ring at noon"]
)
def test_the_playground_passes_its_own_check(prompt):
    scene = playground.parse(prompt)
    clauses = [Clause(one.shape, 1, one.color) for one in scene.things]
    if len(clauses) == 2:
        clauses[1] = Clause(scene.things[1].shape, 1, scene.things[1].color, ("right of", 0))
    judge = ObjectScore(
        suite=Suite("playground", (Case(prompt, ObjectCheck(tuple(clauses))),)), detector=PlaygroundEyes()
    )
    assert judge.name == "playground (PlaygroundEyes)"
    assert judge.score(playground.render(prompt, seed=1), prompt) == 1
    assert judge.score(playground.render("a purple cube at noon", seed=1), prompt) == 0
    with pytest.raises(aa.PromptError, match="does not have it"):
        judge.score(PICTURE, "a dog")


def test_the_scorer_keeps_the_promises_of_its_seam():
    class Anything(Detector):
        def detect(self, image, labels):
            return [Detection(label=label, box=aa.Box(0, 0, 1, 1)) for label in labels]

    suite = Suite("any", (Case("a lighthouse above the sea, 海の上の灯台", ObjectCheck((Clause("thing"),))),))
    check_scorer(ObjectScore(suite=suite, detector=Anything()))
