"""What a scorer may return, and how a wrong answer is reported."""

import numpy as np
import pytest
import torch
from PIL import Image

import artaug as aa
from artaug.scoring import score_images
from support.clock import FakeTime

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
def test_a_bug_of_a_scorer_names_it_and_the_picture(in_batches):
    class Broken(aa.Scorer):
        def score(self, image, prompt):
            return {"a pear": 1.0}[prompt]

    class BrokenInBatches(Broken):
        def score_batch(self, images, prompts):
            return [self.score(image, prompt) for image, prompt in zip(images, prompts, strict=True)]

    scorer = BrokenInBatches() if in_batches else Broken()
    inputs = "2 pictures, first prompt 'a pear'" if in_batches else "the picture of 'a fig'"
    with pytest.raises(aa.ScoringError) as caught:
        score_images(scorer, [PICTURE] * 2, ["a pear", "a fig"])
    assert str(caught.value) == f"the scorer {scorer.name!r} raised KeyError: 'a fig', for {inputs}."
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_served_scorer_that_is_busy_is_called_again_for_the_same_picture_only(monkeypatch):
    clock, asked = FakeTime(), []
    monkeypatch.setattr("artaug._internal.calls.time", clock)

    class BusyError(Exception):
        status_code = 503

    class Served(aa.Scorer):
        def score(self, image, prompt):
            asked.append(prompt)
            if len(asked) == 2:
                raise BusyError
            return float(len(asked))

    assert score_images(Served(), [PICTURE] * 3, ["a", "b", "c"]) == [1.0, 3.0, 4.0]
    assert asked == ["a", "b", "b", "c"]
    assert len(clock.slept) == 1


def test_a_batch_of_pictures_that_does_not_fit_is_halved():
    sizes = []

    class Large(aa.Scorer):
        def score(self, image, prompt):
            raise AssertionError

        def score_batch(self, images, prompts):
            sizes.append(len(images))
            if len(images) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return [float(prompt) for prompt in prompts]

    assert score_images(Large(), [PICTURE] * 5, list("34567")) == [3.0, 4.0, 5.0, 6.0, 7.0]
    assert sizes == [5, 2, 2, 1]


def test_pictures_without_a_prompt_are_refused():
    with pytest.raises(
        aa.InvalidValueError, match=r"2 picture\(s\) for 1 prompt\(s\), so the scorer 'FixedScores' was not called"
    ):
        score_images(FixedScores(1.0), [PICTURE] * 2, ["a"])
