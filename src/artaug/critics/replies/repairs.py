"""Notes on what was repaired or dropped while a reply was parsed, and the cleaning of the texts in it."""

import re
from dataclasses import dataclass, field
from functools import lru_cache

from artaug._internal.text import shorten

_MAX_LISTED = 8
_CHAT_TOKEN = re.compile(r"<\|[^<>|\s]{1,48}\|>|<\uff5c[^<>\uff5c\s]{1,48}\uff5c>|</?s>")
_REPLACEMENT = "\ufffd"
_SURROGATE = re.compile("[\ud800-\udfff]")
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f"  # control characters except white space
    "\u202a-\u202e\u2066-\u2069\ufeff"  # bidirectional controls: they reorder the text around them, in a report too
    "\U000e0000-\U000e007f]"  # tag characters: letters without a glyph
)


class UnusableSuggestion(Exception):  # noqa: N818  # control flow inside the parser; it never leaves it
    """One suggestion of a reply cannot be used; the message says why."""


@dataclass(frozen=True)
class Repairs:
    """The repairs of one reply and the suggestions dropped from it, each with the numbers of the suggestions."""

    repaired: dict[str, list[int]] = field(default_factory=dict)
    dropped: dict[str, list[int]] = field(default_factory=dict)

    def note(self, repair: str, number: int | None = None) -> None:
        """Add a repair of suggestion ``number`` (counted from 1), or of the whole reply."""
        numbers = self.repaired.setdefault(repair, [])
        if number is not None and number not in numbers[-1:]:
            numbers.append(number)

    def drop(self, reason: str, number: int) -> None:
        """Add the reason why suggestion ``number`` was dropped."""
        self.dropped.setdefault(reason, []).append(number)

    def sentences(self) -> tuple[str, ...]:
        """One sentence for each repair, then one for each reason to drop suggestions."""
        repaired = (
            f"{repair} ({_number_list(numbers)})" if numbers else repair for repair, numbers in self.repaired.items()
        )
        dropped = (f"dropped {_number_list(numbers)}: {reason}" for reason, numbers in self.dropped.items())
        return *repaired, *dropped

    def drop_reasons(self) -> str:
        """Why suggestions were dropped, on one line."""
        return "; ".join(f"{reason} ({_number_list(numbers)})" for reason, numbers in self.dropped.items())


def _number_list(numbers: list[int]) -> str:
    listed = ", ".join(map(str, numbers[:_MAX_LISTED]))
    more = f" and {len(numbers) - _MAX_LISTED:,} more" if len(numbers) > _MAX_LISTED else ""
    return f"suggestion{'s' if len(numbers) > 1 else ''} {listed}{more}"


def sanitize(text: str, *, max_chars: int, repairs: Repairs, number: int | None = None) -> str:
    """Return the text on one line, without control characters and chat template tokens, at most ``max_chars`` long."""
    text, notes = _cleaned(text, max_chars)
    for note in notes:
        repairs.note(note, number)
    return text


@lru_cache(maxsize=8)  # a reply may give one label to thousands of boxes
def _cleaned(text: str, max_chars: int) -> tuple[str, tuple[str, ...]]:
    """The text, and what was repaired in it."""
    notes: list[str] = []
    if _SURROGATE.search(text):
        # The round trip through UTF-16 joins the two halves of a pair and replaces a half that stands alone.
        joined = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if joined.count(_REPLACEMENT) > text.count(_REPLACEMENT):
            notes.append("replaced unpaired surrogates")
        text = joined
    for pattern, content in ((_CHAT_TOKEN, "chat template tokens"), (_INVISIBLE, "invisible characters")):
        text, count = pattern.subn(" ", text)
        if count:
            notes.append(f"removed {content}")
    text = " ".join(text.split())
    if len(text) > max_chars:
        notes.append(f"truncated texts to {max_chars} characters")
        text = text[:max_chars].rstrip()
    return text, tuple(notes)


def excerpt(reply: str, *, max_chars: int = 60) -> str:
    """The beginning of a reply, quoted, for a reason or an error text."""
    text = sanitize(reply[: 8 * max_chars], max_chars=max_chars + 1, repairs=Repairs())
    return repr(shorten(text, max_chars))
