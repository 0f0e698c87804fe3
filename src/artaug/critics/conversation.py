"""What is said to a multimodal model to get a critique out of it, and the JSON it is asked to answer with.

It does not know how a model is reached: whoever runs one sends the messages and hands the reply back.
"""

import json
import re
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import resources
from typing import Annotated, Any, Literal, Self

from PIL.Image import Image
from pydantic import BaseModel, ConfigDict, Field, create_model

from artaug.critics.coordinates import Coordinates, Size
from artaug.critics.replies import MAX_PROMPT_CHARS, parse_reply
from artaug.critique import Abstention, Critique
from artaug.errors import InvalidValueError

_MAX_REMARK_CHARS = 300
_THOUSANDTHS = Coordinates("thousandths")
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
_KNOWN = ("prompt", "max_suggestions", "coordinates", "schema")
_SQUARE_TOKEN = re.compile(r"\[(/?[A-Z_]{2,24})\]")


@cache
def prompt_text(name: str) -> str:
    """One of the texts that come with the package, by its name and version.

    There are ``art-director-1-system``, ``-answer`` (all at once), ``-analyse`` and ``-conclude`` (in two stages).

    Raises:
        InvalidValueError: for a name that is not there.

    >>> from artaug.critics import prompt_text
    >>> prompt_text("art-director-1-system")[:24]
    'You are an art director.'
    """
    folder = resources.files("artaug.critics") / "prompts"
    there = sorted(file.name.removesuffix(".txt") for file in folder.iterdir() if file.name.endswith(".txt"))
    if name not in there:
        raise InvalidValueError(f"there is no prompt called {name!r}; there are {', '.join(there)}.")
    return (folder / f"{name}.txt").read_text(encoding="utf-8").strip()


@dataclass(frozen=True)
class Message:
    """One turn of a conversation with a model."""

    role: Literal["system", "user", "assistant"]
    text: str
    image: Image | None = None
    """The picture shown with it, before the text."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """How a model is asked for a critique, and how its reply is read.

    The texts may hold ``{prompt}`` (what the picture was drawn from), ``{max_suggestions}``, ``{coordinates}`` (the
    convention, in words) and ``{schema}`` (of the reply). What is put in is put in once: braces in a prompt mean
    nothing, and marks that a chat template would read as its own (``<image>``, ``<|im_end|>``, ``[INST]``) are written
    with other brackets.

    Raises:
        InvalidValueError: if fewer than 1 suggestion is asked for, a text has a placeholder that is not one of these,
            or none of them has the prompt.

    >>> from artaug.critics import Conversation, coordinates_for
    >>> from PIL import Image
    >>> asked = Conversation(coordinates=coordinates_for("qwen3_vl"), max_suggestions=2)
    >>> [message.role for message in asked.messages(Image.new("RGB", (64, 64)), "a pear")]
    ['system', 'user']
    >>> asked.schema((64, 64))["properties"]["suggestions"]["maxItems"]
    2
    """

    coordinates: Coordinates = _THOUSANDTHS
    """How the model writes boxes."""
    max_suggestions: int = 4
    """At most so many are asked for, and read."""
    system: str = field(default_factory=partial(prompt_text, "art-director-1-system"))
    """Who the model is to be; empty for none."""
    answer: str = field(default_factory=partial(prompt_text, "art-director-1-answer"))
    """Asks for the reply."""
    analyse: str = ""
    """Asks for a free analysis first, in a turn of its own; empty for none. It helps a model to find places."""
    system_role: bool = True
    """Whether the model's chat template knows a system role; if not, the system text stands before the first request."""

    def __post_init__(self) -> None:
        if self.max_suggestions < 1:
            raise InvalidValueError(f"Conversation(max_suggestions={self.max_suggestions}): need at least 1.")
        named = _PLACEHOLDER.findall(f"{self.system} {self.analyse} {self.answer}")
        if unknown := sorted(set(named) - set(_KNOWN)):
            raise InvalidValueError(
                f"the texts of a Conversation have placeholders {', '.join(f'{{{name}}}' for name in unknown)}, which "
                f"nothing fills: known are {', '.join(f'{{{name}}}' for name in _KNOWN)}."
            )
        if "prompt" not in named:
            raise InvalidValueError("the texts of a Conversation never say {prompt}, what the picture was drawn from.")

    @classmethod
    def in_two_stages(cls, *, coordinates: Coordinates, max_suggestions: int = 4, system_role: bool = True) -> Self:
        """A conversation with a free analysis first, and the reply asked for in a second turn."""
        return cls(
            coordinates=coordinates,
            max_suggestions=max_suggestions,
            answer=prompt_text("art-director-1-conclude"),
            analyse=prompt_text("art-director-1-analyse"),
            system_role=system_role,
        )

    @property
    def stages(self) -> int:
        """How many replies it takes: 1, or 2 with an analysis."""
        return 2 if self.analyse else 1

    def messages(self, image: Image, prompt: str, *, analysis: str | None = None) -> tuple[Message, ...]:
        """What to send to the model next.

        Args:
            image: the picture, as the model is shown it.
            prompt: what it was drawn from.
            analysis: in two stages, the model's reply to the first; not given for the first.

        Raises:
            InvalidValueError: for an analysis where none is asked for.
        """
        if analysis is not None and not self.analyse:
            raise InvalidValueError("this Conversation has one stage and takes no analysis.")
        filled = {
            "prompt": _harmless(prompt),
            "max_suggestions": str(self.max_suggestions),
            "coordinates": in_words(self.coordinates, image.size),
            "schema": json.dumps(self.schema(image.size), ensure_ascii=False),
        }
        system, opening, closing = (
            _PLACEHOLDER.sub(lambda name: filled[name[1]], text)
            for text in (self.system, self.analyse or self.answer, self.answer)
        )
        sent = [Message("system", system)] if system and self.system_role else []
        first = f"{system}\n\n{opening}" if system and not self.system_role else opening
        sent.append(Message("user", first, image))
        if analysis is not None:
            sent += [Message("assistant", _harmless(analysis)), Message("user", closing)]
        return tuple(sent)

    def schema(self, size: Size) -> dict[str, Any]:
        """The JSON schema of the reply for a picture of ``size`` (width, height in pixels).

        Nothing is optional, nothing may be added, and numbers are held to the convention's range.
        """
        return _inlined(_reply_model(self.coordinates, self.max_suggestions, size).model_json_schema())

    def read(self, reply: str, *, size: Size) -> Critique | Abstention:
        """Read the model's reply about a picture of ``size``; see `parse_reply`."""
        return parse_reply(reply, size=size, coordinates=self.coordinates, at_most=self.max_suggestions)


