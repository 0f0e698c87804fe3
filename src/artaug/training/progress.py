"""What a training tells while it runs: a bar, and events for whoever listens."""

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
    """Length of the gradient over all factors, before it is shortened."""
    learning_rate: float
    pairs_per_second: float
    """Of this step."""
    peak_bytes: int
    """Most accelerator memory torch has held since the process began; 0 on a CPU."""
    seconds: float
    """Since training began, or was resumed."""


class Log:
    """Losses shown as a bar and steps reported to a listener; silent in all processes but the first."""

    def __init__(self, steps: int, on_step: Callable[[StepEvent], None] | None, *, begun: int, shown: bool) -> None:
        self._on_step = on_step
        self._steps = steps
        self._started = self._before = time.perf_counter()
        self._bar = tqdm(total=steps, initial=begun, desc="Training the LoRA", unit="step", disable=not shown)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.perf_counter() - self._started

    def rest(self) -> None:
        """Count what went by since the last step as nobody's: pictures were drawn, or a checkpoint was written."""
        self._before = time.perf_counter()

    def record(self, step: int, *, loss: float, gradient_norm: float, learning_rate: float, pairs: int) -> None:
        """One more step is done."""
        taken, self._before = time.perf_counter() - self._before, time.perf_counter()
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        told = {"loss": f"{loss:.4g}", "pairs/s": f"{pairs / taken:.3g}"}
        self._bar.set_postfix(told | ({"GiB": f"{peak / 2**30:.1f}"} if peak else {}), refresh=False)
        self._bar.update()
        if self._on_step is not None:
            self._on_step(
                StepEvent(
                    step=step,
                    steps=self._steps,
                    loss=loss,
                    gradient_norm=gradient_norm,
                    learning_rate=learning_rate,
                    pairs_per_second=pairs / taken,
                    peak_bytes=peak,
                    seconds=self.seconds,
                )
            )
