"""A language model that recipes ask: any function from a message to a reply, or a model on a server."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, final

from PIL.Image import Image

from artaug.errors import PartError
from artaug.serving.chat import ChatRequest, Message
from artaug.serving.completion import RequestFailure
from artaug.serving.model import ServedModel

Chat: TypeAlias = Callable[[str], str]
"""From a message to the reply."""
Look: TypeAlias = Callable[[str, Image], str]
"""From a message and a picture to the reply."""


@final
@dataclass(frozen=True, kw_only=True)
class ServedChat(ServedModel):
    """Asks a language model behind an OpenAI-compatible server, about a picture too; `ServedModel` has the fields.

    Raises:
        InvalidValueError: as `ServedModel`.
        PartError: by a call, if the server gives no reply.

    >>> from artaug.recipes import ServedChat
    >>> ServedChat(base_url="http://127.0.0.1:8000/v1", model="Qwen/Qwen3-8B").max_new_tokens
    1024
    """

    def __call__(self, message: str, image: Image | None = None) -> str:
        """The reply to one message, and to the picture before it, with no memory of the ones before."""
        shown = None if image is None else self._resized(image)
        ((_, outcome),) = self._replies([ChatRequest((Message("user", message, shown),))])
        if isinstance(outcome, RequestFailure):
            raise PartError(f"{self.model} gave no reply: {outcome.reason}.")
        return outcome.text


def answer_of(reply: str) -> str:
    """A reply without the model's reasoning, without code fences, and without white space and quotes around it."""
    answer = reply.rpartition("</think>")[2].replace("```", " ")
    return answer.strip().strip("\"'").strip()
