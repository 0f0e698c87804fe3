"""A run with a store is the run without one, whatever interrupts it, and goes on only as the run that it began as."""

import hashlib
import itertools
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import artaug as aa
from artaug._internal.memory import FittingBatches
from artaug.pairs import Kept
from artaug.run.events import StageClock, ignore_event
from artaug.run.parts import LoopParts
from artaug.run.stages import RoundStages
from artaug.run.storage.attempts import StoredAttempts
from artaug.run.storage.store import RunFolder
from artaug.scorers import Chroma
from artaug.testing import FixedCritic, FixedFilter, SwatchSynthesizer

HALF = aa.Box(0, 0, 0.5, 1)


class StopsHereError(Exception):
    """Ends a run from outside."""


@dataclass
class Calls:
    """Counts what is drawn, asked and judged, and fails at one call of all."""

    fail_at: int = -1
    """Index of the call."""
    done: list = field(default_factory=list)
    """What each finished call was about."""

    def note(self, *about):
        if self.fail_at == 0:
            self.fail_at = -1
            raise StopsHereError
        self.fail_at -= 1
        self.done.append(about)


@dataclass(frozen=True)
class Draws(aa.Synthesizer):
    calls: Calls = field(default_factory=Calls, repr=False)
    size: int = 16

    def synthesize(self, plan, *, seed):
        return self.synthesize_batch([plan], seeds=[seed])[0]

    def synthesize_batch(self, plans, *, seeds):
        self.calls.note(
            "draw", *((plan.prompt, seed, bool(plan.regions)) for plan, seed in zip(plans, seeds, strict=True))
        )
        return [
            SwatchSynthesizer(self.size, self.size).synthesize(plan, seed=seed)
            for plan, seed in zip(plans, seeds, strict=True)
        ]


@dataclass(frozen=True)
class Asks(aa.Critic):
    """Answers by the prompt's first letter; at ``t`` it times out once a picture."""

    calls: Calls = field(default_factory=Calls, repr=False)
    timed_out: list = field(default_factory=list, repr=False)

    def critique(self, image, prompt):
        key = prompt, hashlib.sha256(image.tobytes()).hexdigest()
        if prompt[0] == "t" and key not in self.timed_out:
            self.timed_out.append(key)
            raise TimeoutError("read timed out")
        self.calls.note("ask", *key)
        if prompt[0] == "a":
            return aa.Abstention("too dark")
        if prompt[0] == "n":
            return aa.Critique()
        return aa.Critique((aa.Suggestion(HALF, f"a window, {key[1][:6]}"),))


@dataclass(frozen=True)
class Plans(aa.RegionPlanner):
    calls: Calls = field(default_factory=Calls, repr=False)

    def plan(self, prompt, critique):
        self.calls.note("plan", prompt)
        return aa.GreedyPlanner().plan(prompt, critique)


@dataclass(frozen=True)
class Judges(aa.PairFilter):
    calls: Calls = field(default_factory=Calls, repr=False)

    def judge(self, pair):
        self.calls.note("judge", pair.prompt)
        return aa.Verdict(len(pair.prompt) % 2 == 0, "by length", {"brightness": sum(pair.after.getpixel((1, 1))) / 7})


def run(prompts, *, calls=None, timed_out=None, on_event=None, **options):
    calls = calls or Calls()
    parts = {
        "synthesizer": Draws(calls),
        "critic": Asks(calls, [] if timed_out is None else timed_out),
        "planner": Plans(calls),
        "keep": Judges(calls),
        "seed": 0,
        "batch_size": 2,
        "check": "arguments",
    }
    return aa.improve(prompts, on_event=on_event, **{**parts, **options})


def shown(attempt):
    """All of an attempt, as text and pixels."""
    if isinstance(attempt, aa.Skipped):
        return attempt
    pair = attempt.pair
    pixels = [(image.mode, image.size, image.tobytes()) for image in (pair.before, pair.after)]
    return type(attempt), pair.prompt, pair.seed, pair.plan, attempt.verdict, pixels


