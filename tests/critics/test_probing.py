import json

import numpy as np
import pytest

import artaug as aa
from artaug.critics import FAMILIES, Coordinates
from artaug.critics.dialogue import Reply
from artaug.critics.probing import candidates, probe, targets

GREY = 150


def seeing(writes):
    """A model that finds whatever is not grey and writes it down in a convention of its own."""

    def ask(questions):
        return [Reply(_found(question.messages[-1].image, writes)) for question in questions]

    return ask


def _found(image, writes):
    rows, columns = np.nonzero((np.asarray(image) != GREY).any(axis=2))
    box = aa.Box.from_pixels(columns.min(), rows.min(), columns.max() + 1, rows.max() + 1, size=image.size)
    numbers = writes.write(box, size=image.size)
    whole = writes.unit in {"thousandths", "pixels"}
    return json.dumps({"prompt": "it", "bbox_2d": [round(one) if whole else round(one, 3) for one in numbers]})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_writes_as_its_family_does_fits(family):
    found = probe(seeing(FAMILIES[family]), FAMILIES[family])
    assert found.fits
    assert found.overlaps[FAMILIES[family]] > 0.9
    assert "own convention fits" in str(found)


BOXES = [one for one in candidates(Coordinates("thousandths")) if one.frame != "cropped"]


@pytest.mark.parametrize("writes", BOXES)
def test_a_wrong_convention_is_noticed_and_the_right_one_named(writes):
    found = probe(seeing(writes), Coordinates("thousandths", order="yxyx"))
    assert found.found
    assert found.overlaps[writes] >= found.overlaps[found.best] - 0.02
    if writes != Coordinates("thousandths", order="yxyx"):
        assert not found.fits
        assert f"Use {found.best!r}." in str(found)


def test_a_model_that_says_nothing_fits_nothing():
    found = probe(lambda questions: [aa.Abstention("the server is gone") for _ in questions], Coordinates("relative"))
    assert not found.found
    assert found.replies == ("the server is gone",) * 6
    assert "No convention fits" in str(found)


def test_the_model_is_asked_in_the_words_of_its_convention():
    asked = []
    probe(
        lambda questions: asked.extend(questions) or [Reply("")] * len(questions), Coordinates("percent", key="box_2d")
    )
    (message,) = asked[0].messages
    assert "from 0 to 100" in message.text
    assert '"box_2d": [...]' in message.text
    assert "red rectangle" in message.text
    assert asked[0].schema is None


@pytest.mark.parametrize("side", [0.05, 0.25, 0.5, 0.9])
def test_the_rectangles_lie_in_their_pictures_and_look_alike_in_none(side):
    shown = targets(side=side)
    assert len({target.image.size for target in shown}) == len({target.colour for target in shown}) == len(shown)
    for target in shown:
        assert target.box.width == pytest.approx(min(side, 0.5), abs=0.01)