def in_words(coordinates: Coordinates, size: Size) -> str:
    """A convention as one says it to a model.

    >>> from artaug.critics.conversation import in_words
    >>> from artaug.critics import Coordinates
    >>> in_words(Coordinates("pixels"), (640, 480)).partition("in whole pixels")[2]
    ' of the picture, which is 640 wide and 480 high'
    """
    names = {
        "xyxy": "[left, top, right, bottom]",
        "yxyx": "[top, left, bottom, right]",
        "xywh": "[left, top, width, height]",
        "points": "[x, y]",
    }[coordinates.order]
    aim = "the middle of what should change" if coordinates.order == "points" else "tight around what should change"
    across, down = coordinates.extent(size)
    if coordinates.unit == "pixels":
        scale = f"whole pixels of the picture, which is {across:g} wide and {down:g} high"
    else:
        kind = "whole numbers" if coordinates.unit == "thousandths" else "numbers"
        scale = f"{kind} from 0 to {across:g}, where {across:g} is the right or the bottom edge"
    return f'"{coordinates.key}": {names}, {aim}, in {scale}'


def _reply_model(coordinates: Coordinates, at_most: int, size: Size) -> type[BaseModel]:
    """The shape of a reply: the one place that knows it. Reasons come before what they lead to."""
    strict, furthest = ConfigDict(extra="forbid", title="Reply"), max(coordinates.extent(size))
    kind: Any = int if coordinates.unit in {"thousandths", "pixels"} else float
    numbers = 2 if coordinates.order == "points" else 4
    within = Annotated[kind, Field(ge=0, le=kind(furthest))]
    place = Annotated[list[within], Field(min_length=numbers, max_length=numbers, alias=coordinates.key)]
    remark = Annotated[str, Field(max_length=_MAX_REMARK_CHARS)]
    said = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARS)]
    suggestion: Any = create_model(
        "Suggestion", __config__=strict, reason=(remark, ...), place=(place, ...), prompt=(said, ...)
    )
    suggestions = Annotated[list[suggestion], Field(max_length=at_most)]
    return create_model("Reply", __config__=strict, summary=(remark, ...), suggestions=(suggestions, ...))


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema without references and titles: some decoders know no references, and titles only cost tokens."""
    definitions = schema.get("$defs", {})

    def plain(part: Any) -> Any:  # noqa: ANN401  # JSON
        if isinstance(part, list):
            return [plain(one) for one in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return plain(definitions[part["$ref"].rpartition("/")[2]])
        return {name: plain(one) for name, one in part.items() if name not in {"$defs", "title"}}

    inlined: dict[str, Any] = plain(schema)
    return inlined


def _harmless(text: str) -> str:
    """A text in which no chat template finds a token of its own."""
    return _SQUARE_TOKEN.sub(r"(\1)", text.replace("<", "\u2039").replace(">", "\u203a"))
