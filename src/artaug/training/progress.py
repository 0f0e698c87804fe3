"""Progress of a training: a bar, and an event per step for a callback."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from tqdm.auto import tqdm


@dataclass(frozen=True, kw_only=True)
class StepEvent:
    """What a trainer reports after every step."""

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
        self._bar = tqdm(total=steps, initial=initial, desc="Training the LoRA", unit="step", disable=not show)

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
    ) -> None:
        """Show and report a step of ``pairs`` pairs that is done."""
        duration, self._last_step = time.perf_counter() - self._last_step, time.perf_counter()
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        postfix = {"loss": f"{loss:.4g}", "pairs/s": f"{pairs / duration:.3g}"}
        self._bar.set_postfix(postfix | ({"GiB": f"{peak / 2**30:.1f}"} if peak else {}), refresh=False)
        self._bar.update()
        if self._on_step is not None:
            self._on_step(
                StepEvent(
                    step=step,
                    steps=self._steps,
                    loss=loss,
                    gradient_norm=gradient_norm,
                    learning_rate=learning_rate,
                    pairs_per_second=pairs / duration,
                    peak_bytes=peak,
                    seconds=self.seconds,
                    loss_scale=loss_scale,
                    is_skipped=is_skipped,
                )
            )
