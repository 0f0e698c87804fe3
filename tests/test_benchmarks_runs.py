"""The benchmark of a run's store: a row for every case, in small."""

from dataclasses import replace

import pytest
from benchmarks import _run_doubles as doubles
from benchmarks import runs

import artaug as aa
from artaug.run.storage.attempts import StoredAttempts


@pytest.fixture
def case(monkeypatch):
    monkeypatch.setattr(runs, "SIZE", 32)
    synthesizer = doubles.PhotoSynthesizer(32)
    return runs.Loop("small", synthesizer, doubles.ThreeBoxes(), doubles.EveryOther(), doubles.prompts(5), repeats=2)


def test_the_loop_is_timed_with_a_store_and_without(case, tmp_path):
    row = runs.loop_row(case, tmp_path)
    assert (row["case"], row["prompts"], row["repeats"]) == ("small", 5, 2)
    assert 0 < row["low"] <= row["ratio"] <= row["high"]
    assert not list(tmp_path.iterdir())


def test_pictures_of_the_doubles_differ_unless_they_are_to_repeat():
    plan = aa.Plan("a market")
    few = doubles.PhotoSynthesizer(32, distinct=3)
    assert len({few.synthesize(plan, seed=seed).tobytes() for seed in range(20)}) == 3
    all_differ = replace(few, distinct=None)
    assert len({all_differ.synthesize(plan, seed=seed).tobytes() for seed in range(20)}) == 20


def test_a_round_that_is_written_directly_reads_as_one_that_was_run(tmp_path):
    texts = doubles.prompts(20)
    written = doubles.round_folder(tmp_path / "written")
    doubles.write_round(written, len(texts))
    run = aa.improve(
        texts,
        synthesizer=doubles.PhotoSynthesizer(32),
        critic=doubles.ThreeBoxes(),
        planner=aa.GreedyPlanner(),
        keep=doubles.EveryOther(),
        seed=0,
        store=tmp_path / "run",
    )
    assert [type(attempt) for attempt in StoredAttempts(written)] == [type(attempt) for attempt in run]
    folder = doubles.round_folder(tmp_path / "run")
    assert written.chunk_names() == folder.chunk_names()
    chunks = [[record.chunk(name) for name in record.chunk_names()] for record in (written, folder)]
    for ours, theirs in zip(*chunks, strict=True):
        assert [(end.prompt_index, end.reason, end.stage) for end in ours.ends] == [
            (end.prompt_index, end.reason, end.stage) for end in theirs.ends
        ]
        assert [(record.plan, record.answer) for record in ours.candidates] == [
            (record.plan, record.answer) for record in theirs.candidates
        ]
        assert [call.members for call in ours.calls] == [call.members for call in theirs.calls]


def test_memory_and_reading_are_measured_and_drawn(case, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "in_process", lambda work, *arguments: work(*arguments))
    rows = [
        runs.loop_row(case, tmp_path),
        *runs.memory_rows(tmp_path, (2, 4), distinct=None),
        *runs.reading_rows(tmp_path, (8, 24)),
        *runs.parts(tmp_path, repeats=1),
    ]
    memory = [row for row in rows if row["what"] == "memory"]
    assert [(row["case"], row["prompts"]) for row in memory] == [("store", 2), ("no store", 2), ("store", 4)]
    assert "peak_kb_per_prompt" in memory[-1]
    reading = [row for row in rows if row["what"] == "reading"]
    assert [row["attempts"] for row in reading if row["case"] == "all attempts"] == [8, 24]
    assert [row["files"] for row in reading if row["case"] == "all attempts"] == [2, 4]  # a chunk each, and the round's
    assert [row["seconds"] > 0 for row in reading if row["case"] == "list of pairs"] == [True, True]
    assert all(row["ms"] > 0 for row in rows if row["what"] == "part")
    assert len(runs.plot(rows).axes) == 3
