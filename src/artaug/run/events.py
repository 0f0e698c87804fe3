"""What a run reports while it goes: stages, attempts, steps of the training, rounds."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from artaug.pairs import Attempt
from artaug.training import StepEvent

if TYPE_CHECKING:
    from artaug.run.results import Round

RoundStage: TypeAlias = Literal["draw", "critique", "redraw", "judge", "train", "combine", "measure"]
"""The stages of a round, in their order; the last three in `enhance` only."""


@dataclass(frozen=True, kw_only=True)
class ProgressEvent:
    """Part of a stage is done: one call of the synthesizer, one answer of the critic, one chunk that was judged."""

    round_number: int
    """Counted from 1."""
    stage: RoundStage
    count: int
    """Pictures drawn, answers given or pairs judged since the event of this stage before; those on disk already count."""
    resumed: bool = False
    """Whether they were on disk already."""


@dataclass(frozen=True, kw_only=True)
class StageEvent:
    """One stage of the loop has ended, for one chunk of prompts or one round."""

    stage: RoundStage
    seconds: float
    """Wall-clock time it took."""
    round_number: int = 1
    """Counted from 1."""
    count: int = 0
    """Pictures, answers, pairs or steps it was about, those that were on disk already left out."""


@dataclass(frozen=True, kw_only=True)
class AttemptEvent:
    """A prompt has come to its end."""

    round_number: int
    """Counted from 1."""
    prompt_index: int
    """Its place in the list of prompts, from 0."""
    attempt: Attempt


@dataclass(frozen=True, kw_only=True)
class RoundEvent:
    """A round has ended."""

    round: "Round"


RunEvent: TypeAlias = ProgressEvent | StageEvent | AttemptEvent | StepEvent | RoundEvent
"""What ``on_event`` of `improve` and `enhance` is called with."""

OnEvent: TypeAlias = Callable[[RunEvent], object]
"""A function of a `RunEvent`; an exception that it raises ends the run."""


def ignore_event(event: RunEvent) -> None:
    """The ``on_event`` of a run that nobody listens to."""


@dataclass
class StageClock:
    """Times the stages of one round."""

    round_number: int
    emit: OnEvent
    seconds: dict[str, float] = field(default_factory=dict)
    """By stage, the sum."""

    @contextmanager
    def stage(self, stage: RoundStage, count: int) -> Iterator[None]:
        """Time a stage and report it, unless it raises."""
        start = time.perf_counter()
        yield
        elapsed = time.perf_counter() - start
        self.seconds[stage] = self.seconds.get(stage, 0.0) + elapsed
        self.emit(StageEvent(stage=stage, seconds=elapsed, round_number=self.round_number, count=count))
