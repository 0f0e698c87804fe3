"""Parsing a model's reply into a critique, whatever the text.

A reply is data: nothing in it is fetched, run or obeyed. It is read once from left to right, so the time is in
proportion to its length, and no reply raises an exception.
"""

import json
from typing import Literal

from artaug._internal.annotations import checked
from artaug.critics.coordinates import Coordinates, Size
from artaug.critics.replies.boxes import BoxParser
from artaug.critics.replies.json_parser import JsonNode, ObjectNode, parse_json
from artaug.critics.replies.markup import parse_markup
from artaug.critics.replies.reasoning import without_reasoning
from artaug.critics.replies.repairs import Repairs, UnusableSuggestion, excerpt, sanitize
from artaug.critics.replies.suggestions import (
    ExtractedReply,
    box_node,
    extract_suggestions,
    note_repeated_keys,
    prompt_and_reason,
)
from artaug.critique import Abstention, Critique, Suggestion
from artaug.errors import GeometryError

MAX_REPLY_CHARS = 400_000
"""Characters of a reply that are parsed; the rest is ignored."""
MAX_PROMPT_CHARS = 400
"""Characters of a suggestion's prompt; a longer one is truncated."""
MAX_REMARK_CHARS = 1000
"""Characters of a reason or a summary; a longer one is truncated."""
MAX_SUGGESTIONS = 32
"""Suggestions of a reply that are used by default."""

__all__ = ["MAX_PROMPT_CHARS", "MAX_REMARK_CHARS", "MAX_REPLY_CHARS", "MAX_SUGGESTIONS", "parse_reply"]


@checked
def parse_reply(
    text: str,
    *,
    size: Size,
    coordinates: Literal["relative", "thousandths", "pixels"] | Coordinates,
    max_suggestions: int = MAX_SUGGESTIONS,
) -> Critique | Abstention:
    """Parse a model's reply as a critique.

    JSON is expected, with any of the keys that models use. It is also parsed when it is fenced, surrounded by prose,
    truncated, or not quite JSON, and so is the markup in which Qwen-VL, InternVL, DeepSeek-VL2, GLM-V, Seed-VL, Molmo
    and Molmo 2 give boxes or points. Of several answers the last complete one counts; the model's reasoning before it
    (between ``<think>`` and ``</think>``) is ignored. The critique lists every repair. A suggestion that cannot be
    used is dropped with a reason; if none is left, the answer is an abstention with all the reasons.

    Args:
        text: the reply, of which the first ``MAX_REPLY_CHARS`` characters are parsed.
        size: width and height in pixels of the picture the model was shown.
        coordinates: how the model writes boxes. It is never guessed from the numbers.
        max_suggestions: at most this many suggestions are used, the first ones.

    Returns:
        A critique, or an abstention that says why there is none. No text raises an exception.

    >>> from artaug.critics import parse_reply
    >>> reply = "Sure! ```json [{'bbox_2d': [0, 0, 500, 1000], 'prompt': 'a sunlit window',}]```"
    >>> critique = parse_reply(reply, size=(640, 480), coordinates="thousandths")
    >>> critique.suggestions[0].box
    Box(left=0.0, top=0.0, right=0.5, bottom=1.0)
    >>> critique.repairs[-1]
    'ignored the text around the JSON'
    >>> parse_reply("It is perfect.", size=(640, 480), coordinates="thousandths")
    Abstention(reason="the reply holds no suggestions: 'It is perfect.'")
    """
    convention = coordinates if isinstance(coordinates, Coordinates) else Coordinates(coordinates)
    repairs = Repairs()
    try:
        convention.extent(size)
    except GeometryError as error:
        return Abstention(str(error))
    answer = _without_thinking(text, repairs)
    if not answer.strip():
        return Abstention("the reply is empty" if not text.strip() else "the reply ends before its answer begins")
    extracted = _extract(answer, repairs)
    if extracted.items:
        return _critique(extracted, BoxParser(size, convention, repairs), max_suggestions)
    if extracted.is_empty:
        summary = sanitize(extracted.summary, max_chars=MAX_REMARK_CHARS, repairs=repairs)
        return Critique((), summary, repairs.sentences())
    if refusal := sanitize(extracted.refusal, max_chars=MAX_REMARK_CHARS, repairs=repairs):
        return Abstention(f"the reply declines: {refusal}")
    return Abstention(f"the reply holds no suggestions: {excerpt(answer)}")


def _without_thinking(text: str, repairs: Repairs) -> str:
    """The part of a reply that is parsed: at most ``MAX_REPLY_CHARS``, without the model's reasoning."""
    if len(text) > MAX_REPLY_CHARS:
        repairs.note(f"read the first {MAX_REPLY_CHARS:,} of {len(text):,} characters")
        text = text[:MAX_REPLY_CHARS]
    answer = without_reasoning(text)
    if len(answer) < len(text):
        repairs.note("ignored the model's reasoning")
    return answer


def _extract(answer: str, repairs: Repairs) -> ExtractedReply:
    """The suggestions in JSON; if there are none, those in markup."""
    parsed = parse_json(_unquote(answer, repairs))
    json_repairs = Repairs()
    for repair in parsed.repairs:
        json_repairs.note(repair)
    extracted = extract_suggestions(parsed.nodes, json_repairs)
    if not extracted.items and (suggestions := parse_markup(answer)):
        repairs.note("read boxes from markup")
        return ExtractedReply(tuple(suggestions))
    repairs.repaired.update(json_repairs.repaired)
    return extracted


def _unquote(answer: str, repairs: Repairs) -> str:
    """The content of a reply that is a single JSON string."""
    stripped = answer.strip()
    if len(stripped) > 1 and stripped[0] == stripped[-1] == '"':
        try:
            content = json.loads(stripped)
        except ValueError:
            return answer
        repairs.note("parsed JSON inside a string")
        return str(content)
    return answer


def _critique(extracted: ExtractedReply, box_parser: BoxParser, max_suggestions: int) -> Critique | Abstention:
    repairs = box_parser.repairs
    suggestions: list[Suggestion] = []
    for number, item in enumerate(extracted.items, start=1):
        if len(suggestions) >= max_suggestions:
            repairs.note(f"read the first {number - 1:,} of {len(extracted.items):,} suggestions")
            break
        try:
            suggestions += _suggestions(item, number, box_parser)
        except UnusableSuggestion as error:
            repairs.drop(str(error), number)
    if not suggestions:
        count = len(extracted.items)
        return Abstention(f"none of the suggestions ({count:,}) can be used: {repairs.drop_reasons()}")
    summary = sanitize(extracted.summary, max_chars=MAX_REMARK_CHARS, repairs=repairs)
    return Critique(tuple(suggestions[:max_suggestions]), summary, repairs.sentences())


def _suggestions(item: JsonNode, number: int, box_parser: BoxParser) -> list[Suggestion]:
    """One suggestion for each box of an item."""
    repairs = box_parser.repairs
    if isinstance(item, ObjectNode):
        note_repeated_keys(item, repairs, number)
    boxes = box_parser.parse(box_node(item, repairs, number), number)
    prompt, reason = prompt_and_reason(item, repairs, number)
    prompt = sanitize(prompt, max_chars=MAX_PROMPT_CHARS, repairs=repairs, number=number)
    if not prompt:
        raise UnusableSuggestion("it has no prompt")
    reason = sanitize(reason, max_chars=MAX_REMARK_CHARS, repairs=repairs, number=number)
    return [Suggestion(box, prompt, reason) for box in boxes]
