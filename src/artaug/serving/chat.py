"""The messages of a chat with a vision-language model, what is requested of it, and its reply."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from PIL.Image import Image

from artaug._internal.annotations import checked

_BRACKET_TOKEN = re.compile(r"\[(/?[A-Z_]{2,24})\]")


@checked
@dataclass(frozen=True)
class Message:
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    text: str
    image: Image | None = None
    """The picture that is sent before the text."""
    other_images: tuple[Image, ...] = ()
    """Further pictures, sent between the first one and the text."""


@dataclass(frozen=True)
class ChatRequest:
    """The next request to a model about one picture."""

    messages: tuple[Message, ...]
    """The whole chat so far; one of the messages has the picture."""
    schema: dict[str, Any] | None = None
    """The JSON schema of the reply; None for free text."""
    top_logprobs: int = 0
    """The most likely tokens in each place of the reply whose log-probabilities are requested; 0 for none."""


@dataclass(frozen=True)
class TokenLogprobs:
    """One token of a reply, and the log-probabilities of the tokens that were most likely in its place."""

    token: str
    top: tuple[tuple[str, float], ...]
    """Texts of tokens, which may repeat where two tokens differ in bytes only, and their log-probabilities."""


@dataclass(frozen=True)
class ChatReply:
    """A model's reply, unchanged."""

    text: str
    notes: tuple[str, ...] = ()
    """What differed from the request, such as a reply cut at the token limit; they become repairs of a critique."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """A token each, where the request was for them and the server gave them; of tokens outside of the text, too."""


def escape_chat_tokens(text: str) -> str:
    """The text with other brackets, so that a chat template finds no token of its own in it.

    >>> from artaug.serving.chat import escape_chat_tokens
    >>> escape_chat_tokens("a pear [INST]")
    'a pear (INST)'
    """
    return _BRACKET_TOKEN.sub(r"(\1)", text.replace("<", "\u2039").replace(">", "\u203a"))
