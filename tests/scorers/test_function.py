import math

import pytest
from PIL import Image

import artaug as aa
from artaug.scorers import Chroma, Exposure, FunctionScorer, MeanOf
from artaug.scoring import score_images
from artaug.testing import check_scorer

ASPECT_RATIO = FunctionScorer(function=lambda image, _: image.width / image.height, name="aspect ratio")


def test_it_passes_the_scorer_checks():
    check_scorer(ASPECT_RATIO)


def test_the_score_is_the_function_of_picture_and_prompt():
    count = FunctionScorer(function=lambda image, prompt: len(prompt) * image.width, name="count")
    assert count.score_batch([Image.new("L", (2, 1)), Image.new("L", (3, 1))], ["ab", "abc"]) == [4, 9]


def test_it_depends_on_itself_and_on_its_components():
    both = FunctionScorer(function=lambda *_: 0.0, name="both", components=(Exposure(), MeanOf((Chroma(),))))
    assert both.depends_on == {"both", "Exposure", "Chroma", "mean of Chroma"}
    assert ASPECT_RATIO.depends_on == {"aspect ratio"}


def test_an_exception_on_one_picture_names_the_scorer_and_its_prompt():
    def brittle(_, prompt):
        if prompt == "b":
            raise KeyError(prompt)
        return 1.0

    scorer = FunctionScorer(function=brittle, name="brittle")
    with pytest.raises(aa.ScoringError, match="the scorer 'brittle' raised KeyError: 'b', for the picture of 'b'"):
        score_images(scorer, [Image.new("L", (1, 1))] * 3, ["a", "b", "c"])


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_caught_by_score_images(number):
    with pytest.raises(aa.NonFiniteError, match=r"odd.score_batch returned"):
        score_images(FunctionScorer(function=lambda *_: number, name="odd"), [Image.new("L", (1, 1))], ["a"])


def test_an_answer_that_is_not_a_number_is_caught_by_score_images():
    with pytest.raises(aa.ContractError, match=r"words.score_batch returned str 'good'"):
        score_images(FunctionScorer(function=lambda *_: "good", name="words"), [Image.new("L", (1, 1))], ["a"])


def test_it_is_named_after_its_function():
    def warmth(*_):
        return 1.0

    assert FunctionScorer(function=warmth).name == "warmth"


def test_a_function_without_a_name_needs_one():
    with pytest.raises(aa.InvalidValueError, match=r"has no name, which tables need: give FunctionScorer a name"):
        FunctionScorer(function=lambda *_: 0.0)
