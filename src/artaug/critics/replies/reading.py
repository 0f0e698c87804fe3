"""A tolerant reading of the JSON in a reply: one pass from left to right, whatever the text, nothing read twice.

It knows nothing of critiques. Valid JSON is read exactly as it is; of anything else as much as can be understood, and
what had to be mended for that is said.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from artaug.critics.replies.nodes import MAX_NESTING, Listing, Node, Number, Record, Text
from artaug.critics.replies.strings import QUOTES, Quoted, Role, read_quoted

_START = re.compile(
    rf"""\{{(?=\s{{0,64}}+(?:[\\{QUOTES}}}/\#]|[^\W\d]\w{{0,40}}+\s{{0,8}}+:))
    |\[(?=\s{{0,64}}+(?:[\\{QUOTES}{{\[(\]\-+.\d/\#]|(?:true|false|null|NaN|Infinity)\b))""",
    re.VERBOSE,
)
"""Where JSON may begin in prose. How far it looks ahead is bounded."""

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
_NAME_NEXT = re.compile(r"""\s{0,64}+,\s{0,64}+["'“]?[^"'“”\n:,]{1,64}+["'”]?\s{0,8}+:""")
_LITERALS = frozenset({"true", "false", "null", "NaN", "Infinity", "-Infinity"})  # json.dumps writes the last three
_LONGEST_NUMBER = 400
_CLOSES = {"]": "[", ")": "(", "}": "{"}


@dataclass(frozen=True)
class Reading:
    """What was found in a reply, from first to last, and what had to be mended to read it."""

    nodes: tuple[Record | Listing, ...]
    mended: tuple[str, ...]


def read(reply: str) -> Reading:
    """Read all the JSON there is in a reply. Time and memory grow as its length does."""
    reader, at, outside, nodes = _Reader(reply), 0, 0, []
    while found := _START.search(reply, at):
        outside += len(reply[at : found.start()].strip())
        node, at = reader.read(found.start())
        nodes.append(node)
    outside += len(reply[at:].strip())
    if nodes and outside:
        reader.mend("ignored the text around the JSON")
    return Reading(tuple(nodes), tuple(reader.mended))


@dataclass(slots=True)
class _Open:
    """A record or listing whose end has not come yet."""

    node: Record | Listing
    bracket: str
    name: Text | None = None
    """The name that waits for what it names."""
    colon: bool = False
    """Whether a colon came after the name."""
    comma: bool = True
    """Whether something may follow: nothing has come yet, or a comma."""
    late_comma: bool = False
    """Whether a comma came last."""
    doubled: bool = False
    """Whether it is the outer of two braces that were written for one."""


class _Reader:
    def __init__(self, reply: str) -> None:
        self.reply = reply
        self.mended: dict[str, None] = {}
        self.open: list[_Open] = []
        self.bare: Text | None = None  # bare words that came last, which more may follow
        self.too_deep = 0
        self.at = 0  # the end of the token that is being understood
        self.acts: dict[str, Callable[[str], None]] = {
            "opening": self.opening,
            "closing": self.closing,
            "comma": self.comma,
            "colon": self.colon,
            "comment": self.comment,
            "number": self.number,
            "word": self.word,
        }

    def mend(self, how: str) -> None:
        self.mended[how] = None

    def read(self, at: int) -> tuple[Record | Listing, int]:
        """Read the record or listing that begins at ``at``; give it and where it ends."""
        self.open, self.bare, self.too_deep = [], None, 0
        self.opening(self.reply[at])
        whole, at = self.open[0].node, at + 1
        while self.open and (token := _TOKEN.match(self.reply, at)):
            at = self.take(token)
        if self.open:
            self.mend("closed what the reply left open")
            for waiting in self.open:
                waiting.node.cut = True
            if self.bare is not None:
                self.bare.cut = True
        return whole, at

    def take(self, token: re.Match[str]) -> int:
        """Understand one token; give where the next begins."""
        kind = token.lastgroup or ""
        if kind == "quote":
            return self.quoted(token.start())
        if self.too_deep:
            self.too_deep += (kind == "opening") - (kind == "closing")
        elif act := self.acts.get(kind):
            self.at = token.end()
            act(token[0])
        return token.end()

    def quoted(self, at: int) -> int:
        top = self.open[-1]
        role: Role = "thing" if isinstance(top.node, Listing) else "value" if top.name is not None else "name"
        found = read_quoted(self.reply, at, role=role)
        if not self.too_deep:
            self.mend_quotes(self.reply[at], found)
            self.text(Text(found.parts, cut=found.cut))
        return found.end

    def mend_quotes(self, mark: str, found: Quoted) -> None:
        faults = {
            "took other quotation marks for double ones": mark != '"',
            "closed or escaped quotation marks": found.mended,
            "took line breaks and control characters inside texts as they were": found.raw,
        }
        for how, needed in faults.items():
            if needed:
                self.mend(how)

    def opening(self, bracket: str) -> None:
        if len(self.open) == MAX_NESTING:
            self.mend(f"ignored what was nested deeper than {MAX_NESTING}")
            self.too_deep = 1
            return
        if bracket == "(":
            self.mend("took round brackets for square ones")
        if bracket == "{" and self.is_record_left_open():
            self.closing("}")
            self.mend("matched brackets that did not match")
        node: Record | Listing = Record() if bracket == "{" else Listing()
        if self.open:
            self.open[-1].doubled = bracket == "{" and self.open[-1].name is None and self.open[-1].node == Record()
            self.put(node)
        self.open.append(_Open(node, bracket))

    def is_record_left_open(self) -> bool:
        """Whether the innermost is a record in a listing, where another record can only be the next in that listing."""
        if len(self.open) < 2 or not isinstance(self.open[-2].node, Listing):
            return False
        top = self.open[-1]
        return isinstance(top.node, Record) and top.name is None and bool(top.node.fields)

    def closing(self, bracket: str) -> None:
        depth = next((up for up, one in enumerate(reversed(self.open)) if one.bracket == _CLOSES[bracket]), None)
        if depth is None:
            self.mend("ignored brackets that close nothing")
            return
        if depth:
            self.mend("matched brackets that did not match")
            if self.belongs_to_listing(depth, self.at):
                depth = 0
        for _ in range(depth + 1):
            ended = self.open.pop()
            self.finish_name(ended)
            if ended.late_comma:
                self.mend("left out commas that nothing follows")
            if ended.doubled and isinstance(ended.node, Record):
                self.mend("took doubled braces for single ones")
                _unwrap(ended.node)
        self.bare = None

    def belongs_to_listing(self, depth: int, after: int) -> bool:
        """Whether a bracket of the wrong kind closes the innermost listing only, since a name of its record follows."""
        if len(self.open) < 2 or not isinstance(self.open[-2].node, Record):
            return False
        around = self.open[-depth - 2].node if len(self.open) > depth + 1 else None
        return not isinstance(around, Record) and _NAME_NEXT.match(self.reply, after) is not None

    def comment(self, _written: str) -> None:
        self.mend("ignored comments")

    def comma(self, _written: str) -> None:
        top = self.open[-1]
        self.finish_name(top)
        if top.late_comma or top.comma:
            self.mend("left out commas that nothing follows")
        top.comma = top.late_comma = True
        self.bare = None

    def colon(self, written: str) -> None:
        top = self.open[-1]
        if isinstance(top.node, Listing) and self.is_name_astray(top.node):
            top = self.open[-1]
        if top.name is None or top.colon:
            self.mend("ignored colons that nothing precedes")
            return
        if written != ":":
            self.mend("took equals signs for colons")
        top.colon, self.bare = True, None

    def is_name_astray(self, listing: Listing) -> bool:
        """Close a listing that a name of the record around it has strayed into; False if none has."""
        strayed = listing.things[-1] if listing.things else None
        if not isinstance(strayed, Text) or len(self.open) < 2 or not isinstance(self.open[-2].node, Record):
            return False
        self.mend("matched brackets that did not match")
        listing.things.pop()
        self.open.pop()
        self.text(strayed)
        return True

    def number(self, written: str) -> None:
        if self.bare is not None and isinstance(self.open[-1].node, Record):
            self.bare.parts.append(written)
            return
        digits = written.rstrip("%px")
        known = len(digits) <= _LONGEST_NUMBER
        self.put(Number(float(digits) if known else float("nan"), written[len(digits) :]))
        self.bare = None

    def word(self, written: str) -> None:
        top = self.open[-1]
        if self.bare is not None:
            self.bare.parts.append(written)
            return
        if written not in _LITERALS or (isinstance(top.node, Record) and top.name is None):
            self.mend("took bare words for texts")
        self.text(Text([written], bare=True))

    def text(self, text: Text) -> None:
        """Take a text as a name or as a thing, whichever is due."""
        top = self.open[-1]
        if isinstance(top.node, Record) and top.name is None:
            if not top.comma:
                self.mend("put in missing commas")
            top.name, top.late_comma = text, False
        else:
            self.put(text)
        self.bare = text if text.bare else None

    def put(self, node: Node) -> None:
        """Put a thing into the innermost open record or listing."""
        top = self.open[-1]
        if isinstance(top.node, Listing):
            if not top.comma:
                self.mend("put in missing commas")
            top.node.things.append(node)
        else:
            if top.name is not None and not top.colon:
                self.mend("put in missing colons")
            top.node.fields.append((top.name.words if top.name else "", node))
            top.name, top.colon = None, False
        top.comma = top.late_comma = False
        self.bare = None

    def finish_name(self, top: _Open) -> None:
        """Give a name that nothing followed its place among the things without a name."""
        if top.name is None or not isinstance(top.node, Record):
            return
        self.mend("kept names that nothing follows")
        top.node.fields.append((top.name.words, Text([])) if top.colon else ("", top.name))
        top.name, top.colon, top.comma, top.late_comma = None, False, False, False


def _unwrap(record: Record) -> None:
    """Let a record be the ones without a name in it: templates double their braces."""
    parts = (
        thing.fields if isinstance(thing, Record) and not name else [(name, thing)] for name, thing in record.fields
    )
    record.fields = [one for part in parts for one in part]
