"""The patterns of PEFT's ``rank_pattern`` and ``alpha_pattern``, matched in linear time.

A pattern comes from a file, so it never reaches Python's ``re``, where ``(a+)+`` takes a time that doubles with every
character of a name. Nearly all patterns are names of layers, and are looked up. Of regular expressions there are those
that occur: single characters and classes of them, each at most repeated, and groups of alternatives.
"""

import itertools
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from string import digits
from typing import NamedTuple

from artaug.errors import LoRAError

_LITERAL = re.compile(r"\^?[\w.\-]+\$?")
_TOKEN = re.compile(r"\\d|\\w|\\[^\w]|\[\^?[\w.,\-]+\]|\((?:\?:)?[\w.|\-]+\)|[\w.\-]")
_WORD = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_" + digits)
_MAX_REGEX_LENGTH = 200
_MAX_ALTERNATIVES = 100
_MAX_COMPARISONS = 10_000_000
"""Characters of all names times regular expressions: some seconds."""


class _Item(NamedTuple):
    """One character of a pattern."""

    characters: frozenset[str] | None
    """Those that it matches; None for all."""
    negated: bool = False
    optional: bool = False
    repeated: bool = False

    def matches(self, character: str) -> bool:
        return self.characters is None or (character in self.characters) != self.negated


@dataclass(frozen=True)
class PatternTable:
    r"""Values by pattern: of all patterns that match a name, the first counts.

    As in PEFT, a pattern matches a whole module path or its end from a dot on; with ``^`` only the whole.

    Raises:
        LoRAError: if a pattern is another regular expression than the module's docstring says, or has more than 100
            alternatives.

    >>> from artaug.lora.formats.patterns import PatternTable
    >>> table = PatternTable({"attn.to_q": 8, r"blocks\.[0-9]+\.attn\.(to_k|to_v)": 4})
    >>> table.find("blocks.11.attn.to_k"), table.find("blocks.0.attn.to_q"), table.find("blocks.0.cross_attn.to_q")
    (4, 8, None)
    """

    values: Mapping[str, float]
    _ordered: list[float] = field(init=False, repr=False, default_factory=list)
    _names: dict[str, int] = field(init=False, repr=False, default_factory=dict)
    """Positions of the patterns that are names, those of whole paths with a ``^`` in front."""
    _regexes: dict[int, list[tuple[bool, list[_Item]]]] = field(init=False, repr=False, default_factory=dict)
    """By position, the alternatives of a pattern, and whether it is of whole paths."""

    def __post_init__(self) -> None:
        self._ordered.extend(self.values.values())
        for position, pattern in enumerate(self.values):
            if _LITERAL.fullmatch(pattern):
                self._names.setdefault(pattern.removesuffix("$"), position)
            else:
                body = pattern.removeprefix("^").removesuffix("$")
                self._regexes[position] = [(pattern.startswith("^"), items) for items in _parse(pattern, body)]

    def check_cost(self, names: Collection[str]) -> None:
        """Refuse to match so many names with so many regular expressions that it would not end.

        Raises:
            LoRAError: if it takes more than some seconds.
        """
        sequences = sum(map(len, self._regexes.values()))
        if sequences * sum(map(len, names)) > _MAX_COMPARISONS:
            raise LoRAError(
                f"{len(self._regexes)} patterns are regular expressions, too many for {len(names)} layers. Expected names "
                "of layers, which are looked up."
            )

    def find(self, name: str) -> float | None:
        """The value of the first pattern that matches a module path; None if none does."""
        ends = itertools.chain(("^" + name, name), (name[dot + 1 :] for dot, char in enumerate(name) if char == "."))
        found = [self._names[end] for end in ends if end in self._names]
        best = min(found, default=len(self.values))
        for position, alternatives in self._regexes.items():
            if position < best and any(_matches(items, name, whole=whole) for whole, items in alternatives):
                best = position
                break
        return None if best == len(self.values) else self._ordered[best]


def _parse(pattern: str, body: str) -> Iterator[list[_Item]]:
    """The alternatives of a regular expression, each a sequence of characters."""
    sequences: list[list[_Item]] = [[]]
    position = 0
    while position < len(body):
        token = _TOKEN.match(body, position)
        if token is None or len(pattern) > _MAX_REGEX_LENGTH:
            raise LoRAError(
                f"the pattern {pattern[:_MAX_REGEX_LENGTH]!r} is a regular expression that artaug does not evaluate. Expected "
                "a layer's name, or single characters and classes like [0-9], each with at most a *, + or ?, and groups "
                "like (to_q|to_k)."
            )
        position = token.end()
        quantifier = body[position : position + 1]
        text = token.group()
        if text.startswith("("):
            choices = [[_Item(_characters(char)) for char in choice] for choice in _split_group(text)]
        else:
            quantifier = quantifier if quantifier in set("*+?") else ""
            position += len(quantifier)
            item = _Item(_characters(text), negated=text.startswith("[^"))
            many = item._replace(optional=True, repeated=True)
            choices = [{"*": [many], "+": [item, many], "?": [item._replace(optional=True)], "": [item]}[quantifier]]
        sequences = [sequence + choice for sequence in sequences for choice in choices]
        if len(sequences) > _MAX_ALTERNATIVES:
            raise LoRAError(f"the pattern {pattern!r} has more than {_MAX_ALTERNATIVES} alternatives.")
    yield from sequences


def _split_group(text: str) -> list[str]:
    return text[1:-1].removeprefix("?:").split("|")


def _characters(text: str) -> frozenset[str] | None:
    """The characters that a part of a pattern stands for; None for all."""
    if text == ".":
        return None
    if text in {r"\d", r"\w"}:
        return frozenset(digits) if text == r"\d" else _WORD
    if not text.startswith("["):
        return frozenset(text[-1])
    inside = text[1:-1].removeprefix("^")
    ranges = re.findall(r"(.)-(.)|(.)", inside)
    return frozenset(char for low, high, one in ranges for char in (one or map(chr, range(ord(low), ord(high) + 1))))


def _matches(items: list[_Item], name: str, *, whole: bool) -> bool:
    """Whether a sequence matches a name, or its end from a dot on, in a time proportional to the product of lengths."""
    reached = _closure({0}, items)
    for char in name:
        following = {
            index if items[index].repeated else index + 1
            for index in reached
            if index < len(items) and items[index].matches(char)
        }
        if char == "." and not whole:
            following.add(0)
        reached = _closure(following, items)
    return len(items) in reached


def _closure(reached: set[int], items: list[_Item]) -> set[int]:
    """The positions that are reached also by leaving out optional characters."""
    closed = set()
    for start in reached:
        index = start
        closed.add(index)
        while index < len(items) and items[index].optional:
            index += 1
            closed.add(index)
    return closed
