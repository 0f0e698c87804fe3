"""The paired difference: the target is the frozen model at before, moved by what changed."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from artaug._internal.annotations import checked
from artaug._internal.text import short_repr
from artaug.training.noise_schedule import Latents, NoiseSchedule, Sigmas
from artaug.training.objectives.base import Objective, PairBatch, Student
from artaug.training.objectives.losses import (
    changed_in_regions,
    check_outside_weight,
    check_range,
    check_weighting,
    mean_squared_errors,
    weight_by_level,
)
from artaug.training.weighting import LossWeighting


@checked
@final
@dataclass(frozen=True, kw_only=True)
class PairedDifference(Objective):
    """Learns what separates after from before and nothing else, in one run.

    With the same noise and level for both pictures, the student's clean estimate ``x0`` at the noisy *after* picture should
    be the frozen teacher's at the noisy *before* picture, moved by exactly ``d``::

        x0(z_a, student) = x0(z_b, teacher) + d,     z_a - z_b = (1 - s) d  (flow)  or  alpha d  (epsilon, v)

    Insert the clean estimate, which is linear in the prediction (left), and solve for the student's (right)::

        flow:     x0 = z - s v             (1 - s) d - s (v(z_a) - v0(z_b)) = d              v(z_a) = v0(z_b) - d
        epsilon:  x0 = (z - s e) / alpha   (alpha d - s (e(z_a) - e0(z_b))) / alpha = d      e(z_a) = e0(z_b)
        v:        x0 = alpha z - s v       alpha^2 d - s (v(z_a) - v0(z_b)) = d              v(z_a) = v0(z_b) - s d

    What the teacher gets wrong about *before*, its noise included, is wrong in the target alike and cancels; in fine-tuning
    the same residual is variance, which a LoRA of few pairs memorises. Equal pictures give a loss and a gradient of exactly
    zero at the start, so guidance or step distillation is the reference and is never un-learned.

    Sampling starts at pure noise, where ``z_b = z_a``, and on its way to *after* passes near *before* first. There ``at_before`` says
    what the student should predict: at ``z_b`` its clean estimate moves by ``s^2 d``, all the way at pure noise, where this is the
    target above, and not at all where there is no noise, since a picture that needs no change should be left alone::

        x0(z_b, student) = x0(z_b, teacher) + s^2 d

        flow:     v(z_b) = v0(z_b) - s d
        epsilon:  e(z_b) = e0(z_b) - alpha s d
        v:        v(z_b) = v0(z_b) - s d

    It leads further, for a second prediction with gradient. ``reach`` moves all targets, and the picture after, along ``d``: at 2, what is
    learned goes twice as far as the pairs.

    Where a pair knows the plan's regions (``PairBatch.region_mask``), errors outside them can count less, and what changed
    outside them can be taken back, so that only the planned change is learned.

    Raises:
        InvalidValueError: unless ``outside_weight`` is finite and at least 0, ``reach`` finite and above 0, and ``at_before`` in [0, 1].

    >>> import artaug as aa
    >>> aa.PairedDifference(at_before=0.5).reach
    1.0
    """

    recommended_echo: ClassVar[int] = 4
    """The teacher predicts once for four steps; ``benchmarks/echo.py`` finds no loss of quality."""

    outside_weight: float = 1.0
    """Weight of an error outside the plan's regions, where one inside counts 1. At 0 the LoRA is free there."""
    composite: bool = False
    """Learn from ``before + region_mask * (after - before)``: outside the regions the picture should stay as it was."""
    weighting: LossWeighting | None = None
    """How much an error counts by its noise level; None for all the same."""
    reach: float = 1.0
    """How far the student goes from before in the direction of after, in units of their difference."""
    at_before: float = 0.0
    """Share of the loss, in [0, 1], that is taken at the noisy pictures before; 0 and 1 need only one prediction with gradient."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_outside_weight(self, self.outside_weight)
        check_range(self, "reach", least=0, open_at_least=True)
        check_range(self, "at_before", least=0, most=1)

    def check(self, noise_schedule: NoiseSchedule) -> None:
        check_weighting(self.weighting, noise_schedule)

    def loss(self, model: Student, batch: PairBatch) -> Tensor:
        schedule, sigmas = model.noise_schedule, batch.sigmas
        after = changed_in_regions(batch) if self.composite else batch.after  # (batch, ...), as all latents here
        if self.reach != 1:
            after = batch.before + self.reach * (after - batch.before)
        difference = after - batch.before
        noisy_before = schedule.add_noise(batch.before, batch.noise, sigmas)
        # At z_b, not at z_a: the difference of the two noisy pictures has to be in the target for the LoRA to learn it.
        teacher = model.teacher_predict(noisy_before, sigmas, batch.conditioning)
        loss = torch.zeros_like(sigmas)
        if self.at_before < 1:
            noisy_after = schedule.add_noise(after, batch.noise, sigmas)
            target = schedule.paired_target(teacher, difference, sigmas)
            loss = loss + (1 - self.at_before) * self._errors(model, batch, noisy_after, target)
        if self.at_before > 0:
            target = schedule.target_at_before(teacher, difference, sigmas)
            loss = loss + self.at_before * self._errors(model, batch, noisy_before, target)
        return loss.mean()

    def _errors(self, model: Student, batch: PairBatch, noisy: Latents, target: Latents) -> Sigmas:
        prediction = model.predict(noisy, batch.sigmas, batch.conditioning)
        errors = mean_squared_errors(prediction, target, weights=batch.loss_weights(self.outside_weight))
        return weight_by_level(errors, model, batch, self.weighting)
