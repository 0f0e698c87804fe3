"""Experiment trackers: steps and validations sent to TensorBoard, Weights & Biases, Trackio and others."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from artaug._internal.annotations import checked
from artaug._internal.images import as_rgb
from artaug.errors import InvalidValueError, MissingExtraError
from artaug.training.progress import StepEvent, TrackedEvent
from artaug.training.validation import ValidationResult


@checked
@dataclass
class Tracker:
    """Sends what happens in a training or a run to one of accelerate's trackers.

    All of it lies on one axis, the steps of all rounds: some trackers ignore a step that is lower than the last.
    """

    _tracker: Any
    _steps_before: int = field(default=0, init=False)

    def log_event(self, event: object) -> None:
        """Log the numbers of any `RunEvent` that has some: give it to `enhance` as ``on_event``.

        They are those of every step, and how the prompts of every round ended, the share that was kept and the gain.
        """
        if isinstance(event, TrackedEvent):
            self._tracker.log(dict(event.metrics()), step=event.run_step)
        if isinstance(event, StepEvent):
            self._steps_before = event.steps_before

    def log_step(self, event: StepEvent) -> None:
        """Log a step: give it to ``train`` as ``on_step``. In `enhance`, ``log_event`` logs the steps, too."""
        self.log_event(event)

    def log_validation(self, result: ValidationResult) -> None:
        """Log a validation with its images: give it to `Validation` as ``on_validation``."""
        prefix = f"validation/strength_{result.strength:g}"
        step = self._steps_before + result.step
        self._tracker.log({f"{prefix}/win_rate": result.win_rate, f"{prefix}/gain": result.gain}, step=step)
        if result.images and hasattr(self._tracker, "log_images"):
            pixels = np.stack([np.asarray(as_rgb(image)) for image in result.images])
            layout = {"dataformats": "NHWC"} if self._tracker.name == "tensorboard" else {}
            self._tracker.log_images({prefix: pixels}, step=step, **layout)


@checked
@contextmanager
def open_tracker(
    tracker: str,
    run_name: str,
    *,
    folder: str | Path = "runs",
    config: Mapping[str, str | float] = MappingProxyType({}),
) -> Iterator[Tracker]:
    """Open any tracker that accelerate knows and that is installed, for a ``with`` block.

    Args:
        tracker: ``"tensorboard"``, ``"wandb"``, ``"trackio"``, ``"comet_ml"``, ``"mlflow"``, ``"swanlab"``, ...
        run_name: the name of the run, or of the project where the tracker names runs itself.
        folder: where a tracker that writes files writes them.
        config: what to store beside it, settings of the trainer for instance.

    Raises:
        InvalidValueError: if accelerate knows no such tracker.
        MissingExtraError: if its package is not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers  # noqa: PLC0415 - loads transformers

    classes = {str(getattr(name, "value", name)): cls for name, cls in LOGGER_TYPE_TO_CLASS.items()}
    if tracker not in classes:
        raise InvalidValueError(f"there is no tracker {tracker!r}. Choose of: {', '.join(sorted(classes))}.")
    if tracker not in {str(getattr(name, "value", name)) for name in get_available_trackers()}:
        raise MissingExtraError(f"open_tracker({tracker!r})", package=tracker)
    cls = classes[tracker]
    opened = cls(run_name, logging_dir=str(folder)) if cls.requires_logging_directory else cls(run_name)
    if hasattr(opened, "start"):  # earlier versions of accelerate start when they are made
        opened.start()
    try:
        if config:
            opened.store_init_configuration(dict(config))
        yield Tracker(opened)
    finally:
        opened.finish()
