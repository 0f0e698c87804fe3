"""The bars of a run, and the events they are drawn from: what is counted, whose time a speed is, what time is said to be left."""

import io
import sys
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tqdm.auto import tqdm

import artaug as aa
from artaug._internal import progress_bar
from artaug.run.bars import RunBars, StageProgress, drawing_seconds_left
from artaug.testing import FixedFilter, SwatchSynthesizer

PROMPTS = [f"picture {number}" for number in range(6)]
BRIGHTER = aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a bright window"),))


class Clock:
    """Moved by the parts of a run, by hand."""

    now = 0.0
    calls: ClassVar[Counter[str]] = Counter()
    down = False


class SlowSynthesizer(aa.Synthesizer):
    """Five seconds a picture."""

    fingerprint = "five seconds a picture"

    def synthesize(self, plan, *, seed):
        Clock.now += 5
        Clock.calls[f"{seed} {bool(plan.regions)}"] += 1
        return SwatchSynthesizer(8, 8).synthesize(plan, seed=seed)


class SlowCritic(aa.Critic):
    """Four seconds an answer, by the number in the prompt."""

    def critique(self, image, prompt):
        Clock.now += 4
        Clock.calls[prompt] += 1
        if "nothing" in prompt:
            return aa.Critique(())
        return aa.Abstention("down", transient=Clock.down) if "abstains" in prompt else BRIGHTER


class SlowFilter(aa.PairFilter):
    """A second a pair; keeps those of even numbers."""

    def judge(self, pair):
        Clock.now += 1
        return aa.Verdict(int(pair.prompt[-1]) % 2 == 0, "by its number", {})


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    Clock.now, Clock.calls, Clock.down = 0.0, Counter(), False
    monkeypatch.setattr(time, "perf_counter", lambda: Clock.now)


