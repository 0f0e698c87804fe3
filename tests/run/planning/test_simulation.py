"""The loop in simulated time: to the second what the real stages take whose parts take the same, and bounded by arithmetic."""

import math
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import artaug as aa
from artaug import synthesis
from artaug._internal.memory import FittingBatches
from artaug.run import chunk_run, events
from artaug.run.parts import LoopParts
from artaug.run.planning.simulation import LoopCosts, LoopPlaces, simulate, simulate_held_out
from artaug.run.stages import RoundStages
from artaug.run.storage.journal import ChunkJournal, RoundJournal
from artaug.testing import FixedFilter, SwatchSynthesizer

ADVICE = aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a bright window"),))


@dataclass
class Clock:
    """Stands in for the module ``time``: moved by parts that take time, in this thread or in a lane's."""

    now: float = 0.0
    calls: list = field(default_factory=list)
    """Of lanes, not done: when each ends, and what it is."""
    is_in_lane: bool = False

    def perf_counter(self):
        return self.now

    monotonic = perf_counter

    def work(self, seconds):
        self.now += seconds
        if not self.is_in_lane:
            self.settle()

    def settle(self):
        """What ended while this thread worked is done."""
        for call in sorted((call for call in self.calls if call[0] <= self.now), key=lambda call: call[0]):
            self.calls.remove(call)
            call[1].set_result(call[2])

    def wait(self):
        self.now = max(self.now, min((call[0] for call in self.calls), default=self.now))
        self.settle()


