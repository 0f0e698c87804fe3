"""A language model that recipes ask: any function from a message to a reply, or a model on a server; and critics that it is."""

import logging
import re
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeAlias, final

from PIL.Image import Image

from artaug._internal.annotations import checked
from artaug._internal.contracts import check_result
from artaug._internal.text import shorten
from artaug.critics.replies.reasoning import without_reasoning
from artaug.critique import Abstention, Critic, Critique
from artaug.errors import PartError
from artaug.serving.chat import ChatRequest, Message, escape_chat_tokens
from artaug.serving.completion import RequestFailure
from artaug.serving.model import ServedModel

Chat: TypeAlias = Callable[[str], str]
"""From a message to the reply."""
Look: TypeAlias = Callable[[str, Image], str]
"""From a message and a picture to the reply."""

_LOG = logging.getLogger(__name__)

LONGEST_REPLY = 20_000
"""Characters of a reply that are read."""
_FENCE = re.compile(r"^[ \t]*```\w*[ \t]*$|```", re.MULTILINE)
_QUOTES = "\"'" + chr(0x201C) + chr(0x201D)
_BULLET = re.compile(r"^\s*(?:[-*+\u2013\u2022]\s|\u2022|[*_]{0,2}\d{1,3}[.)][*_]{0,2}(?!\d))\s*")


@checked
@final
@dataclass(frozen=True, kw_only=True)
class ServedChat(ServedModel):
    """Asks a language model behind an OpenAI-compatible server, about a picture too; `ServedModel` has the fields.

    A reply that was cut at ``max_new_tokens`` is used as far as it goes, with a warning in the log.

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
        for note in outcome.notes:
            _LOG.warning("%s: %s: %r", self.model, note, shorten(outcome.text, 120))
        return outcome.text


@dataclass(frozen=True)
class ChatCritic(Critic):
    """A critic that asks for words, not for JSON: a subclass has the message, and reads what was written about the picture.

    It abstains where a server gives no reply, or one that ends within the model's reasoning: one request that failed too often
    ends no run.

    >>> import artaug as aa
    >>> from artaug.recipes import ChatCritic
    >>> from PIL import Image
    >>> class Brighter(ChatCritic):
    ...     message = "A picture of {prompt}. In one line: what would make it brighter?"
    ...
    ...     def read(self, text):
    ...         return aa.Critique((aa.Suggestion(aa.Box(0, 0, 1, 1), text),))
    >>> critic = Brighter(lambda message, image: "<think>It is dark.</think> a red cone, lit by a lamp")
    >>> critic.critique(Image.new("RGB", (64, 64)), "a red cone").suggestions[0].prompt
    'a red cone, lit by a lamp'
    """

    message: ClassVar[str]
    """With ``{prompt}`` where the prompt of the picture is to stand."""

    look: Look
    """Such as a `ServedChat` with a multimodal model."""

    @property
    def max_concurrency(self) -> int:
        return self.look.concurrency if isinstance(self.look, ServedChat) else 0

    def critique(self, image: Image, prompt: str) -> Critique | Abstention:
        """What `read` makes of the reply, without the model's reasoning and without code fences."""
        try:
            reply = replied(self.look(self.message.format(prompt=escape_chat_tokens(prompt)), image))
        except PartError as error:
            return Abstention(str(error))
        text = _words_of(reply)[:LONGEST_REPLY]
        return self.read(text) if text else Abstention("the reply is empty, or ends before its answer begins")

    @abstractmethod
    def read(self, text: str) -> Critique | Abstention:
        """The critique that a text is; an abstention from one that is none."""


def replied(reply: object) -> str:
    """What a `Chat` or `Look` returned.

    Raises:
        ContractError: if that is no text: a refusal is None in some clients.
    """
    return check_result("the model's function", "", reply, of=str)


def answer_of(reply: str) -> str:
    """A reply without the model's reasoning, without code fences, and without white space and quotes around it."""
    return _words_of(reply).strip(_QUOTES).strip()


def without_bullet(line: str) -> str:
    """A line of a list without what begins it.

    >>> from artaug.recipes.chat import without_bullet
    >>> [without_bullet(line) for line in ("- a cone", "**2.** a ball", "2 cubes", "1.5 cones")]
    ['a cone', 'a ball', '2 cubes', '1.5 cones']
    """
    return _BULLET.sub("", line).strip()


def _words_of(reply: str) -> str:
    return _FENCE.sub(" ", without_reasoning(reply)).strip()
