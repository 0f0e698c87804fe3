"""One choice among a few in a model's reply: the JSON schema that asks for it, its value, and the odds of all choices."""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from artaug.errors import InvalidValueError
from artaug.serving.chat import ChatReply
from artaug.serving.completion import CUT
from artaug.serving.logprobs import AnswerOdds, answer_odds

MAX_TOP_LOGPROBS = 20
"""What OpenAI and vLLM give by default."""
NO_LOGPROBS = (
    "the server gave no log-probabilities. Need one that takes logprobs and top_logprobs for this model (vLLM, SGLang and "
    "llama.cpp do, and OpenAI for models that do not reason)"
)
_MOST_ERROR = 0.05  # of an answer, as a share of its range
_SPACE = "[\\s\u2581\u0120\u010a]{0,20}"  # also as tokenizers write it
_MAX_REASON_CHARS = 300
_MAX_EXCERPT_CHARS = 160


def choice_schema(key: str, choices: Sequence[str | int], *, explain: bool) -> dict[str, Any]:
    """The JSON schema of a reply that has one of ``choices`` under ``key``, after a reason if it is to be explained.

    >>> from artaug.serving.choices import choice_schema
    >>> choice_schema("grade", [1, 2, 3], explain=False)["properties"]
    {'grade': {'type': 'integer', 'minimum': 1, 'maximum': 3}}
    """
    numbers = [choice for choice in choices if isinstance(choice, int)]
    choice: dict[str, Any] = {"type": "string", "enum": list(choices)}
    if numbers:
        choice = {"type": "integer", "minimum": min(numbers), "maximum": max(numbers)}
    # The reason comes first, so that the model writes it before it chooses.
    reason = {"reason": {"type": "string", "maxLength": _MAX_REASON_CHARS}} if explain else {}
    properties = {**reason, key: choice}
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def read_choice(reply: ChatReply, key: str, choices: Sequence[str]) -> str | None:
    """The choice in a reply: under ``key`` in JSON, after it in a text, or the text itself; None if there is none.

    Where there are several, the last one counts. A reply that was cut at the limit of tokens has none, unless its JSON is
    whole.

    >>> from artaug.serving.choices import read_choice
    >>> from artaug.serving.chat import ChatReply
    >>> read_choice(ChatReply("The hands are odd. **Grade:** 2"), "grade", ["1", "2", "3"])
    '2'
    """
    try:
        document = json.loads(reply.text)
    except (ValueError, RecursionError):
        document = None
    if isinstance(document, dict) and key in document:
        value = document[key]
        text = "" if isinstance(value, bool | float) else str(value)
        return _legal(str(int(value)) if isinstance(value, float) and value.is_integer() else text, choices)
    if CUT in reply.notes:
        return None
    start = _last_value(reply.text, key)
    text = reply.text if start is None else re.split(r"[\s\"'`*}\],;/]", reply.text[start:], maxsplit=1)[0]
    return _legal(text, choices)


def choice_odds(reply: ChatReply, key: str, choices: Sequence[str]) -> AnswerOdds | None:
    """The odds of all choices in the place of the one that a reply has; None where the server gave none for that place."""
    start = _last_value("".join(token.token for token in reply.logprobs), key)
    end = 0
    for token in reply.logprobs:
        end += len(token.token)
        if start is not None and start < end:
            return answer_odds(token.top, {choice: [choice.lower()] for choice in choices})
    return None


def describe_reply(reply: ChatReply) -> str:
    """A reply in a few words, for an error.

    >>> from artaug.serving.choices import describe_reply
    >>> from artaug.serving.chat import ChatReply
    >>> describe_reply(ChatReply("Lovely!", ("it was cut",)))
    "'Lovely!' (it was cut)"
    """
    text = " ".join(reply.text.split())
    shown = repr(text if len(text) <= _MAX_EXCERPT_CHARS else f"{text[:_MAX_EXCERPT_CHARS]}...")
    return f"{shown} ({'; '.join(reply.notes)})" if reply.notes else shown


def check_raw_odds(owner: str, temperature: float | None, top_logprobs: int) -> None:
    """Refuse settings under which log-probabilities are not those of the model.

    Raises:
        InvalidValueError: for a temperature that some servers divide by, or too few log-probabilities.
    """
    if temperature not in {None, 0, 1}:
        raise InvalidValueError(
            f"{owner}(temperature={temperature}): some servers scale log-probabilities by it. Need 0, 1 or None for those of "
            "the model itself."
        )
    if top_logprobs < 2:
        raise InvalidValueError(
            f"{owner}(top_logprobs={top_logprobs}): need at least 2, and 20 where the server gives them."
        )


def warn_of_unlisted(owner: str, errors: Mapping[str, float]) -> None:
    """Warn once of a batch if what a server did not list may change an answer by more than 0.05 of its range.

    Args:
        owner: who asked.
        errors: by the pictures in words, the most that an answer may be off, as a share of its range.
    """
    worst = max(errors, key=lambda what: errors[what], default=None)
    if worst is not None and errors[worst] > _MOST_ERROR:
        warnings.warn(
            f"{owner}: the server listed too few tokens: the answer for {worst} may be off by {errors[worst]:.2f} of its "
            "range. Raise top_logprobs as far as the server allows, or ask so that one of the answers is sure to follow.",
            stacklevel=3,
        )


def _last_value(text: str, key: str) -> int | None:
    """Where the value after the last ``key`` in a text begins."""
    marks = "[\"'`*]{0,4}"
    pattern = rf"{marks}{re.escape(key)}{marks}{_SPACE}[:=]{_SPACE}{marks}{_SPACE}{marks}(?=[^\s\"'`*])"
    matches = list(re.finditer(pattern, text, re.IGNORECASE))
    return matches[-1].end() if matches else None


def _legal(text: str, choices: Sequence[str]) -> str | None:
    text = text.strip().strip("\"'`*.,:;!(){}[]").lower()
    return next((choice for choice in choices if choice.lower() == text), None)
