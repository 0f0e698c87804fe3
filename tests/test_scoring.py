"""What a scorer may return, and how a wrong answer is reported."""

import numpy as np
import pytest
from PIL import Image

import artaug as aa
from artaug.scoring import score_images

PICTURE = Image.new("RGB", (8, 8))


class FixedScores(aa.Scorer):
    def __init__(self, *answers):
        self.answers = answers

    def score(self, image, prompt):
        return self.answers[0]

    def score_batch(self, images, prompts):
        return list(self.answers)


def test_numbers_of_other_types_become_floats():
    scores = score_images(FixedScores(np.float32(0.5), 1, True), [PICTURE] * 3, ["a"] * 3)
    assert scores == [0.5, 1.0, 1.0]
    assert {type(score) for score in scores} == {float}


def test_a_batch_is_a_loop_unless_overridden():
    class Width(aa.Scorer):
        def score(self, image, prompt):
            return float(image.width)

    assert score_images(Width(), [PICTURE, Image.new("L", (3, 3))], ["a", "b"]) == [8.0, 3.0]
    assert Width().name == "Width"


def test_too_few_scores_are_counted():
    with pytest.raises(
        aa.ContractError, match=r"FixedScores.score_batch returned 1 answer for 2 pictures\. Expected a list of 2"
    ):
        score_images(FixedScores(1.0), [PICTURE] * 2, ["a", "b"])


@pytest.mark.parametrize("answer", [None, "high", [1, 2]])
def test_an_answer_that_is_no_number_is_quoted(answer):
    with pytest.raises(aa.ContractError, match=r"for picture 0 \('a pear'\)\. Expected a number\."):
        score_images(FixedScores(answer), [PICTURE], ["a pear"])


@pytest.mark.parametrize("answer", [float("nan"), float("-inf")])
def test_an_answer_that_is_not_finite_names_the_prompt(answer):
    with pytest.raises(
        aa.NonFiniteError, match=rf"FixedScores.score_batch returned {answer} for picture 0 \('a pear'\)"
    ):
        score_images(FixedScores(answer), [PICTURE], ["a pear"])


@pytest.mark.parametrize("in_batches", [False, True])
def test_what_a_scorer_raises_is_raised_as_it_is_and_names_the_scorer_and_the_prompt(in_batches):
    class Broken(aa.Scorer):
        def score(self, image, prompt):
            raise TimeoutError("read timed out")

    class BrokenInBatches(Broken):
        def score_batch(self, images, prompts):
            return [self.score(image, prompt) for image, prompt in zip(images, prompts, strict=True)]

    with pytest.raises(TimeoutError) as caught:
        score_images(BrokenInBatches() if in_batches else Broken(), [PICTURE] * 2, ["a pear", "a fig"])
    (note,) = caught.value.__notes__
    assert note.startswith("Raised by the scorer 'Broken")
    assert "'a pear'" in note
