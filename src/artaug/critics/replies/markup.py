"""Boxes in a model's own markup: the box tokens of Qwen-VL, InternVL and DeepSeek-VL2, the points of Molmo.

They become the nodes that the same suggestions would give as JSON.
"""

import re

from artaug.critics.replies.json_parser import ArrayNode, JsonNode, ObjectNode, StringNode

_TAG = re.compile(
    r"(?P<ref_start><\|object_ref_start\|>|<ref>|<\|ref\|>)"
    r"|(?P<ref_end><\|object_ref_end\|>|</ref>|<\|/ref\|>)"
    r"|(?P<box_start><\|box_start\|>|<box>|<\|det\|>)"
    r"|(?P<box_end><\|box_end\|>|</box>|<\|/det\|>)"
    r"|<points?\s(?P<point>[^<>]{1,4000}+)>(?P<inner>[^<>]{0,400}+)"
)
_ATTRIBUTE = re.compile(r"""\b([a-z]{1,8})(\d{0,4})\s?=\s?["']([^"'<>]{0,400})["']""")
_BOX = re.compile(r"[\[(]++([^\[\]()<>]{1,100}+)[\])]++(?:\s?,\s?\(([^()<>]{1,100}+)\))?")


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
            label, has_ref, text_start = reply[text_start : tag.start()], True, tag.end()
        elif kind == "box_start":
            label = label if has_ref else _last_line(reply[text_start : tag.start()]) or label
            box_start = tag.end()
        elif kind == "box_end" and box_start >= 0:
            suggestions += [_suggestion_node(label, box) for box in _boxes(reply[box_start : tag.start()])]
            has_ref, text_start, box_start = False, tag.end(), -1  # another box may follow for the same label
        elif kind == "inner":
            suggestions += _points(tag["point"], tag["inner"])
    if box_start >= 0:
        suggestions.append(_suggestion_node(label, ArrayNode(truncated=True)))
    return suggestions


def _last_line(text: str) -> str:
    """The text on the line of a box, without a list marker."""
    line = text.rpartition("\n")[2].strip()
    return re.sub(r"^(?:[-*•]|\d{1,4}[.)])\s", "", line).strip(" :-\u2013\u2014")


def _boxes(text: str) -> list[JsonNode]:
    """The boxes between two box tokens: ``(1,2),(3,4)`` is one, ``[[1,2,3,4],[5,6,7,8]]`` are two."""
    pairs = ((match[1], match[2]) for match in _BOX.finditer(text))
    boxes: list[JsonNode] = [StringNode([first if second is None else f"{first},{second}"]) for first, second in pairs]
    return boxes or [StringNode([text])]


def _points(attributes: str, inner: str) -> list[ObjectNode]:
    """The points of Molmo's markup: coordinates in attributes, with numbers in the names where there are several."""
    values = {(name, number): value for name, number, value in _ATTRIBUTE.findall(attributes)}
    label = values.get(("alt", ""), "") or inner
    points = [
        (values["x", number], values["y", number]) for name, number in values if name == "x" and ("y", number) in values
    ]
    return [_suggestion_node(label, StringNode([f"{x},{y}"])) for x, y in points]


def _suggestion_node(label: str, box: JsonNode) -> ObjectNode:
    return ObjectNode([("box", box), ("prompt", StringNode([label.strip()]))])
