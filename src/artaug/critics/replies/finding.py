"""Where in what was read the suggestions are, whatever they are called and however they are wrapped."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from artaug.critics.replies.nodes import Listing, Node, Number, Record, Text, inside, plain
from artaug.critics.replies.places import named_edges
from artaug.critics.replies.reading import read
from artaug.critics.replies.repairs import Repairs, Unusable

_LISTS = (
    *("suggestions", "changes", "regions", "edits", "improvements", "modifications", "recommendations"),
    *("items", "boxes", "objects", "annotations", "detections", "results", "areas"),
)
_PLACES = (
    *("box", "bbox", "bbox2d", "box2d", "boundingbox", "boundingbox2d", "region", "area", "rect", "rectangle"),
    *("coordinates", "coords", "point2d", "point", "points", "position", "location", "polygon"),
)
_PROMPTS = (
    *("prompt", "modificationprompt", "newprompt", "modification", "description", "caption", "label", "text"),
    *("suggestion", "change", "edit", "content", "phrase", "name"),
)
_REASONS = ("reason", "why", "rationale", "explanation", "justification", "issue", "problem")
_SUMMARIES = ("summary", "overall", "overview", "analysis", "assessment", "comment")
_NOTHING = frozenset({"", "null", "none", "nan", "undefined", "n/a"})


@dataclass(frozen=True)
class Found:
    """The suggestions of a reply, as they were read."""

    items: tuple[Node, ...]
    summary: str = ""
    asks_nothing: bool = False
    """Whether the reply says in so many words that there is nothing to change."""
    declined: str = ""
    """The reason the reply gives for not answering."""


@dataclass
class _Search:
    """What a walk through one part of a reply has come upon."""

    repairs: Repairs
    loose: bool = False
    """Whether names that are not known may hold a place, too."""
    items: list[Node] = field(default_factory=list)
    empty: bool = False


def find(nodes: Sequence[Record | Listing], repairs: Repairs) -> Found:
    """Find the suggestions of a reply.

    A reply that drafts and then answers holds several answers: the last whole one counts. Records that are one
    suggestion each are taken together.
    """
    for loose in (False, True):
        answers, lone = _answers(nodes, repairs, loose=loose)
        if len(answers) + bool(lone) > 1:
            repairs.mend("took the last whole answer of several")
        ranked = [
            *(one for one, whole in reversed(answers) if whole and (one.asks_nothing or any(map(is_item, one.items)))),
            *(one for one, whole in answers if not whole),
            *([Found(tuple(lone))] if lone else []),
            *(one for one, _ in reversed(answers)),
        ]
        if ranked:
            return ranked[0]
    declined = next((why for node in nodes if (why := _declined(node))), "")
    nothing = any(isinstance(node, Listing) and not (node.things or node.cut) for node in nodes)
    return Found((), asks_nothing=nothing, declined=declined)


def _answers(
    nodes: Sequence[Record | Listing], repairs: Repairs, *, loose: bool
) -> tuple[list[tuple[Found, bool]], list[Node]]:
    """The answers of a reply, and whether each is whole; and the suggestions that stand alone."""
    answers: list[tuple[Found, bool]] = []
    lone: list[Node] = []
    for node in nodes:
        if is_item(node, loose=loose):
            lone.append(node)
            continue
        search = _Search(repairs, loose)
        _walk(node, search)
        if search.items or search.empty:
            found = Found(tuple(search.items), _summary(node), asks_nothing=not search.items)
            answers.append((found, not node.cut))
    return answers, lone


def is_item(node: Node, *, loose: bool = False) -> bool:
    """Whether something may be one suggestion: it has a place, or it is a row of numbers and words."""
    if isinstance(node, Listing):
        words = [thing for thing in node.things if isinstance(thing, Text) and not is_nothing(thing)]
        numbers = [thing for thing in node.things if isinstance(thing, Number) or _is_numeric(thing)]
        return bool(words and numbers) and len(words) + len(numbers) == len(node.things)
    if not isinstance(node, Record):
        return False
    things = node.named()
    if any(name in things for name in _PLACES) or named_edges(things) is not None:
        return True
    worded = any(isinstance(thing, Text) and not is_nothing(thing) for thing in things.values())
    return loose and worded and any(_is_numeric(thing) for thing in things.values())


def place_of(item: Node, repairs: Repairs, number: int) -> Node:
    """What a suggestion says about where.

    Raises:
        Unusable: if it says nothing about that.
    """
    if isinstance(item, Listing):
        return Listing([thing for thing in item.things if not isinstance(thing, Text)], cut=item.cut)
    if isinstance(item, Record):
        things = item.named()
        known = [things[name] for name in _PLACES if name in things and _may_be_place(things[name])]
        if known:
            return known[0]
        if named_edges(things) is not None:
            return Record([(name, thing) for name, thing in item.fields if not isinstance(thing, Text)] or item.fields)
        rows = [thing for _, thing in item.fields if isinstance(thing, Listing | Record) and _is_numeric(thing)]
        if len(rows) == 1:
            repairs.mend("took the only numbers for the box", number)
            return rows[0]
    raise Unusable("it has no box" + (", and the reply ends in it" if getattr(item, "cut", False) else ""))


def words_of(item: Node, repairs: Repairs, number: int) -> tuple[str, str]:
    """What a suggestion says should be there, and why.

    Raises:
        Unusable: if it does not say what should be there.
    """
    if isinstance(item, Listing):
        prompt, *others = [thing for thing in item.things if isinstance(thing, Text)] or [Text([])]
        return _said(prompt), " ".join(thing.words for thing in others if not thing.cut)
    things = item.named() if isinstance(item, Record) else {}
    reason = next((thing for name in _REASONS if (thing := things.get(name))), Text([]))
    reasons = reason.words if isinstance(reason, Text) and not reason.cut and not is_nothing(reason) else ""
    for name in _PROMPTS:
        if name in things and not is_nothing(things[name]):
            return _said(things[name]), reasons
    others = [thing for name, thing in things.items() if isinstance(thing, Text) and name not in (*_REASONS, *_PLACES)]
    others = [thing for thing in others if not is_nothing(thing)]
    if len(others) == 1:
        repairs.mend("took the only words for the prompt", number)
        return _said(others[0]), reasons
    raise Unusable("it does not say what should be there")


def is_nothing(node: Node) -> bool:
    """Whether something stands for nothing: ``null``, an empty text."""
    return isinstance(node, Text) and not node.cut and node.words.strip().lower() in _NOTHING


def _said(thing: Node) -> str:
    if getattr(thing, "cut", False):
        raise Unusable("the reply ended inside its prompt")
    parts = thing.things if isinstance(thing, Listing) else [thing]
    words = [part.words for part in parts if isinstance(part, Text)]
    if not words or len(words) != len(parts) or not "".join(words).strip():
        raise Unusable("it does not say what should be there")
    return ", ".join(words)


def _walk(node: Node, search: _Search) -> None:
    """Gather the suggestions in something; the names under which they are expected come before any others."""
    if is_item(node, loose=search.loose):
        search.items.append(node)
    elif isinstance(node, Record):
        things = node.named()
        held = next((things[name] for name in _LISTS if name in things), None)
        if held is not None:
            note_repeats(node, search.repairs)
            _take(held, search)
        else:
            for thing in inside(node):
                _walk(thing, search)
    elif isinstance(node, Listing):
        for thing in node.things:
            _walk(thing, search)


def _take(held: Node, search: _Search) -> None:
    """Gather what stands where suggestions are expected, also what is none, so that it is counted as left out."""
    if is_nothing(held):
        search.empty = True
    elif isinstance(held, Text):
        inner = read(held.words)  # JSON written into a text; texts inside that one are texts
        for how in ("read JSON that was written into a text", *inner.mended) if inner.nodes else ():
            search.repairs.mend(how)
        search.items += [one for node in inner.nodes for one in _items_of(node)] or [held]
    else:
        taken = _items_of(held)
        search.items += taken
        search.empty = not taken and not getattr(held, "cut", False)


def _items_of(held: Node) -> list[Node]:
    if is_item(held):
        return [held]
    rows = isinstance(held, Listing) and held.things and all(isinstance(thing, Number) for thing in held.things)
    if rows:
        return [held]
    return [one for thing in inside(held) for one in (_items_of(thing) if _holds_more(thing) else [thing])]


def _holds_more(node: Node) -> bool:
    """Whether something is brackets around suggestions, and none itself."""
    return isinstance(node, Listing) and not is_item(node) and any(isinstance(one, Record) for one in node.things)


def _is_numeric(node: Node) -> bool:
    held = list(inside(node))
    return bool(held) and all(isinstance(one, Number) or _is_numeric(one) for one in held)


def _may_be_place(node: Node) -> bool:
    """Whether something can hold numbers: "top left" is no place."""
    return not isinstance(node, Text) or node.cut or any(letter.isdigit() for letter in node.words)


def note_repeats(record: Record, repairs: Repairs, number: int | None = None) -> None:
    """Say so if a name stands in a record more than once, of which the last one counts."""
    names = [plain(name) for name, _ in record.fields if name]
    if len(set(names)) < len(names):
        repairs.mend("took the last of what has the same name", number)


def _summary(node: Node) -> str:
    if not isinstance(node, Record):
        return ""
    things = node.named()
    found = (things[name] for name in _SUMMARIES if name in things)
    return next((one.words for one in found if isinstance(one, Text) and not is_nothing(one)), "")


def _declined(node: Node) -> str:
    """The reason in a record that is an `Abstention`."""
    if not isinstance(node, Record) or {plain(name) for name, _ in node.fields} != {"reason"}:
        return ""
    reason = node.fields[-1][1]
    return reason.words if isinstance(reason, Text) and not node.cut else ""
