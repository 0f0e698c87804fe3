"""Preference along the paired difference: direct preference without the noise, held to the teacher."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor
from torch.nn.functional import logsigmoid

from artaug._internal.annotations import checked
from artaug._internal.text import short_repr
from artaug.training.noise_schedule import Latents, Sigmas
from artaug.training.objectives.base import LatentWeights, Objective, PairBatch, Student
from artaug.training.objectives.losses import changed_in_regions, check_outside_weight, check_range, norm_excess


@checked
@final
@dataclass(frozen=True, kw_only=True)
class PairedPreference(Objective):
    """Prefers after to before as `DirectPreference` does, with the direction of `PairedDifference` in place of the noise.

    `PairedDifference` asks the student at ``z_a`` for its target; what that adds to the teacher's own prediction there is
    the *edit*::

        flow:     e = v0(z_b) - d - v0(z_a)
        epsilon:  e = e0(z_b) - e0(z_a)
        v:        e = v0(z_b) - s d - v0(z_a)

    With ``u_a`` and ``u_b`` what the student adds to the teacher at the noisy pictures after and before, and the mean over latents
    as product::

        loss = -log sigmoid(beta / 2 * (u_a + u_b) . e) + anchor * beta / 2 * (|u_a|^2 + |u_b|^2)

    It is Diffusion-DPO (arXiv 2311.12908, eq. 14) to first order in what the student adds: there the margin is
    ``2 (u_b . r_b - u_a . r_a) + |u_b|^2 - |u_a|^2``, with ``r`` the teacher's error for the noisy picture. For an equal ``u``
    at both, ``r_b - r_a`` *is* the edit, since the two share their noise and it cancels. Where ``u`` differs it does not cancel
    in DPO, which is variance, and ``|u_b|^2`` rewards errors without end; both are left out here.

    So the student adds the edit where the picture is still *before* as well as where it is *after*, ``x`` times, as far as the
    anchor lets it: ``sigmoid(-beta x |e|^2) = 2 anchor x``. A small edit, or a small ``beta``, is learned ``1 / (4 anchor)`` times,
    8 times at the default; a large one less, so that no pair dominates. Equal pictures give a gradient of exactly zero at the
    start, and hold the student to the teacher afterwards.

    Raises:
        InvalidValueError: unless ``beta`` and ``anchor`` are above 0, ``outside_weight`` and ``norm_guard`` at least 0,
            and all finite.

    >>> import artaug as aa
    >>> aa.PairedPreference(anchor=0.1).beta
    5.0
    """

    recommended_echo: ClassVar[int] = 2
    """The teacher predicts twice for two steps: 7 passes a step and not 8. ``benchmarks/ablation.py`` finds no difference at equal
    passes where the LoRA changes little, and with one use a little more gain where it is made to change much."""

    beta: float = 5.0
    """How much large edits are learned less: at a mean square of ``1 / beta``, noticeably."""
    anchor: float = 0.03
    """How strongly predictions are held to the teacher's; an edit is learned at most ``1 / (4 anchor)`` times."""
    outside_weight: float = 1.0
    """Weight of the edit outside the plan's regions, where inside it counts 1."""
    composite: bool = False
    """Learn from ``before + region_mask * (after - before)``: outside the regions the picture should stay as it was."""
    norm_guard: float = 0.0
    """Weight of the penalty on predictions longer than the teacher's (NormGuard, arXiv 2606.27771), in units of ``beta / 2``; 0
    for none."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_outside_weight(self, self.outside_weight)
        check_range(self, "beta", least=0, open_at_least=True)
        check_range(self, "anchor", least=0, open_at_least=True)
        check_range(self, "norm_guard", least=0)

    def loss(self, model: Student, batch: PairBatch) -> Tensor:
        schedule, sigmas, conditioning = model.noise_schedule, batch.sigmas, batch.conditioning
        after = changed_in_regions(batch) if self.composite else batch.after  # (batch, ...), as all latents here
        noisy_before = schedule.add_noise(batch.before, batch.noise, sigmas)
        noisy_after = schedule.add_noise(after, batch.noise, sigmas)
        teacher_before = model.teacher_predict(noisy_before, sigmas, conditioning)
        teacher_after = model.teacher_predict(noisy_after, sigmas, conditioning)
        edit = schedule.paired_target(teacher_before, after - batch.before, sigmas) - teacher_after
        student_after = model.predict(noisy_after, sigmas, conditioning)
        student_before = model.predict(noisy_before, sigmas, conditioning)
        added_after, added_before = student_after - teacher_after, student_before - teacher_before
        weights = batch.loss_weights(self.outside_weight)
        margin = _mean_product(added_after + added_before, edit, weights)
        # The margin is weighted by regions, the distance is not: the anchor holds the prediction in the whole picture.
        distance = _mean_product(added_after, added_after) + _mean_product(added_before, added_before)
        half = self.beta / 2
        loss = half * self.anchor * distance - logsigmoid(half * margin)
        if self.norm_guard > 0:
            excess = norm_excess(student_after, teacher_after) + norm_excess(student_before, teacher_before)
            loss = loss + half * self.norm_guard * excess
        return loss.mean()


def _mean_product(first: Latents, second: Latents, weights: LatentWeights | None = None) -> Sigmas:
    """The mean over the latents of each row: shape (batch,)."""
    product = first * second
    return (product if weights is None else weights * product).flatten(1).mean(1)
