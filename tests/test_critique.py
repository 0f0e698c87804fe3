"""What a critic may answer, and what happens when it does not."""

import pytest
from PIL import Image

import artaug as aa
from artaug.critique import run_critic

PICTURE = Image.new("RGB", (8, 8))


class Saying(aa.Critic):
    def __init__(self, *answers):
        self.answers = answers

    def critique(self, image, prompt):
        return self.answers[0]

    def critique_batch(self, images, prompts):
        return list(self.answers)


class Raising(aa.Critic):
    def __init__(self, fault):
        self.fault = fault

    def critique(self, image, prompt):
        raise self.fault


@pytest.mark.parametrize("blank", ["", "  ", "\n\t"])
def test_a_suggestion_says_what_should_be_there(blank):
    with pytest.raises(aa.InvalidValueError, match="a Suggestion needs a prompt that says what should be there"):
        aa.Suggestion(aa.Box(0, 0, 1, 1), blank)


@pytest.mark.parametrize("blank", ["", " \n"])
def test_an_abstention_gives_a_reason(blank):
    with pytest.raises(aa.InvalidValueError, match="an Abstention needs a reason"):
        aa.Abstention(blank)


def test_a_critique_may_ask_for_nothing():
    assert aa.Critique().suggestions == ()


def test_answers_come_back_in_order():
    answers = [aa.Critique(summary="fine"), aa.Abstention("too dark")]
    assert run_critic(Saying(*answers), [PICTURE] * 2, ["a", "b"]) == answers


def test_a_batch_is_a_loop_unless_overridden():
    class Echo(aa.Critic):
        def critique(self, image, prompt):
            return aa.Abstention(prompt)

    assert [one.reason for one in Echo().critique_batch([PICTURE] * 2, ["a", "b"])] == ["a", "b"]


def test_a_critic_that_raises_stops_the_run_and_is_the_cause():
    fault = KeyError("label")
    with pytest.raises(aa.CriticError) as caught:
        run_critic(Raising(fault), [PICTURE], ["a pear"])
    assert str(caught.value) == (
        "Raising raised KeyError: 'label', while criticising 1 picture(s), first prompt 'a pear'. "
        "A critic that cannot tell returns artaug.Abstention(reason)."
    )
    assert caught.value.__cause__ is fault


def test_running_out_of_memory_is_not_a_critics_fault():
    with pytest.raises(MemoryError):
        run_critic(Raising(MemoryError()), [PICTURE], ["a pear"])


def test_too_few_answers_are_counted():
    with pytest.raises(
        aa.ContractError, match=r"Saying.critique_batch returned 1 answer for 2 pictures\. Expected a list of 2"
    ):
        run_critic(Saying(aa.Critique()), [PICTURE] * 2, ["a", "b"])


@pytest.mark.parametrize("answer", [None, "too dark", {"suggestions": []}, aa.Suggestion(aa.Box(0, 0, 1, 1), "a")])
def test_an_answer_of_another_type_is_named_and_quoted(answer):
    with pytest.raises(
        aa.ContractError,
        match=rf"Saying.critique_batch returned (None|{type(answer).__name__} .*) for picture 0 \('a pear'\)",
    ):
        run_critic(Saying(answer), [PICTURE], ["a pear"])
