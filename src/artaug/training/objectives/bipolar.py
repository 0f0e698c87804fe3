"""Both directions of another objective: a slider."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Never, final

from torch import Tensor

from artaug._internal.annotations import checked
from artaug._internal.text import short_repr
from artaug.errors import InvalidValueError, ModelError
from artaug.plan import Plan
from artaug.regional.denoiser import Conditioning
from artaug.regional.guide import Guide
from artaug.training.noise_schedule import Latents, NoiseSchedule, Sigmas
from artaug.training.objectives.base import Objective, PairBatch, Student, StudentWrapper, compute_loss
from artaug.training.objectives.paired_difference import PairedDifference


@checked
@final
@dataclass(frozen=True, kw_only=True)
class Bipolar(Objective):
    """A slider: at ``scale`` the LoRA leads from before to after, at minus ``scale`` from after to before.

    Every step minimizes the mean of both directions of another objective, on the same pairs, noise and levels::

        loss = (objective(student at +scale; before, after) + objective(student at -scale; after, before)) / 2

    In the LoRA's scale ``s``, a prediction is the series ``v0 + s J + s^2 H + ...``. One direction alone fits any sum of the
    odd and the even part. Both directions ask the same of ``J``, since the sign of ``s`` and that of ``d`` change together,
    and opposite things of ``H``. An effect that does not depend on the direction (softer pictures, say) is held at zero.

    ``objective`` says what a direction minimizes:

    - `PairedDifference`, the default: at ``+scale`` the clean estimate at *after* is the teacher's at *before*
      plus ``d``, at ``-scale`` the one at *before* is the teacher's at *after* minus ``d``. These are the even and odd
      steps of ADDifT (traintrain), which alternates them, at a quarter of the scale, and for noise prediction only.
    - `SupervisedFineTuning`: the visual Concept Sliders (arXiv 2311.12092), fine-tuning on *after* at ``+scale`` and on
      *before* at ``-scale``.

    It takes two forward passes with gradient per step, so twice the time and, without gradient checkpointing, twice the
    activations. Both directions are parts of one loss: ``Student.predict`` gives each its own gradient, also where
    layers are computed again in the backward pass.

    Raises:
        InvalidValueError: if ``objective`` has several stages, or ``scale`` is not above 0 and finite.

    >>> import artaug as aa
    >>> aa.Bipolar(objective=aa.SupervisedFineTuning()).scale
    1.0
    """

    objective: Objective = field(default_factory=PairedDifference)
    """What each direction minimizes."""
    scale: float = 1.0
    """At 0.25 a quarter of the LoRA makes the full difference, so at 1 it is a slider with four times its range."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise InvalidValueError(f"Bipolar(scale={self.scale}): need a finite scale above 0.")
        if type(self.objective).training_plan is not Objective.training_plan or self.objective.companion is not None:
            raise InvalidValueError(
                f"Bipolar(objective={self.objective}): an objective with a training plan of its own, or a companion, cannot be "
                "reversed. Expected one with a loss alone, as PairedDifference or SupervisedFineTuning."
            )

    @property
    def reads_own_noise(self) -> bool:
        return self.objective.reads_own_noise

    @property
    def extra_noise(self) -> int:
        return self.objective.extra_noise

    @property
    def negative_prompt(self) -> str | None:
        return self.objective.negative_prompt

    @property
    def decodes(self) -> bool:
        return self.objective.decodes

    def phrases_of(self, plan: Plan) -> Sequence[str]:
        return self.objective.phrases_of(plan)

    def check(self, noise_schedule: NoiseSchedule) -> None:
        self.objective.check(noise_schedule)

    def loss(self, model: Student, batch: PairBatch) -> Tensor:
        forward = compute_loss(self.objective.loss, _ScaledStudent(model, self.scale), batch)
        # Noise and levels stay with the pair, so that only the sign of d changes between the two directions.
        reversed_batch = replace(
            batch,
            before=batch.after,
            after=batch.before,
            # What is good at +scale is bad at -scale: (0, 1), before and after, stays (0, 1) for after and before.
            rewards=None if batch.rewards is None else 1 - batch.rewards.flip(1),
        )
        return (forward + compute_loss(self.objective.loss, _ScaledStudent(model, -self.scale), reversed_batch)) / 2


@dataclass(frozen=True, eq=False)
class _ScaledStudent(StudentWrapper):
    """A student whose LoRA counts ``scale`` times."""

    scale: float

    def predict(self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning, *, scale: float = 1.0) -> Latents:
        return self.student.predict(noisy, sigmas, conditioning, scale=scale * self.scale)

    def predict_guided(
        self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning, *, guide: Guide, plans: Sequence[Plan]
    ) -> Never:
        raise ModelError(
            f"Bipolar predicts at {self.scale:g} times the update, and a prediction under {type(guide).__name__} is at 1. "
            "Give it an objective that uses predict."
        )
