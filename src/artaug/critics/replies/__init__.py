"""What a model replied, read as a critique whatever the text.

A reply is data: nothing in it is fetched, run or obeyed. It is read from left to right once, so a long reply takes time
in proportion to its length, and nothing in it can raise.
"""

import json
import re
from typing import Literal

from artaug.critics.coordinates import Coordinates, Size
from artaug.critics.replies.finding import Found, find, note_repeats, place_of, words_of
from artaug.critics.replies.nodes import Node, Record
from artaug.critics.replies.places import Surveyor
from artaug.critics.replies.reading import read
from artaug.critics.replies.repairs import Repairs, Unusable
from artaug.critics.replies.tags import read_tags
from artaug.critics.replies.wording import excerpt, fit
from artaug.critique import Abstention, Critique, Suggestion
from artaug.errors import GeometryError

MAX_REPLY_CHARS = 400_000
"""Characters of a reply that are read; what comes after them is not."""
MAX_PROMPT_CHARS = 400
"""Characters of a suggestion's prompt; a longer one is cut."""
MAX_REMARK_CHARS = 1000
"""Characters of a reason or a summary; a longer one is cut."""
MAX_SUGGESTIONS = 32
"""Suggestions of a reply that are read, unless asked otherwise."""

_THOUGHT = re.compile(r"<(?P<ends>/?)(?:think|thinking|reasoning)>|◁(?P<also_ends>/?)think▷")

__all__ = ["MAX_PROMPT_CHARS", "MAX_REMARK_CHARS", "MAX_REPLY_CHARS", "MAX_SUGGESTIONS", "parse_reply"]


def parse_reply(
    text: str,
    *,
    size: Size,
    coordinates: Literal["relative", "thousandths", "pixels"] | Coordinates,
    at_most: int = MAX_SUGGESTIONS,
) -> Critique | Abstention:
    """Read a model's reply as a critique.

    JSON is expected, by any of the names that models give its parts, and read also when it is fenced, surrounded by
    prose, cut off, or not quite JSON; the markup in which Qwen-VL, InternVL, DeepSeek-VL2 and Molmo give boxes or
    points is read as well. Of several answers the last whole one counts, and what a model thinks aloud before it
    (between ``<think>`` and ``</think>``) does not. Every repair is listed in the critique; a suggestion that cannot
    be used is left out with its reason, and where none remains the answer is an abstention that gives all of them.

    Args:
        text: the reply, of which the first ``MAX_REPLY_CHARS`` characters are read.
        size: width and height in pixels of the picture the model was shown.
        coordinates: how the model writes boxes. It is never guessed from the numbers.
        at_most: so many suggestions are read, the first ones.

    Returns:
        A critique, or an abstention that says why there is none. Never an exception, whatever the text.

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
    except GeometryError as fault:
        return Abstention(str(fault))
    answer = _answer_in(text, repairs)
    if not answer.strip():
        return Abstention("the reply is empty" if not text.strip() else "the reply ends before its answer begins")
    found = _found_in(answer, repairs)
    if not found.items:
        return _without_items(found, answer, repairs)
    return _critique(found, Surveyor(size, convention, repairs), at_most)


def _answer_in(text: str, repairs: Repairs) -> str:
    """The part of a reply that is read: not endless, and without what was thought aloud before it."""
    if len(text) > MAX_REPLY_CHARS:
        repairs.mend(f"read the first {MAX_REPLY_CHARS:,} of {len(text):,} characters")
        text = text[:MAX_REPLY_CHARS]
    begins, ends = 0, len(text)
    for mark in _THOUGHT.finditer(text):
        if mark["ends"] or mark["also_ends"]:
            begins, ends = mark.end(), len(text)
        else:
            ends = min(ends, mark.start())
    if begins or ends < len(text):
        repairs.mend("ignored what was thought aloud")
    return text[begins:ends]


def _found_in(answer: str, repairs: Repairs) -> Found:
    """The suggestions in JSON; where there are none, those in markup."""
    reading = read(_unpacked(answer, repairs))
    tried = Repairs()
    for how in reading.mended:
        tried.mend(how)
    found = find(reading.nodes, tried)
    if not found.items and (tags := read_tags(answer)):
        repairs.mend("read boxes from markup")
        return Found(tuple(tags))
    repairs.mended.update(tried.mended)
    return found


def _unpacked(answer: str, repairs: Repairs) -> str:
    """The JSON inside a JSON text, where a reply is nothing but that."""
    stripped = answer.strip()
    if len(stripped) > 1 and stripped[0] == stripped[-1] == '"':
        try:
            inner = json.loads(stripped)
        except ValueError:
            return answer
        repairs.mend("read JSON that was written into a text")
        return str(inner)
    return answer


def _without_items(found: Found, answer: str, repairs: Repairs) -> Critique | Abstention:
    if found.asks_nothing:
        summary = fit(found.summary, at_most=MAX_REMARK_CHARS, repairs=repairs)
        return Critique((), summary, repairs.sentences())
    if declined := fit(found.declined, at_most=MAX_REMARK_CHARS, repairs=repairs):
        return Abstention(f"the reply declines: {declined}")
    return Abstention(f"the reply holds no suggestions: {excerpt(answer)}")


def _critique(found: Found, surveyor: Surveyor, at_most: int) -> Critique | Abstention:
    repairs = surveyor.repairs
    suggestions: list[Suggestion] = []
    for number, item in enumerate(found.items, start=1):
        if len(suggestions) >= at_most:
            repairs.mend(f"read the first {number - 1:,} of {len(found.items):,} suggestions")
            break
        try:
            suggestions += _suggestions(item, number, surveyor)
        except Unusable as why:
            repairs.drop(str(why), number)
    if not suggestions:
        return Abstention(f"none of the suggestions ({len(found.items):,}) can be used: {repairs.reasons()}")
    summary = fit(found.summary, at_most=MAX_REMARK_CHARS, repairs=repairs)
    return Critique(tuple(suggestions[:at_most]), summary, repairs.sentences())


def _suggestions(item: Node, number: int, surveyor: Surveyor) -> list[Suggestion]:
    """One suggestion a box."""
    repairs = surveyor.repairs
    if isinstance(item, Record):
        note_repeats(item, repairs, number)
    boxes = surveyor.boxes(place_of(item, repairs, number), number)
    prompt, reason = words_of(item, repairs, number)
    prompt = fit(prompt, at_most=MAX_PROMPT_CHARS, repairs=repairs, number=number)
    if not prompt:
        raise Unusable("it does not say what should be there")
    reason = fit(reason, at_most=MAX_REMARK_CHARS, repairs=repairs, number=number)
    return [Suggestion(box, prompt, reason) for box in boxes]
