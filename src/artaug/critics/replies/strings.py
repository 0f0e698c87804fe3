"""Reading one quoted text out of a reply whose author may not have closed, escaped or even matched the quotes.

Every pattern is possessive or a single character wide, so nothing is ever tried twice.
"""

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

_LEFT, _RIGHT = "\u2018", "\u2019"  # single curly quotation marks
_CLOSERS = {
    '"': '"',  # and no curly one, which JSON allows inside
    "'": "'",
    "“": '”“"',
    "”": '”“"',
    _LEFT: f"{_RIGHT}{_LEFT}'",
    _RIGHT: f"{_RIGHT}{_LEFT}'",
    "`": "`",
    "«": "»",
    "「": "」",
}
Role: TypeAlias = Literal["name", "value", "thing"]
"""What a text is: a name in a record, the value that belongs to one, or a thing in a listing."""

QUOTES = "".join(_CLOSERS)
"""What may open a text."""

_RUN = {opener: re.compile(rf"[^\\{closers}]++") for opener, closers in _CLOSERS.items()}
_AFTER_NAME = frozenset("[{=\"'")  # where the colon was left out
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}
_HEX = re.compile(r"u\{?([0-9a-fA-F]{1,6})\}?|x([0-9a-fA-F]{2})")
_PAIR = re.compile(r"u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})")
_FOUR = re.compile(r"u([0-9a-fA-F]{4})")
_CONTROL = re.compile(r"[\x00-\x1f]")
_SPACE = re.compile(r"\s*+")
_NEXT = re.compile(
    r"""[\\"'“”\u2018\u2019`«「\[{(\]})\-+.\d/#]|(?:true|false|null|none|nan|infinity)\b|[^\W\d]\w{0,40}+\s{0,8}+:""",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Quoted:
    """A text that was read."""

    parts: list[str]
    end: int
    """Where in the reply reading goes on."""
    cut: bool = False
    """Whether the reply ended before the text did."""
    mended: bool = False
    """Whether a quotation mark was missing, or stood inside the text without a backslash."""
    raw: bool = False
    """Whether it held line breaks or other control characters as they are."""


def read_quoted(reply: str, start: int, *, role: Role) -> Quoted:
    """Read the text whose opening quote (or backslash and quote) is at ``start``.

    A quotation mark ends the text if what follows can follow a text in its role: a name in a record, the value that
    belongs to one, or a thing in a listing. A value that ends before a colon has run over its own missing quote into
    the next name, and is taken back to there.
    """
    escaped = reply[start] == "\\"
    opener = reply[start + escaped]
    run, closers = _RUN[opener], _CLOSERS[opener]
    at, parts, inner, raw = start + escaped + 1, [], None, False
    while at < len(reply):
        if found := run.match(reply, at):
            parts.append(found[0])
            raw = raw or _CONTROL.search(found[0]) is not None
            at = found.end()
            continue
        closing = escaped and reply[at] == "\\" and reply[at + 1 : at + 2] in closers and at + 1 < len(reply)
        if reply[at] == "\\" and not closing:
            letter, at = _unescaped(reply, at + 1)
            parts.append(letter)
            continue
        mark, after = at + closing, at + closing + 1
        follows = _what_follows(reply, after, is_name=role == "name")
        if follows == ":" and role == "value" and inner is not None:
            taken = "".join(parts[: inner[0]]).rstrip().removesuffix(",").rstrip().removesuffix(opener)
            return Quoted([taken], inner[1], mended=True, raw=raw)
        if follows:
            return Quoted(parts, after, mended=inner is not None, raw=raw)
        inner = (len(parts), at)
        parts.append(reply[mark])
        at = after
    return Quoted(parts, len(reply), cut=True, mended=inner is not None, raw=raw)


def _what_follows(reply: str, at: int, *, is_name: bool) -> str:
    """The character after a quotation mark if it shows that the text has ended there; empty if it has not."""
    at = _end_of_space(reply, at)
    if at == len(reply):
        return "end"
    if reply[at] in "]}):" or reply.startswith("=>", at) or (is_name and reply[at] in _AFTER_NAME):
        return reply[at]
    if reply[at] != ",":
        return ""
    at = _end_of_space(reply, at + 1)
    return "," if at == len(reply) or _NEXT.match(reply, at) else ""


def _end_of_space(reply: str, at: int) -> int:
    found = _SPACE.match(reply, at)
    return found.end() if found else at


def _unescaped(reply: str, at: int) -> tuple[str, int]:
    """What a backslash before ``at`` makes of what stands there, and where reading goes on."""
    if at >= len(reply):
        return "", at
    if pair := _PAIR.match(reply, at):
        high, low = int(pair[1], 16), int(pair[2], 16)
        return chr(0x10000 + (high - 0xD800) * 0x400 + low - 0xDC00), pair.end()
    if found := _FOUR.match(reply, at) or _HEX.match(reply, at):
        code = int(found[1] or found[2], 16)
        return (chr(code) if code <= 0x10FFFF else "\ufffd"), found.end()
    return _ESCAPES.get(reply[at], reply[at]), at + 1
