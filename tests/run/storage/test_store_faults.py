"""Faults of disks, files, memory and servers: what is on disk is read as it was or named, and the run goes on."""

import resource
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import artaug as aa
import artaug.critics.wrappers
from artaug.critics import Retried
from artaug.diffusion import DiffusersSynthesizer
from artaug.lora.lora import LowRank
from artaug.run.events import AttemptEvent, StageEvent
from artaug.run.storage.attempts import StoredAttempts
from artaug.run.storage.records import Member
from artaug.run.storage.round_folder import ResultRecord, RoundFolder
from artaug.run.storage.store import RunFolder
from artaug.testing import FixedCritic, FixedFilter
from support.clock import FakeTime
from support.disks import fill, read_only, small_disk
from support.tiny_flux import TINY_SIZE, tiny_flux

ADVICE = aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a bright window"),))
PROMPTS = ["a hill", "a pear", "a barn"]


class StopsHereError(Exception):
    """Ends a run from outside."""


@dataclass(frozen=True)
class Noise(aa.Synthesizer):
    """Draws noise, which no file makes small, and counts what it drew; how many at a time decides a pixel."""

    drawn: list = field(default_factory=list, repr=False)
    room: list = field(default_factory=lambda: [100], repr=False)
    """Pictures that memory has room for."""
    fail_at: list = field(default_factory=lambda: [-1], repr=False)
    """The number of the call that fails."""
    size: int = 64

    def synthesize(self, plan, *, seed):
        return self.synthesize_batch([plan], seeds=[seed])[0]

    def synthesize_batch(self, plans, *, seeds):
        if len(plans) > self.room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.fail_at[0] -= 1
        if self.fail_at[0] == -1:
            raise StopsHereError
        pictures = []
        for plan, seed in zip(plans, seeds, strict=True):
            self.drawn.append((plan.prompt, seed, bool(plan.regions)))
            pixels = np.random.default_rng([seed, len(plan.regions)]).integers(
                0, 256, (self.size, self.size, 3), np.uint8
            )
            pixels[0, 0] = len(plans)
            pictures.append(Image.fromarray(pixels))
        return pictures


def run(prompts=PROMPTS, **options):
    parts = {
        "synthesizer": Noise(),
        "critic": FixedCritic(ADVICE),
        "planner": aa.GreedyPlanner(),
        "keep": FixedFilter(keep=True),
        "seed": 0,
        "batch_size": 2,
        "check": "arguments",
    }
    return aa.improve(prompts, **{**parts, **options})


def shown(attempts):
    return [
        (
            attempt.pair.prompt,
            attempt.pair.seed,
            attempt.pair.before.tobytes(),
            attempt.pair.after.tobytes(),
            attempt.verdict,
        )
        for attempt in attempts
    ]


def round_of(folder):
    return RunFolder(Path(folder)).round(1)


# Files that are cut, spoiled or gone -------------------------------------------------------------


def spoiled(path):
    """Every beginning of a file, and the file with each byte changed; the file itself is put back."""
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        yield
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        yield
    path.write_bytes(whole)


@pytest.fixture
def folder(tmp_path):
    list(run(["a hill", "a pear"], store=tmp_path / "run", keep=aa.TopFraction(Bright(), 0.5)))
    return tmp_path / "run"


@dataclass(frozen=True)
class Bright(aa.Scorer):
    def score(self, image, prompt):
        return float(np.asarray(image).mean())


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("run.json", lambda folder: RunFolder(folder).read()),
        ("round-1/round.json", lambda folder: round_of(folder).groups()),
        ("round-1/attempts/0-00000.json", lambda folder: list(StoredAttempts(round_of(folder)))),
        ("round-1/verdicts.json", lambda folder: list(StoredAttempts(round_of(folder)))),
    ],
    ids=["run", "round", "chunk", "verdicts"],
)
def test_a_file_that_is_cut_or_spoiled_anywhere_is_named_with_what_to_do(folder, name, read):
    for _ in spoiled(folder / name):
        with pytest.raises(aa.StorageError, match=rf"(?s){name} is no .* or a damaged one: .*(copy|delete)"):
            read(folder)
    assert read(folder)


