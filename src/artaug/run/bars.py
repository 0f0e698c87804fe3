"""The bars of a run: one for a round and one for each of its stages, drawn from the events of the run alone.

The time left is an estimate. Each stage has a speed: what it did in this call, by the time that it took, both without what
was on disk already. What is left of each stage at its speed, summed, is what is left of the drawing, times what the round has
taken over what its stages have: planning and writing are nobody's stage. The training and the measurement take as long as in
the round before; in the first round nothing is known of them, and the time is that to the training.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from artaug._internal.progress_bar import ProgressBar, speed, time_left
from artaug.pairs import Kept
from artaug.run.events import AttemptEvent, ProgressEvent, RoundEvent, RoundStage, RunEvent, StageEvent

_UNITS: Mapping[RoundStage, str] = {"draw": "picture", "critique": "answer", "redraw": "picture", "judge": "prompt"}
_LATER_STAGES: tuple[RoundStage, ...] = ("train", "combine", "measure")


@dataclass
class StageProgress:
    """How far one stage of a round is, and how long it took for what it did in this call."""

    total: int = 0
    done: int = 0
    resumed: int = 0
    """What of it was on disk."""
    ended: int = 0
    """How often it has ended, once for each chunk."""
    _ended_s: float = 0.0
    _running_s: float = 0.0

    def add(self, event: ProgressEvent) -> None:
        """Note what was done, or was on disk."""
        self.total = event.total
        self.done += event.count
        self.resumed += event.count * event.resumed
        self._running_s += event.seconds

    def end(self, seconds: float) -> None:
        """Note the end of the stage in a chunk, and all the time that it took there."""
        self.ended += 1
        self._ended_s += seconds
        self._running_s = 0.0

    @property
    def count(self) -> int:
        """What was done in this call."""
        return self.done - self.resumed

    @property
    def seconds(self) -> float:
        """What that took."""
        return self._ended_s + self._running_s

    @property
    def seconds_each(self) -> float | None:
        """None while it is not known."""
        if self.count:
            return self.seconds / self.count
        return 0.0 if self.ended else None


def drawing_seconds_left(
    stages: Mapping[RoundStage, StageProgress], before: Mapping[RoundStage, StageProgress]
) -> float | None:
    """How long draw, critique, redraw and judge will still take; None while that is not known.

    Args:
        stages: of this round.
        before: of the last round that was drawn, for the speed of stages that have not begun.
    """
    speeds = {stage: _first_known(stages[stage], before.get(stage)) for stage in stages}
    if speeds["redraw"] is None:
        speeds["redraw"] = speeds["draw"]
    elif speeds["draw"] is None:
        speeds["draw"] = speeds["redraw"]
    left = 0.0
    for stage, progress in stages.items():
        rest = _expected_redraws(stages) if stage == "redraw" else progress.total
        rest -= progress.done
        seconds_each = speeds[stage]
        if rest <= 0:
            continue
        if seconds_each is None:
            return None
        left += rest * seconds_each
    return left


def _first_known(*stages: StageProgress | None) -> float | None:
    return next((stage.seconds_each for stage in stages if stage is not None and stage.seconds_each is not None), None)


def _expected_redraws(stages: Mapping[RoundStage, StageProgress]) -> float:
    """All pictures, less the share of those that were answered so far and will not be redrawn."""
    pictures, answered = stages["draw"].total, stages["critique"].done
    if not answered:
        return pictures
    unplanned = pictures - stages["redraw"].total
    return pictures * (1 - min(unplanned / answered, 1))


@dataclass
class _RoundBars:
    """The bars of the round that is drawn."""

    title: ProgressBar
    """Counts the prompts that have come to their end."""
    stages: Mapping[RoundStage, StageProgress]
    bars: Mapping[RoundStage, ProgressBar]
    kept: int = 0
    started: float | None = None
    """When this call did its first work in the round."""

    def overhead(self) -> float:
        """What the round has taken over what its stages have."""
        seconds = sum(progress.seconds for progress in self.stages.values())
        if self.started is None or not seconds:
            return 1.0
        return max(1.0, (time.perf_counter() - self.started) / seconds)

    def close(self, *, complete: bool) -> None:
        for bar in (self.title, *self.bars.values()):
            if complete:  # fewer redraws than there might have been, or answers that never came
                bar.total = bar.done
                bar.move_to(bar.done)
            bar.close()


class RunBars:
    """Shows the events of a run as bars; in a log, as one line for a round every now and then."""

    def __init__(self, *, rounds: int | None, show: bool) -> None:
        """Show nothing yet; ``rounds`` is None for `improve`, which is the drawing of one round and has no training."""
        self._rounds, self._show = rounds, show
        self._stages: dict[RoundStage, StageProgress] = {}
        """Of a round that begins, until all have been named."""
        self._round: _RoundBars | None = None
        self._before: Mapping[RoundStage, StageProgress] = {}
        self._later_s: float | None = None
        """What the last round took from its training on."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._round is not None:
            self._round.close(complete=False)

    def on_event(self, event: RunEvent) -> None:
        """Show an event."""
        if isinstance(event, RoundEvent):
            self._end_round(event)
        elif isinstance(event, ProgressEvent):
            if self._round is None:
                self._begin(event)
            else:
                self._move(self._round, event)
        elif isinstance(event, StageEvent):
            self._end_stage(event)
        elif isinstance(event, AttemptEvent):
            self._count_attempt(event)

    def _bar(self, number: int, *, prompts: int, done: int = 0) -> ProgressBar:
        name = "improve" if self._rounds is None else f"round {number}/{self._rounds}"
        return ProgressBar(name, total=prompts, unit="prompt", done=done, show=self._show, shows_time_left=False)

    def _begin(self, event: ProgressEvent) -> None:
        """Open the bars when the round has named all of its stages."""
        self._stages[event.stage] = StageProgress(total=event.total)
        if len(self._stages) < len(_UNITS):
            return
        title = self._bar(event.round_number, prompts=self._stages["judge"].total)
        bars = {
            stage: ProgressBar(
                f"  {stage:<8}",
                total=progress.total,
                unit=_UNITS[stage],
                show=self._show,
                in_logs=False,
                shows_time_left=False,
            )
            for stage, progress in self._stages.items()
        }
        self._round = _RoundBars(title, self._stages, bars)
        self._stages = {}

    def _move(self, shown: _RoundBars, event: ProgressEvent) -> None:
        stage = event.stage
        progress, bar = shown.stages[stage], shown.bars[stage]
        progress.add(event)
        bar.total = event.total
        if event.seconds and shown.started is None:
            shown.started = time.perf_counter() - event.seconds
        if event.resumed:
            bar.move_to(progress.done)
        else:
            bar.advance(event.count, seconds=event.seconds)
        self._show_title(shown, doing=None if event.resumed else stage)

    def _end_stage(self, event: StageEvent) -> None:
        if self._round is not None and event.stage in self._round.stages:
            self._round.stages[event.stage].end(event.seconds)
            self._round.bars[event.stage].refresh()
            self._round.title.refresh()

    def _count_attempt(self, event: AttemptEvent) -> None:
        shown = self._round
        if shown is None:
            return
        shown.kept += isinstance(event.attempt, Kept)
        shown.title.move_to(shown.title.done + 1)
        self._show_title(shown, doing=None)
        if shown.title.done == shown.title.total:
            shown.close(complete=True)
            self._before = shown.stages
            self._round = None

    def _show_title(self, shown: _RoundBars, *, doing: RoundStage | None) -> None:
        """The count kept, what goes on where there are no bars to show it, and the time left."""
        parts = [_kept(shown.kept, shown.title.done)] if shown.title.done else []
        if doing is not None and not shown.title.is_live:
            progress = shown.stages[doing]
            pace = speed(progress.count, progress.seconds, _UNITS[doing]) if progress.seconds else ""
            parts.append(f"{doing} {progress.done}/{progress.total}" + f" at {pace}" * bool(pace))
        left = drawing_seconds_left(shown.stages, self._before)
        if left is not None and left * shown.overhead() >= 1:
            left *= shown.overhead()
            if self._rounds is not None and self._later_s is None:
                parts.append(f"about {time_left(left)} to the training")
            else:
                parts.append(f"about {time_left(left + (self._later_s or 0.0))} left")
        shown.title.note = ", ".join(parts)
        shown.title.move_to(shown.title.done)

    def _end_round(self, event: RoundEvent) -> None:
        seconds = event.round.seconds
        self._later_s = sum(seconds.get(stage, 0.0) for stage in _LATER_STAGES)
        if event.resumed:
            prompts = len(event.round.attempts)
            bar = self._bar(event.round.number, prompts=prompts, done=prompts)
            bar.note = f"{_kept(event.round.training.pairs, prompts)}, read from the store"
            bar.move_to(prompts)
            bar.close()


def _kept(kept: int, ended: int) -> str:
    return f"kept {kept} of {ended} ({kept / ended:.0%})"
