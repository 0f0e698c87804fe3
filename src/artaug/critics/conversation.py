"""The messages that ask a multimodal model for a critique, and the JSON schema of its reply.

How a model is run is not known here: `dialogue` sends the messages and passes the reply back.
"""

import json
import re
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import resources
from typing import Annotated, Any, Self

from PIL.Image import Image
from pydantic import BaseModel, ConfigDict, Field, create_model

from artaug._internal.annotations import checked
from artaug.critics.coordinates import Coordinates, Size
from artaug.critics.replies import MAX_PROMPT_CHARS, parse_reply
from artaug.critique import Abstention, Critique
from artaug.errors import InvalidValueError
from artaug.serving.chat import Message, escape_chat_tokens

_SCHEMA_REMARK_CHARS = 300
_THOUSANDTHS = Coordinates("thousandths")
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
_PLACEHOLDERS = ("prompt", "max_suggestions", "coordinates", "schema")


@cache
def prompt_text(name: str) -> str:
    """One of the prompts of the package, by name and version.

    There are ``art-director-1-system``, ``-answer`` (one stage), ``-analyse`` and ``-conclude`` (two stages).

    Raises:
        InvalidValueError: for an unknown name.

    >>> from artaug.critics import prompt_text
    >>> prompt_text("art-director-1-system")[:24]
    'You are an art director.'
    """
    folder = resources.files("artaug.critics") / "prompts"
    names = sorted(file.name.removesuffix(".txt") for file in folder.iterdir() if file.name.endswith(".txt"))
    if name not in names:
        raise InvalidValueError(f"there is no prompt called {name!r}; there are {', '.join(names)}.")
    return (folder / f"{name}.txt").read_text(encoding="utf-8").strip()


@checked
@dataclass(frozen=True, kw_only=True)
class Conversation:
    """The prompts that ask a model for a critique, and the convention for parsing its reply.

    The prompts may hold ``{prompt}`` (what the picture was drawn from), ``{max_suggestions}``, ``{coordinates}`` (the
    convention, in words) and ``{schema}`` (of the reply). Placeholders are filled once, so braces in a picture's prompt
    have no meaning, and tokens of chat templates in it (``<image>``, ``<|im_end|>``, ``[INST]``) get other brackets.

    Raises:
        InvalidValueError: if ``max_suggestions`` is below 1, a prompt has an unknown placeholder, or none of them has
            ``{prompt}``.

    >>> from artaug.critics import Conversation, coordinates_for
    >>> from PIL import Image
    >>> conversation = Conversation(coordinates=coordinates_for("qwen3_vl"), max_suggestions=2)
    >>> [message.role for message in conversation.messages(Image.new("RGB", (64, 64)), "a pear")]
    ['system', 'user']
    >>> conversation.schema((64, 64))["properties"]["suggestions"]["maxItems"]
    2
    """

    coordinates: Coordinates = _THOUSANDTHS
    """How the model writes boxes."""
    max_suggestions: int = 4
    """The model is asked for at most this many suggestions, and more are ignored."""
    system_prompt: str = field(default_factory=partial(prompt_text, "art-director-1-system"))
    """The role of the model; empty for none."""
    answer_prompt: str = field(default_factory=partial(prompt_text, "art-director-1-answer"))
    """Asks for the reply."""
    analysis_prompt: str = ""
    """Asks for an analysis in free text first, in its own message; empty for none. It helps a model to find places."""
    system_role: bool = True
    """Whether the model's chat template has a system role; if not, the first user message begins with the system prompt."""

    def __post_init__(self) -> None:
        if self.max_suggestions < 1:
            raise InvalidValueError(f"Conversation(max_suggestions={self.max_suggestions}): need at least 1.")
        names = _PLACEHOLDER.findall(f"{self.system_prompt} {self.analysis_prompt} {self.answer_prompt}")
        if unknown := sorted(set(names) - set(_PLACEHOLDERS)):
            raise InvalidValueError(
                f"the prompts of a Conversation have unknown placeholders {', '.join(f'{{{name}}}' for name in unknown)}: "
                f"need some of {', '.join(f'{{{name}}}' for name in _PLACEHOLDERS)}."
            )
        if "prompt" not in names:
            raise InvalidValueError(
                "no prompt of a Conversation has the placeholder {prompt}, so the model would not know what the picture "
                "was drawn from: add it to one of them."
            )

    @classmethod
    def in_two_stages(cls, *, coordinates: Coordinates, max_suggestions: int = 4, system_role: bool = True) -> Self:
        """A conversation that asks for an analysis in free text first, and for the reply in a second message."""
        return cls(
            coordinates=coordinates,
            max_suggestions=max_suggestions,
            answer_prompt=prompt_text("art-director-1-conclude"),
            analysis_prompt=prompt_text("art-director-1-analyse"),
            system_role=system_role,
        )

    @property
    def stages(self) -> int:
        """The number of replies: 1, or 2 with an analysis."""
        return 2 if self.analysis_prompt else 1

    def messages(self, image: Image, prompt: str, *, analysis: str | None = None) -> tuple[Message, ...]:
        """The messages of the next request.

        Args:
            image: the picture as the model sees it.
            prompt: what it was drawn from.
            analysis: for the second of two stages, the model's reply in the first.

        Raises:
            InvalidValueError: for an analysis in a conversation of one stage.
        """
        if analysis is not None and not self.analysis_prompt:
            raise InvalidValueError("this Conversation has one stage and takes no analysis.")
        values = {
            "prompt": escape_chat_tokens(prompt),
            "max_suggestions": str(self.max_suggestions),
            "coordinates": coordinates_instruction(self.coordinates, image.size),
            "schema": json.dumps(self.schema(image.size), ensure_ascii=False),
        }
        system, opening, closing = (
            _PLACEHOLDER.sub(lambda match: values[match[1]], text)
            for text in (self.system_prompt, self.analysis_prompt or self.answer_prompt, self.answer_prompt)
        )
        messages = [Message("system", system)] if system and self.system_role else []
        first = f"{system}\n\n{opening}" if system and not self.system_role else opening
        messages.append(Message("user", first, image))
        if analysis is not None:
            messages += [Message("assistant", escape_chat_tokens(analysis)), Message("user", closing)]
        return tuple(messages)

    def schema(self, size: Size) -> dict[str, Any]:
        """The JSON schema of the reply for a picture of ``size`` (width, height in pixels).

        All properties are required, no others are allowed, and numbers stay in the convention's range.
        """
        return _inlined(_reply_model(self.coordinates, self.max_suggestions, size).model_json_schema())

    def parse(self, reply: str, *, size: Size) -> Critique | Abstention:
        """Parse the model's reply about a picture of ``size``; see `parse_reply`."""
        return parse_reply(reply, size=size, coordinates=self.coordinates, max_suggestions=self.max_suggestions)