def test_a_result_that_is_cut_or_spoiled_anywhere_is_named_with_what_to_do(tmp_path):
    folder = round_of(tmp_path)
    folder.path.mkdir()
    lora = aa.LoRA({"layer": LowRank(torch.full((1, 3), 0.5), torch.ones(4, 1))})
    numbers = {"losses": (0.5,), "pairs": 1, "steps": 1, "training_seconds": 1.0, "validations": (), "skipped_steps": 0}
    folder.write_result(ResultRecord(**numbers, seconds={}, gain=None, accepted=True), learned=lora, combined=lora)
    record, learned, combined = folder.result()
    for _ in spoiled(folder.path / "result.safetensors"):
        with pytest.raises(
            aa.StorageError, match=r"(?s)result.safetensors is no result of a round, or a damaged one.*delete it"
        ):
            folder.result()
    assert (record.losses, learned.digest, combined.digest) == ((0.5,), lora.digest, lora.digest)


@pytest.mark.parametrize("kind", ["call", "answer"])
def test_a_file_of_the_chunk_under_way_that_is_cut_or_spoiled_is_made_again(tmp_path, kind, caplog):
    synthesizer = Noise(fail_at=[1])
    with pytest.raises((StopsHereError, aa.ArtAugError)):
        list(run(["a hill"], store=tmp_path, synthesizer=synthesizer))
    folder, plans = round_of(tmp_path), {Member(0, 0): aa.Plan("a hill")}
    (path,) = (tmp_path / "round-1/work/0-00000").glob(f"{kind}-*.json")
    whole = path.read_bytes()
    for _ in spoiled(path):
        chunk = folder.journal().begin("0-00000")
        assert not (chunk.drawn("draw", plans) if kind == "call" else chunk.answers())
    path.write_bytes(whole)
    chunk = folder.journal().begin("0-00000")
    assert chunk.answers() == {Member(0, 0): ADVICE}
    assert list(chunk.drawn("draw", plans)) == [Member(0, 0)]
    assert not chunk.drawn("draw", {Member(0, 0): aa.Plan("another")})
    assert len(caplog.records) >= len(whole)


def test_calls_after_one_that_is_gone_did_not_happen(tmp_path):
    synthesizer = Noise(fail_at=[4])
    parts = {"store": tmp_path, "synthesizer": synthesizer, "batch_size": 1, "chunk_size": 3}
    with pytest.raises((StopsHereError, aa.ArtAugError)):
        list(run(**parts))
    work = tmp_path / "round-1/work/0-00000"
    (work / "call-00001.json").unlink()
    attempts = shown(run(**parts))
    assert attempts == shown(run(batch_size=1, chunk_size=3))
    assert len(synthesizer.drawn) == 6 + 3


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["run.json"], r"run.json is gone, and there are rounds beside it.*copy"),
        (["round-1/round.json"], r"round.json is gone, and the round has attempts.*copy"),
    ],
    ids=["run", "round"],
)
def test_a_file_that_is_gone_and_cannot_be_made_again_is_named(folder, names, message):
    for name in names:
        (folder / name).unlink()
    with pytest.raises(aa.StorageError, match=message):
        list(run(["a hill", "a pear"], store=folder, keep=aa.TopFraction(Bright(), 0.5)))


@pytest.mark.parametrize("name", ["round-1/attempts/0-00000.json", "round-1/verdicts.json"])
def test_attempts_that_are_gone_are_no_shorter_list_and_are_made_again(folder, name):
    whole = shown(StoredAttempts(round_of(folder)))
    (folder / name).unlink()
    with pytest.raises(aa.StorageError, match=r"has 0 attempts of 2: files are gone"):
        list(StoredAttempts(round_of(folder)))
    list(run(["a hill", "a pear"], store=folder, keep=aa.TopFraction(Bright(), 0.5)))
    assert shown(StoredAttempts(round_of(folder))) == whole


