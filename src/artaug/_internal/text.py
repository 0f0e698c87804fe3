"""Texts that people read: shortened quotes, durations, HTML tables."""

from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, fields
from html import escape
from typing import Any

from artaug._internal.digests import digest

_LONGEST_REPR = 280
_LONGEST_HTML = 300


def shorten(text: str, limit: int) -> str:
    """Cut a text to at most ``limit`` characters; what is cut ends in "...".

    >>> from artaug._internal.text import shorten
    >>> shorten("a red cone", 10), shorten("a red cone", 8)
    ('a red cone', 'a red...')
    """
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def short_repr(instance: Any) -> str:  # noqa: ANN401 - a dataclass; as a method, of any class
    """The repr of a dataclass, without the fields that are at their default, cut where it is long; assign it to ``__repr__``.

    What is cut ends in a digest of the whole: `artaug.critics.Cached` and others tell objects apart by their reprs.

    >>> from dataclasses import dataclass
    >>> from artaug._internal.text import short_repr
    >>> @dataclass(repr=False)
    ... class Note:
    ...     text: str
    ...     color: str = "yellow"
    ...     __repr__ = short_repr
    >>> Note("brief"), Note("brief", "green"), len(repr(Note("long" * 1000)))
    (Note(text='brief'), Note(text='brief', color='green'), 280)
    """
    text = f"{type(instance).__name__}({', '.join(changed_fields(instance))})"
    if len(text) <= _LONGEST_REPR:
        return text
    end = f" sha256:{digest(text)[:16]})"
    return shorten(text, _LONGEST_REPR - len(end)) + end


def changed_fields(instance: Any) -> list[str]:  # noqa: ANN401 - a dataclass
    """``name=value`` of the fields of a dataclass that its repr shows, without those whose value looks like the default."""
    shown = {item: repr(getattr(instance, item.name)) for item in fields(instance) if item.repr}
    return [f"{item.name}={text}" for item, text in shown.items() if text != _default_repr(item)]


def _default_repr(item: Field[Any]) -> str | None:
    if item.default_factory is not MISSING:
        return repr(item.default_factory())
    return None if item.default is MISSING else repr(item.default)


def short_html(text: str) -> str:
    """A text for a page, cut at 300 characters; nothing in it is taken for HTML."""
    return escape(shorten(text, _LONGEST_HTML))


def duration(seconds: float) -> str:
    """Say a time in the units that fit it.

    >>> from artaug._internal.text import duration
    >>> duration(0.25), duration(65), duration(3700)
    ('0.2 s', '1 min 05 s', '1 h 01 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


def table_text(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Set words in a table for ``print``.

    >>> from artaug._internal.text import table_text
    >>> print(table_text(["round", "pairs"], [["1", "12 of 20"]]))
    round  pairs
    1      12 of 20
    """
    lines = [headings, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def table_html(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Set words in a table for notebooks; nothing in them is taken for HTML.

    >>> from artaug._internal.text import table_html
    >>> table_html(["a"], [["<b>"]])
    '<table><thead><tr><th>a</th></tr></thead><tbody><tr><td>&lt;b&gt;</td></tr></tbody></table>'
    """

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(headings, 'th')}</thead><tbody>{body}</tbody></table>"