def open_terminal(monkeypatch):
    """Write to a terminal, to which tqdm draws every change; in the test itself, since pytest sets its own before."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(progress_bar, "tqdm", partial(tqdm, mininterval=0, dynamic_ncols=False, ncols=150))
    return sys.stderr


def improved(on_event, prompts=PROMPTS, *, keep=None, batch_size=2, **options):
    return list(
        aa.improve(
            prompts,
            synthesizer=SlowSynthesizer(),
            critic=SlowCritic(),
            planner=aa.GreedyPlanner(),
            keep=SlowFilter() if keep is None else keep,
            seed=0,
            batch_size=batch_size,
            on_event=on_event,
            check="arguments",
            **{"progress": False} | options,
        )
    )


def shown(prompts=PROMPTS, *, show=True, **options):
    with RunBars(rounds=1, show=show) as bars:
        return improved(bars.on_event, prompts, **options)


def stop_after(count, wanted=aa.AttemptEvent):
    """A callback that ends the run at an event."""
    events = []

    def stop(event):
        events.append(event)
        if sum(isinstance(event, wanted) for event in events) == count:
            raise KeyboardInterrupt

    return stop


def test_a_log_gets_a_line_every_half_minute_with_the_yield_and_the_time_that_is_left(capsys):
    shown()
    # A chunk of two prompts takes 10 s to draw, 8 s to critique, 10 s to redraw and 2 s to judge.
    assert capsys.readouterr().err.splitlines() == [
        "round 1/1: 0/6 prompts (0%)",
        "round 1/1: 0/6 prompts (0%), judge 2/6 at 1 prompts/s, about 1 min 00 s to the training",
        "round 1/1: 2/6 prompts (33%), kept 1 of 2 (50%), judge 4/6 at 1 prompts/s, about 30 s to the training",
        "round 1/1: 4/6 prompts (67%), kept 2 of 4 (50%), judge 6/6 at 1 prompts/s",
        "round 1/1: 6/6 prompts (100%), kept 3 of 6 (50%)",
    ]


def test_what_is_on_disk_is_done_at_once_and_counts_in_no_speed(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        improved(stop_after(2), store=tmp_path / "run")
    Clock.now = 1000.0
    shown(store=tmp_path / "run")
    # A chunk is in the store when the next one is drawn: the second one has its first pictures, too.
    assert capsys.readouterr().err.splitlines() == [
        "round 1/1: 0/6 prompts (0%)",
        "round 1/1: 2/6 prompts (33%), kept 1 of 2 (50%), draw 6/6 at 5 s/picture, about 20 s to the training",
        "round 1/1: 6/6 prompts (100%), kept 3 of 6 (50%)",
    ]


def test_the_bars_move_within_a_chunk_and_give_the_speed_of_their_own_stage(monkeypatch):
    terminal = open_terminal(monkeypatch)
    shown(batch_size=6)
    drawn = terminal.getvalue()
    assert all(f"{number}/6 answers" in drawn for number in range(7))
    for line in ("draw    : 100%", "6/6 pictures, 5 s/picture", "6/6 answers, 4 s/answer", "6/6 prompts, 1 prompts/s"):
        assert line in drawn
    assert "it/s" not in drawn


def test_pictures_that_need_no_redraw_are_taken_out_of_what_is_left(monkeypatch):
    terminal = open_terminal(monkeypatch)
    prompts = [f"{'nothing' if number % 2 else 'picture'} {number}" for number in range(8)]
    times = {}

    def note(event):
        bars.on_event(event)
        if isinstance(event, aa.AttemptEvent) and event.prompt_index % 2:
            times[event.prompt_index] = (Clock.now, bars_left(bars))

    with RunBars(rounds=1, show=True) as bars:
        improved(note, prompts)
    # Two prompts: 10 s to draw, 8 s to critique, 5 s to redraw one, 1 s to judge it.
    assert "4/4 pictures, 5 s/picture" in terminal.getvalue()
    assert [now for now, _ in times.values()] == [24, 48, 72, 96]
    assert [left for _, left in times.values()] == ["about 1 min 12 s", "about 48 s", "about 24 s", None]


def bars_left(bars):
    """The time that the bar of the round says is left."""
    note = bars._round.title.note if bars._round else ""  # noqa: SLF001 - what is drawn, without the terminal around it
    return next((part.removesuffix(" to the training") for part in note.split(", ") if "to the training" in part), None)


def test_a_stage_that_has_not_begun_goes_at_its_speed_in_the_round_before():
    def at(total, done, seconds):
        progress = StageProgress(total=total)
        progress.add(aa.ProgressEvent(round_number=1, stage="draw", count=done, total=total, seconds=seconds))
        return progress

    before = {"draw": at(4, 4, 4.0), "critique": at(4, 4, 8.0), "redraw": at(4, 4, 4.0), "judge": at(4, 4, 2.0)}
    begun = {"draw": at(4, 2, 6.0), "critique": at(4, 0, 0.0), "redraw": at(4, 0, 0.0), "judge": at(4, 0, 0.0)}
    assert drawing_seconds_left(begun, {}) is None  # how long a critique takes is not known
    assert drawing_seconds_left(begun, before) == 2 * 3 + 4 * 2 + 4 * 1 + 4 * 0.5


def test_bars_are_closed_after_an_exception_so_that_the_next_one_has_the_first_line(monkeypatch):
    terminal = open_terminal(monkeypatch)
    with pytest.raises(KeyboardInterrupt), RunBars(rounds=1, show=True) as bars:  # noqa: PT012 - both belong to it

        def stop(event):
            bars.on_event(event)
            if isinstance(event, aa.ProgressEvent) and event.stage == "redraw" and event.count:
                raise KeyboardInterrupt

        improved(stop)
    assert terminal.getvalue().endswith("\n")
    with tqdm(total=1, file=io.StringIO()) as following:
        assert following.pos == 0


def test_improve_draws_its_own_and_has_no_training_to_wait_for(capsys):
    improved(None, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("improve: 0/6 prompts")
    assert lines[-1].startswith("improve: 6/6 prompts")
    assert any("left" in line for line in lines)
    assert not any("training" in line or "round" in line for line in lines)


def test_no_progress_shows_nothing(capsys):
    shown(show=False)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("batch_size", [2, 6])
def test_an_exception_of_on_event_ends_the_run_with_everything_kept(tmp_path, batch_size):
    events = []
    whole = improved(events.append, PROMPTS[:4], batch_size=batch_size)
    once = Clock.calls
    for stop in range(1, len(events) + 1, 3):
        Clock.calls, store = Counter(), tmp_path / f"run-{stop}"
        with pytest.raises(KeyboardInterrupt):
            improved(stop_after(stop, object), PROMPTS[:4], batch_size=batch_size, store=store)
        resumed = improved(None, PROMPTS[:4], batch_size=batch_size, store=store)
        assert Clock.calls == once  # nothing is drawn or asked twice
        assert [(type(end), end.pair.after.tobytes()) for end in resumed] == [
            (type(end), end.pair.after.tobytes()) for end in whole
        ]


@settings(max_examples=25)
@given(
    kinds=st.lists(st.sampled_from(["picture", "nothing", "abstains"]), min_size=1, max_size=5),
    down=st.booleans(),
    candidates=st.sampled_from([None, 2]),
    waits=st.booleans(),
    stop=st.integers(1, 60),
)
def test_counts_add_up_to_the_totals_however_a_run_went_and_wherever_it_stopped(
    tmp_path_factory, kinds, down, candidates, waits, stop
):
    prompts = [f"{kind} {number}" for number, kind in enumerate(kinds)]
    Clock.down = down
    options = {
        "keep": aa.TopFraction(aa.testing.FixedScorer(), fraction=0.5) if waits else FixedFilter(keep=True),
        "candidates": None if candidates is None else aa.BestOf(candidates, by=aa.testing.FixedScorer()),
        "store": tmp_path_factory.mktemp("run"),
    }
    with suppress(KeyboardInterrupt):
        improved(stop_after(stop, object), prompts, **options)
    events = []
    improved(events.append, prompts, **options)
    pictures = len(prompts) * (candidates or 1)
    unanswered = kinds.count("abstains") if down else 0
    expected = {
        "draw": pictures,
        "critique": pictures - unanswered * (candidates or 1),
        "redraw": kinds.count("picture") * (candidates or 1),
        "judge": len(prompts) - unanswered,
    }
    progress = [event for event in events if isinstance(event, aa.ProgressEvent)]
    assert {stage: sum(event.count for event in progress if event.stage == stage) for stage in expected} == expected
    assert sorted(event.prompt_index for event in events if isinstance(event, aa.AttemptEvent)) == [
        *range(len(prompts))
    ]
    assert all(event.seconds == 0 for event in progress if event.resumed)
    for stage in ("draw", "critique", "redraw", "judge"):
        done = 0
        for event in progress:
            done += event.count * (event.stage == stage)
            assert event.stage != stage or done <= event.total