def test_a_chunk_of_other_prompts_is_refused(tmp_path):
    list(run(PROMPTS, store=tmp_path))
    attempts = tmp_path / "round-1/attempts"
    (attempts / "0-00001.json").rename(attempts / "0-00000.json")
    with pytest.raises(aa.StorageError, match="chunk 0-00000 on disk has 1 prompts, from number 2 on"):
        list(run(PROMPTS, store=tmp_path))


# Pictures ----------------------------------------------------------------------------------------


def test_a_damaged_picture_of_the_chunk_under_way_is_drawn_again(tmp_path):
    synthesizer = Noise(fail_at=[1])
    with pytest.raises((StopsHereError, aa.ArtAugError)):
        list(run(store=tmp_path, synthesizer=synthesizer))
    first = next((tmp_path / "images").rglob("*.webp"))
    first.write_bytes(first.read_bytes()[:-20])
    assert shown(run(store=tmp_path, synthesizer=synthesizer)) == shown(run())
    assert len(synthesizer.drawn) == 6 + 2


def test_a_damaged_picture_of_a_finished_chunk_is_named_with_its_chunk_and_what_to_do(folder):
    (folder / "round-1/verdicts.json").unlink()
    attempts = folder / "round-1/attempts/0-00000.json"
    for damaged in (folder / "images").rglob("*.webp"):
        damaged.write_bytes(b"RIFF")
    options = {"store": folder, "keep": aa.TopFraction(Bright(), 0.5)}
    with pytest.raises(aa.StorageError, match=r"the picture .*webp cannot be used") as caught:
        list(run(["a hill", "a pear"], **options))
    assert any(str(attempts) in note and "delete that file" in note for note in caught.value.__notes__)
    attempts.unlink()
    assert shown(run(["a hill", "a pear"], **options)) == shown(run(["a hill", "a pear"], keep=options["keep"]))


@pytest.fixture(scope="module")
def flux():
    return DiffusersSynthesizer(
        pipeline=tiny_flux(), guide=aa.OutputMix(), width=TINY_SIZE, height=TINY_SIZE, steps=1, max_sequence_length=32
    )


def test_a_damaged_picture_that_a_training_needs_is_named_and_its_chunk_can_be_made_again(flux, tmp_path):
    def listen(event):
        if isinstance(event, AttemptEvent) and event.prompt_index == 1:
            raise StopsHereError

    def enhance(store, on_event=None):
        return aa.enhance(
            PROMPTS[:2],
            synthesizer=flux,
            critic=FixedCritic(ADVICE),
            planner=aa.GreedyPlanner(),
            keep=FixedFilter(keep=True),
            trainer=aa.DifferentialLoRATrainer(rank=1, steps=1, batch_size=1),
            rounds=1,
            progress=False,
            check="arguments",
            store=store,
            on_event=on_event,
        )

    with pytest.raises(StopsHereError):
        enhance(tmp_path, listen)
    damaged = next((tmp_path / "images").rglob("*.webp"))
    damaged.write_bytes(b"RIFF")
    with pytest.raises(aa.StorageError, match=damaged.name) as caught:
        enhance(tmp_path)
    attempts = tmp_path / "round-1/attempts/0-00000.json"
    assert any(str(attempts) in note for note in caught.value.__notes__)
    attempts.unlink()
    assert enhance(tmp_path).lora.digest == enhance(None).lora.digest


# Disks -------------------------------------------------------------------------------------------


@contextmanager
def no_file_longer_than(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100, 600, 2000])
def test_a_disk_that_is_full_ends_the_run_in_order_and_with_room_again_it_goes_on(tmp_path, size):
    synthesizer = Noise()
    with no_file_longer_than(size), pytest.raises(aa.StorageError, match="could not be written"):
        list(run(store=tmp_path, synthesizer=synthesizer))
    assert shown(run(store=tmp_path, synthesizer=synthesizer)) == shown(run())
    assert len(synthesizer.drawn) <= 6 + 4  # the chunk under way: an error of one call is raised by the next


