"""Progress of a training: a bar, and an event per step for a callback or a tracker."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import torch

from artaug._internal.annotations import checked
from artaug._internal.progress_bar import ProgressBar


@runtime_checkable
class TrackedEvent(Protocol):
    """An event that has numbers for a tracker."""

    @property
    def run_step(self) -> int:
        """Where on the axis of steps it lies, counted over all trainings of a run."""

    def metrics(self) -> Mapping[str, float]:
        """Its numbers, by the name that a tracker shows."""


@checked
@dataclass(frozen=True, kw_only=True)
class StepEvent:
    """What a trainer reports after every step.

    >>> import artaug as aa
    >>> curve = {}
    >>> def plot(event: aa.StepEvent) -> None:
    ...     curve[event.run_step] = event.loss
    >>> plot(
    ...     aa.StepEvent(
    ...         **{"round_number": 2, "steps_before": 200, "step": 1, "steps": 200, "loss": 0.25, "gradient_norm": 1.0},
    ...         **{"learning_rate": 1e-4, "pairs_per_second": 8.0, "peak_bytes": 0, "seconds": 0.5},
    ...     )
    ... )
    >>> curve
    {201: 0.25}
    """

    step: int
    """Counted from 1."""
    steps: int
    """How many there will be."""
    loss: float
    gradient_norm: float
    """Norm of the gradient over all trained parameters, before it is clipped; not finite if the step was skipped."""
    learning_rate: float
    pairs_per_second: float
    """Of this step."""
    peak_bytes: int
    """Most accelerator memory torch has held since the process began; 0 on a CPU."""
    seconds: float
    """Since training began; of a training that was resumed, what its runs took up to their last checkpoints, too."""
    loss_scale: float | None = None
    """What the loss was multiplied by in the backward pass of a model that computes in float16; None for any other."""
    is_skipped: bool = False
    """Whether the gradient overflowed float16: the step was not taken, and the next loss scale is half of this one."""
    companion_loss: float | None = None
    """Mean loss of the companion's steps before this one; None for an objective without one."""
    round_number: int | None = None
    """The round of `enhance` that trains, counted from 1; None for a training on its own."""
    steps_before: int = 0
    """Steps that the rounds before took."""

    @property
    def run_step(self) -> int:
        """Counted from 1 over all rounds."""
        return self.steps_before + self.step

    def metrics(self) -> Mapping[str, float]:
        """What a tracker shows of it."""
        metrics = {
            "train/loss": self.loss,
            "train/gradient_norm": self.gradient_norm,
            "train/learning_rate": self.learning_rate,
            "train/pairs_per_second": self.pairs_per_second,
            "train/peak_gib": self.peak_bytes / 2**30,
        }
        if self.loss_scale is not None:
            metrics |= {"train/loss_scale": self.loss_scale, "train/is_skipped": float(self.is_skipped)}
        if self.companion_loss is not None:
            metrics["train/companion_loss"] = self.companion_loss
        return metrics


class ProgressLog:
    """Shows losses in a bar and reports steps to a callback."""

    def __init__(
        self,
        steps: int,
        on_step: Callable[[StepEvent], None] | None,
        *,
        initial: int,
        seconds: float = 0.0,
        show: bool,
    ) -> None:
        self._on_step = on_step
        self._steps = steps
        self._last_step = time.perf_counter()
        self._start = self._last_step - seconds
        self._bar = ProgressBar("train", total=steps, unit="step", done=initial, show=show)
        self._is_first = True
        self._done = initial

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    @property
    def seconds(self) -> float:
        """Since it was made, and those it was given."""
        return time.perf_counter() - self._start

    def reset_timer(self) -> None:
        """Exclude the time since the last step from the throughput: pictures were drawn, or a checkpoint written."""
        self._last_step = time.perf_counter()
        if self._is_first:
            self._bar.reset_timer()

    def log_step(
        self,
        step: int,
        *,
        loss: float,
        gradient_norm: float,
        learning_rate: float,
        pairs: int,
        loss_scale: float | None = None,
        is_skipped: bool = False,
        companion_loss: float | None = None,
    ) -> None:
        """Show and report a step of ``pairs`` pairs that is done."""
        duration, self._last_step = time.perf_counter() - self._last_step, time.perf_counter()
        self.report(
            StepEvent(
                step=step,
                steps=self._steps,
                loss=loss,
                gradient_norm=gradient_norm,
                learning_rate=learning_rate,
                pairs_per_second=pairs / duration,
                peak_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
                seconds=self.seconds,
                loss_scale=loss_scale,
                is_skipped=is_skipped,
                companion_loss=companion_loss,
            )
        )

    def report(self, event: StepEvent) -> None:
        """Show and report a step, also one that was taken in another process."""
        memory = f", {event.peak_bytes / 2**30:.1f} GiB" if event.peak_bytes else ""
        self._bar.note = f"loss {event.loss:.4g}, {event.pairs_per_second:.3g} pairs/s{memory}"
        self._bar.advance(max(event.step - self._done, 0))  # a worker that died takes its last steps again
        self._done = event.step
        self._is_first = False
        if self._on_step is not None:
            self._on_step(event)
