"""What a judge may answer, how it is asked in both orders, and the laws of a `Preference`."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import artaug as aa
from artaug._internal.values import from_json, to_json
from artaug.pairwise import judge_images
from support.clock import FakeTime
from support.strategies import fractions, preferences

DARK, LIGHT = Image.new("L", (8, 8), 40), Image.new("L", (8, 8), 200)


class Lighter(aa.PairwiseJudge):
    """Prefers the lighter picture, and has nothing against ties."""

    def prefer(self, first, second, prompt):
        difference = first.getpixel((0, 0)) - second.getpixel((0, 0))
        return 0.5 + 0.5 * np.sign(difference)


class Says(aa.PairwiseJudge):
    """Gives fixed answers, and notes how many questions came in each call."""

    def __init__(self, *answers):
        self.answers, self.calls = answers, []

    def prefer(self, first, second, prompt):
        return self.answers[0]

    def prefer_batch(self, first, second, prompts):
        self.calls.append(len(prompts))
        return list(self.answers)[: len(prompts)]


@given(st.lists(st.integers(0, 255), min_size=2, max_size=2))
def test_swapping_the_pictures_swaps_the_preference(lights):
    first, second = (Image.new("L", (4, 4), light) for light in lights)
    (preference,) = judge_images(Lighter(), [first], [second], ["a hill"])
    (other,) = judge_images(Lighter(), [second], [first], ["a hill"])
    assert other == preference.swapped
    assert {preference.winner, other.winner} in ({"first", "second"}, {"tie"})


@given(fractions)
def test_equal_pictures_tie_whatever_the_judge_says(answer):
    (preference,) = judge_images(Says(answer, answer), [DARK], [DARK.copy()], ["a hill"])
    assert preference.winner == "tie"
    assert preference.score == pytest.approx(0.5)


@given(preferences())
def test_a_preference_is_the_same_after_json_and_two_swaps(preference):
    assert from_json(aa.Preference, to_json(preference)) == preference
    assert preference.swapped.swapped == preference
    assert preference.swapped.score == pytest.approx(1 - preference.score)
    assert preference.swapped.position == preference.position


@given(preferences())
def test_a_winner_has_the_higher_score_and_agrees_with_itself(preference):
    if preference.winner != "tie":
        assert (preference.score > 0.5) == (preference.winner == "first")
        assert preference.position == 0


def test_a_judge_that_always_says_first_gives_ties_that_name_the_position():
    preferences = judge_images(Says(*[1.0] * 4), [DARK, LIGHT], [LIGHT, DARK], ["a", "b"])
    assert [preference.winner for preference in preferences] == ["tie", "tie"]
    assert [preference.position for preference in preferences] == [1, 1]
    assert "prefers whichever is shown first" in str(preferences[0])


def test_the_two_orders_of_a_pair_are_asked_together_in_one_call():
    shown = []

    class Notes(aa.PairwiseJudge):
        def prefer(self, first, second, prompt):
            raise AssertionError("the batch is asked")

        def prefer_batch(self, first, second, prompts):
            shown.extend(zip(first, second, prompts, strict=True))
            return [0.5] * len(prompts)

    judge_images(Notes(), [DARK], [LIGHT], ["a hill"])
    assert shown == [(DARK, LIGHT, "a hill"), (LIGHT, DARK, "a hill")]


def test_a_judge_without_a_batch_of_its_own_is_asked_one_by_one():
    assert [preference.winner for preference in judge_images(Lighter(), [LIGHT, DARK], [DARK, LIGHT], ["a", "b"])] == [
        "first",
        "second",
    ]


def test_without_pairs_the_judge_is_not_called():
    judge = Says()
    assert judge_images(judge, [], [], []) == []
    assert judge.calls == []


def test_an_abstention_in_either_order_is_an_abstention():
    silent = aa.Abstention("the reply 'both are nice' names no picture", transient=True)
    assert judge_images(Says(1.0, silent), [DARK], [LIGHT], ["a"]) == [silent]
    assert judge_images(Says(silent, 1.0), [DARK], [LIGHT], ["a"]) == [silent]


@pytest.mark.parametrize("answer", [1.2, -0.1])
def test_a_number_outside_0_to_1_is_refused(answer):
    with pytest.raises(
        aa.ContractError, match=rf"Says.prefer_batch returned {answer} for 'a pear'\. Expected a number in"
    ):
        judge_images(Says(answer, 0.5), [DARK], [LIGHT], ["a pear"])


@pytest.mark.parametrize("answer", ["A", None, aa.Preference(1.0, 0.0)])
def test_what_is_neither_number_nor_abstention_is_quoted(answer):
    with pytest.raises(aa.ContractError, match=r"Says.prefer_batch returned .* for pair 0 \('a pear'\)"):
        judge_images(Says(answer, 0.5), [DARK], [LIGHT], ["a pear"])


def test_nan_names_the_prompt():
    with pytest.raises(aa.NonFiniteError, match=r"returned nan for pair 0 \('a pear'\)"):
        judge_images(Says(float("nan"), 0.5), [DARK], [LIGHT], ["a pear"])


def test_too_few_answers_are_counted():
    with pytest.raises(aa.ContractError, match=r"Says.prefer_batch returned 1 answer for 2 questions"):
        judge_images(Says(1.0), [DARK], [LIGHT], ["a pear"])


def test_pictures_that_are_not_two_a_prompt_are_refused():
    with pytest.raises(aa.InvalidValueError, match=r"received 1 and 2 pictures for 1 prompt"):
        judge_images(Says(1.0), [DARK], [LIGHT, DARK], ["a pear"])


def test_a_number_outside_0_to_1_is_no_preference():
    with pytest.raises(aa.InvalidValueError, match=r"forward"):
        aa.Preference(1.5, 0.0)


def test_what_a_judge_raises_names_it_and_the_prompt():
    class Broken(aa.PairwiseJudge):
        def prefer(self, first, second, prompt):
            raise KeyError("weights")

    with pytest.raises(
        aa.ScoringError, match=r"the judge 'Broken' raised KeyError: 'weights', for the pair of 'a pear'"
    ):
        judge_images(Broken(), [DARK], [LIGHT], ["a pear"])


def test_a_timeout_is_tried_again(monkeypatch):
    monkeypatch.setattr("artaug._internal.calls.time", FakeTime())
    failures = [TimeoutError("busy")]

    class Busy(Lighter):
        def prefer(self, first, second, prompt):
            if failures:
                raise failures.pop()
            return super().prefer(first, second, prompt)

    assert judge_images(Busy(), [DARK], [LIGHT], ["a"])[0].winner == "second"


def test_a_batch_that_does_not_fit_is_halved(caplog):
    class Small(Lighter):
        def prefer_batch(self, first, second, prompts):
            if len(prompts) > 2:
                raise MemoryError
            return super().prefer_batch(first, second, prompts)

    judgments = judge_images(Small(), [LIGHT] * 3, [DARK] * 3, ["a"] * 3)
    assert [judgment.winner for judgment in judgments] == ["first"] * 3
    assert "the judge 'Small' ran out of memory at 6 questions together" in caplog.text