def stored(folder):
    return StoredAttempts(RunFolder(Path(folder)).round(1))


PROMPTS = st.lists(st.from_regex(r"[abnt][xyz]{0,3}", fullmatch=True), min_size=1, max_size=9)
FILTERS = st.sampled_from(
    [Judges(), aa.TopFraction(Chroma(), 0.5), FixedFilter(keep=False), aa.Gain(Chroma(), at_least=-1)]
)
BEST = st.sampled_from([None, aa.BestOf(2, by=Chroma()), aa.BestOf(3, by=Chroma())])


@settings(max_examples=25)
@given(PROMPTS, st.integers(1, 4), st.none() | st.integers(1, 5), FILTERS, BEST)
def test_with_a_store_or_without_the_attempts_are_the_same(prompts, batch_size, chunk_size, keep, candidates):
    options = {"batch_size": batch_size, "chunk_size": chunk_size, "keep": keep, "candidates": candidates}
    plain = [shown(attempt) for attempt in run(prompts, **options)]
    with TemporaryDirectory() as folder:
        timed_out: list = []
        assert [shown(attempt) for attempt in run(prompts, store=folder, timed_out=timed_out, **options)] == plain
        assert [shown(attempt) for attempt in stored(folder)] == plain
        assert len(stored(folder)) == len(prompts)
        calls = Calls()
        again = run(prompts, store=folder, calls=calls, **options)
        assert [shown(attempt) for attempt in again] == plain
        assert [done for done in calls.done if done[0] != "plan"] == []


def in_any_order(attempts):
    """A prompt that was put off comes last; after a stop its critic may answer at the first try."""
    return sorted(map(str, map(shown, attempts)))


def flat(calls):
    """What was drawn, asked and judged, one by one."""
    return [item for kind, *items in calls.done if kind == "draw" for item in items], [
        tuple(done) for done in calls.done if done[0] == "ask"
    ]


@pytest.mark.parametrize("candidates", [None, aa.BestOf(2, by=Chroma())], ids=["once", "best_of_2"])
def test_an_exception_at_any_call_of_any_part_changes_nothing_and_repeats_only_what_was_under_way(tmp_path, candidates):
    prompts = ["bx", "ty", "a", "by", "tz", "n"]
    calm = Calls()
    plain = in_any_order(run(prompts, calls=calm, candidates=candidates))
    for number in range(len(calm.done)):
        calls, timed_out, folder = Calls(fail_at=number), [], tmp_path / str(number)
        parts = {"calls": calls, "timed_out": timed_out, "store": folder, "candidates": candidates}
        with pytest.raises((StopsHereError, aa.ArtAugError)):
            list(run(prompts, **parts))
        assert in_any_order(run(prompts, **parts)) == plain
        drawn, asked = flat(calls)
        assert len(drawn) == len(set(drawn))
        assert len(asked) == len(set(asked))


@pytest.mark.parametrize("kind", [aa.run.events.ProgressEvent, aa.run.events.StageEvent, aa.run.events.AttemptEvent])
def test_an_exception_of_a_listener_at_any_event_loses_nothing(tmp_path, kind):
    prompts = ["bx", "ty", "a", "by"]
    events: list = []
    plain = in_any_order(run(prompts, on_event=events.append))
    for number in range(sum(isinstance(event, kind) for event in events)):
        left = [number]

        def listen(event, left=left):
            if isinstance(event, kind):
                left[0] -= 1
                if left[0] == -1:
                    raise StopsHereError

        calls, timed_out, folder = Calls(), [], tmp_path / f"{kind.__name__}-{number}"
        parts = {"calls": calls, "timed_out": timed_out, "store": folder}
        with pytest.raises(StopsHereError):
            list(run(prompts, on_event=listen, **parts))
        assert in_any_order(run(prompts, **parts)) == plain
        drawn, asked = flat(calls)
        assert len(drawn) == len(set(drawn))
        assert len(asked) == len(set(asked))


