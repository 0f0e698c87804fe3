import math

import pytest
from PIL import Image

import artaug as aa
from artaug.scorers import Chroma, Exposure, FunctionScorer, MeanOf
from artaug.scoring import score_images
from artaug.testing import check_scorer

WIDE = FunctionScorer(function=lambda image, _: image.width / image.height, name="width")


def test_the_scorer_keeps_the_promises_of_its_seam():
    check_scorer(WIDE)


def test_it_scores_what_the_function_says_of_picture_and_prompt():
    count = FunctionScorer(function=lambda image, prompt: len(prompt) * image.width, name="count")
    assert count.score_batch([Image.new("L", (2, 1)), Image.new("L", (3, 1))], ["ab", "abc"]) == [4, 9]


def test_it_rests_on_itself_and_on_what_it_says_it_uses():
    both = FunctionScorer(function=lambda *_: 0.0, name="both", uses=(Exposure(), MeanOf((Chroma(),))))
    assert both.depends_on == {"both", "Exposure", "Chroma", "mean of Chroma"}
    assert WIDE.depends_on == {"width"}


def test_a_function_that_raises_on_one_picture_of_a_batch_says_on_which_and_keeps_its_error():
    def fussy(_, prompt):
        if prompt == "b":
            raise KeyError(prompt)
        return 1.0

    with pytest.raises(KeyError) as caught:
        FunctionScorer(function=fussy, name="fussy").score_batch([Image.new("L", (1, 1))] * 3, ["a", "b", "c"])
    assert caught.value.__notes__ == ["Raised by the scorer 'fussy', for the prompt 'b'."]


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_number_that_is_none_is_caught_where_scores_are_read(number):
    with pytest.raises(aa.NonFiniteError, match=r"odd.score_batch returned"):
        score_images(FunctionScorer(function=lambda *_: number, name="odd"), [Image.new("L", (1, 1))], ["a"])


def test_a_function_that_returns_no_number_is_caught_where_scores_are_read():
    with pytest.raises(aa.ContractError, match=r"words.score_batch returned str 'good'"):
        score_images(FunctionScorer(function=lambda *_: "good", name="words"), [Image.new("L", (1, 1))], ["a"])


def test_it_is_called_after_its_function():
    def warmth(*_):
        return 1.0

    assert FunctionScorer(function=warmth).name == "warmth"


def test_a_function_without_a_name_needs_one():
    with pytest.raises(aa.InvalidValueError, match=r"no name to be told apart by.*give it one"):
        FunctionScorer(function=lambda *_: 0.0)
