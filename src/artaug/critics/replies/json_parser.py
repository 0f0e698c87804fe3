"""A tolerant JSON parser for model replies, and the tree it gives: one pass from left to right, whatever the text.

It knows nothing of critiques. Valid JSON gives exactly its values; of anything else it gives as much as it can
understand, with a note for every repair.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeAlias

from artaug.critics.replies.json_strings import QUOTES, StringRole, read_quoted

MAX_NESTING = 32
"""Deeper values are ignored, so that code that visits the tree may recurse."""


@dataclass(slots=True)
class StringNode:
    """A string, quoted or not (``true``, ``null`` and ``NaN`` are unquoted strings)."""

    parts: list[str]
    unquoted: bool = False
    truncated: bool = False
    """Whether the reply ended inside this value. The same holds for arrays and objects."""

    @property
    def text(self) -> str:
        """The parts, joined."""
        return (" " if self.unquoted else "").join(self.parts)


@dataclass(slots=True)
class NumberNode:
    """A number with the unit written after it: ``%``, ``px`` or none."""

    value: float
    unit: str = ""


@dataclass(slots=True)
class ArrayNode:
    """Values in square or round brackets."""

    items: list["JsonNode"] = field(default_factory=list)
    truncated: bool = False


@dataclass(slots=True)
class ObjectNode:
    """Values with keys. A key may be empty and may occur more than once."""

    members: list[tuple[str, "JsonNode"]] = field(default_factory=list)
    truncated: bool = False

    def by_key(self) -> dict[str, "JsonNode"]:
        """The values by normalized key, the last one where a key occurs more than once."""
        return {normalize_key(key): node for key, node in self.members}


JsonNode: TypeAlias = StringNode | NumberNode | ArrayNode | ObjectNode


@lru_cache(maxsize=1024)  # replies repeat the same few keys
def normalize_key(key: str) -> str:
    """A key in lower case, letters and digits only: ``bbox_2d`` and ``BBox 2D`` are equal."""
    return "".join(letter for letter in key[:64].lower() if letter.isalnum())


def children(node: JsonNode) -> Iterator[JsonNode]:
    """The values directly inside an object or an array."""
    if isinstance(node, ObjectNode):
        yield from (child for _, child in node.members)
    elif isinstance(node, ArrayNode):
        yield from node.items


_START = re.compile(
    rf"""\{{(?=\s{{0,64}}+(?:[\\{QUOTES}}}/\#]|[^\W\d]\w{{0,40}}+\s{{0,8}}+:))
    |\[(?=\s{{0,64}}+(?:[\\{QUOTES}{{\[(\]\-+.\d/\#]|(?:true|false|null|NaN|Infinity)\b))""",
    re.VERBOSE,
)
"""Where JSON may begin in prose. The length of the lookahead is bounded."""

# Every repeat below is possessive (`++`, `*+`) or bounded, so that no input makes a match backtrack.
_TOKEN = re.compile(
    rf"""(?P<space>[\s\x00-\x1f\x7f\ufeff]++)
    |(?P<quote>\\?[{QUOTES}])
    |(?P<opening>[\[{{(])
    |(?P<closing>[\]}})])
    |(?P<comma>[,;])
    |(?P<colon>:|=>?)
    |(?P<comment>//[^\n]*+|/\*(?:[^*]++|\*(?!/))*+(?:\*/)?|\#[^\n]*+)
    |(?P<number>[-+]?(?:\d++(?:\.\d*+)?|\.\d++)(?:[eE][-+]?\d++)?+(?:%|px\b)?)
    |(?P<word>[^\s\[\]{{}}(),;:="]++)
    |(?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
_NEXT_KEY = re.compile(r"""\s{0,64}+,\s{0,64}+["'“]?[^"'“”\n:,]{1,64}+["'”]?\s{0,8}+:""")
_LITERALS = frozenset({"true", "false", "null", "NaN", "Infinity", "-Infinity"})  # json.dumps writes the last three
_MAX_NUMBER_CHARS = 400
_OPENING = {"]": "[", ")": "(", "}": "{"}


@dataclass(frozen=True)
class ParsedJson:
    """The values found in a reply, first to last, and the repairs made to parse them."""

    nodes: tuple[ObjectNode | ArrayNode, ...]
    repairs: tuple[str, ...]


def parse_json(reply: str) -> ParsedJson:
    """Parse all the JSON in a reply. Time and memory grow in proportion to its length."""
    parser, position, outside, nodes = _Parser(reply), 0, 0, []
    while match := _START.search(reply, position):
        outside += len(reply[position : match.start()].strip())
        node, position = parser.parse_value(match.start())
        nodes.append(node)
    outside += len(reply[position:].strip())
    if nodes and outside:
        parser.note("ignored the text around the JSON")
    return ParsedJson(tuple(nodes), tuple(parser.repairs))


@dataclass(slots=True)
class _Frame:
    """An object or array on the parser's stack, whose closing bracket has not come yet."""

    node: ObjectNode | ArrayNode
    bracket: str
    key: StringNode | None = None
    """A key whose value has not come yet."""
    has_colon: bool = False
    """Whether a colon came after the key."""
    may_continue: bool = True
    """Whether a value may come: this is the beginning, or a comma came before."""
    after_comma: bool = False
    """Whether a comma was the last token."""
    doubled: bool = False
    """Whether this is the outer of two braces written for one (``{{``)."""


class _Parser:
    """A stack machine over tokens. Each method of ``actions`` handles one kind of token."""

    def __init__(self, reply: str) -> None:
        self.reply = reply
        self.repairs: dict[str, None] = {}
        self.stack: list[_Frame] = []
        self.unquoted: StringNode | None = None  # the last token, if it was an unquoted word that others may continue
        self.ignored_depth = 0  # brackets open beyond MAX_NESTING
        self.position = 0  # the end of the current token
        self.actions: dict[str, Callable[[str], None]] = {
            "opening": self.open_bracket,
            "closing": self.close_bracket,
            "comma": self.comma,
            "colon": self.colon,
            "comment": lambda _comment: self.note("ignored comments"),
            "number": self.number,
            "word": self.word,
        }

    def note(self, repair: str) -> None:
        self.repairs[repair] = None

    def parse_value(self, start: int) -> tuple[ObjectNode | ArrayNode, int]:
        """Parse the object or array that begins at ``start``; return it and the position after it."""
        self.stack, self.unquoted, self.ignored_depth = [], None, 0
        self.open_bracket(self.reply[start])
        root, position = self.stack[0].node, start + 1
        while self.stack and (token := _TOKEN.match(self.reply, position)):
            position = self.consume(token)
        if self.stack:
            self.note("closed JSON that the reply left open")
            for frame in self.stack:
                frame.node.truncated = True
            if self.unquoted is not None:
                self.unquoted.truncated = True
        return root, position

    def consume(self, token: re.Match[str]) -> int:
        """Handle one token; return where the next one begins."""
        kind = token.lastgroup or ""
        if kind == "quote":
            return self.quoted_string(token.start())
        if self.ignored_depth:
            self.ignored_depth += (kind == "opening") - (kind == "closing")
        elif action := self.actions.get(kind):
            self.position = token.end()
            action(token[0])
        return token.end()

    def quoted_string(self, start: int) -> int:
        top = self.stack[-1]
        role: StringRole = "item" if isinstance(top.node, ArrayNode) else "value" if top.key is not None else "key"
        string = read_quoted(self.reply, start, role=role)
        if not self.ignored_depth:
            if self.reply[start] != '"':
                self.note("read other quotation marks as double ones")
            if string.repaired:
                self.note("added or escaped quotation marks")
            if string.has_control_characters:
                self.note("kept line breaks and control characters inside strings")
            self.add_string(StringNode(string.parts, truncated=string.truncated))
        return string.end

    def open_bracket(self, bracket: str) -> None:
        if len(self.stack) == MAX_NESTING:
            self.note(f"ignored values nested deeper than {MAX_NESTING}")
            self.ignored_depth = 1
            return
        if bracket == "(":
            self.note("read round brackets as square ones")
        if bracket == "{" and self.misses_closing_brace():
            self.close_bracket("}")
            self.note("corrected mismatched brackets")
        node: ObjectNode | ArrayNode = ObjectNode() if bracket == "{" else ArrayNode()
        if self.stack:
            top = self.stack[-1]
            top.doubled = bracket == "{" and top.key is None and top.node == ObjectNode()
            self.add_value(node)
        self.stack.append(_Frame(node, bracket))

    def misses_closing_brace(self) -> bool:
        """Whether the top is an object in an array with no key pending: a new object can only be the next array item."""
        if len(self.stack) < 2 or not isinstance(self.stack[-2].node, ArrayNode):
            return False
        top = self.stack[-1]
        return isinstance(top.node, ObjectNode) and top.key is None and bool(top.node.members)

    def close_bracket(self, bracket: str) -> None:
        depth = next(
            (level for level, frame in enumerate(reversed(self.stack)) if frame.bracket == _OPENING[bracket]), None
        )
        if depth is None:
            self.note("ignored unmatched closing brackets")
            return
        if depth:
            self.note("corrected mismatched brackets")
            if self.closes_only_array(depth):
                depth = 0
        for _ in range(depth + 1):
            frame = self.stack.pop()
            self.finish_key(frame)
            if frame.after_comma:
                self.note("removed extra commas")
            if frame.doubled and isinstance(frame.node, ObjectNode):
                self.note("read doubled braces as single ones")
                _flatten(frame.node)
        self.unquoted = None

    def closes_only_array(self, depth: int) -> bool:
        """Whether a bracket of the wrong kind closes only the innermost array, since a key of the object follows."""
        if len(self.stack) < 2 or not isinstance(self.stack[-2].node, ObjectNode):
            return False
        around = self.stack[-depth - 2].node if len(self.stack) > depth + 1 else None
        return not isinstance(around, ObjectNode) and _NEXT_KEY.match(self.reply, self.position) is not None

    def comma(self, _token: str) -> None:
        top = self.stack[-1]
        self.finish_key(top)
        if top.after_comma or top.may_continue:
            self.note("removed extra commas")
        top.may_continue = top.after_comma = True
        self.unquoted = None

    def colon(self, separator: str) -> None:
        top = self.stack[-1]
        if isinstance(top.node, ArrayNode) and self.move_key_out(top.node):
            top = self.stack[-1]
        if top.key is None or top.has_colon:
            self.note("ignored colons without a key")
            return
        if separator != ":":
            self.note("read equals signs as colons")
        top.has_colon, self.unquoted = True, None

    def move_key_out(self, array: ArrayNode) -> bool:
        """Close an array whose last item is a key of the object around it (``[1, "key":``); False if there is none."""
        last = array.items[-1] if array.items else None
        if not isinstance(last, StringNode) or len(self.stack) < 2 or not isinstance(self.stack[-2].node, ObjectNode):
            return False
        self.note("corrected mismatched brackets")
        array.items.pop()
        self.stack.pop()
        self.add_string(last)
        return True

    def number(self, token: str) -> None:
        if self.unquoted is not None and isinstance(self.stack[-1].node, ObjectNode):
            self.unquoted.parts.append(token)
            return
        digits = token.rstrip("%px")
        value = float(digits) if len(digits) <= _MAX_NUMBER_CHARS else float("nan")
        self.add_value(NumberNode(value, token[len(digits) :]))
        self.unquoted = None

    def word(self, token: str) -> None:
        top = self.stack[-1]
        if self.unquoted is not None:
            self.unquoted.parts.append(token)
            return
        if token not in _LITERALS or (isinstance(top.node, ObjectNode) and top.key is None):
            self.note("read unquoted words as strings")
        self.add_string(StringNode([token], unquoted=True))

    def add_string(self, string: StringNode) -> None:
        """Add a string as a key or as a value, whichever is due."""
        top = self.stack[-1]
        if isinstance(top.node, ObjectNode) and top.key is None:
            if not top.may_continue:
                self.note("added missing commas")
            top.key, top.after_comma = string, False
        else:
            self.add_value(string)
        self.unquoted = string if string.unquoted else None

    def add_value(self, node: JsonNode) -> None:
        """Add a value to the innermost object or array."""
        top = self.stack[-1]
        if isinstance(top.node, ArrayNode):
            if not top.may_continue:
                self.note("added missing commas")
            top.node.items.append(node)
        else:
            if top.key is not None and not top.has_colon:
                self.note("added missing colons")
            top.node.members.append((top.key.text if top.key else "", node))
            top.key, top.has_colon = None, False
        top.may_continue = top.after_comma = False
        self.unquoted = None

    def finish_key(self, frame: _Frame) -> None:
        """Keep a key without a value: with an empty value if a colon came, else as a value without a key."""
        if frame.key is None or not isinstance(frame.node, ObjectNode):
            return
        self.note("kept keys without a value")
        frame.node.members.append((frame.key.text, StringNode([])) if frame.has_colon else ("", frame.key))
        frame.key, frame.has_colon, frame.may_continue, frame.after_comma = None, False, False, False


def _flatten(outer: ObjectNode) -> None:
    """Replace objects without a key inside ``outer`` by their members: prompt templates double their braces."""
    members: list[tuple[str, JsonNode]] = []
    for key, node in outer.members:
        members += node.members if isinstance(node, ObjectNode) and not key else [(key, node)]
    outer.members = members
