"""Reading one quoted string of a reply, whose quotes may be left open, unescaped or of different kinds.

Every pattern is possessive or matches a single character, so no part of a reply is matched twice.
"""

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

_LEFT, _RIGHT = "\u2018", "\u2019"  # single curly quotation marks
_CLOSERS = {
    '"': '"',  # no curly mark closes it: JSON allows those inside a string
    "'": "'",
    "“": '”“"',
    "”": '”“"',
    _LEFT: f"{_RIGHT}{_LEFT}'",
    _RIGHT: f"{_RIGHT}{_LEFT}'",
    "`": "`",
    "«": "»",
    "「": "」",
}
StringRole: TypeAlias = Literal["key", "value", "item"]
"""What a string is: a key of an object, the value of a key, or an item of an array."""

QUOTES = "".join(_CLOSERS)
"""The characters that may open a string."""

_RUN = {opener: re.compile(rf"[^\\{closers}]++") for opener, closers in _CLOSERS.items()}
_AFTER_KEY = frozenset("[{=\"'")  # where the colon is missing
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}
_HEX = re.compile(r"u\{?([0-9a-fA-F]{1,6})\}?|x([0-9a-fA-F]{2})")
_SURROGATE_PAIR = re.compile(r"u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})")
_FOUR_DIGITS = re.compile(r"u([0-9a-fA-F]{4})")
_CONTROL = re.compile(r"[\x00-\x1f]")
_SPACE = re.compile(r"\s*+")
_NEXT_VALUE = re.compile(
    r"""[\\"'“”\u2018\u2019`«「\[{(\]})\-+.\d/#]|(?:true|false|null|none|nan|infinity)\b|[^\W\d]\w{0,40}+\s{0,8}+:""",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class QuotedString:
    """A string of a reply."""

    parts: list[str]
    end: int
    """The position in the reply where parsing goes on."""
    truncated: bool = False
    """Whether the reply ended before the string did."""
    repaired: bool = False
    """Whether a quotation mark was missing, or stood inside the string without a backslash."""
    has_control_characters: bool = False
    """Whether it held line breaks or other control characters that were not escaped."""


def read_quoted(reply: str, start: int, *, role: StringRole) -> QuotedString:
    """Read the string whose opening quote (or backslash and quote) is at ``start``.

    A quotation mark ends the string if what follows it can follow a string in this role. A value that seems to end
    before a colon has run over its own missing quote into the next key: it is cut back to the last quotation mark that
    was taken as part of it (``"a": "dark, "b": 1`` gives ``dark``).
    """
    escaped = reply[start] == "\\"  # the JSON stands inside another string: \"box\"
    opener = reply[start + escaped]
    run, closers = _RUN[opener], _CLOSERS[opener]
    position, parts, has_control = start + escaped + 1, [], False
    last_inner = None  # (number of parts before it, position) of the last quotation mark taken as part of the string
    while position < len(reply):
        if match := run.match(reply, position):
            parts.append(match[0])
            has_control = has_control or _CONTROL.search(match[0]) is not None
            position = match.end()
            continue
        escaped_closer = (
            escaped
            and reply[position] == "\\"
            and reply[position + 1 : position + 2] in closers
            and position + 1 < len(reply)
        )
        if reply[position] == "\\" and not escaped_closer:
            letter, position = _unescape(reply, position + 1)
            parts.append(letter)
            continue
        mark, after = position + escaped_closer, position + escaped_closer + 1
        terminator = _terminator(reply, after, is_key=role == "key")
        if terminator == ":" and role == "value" and last_inner is not None:
            count, end = last_inner
            value = "".join(parts[:count]).rstrip().removesuffix(",").rstrip().removesuffix(opener)
            return QuotedString([value], end, repaired=True, has_control_characters=has_control)
        if terminator:
            return QuotedString(parts, after, repaired=last_inner is not None, has_control_characters=has_control)
        last_inner = (len(parts), position)
        parts.append(reply[mark])
        position = after
    return QuotedString(
        parts, len(reply), truncated=True, repaired=last_inner is not None, has_control_characters=has_control
    )


def _terminator(reply: str, position: int, *, is_key: bool) -> str:
    """The character after a quotation mark that shows that the string ended there; empty if there is none."""
    position = _skip_space(reply, position)
    if position == len(reply):
        return "end"
    if reply[position] in "]}):" or reply.startswith("=>", position) or (is_key and reply[position] in _AFTER_KEY):
        return reply[position]
    if reply[position] != ",":
        return ""
    position = _skip_space(reply, position + 1)
    return "," if position == len(reply) or _NEXT_VALUE.match(reply, position) else ""


def _skip_space(reply: str, position: int) -> int:
    match = _SPACE.match(reply, position)
    return match.end() if match else position


def _unescape(reply: str, position: int) -> tuple[str, int]:
    """The text of the escape sequence whose backslash stands before ``position``, and the position after it."""
    if position >= len(reply):
        return "", position
    if pair := _SURROGATE_PAIR.match(reply, position):
        high, low = int(pair[1], 16), int(pair[2], 16)
        return chr(0x10000 + (high - 0xD800) * 0x400 + low - 0xDC00), pair.end()
    if match := _FOUR_DIGITS.match(reply, position) or _HEX.match(reply, position):
        code = int(match[1] or match[2], 16)
        return (chr(code) if code <= 0x10FFFF else "\ufffd"), match.end()
    return _ESCAPES.get(reply[position], reply[position]), position + 1
