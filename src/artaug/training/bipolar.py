"""A LoRA for both directions: after at its full scale, before at minus that."""

import dataclasses
import math
from dataclasses import dataclass, field

from torch import Tensor

from artaug.errors import InvalidValueError
from artaug.training.model import Conditioning
from artaug.training.noise_schedule import Latents, NoiseSchedule, Sigmas
from artaug.training.objectives import Objective, PairBatch, PairedDifference, Student


@dataclass(frozen=True, kw_only=True)
class Bipolar(Objective):
    """A slider: worn at ``scale`` the LoRA learns after from before, worn at minus ``scale`` before from after.

    Every step minimizes the mean of both turns of another objective, on the same pairs, noise and levels::

        loss = (of(student at +scale; before, after) + of(student at -scale; after, before)) / 2

    A prediction is ``v0 + s J + s^2 H + ...`` in the scale ``s`` the LoRA is worn at. One turn alone is content with any
    sum of the odd and the even part that fits; both turns ask the same of ``J``, with opposite signs, and opposite things
    of ``H``. What only makes pictures other (softer, say, in both directions) is thus held at zero.

    ``of`` says what a turn is:

    - `PairedDifference`, unless told otherwise: at ``+scale`` the clean estimate at *after* is the teacher's at *before*
      plus ``d``, at ``-scale`` the one at *before* is the teacher's at *after* minus ``d``. These are the even and odd
      steps of ADDifT (traintrain), which takes them in turn, at a quarter of the scale, and for noise prediction only.
    - `SupervisedFineTuning`: the visual Concept Sliders (arXiv 2311.12092), fine-tuning on *after* at ``+scale`` and on
      *before* at ``-scale``.

    It takes two forward passes with gradient a step, so twice the time and, without gradient checkpointing, twice the
    activations. Both turns are parts of one loss: ``Student.predict`` gives each its own gradient, where layers are
    computed again in the backward pass, too.

    Raises:
        InvalidValueError: if ``of`` is an objective of several stages, or ``scale`` is not above 0 and finite.

    >>> import artaug as aa
    >>> aa.Bipolar(objective=aa.SupervisedFineTuning()).scale
    1.0
    """

    objective: Objective = field(default_factory=PairedDifference)
    """What each turn minimizes."""
    scale: float = 1.0
    """At 0.25 a quarter of the LoRA makes the whole difference, so at 1 it is a slider with four times its range."""

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise InvalidValueError(f"Bipolar(scale={self.scale}): need a finite scale above 0.")
        if type(self.objective).training_plan is not Objective.training_plan:
            raise InvalidValueError(
                f"Bipolar(objective={self.objective}): an objective with a course of its own has no turn that could be reversed. "
                "Expected one with a loss alone, as PairedDifference or SupervisedFineTuning."
            )

    def loss(self, model: Student, batch: PairBatch) -> Tensor:
        there = self.objective.loss(_Worn(model, self.scale), batch)
        reversed_batch = dataclasses.replace(batch, before=batch.after, after=batch.before)
        return (there + self.objective.loss(_Worn(model, -self.scale), reversed_batch)) / 2


@dataclass(frozen=True, eq=False)
class _Worn:
    """A student whose LoRA is worn at another scale."""

    student: Student
    scale: float

    @property
    def noise_schedule(self) -> NoiseSchedule:
        return self.student.noise_schedule

    def predict(self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning, *, scale: float = 1.0) -> Latents:
        return self.student.predict(noisy, sigmas, conditioning, scale=scale * self.scale)

    def teacher_predict(self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning) -> Latents:
        return self.student.teacher_predict(noisy, sigmas, conditioning)
