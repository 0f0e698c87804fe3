"""Every reply of a model is parsed as a critique or an abstention, and every repair is listed."""

import gc
import inspect
import json
import math
import re
import sys
import time
import tomllib
import tracemalloc
from importlib import import_module
from pathlib import Path
from re import _parser as patterns

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import artaug as aa
from artaug._internal.values import from_json, to_json
from artaug.critics import FAMILIES, Coordinates, parse_reply
from artaug.critics.replies import MAX_PROMPT_CHARS, MAX_REMARK_CHARS, MAX_REPLY_CHARS, MAX_SUGGESTIONS
from artaug.critics.replies.json_parser import (
    MAX_NESTING,
    ArrayNode,
    NumberNode,
    ObjectNode,
    StringNode,
    parse_json,
)
from support.strategies import boxes, critiques, nonblank_prompts

SIZE = (640, 480)
CONVENTIONS = {
    "yxyx": Coordinates("thousandths", order="yxyx"),
    "molmo": FAMILIES["molmo"],
    "molmo2": FAMILIES["molmo2"],
    "percent": Coordinates("percent"),
}
CORPUS = {
    f"{file.stem}/{name}": case
    for file in sorted((Path(__file__).parent / "corpus").glob("*.toml"))
    for name, case in tomllib.loads(file.read_text(encoding="utf-8")).items()
}


def parsed(text, coordinates="thousandths", **options):
    """The answer to a reply, which is a value that can be written to a file."""
    answer = parse_reply(text, size=SIZE, coordinates=coordinates, **options)
    assert isinstance(answer, aa.Critique | aa.Abstention)
    assert from_json(type(answer), to_json(answer)) == answer
    return answer


# --- the corpus --------------------------------------------------------------------------------------------------


def test_the_corpus_is_large():
    assert len(CORPUS) >= 150


@pytest.mark.parametrize("case", CORPUS.values(), ids=CORPUS)
def test_a_reply_of_the_corpus_is_parsed_as_expected(case):
    named = case.get("coordinates", "thousandths")

    answer = parsed(case["text"], CONVENTIONS.get(named, named))

    if "abstains" in case:
        assert isinstance(answer, aa.Abstention)
        assert case["abstains"] in answer.reason
        return
    assert isinstance(answer, aa.Critique), answer
    assert len(answer.suggestions) == case.get("suggestions", 1)
    if answer.suggestions:
        first = answer.suggestions[0]
        edges = first.box.left, first.box.top, first.box.right, first.box.bottom
        assert [round(1000 * edge, 6) for edge in edges] == case.get("box", [100, 200, 300, 400])
        assert first.prompt == case.get("prompt", "a lit window")
    if "repairs" in case:
        assert list(answer.repairs) == case["repairs"]


# --- what is well written is read as it is -------------------------------------------------------------------------

json_texts = st.text(st.characters(exclude_categories=["Cs"]))
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**300), 10**300)
    | st.floats(allow_nan=False, allow_infinity=False)
    | json_texts,
    lambda inner: st.lists(inner) | st.dictionaries(json_texts, inner),
    max_leaves=8,
)
json_documents = st.lists(json_values) | st.dictionaries(json_texts, json_values)


def as_python(node):
    match node:
        case ObjectNode():
            return {key: as_python(value) for key, value in node.members}
        case ArrayNode():
            return [as_python(item) for item in node.items]
        case NumberNode():
            return node.value
        case StringNode(unquoted=True):
            return {"true": True, "false": False, "null": None}[node.text]
    return node.text


def in_floats(document):
    """The document as the parser gives it, where every number is a float."""
    match document:
        case dict():
            return {key: in_floats(value) for key, value in document.items()}
        case list():
            return [in_floats(item) for item in document]
        case bool() | None | str():
            return document
    return float(document)


@given(json_documents, st.booleans(), st.sampled_from([None, 0, 2]))
@example({"": {"": {}}}, True, None)
@example({"a": 'x", "b": "y'}, False, None)
@example([1e-320, -0.0, 10**300, 2**70], False, None)
def test_valid_json_is_parsed_without_a_repair(document, ensure_ascii, indent):
    text = json.dumps(document, ensure_ascii=ensure_ascii, indent=indent)

    parsed_json = parse_json(text)

    assert [as_python(node) for node in parsed_json.nodes] == [in_floats(document)]
    assert parsed_json.repairs == ()