def coordinates_instruction(coordinates: Coordinates, size: Size) -> str:
    """The instruction that tells a model the convention.

    >>> from artaug.critics.conversation import coordinates_instruction
    >>> from artaug.critics import Coordinates
    >>> coordinates_instruction(Coordinates("pixels"), (640, 480)).partition("in whole pixels")[2]
    ' of the picture, which is 640 wide and 480 high'
    """
    names = {
        "xyxy": "[left, top, right, bottom]",
        "yxyx": "[top, left, bottom, right]",
        "xywh": "[left, top, width, height]",
        "points": "[x, y]",
    }[coordinates.order]
    aim = "the middle of what should change" if coordinates.order == "points" else "tight around what should change"
    right, bottom = coordinates.extent(size)
    if coordinates.unit == "pixels":
        scale = f"whole pixels of the picture, which is {right:g} wide and {bottom:g} high"
    else:
        number_type = "whole numbers" if coordinates.unit == "thousandths" else "numbers"
        scale = f"{number_type} from 0 to {right:g}, where {right:g} is the right or the bottom edge"
    return f'"{coordinates.key}": {names}, {aim}, in {scale}'


def _reply_model(coordinates: Coordinates, max_suggestions: int, size: Size) -> type[BaseModel]:
    """The pydantic model of a reply. ``reason`` comes first, so that the model writes it before the box and the prompt."""
    strict, largest = ConfigDict(extra="forbid", title="Reply"), max(coordinates.extent(size))
    number_type: Any = int if coordinates.unit in {"thousandths", "pixels"} else float
    count = 2 if coordinates.order == "points" else 4
    number = Annotated[number_type, Field(ge=0, le=number_type(largest))]
    box = Annotated[list[number], Field(min_length=count, max_length=count, alias=coordinates.key)]
    remark = Annotated[str, Field(max_length=_SCHEMA_REMARK_CHARS)]
    prompt = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARS)]
    suggestion: Any = create_model(
        "Suggestion", __config__=strict, reason=(remark, ...), place=(box, ...), prompt=(prompt, ...)
    )
    suggestions = Annotated[list[suggestion], Field(max_length=max_suggestions)]
    return create_model("Reply", __config__=strict, summary=(remark, ...), suggestions=(suggestions, ...))


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema without references and titles: some decoders do not support references, and titles only cost tokens."""
    definitions = schema.get("$defs", {})

    def inline(part: Any) -> Any:  # noqa: ANN401  # JSON
        if isinstance(part, list):
            return [inline(item) for item in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return inline(definitions[part["$ref"].rpartition("/")[2]])
        return {key: inline(value) for key, value in part.items() if key not in {"$defs", "title"}}

    inlined: dict[str, Any] = inline(schema)
    return inlined