class Awaited(Future):
    """Its result is waited for in the clock's time."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def result(self, timeout=None):
        while not self.done():
            self.clock.wait()
        return super().result()


@dataclass
class Lane:
    """A lane whose threads work in the clock's time: what they do is done at once, and is there when its time has come."""

    clock: Clock
    threads: int
    free: list = field(init=False)

    def __post_init__(self):
        self.free = [0.0] * self.threads

    def submit(self, function):
        future, here = Awaited(self.clock), self.clock.now
        first = min(range(self.threads), key=self.free.__getitem__)
        self.clock.now = max(here, self.free[first])
        self.clock.is_in_lane = True
        result = function()
        self.clock.is_in_lane = False
        self.free[first], self.clock.now = self.clock.now, here
        self.clock.calls.append((self.free[first], future, result))
        return future

    def close(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@dataclass(frozen=True)
class Draws(aa.Synthesizer):
    clock: Clock = field(repr=False)
    costs: LoopCosts
    max_concurrency: int = 0
    draws_regions = True

    def synthesize(self, plan, *, seed):
        self.clock.work(self.costs.redraw_s if plan.regions else self.costs.draw_s)
        return SwatchSynthesizer(8, 8).synthesize(plan, seed=seed)


@dataclass(frozen=True)
class Answers(aa.Critic):
    """Suggests something for those pictures of a chunk that the costs let be redrawn, which are known by their place."""

    clock: Clock = field(repr=False)
    costs: LoopCosts
    max_concurrency: int = 0

    def critique(self, image, prompt):
        self.clock.work(self.costs.critique_s)
        place = int(prompt)
        share = self.costs.redrawn
        return ADVICE if round((place + 1) * share) > round(place * share) else aa.Critique()


@dataclass(frozen=True)
class Plans(aa.RegionPlanner):
    clock: Clock = field(repr=False)
    costs: LoopCosts

    def plan(self, prompt, critique):
        self.clock.work(self.costs.plan_s)
        return aa.GreedyPlanner().plan(prompt, critique)


@dataclass
class Files(RoundJournal):
    clock: Clock
    costs: LoopCosts
    writes_behind: bool = True
    begun: list = field(default_factory=list)
    ends: dict = field(default_factory=dict)
    most: int = 0

    def begin(self, name):
        self.begun.append(name)
        self.most = max(self.most, len(self.begun) - len(self.ends))
        return FilesChunk(self, name)

    def add_verdicts(self, verdicts):
        pass


@dataclass
class FilesChunk(ChunkJournal):
    round: Files
    name: str

    def add_call(self, stage, plans, images, *, limit):
        pass

    def add_answer(self, member, answer):
        pass

    def finish(self, chunk):
        self.round.clock.work(self.round.costs.file_s)
        self.round.ends[self.name] = self.round.clock.now
        return chunk


@contextmanager
def simulated(clock):
    """The loop's time and lanes are those of the clock."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(events, "time", clock)
        patch.setattr(chunk_run, "time", clock)
        patch.setattr(chunk_run, "Lane", lambda threads, **_: Lane(clock, threads))
        patch.setattr("artaug.run.flow._Waiting.wait", lambda _: clock.wait())
        yield


# Eighths of a second, which add up exactly.
seconds = st.integers(1, 80).map(lambda eighths: eighths / 8)
costs = st.builds(
    LoopCosts,
    prompts=st.integers(1, 24),
    chunk=st.integers(1, 5),
    candidates=st.just(1),
    batch=st.integers(1, 5),
    redrawn=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    draw_s=seconds,
    critique_s=seconds,
    plan_s=seconds,
    redraw_s=seconds,
    judge_s=st.just(0.0),
    file_s=seconds,
)
places = st.builds(LoopPlaces, workers=st.integers(0, 4), critics=st.integers(0, 3), writes_behind=st.booleans())


@settings(max_examples=40, deadline=None)
@given(costs, places)
def test_the_simulation_takes_to_the_second_what_the_stages_of_a_run_take(costs, places):
    clock = Clock()
    files = Files(clock, costs, places.writes_behind)
    parts = LoopParts(
        synthesizer=Draws(clock, costs, places.workers),
        critic=Answers(clock, costs, places.critics),
        planner=Plans(clock, costs),
        keep=FixedFilter(keep=True),
        candidates=None,
        batch_size=costs.batch,
        chunk_size=costs.chunk,
    )
    with simulated(clock):
        stages = RoundStages(
            parts,
            files,
            events.StageClock(1, events.ignore_event),
            seed=0,
            batches=FittingBatches(costs.batch),
            poll=lambda: None,
        )
        prompts = [str(place) for place in range(costs.prompts)]
        assert len(list(stages.attempts(prompts, groups=[len(prompts)]))) == costs.prompts
    simulation = simulate(costs, places)
    assert simulation.seconds == clock.now
    assert list(simulation.ends) == [files.ends[name] for name in files.begun]
    assert files.most <= places.depth


@given(costs, places)
def test_nothing_is_faster_than_the_busiest_of_those_who_do_it(costs, places):
    simulation = simulate(costs, places)
    driver = sum(simulation.busy[name] for name in ("plan", "judge", "file"))
    driver += simulation.busy["critique"] * (not places.critics) + simulation.busy["draw"] * (not places.workers)
    redraws = round(costs.prompts * costs.redrawn)
    assert simulation.busy["draw"] == costs.prompts * costs.draw_s + redraws * costs.redraw_s
    assert simulation.seconds >= driver
    assert simulation.seconds >= simulation.busy["draw"] / max(places.workers, 1)
    assert simulation.seconds >= simulation.busy["critique"] / max(places.critics, 1)
    assert simulation.seconds <= sum(simulation.busy.values())
    assert len(simulation.ends) == math.ceil(costs.prompts / costs.chunk)
    assert max(simulation.ends) == simulation.seconds


@given(st.integers(1, 12), seconds, seconds, st.integers(1, 5))
def test_held_out_pictures_take_to_the_second_what_their_batches_take(batches, draw_s, score_s, workers):
    clock = Clock()
    costs = LoopCosts(
        prompts=1, chunk=1, candidates=1, batch=1, redrawn=0.0,
        draw_s=draw_s, critique_s=0.0, plan_s=0.0, redraw_s=0.0, judge_s=0.0, file_s=0.0,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthesis, "Lane", lambda threads, **_: Lane(clock, threads))
        for _ in synthesis.draw_batches(Draws(clock, costs, workers), [([aa.Plan("a")], [0])] * batches):
            clock.work(score_s)
    held_out = simulate_held_out(batches=batches, draw_s=draw_s, score_s=score_s, workers=workers)
    assert held_out == clock.now
    assert held_out >= max(batches * score_s, math.ceil(batches / workers) * draw_s)


@given(costs, st.integers(0, 4))
def test_pairs_that_are_judged_together_are_judged_when_all_chunks_are_there(costs, workers):
    costs = replace(costs, judge_s=2.0, judged_together=True)
    simulation = simulate(costs, LoopPlaces(workers=workers, critics=0))
    assert simulation.seconds == max(simulation.ends) + 2.0 * costs.prompts


def test_many_workers_are_as_many_times_faster_until_the_driving_process_is_busy():
    costs = LoopCosts(
        prompts=4096, chunk=8, candidates=1, batch=8, redrawn=1.0,
        draw_s=1.0, critique_s=0.0, plan_s=0.0, redraw_s=1.0, judge_s=0.01, file_s=0.0,
    )  # fmt: skip
    one, eight, many = (simulate(costs, LoopPlaces(workers=workers, critics=0)).seconds for workers in (1, 8, 512))
    assert one == pytest.approx(8192, rel=0.01)
    assert eight == pytest.approx(1024, rel=0.01)
    assert 4096 * 0.01 <= many <= 4096 * 0.01 + 32
