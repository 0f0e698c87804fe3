"""What a tolerant reading of JSON-like text gives: records, listings, numbers and texts, and whether each is whole."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeAlias

MAX_NESTING = 32
"""Nothing is read that is nested deeper than this, so whoever walks a reading may recurse."""


@dataclass(slots=True)
class Text:
    """PromptVocabulary, quoted or bare (``true``, ``null`` and ``NaN`` are bare words)."""

    parts: list[str]
    bare: bool = False
    cut: bool = False
    """Whether the reply ended inside it. So for the others."""

    @property
    def words(self) -> str:
        """The whole text."""
        return (" " if self.bare else "").join(self.parts)


@dataclass(slots=True)
class Number:
    """A number, with the unit that was written behind it: ``%``, ``px`` or none."""

    amount: float
    unit: str = ""


@dataclass(slots=True)
class Listing:
    """Things in a row, in square brackets or round ones."""

    things: list["Node"] = field(default_factory=list)
    cut: bool = False


@dataclass(slots=True)
class Record:
    """Things with names. A name may be empty, and may stand there more than once."""

    fields: list[tuple[str, "Node"]] = field(default_factory=list)
    cut: bool = False

    def named(self) -> dict[str, "Node"]:
        """The fields by plain name (lower case, letters and digits only), the last one where there are several."""
        return {plain(name): thing for name, thing in self.fields}


Node: TypeAlias = Text | Number | Listing | Record


@lru_cache(maxsize=1024)  # the same few names come again and again
def plain(name: str) -> str:
    """A name as it is compared: ``bbox_2d`` and ``BBox 2D`` are the same."""
    return "".join(letter for letter in name[:64].lower() if letter.isalnum())


def inside(node: Node) -> Iterator[Node]:
    """What a record or a listing holds."""
    if isinstance(node, Record):
        yield from (thing for _, thing in node.fields)
    elif isinstance(node, Listing):
        yield from node.things
