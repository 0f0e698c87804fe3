"""What a run reports while it goes: stages, attempts, steps of the training, rounds."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from artaug._internal.annotations import checked
from artaug.pairs import Attempt, Dropped, Kept, Skipped
from artaug.training import StepEvent

if TYPE_CHECKING:
    from artaug.run.results import Round

RoundStage: TypeAlias = Literal["draw", "critique", "redraw", "judge", "train", "combine", "measure"]
"""The stages of a round, in their order; the last three in `enhance` only."""


@checked
@dataclass(frozen=True, kw_only=True)
class ProgressEvent:
    """Part of a stage is done: one call of the synthesizer, one answer of the critic, one chunk that was judged.

    Of the stages draw, critique, redraw and judge. A round begins with one event for each of them, with a ``count`` of 0.

    >>> import artaug as aa
    >>> event = aa.ProgressEvent(round_number=1, stage="draw", count=8, total=24, seconds=2.0)
    >>> f"{event.count / event.seconds} pictures a second"
    '4.0 pictures a second'
    """

    round_number: int
    """Counted from 1."""
    stage: RoundStage
    count: int
    """Pictures drawn, answers given or prompts judged since the event of this stage before. A transient fault is no answer."""
    total: int
    """How many of them the round will have, at most: of redraws, those that are planned and those that may be."""
    seconds: float = 0.0
    """Time that this stage took since the event of it before; 0 for what was on disk already."""
    resumed: bool = False
    """Whether they were on disk already."""


@checked
@dataclass(frozen=True, kw_only=True)
class StageEvent:
    """One stage of the loop has ended, for one chunk of prompts or one round."""

    round_number: int
    """Counted from 1."""
    stage: RoundStage
    seconds: float
    """Wall-clock time it took."""
    count: int
    """Pictures, answers, pairs or steps it was about, those that were on disk already left out."""


@checked
@dataclass(frozen=True, kw_only=True)
class AttemptEvent:
    """A prompt has come to its end, in this call or one before: each prompt of a round that is not finished has one."""

    round_number: int
    """Counted from 1."""
    prompt_index: int
    """Its place in the list of prompts, from 0."""
    attempt: Attempt


@checked
@dataclass(frozen=True, kw_only=True)
class RoundEvent:
    """A round of `enhance` has ended."""

    round: "Round"
    run_step: int
    """Steps of training in this round and those before."""
    resumed: bool = False
    """Whether it was read from the store whole; it had no other event then."""

    def metrics(self) -> Mapping[str, float]:
        """How its prompts ended, the share kept, the gain if it was measured, and the seconds of each stage."""
        ends = Counter(map(type, self.round.attempts))
        kept, dropped, skipped = ends[Kept], ends[Dropped], ends[Skipped]
        metrics = {
            "round/number": self.round.number,
            "round/kept": kept,
            "round/dropped": dropped,
            "round/skipped": skipped,
            "round/yield": kept / (kept + dropped + skipped),
            "round/accepted": float(self.round.accepted),
            **{f"round/seconds_{stage}": seconds for stage, seconds in self.round.seconds.items()},
        }
        gain = self.round.gain
        if gain is not None:
            metrics |= {"round/gain": gain.delta, "round/gain_low": gain.ci_low, "round/gain_high": gain.ci_high}
        return metrics


RunEvent: TypeAlias = ProgressEvent | StageEvent | AttemptEvent | StepEvent | RoundEvent
"""What ``on_event`` of `improve` and `enhance` is called with."""

OnEvent: TypeAlias = Callable[[RunEvent], object]
"""A function of a `RunEvent`; an exception that it raises ends the run, and what the store has by then stays."""


def ignore_event(event: RunEvent) -> None:
    """The ``on_event`` of a run that nobody listens to."""


@dataclass
class StageClock:
    """Times the stages of one round, and reports them."""

    round_number: int
    emit: OnEvent
    seconds: dict[str, float] = field(default_factory=dict)
    """By stage, the sum over all calls."""
    totals: dict[RoundStage, int] = field(default_factory=dict)
    """By stage, how much of it the round will have at most, as far as is known."""

    def begin(self, totals: Mapping[RoundStage, int]) -> None:
        """Report how much a round will have of each stage."""
        self.totals |= totals
        for stage in totals:
            self._report(stage, 0)

    def now_s(self) -> float:
        """The time, for differences; of any thread."""
        return time.perf_counter()

    @contextmanager
    def stage(self, stage: RoundStage, count: int) -> Iterator[None]:
        """Time a stage and report it, unless it raises."""
        start_s = self.now_s()
        yield
        self.end(stage, seconds=self.now_s() - start_s, count=count)

    def end(self, stage: RoundStage, *, seconds: float, count: int) -> None:
        """Report a stage that took so long; stages of two chunks may be under way at the same time."""
        self.add_seconds({stage: seconds})
        self.emit(StageEvent(stage=stage, seconds=seconds, round_number=self.round_number, count=count))

    def add_seconds(self, seconds: Mapping[str, float]) -> None:
        """Count the time of stages, also that of a call before this one."""
        for stage, more in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + more

    def progress(self, stage: RoundStage, count: int, *, seconds: float) -> None:
        """Report that part of a stage under way is done, and how long that part took."""
        if count:
            self._report(stage, count, seconds=seconds)

    def resume(self, stage: RoundStage, count: int) -> None:
        """Report what was on disk already."""
        if count:
            self._report(stage, count, resumed=True)

    def _report(self, stage: RoundStage, count: int, *, seconds: float = 0.0, resumed: bool = False) -> None:
        self.emit(
            ProgressEvent(
                round_number=self.round_number,
                stage=stage,
                count=count,
                total=self.totals[stage],
                seconds=seconds,
                resumed=resumed,
            )
        )
