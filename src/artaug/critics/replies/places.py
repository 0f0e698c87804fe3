"""From what a reply says about a place to a box in the picture."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from artaug.critics.coordinates import Coordinates, Edges, Size
from artaug.critics.replies.nodes import Listing, Node, Number, Record, Text, inside
from artaug.critics.replies.repairs import Repairs, Unusable
from artaug.geometry import Box

_SIZED = (("x", "y", "width", "height"), ("x", "y", "w", "h"), ("left", "top", "width", "height"))
_NAMES: tuple[tuple[str, ...], ...] = (
    ("left", "top", "right", "bottom"),
    ("x1", "y1", "x2", "y2"),
    ("x0", "y0", "x1", "y1"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("minx", "miny", "maxx", "maxy"),
    ("x", "y", "x2", "y2"),
    *_SIZED,
    ("topleft", "bottomright"),
    ("start", "end"),
    ("x", "y"),
)
_IN_TEXT = re.compile(r"<\|?/?[a-z_]{1,32}\|?>|[\s,;:()\[\]{}]++")
_NUMBER = re.compile(r"([-+]?(?:\d++(?:\.\d*+)?|\.\d++)(?:[eE][-+]?\d++)?+)(%|px)?")
_MOST_IN_TEXT = 400  # characters; a text that holds a place is short
_SLACK = 1e-6  # what rounding may add


@dataclass(frozen=True)
class Surveyor:
    """Turns numbers into boxes of one picture, by one convention."""

    size: Size
    coordinates: Coordinates
    repairs: Repairs

    def boxes(self, place: Node, number: int) -> list[Box]:
        """The box or boxes that a reply gives for suggestion ``number``.

        Raises:
            Unusable: if there is none.
        """
        return [self._box(edges, number) for edges in self._edges(place, number)]

    def _edges(self, place: Node, number: int) -> list[Edges]:
        if getattr(place, "cut", False):
            raise Unusable("the reply ended inside its box")
        if isinstance(place, Record):
            if named := named_edges(place.named()):
                return [self._from_names(*named)]
            if len(place.fields) > 1 and any(name for name, _ in place.fields):
                raise Unusable("its box has names that are not known")
            place = Listing([thing for _, thing in place.fields])
        if isinstance(place, Listing):
            place = _unwrapped(place)
        if isinstance(place, Record):
            return self._edges(place, number)
        if isinstance(place, Listing) and place.things:
            return self._of_things(place, number)
        return [self._of_numbers(self._numbers(place), number)]

    def _of_things(self, place: Listing, number: int) -> list[Edges]:
        if all(isinstance(thing, Record) for thing in place.things):
            rows = [self._point(thing) for thing in place.things]
            if all(rows):
                return self._of_rows(rows, number)
            return [edges for thing in place.things for edges in self._edges(thing, number)]
        if all(isinstance(thing, Listing) for thing in place.things):
            return self._of_rows([self._numbers(thing) for thing in place.things], number)
        return [self._of_numbers(self._numbers(place), number)]

    def _point(self, thing: Node) -> list[float]:
        """The numbers of a point given by name, in the convention's order; none if it is something else."""
        things = thing.named() if isinstance(thing, Record) else {}
        if set(things) != {"x", "y"}:
            return []
        return self._numbers(Listing([things[name] for name in ("yx" if self.coordinates.order == "yxyx" else "xy")]))

    def _of_rows(self, rows: Sequence[Sequence[float]], number: int) -> list[Edges]:
        """Several boxes, the two corners of one, or the outline of one."""
        lengths = {len(row) for row in rows}
        if lengths == {4} or (lengths == {2} and self.coordinates.order == "points"):
            return [self._of_numbers(row, number) for row in rows]
        if lengths == {2} and len(rows) == 2:
            return [self._of_numbers([*rows[0], *rows[1]], number)]
        if lengths == {2}:
            self.repairs.mend("took the box around an outline", number)
            y_first = self.coordinates.order == "yxyx"
            points = [self._corner(*(reversed(row) if y_first else row)) for row in rows]
            across, down = zip(*points, strict=True)
            return [(min(across), min(down), max(across), max(down))]
        raise Unusable("its box is not four numbers")

    def _of_numbers(self, numbers: Sequence[float], number: int) -> Edges:
        if len(numbers) not in {2, 4}:
            raise Unusable("its box is not four numbers")
        if not all(map(math.isfinite, numbers)):
            raise Unusable("its box holds something that is no number")
        if len(numbers) == 2 and self.coordinates.order != "points":
            self.repairs.mend(f"took a box of {2 * self.coordinates.reach:.0%} of the picture around a point", number)
        return self.coordinates.edges(numbers, size=self.size)

    def _from_names(self, things: Sequence[Node], sized: bool) -> Edges:
        """Edges that a reply gives by name: their order is beyond doubt, their unit is the convention's."""
        numbers = [one for thing in things for one in self._numbers(thing)]
        if len(numbers) not in {2, 4} or not all(map(math.isfinite, numbers)):
            raise Unusable("its box holds something that is no number")
        left, top, *others = numbers
        corner = self._corner(left, top)
        if not others:
            reach = self.coordinates.reach
            return corner[0] - reach, corner[1] - reach, corner[0] + reach, corner[1] + reach
        right, bottom = (left + others[0], top + others[1]) if sized else others
        return corner + self._corner(right, bottom)

    def _corner(self, x: float, y: float) -> tuple[float, float]:
        return self.coordinates.corner(x, y, size=self.size)

    def _numbers(self, thing: Node) -> list[float]:
        """All numbers of something that holds nothing else.

        Raises:
            Unusable: if it does.
        """
        if isinstance(thing, Number):
            return [self._amount(thing.amount, thing.unit)]
        if isinstance(thing, Text):
            return self._numbers_in(thing.words)
        return [one for held in inside(thing) for one in self._numbers(held)]

    def _numbers_in(self, words: str) -> list[float]:
        if not words.strip() or len(words) > _MOST_IN_TEXT:
            raise Unusable("its box holds something that is no number")
        found: list[float] = []
        for piece in _IN_TEXT.sub(" ", words).split():
            number = _NUMBER.fullmatch(piece)
            if number is None:
                raise Unusable("its box holds something that is no number")
            found.append(self._amount(float(number[1]), number[2] or ""))
        return found

    def _amount(self, amount: float, unit: str) -> float:
        expected = {"": self.coordinates.unit, "%": "percent", "px": "pixels"}[unit]
        if expected != self.coordinates.unit:
            raise Unusable(f"its box is in {expected}, where {self.coordinates.unit} were expected")
        return amount

    def _box(self, edges: Edges, number: int) -> Box:
        left, top, right, bottom = edges
        if not all(map(math.isfinite, edges)):
            raise Unusable("its box holds something that is no number")
        if left > right or top > bottom:
            self.repairs.mend("swapped corners", number)
            left, right, top, bottom = min(left, right), max(left, right), min(top, bottom), max(top, bottom)
        if right <= 0 or bottom <= 0 or left >= 1 or top >= 1:
            raise Unusable("its box lies outside the picture")
        inner = [min(max(edge, 0.0), 1.0) for edge in (left, top, right, bottom)]
        if (inner[2] - inner[0]) * self.size[0] < 1 - _SLACK or (inner[3] - inner[1]) * self.size[1] < 1 - _SLACK:
            raise Unusable("its box is smaller than a pixel")
        if max(-left, -top, right - 1, bottom - 1) > _SLACK:
            self.repairs.mend("clipped boxes to the picture", number)
        return Box(*inner)


def named_edges(things: Mapping[str, Node]) -> tuple[list[Node], bool] | None:
    """The things that give a box by name, and whether the last two are its size; None if there are none."""
    known = next((names for names in _NAMES if all(name in things for name in names)), None)
    return ([things[name] for name in known], known in _SIZED) if known else None


def _unwrapped(place: Listing) -> Node:
    """What is inside brackets that hold nothing but one pair of brackets."""
    inner: Node = place
    while (
        isinstance(inner, Listing) and len(inner.things) == 1 and isinstance(inner.things[0], Listing | Record | Text)
    ):
        inner = inner.things[0]
    return inner