@dataclass(frozen=True)
class AnswersAtRandom(aa.Critic):
    """Never answers twice alike, and keeps what it has answered."""

    given: list = field(default_factory=list, repr=False)

    def critique(self, image, prompt):
        self.given.append(f"window {len(self.given)} {os.urandom(4).hex()}")
        return aa.Critique((aa.Suggestion(HALF, self.given[-1]),))


@pytest.mark.parametrize("number", range(8))
def test_what_a_random_critic_answered_before_the_stop_is_what_is_redrawn(tmp_path, number):
    critic, calls = AnswersAtRandom(), Calls(fail_at=number)
    parts = {"store": tmp_path, "critic": critic, "calls": calls, "batch_size": 1, "chunk_size": 3}
    with pytest.raises((StopsHereError, aa.ArtAugError)):
        list(run(["bx", "by", "bz"], **parts))
    attempts = list(run(["bx", "by", "bz"], **parts))
    assert len(critic.given) == 3
    for attempt, answer in zip(attempts, critic.given, strict=True):
        (region,) = attempt.pair.plan.regions
        assert answer in region.prompt
        redrawn = SwatchSynthesizer(16, 16).synthesize(attempt.pair.plan, seed=attempt.pair.seed)
        assert attempt.pair.after.tobytes() == redrawn.tobytes()


def test_an_answer_that_was_lost_is_asked_again_and_its_picture_drawn_again(tmp_path):
    critic, calls = AnswersAtRandom(), Calls(fail_at=6)  # after both redraws, at the first verdict
    parts = {"store": tmp_path, "critic": critic, "calls": calls, "batch_size": 1, "chunk_size": 2}
    with pytest.raises((StopsHereError, aa.ArtAugError)):
        list(run(["bx", "by"], **parts))
    (tmp_path / "round-1/work/0-00000/answer-0-0.json").write_bytes(b"")
    for attempt in run(["bx", "by"], **parts):
        redrawn = SwatchSynthesizer(16, 16).synthesize(attempt.pair.plan, seed=attempt.pair.seed)
        assert attempt.pair.after.tobytes() == redrawn.tobytes()
    assert len(critic.given) == 3


@settings(max_examples=12)
@given(st.lists(PROMPTS, min_size=2, max_size=4), st.integers(1, 4), BEST)
def test_prompts_added_later_leave_the_others_to_the_bit_and_make_chunks_of_their_own(groups, batch_size, candidates):
    options = {"batch_size": batch_size, "candidates": candidates}
    with TemporaryDirectory() as folder:
        prompts: list = []
        before: list = []
        for number, added in enumerate(groups):
            prompts += added
            store = aa.Store(folder, allow={"prompts"} if number else ())
            now = [shown(attempt) for attempt in run(prompts, store=store, **options)]
            assert now[: len(before)] == before
            assert [shown(attempt) for attempt in stored(folder)] == now
            before = now
        alone = {str(shown(attempt)) for attempt in run(prompts, **options)}
        assert {str(attempt) for attempt in before} == alone


def test_prompts_may_be_added_many_times(tmp_path):
    prompts = [f"b{number}" for number in range(13)]
    for count in range(1, 14):
        now = list(map(shown, run(prompts[:count], store=aa.Store(tmp_path, allow={"prompts"} if count > 1 else ()))))
    assert list(map(shown, stored(tmp_path))) == now == list(map(shown, run(prompts)))


def test_a_picture_of_another_mode_is_the_same_with_a_store_and_without(tmp_path):
    @dataclass(frozen=True)
    class DrawsGrey(aa.Synthesizer):
        def synthesize(self, plan, *, seed):
            return Image.new("LA", (8, 8), (seed % 256, 90 + 100 * bool(plan.regions)))

    with_store, without = (
        [shown(attempt) for attempt in run(["bx", "by"], synthesizer=DrawsGrey(), store=store)]
        for store in (tmp_path, None)
    )
    assert with_store == without


