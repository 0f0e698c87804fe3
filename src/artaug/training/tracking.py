"""Experiment trackers: steps and validations sent to TensorBoard, Weights & Biases, Trackio and others."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from artaug._internal.images import as_rgb
from artaug.errors import InvalidValueError, MissingExtraError
from artaug.training.progress import StepEvent
from artaug.training.validation import ValidationResult


@dataclass(frozen=True)
class Tracker:
    """Sends steps and validations to one of accelerate's trackers."""

    _tracker: Any

    def log_step(self, event: StepEvent) -> None:
        """Log a step: give it to ``train`` as ``on_step``."""
        values = {
            "train/loss": event.loss,
            "train/gradient_norm": event.gradient_norm,
            "train/learning_rate": event.learning_rate,
            "train/pairs_per_second": event.pairs_per_second,
            "train/peak_gib": event.peak_bytes / 2**30,
        }
        if event.loss_scale is not None:
            values |= {"train/loss_scale": event.loss_scale, "train/is_skipped": float(event.is_skipped)}
        self._tracker.log(values, step=event.step)

    def log_validation(self, result: ValidationResult) -> None:
        """Log a validation with its images: give it to `Validation` as ``on_validation``."""
        prefix = f"validation/strength_{result.strength:g}"
        self._tracker.log({f"{prefix}/win_rate": result.win_rate, f"{prefix}/gain": result.gain}, step=result.step)
        if result.images and hasattr(self._tracker, "log_images"):
            pixels = np.stack([np.asarray(as_rgb(image)) for image in result.images])
            layout = {"dataformats": "NHWC"} if self._tracker.name == "tensorboard" else {}
            self._tracker.log_images({prefix: pixels}, step=result.step, **layout)


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
    opened.start()
    try:
        if config:
            opened.store_init_configuration(dict(config))
        yield Tracker(opened)
    finally:
        opened.finish()