@st.composite
def written(draw):
    """A convention, a picture's size, and suggestions with whole numbers in that convention."""
    unit = draw(st.sampled_from(["relative", "percent", "thousandths", "pixels"]))
    order = draw(st.sampled_from(["xyxy", "yxyx", "xywh"]))
    convention = Coordinates(unit, order=order)
    size = draw(st.tuples(st.integers(20, 900), st.integers(20, 900)))
    fractions = st.sets(st.integers(0, 20), min_size=2, max_size=2).map(sorted)
    suggestions = []
    for _ in range(draw(st.integers(1, 6))):
        (left, right), (top, bottom) = draw(fractions), draw(fractions)
        box = aa.Box(left / 20, top / 20, right / 20, bottom / 20)
        suggestions.append((convention.encode(box, size=size), draw(plain_prompts), draw(remarks)))
    return convention, size, suggestions


plain_texts = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"], exclude_characters="<|"), max_size=60)
remarks = plain_texts.map(lambda text: " ".join(text.split()))
remarks = remarks.filter(lambda text: text.lower() not in {"null", "none", "nan", "undefined", "n/a"})
plain_prompts = remarks.filter(bool)


@given(written(), st.sampled_from(["box", "bbox_2d", "box_2d"]))
def test_a_valid_reply_gives_exactly_its_boxes_in_every_convention(reply, key):
    convention, size, suggestions = reply
    items = [{key: list(numbers), "prompt": prompt, "reason": reason} for numbers, prompt, reason in suggestions]

    answer = parse_reply(json.dumps({"suggestions": items}), size=size, coordinates=convention)

    boxes_of_edges = [convention.decode(numbers, size=size) for numbers, _, _ in suggestions]
    expected = [
        (aa.Box(*(min(max(edge, 0), 1) for edge in edges)), prompt, reason)
        for edges, (_, prompt, reason) in zip(boxes_of_edges, suggestions, strict=True)
    ]
    assert [(item.box, item.prompt, item.reason) for item in answer.suggestions] == expected
    assert answer.repairs == ()


large_boxes = boxes().filter(lambda box: box.width >= 0.01 and box.height >= 0.01)
clean = st.builds(
    aa.Critique,
    st.lists(st.builds(aa.Suggestion, large_boxes, plain_prompts, remarks), min_size=1, max_size=5),
    remarks,
)


@given(clean)
def test_a_critique_written_as_json_is_parsed_as_the_same_critique(critique):
    assert parsed(to_json(critique), "relative") == critique


@given(nonblank_prompts)
def test_an_abstention_written_as_json_is_parsed_as_an_abstention(reason):
    assert isinstance(parsed(to_json(aa.Abstention(reason))), aa.Abstention)


@given(critiques, st.text(), st.text())
def test_prose_around_a_critique_never_raises(critique, before, after):
    parsed(before + to_json(critique) + after, "relative")


def test_adjacent_surrogates_are_joined_to_a_character():
    answer = parsed('{"suggestions": [{"box": [100, 200, 300, 400], "prompt": "a \ud83d\ude00 face"}]}')
    assert answer.suggestions[0].prompt == "a \U0001f600 face"
    assert answer.repairs == ()


# --- nothing raises --------------------------------------------------------------------------------------------------

FRAGMENTS = [
    *'{}[]()":,\'"\\“”`;=#/*<>|.-+0123456789eE% \n\t\x00\ud800',
    *('{"suggestions": [', '{"box": [1, 2, 30, 40], ', '"prompt": "a"}', '"prompt": "', "]}", '"box"', ": [", "NaN"),
    *("null", "true", "```json", "<think>", "</think>", "<|box_start|>", "<|box_end|>", "<ref>", "</ref>", "<box>"),
    *(
        '<point x="5" y="5">',
        "</point>",
        "//",
        "/*",
        "*/",
        "1e999",
        "-Infinity",
        "\\u",
        "\\ud83d",
        "=>",
        "px",
        "window",
    ),
    *('{"x1": 1, "y1": 2, "x2": 3, "y2": 4}', "[[1, 2], [3, 4]]", '"suggestions": "', "{{", "}}", '\\"', "\u202e"),
]
mixtures = st.lists(st.sampled_from(FRAGMENTS), max_size=60).map("".join)
any_convention = st.sampled_from(["relative", "thousandths", "pixels", *FAMILIES.values()])


