"""Plain fine-tuning on the pictures after, the control arm."""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from artaug._internal.annotations import checked
from artaug._internal.text import short_repr
from artaug.training.noise_schedule import NoiseSchedule
from artaug.training.objectives.base import Objective, PairBatch, Student
from artaug.training.objectives.losses import check_outside_weight, check_weighting, fine_tuning_loss
from artaug.training.weighting import LossWeighting


@checked
@final
@dataclass(frozen=True, kw_only=True)
class SupervisedFineTuning(Objective):
    """Plain fine-tuning on the pictures after; the pictures before are not used. The control arm.

    The student should predict what the noisy picture was made of: ``noise - after`` (flow, arXiv 2210.02747), ``noise``
    (epsilon, arXiv 2006.11239, eq. 14) or ``alpha noise - s after`` (v, arXiv 2202.00512, section 4). The mean squared
    error is least at the mean over all pictures that could lie beneath the noise, which is why few pictures are
    memorised.

    Raises:
        InvalidValueError: unless ``outside_weight`` is finite and at least 0.
    """

    outside_weight: float = 1.0
    """Weight of an error outside the plan's regions, where one inside counts 1."""
    weighting: LossWeighting | None = None
    """How much an error counts by its noise level; None for all the same."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_outside_weight(self, self.outside_weight)

    def check(self, noise_schedule: NoiseSchedule) -> None:
        check_weighting(self.weighting, noise_schedule)

    def loss(self, model: Student, batch: PairBatch) -> Tensor:
        return fine_tuning_loss(model, batch, batch.after, outside_weight=self.outside_weight, weighting=self.weighting)
