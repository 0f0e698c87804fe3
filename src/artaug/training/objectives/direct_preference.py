"""Direct preference optimization on pairs."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from artaug._internal.annotations import checked
from artaug._internal.text import short_repr
from artaug.training.noise_schedule import Latents, Sigmas
from artaug.training.objectives.base import Objective, PairBatch, Student
from artaug.training.objectives.losses import check_outside_weight, check_range, mean_squared_errors, norm_excess


@checked
@final
@dataclass(frozen=True, kw_only=True)
class DirectPreference(Objective):
    """Direct preference optimization: of each pair, after is preferred to before.

    The student learns to fit *after* better, and *before* worse, than the frozen model does. With ``L(model, x)`` the mean
    squared error of a model's prediction for the noisy picture of ``x``, noise and level shared by both pictures::

        gain(x) = L(teacher, x) - L(student, x)
        loss    = -log sigmoid(beta / 2 * (gain(x_a) - gain(x_b)))
                  + anchor * beta / 2 * (|student - teacher|^2 at z_a + |student - teacher|^2 at z_b)

    The first line is Diffusion-DPO (arXiv 2311.12908, eq. 14) and, for flow models, Flow-DPO (arXiv 2501.13918) with a
    constant beta. It needs no reward model: the policy that maximizes a reward within a KL distance of the teacher is
    proportional to ``teacher * exp(reward / beta)``, so a policy *implies* the reward ``beta log(student / teacher)`` (up to a
    term that both pictures share), and the errors bound those logarithms: ``beta / 2 * gain`` is the implicit reward. The
    probability that after is preferred is the sigmoid of the difference of rewards (Bradley and Terry), whose negative
    logarithm is minimized. ``L`` is taken of whatever the model predicts: velocity, noise or v. A loss of log 2 is no
    preference, which is where every training starts.

    That term sets no limit: the error of before may grow without end. The anchor does. For a flow student that moves its
    prediction at both pictures by ``x`` times the difference ``d``, and a teacher that cannot tell them apart, the loss is
    ``-log sigmoid(beta m x) + anchor beta m x^2`` with ``m = mean(d^2)``, least where ``sigmoid(-beta m x) = 2 anchor x``.
    At the defaults and ``m = 0.2``, usual for one prompt drawn twice from one seed, that is the edit itself, x = 1. So
    ``beta`` should be about ``4 / m``. The published 2000 to 5000 are for pictures that have nothing in common, and stop at
    a hundredth of an edit here; without an anchor, a small beta overshoots it.

    Two safeguards are off unless they are asked for. ``safeguard`` (Diffusion-SDPO, arXiv 2511.03317) lets *before* pull less
    where it pulls against *after*: with ``g_a`` and ``g_b`` the gradients of the two errors by the predictions, the gradient of
    *before* counts ``min(1, (1 - safeguard) |g_a|^2 / <g_a, g_b>)`` times where they point the same way, so that to first
    order no step makes *after* fit worse. The scale is each pair's own (the authors' script has one for a batch) and does not know
    the anchor. Above 0, a pair of equal pictures no longer cancels: that share of fine-tuning on the picture is left.
    ``norm_guard`` (after NormGuard, arXiv 2606.27771, whose formula has not been compared with ours) punishes predictions that
    are longer than the teacher's, in which preference shows as hard, oversaturated pictures.

    With ``own_noise=True`` in the training's settings, pictures are noised with what they were drawn from: PNAPO (arXiv 2605.09433).

    Raises:
        InvalidValueError: unless ``beta`` is above 0, ``anchor``, ``outside_weight`` and ``norm_guard`` at least 0,
            ``safeguard`` in [0, 1], and all finite.

    >>> import artaug as aa
    >>> aa.DirectPreference(beta=5.0, safeguard=0.5).anchor
    0.01
    """

    beta: float = 20.0
    """How much a difference of mean squared errors counts: the smaller, the further the LoRA may go."""
    anchor: float = 0.01
    """How strongly both predictions are held to the teacher's, in units of ``beta / 2``; everywhere in the picture."""
    outside_weight: float = 1.0
    """Weight of an error outside the plan's regions in the preference, where one inside counts 1."""
    safeguard: float | None = None
    """The part of the descent of *after* that *before* may not take away, in [0, 1] (the paper's mu); None for plain DPO."""
    norm_guard: float = 0.0
    """Weight of the penalty on predictions longer than the teacher's, in units of ``beta / 2`` as the anchor; 0 for none."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_outside_weight(self, self.outside_weight)
        check_range(self, "beta", least=0, open_at_least=True)
        check_range(self, "anchor", least=0)
        check_range(self, "norm_guard", least=0)
        if self.safeguard is not None:
            check_range(self, "safeguard", least=0, most=1)

    def loss(self, model: Student, batch: PairBatch) -> Tensor:
        after, before = self._fit(model, batch, batch.after), self._fit(model, batch, batch.before)
        error_before = before.error
        if self.safeguard is not None:
            # The value stays the same, only its gradient is scaled.
            scale = safe_scale(after.residual, before.residual, self.safeguard)
            error_before = error_before.detach() + scale * (error_before - error_before.detach())
        margin = (after.teacher_error - after.error) - (before.teacher_error - error_before)
        half = self.beta / 2
        loss = half * self.anchor * (after.distance + before.distance) - logsigmoid(half * margin)
        if self.norm_guard > 0:
            loss = loss + half * self.norm_guard * (after.excess + before.excess)
        # The mean over pairs comes last: each pair has a preference of its own, and logsigmoid is not linear.
        return loss.mean()

    def _fit(self, model: Student, batch: PairBatch, clean: Latents) -> "_Fit":
        """How student and teacher predict the noisy picture."""
        noisy = model.noise_schedule.add_noise(clean, batch.noise, batch.sigmas)
        target = model.noise_schedule.target(clean, batch.noise, batch.sigmas)
        teacher = model.teacher_predict(noisy, batch.sigmas, batch.conditioning)
        student = model.predict(noisy, batch.sigmas, batch.conditioning)
        # Errors are weighted by regions, the distance is not: the anchor holds the prediction in the whole picture.
        weights = batch.loss_weights(self.outside_weight)
        residual = student.detach() - target
        return _Fit(
            error=mean_squared_errors(student, target, weights=weights),
            teacher_error=mean_squared_errors(teacher, target, weights=weights),
            distance=mean_squared_errors(student, teacher),
            excess=norm_excess(student, teacher),
            residual=residual if weights is None else weights * residual,
        )


@dataclass(frozen=True, eq=False)
class _Fit:
    """How a noisy picture is predicted; all of shape (batch,), but for the residual."""

    error: Tensor
    teacher_error: Tensor
    distance: Tensor
    """Mean squared distance of student and teacher."""
    excess: Tensor
    residual: Latents
    """The gradient of the student's error by its prediction, up to a factor; without gradient."""


def safe_scale(after: Latents, before: Latents, safeguard: float) -> Sigmas:
    """How much the gradient of before may count, in [0, 1], so that after fits no worse to first order: shape (batch, ).

    ``(-g_a + scale g_b) . g_a <= -safeguard |g_a|^2`` (arXiv 2511.03317), solved for the scale, pair by pair.
    """
    along = (after * before).flatten(1).sum(1)
    limit = (1 - safeguard) * after.square().flatten(1).sum(1)
    return torch.where(along > 0, limit / along.clamp(min=torch.finfo(along.dtype).tiny), 1.0).clamp(max=1)
