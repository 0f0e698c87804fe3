"""The paper's recipe: copy before, then learn after on top of it."""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from artaug._internal.annotations import checked
from artaug.errors import InvalidValueError
from artaug.training.noise_schedule import NoiseSchedule
from artaug.training.objectives.base import Objective, PairBatch, Stage, Student, TrainingPlan
from artaug.training.objectives.losses import check_weighting, fine_tuning_loss
from artaug.training.weighting import LossWeighting


@checked
@final
@dataclass(frozen=True, kw_only=True)
class TwoStage(Objective):
    """The paper's recipe: one LoRA copies *before*, a second learns *after* on top of it, and the first is dropped.

    arXiv 2412.12888 (differential training); the averaging over pairs is DiffSynth-Studio's advice for it. Both stages
    minimize what `SupervisedFineTuning` minimizes. With ``W`` the frozen weights, ``A`` the first LoRA and ``B`` the second::

        stage 1:  v(W + A)      reproduces before, so A holds what the model fails to predict of it
        stage 2:  v(W + A + B)  reproduces after, so B holds little but the change
        result:   v(W + B)      the subtraction of A happens in weights, not in predictions

    ``v(W + A + B) - v(W + A)`` equals ``v(W + B) - v(W)`` up to terms that hold both ``A`` and ``B``: the recipe is right to
    first order in ``A``.

    How the paper weights noise levels is not published. DiffSynth-Studio, whose authors wrote it, multiplies the loss of both
    stages by 0 to 1.8, depending on the level: ``weighting=BellShaped()``.

    Raises:
        InvalidValueError: unless ``copy_fraction`` lies strictly between 0 and 1.
    """

    per_pair: bool = True
    """Train every pair alone and average the second LoRAs exactly (rank: pairs x rank); else pool all pairs."""
    copy_fraction: float = 0.5
    """Share of the steps for the first LoRA, in (0, 1)."""
    weighting: LossWeighting | None = None
    """How much an error counts by its noise level, in both stages. DiffSynth-Studio's is `BellShaped`; None for all the
    same."""

    def __post_init__(self) -> None:
        if not 0 < self.copy_fraction < 1:
            raise InvalidValueError(
                f"TwoStage(copy_fraction={self.copy_fraction}): need a share of the steps, above 0 and below 1."
            )

    def check(self, noise_schedule: NoiseSchedule) -> None:
        check_weighting(self.weighting, noise_schedule)

    def loss(self, model: Student, batch: PairBatch) -> Tensor:
        return fine_tuning_loss(model, batch, batch.after, weighting=self.weighting)

    def _copy_loss(self, model: Student, batch: PairBatch) -> Tensor:
        """The first stage: reproduce the pictures before."""
        return fine_tuning_loss(model, batch, batch.before, weighting=self.weighting)

    def training_plan(self, pairs: int) -> TrainingPlan:
        together = tuple(range(pairs))
        groups = tuple((index,) for index in together) if self.per_pair else (together,)
        # Shares are relative within a group, so every pair gets the same number of steps, up to rounding.
        return TrainingPlan(
            groups, (Stage(self._copy_loss, self.copy_fraction), Stage(self.loss, 1 - self.copy_fraction))
        )