def test_pictures_of_several_sizes_in_one_call_are_kept(tmp_path):
    @dataclass(frozen=True)
    class DrawsByPrompt(Draws):
        def synthesize_batch(self, plans, *, seeds):
            pictures = super().synthesize_batch(plans, seeds=seeds)
            return [picture.resize((4 * len(plan.prompt), 8)) for picture, plan in zip(pictures, plans, strict=True)]

    prompts, calls = ["bx", "byy", "bzzz"], Calls(fail_at=2)

    parts = {"synthesizer": DrawsByPrompt(calls), "store": tmp_path, "calls": calls, "batch_size": 3}
    with pytest.raises((StopsHereError, aa.ArtAugError)):
        list(run(prompts, **parts))
    list(run(prompts, **parts))
    drawn, _ = flat(calls)
    assert len(drawn) == len(set(drawn)) == 6


# The folder --------------------------------------------------------------------------------------


def test_a_run_in_a_relative_folder_is_not_moved_by_a_change_of_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    stream = run(["bx", "by", "bz"], store="runs/first", batch_size=1)
    monkeypatch.chdir(tmp_path / "elsewhere")  # also before the first attempt, since `improve` is lazy
    first = next(stream)
    monkeypatch.chdir(tmp_path)
    attempts = [first, *stream]
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert [attempt.pair.before.size for attempt in attempts] == [(16, 16)] * 3
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_run_that_was_moved_goes_on_in_its_new_place(tmp_path):
    calls, timed_out = Calls(fail_at=6), []
    parts = {"calls": calls, "timed_out": timed_out}
    with pytest.raises((StopsHereError, aa.ArtAugError)):
        list(run(["bx", "by", "bz"], store=tmp_path / "a", **parts))
    (tmp_path / "a").rename(tmp_path / "b")
    attempts = [shown(attempt) for attempt in run(["bx", "by", "bz"], store=tmp_path / "b", **parts)]
    assert attempts == [shown(attempt) for attempt in run(["bx", "by", "bz"])]
    assert [shown(attempt) for attempt in stored(tmp_path / "b")] == attempts
    drawn, _ = flat(calls)
    assert len(drawn) == len(set(drawn))


def test_a_second_run_on_the_folder_is_refused_while_the_first_lives(tmp_path):
    first = run(["bx", "by"], store=tmp_path, batch_size=1)
    next(first)
    with pytest.raises(aa.StorageError, match="is in use"):
        list(run(["bx", "by"], store=tmp_path, batch_size=1))
    first.close()
    assert len(list(run(["bx", "by"], store=tmp_path, batch_size=1))) == 2


def test_an_index_and_a_slice_of_stored_attempts_are_those_of_a_list(tmp_path):
    attempts = list(map(shown, run(["bx", "ty", "bz", "a"], store=tmp_path)))
    found = stored(tmp_path)
    assert [shown(found[index]) for index in range(-4, 4)] == attempts + attempts
    assert [shown(attempt) for attempt in found[::-2]] == attempts[::-2]
    with pytest.raises(IndexError):
        found[4]


# What differs ------------------------------------------------------------------------------------

