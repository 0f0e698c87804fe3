"""Finding the suggestions in parsed JSON, whatever their keys are called and however they are nested."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from artaug.critics.replies.boxes import named_edges
from artaug.critics.replies.json_parser import (
    ArrayNode,
    JsonNode,
    NumberNode,
    ObjectNode,
    StringNode,
    children,
    normalize_key,
    parse_json,
)
from artaug.critics.replies.repairs import Repairs, UnusableSuggestion

# Keys as `normalize_key` writes them; in each tuple the first key that is there wins.
_LIST_KEYS = (
    *("suggestions", "changes", "regions", "edits", "improvements", "modifications", "recommendations"),
    *("items", "boxes", "objects", "annotations", "detections", "results", "areas"),
)
_BOX_KEYS = (
    *("box", "bbox", "bbox2d", "box2d", "boundingbox", "boundingbox2d", "region", "area", "rect", "rectangle"),
    *("coordinates", "coords", "point2d", "point", "points", "position", "location", "polygon"),
)
_PROMPT_KEYS = (
    *("prompt", "modificationprompt", "newprompt", "modification", "description", "caption", "label", "text"),
    *("suggestion", "change", "edit", "content", "phrase", "name"),
)
_REASON_KEYS = ("reason", "why", "rationale", "explanation", "justification", "issue", "problem")
_SUMMARY_KEYS = ("summary", "overall", "overview", "analysis", "assessment", "comment")
_NULLS = frozenset({"", "null", "none", "nan", "undefined", "n/a"})
_NO_PROMPT = "it has no prompt"


@dataclass(frozen=True)
class ExtractedReply:
    """The suggestions of a reply as nodes, with what the reply says about the whole picture."""

    items: tuple[JsonNode, ...]
    summary: str = ""
    is_empty: bool = False
    """Whether the reply states that there is nothing to change: an empty list of suggestions."""
    refusal: str = ""
    """The reason the reply gives for not answering."""


@dataclass
class _Search:
    """The state of a search through one value of a reply."""

    repairs: Repairs
    loose: bool = False
    """Whether a box may stand under any key."""
    items: list[JsonNode] = field(default_factory=list)
    found_empty_list: bool = False


def extract_suggestions(nodes: Sequence[ObjectNode | ArrayNode], repairs: Repairs) -> ExtractedReply:
    """Find the suggestions of a reply.

    A reply that drafts and then answers holds several answers: the last complete one counts. Objects that are one
    suggestion each form one answer together. Only if no answer has a known key for its boxes, any key may hold them.
    """
    for loose in (False, True):
        answers, single_items = _answers(nodes, repairs, loose=loose)
        if len(answers) + bool(single_items) > 1:
            repairs.note("used the last complete answer of several")
        ranked = [
            *(
                answer
                for answer, complete in reversed(answers)
                if complete and (answer.is_empty or any(map(is_suggestion, answer.items)))
            ),
            *(answer for answer, complete in answers if not complete),
            *([ExtractedReply(tuple(single_items))] if single_items else []),
            *(answer for answer, _ in reversed(answers)),
        ]
        if ranked:
            return ranked[0]
    refusal = next((reason for node in nodes if (reason := _stated_refusal(node))), "")
    is_empty = any(isinstance(node, ArrayNode) and not (node.items or node.truncated) for node in nodes)
    return ExtractedReply((), is_empty=is_empty, refusal=refusal)


def _answers(
    nodes: Sequence[ObjectNode | ArrayNode], repairs: Repairs, *, loose: bool
) -> tuple[list[tuple[ExtractedReply, bool]], list[JsonNode]]:
    """The answers of a reply, each with whether it is complete; and the suggestions that stand alone."""
    answers: list[tuple[ExtractedReply, bool]] = []
    single_items: list[JsonNode] = []
    for node in nodes:
        if is_suggestion(node, loose=loose):
            single_items.append(node)
            continue
        search = _Search(repairs, loose)
        _visit(node, search)
        if search.items or search.found_empty_list:
            answer = ExtractedReply(tuple(search.items), _summary_text(node), is_empty=not search.items)
            answers.append((answer, not node.truncated))
    return answers, single_items


def is_suggestion(node: JsonNode, *, loose: bool = False) -> bool:
    """Whether a value may be one suggestion: an object with a box, or an array of numbers and strings."""
    if isinstance(node, ArrayNode):
        strings = [item for item in node.items if isinstance(item, StringNode) and not is_null(item)]
        numbers = [item for item in node.items if isinstance(item, NumberNode) or _is_numeric(item)]
        return bool(strings and numbers) and len(strings) + len(numbers) == len(node.items)
    if not isinstance(node, ObjectNode):
        return False
    values = node.by_key()
    if any(key in values for key in _BOX_KEYS) or named_edges(values) is not None:
        return True
    has_text = any(isinstance(value, StringNode) and not is_null(value) for value in values.values())
    return loose and has_text and any(_is_numeric(value) for value in values.values())


def box_node(item: JsonNode, repairs: Repairs, number: int) -> JsonNode:
    """The node that says where suggestion ``number`` belongs.

    Raises:
        UnusableSuggestion: if there is none.
    """
    if isinstance(item, ArrayNode):
        return ArrayNode([child for child in item.items if not isinstance(child, StringNode)], truncated=item.truncated)
    if isinstance(item, ObjectNode):
        values = item.by_key()
        boxes = [values[key] for key in _BOX_KEYS if key in values and _may_be_box(values[key])]
        if boxes:
            return boxes[0]
        if named_edges(values) is not None:
            without_text: list[tuple[str, JsonNode]] = [
                (key, value) for key, value in item.members if not isinstance(value, StringNode)
            ]
            return ObjectNode(without_text or item.members)
        numeric = [
            value for _, value in item.members if isinstance(value, ArrayNode | ObjectNode) and _is_numeric(value)
        ]
        if len(numeric) == 1:
            repairs.note("used the only numbers as the box", number)
            return numeric[0]
    raise UnusableSuggestion(
        "it has no box" + (", and the reply ends in it" if getattr(item, "truncated", False) else "")
    )


def prompt_and_reason(item: JsonNode, repairs: Repairs, number: int) -> tuple[str, str]:
    """What suggestion ``number`` says should be there, and why.

    Raises:
        UnusableSuggestion: if it does not say what should be there.
    """
    if isinstance(item, ArrayNode):
        prompt, *others = [child for child in item.items if isinstance(child, StringNode)] or [StringNode([])]
        return _prompt_text(prompt), " ".join(child.text for child in others if not child.truncated)
    values = item.by_key() if isinstance(item, ObjectNode) else {}
    first_reason = next((value for key in _REASON_KEYS if (value := values.get(key))), None)
    reason = ""
    if isinstance(first_reason, StringNode) and not first_reason.truncated and not is_null(first_reason):
        reason = first_reason.text
    for key in _PROMPT_KEYS:
        if key in values and not is_null(values[key]):
            return _prompt_text(values[key]), reason
    texts = [
        value
        for key, value in values.items()
        if isinstance(value, StringNode) and key not in (*_REASON_KEYS, *_BOX_KEYS) and not is_null(value)
    ]
    if len(texts) == 1:
        repairs.note("used the only text as the prompt", number)
        return _prompt_text(texts[0]), reason
    raise UnusableSuggestion(_NO_PROMPT)


def is_null(node: JsonNode) -> bool:
    """Whether a value stands for nothing: ``null``, an empty string."""
    return isinstance(node, StringNode) and not node.truncated and node.text.strip().lower() in _NULLS


def _prompt_text(node: JsonNode) -> str:
    if getattr(node, "truncated", False):
        raise UnusableSuggestion("the reply ended inside its prompt")
    parts = node.items if isinstance(node, ArrayNode) else [node]
    texts = [part.text for part in parts if isinstance(part, StringNode)]
    if not texts or len(texts) != len(parts) or not "".join(texts).strip():
        raise UnusableSuggestion(_NO_PROMPT)
    return ", ".join(texts)


def _visit(node: JsonNode, search: _Search) -> None:
    """Collect the suggestions in a value; a key where they are expected comes before all others."""
    if is_suggestion(node, loose=search.loose):
        search.items.append(node)
    elif isinstance(node, ObjectNode):
        values = node.by_key()
        expected = next((values[key] for key in _LIST_KEYS if key in values), None)
        if expected is not None:
            note_repeated_keys(node, search.repairs)
            _collect(expected, search)
        else:
            for child in children(node):
                _visit(child, search)
    elif isinstance(node, ArrayNode):
        for child in node.items:
            _visit(child, search)


def _collect(node: JsonNode, search: _Search) -> None:
    """Collect everything where suggestions are expected: what is no suggestion is counted as dropped later."""
    if is_null(node):
        search.found_empty_list = True
    elif isinstance(node, StringNode):
        inner = parse_json(node.text)  # JSON inside a string; strings inside that JSON are not parsed again
        for repair in ("parsed JSON inside a string", *inner.repairs) if inner.nodes else ():
            search.repairs.note(repair)
        search.items += [item for child in inner.nodes for item in _items_of(child)] or [node]
    else:
        items = _items_of(node)
        search.items += items
        search.found_empty_list = not items and not getattr(node, "truncated", False)


def _items_of(node: JsonNode) -> list[JsonNode]:
    if is_suggestion(node):
        return [node]
    if isinstance(node, ArrayNode) and node.items and all(isinstance(item, NumberNode) for item in node.items):
        return [node]
    return [item for child in children(node) for item in (_items_of(child) if _wraps_objects(child) else [child])]


def _wraps_objects(node: JsonNode) -> bool:
    """Whether an array only wraps suggestions and is none itself."""
    return (
        isinstance(node, ArrayNode)
        and not is_suggestion(node)
        and any(isinstance(item, ObjectNode) for item in node.items)
    )


def _is_numeric(node: JsonNode) -> bool:
    inner = list(children(node))
    return bool(inner) and all(isinstance(child, NumberNode) or _is_numeric(child) for child in inner)


def _may_be_box(node: JsonNode) -> bool:
    """Whether a value can hold numbers: the string "top left" cannot."""
    return not isinstance(node, StringNode) or node.truncated or any(letter.isdigit() for letter in node.text)


def note_repeated_keys(node: ObjectNode, repairs: Repairs, number: int | None = None) -> None:
    """Note if a key occurs more than once in an object; its last value counts."""
    keys = [normalize_key(key) for key, _ in node.members if key]
    if len(set(keys)) < len(keys):
        repairs.note("used the last value of a repeated key", number)


def _summary_text(node: JsonNode) -> str:
    if not isinstance(node, ObjectNode):
        return ""
    values = node.by_key()
    summaries = (values[key] for key in _SUMMARY_KEYS if key in values)
    return next((value.text for value in summaries if isinstance(value, StringNode) and not is_null(value)), "")


def _stated_refusal(node: JsonNode) -> str:
    """The reason in an object that is an `Abstention` written as JSON."""
    if not isinstance(node, ObjectNode) or {normalize_key(key) for key, _ in node.members} != {"reason"}:
        return ""
    reason = node.members[-1][1]
    return reason.text if isinstance(reason, StringNode) and not node.truncated else ""
