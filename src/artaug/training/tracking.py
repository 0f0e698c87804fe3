"""Steps and held-out pictures sent to an experiment tracker: TensorBoard, Weights & Biases, Trackio and the others."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from artaug.errors import InvalidValueError, MissingExtraError
from artaug.training.progress import StepEvent
from artaug.training.validation import ValidationResult


@dataclass(frozen=True)
class Tracker:
    """Hands what a training tells to one of accelerate's trackers."""

    _theirs: Any

    def log_step(self, event: StepEvent) -> None:
        """Log a step: give it to ``train`` as ``on_step``."""
        told = {
            "train/loss": event.loss,
            "train/gradient_norm": event.gradient_norm,
            "train/learning_rate": event.learning_rate,
            "train/pairs_per_second": event.pairs_per_second,
            "train/peak_gib": event.peak_bytes / 2**30,
        }
        self._theirs.log(told, step=event.step)

    def log_validation(self, look: ValidationResult) -> None:
        """Log a look at held-out pictures, pictures included: give it to `Validation` as ``on_validation``."""
        at = f"validation/strength_{look.strength:g}"
        self._theirs.log({f"{at}/win_rate": look.win_rate, f"{at}/gain": look.gain}, step=look.step)
        if look.pictures and hasattr(self._theirs, "log_images"):
            pictures = np.stack([np.asarray(one.convert("RGB")) for one in look.pictures])
            shape = {"dataformats": "NHWC"} if self._theirs.name == "tensorboard" else {}
            self._theirs.log_images({at: pictures}, step=look.step, **shape)


@contextmanager
def open_tracker(
    tracker: str,
    run: str,
    *,
    folder: str | Path = "runs",
    about: Mapping[str, str | float] = MappingProxyType({}),
) -> Iterator[Tracker]:
    """Track a training for a ``with`` block with any tracker that accelerate knows and that is installed.

    Args:
        tracker: ``"tensorboard"``, ``"wandb"``, ``"trackio"``, ``"comet_ml"``, ``"mlflow"``, ``"swanlab"``, ...
        run: the name of the run, or of the project where the tracker names runs itself.
        folder: where a tracker that writes files writes them.
        about: what to store beside it, settings of the trainer for instance.

    Raises:
        InvalidValueError: if accelerate knows no such tracker.
        MissingExtraError: if its package is not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers  # noqa: PLC0415 - loads transformers

    kinds = {str(getattr(kind, "value", kind)): made for kind, made in LOGGER_TYPE_TO_CLASS.items()}
    if tracker not in kinds:
        raise InvalidValueError(f"there is no tracker {tracker!r}. Choose of: {', '.join(sorted(kinds))}.")
    if tracker not in {str(getattr(kind, "value", kind)) for kind in get_available_trackers()}:
        raise MissingExtraError(f"open_tracker({tracker!r})", package=tracker)
    kind = kinds[tracker]
    theirs = kind(run, logging_dir=str(folder)) if kind.requires_logging_directory else kind(run)
    theirs.start()
    try:
        if about:
            theirs.store_init_configuration(dict(about))
        yield Tracker(theirs)
    finally:
        theirs.finish()
