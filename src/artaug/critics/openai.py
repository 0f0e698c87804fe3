"""`OpenAICritic`: a critic whose model runs behind any OpenAI-compatible server."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import final

from PIL.Image import Image

from artaug._internal.annotations import checked
from artaug.critics.conversation import Conversation
from artaug.critics.coordinates import FAMILIES, Coordinates
from artaug.critics.dialogue import stream_dialogues
from artaug.critics.probing import ProbeResult, probe_coordinates
from artaug.critique import Abstention, Answer, StreamingCritic
from artaug.errors import InvalidValueError
from artaug.serving.chat import ChatReply, ChatRequest
from artaug.serving.completion import RequestFailure
from artaug.serving.model import ServedModel

_FAMILY_PATTERNS = {  # families whose convention does not depend on the processor, by the names of their checkpoints
    "qwen2_vl": r"qwen[-_ ]?2[-_]vl\b",
    "qwen3_vl": r"qwen[-_ ]?3[-_]vl\b",
    "internvl": r"internvl",
    "gemma3": r"gemma[-_ ]?3[-_:]\d",
}


@checked
@final
@dataclass(frozen=True, kw_only=True)
class OpenAICritic(ServedModel, StreamingCritic):
    """Criticises pictures with a model behind an OpenAI-compatible server, several requests at a time.

    Every picture gets a critique, or an abstention with the error that was left after all attempts, which is transient if
    the error is. `ServedModel` says what is retried.

    Raises:
        InvalidValueError: as `ServedModel`, or if no conversation is given and the model's name does not say how it writes
            boxes.
    """

    conversation: Conversation | None = None
    """The prompts, and how the model writes boxes. May be None for Qwen2-VL, Qwen3-VL, InternVL and Gemma 3."""
    structured: bool = True
    """Request JSON on the schema (``response_format``). If the server refuses it, the model is asked for free text: one
    warning is logged, and each critique notes it as a repair."""

    def __post_init__(self) -> None:
        if self.conversation is None:
            object.__setattr__(self, "conversation", Conversation(coordinates=_coordinates_by_name(self.model)))
        super().__post_init__()

    @property
    def max_concurrency(self) -> int:
        """1: a run draws the next pictures while the server answers; how many it asks at once is ``concurrency``."""
        return 1

    def critique_stream(self, images: Sequence[Image], prompts: Sequence[str]) -> Iterator[tuple[int, Answer]]:
        """Criticise many pictures, ``concurrency`` at a time, and give each answer when it comes."""
        # Kept for the batch, so that a picture is encoded once for both stages and all attempts.
        data_urls: dict[int, str] = {}
        generate = partial(self._generate, data_urls)
        return stream_dialogues(self._conversation, images, prompts, generate=generate, prepare=self._resized)

    def probe(self) -> ProbeResult:
        """Show the model a few rectangles and find out how it writes boxes.

        Raises:
            CriticError: if the server answers no request until ``retry_deadline_s`` is over.
        """
        return probe_coordinates(partial(self._generate, {}), self._conversation.coordinates)

    @property
    def _conversation(self) -> Conversation:
        return self.conversation or Conversation()

    def _generate(
        self, data_urls: dict[int, str], requests: Sequence[ChatRequest]
    ) -> Iterator[tuple[int, ChatReply | Abstention]]:
        if not self.structured:
            requests = [replace(request, schema=None) for request in requests]
        for index, outcome in self._replies(requests, data_urls):
            if isinstance(outcome, RequestFailure):
                yield index, Abstention(outcome.reason, outcome.retryable)
            else:
                yield index, outcome


def _coordinates_by_name(model: str) -> Coordinates:
    for family, pattern in _FAMILY_PATTERNS.items():
        if re.search(pattern, model.lower()):
            return FAMILIES[family]
    raise InvalidValueError(
        f"the name {model!r} does not say how the model writes boxes. Pass conversation=Conversation(coordinates=...), "
        "with coordinates_for(family) for a known family (fitted to its processor), or what OpenAICritic.probe finds."
    )
