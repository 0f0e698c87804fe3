"""What a user's object may return, and the text of the error when it returns something else."""

import math

import numpy as np
import pytest
import torch

import artaug as aa
from artaug._internal.contracts import check_batch, check_numbers, check_result


def batch(answers, *, count=2, prompts=("a pear", "a plum")):
    return check_batch("Mine", "draw_batch", answers, of=str, count=count, per="plan", prompts=prompts)


def numbers(answers, *, count=2):
    return check_numbers("Mine", "score_batch", answers, count=count, per="picture", prompts=["a pear"] * count)


def test_a_batch_of_the_right_length_and_types_comes_back_as_a_list():
    assert batch(("one", "two")) == ["one", "two"]
    assert batch([], count=0) == []


@pytest.mark.parametrize(
    ("answers", "received"),
    [
        (None, "None"),
        (7, "int 7"),
        ((letter for letter in "ab"), "generator <generator object"),
        ([], "0 answers"),
        (["one"], "1 answer"),
        (["one", "two", "three"], "3 answers"),
    ],
    ids=["none", "a number", "a generator", "nothing", "too few", "too many"],
)
def test_a_batch_that_is_no_list_of_the_right_length_is_described_in_the_error(answers, received):
    with pytest.raises(aa.ContractError) as caught:
        batch(answers)
    assert str(caught.value).startswith(f"Mine.draw_batch returned {received}")
    assert str(caught.value).endswith(" for 2 plans. Expected a list of 2, each str.")


def test_an_item_of_another_type_is_named_with_its_place_and_prompt():
    with pytest.raises(aa.ContractError) as caught:
        batch(["one", None])
    assert str(caught.value) == "Mine.draw_batch returned None for plan 1 ('a plum'). Expected str."
    with pytest.raises(aa.ContractError, match=r"returned int 2 for plan 0\. Expected str"):
        batch([2, "two"], prompts=())


def test_types_are_called_as_people_import_them():
    with pytest.raises(
        aa.ContractError, match=r"Mine\.critique returned str 'dark'\. Expected artaug\.Critique or art"
    ):
        check_result("Mine", "critique", "dark", of=(aa.Critique, aa.Abstention))


def test_a_long_answer_is_shortened():
    with pytest.raises(aa.ContractError) as caught:
        check_result("Mine", "plan", "x" * 5000, of=aa.Plan)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "answers", [[0.5, 1], np.array([0.5, 1.0]), torch.tensor([0.5, 1.0]), [torch.tensor([0.5]), np.float32(1)]]
)
def test_numbers_of_any_make_become_floats(answers):
    found = numbers(answers)
    assert found == [0.5, 1.0]
    assert {type(number) for number in found} == {float}


@pytest.mark.parametrize("answer", [None, "high", [1, 2], torch.ones(2), np.ones(2)])
def test_what_is_no_number_is_quoted(answer):
    with pytest.raises(aa.ContractError, match=r"for picture 0 \('a pear'\)\. Expected a number\."):
        numbers([answer], count=1)


def test_a_tensor_without_axes_is_no_list():
    with pytest.raises(aa.ContractError, match=r"returned Tensor tensor\(1\.\) for 1 picture\. Expected a list of 1"):
        numbers(torch.tensor(1.0), count=1)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_number_that_is_not_finite_has_an_error_of_its_own(number):
    with pytest.raises(aa.NonFiniteError, match=rf"Mine\.score_batch returned {number} for picture 0 \('a pear'\)"):
        numbers([number], count=1)


def test_an_object_that_is_a_function_has_no_method():
    with pytest.raises(aa.ContractError, match=r"^nearness returned 0 answers for 1 pair\."):
        check_numbers("nearness", "", [], count=1, per="pair")