@given(st.text(), any_convention)
def test_any_text_is_parsed(text, convention):
    parsed(text, convention)


@given(mixtures, any_convention)
def test_any_mixture_of_typical_fragments_is_parsed(text, convention):
    parsed(text, convention)


@given(st.binary(max_size=300), st.sampled_from(["latin-1", "utf-16-le", "utf-8"]))
def test_bytes_that_are_not_text_are_parsed(data, encoding):
    parsed(data.decode(encoding, errors="replace" if encoding != "utf-8" else "surrogateescape"))


@st.composite
def mutated(draw):
    """Valid JSON with a few parts removed, doubled or overwritten."""
    text = draw(clean.map(to_json) | st.sampled_from([case["text"] for case in CORPUS.values()]))
    for _ in range(draw(st.integers(1, 6))):
        start, end = sorted(draw(st.tuples(*[st.integers(0, len(text))] * 2)))
        change = draw(st.sampled_from(["cut", "double", "overwrite", "end"]))
        middle = {"cut": "", "double": 2 * text[start:end], "overwrite": draw(mixtures), "end": text[start:end]}[change]
        text = text[:start] + middle + ("" if change == "end" else text[end:])
    return text


@given(mutated(), any_convention)
def test_damaged_replies_are_parsed(text, convention):
    parsed(text, convention)


