"""Places in a model's own markup: the box tokens of Qwen-VL, InternVL and DeepSeek-VL2, the points of Molmo.

They are turned into the nodes that JSON would have given.
"""

import re

from artaug.critics.replies.nodes import Listing, Node, Record, Text

_TAG = re.compile(
    r"(?P<named><\|object_ref_start\|>|<ref>|<\|ref\|>)"
    r"|(?P<unnamed><\|object_ref_end\|>|</ref>|<\|/ref\|>)"
    r"|(?P<boxed><\|box_start\|>|<box>|<\|det\|>)"
    r"|(?P<unboxed><\|box_end\|>|</box>|<\|/det\|>)"
    r"|<points?\s(?P<point>[^<>]{1,4000}+)>(?P<inner>[^<>]{0,400}+)"
)
_ATTRIBUTE = re.compile(r"""\b([a-z]{1,8})(\d{0,4})\s?=\s?["']([^"'<>]{0,400})["']""")
_BOX = re.compile(r"[\[(]++([^\[\]()<>]{1,100}+)[\])]++(?:\s?,\s?\(([^()<>]{1,100}+)\))?")


def read_tags(reply: str) -> list[Record]:
    """The suggestions a reply gives in markup: a record with a ``box`` and a ``prompt`` each, in order."""
    found: list[Record] = []
    words, referred, opened, boxed = "", False, 0, -1
    for tag in _TAG.finditer(reply):
        kind = tag.lastgroup
        if kind == "named":
            opened = tag.end()
        elif kind == "unnamed":
            words, referred, opened = reply[opened : tag.start()], True, tag.end()
        elif kind == "boxed":
            words = words if referred else _line_before(reply[opened : tag.start()]) or words
            boxed = tag.end()
        elif kind == "unboxed" and boxed >= 0:
            found += [_record(words, box) for box in _boxes(reply[boxed : tag.start()])]
            referred, opened, boxed = False, tag.end(), -1  # another box may follow for the same words
        elif kind == "inner":
            found += _points(tag["point"], tag["inner"])
    if boxed >= 0:
        found.append(_record(words, Listing(cut=True)))
    return found


def _line_before(text: str) -> str:
    """The words on the line a box stands on, without the mark of a list."""
    line = text.rpartition("\n")[2].strip()
    return re.sub(r"^(?:[-*•]|\d{1,4}[.)])\s", "", line).strip(" :-\u2013\u2014")


def _boxes(text: str) -> list[Node]:
    """The boxes between two box tokens: ``(1,2),(3,4)`` is one, ``[[1,2,3,4],[5,6,7,8]]`` are two."""
    pairs = ((found[1], found[2]) for found in _BOX.finditer(text))
    boxes: list[Node] = [Text([first if second is None else f"{first},{second}"]) for first, second in pairs]
    return boxes or [Text([text])]


def _points(attributes: str, inner: str) -> list[Record]:
    """The points of Molmo's markup: coordinates in attributes, numbered where there are several."""
    held = {(name, which): worth for name, which, worth in _ATTRIBUTE.findall(attributes)}
    words = held.get(("alt", ""), "") or inner
    points = [(held["x", which], held["y", which]) for name, which in held if name == "x" and ("y", which) in held]
    return [_record(words, Text([f"{x},{y}"])) for x, y in points]


def _record(words: str, box: Node) -> Record:
    return Record([("box", box), ("prompt", Text([words.strip()]))])