CHANGES = {
    "synthesizer": {"synthesizer": Draws(size=8)},
    "synthesizer.size": {"synthesizer": Draws(size=8)},
    "critic": {"critic": AnswersAtRandom()},
    "planner": {"planner": aa.GreedyPlanner()},
    "keep": {"keep": FixedFilter(keep=True)},
    "candidates": {"candidates": aa.BestOf(2, by=Chroma())},
    "seed": {"seed": 1},
    "batch_size": {"batch_size": 3},
    "chunk_size": {"chunk_size": 1},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_call_that_differs_is_refused_with_the_name_of_what_differs(tmp_path, name):
    list(run(["bx", "by"], store=tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(aa.StorageError, match=rf"(?s)other arguments.*- {name}\b.* then, .* now"):
        list(run(["bx", "by"], store=tmp_path, **CHANGES[name]))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_other_prompts_fewer_and_another_order_are_refused_whatever_is_allowed(tmp_path):
    list(run(["bx", "by"], store=tmp_path))
    for prompts in (["by", "bx"], ["bx"], ["bx", "bz"], ["bz", "bx", "by"]):
        with pytest.raises(aa.StorageError, match="prompts: other ones, or in another order"):
            run(prompts, store=aa.Store(tmp_path, allow={"prompts"}))
    with pytest.raises(aa.StorageError, match=r"(?s)prompts: 1 more than the 2 before.*allow=..prompts"):
        run(["bx", "by", "bz"], store=tmp_path)


def test_what_is_allowed_by_name_may_differ_and_what_is_finished_stays(tmp_path):
    first = [shown(attempt) for attempt in run(["bx", "by"], store=tmp_path)]
    allowed = aa.Store(tmp_path, allow={"keep", "prompts", "batch_size"})
    options = {"keep": FixedFilter(keep=True), "batch_size": 1, "chunk_size": 2}
    later = [shown(attempt) for attempt in run(["bx", "by", "bz"], store=allowed, **options)]
    assert later[:2] == first
    assert later[2][0] is Kept
    # From now on the run is what it was called last.
    assert [shown(attempt) for attempt in run(["bx", "by", "bz"], store=tmp_path, **options)] == later


def test_chunks_keep_their_size_and_the_seed_stays_whatever_is_allowed(tmp_path):
    list(run(["bx", "by", "bz"], store=tmp_path))
    for change in ({"batch_size": 1}, {"seed": 1}):
        names = {"chunk_size", *change}
        with pytest.raises(aa.StorageError, match=r"then, .* now \("):
            run(["bx", "by", "bz"], store=aa.Store(tmp_path, allow=names), **change)


def test_a_smaller_batch_that_was_allowed_is_smaller(tmp_path):
    calls = Calls(fail_at=8)
    with pytest.raises((StopsHereError, aa.ArtAugError)):
        list(run(["bx", "by", "bz", "bxx"], store=tmp_path, calls=calls))
    calls = Calls()
    store = aa.Store(tmp_path, allow={"batch_size"})
    list(run(["bx", "by", "bz", "bxx"], store=store, calls=calls, batch_size=1, chunk_size=2))
    assert {len(done) for done in calls.done if done[0] == "draw"} <= {2}


def test_a_name_that_nothing_has_is_refused(tmp_path):
    list(run(["bx"], store=tmp_path))
    with pytest.raises(aa.InvalidValueError, match="nothing is called 'prompt'"):
        run(["bx", "by"], store=aa.Store(tmp_path, allow={"prompt"}))


def test_what_changes_no_result_may_differ(tmp_path):
    list(run(["bx"], store=tmp_path))
    assert len(list(run(["bx"], store=tmp_path, on_event=print, check="scorers"))) == 1


def test_another_number_of_threads_or_another_version_is_named(tmp_path, monkeypatch):
    list(run(["bx"], store=tmp_path))
    versions = aa.run.storage.store.installed_versions()
    monkeypatch.setattr(
        aa.run.storage.store, "installed_versions", lambda: {**versions, "threads": "99", "torch": "0.1"}
    )
    with pytest.raises(aa.StorageError, match=r"(?s)threads: \d+ then, 99 now.*torch: .* then, 0.1 now"):
        run(["bx"], store=tmp_path)
    assert list(run(["bx"], store=aa.Store(tmp_path, allow={"threads", "torch"})))


def test_no_key_is_in_any_file_of_the_folder(tmp_path, monkeypatch):
    secret = "k3y-that-nobody-may-read"
    monkeypatch.setenv("SOME_API_KEY", secret)

    @dataclass(frozen=True)
    class Serves(aa.Critic):
        api_key: str = secret
        base_url: str = f"https://me:{secret}@host/v1?token={secret}"
        headers: dict = field(default_factory=lambda: {"X-Api-Key": secret})
        extra_body: tuple = (("authorization", secret),)
        note: str = f"used with {secret}"

        def critique(self, image, prompt):
            return aa.Critique((aa.Suggestion(HALF, "a window"),))

    list(run(["bx", "by"], store=tmp_path, critic=Serves()))
    assert all(secret.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    changed = Serves(api_key="another", base_url="https://you:word12@host/v1?token=another", headers={"X-Api-Key": "o"})
    assert len(list(run(["bx", "by"], store=tmp_path, critic=changed))) == 2


def test_a_critic_without_an_identity_is_refused_at_the_door_by_name(tmp_path):
    class Plain(aa.Critic):
        def __init__(self):
            self.client = object()

        def critique(self, image, prompt):
            raise AssertionError

    with pytest.raises(aa.InvalidValueError, match=r"critic\.client: this builtins.object cannot be distinguished"):
        run(["bx"], store=tmp_path / "run", critic=Plain())
    assert not (tmp_path / "run").exists()


def test_pictures_that_would_not_fit_on_the_disk_are_refused_before_the_first(tmp_path, monkeypatch):
    total = shutil.disk_usage(tmp_path)
    free = 2 * 3 * 1000 * 1000 * 3 * 3 // 4 - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: total._replace(free=free))

    class Large(Draws):
        picture_size = (1000, 1000)

    calls = Calls()
    with pytest.raises(aa.StorageError, match=r"6 pictures of 1000 x 1000 pixels takes 0.01 GiB"):
        run(["bx", "by", "bz"], store=tmp_path, synthesizer=Large(calls))
    with pytest.raises(aa.StorageError, match=r"12 pictures of 1000 x 1000"):
        run(["bx", "by", "bz"], store=tmp_path, synthesizer=Large(calls), candidates=aa.BestOf(2, by=Chroma()))
    assert not calls.done
    (tmp_path / "images" / "ab").mkdir(parents=True)
    (tmp_path / "images" / "ab" / "there.webp").write_bytes(b"there already")
    run(["bx", "by", "bz"], store=tmp_path, synthesizer=Large(calls))


def test_the_seconds_of_a_round_count_what_calls_before_took(tmp_path):
    def round_seconds(stop_after=None):
        clock = StageClock(1, ignore_event)
        stages = RoundStages(parts, folder.journal(), clock, seed=0, batches=FittingBatches(2), poll=lambda: None)
        attempts = stages.attempts(["a scene", "a moor", "a pond", "a hill"], groups=(4,))
        for _ in itertools.islice(attempts, stop_after):
            pass
        attempts.close()
        return clock.seconds

    parts = LoopParts(
        synthesizer=SwatchSynthesizer(),
        critic=FixedCritic(aa.Critique((aa.Suggestion(HALF, "a lamp"),))),
        planner=aa.GreedyPlanner(),
        keep=FixedFilter(keep=True),
        candidates=None,
        batch_size=2,
        chunk_size=None,
        placement=aa.Resident(),
    )
    folder = RunFolder(tmp_path).round(1)
    folder.begin((4,))
    round_seconds(stop_after=1)
    first = folder.chunk(folder.chunk_names()[0])
    whole = round_seconds()  # the second chunk had been drawn
    assert all(whole[stage] > first.seconds[stage] for stage in ("critique", "redraw", "judge"))
    assert whole["draw"] >= first.seconds["draw"]
    read = round_seconds()
    assert read == pytest.approx(
        {stage: sum(folder.chunk(name).seconds[stage] for name in folder.chunk_names()) for stage in read}
    )
