"""From the node that says where a suggestion belongs to boxes in the picture."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from artaug.critics.coordinates import Coordinates, Edges, Size
from artaug.critics.replies.json_parser import ArrayNode, JsonNode, NumberNode, ObjectNode, StringNode, children
from artaug.critics.replies.repairs import Repairs, UnusableSuggestion
from artaug.geometry import Box

_WITH_SIZE = (("x", "y", "width", "height"), ("x", "y", "w", "h"), ("left", "top", "width", "height"))
_EDGE_KEYS: tuple[tuple[str, ...], ...] = (
    ("left", "top", "right", "bottom"),
    ("x1", "y1", "x2", "y2"),
    ("x0", "y0", "x1", "y1"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("minx", "miny", "maxx", "maxy"),
    ("x", "y", "x2", "y2"),
    *_WITH_SIZE,
    ("topleft", "bottomright"),
    ("start", "end"),
    ("x", "y"),
)
_SEPARATORS = re.compile(r"<\|?/?[a-z_]{1,32}\|?>|[\s,;:()\[\]{}]++")
_NUMBER = re.compile(r"([-+]?(?:\d++(?:\.\d*+)?|\.\d++)(?:[eE][-+]?\d++)?+)(%|px)?")
_MAX_CHARS = 400  # a string that holds a box is short
_TOLERANCE = 1e-6  # what rounding may add to an edge
_NOT_FOUR = "its box is not four numbers"
_NOT_NUMBERS = "its box holds something that is not a number"


@dataclass(frozen=True)
class BoxParser:
    """Turns nodes into boxes of one picture, by one convention."""

    size: Size
    coordinates: Coordinates
    repairs: Repairs

    def parse(self, node: JsonNode, number: int) -> list[Box]:
        """The box or boxes of suggestion ``number``.

        Raises:
            UnusableSuggestion: if there is none.
        """
        return [self._to_box(edges, number) for edges in self._parse_edges(node, number)]

    def _parse_edges(self, node: JsonNode, number: int) -> list[Edges]:
        if getattr(node, "truncated", False):
            raise UnusableSuggestion("the reply ended inside its box")
        if isinstance(node, ObjectNode):
            if named := named_edges(node.by_key()):
                return [self._from_keys(*named)]
            if len(node.members) > 1 and any(key for key, _ in node.members):
                raise UnusableSuggestion("its box has unknown keys")
            node = ArrayNode([value for _, value in node.members])
        if isinstance(node, ArrayNode):
            node = _unwrap(node)
        if isinstance(node, ObjectNode):
            return self._parse_edges(node, number)
        if isinstance(node, ArrayNode) and node.items:
            return self._from_items(node, number)
        return [self._from_numbers(self._numbers(node), number)]

    def _from_items(self, array: ArrayNode, number: int) -> list[Edges]:
        if all(isinstance(item, ObjectNode) for item in array.items):
            rows = [self._point(item) for item in array.items]
            if all(rows):
                return self._from_rows(rows, number)
            return [edges for item in array.items for edges in self._parse_edges(item, number)]
        if all(isinstance(item, ArrayNode) for item in array.items):
            return self._from_rows([self._numbers(item) for item in array.items], number)
        return [self._from_numbers(self._numbers(array), number)]

    def _point(self, node: JsonNode) -> list[float]:
        """The numbers of ``{"x": ..., "y": ...}`` in the convention's order; empty for anything else."""
        values = node.by_key() if isinstance(node, ObjectNode) else {}
        if set(values) != {"x", "y"}:
            return []
        order = "yx" if self.coordinates.order == "yxyx" else "xy"
        return self._numbers(ArrayNode([values[axis] for axis in order]))

    def _from_rows(self, rows: Sequence[Sequence[float]], number: int) -> list[Edges]:
        """Several boxes, the two corners of one box, or the outline of one region."""
        lengths = {len(row) for row in rows}
        if lengths == {4} or (lengths == {2} and self.coordinates.order == "points"):
            return [self._from_numbers(row, number) for row in rows]
        if lengths == {2} and len(rows) == 2:
            return [self._from_numbers([*rows[0], *rows[1]], number)]
        if lengths == {2}:
            self.repairs.note("used the bounding box of an outline", number)
            y_first = self.coordinates.order == "yxyx"
            points = [self._decode_point(*(reversed(row) if y_first else row)) for row in rows]
            xs, ys = zip(*points, strict=True)
            return [(min(xs), min(ys), max(xs), max(ys))]
        raise UnusableSuggestion(_NOT_FOUR)

    def _from_numbers(self, numbers: Sequence[float], number: int) -> Edges:
        if len(numbers) not in {2, 4}:
            raise UnusableSuggestion(_NOT_FOUR)
        if not all(map(math.isfinite, numbers)):
            raise UnusableSuggestion(_NOT_NUMBERS)
        if len(numbers) == 2 and self.coordinates.order != "points":
            side = 2 * self.coordinates.point_radius
            self.repairs.note(f"used a box of {side:.0%} of the picture around a point", number)
        return self.coordinates.decode(numbers, size=self.size)

    def _from_keys(self, nodes: Sequence[JsonNode], has_size: bool) -> Edges:
        """Edges given by key: the keys say the order, the convention says the unit."""
        numbers = [value for node in nodes for value in self._numbers(node)]
        if len(numbers) not in {2, 4} or not all(map(math.isfinite, numbers)):
            raise UnusableSuggestion(_NOT_NUMBERS)
        left, top, *others = numbers
        x, y = self._decode_point(left, top)
        if not others:
            radius = self.coordinates.point_radius
            return x - radius, y - radius, x + radius, y + radius
        right, bottom = (left + others[0], top + others[1]) if has_size else others
        return x, y, *self._decode_point(right, bottom)

    def _decode_point(self, x: float, y: float) -> tuple[float, float]:
        return self.coordinates.decode_point(x, y, size=self.size)

    def _numbers(self, node: JsonNode) -> list[float]:
        """All numbers of a node that holds nothing else.

        Raises:
            UnusableSuggestion: if it holds anything else.
        """
        if isinstance(node, NumberNode):
            return [self._in_unit(node.value, node.unit)]
        if isinstance(node, StringNode):
            return self._numbers_in_text(node.text)
        return [value for child in children(node) for value in self._numbers(child)]

    def _numbers_in_text(self, text: str) -> list[float]:
        if not text.strip() or len(text) > _MAX_CHARS:
            raise UnusableSuggestion(_NOT_NUMBERS)
        numbers: list[float] = []
        for piece in _SEPARATORS.sub(" ", text).split():
            match = _NUMBER.fullmatch(piece)
            if match is None:
                raise UnusableSuggestion(_NOT_NUMBERS)
            numbers.append(self._in_unit(float(match[1]), match[2] or ""))
        return numbers

    def _in_unit(self, value: float, suffix: str) -> float:
        unit = {"": self.coordinates.unit, "%": "percent", "px": "pixels"}[suffix]
        if unit != self.coordinates.unit:
            raise UnusableSuggestion(f"its box is in {unit}, where {self.coordinates.unit} were expected")
        return value

    def _to_box(self, edges: Edges, number: int) -> Box:
        left, top, right, bottom = edges
        if not all(map(math.isfinite, edges)):
            raise UnusableSuggestion(_NOT_NUMBERS)
        if left > right or top > bottom:
            self.repairs.note("swapped corners", number)
            left, right, top, bottom = min(left, right), max(left, right), min(top, bottom), max(top, bottom)
        if right <= 0 or bottom <= 0 or left >= 1 or top >= 1:
            raise UnusableSuggestion("its box lies outside the picture")
        clipped = [min(max(edge, 0.0), 1.0) for edge in (left, top, right, bottom)]
        width_px, height_px = (clipped[2] - clipped[0]) * self.size[0], (clipped[3] - clipped[1]) * self.size[1]
        if width_px < 1 - _TOLERANCE or height_px < 1 - _TOLERANCE:
            raise UnusableSuggestion("its box is smaller than a pixel")
        if max(-left, -top, right - 1, bottom - 1) > _TOLERANCE:
            self.repairs.note("clipped boxes to the picture", number)
        return Box(*clipped)


def named_edges(values: Mapping[str, JsonNode]) -> tuple[list[JsonNode], bool] | None:
    """The nodes that give a box by key, and whether the last two are its size; None if there are none."""
    keys = next((keys for keys in _EDGE_KEYS if all(key in values for key in keys)), None)
    return ([values[key] for key in keys], keys in _WITH_SIZE) if keys else None


def _unwrap(array: ArrayNode) -> JsonNode:
    """The content of brackets that hold a single node."""
    inner: JsonNode = array
    while (
        isinstance(inner, ArrayNode)
        and len(inner.items) == 1
        and isinstance(inner.items[0], ArrayNode | ObjectNode | StringNode)
    ):
        inner = inner.items[0]
    return inner
