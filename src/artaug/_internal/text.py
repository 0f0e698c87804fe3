"""Texts that people read: shortened quotes, durations, HTML tables."""

from collections.abc import Iterable, Sequence
from html import escape


def shorten(text: str, limit: int) -> str:
    """Cut a text to at most ``limit`` characters; what is cut ends in "...".

    >>> from artaug._internal.text import shorten
    >>> shorten("a red cone", 10), shorten("a red cone", 8)
    ('a red cone', 'a red...')
    """
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


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
