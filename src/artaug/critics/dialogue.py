"""How a picture is talked over with a model, whoever runs the model: what it is asked next, and what came of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from PIL.Image import Image

from artaug._internal.images import as_rgb
from artaug.critics.conversation import Conversation, Message
from artaug.critique import Abstention, Critique
from artaug.errors import InvalidValueError

MAX_CAPTION_CHARS = 2000
"""Characters of a picture's prompt that a model is told; a longer one is cut, and the critique says so."""


@dataclass(frozen=True)
class Question:
    """What a model is asked next about one picture."""

    messages: tuple[Message, ...]
    """All that has been said so far; the first picture in it is the one."""
    schema: dict[str, Any] | None = None
    """The JSON schema that the reply has to keep; None where the model may say what it likes."""


@dataclass(frozen=True)
class Reply:
    """What a model said, as it came."""

    text: str
    remarks: tuple[str, ...] = ()
    """What went otherwise than asked for, a sentence each; they become repairs of the critique."""


Ask: TypeAlias = Callable[[Sequence[Question]], Sequence[Reply | Abstention]]
"""Puts questions to a model: a reply to each, or an abstention that names the fault that kept it from replying."""


def run_dialogue(
    conversation: Conversation,
    images: Sequence[Image],
    prompts: Sequence[str],
    *,
    ask: Ask,
    prepare: Callable[[Image], Image] = as_rgb,
) -> list[Critique | Abstention]:
    """Hold a conversation about each picture and read the last replies.

    Args:
        conversation: what is said, in one stage or two.
        images: the pictures.
        prompts: what they were drawn from.
        ask: puts the questions of a stage, all at once.
        prepare: makes of a picture what the model is shown. Where it raises an `InvalidValueError`, the critic abstains.

    Returns:
        A critique or an abstention for each picture, in their order.
    """
    talks = [_Talk.begin(image, prompt, conversation, prepare) for image, prompt in zip(images, prompts, strict=True)]
    for stage in range(1, conversation.stages + 1):
        last = stage == conversation.stages
        waiting = [talk for talk in talks if talk.answer is None]
        replies = ask([talk.question(last=last) for talk in waiting]) if waiting else []
        for talk, reply in zip(waiting, replies, strict=True):
            talk.hear(reply, last=last)
    return [talk.answer for talk in talks if talk.answer is not None]


@dataclass(slots=True)
class _Talk:
    """One picture, and how far the talk about it has come."""

    conversation: Conversation
    image: Image
    prompt: str
    remarks: list[str] = field(default_factory=list)
    analysis: str | None = None
    answer: Critique | Abstention | None = None

    @classmethod
    def begin(cls, image: Image, prompt: str, conversation: Conversation, prepare: Callable[[Image], Image]) -> "_Talk":
        talk = cls(conversation, image, prompt[:MAX_CAPTION_CHARS])
        if len(prompt) > MAX_CAPTION_CHARS:
            talk.remarks.append(
                f"told the model the first {MAX_CAPTION_CHARS:,} of {len(prompt):,} characters of the prompt"
            )
        try:
            talk.image = prepare(image)
            conversation.coordinates.extent(talk.image.size)
        except InvalidValueError as fault:
            talk.answer = Abstention(str(fault))
        return talk

    def question(self, *, last: bool) -> Question:
        messages = self.conversation.messages(self.image, self.prompt, analysis=self.analysis)
        return Question(messages, self.conversation.schema(self.image.size) if last else None)

    def hear(self, reply: Reply | Abstention, *, last: bool) -> None:
        if isinstance(reply, Abstention):
            self.answer = reply
            return
        self.remarks += reply.remarks
        if last:
            self.answer = self.remarked(self.conversation.read(reply.text, size=self.image.size))
        else:
            self.analysis = reply.text

    def remarked(self, answer: Critique | Abstention) -> Critique | Abstention:
        if isinstance(answer, Critique):
            return replace(answer, repairs=(*self.remarks, *answer.repairs))
        return Abstention("; ".join((answer.reason, *self.remarks)))
