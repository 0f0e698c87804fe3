"""Texts for people: never too long, never taken for HTML."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artaug._internal.text import duration, shorten, table_html


@given(st.text(), st.integers(min_value=3, max_value=50))
def test_a_shortened_text_is_the_text_or_its_beginning(text, limit):
    short = shorten(text, limit)
    assert len(short) <= limit
    assert short == text or (len(text) > limit and short == text[: limit - 3] + "...")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (59.4, "59.4 s"), (59.6, "1 min 00 s"), (3599.6, "1 h 00 min"), (90000, "25 h 00 min")],
)
def test_a_duration_is_rounded_once(seconds, text):
    assert duration(seconds) == text


def test_nothing_in_a_table_is_html():
    assert table_html(["<a>"], [["&"]]) == (
        "<table><thead><tr><th>&lt;a&gt;</th></tr></thead><tbody><tr><td>&amp;</td></tr></tbody></table>"
    )