def test_a_small_disk_that_is_full_and_gets_room_again(tmp_path):
    with small_disk(tmp_path / "disk", "2m") as disk:
        synthesizer, prompts = Noise(), PROMPTS * 2
        stream = run(prompts, store=disk / "run", synthesizer=synthesizer)
        next(stream)
        filling = fill(disk)
        with pytest.raises(aa.StorageError, match="No space left"):
            list(stream)
        filling.unlink()
        assert shown(run(prompts, store=disk / "run", synthesizer=synthesizer)) == shown(run(prompts))
        assert len(synthesizer.drawn) <= 12 + 4


def test_a_read_only_folder_is_refused_at_the_door(tmp_path):
    with small_disk(tmp_path / "disk", "2m") as disk:
        list(run(store=disk / "run"))
        with read_only(disk), pytest.raises(aa.StorageError, match="cannot be written to"):
            run(store=disk / "run")


def test_a_clock_that_goes_back_changes_nothing(tmp_path, monkeypatch):
    now, parts = time.time(), {"store": tmp_path, "synthesizer": Noise(fail_at=[2])}
    with pytest.raises((StopsHereError, aa.ArtAugError)):
        list(run(**parts))
    monkeypatch.setattr(time, "time", lambda: now - 10 * 365 * 24 * 3600)
    assert shown(run(**parts)) == shown(run())
    assert len(parts["synthesizer"].drawn) == 6


# Memory, servers, scores -------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("room", [2, 100], ids=["as_before", "room_again"])
def test_after_a_halved_batch_the_same_calls_are_made(tmp_path, number, room, caplog):
    prompts = [f"a scene {number}" for number in range(6)]
    options = {"batch_size": 4, "chunk_size": 5}
    whole = shown(run(prompts, synthesizer=Noise(room=[2]), **options))
    caplog.clear()
    synthesizer = Noise(room=[2], fail_at=[number])
    with pytest.raises((StopsHereError, aa.ArtAugError)):
        list(run(prompts, synthesizer=synthesizer, store=tmp_path, **options))
    assert sum("ran out of memory" in record.message for record in caplog.records) == 1
    synthesizer.room[0] = room
    assert shown(run(prompts, synthesizer=synthesizer, store=tmp_path, **options)) == whole
    assert len(synthesizer.drawn) == 12


@dataclass(frozen=True)
class Down(aa.Critic):
    """A server that is down for the first minute."""

    clock: FakeTime = field(repr=False)
    asked: list = field(default_factory=list, repr=False)

    def critique(self, image, prompt):
        if self.clock.now < 60:
            raise ConnectionError("refused")
        self.asked.append(prompt)
        return ADVICE


def test_a_critic_that_is_down_for_a_minute_costs_nothing(tmp_path, monkeypatch):
    clock = FakeTime()
    monkeypatch.setattr(artaug.critics.wrappers, "time", clock)
    critic, synthesizer = Down(clock), Noise()
    assert shown(run(store=tmp_path, critic=Retried(critic), synthesizer=synthesizer)) == shown(run())
    assert sorted(critic.asked) == sorted(PROMPTS)
    assert len(synthesizer.drawn) == 6
    assert 60 <= clock.now < 180


@dataclass(frozen=True)
class NaNAtFirst(aa.Scorer):
    numbers: list = field(default_factory=lambda: [0.0, 1.0, float("nan")], repr=False)

    def score(self, image, prompt):
        return self.numbers.pop(0) if self.numbers else 1.0


def test_a_score_that_is_nan_stops_the_run_and_nothing_is_drawn_again(tmp_path):
    scorer, synthesizer = NaNAtFirst(), Noise()
    parts = {"store": tmp_path, "keep": aa.Gain(scorer, at_least=0), "synthesizer": synthesizer}
    with pytest.raises(aa.ArtAugError, match="NaNAtFirst"):
        list(run(**parts))
    assert len(list(run(**parts))) == 3
    assert len(synthesizer.drawn) == 6


def test_a_stage_that_was_resumed_is_not_timed_again(tmp_path):
    events: list = []
    list(run(store=tmp_path))
    list(run(store=tmp_path, on_event=events.append))
    assert not [event for event in events if isinstance(event, StageEvent)]
    assert isinstance(round_of(tmp_path), RoundFolder)
