"""The file of decisions: the last decision counts, incomplete lines are ignored, invalid ones are named."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import artaug as aa
from artaug.errors import StorageError
from artaug.pairs import pair_digest
from artaug.review.decisions import append_decision, read_decisions
from support.strategies import pair

PAIRS = [pair(10 * index, 10 * index + 5 + index, seed=index) for index in range(4)]


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([True, False, None])), max_size=12))
def test_the_last_decision_on_a_pair_counts_and_comes_last(tmp_path_factory, decisions):
    path = tmp_path_factory.mktemp("review") / "deep" / "by-hand.jsonl"
    expected = {}
    for index, keep in decisions:
        append_decision(path, PAIRS[index], keep)
        expected.pop(index, None)
        expected |= {} if keep is None else {index: keep}
    assert list(read_decisions(path).items()) == [(pair_digest(PAIRS[index]), keep) for index, keep in expected.items()]
    if decisions:
        assert len(path.read_text(encoding="utf-8").splitlines()) == len(decisions)


def test_a_missing_file_and_an_empty_one_hold_no_decisions(tmp_path):
    path = tmp_path / "by-hand.jsonl"
    assert read_decisions(path) == {}
    path.touch()
    assert read_decisions(path) == {}
    append_decision(path, PAIRS[0], keep=False)
    assert read_decisions(path) == {pair_digest(PAIRS[0]): False}


def test_a_line_records_the_pair_the_decision_and_what_helps_a_person_to_find_it(tmp_path):
    path = tmp_path / "by-hand.jsonl"
    append_decision(path, replace(PAIRS[1], prompt="eine Tür"), keep=True)
    line = json.loads(path.read_text(encoding="utf-8"))
    assert line.pop("at").endswith("+00:00")
    assert line == {
        "pair": pair_digest(replace(PAIRS[1], prompt="eine Tür")),
        "keep": True,
        "prompt": "eine Tür",
        "seed": PAIRS[1].seed,
    }


def test_every_decision_is_flushed_to_the_disk(tmp_path, monkeypatch):
    sizes, path = [], tmp_path / "by-hand.jsonl"
    monkeypatch.setattr("os.fsync", lambda _descriptor: sizes.append(path.stat().st_size))
    for index in range(2):
        append_decision(path, PAIRS[index], keep=True)
    assert len(sizes) == 2
    assert sizes[1] == path.stat().st_size  # the line was in the file before the flush


def test_a_decision_belongs_to_what_the_pair_shows(tmp_path):
    stored = tmp_path / "stored.png"

    def reloaded(image):
        image.save(stored)
        return Image.open(stored).convert("RGB")

    original = PAIRS[1]
    same = [
        replace(original, before=reloaded(original.before), after=reloaded(original.after)),
        replace(original, seed=99, plan=aa.Plan("another")),
    ]
    others = [
        replace(original, prompt="x"),
        replace(original, before=original.after),
        replace(original, before=original.after, after=original.before),
    ]
    assert {pair_digest(other) for other in same} == {pair_digest(original)}
    assert len({pair_digest(other) for other in (original, *others)}) == 4


@pytest.mark.parametrize("length", range(1, 60, 7))
def test_an_incomplete_last_line_is_ignored_and_then_overwritten(tmp_path, length):
    path = tmp_path / "by-hand.jsonl"
    append_decision(path, PAIRS[0], keep=True)
    complete = path.read_bytes()
    append_decision(path, PAIRS[1], keep=False)
    path.write_bytes(path.read_bytes()[: len(complete) + length])

    assert read_decisions(path) == {pair_digest(PAIRS[0]): True}
    append_decision(path, PAIRS[2], keep=True)
    assert read_decisions(path) == {pair_digest(PAIRS[0]): True, pair_digest(PAIRS[2]): True}


def test_a_file_of_one_incomplete_line_is_emptied_before_the_next_decision(tmp_path):
    path = tmp_path / "by-hand.jsonl"
    path.write_bytes(b'{"pair": "a"')
    assert read_decisions(path) == {}
    append_decision(path, PAIRS[0], keep=True)
    assert read_decisions(path) == {pair_digest(PAIRS[0]): True}


def test_a_failed_write_leaves_the_decisions_as_they_were(tmp_path, monkeypatch):
    def fail(_descriptor):
        raise OSError("no space left on device")

    path = tmp_path / "by-hand.jsonl"
    append_decision(path, PAIRS[0], keep=True)
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        append_decision(path, PAIRS[1], keep=True)
    assert read_decisions(path)[pair_digest(PAIRS[0])]


@pytest.mark.parametrize(
    "line", ["not JSON", "[]", '{"pair": "a"}', '{"pair": 3, "keep": true}', '{"pair": "a", "keep": 1}', ""]
)
def test_an_invalid_line_is_named(tmp_path, line):
    path = tmp_path / "by-hand.jsonl"
    append_decision(path, PAIRS[0], keep=True)
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(StorageError, match=r"by-hand.jsonl', line 2 is not a decision"):
        read_decisions(path)
    with pytest.raises(StorageError, match=r"by-hand.jsonl', line 2 is not a decision"):
        aa.RecordedDecisions(path).judge(PAIRS[0])
