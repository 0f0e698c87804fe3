"""The loop on a cluster in simulated time: stand-ins for chunks go through the scheduler of a run."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from heapq import heappop, heappush

from artaug.run.flow import GiveWay, Steps, chunks_under_way, run_in_order


@dataclass(frozen=True, kw_only=True)
class LoopCosts:
    """What draws, critiques, redraws and judges the prompts of a round, and how long each of it takes."""

    prompts: int
    chunk: int
    """Prompts that go through the stages together."""
    candidates: int
    """Pictures of a prompt."""
    batch: int
    """The most pictures in a call of the synthesizer."""
    redrawn: float
    """The share of pictures that are redrawn."""
    draw_s: float
    """A picture, as all below."""
    critique_s: float
    plan_s: float
    redraw_s: float
    judge_s: float
    """A prompt."""
    file_s: float
    """A chunk: to write what became of it."""
    judged_together: bool = False
    """Whether the pairs of a round are judged at its end."""


@dataclass(frozen=True, kw_only=True)
class LoopPlaces:
    """Where it takes place. What is not drawn or asked elsewhere, the process that drives the run does itself, in turn."""

    workers: int
    """That draw, 0 or more."""
    critics: int
    """That answer about a chunk each at the same time, 0 or more."""
    writes_behind: bool = True
    """Whether the run has a store."""

    @property
    def depth(self) -> int:
        """Chunks under way at most."""
        return chunks_under_way(drawing=self.workers, asking=self.critics, writes_behind=self.writes_behind)


@dataclass
class _SimulatedTime:
    """The simulated time: the driving process moves it, by what it does and by waiting."""

    now_s: float = 0.0
    _calls: list[tuple[float, int, Future[None]]] = field(default_factory=list)
    """A heap of those that are not done, by their end."""
    _count: int = 0

    def call_until(self, end_s: float) -> Future[None]:
        """What is done at a time that is not past."""
        self._count += 1
        future: Future[None] = Future()
        heappush(self._calls, (end_s, self._count, future))
        return future

    def pass_until(self, now_s: float) -> None:
        """Let time pass, and what ends meanwhile be done."""
        self.now_s = now_s
        while self._calls and self._calls[0][0] <= now_s:
            heappop(self._calls)[2].set_result(None)

    def wait(self) -> None:
        """Let time pass until the next call is done."""
        self.pass_until(self._calls[0][0])


class _SimulatedLane:
    """As `artaug._internal.lanes.Lane`: calls in the order in which they were submitted, each in the first free thread."""

    def __init__(self, clock: _SimulatedTime, threads: int) -> None:
        self._clock = clock
        self._free_s = [0.0] * threads
        self.busy_s = 0.0
        """Of all threads together."""

    def submit(self, seconds: float) -> Future[None]:
        """A call that takes so long once it has begun."""
        end_s = max(self._clock.now_s, heappop(self._free_s)) + seconds
        heappush(self._free_s, end_s)
        self.busy_s += seconds
        return self._clock.call_until(end_s)


@dataclass(frozen=True)
class LoopTime:
    """How long the loop of a round takes."""

    seconds: float
    busy: dict[str, float]
    """By what there is to do, the seconds of all who do it, one after the other: ``draw`` (with redraws), ``critique``, ``plan``,
    ``judge``, ``file``."""
    ends: Sequence[float] = ()
    """When each chunk was finished, in their order."""


@dataclass
class Simulation:
    """One round."""

    costs: LoopCosts
    places: LoopPlaces
    _clock: _SimulatedTime = field(default_factory=_SimulatedTime)
    _driver: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("critique", "draw", "plan", "judge", "file"), 0.0)
    )

    def run(self) -> LoopTime:
        """Bring all chunks through the stages."""
        costs, places = self.costs, self.places
        draw, critique = _SimulatedLane(self._clock, places.workers), _SimulatedLane(self._clock, places.critics)
        tasks = (self._chunk(draw, critique, prompts, redraws) for prompts, redraws in self._chunks())
        ends = [*run_in_order(tasks, depth=places.depth, poll=self._clock.wait)]
        if costs.judged_together:
            self._work("judge", costs.prompts * costs.judge_s)
        busy = dict(self._driver)
        busy["draw"] += draw.busy_s
        busy["critique"] += critique.busy_s
        return LoopTime(self._clock.now_s, busy, ends)

    def _chunks(self) -> Iterator[tuple[int, int]]:
        """The prompts of each chunk, and the pictures of it that are redrawn: as evenly as whole numbers can be."""
        costs = self.costs
        for start in range(0, costs.prompts, costs.chunk):
            stop = min(start + costs.chunk, costs.prompts)
            before, after = (round(place * costs.candidates * costs.redrawn) for place in (start, stop))
            yield stop - start, after - before

    def _chunk(self, draw: _SimulatedLane, critique: _SimulatedLane, prompts: int, redraws: int) -> Steps[float]:
        """The waits of `artaug.run.chunk_run.ChunkRun.steps`."""
        costs, pictures = self.costs, prompts * self.costs.candidates
        yield from self._draw(draw, pictures, costs.draw_s)
        yield GiveWay.OLDER
        if self.places.critics:
            yield critique.submit(pictures * costs.critique_s)
        else:
            self._work("critique", pictures * costs.critique_s)
        self._work("plan", pictures * costs.plan_s)
        yield from self._draw(draw, redraws, costs.redraw_s)
        if not costs.judged_together:
            self._work("judge", prompts * costs.judge_s)
        if self.places.writes_behind:
            yield GiveWay.NEXT
        self._work("file", costs.file_s)
        return self._clock.now_s

    def _draw(self, lane: _SimulatedLane, pictures: int, each_s: float) -> Steps[None]:
        """All calls at once, each on a worker, or one after the other here."""
        if not self.places.workers:
            self._work("draw", pictures * each_s)
            return
        sizes = (min(self.costs.batch, pictures - start) for start in range(0, pictures, self.costs.batch))
        yield from [lane.submit(size * each_s) for size in sizes]

    def _work(self, what: str, seconds: float) -> None:
        """Something that the driving process does itself, while everything else of it waits."""
        self._clock.pass_until(self._clock.now_s + seconds)
        self._driver[what] += seconds


def simulate(costs: LoopCosts, places: LoopPlaces) -> LoopTime:
    """Simulate the loop of one round."""
    return Simulation(costs, places).run()


def simulate_held_out(*, batches: int, draw_s: float, score_s: float, workers: int) -> float:
    """Seconds of batches that take so long each: drawn as by `artaug.synthesis.draw_batches`, and scored one after the other."""
    clock = _SimulatedTime()
    lane, under_way = _SimulatedLane(clock, workers), deque[Future[None]]()

    def score_next() -> None:
        drawn = under_way.popleft()
        while not drawn.done():
            clock.wait()
        clock.pass_until(clock.now_s + score_s)

    for _ in range(batches):
        under_way.append(lane.submit(draw_s))
        if len(under_way) == 2 * workers:
            score_next()
    while under_way:
        score_next()
    return clock.now_s
