"""A store writes the pictures of a call while the next ones are drawn, and what it could not write is not lost silently."""

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import artaug as aa
from artaug.run.improve import improve
from artaug.run.storage.store import RunFolder
from artaug.testing import FixedCritic, FixedFilter, SwatchSynthesizer

PROMPTS = [f"scene {number}" for number in range(6)]
TIMEOUT_S = 20


@dataclass
class Observed(aa.Synthesizer):
    """Counts its calls, and fails at one of them."""

    fails_at: int | None = None
    calls: list = field(default_factory=list, repr=False)
    identity = "swatches"

    @property
    def draws_regions(self):
        return True

    @property
    def picture_size(self):
        return SwatchSynthesizer().picture_size

    def synthesize(self, plan, *, seed):
        return self.synthesize_batch([plan], seeds=[seed])[0]

    def synthesize_batch(self, plans, *, seeds):
        if len(self.calls) == self.fails_at:
            raise KeyError("a bug")
        self.calls.append(len(plans))
        return [SwatchSynthesizer().synthesize(plan, seed=seed) for plan, seed in zip(plans, seeds, strict=True)]

    def with_lora(self, lora, *, scale=1.0):
        return self


def start(store, synthesizer, **options):
    critique = aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a bright window"),))
    return improve(
        PROMPTS,
        synthesizer=synthesizer,
        critic=FixedCritic(critique),
        planner=aa.GreedyPlanner(),
        keep=FixedFilter(keep=True),
        seed=0,
        batch_size=2,
        store=store,
        **options,
    )


def writers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("artaug-store")]


def replace_writing(monkeypatch, write):
    original = aa.ImageFolder.add_all
    monkeypatch.setattr(aa.ImageFolder, "add_all", lambda self, images: write(lambda: original(self, images)))


def test_pictures_are_written_while_the_next_ones_are_drawn(tmp_path, monkeypatch):
    synthesizer, written = Observed(), []

    def write(work):
        deadline = time.monotonic() + TIMEOUT_S
        while len(synthesizer.calls) < min(len(written) + 2, 6) and time.monotonic() < deadline:
            time.sleep(0.001)
        written.append(len(synthesizer.calls))
        return work()

    replace_writing(monkeypatch, write)
    attempts = list(start(tmp_path, synthesizer))
    assert all(drawn >= number + 2 for number, drawn in enumerate(written[:-1]))  # the call after it has begun
    assert len(attempts) == len(PROMPTS)
    assert synthesizer.calls == [2] * 6


def test_an_attempt_that_is_given_has_its_pictures_on_disk(tmp_path):
    for attempt in start(tmp_path, Observed()):
        assert all(Path(file.path).exists() for file in attempt.pair.references)
        name = f"0-{int(attempt.pair.prompt[-1]) // 2:05d}"
        assert name in RunFolder(tmp_path).round(1).chunk_names()


@pytest.mark.parametrize("fails_at", range(6))
def test_what_cannot_be_written_ends_the_run_which_goes_on_from_there(tmp_path, monkeypatch, fails_at):
    calls, written = [], []

    def write(work):
        calls.append(None)
        if len(calls) - 1 == fails_at:
            raise aa.StorageError("the disk is full")
        written.append(work())
        return written[-1]

    with monkeypatch.context() as patch:
        replace_writing(patch, write)
        with pytest.raises(aa.StorageError, match="the disk is full"):
            list(start(tmp_path, Observed()))
    assert not writers()
    synthesizer = Observed()
    resumed = list(start(tmp_path, synthesizer))
    assert len(synthesizer.calls) == 6 - len(written)  # what was written is not drawn again
    assert len(written) >= fails_at
    assert [attempt.pair for attempt in resumed] == [attempt.pair for attempt in start(tmp_path / "whole", Observed())]


def test_a_chunk_is_finished_although_the_next_one_cannot_be_drawn(tmp_path):
    with pytest.raises(aa.ArtAugError):
        list(start(tmp_path, Observed(fails_at=2)))
    assert RunFolder(tmp_path).round(1).chunk_names() == ["0-00000"]
    assert not writers()


def test_a_run_that_is_left_half_way_leaves_no_thread_and_keeps_what_was_drawn(tmp_path):
    iterator, synthesizer = start(tmp_path, Observed()), Observed()
    next(iterator)
    iterator.close()
    assert not writers()
    assert len(list(start(tmp_path, synthesizer))) == len(PROMPTS)
    assert synthesizer.calls == [2] * 3  # the first chunk, and the first pictures of the second one, are there