NAMES = [
    *("suggestions", "regions", "boxes", "box", "bbox_2d", "points", "polygon", "prompt", "label", "text", "reason"),
    *("summary", "left", "top", "right", "bottom", "x1", "y1", "x2", "y2", "x", "y", "width", "height", "w", "h", ""),
]
leaves = st.sampled_from(["", " ", "null", "a lit window", "1, 2, 30, 40", "10%", "5px", "<|im_end|>", None, True])
near_replies = st.recursive(
    leaves | st.sampled_from([-5, 0, 0.2, 10, 300, 700, 1e308]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    max_leaves=14,
)


@given(near_replies, any_convention)
@example({"reason": ""}, "relative")
def test_any_arrangement_of_the_known_keys_is_parsed(document, convention):
    parsed(json.dumps([document]), convention)
    parsed(json.dumps(document), convention)


@given(json_documents, any_convention)
def test_json_about_something_else_is_parsed(document, convention):
    parsed(json.dumps(document), convention)


@given(st.lists(st.floats() | st.integers(), max_size=9), any_convention)
@example([1e308, 1e308, 1e308, 1e308], Coordinates("pixels", order="xywh"))
@example([-1e308, -1e308, 1e308, 1e308], Coordinates("relative", order="xywh"))
def test_any_numbers_give_a_box_or_an_abstention(numbers, convention):
    answer = parsed(json.dumps([{"box": numbers, "prompt": "a"}]), convention)
    if not all(map(math.isfinite, numbers)):
        assert isinstance(answer, aa.Abstention)


@pytest.mark.parametrize("size", [(0, 0), (-1, 5), (1, 900)])
def test_a_picture_size_that_no_processor_accepts_is_an_abstention(size):
    answer = parse_reply("[]", size=size, coordinates=FAMILIES["qwen2_5_vl"])
    assert answer.reason.startswith(f"a picture of {size[0]} x {size[1]} cannot be resized")


# --- bounded work ----------------------------------------------------------------------------------------------------

HOSTILE = {
    "brackets": "[",
    "closing brackets": "]",
    "braces": '{"a":',
    "braces in a listing": "[{",
    "pairs": "[]",
    "quotes": '"',
    "quotes in a record": '{"a":"',
    "quotes that may end": '{"a":"b" ',
    "quotes and commas": '["a",',
    "quotes, commas and spaces": '{"x":" ,',
    "spaces after quotes": '{"x":"        ',
    "missing quotes": '{"a":"b":"c":',
    "backslashes": "\\",
    "backslashes in a record": '{"a":"\\',
    "curly quotes": '{"a":“',
    "single quotes": "{'",
    "bare words": "{a:b c d e ",
    "bare names": "{a b:1,c ",
    "numbers": "[1,",
    "digits": "1",
    "digits in a listing": "[11111111111",
    "strayed names": '{"a":[1,"b":',
    "comments": '{"a":/*',
    "comments that end": '{"a":/**/',
    "commas": "[,",
    "colons": '{"a"::',
    "tags": "<box>",
    "references": "<ref><ref>a</ref><box>(1,2)",
    "points": '<point x="1" ',
    "thoughts": "<think>",
    "thoughts that end": "</think>",
    "suggestions": '{"suggestions":[{"box":[1,2,30,40],"prompt":"a"},',
    "suggestions in texts": '{"suggestions":"{\\"suggestions\\":\\"',
    "spaces": " ",
    "control characters": "\x00",
    "halves": "\ud800",
    "escapes": '{"a":"\\ud83d',
}


def work(text):
    """The number of function calls while a text is parsed, those of built-in functions included."""
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        parse_reply(text, size=SIZE, coordinates="thousandths")
    finally:
        sys.setprofile(before)
    return calls


@pytest.mark.parametrize("piece", HOSTILE.values(), ids=HOSTILE)
def test_work_grows_no_faster_than_the_reply(piece):
    shorter, longer = (work(piece * (length // len(piece))) for length in (4_000, 16_000))
    assert longer <= 4.5 * shorter + 200


# What a match or a copy costs shows in no count of calls. Half of each is the second text again and again, half the last.
HOSTILE_IN_ONE_CALL = {
    **{name: ("", "", "", piece) for name, piece in HOSTILE.items()},
    "round brackets in a box": ("<box>", "", "", "("),
    "square brackets in a box": ("<box>", "", "", "["),
    "boxes that do not end": ("", "", "", "a<box>"),
    "boxes of a long label": ("<ref>", "a", "</ref><box>", "(1,2),(3,4)"),
    "bad boxes of a hidden label": ("<ref>", "\x01", "</ref><box>", "(1,2),(903,904)"),
    "boxes after a long line": ("", "a", "", "<box>"),
    "numbers in brackets": ("", "a", "", "[[1,2,3,4]]"),
    "numbers in brackets that do not end": ("a [[", "", "", "1],["),
    "coordinates": ("<points coords='1", "", "", " 1 100 100"),
    "coordinates that do not end": ("<points ", "", "", "coords='1 "),
}


def hostile_reply(name, length):
    start, first, middle, last = HOSTILE_IN_ONE_CALL[name]
    return start + first * (length // 2) + middle + last * (length // 2 // len(last)) + "</box>"


def seconds(text):
    """The time of this process alone, without the garbage collector, whose work depends on all that is alive."""
    gc.disable()
    try:
        start = time.process_time()
        parse_reply(text, size=SIZE, coordinates="thousandths")
        return time.process_time() - start
    finally:
        gc.enable()


@pytest.mark.parametrize("name", HOSTILE_IN_ONE_CALL)
def test_time_grows_no_faster_than_the_reply(name):
    shorter, longer = (min(seconds(hostile_reply(name, length)) for _ in range(2)) for length in (5_000, 40_000))
    assert longer <= 8 * 2.5 * shorter + 0.02  # what is quadratic takes 64 times as long


@pytest.mark.parametrize("name", ["boxes of a long label", "bad boxes of a hidden label", "coordinates", "tags"])
def test_memory_grows_no_faster_than_the_reply(name):
    peaks = []
    for length in (5_000, 40_000):
        text = hostile_reply(name, length)
        tracemalloc.start()
        parse_reply(text, size=SIZE, coordinates="thousandths")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] <= 8 * 1.5 * peaks[0]


def test_the_count_of_calls_can_grow_faster():
    def quadratic(length):
        return [index.bit_length() for index in range(length**2)]

    calls = []
    for length in (50, 200):
        sys.setprofile(lambda *_: calls[-1:] and calls.append(calls.pop() + 1))
        calls.append(0)
        quadratic(length)
        sys.setprofile(None)
    assert calls[1] > 4.5 * calls[0] + 200


MODULES = ["json_parser", "json_strings", "suggestions", "boxes", "repairs", "markup"]


@pytest.mark.parametrize("module", ["artaug.critics.replies", *(f"artaug.critics.replies.{name}" for name in MODULES)])
def test_no_pattern_can_backtrack_without_bound(module):
    loaded = import_module(module)
    values = [value for value in vars(loaded).values() if isinstance(value, re.Pattern | dict)]
    candidates = [item for value in values for item in (value.values() if isinstance(value, dict) else [value])]
    for pattern in candidates:
        if isinstance(pattern, re.Pattern):
            assert not unbounded(pattern.pattern, pattern.flags), pattern.pattern
    assert "re.sub(" not in inspect.getsource(loaded)


def unbounded(pattern, flags=0):
    """The patterns with a repeat that has no upper bound and may backtrack."""

    def walk(part):
        if isinstance(part, patterns.SubPattern | list | tuple):
            parts = list(part)
            if len(parts) == 2 and (parts[0] is patterns.MAX_REPEAT or parts[0] is patterns.MIN_REPEAT):
                found.extend([pattern] if parts[1][1] == patterns.MAXREPEAT else [])
            for child in parts:
                walk(child)

    found = []
    walk(patterns.parse(pattern, flags & ~re.DEBUG))
    return found


def test_the_guard_against_backtracking_can_fail():
    assert unbounded(r"(a+)+b")
    assert not unbounded(r"a++b")


def test_ten_megabytes_are_parsed_up_to_the_limit():
    reply = '{"suggestions": [{"box": [100, 200, 300, 400], "prompt": "a lit window"}]} ' + "[ " * 5_000_000
    answer = parsed(reply)
    assert len(answer.suggestions) == 1
    assert answer.repairs[0] == f"read the first {MAX_REPLY_CHARS:,} of {len(reply):,} characters"


def test_text_beyond_the_limit_is_ignored():
    answer = parsed("." * MAX_REPLY_CHARS + '[{"box": [100, 200, 300, 400], "prompt": "a lit window"}]')
    assert isinstance(answer, aa.Abstention)


@pytest.mark.parametrize("depth", [MAX_NESTING - 4, MAX_NESTING, 100_000])
def test_nesting_of_any_depth_does_not_raise(depth):
    inner = '{"suggestions": [{"box": [100, 200, 300, 400], "prompt": "a lit window"}]}'
    answer = parsed("[" * depth + inner + "]" * depth)
    assert isinstance(answer, aa.Critique) == (depth < MAX_NESTING - 2)


def test_thousands_of_suggestions_are_truncated_to_the_limit():
    reply = json.dumps([{"box": [1, 2, 30 + number % 900, 400], "prompt": f"{number}"} for number in range(5000)])
    answer = parsed(reply)
    assert [suggestion.prompt for suggestion in answer.suggestions] == [
        str(number) for number in range(MAX_SUGGESTIONS)
    ]
    assert answer.repairs == ("read the first 32 of 5,000 suggestions",)
    assert len(parsed(reply, max_suggestions=3).suggestions) == 3


def test_thousands_of_boxes_for_one_prompt_are_truncated_too():
    reply = json.dumps([{"box": [[1, 2, 30, 40]] * 5000, "prompt": "a"}])
    assert len(parsed(reply).suggestions) == MAX_SUGGESTIONS


def test_thousands_of_bad_suggestions_make_a_short_reason():
    answer = parsed(json.dumps({"suggestions": [{"box": [1], "prompt": "a"}] * 5000}))
    assert answer.reason == (
        "none of the suggestions (5,000) can be used: its box is not four numbers "
        "(suggestions 1, 2, 3, 4, 5, 6, 7, 8 and 4,992 more)"
    )


def test_texts_are_truncated_to_the_limits():
    item = {"box": [100, 200, 300, 400], "prompt": "p" * 5000, "reason": "r" * 5000}
    answer = parsed(json.dumps({"summary": "s" * 5000, "suggestions": [item]}))
    assert len(answer.suggestions[0].prompt) == MAX_PROMPT_CHARS
    assert len(answer.suggestions[0].reason) == len(answer.summary) == MAX_REMARK_CHARS
    assert answer.repairs == (
        "truncated texts to 400 characters (suggestion 1)",
        "truncated texts to 1000 characters (suggestion 1)",
    )
