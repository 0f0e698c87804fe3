"""Boxes in a model's own markup: the box tokens of Qwen-VL, InternVL, DeepSeek-VL2, GLM-V and Seed-VL, Molmo's points.

They become the nodes that the same suggestions would give as JSON.
"""

import re

from artaug.critics.replies.json_parser import ArrayNode, JsonNode, ObjectNode, StringNode

# Every repeat is bounded, so that a match looks at no more than a part of the reply, however it is written.
_TAG = re.compile(
    r"(?P<ref_start><\|object_ref_start\|>|<ref>|<\|ref\|>)"
    r"|(?P<ref_end><\|object_ref_end\|>|</ref>|<\|/ref\|>)"
    r"|(?P<box_start><\|box_start\|>|<\|begin_of_box\|>|<b?box>|<point>|<\|det\|>)"
    r"|(?P<box_end><\|box_end\|>|<\|end_of_box\|>|</b?box>|</point>|<\|/det\|>)"
    r"|(?P<bare>\[\[[\d.,\s]{1,100}+(?:\][\s,]{0,8}+\[[\d.,\s]{1,100}+){0,64}+\]\])"
    r"|<points?\s(?P<point>[^<>]{1,40000}+)>(?P<inner>[^<>]{0,400}+)"
)
_ATTRIBUTE = re.compile(r"""\b([a-z]{1,8})(\d{0,4})\s?=\s?["']([^"'<>]{0,400})["']""")
_COORDS = re.compile(r"""\bcoords\s?=\s?["']([^"'<>]{1,40000}+)["']""")
_COORDS_SEPARATOR = re.compile(r"[\t;:,]")
_BOX = re.compile(r"[\[(<]{1,4}+([^\[\]()<>]{1,100}+)[\])>]{1,4}+(?:\s?,\s?\(([^()<>]{1,100}+)\))?")
_LIST_MARKER = re.compile(r"^(?:[-*•]|\d{1,4}[.)])\s")
_NOT_WORDS = frozenset('{}[]"<>')
_MAX_LABEL_CHARS = 1000  # cut before it is copied to each of its boxes; a prompt is shorter


def parse_markup(reply: str) -> list[ObjectNode]:
    """The suggestions that a reply gives in markup, in order: an object with a ``box`` and a ``prompt`` each."""
    suggestions: list[ObjectNode] = []
    label, has_ref = "", False
    text_start, box_start = 0, -1  # where the text since the last tag and the open box begin; -1 for no open box
    for tag in _TAG.finditer(reply):
        kind = tag.lastgroup
        if kind == "ref_start":
            text_start = tag.end()
        elif kind == "ref_end":
            label, has_ref = reply[text_start : min(tag.start(), text_start + _MAX_LABEL_CHARS)], True
            text_start = tag.end()
        elif kind == "box_start":
            label = label if has_ref else _last_line(reply, text_start, tag.start()) or label
            text_start = box_start = tag.end()
        elif kind == "box_end" and box_start >= 0:
            suggestions += _box_suggestions(label, reply[box_start : tag.start()])
            has_ref, text_start, box_start = False, tag.end(), -1  # another box may follow for the same label
        elif kind == "bare" and box_start < 0:  # as GLM-V and CogVLM write boxes; servers drop the tokens around them
            words = label if has_ref else _last_line(reply, text_start, tag.start())
            if words and _NOT_WORDS.isdisjoint(words):  # after anything else it is a list of numbers in some JSON
                suggestions += _box_suggestions(words, tag["bare"])
            has_ref, text_start = False, tag.end()
        elif kind == "inner":
            before = _last_line(reply, text_start, tag.start())
            suggestions += _points(tag["point"], tag["inner"], before)
            text_start = tag.end()
    if box_start >= 0:
        suggestions.append(_suggestion_node(label, ArrayNode(truncated=True)))
    return suggestions


def _last_line(reply: str, start: int, end: int) -> str:
    """The text from ``start`` on the line of a box that begins at ``end``, without a list marker."""
    line = reply[max(start, end - _MAX_LABEL_CHARS) : end].rpartition("\n")[2].strip()
    return _LIST_MARKER.sub("", line).strip(" :-\u2013\u2014")


def _box_suggestions(label: str, text: str) -> list[ObjectNode]:
    """The boxes between two box tokens: ``(1,2),(3,4)`` is one, ``[[1,2,3,4],[5,6,7,8]]`` are two."""
    matches = list(_BOX.finditer(text))
    if matches and not label:  # GLM-V puts its tokens around the words too
        label = _last_line(text, 0, matches[0].start())
    boxes = [match[1] if match[2] is None else f"{match[1]},{match[2]}" for match in matches] or [text]
    return [_suggestion_node(label, StringNode([box])) for box in boxes]


def _points(attributes: str, inner: str, before: str) -> list[ObjectNode]:
    """The points of Molmo's markup, labeled by an attribute, the text of the element or the words before it.

    Molmo has coordinates in ``x`` and ``y``, numbered where there are several; Molmo 2 (allenai/molmo-utils) in
    ``coords="1 1 073 160 2 173 600"``: the number of the picture, then a number, x and y for each point.
    """
    values = {(name, number): value for name, number, value in _ATTRIBUTE.findall(attributes)}
    label = values.get(("alt", ""), "") or (before if attributes.endswith("/") else inner)
    if coords := _COORDS.search(attributes):
        points = [point for image in _COORDS_SEPARATOR.split(coords[1]) for point in _numbered_points(image.split())]
    else:
        points = [
            f"{values['x', number]},{values['y', number]}"
            for name, number in values
            if name == "x" and ("y", number) in values
        ]
    return [_suggestion_node(label, StringNode([point])) for point in points]


def _numbered_points(numbers: list[str]) -> list[str]:
    """``x,y`` of each whole point in one picture. A coordinate has three digits or more, a number fewer."""
    has_picture = len(numbers) > 1 and len(numbers[1]) < 3
    triples = numbers[has_picture:]
    return [",".join(triples[start - 2 : start]) for start in range(3, len(triples) + 1, 3)]


def _suggestion_node(label: str, box: JsonNode) -> ObjectNode:
    return ObjectNode([("box", box), ("prompt", StringNode([label.strip()]))])
