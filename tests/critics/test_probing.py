"""Probing: which convention explains the boxes that a model gives for known rectangles."""

import json

import numpy as np
import pytest

import artaug as aa
from artaug.critics import FAMILIES, Coordinates
from artaug.critics.probing import candidate_conventions, probe_coordinates, probe_targets
from artaug.serving.chat import ChatReply

GREY = 150


def detecting_model(convention):
    """A model that finds whatever is not grey and writes its box in a convention of its own."""

    def generate(requests):
        return enumerate(ChatReply(_detection(request.messages[-1].image, convention)) for request in requests)

    return generate


def _detection(image, convention):
    rows, columns = np.nonzero((np.asarray(image) != GREY).any(axis=2))
    box = aa.Box.from_pixels(columns.min(), rows.min(), columns.max() + 1, rows.max() + 1, size=image.size)
    numbers = convention.encode(box, size=image.size)
    whole_numbers = convention.unit in {"thousandths", "pixels"}
    return json.dumps(
        {"prompt": "it", "bbox_2d": [round(number) if whole_numbers else round(number, 3) for number in numbers]}
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_writes_as_its_family_does_fits(family):
    result = probe_coordinates(detecting_model(FAMILIES[family]), FAMILIES[family])
    assert result.fits
    assert result.mean_iou[FAMILIES[family]] > 0.9
    assert "own convention fits" in str(result)


CONVENTIONS = [
    convention for convention in candidate_conventions(Coordinates("thousandths")) if convention.frame != "cropped"
]


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_wrong_convention_is_noticed_and_the_right_one_named(convention):
    result = probe_coordinates(detecting_model(convention), Coordinates("thousandths", order="yxyx"))
    assert result.conclusive
    assert result.mean_iou[convention] >= result.mean_iou[result.best] - 0.02
    if convention != Coordinates("thousandths", order="yxyx"):
        assert not result.fits
        assert f"Use {result.best!r}." in str(result)


def test_without_boxes_no_convention_fits_and_without_replies_there_is_no_result():
    gone = aa.Abstention("the server is gone")
    with pytest.raises(aa.CriticError, match="none of the 6 questions of the probe: the server is gone"):
        probe_coordinates(lambda requests: enumerate([gone] * len(requests)), Coordinates("relative"))
    result = probe_coordinates(
        lambda requests: enumerate([gone, *[ChatReply("a rectangle")] * (len(requests) - 1)]), Coordinates("relative")
    )
    assert not result.conclusive
    assert result.replies == ("the server is gone", *["a rectangle"] * 5)
    assert "No convention fits" in str(result)


def test_the_request_names_the_critics_convention():
    sent = []
    probe_coordinates(
        lambda requests: sent.extend(requests) or enumerate([ChatReply("")] * len(requests)),
        Coordinates("percent", key="box_2d"),
    )
    (message,) = sent[0].messages
    assert "from 0 to 100" in message.text
    assert '"box_2d": [...]' in message.text
    assert "red rectangle" in message.text
    assert sent[0].schema is None


@pytest.mark.parametrize("side", [0.05, 0.25, 0.5, 0.9])
def test_the_rectangles_have_the_given_side_and_all_pictures_differ(side):
    targets = probe_targets(side=side)
    assert len({target.image.size for target in targets}) == len({target.color for target in targets}) == len(targets)
    for target in targets:
        assert target.box.width == pytest.approx(min(side, 0.5), abs=0.01)
