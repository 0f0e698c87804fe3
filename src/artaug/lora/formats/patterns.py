"""The patterns of PEFT's ``rank_pattern`` and ``alpha_pattern``, which come from a file, matched within a time.

Nearly all are names of layers, and are looked up. The others are regular expressions. With Python's ``re``, ``(a+)+`` takes
a time that doubles with every character of a name, so they go to ``regex``, which transformers depends on too, and which
can be told when to give up.
"""

import time
from collections.abc import Collection, Iterator, Mapping

import regex

from artaug.errors import LoRAError

_NAME = regex.compile(r"\^?[\w.\-]+\$?")
_MAX_LENGTH = 200
_LIMIT_S = 5.0
"""For all regular expressions of a file and all its layers; those of published files take milliseconds."""


def match_patterns(patterns: Mapping[str, float], names: Collection[str]) -> dict[str, float]:
    r"""The value of the first pattern that matches each name; names that none matches are left out.

    As in PEFT, a pattern matches a whole module path or its end from a dot on; with ``^`` only the whole.

    Raises:
        LoRAError: if a pattern is no regular expression, or if they take more than 5 seconds.

    >>> from artaug.lora.formats.patterns import match_patterns
    >>> patterns = {"attn.to_q": 8, r"blocks\.[0-9]+\.attn\.(to_k|to_v)": 4}
    >>> match_patterns(patterns, ["blocks.11.attn.to_k", "blocks.0.attn.to_q", "blocks.0.cross_attn.to_q"])
    {'blocks.11.attn.to_k': 4, 'blocks.0.attn.to_q': 8}
    """
    positions: dict[str, int] = {}
    """Of the patterns that are names, those of whole paths with a ``^`` in front."""
    expressions: dict[int, regex.Pattern[str]] = {}
    for position, pattern in enumerate(patterns):
        if _NAME.fullmatch(pattern):
            positions.setdefault(pattern.removesuffix("$"), position)
        else:
            expressions[position] = _compile(pattern)
    values, deadline = list(patterns.values()), time.monotonic() + _LIMIT_S
    matched = {}
    for name in names:
        first = min((positions[end] for end in _ends(name) if end in positions), default=len(values))
        for position, expression in expressions.items():
            if position < first and _matches(expression, name, deadline):
                first = position
                break
        if first < len(values):
            matched[name] = values[first]
    return matched


def _ends(name: str) -> Iterator[str]:
    yield from ("^" + name, name)
    yield from (name[dot + 1 :] for dot, character in enumerate(name) if character == ".")


def _compile(pattern: str) -> "regex.Pattern[str]":
    try:
        if len(pattern) <= _MAX_LENGTH:
            return regex.compile(rf"(.*\.)?({pattern})$")  # as PEFT's get_pattern_key
    except (regex.error, RecursionError):
        pass
    raise LoRAError(
        f"the pattern {pattern[:_MAX_LENGTH]!r} is no regular expression, or a very long one. Expected a layer's name, or an "
        "expression for several."
    )


def _matches(expression: "regex.Pattern[str]", name: str, deadline: float) -> bool:
    try:
        left_s = deadline - time.monotonic()
        if left_s > 0:
            return expression.match(name, timeout=left_s) is not None
    except TimeoutError:
        pass
    raise LoRAError(
        f"its patterns take more than {_LIMIT_S:g} s to match, the last one {expression.pattern!r}. Expected names of layers, "
        "which are looked up."
    )
