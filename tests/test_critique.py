"""Critique, Abstention, and run_critic, which calls a critic and checks its answers."""

import weakref
from dataclasses import dataclass, field

import pytest
import torch
from PIL import Image

import artaug as aa
from artaug.critique import StreamingCritic, run_critic

PICTURE = Image.new("RGB", (8, 8))


class ScriptedAnswers(aa.Critic):
    def __init__(self, *answers):
        self.answers = answers

    def critique(self, image, prompt):
        return self.answers[0]

    def critique_batch(self, images, prompts):
        return list(self.answers)


class Raising(aa.Critic):
    def __init__(self, error):
        self.error = error

    def critique(self, image, prompt):
        raise self.error


@pytest.mark.parametrize("blank", ["", "  ", "\n\t"])
def test_a_blank_prompt_is_refused(blank):
    with pytest.raises(aa.InvalidValueError, match="a Suggestion needs a prompt that says what should be there"):
        aa.Suggestion(aa.Box(0, 0, 1, 1), blank)


@pytest.mark.parametrize("blank", ["", " \n"])
def test_a_blank_reason_is_refused(blank):
    with pytest.raises(aa.InvalidValueError, match="an Abstention needs a reason"):
        aa.Abstention(blank)


def test_a_critique_may_have_no_suggestions():
    assert aa.Critique().suggestions == ()


def test_answers_are_returned_in_order():
    answers = [aa.Critique(summary="fine"), aa.Abstention("too dark")]
    assert run_critic(ScriptedAnswers(*answers), [PICTURE] * 2, ["a", "b"]) == answers


def test_a_batch_is_a_loop_unless_overridden():
    class Echo(aa.Critic):
        def critique(self, image, prompt):
            return aa.Abstention(prompt)

    assert [answer.reason for answer in Echo().critique_batch([PICTURE] * 2, ["a", "b"])] == ["a", "b"]


def test_a_critic_that_raises_stops_the_run_and_is_the_cause():
    error = KeyError("label")
    with pytest.raises(aa.CriticError) as caught:
        run_critic(Raising(error), [PICTURE], ["a pear"])
    assert str(caught.value) == (
        "Raising raised KeyError: 'label', while criticising 1 picture(s), first prompt 'a pear'. "
        "A critic that cannot tell returns artaug.Abstention(reason)."
    )
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_running_out_of_memory_is_not_wrapped(error):
    with pytest.raises(type(error)) as caught:
        run_critic(Raising(error), [PICTURE], ["a pear"])
    assert caught.value is error


def test_too_few_answers_are_an_error_that_names_the_critic():
    with pytest.raises(
        aa.ContractError,
        match=r"ScriptedAnswers.critique_batch returned 1 answer for 2 pictures\. Expected a list of 2",
    ):
        run_critic(ScriptedAnswers(aa.Critique()), [PICTURE] * 2, ["a", "b"])


@pytest.mark.parametrize("answer", [None, "too dark", {"suggestions": []}, aa.Suggestion(aa.Box(0, 0, 1, 1), "a")])
def test_an_answer_of_another_type_is_named_and_quoted(answer):
    with pytest.raises(
        aa.ContractError,
        match=rf"ScriptedAnswers.critique_batch returned (None|{type(answer).__name__} .*) for picture 0 \('a pear'\)",
    ):
        run_critic(ScriptedAnswers(answer), [PICTURE], ["a pear"])


def test_missing_pictures_are_never_reported_as_the_critics_error():
    class NeverCalled(aa.Critic):
        def critique(self, image, prompt):
            raise AssertionError

    with pytest.raises(
        aa.InvalidValueError, match=r"received 1 picture\(s\) for 2 prompt\(s\), so NeverCalled was not"
    ):
        run_critic(NeverCalled(), [PICTURE], ["a", "b"])


def test_an_answer_that_is_not_a_list_is_an_error_that_names_the_critic():
    class ReturnsNone(aa.Critic):
        def critique(self, image, prompt):
            return aa.Critique()

        def critique_batch(self, images, prompts):
            return None

    with pytest.raises(aa.ContractError, match=r"ReturnsNone\.critique_batch returned None for 1 picture\."):
        run_critic(ReturnsNone(), [PICTURE], ["a"])


@dataclass
class LimitedBatches(aa.Critic):
    """Runs out of memory with more pictures together than fit."""

    fits: int
    sizes: list = field(default_factory=list)

    def critique(self, image, prompt):
        raise AssertionError

    def critique_batch(self, images, prompts):
        self.sizes.append(len(images))
        if len(images) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [aa.Critique(summary=prompt) for prompt in prompts]


@pytest.mark.parametrize("fits", [1, 2, 3, 5])
def test_a_batch_that_does_not_fit_is_halved_and_every_picture_has_its_answer(fits):
    prompts = [f"scene {index}" for index in range(5)]
    answers = run_critic(LimitedBatches(fits), [PICTURE] * 5, prompts)
    assert [answer.summary for answer in answers] == prompts


def test_a_smaller_batch_stays_for_the_rest_of_a_call():
    critic = LimitedBatches(2)
    run_critic(critic, [PICTURE] * 5, ["a"] * 5)
    assert critic.sizes == [5, 2, 2, 1]


def test_a_picture_that_alone_does_not_fit_names_the_critic_and_the_prompt():
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run_critic(LimitedBatches(0), [PICTURE] * 3, ["a pear", "a fig", "a plum"])
    assert caught.value.__notes__ == ["Raised by LimitedBatches, for the picture of 'a pear'."]


def test_of_a_stream_that_runs_out_of_memory_only_what_has_no_answer_is_asked_again():
    asked = []

    class Streaming(StreamingCritic):
        def critique_stream(self, images, prompts):
            asked.append(list(prompts))
            for index, prompt in enumerate(prompts):
                if len(prompts) > 1 and prompt == "a plum":
                    raise MemoryError
                yield index, aa.Critique(summary=prompt)

    prompts = ["a pear", "a plum", "a fig", "a quince"]
    answers = run_critic(Streaming(), [PICTURE] * 4, prompts)
    assert [answer.summary for answer in answers] == prompts
    assert asked == [prompts, ["a plum"], ["a fig"], ["a quince"]]


def test_what_a_failed_batch_held_is_free_before_the_next_begins():
    class Tensor:
        pass

    held, alive = [], []

    class Holding(LimitedBatches):
        def critique_batch(self, images, prompts):
            alive.append([reference() for reference in held if reference() is not None])
            tensor = Tensor()
            held.append(weakref.ref(tensor))
            return super().critique_batch(images, prompts)

    run_critic(Holding(1), [PICTURE] * 4, ["a"] * 4)
    assert alive == [[]] * 6


def test_a_critique_is_drawn_over_its_picture_with_its_texts_below():
    picture = Image.new("RGB", (64, 48), "grey")
    critique = aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a bright window", "it is dark"),), summary="dull")
    drawn = critique.preview(picture, scale=4)
    assert drawn.width == 256
    assert drawn.height > 192
    assert drawn.getpixel((0, 100)) != drawn.getpixel((200, 100))
    assert aa.Critique().preview(picture).size == (512, 384)
