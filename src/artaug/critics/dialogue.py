"""Running a `Conversation` about many pictures with any model: which requests to send, and what the replies give."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from PIL.Image import Image

from artaug._internal.images import as_rgb
from artaug.critics.conversation import Conversation
from artaug.critique import Abstention, Answer, Critique
from artaug.errors import InvalidValueError
from artaug.serving.chat import ChatReply, ChatRequest

MAX_CAPTION_CHARS = 2000
"""Characters of a picture's prompt that are sent to the model; a longer one is truncated, and the critique notes it."""
MAX_ANALYSIS_CHARS = 20_000
"""The same for the model's analysis in the first of two stages, which is sent back to it."""


Generate: TypeAlias = Callable[[Sequence[ChatRequest]], Iterable[tuple[int, ChatReply | Abstention]]]
"""Sends requests to a model: as they come and in any order, the index of each and its reply, or an abstention with the
reason why there is none."""


def stream_dialogues(
    conversation: Conversation,
    images: Sequence[Image],
    prompts: Sequence[str],
    *,
    generate: Generate,
    prepare: Callable[[Image], Image] = as_rgb,
) -> Iterator[tuple[int, Answer]]:
    """Hold a conversation about each picture and parse the last reply as soon as it comes.

    Args:
        conversation: the prompts, in one stage or two.
        images: the pictures.
        prompts: what they were drawn from.
        generate: called once a stage with the requests of all pictures; an exception of it is raised after the answers
            before it.
        prepare: turns a picture into the one that the model sees. If it raises an `InvalidValueError`, the critic
            abstains from that picture.

    Yields:
        The index of a picture, and a critique or an abstention; those that cannot be shown first.
    """
    dialogues = [
        _Dialogue.start(image, prompt, conversation, prepare) for image, prompt in zip(images, prompts, strict=True)
    ]
    yield from ((index, dialogue.answer) for index, dialogue in enumerate(dialogues) if dialogue.answer is not None)
    for stage in range(1, conversation.stages + 1):
        last = stage == conversation.stages
        pending = [index for index, dialogue in enumerate(dialogues) if dialogue.answer is None]
        requests = [dialogues[index].next_request(last=last) for index in pending]
        for position, reply in generate(requests) if requests else ():
            index = pending[position]
            dialogues[index].receive(reply, last=last)
            if (answer := dialogues[index].answer) is not None:
                yield index, answer


@dataclass(slots=True)
class _Dialogue:
    """The state of the conversation about one picture."""

    conversation: Conversation
    image: Image
    prompt: str
    notes: list[str] = field(default_factory=list)
    analysis: str | None = None
    answer: Critique | Abstention | None = None

    @classmethod
    def start(
        cls, image: Image, prompt: str, conversation: Conversation, prepare: Callable[[Image], Image]
    ) -> "_Dialogue":
        dialogue = cls(conversation, image, prompt[:MAX_CAPTION_CHARS])
        if len(prompt) > MAX_CAPTION_CHARS:
            dialogue.notes.append(
                f"sent the model the first {MAX_CAPTION_CHARS:,} of {len(prompt):,} characters of the prompt"
            )
        try:
            dialogue.image = prepare(image)
            conversation.coordinates.extent(dialogue.image.size)
        except InvalidValueError as error:
            dialogue.answer = Abstention(str(error))
        return dialogue

    def next_request(self, *, last: bool) -> ChatRequest:
        messages = self.conversation.messages(self.image, self.prompt, analysis=self.analysis)
        return ChatRequest(messages, self.conversation.schema(self.image.size) if last else None)

    def receive(self, reply: ChatReply | Abstention, *, last: bool) -> None:
        if isinstance(reply, Abstention):
            self.answer = reply
            return
        self.notes += reply.notes
        if not last:
            self.analysis = reply.text[:MAX_ANALYSIS_CHARS]
            if len(reply.text) > MAX_ANALYSIS_CHARS:
                self.notes.append(
                    f"sent the model the first {MAX_ANALYSIS_CHARS:,} of {len(reply.text):,} characters of its analysis"
                )
            return
        answer = self.conversation.parse(reply.text, size=self.image.size)
        if isinstance(answer, Critique):
            self.answer = replace(answer, repairs=(*self.notes, *answer.repairs))
        else:
            self.answer = Abstention("; ".join((answer.reason, *self.notes)))
