"""Negative-aware fine-tuning (DiffusionNFT) on pairs, or on pictures with rewards."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from artaug._internal.annotations import checked
from artaug._internal.text import short_repr
from artaug.training.noise_schedule import Latents, Sigmas
from artaug.training.objectives.base import Objective, PairBatch, Student
from artaug.training.objectives.losses import check_range, mean_squared_errors, norm_excess


@checked
@final
@dataclass(frozen=True, kw_only=True)
class NegativeAware(Objective):
    """Negative-aware fine-tuning: the student is drawn to good pictures, and its mirror image to bad ones.

    DiffusionNFT (arXiv 2509.16117, eq. 5). With ``v`` the student's prediction and ``v0`` the teacher's, an *implicit* positive and
    an implicit negative policy lie on either side of the teacher::

        v_plus  = (1 - beta) v0 + beta v          v_minus = (1 + beta) v0 - beta v
        loss    = (reward E(v_plus) + (1 - reward) E(v_minus)) / beta,  summed over both pictures of a pair

    where ``E`` is the error of the clean estimate that the prediction implies, divided by its own mean absolute value
    (without gradient), so that all noise levels count alike. At its least, ``v`` moves from ``v0`` towards good pictures and
    away from bad ones by an amount that grows as ``beta`` falls. Pairs without rewards have reward 1 for *after* and 0 for
    *before*. Pairs with `ImagePair.rewards` are two pictures with any rewards in [0, 1].

    The paper draws new pictures at every step and moves its old policy along by an average; here the teacher is the model before
    the round, and the rounds of `enhance` move it. A pair of equal pictures has a loss, but no gradient at the start:
    both halves pull equally, in opposite directions.

    Where the teacher estimates the mean of both pictures, the student ends ``1 / (2 beta)`` of their difference from it, which is
    ``2 / beta`` times the paper's ``Delta`` (theorem 3.2). Divided by its size, an error counts as its absolute value does, so that
    the majority of rewards decides where it ends, not their mean.

    Raises:
        InvalidValueError: unless ``beta`` is above 0, ``anchor`` and ``norm_guard`` at least 0, and all finite.

    >>> import artaug as aa
    >>> aa.NegativeAware(beta=0.5).anchor
    0.0001
    """

    beta: float = 1.0
    """How far from the teacher the implicit policies are: the smaller, the further the student goes. Small ones break it."""
    anchor: float = 1e-4
    """Weight of the mean squared distance of the predictions to the teacher's."""
    norm_guard: float = 0.0
    """Weight of the penalty on predictions longer than the teacher's (NormGuard, arXiv 2606.27771); 0 for none."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_range(self, "beta", least=0, open_at_least=True)
        check_range(self, "anchor", least=0)
        check_range(self, "norm_guard", least=0)

    def loss(self, model: Student, batch: PairBatch) -> Tensor:
        reward_before, reward_after = (0.0, 1.0) if batch.rewards is None else batch.rewards.unbind(1)
        return (
            self._errors(model, batch, batch.before, reward_before)
            + self._errors(model, batch, batch.after, reward_after)
        ).mean()

    def _errors(self, model: Student, batch: PairBatch, clean: Latents, reward: Sigmas | float) -> Sigmas:
        noisy = model.noise_schedule.add_noise(clean, batch.noise, batch.sigmas)
        teacher = model.teacher_predict(noisy, batch.sigmas, batch.conditioning)
        student = model.predict(noisy, batch.sigmas, batch.conditioning)
        step = self.beta * (student - teacher)
        positive, negative = (
            _normalized_errors(model.noise_schedule.predict_x0(noisy, prediction, batch.sigmas), clean)
            for prediction in (teacher + step, teacher - step)
        )
        errors = (reward * positive + (1 - reward) * negative) / self.beta
        errors = errors + self.anchor * mean_squared_errors(student, teacher)
        return errors + self.norm_guard * norm_excess(student, teacher) if self.norm_guard > 0 else errors


def _normalized_errors(estimate: Latents, clean: Latents) -> Sigmas:
    """Mean squared errors of clean estimates over their mean absolute errors, which have no gradient: shape (batch,)."""
    size = (estimate - clean).detach().abs().flatten(1).mean(1)
    return mean_squared_errors(estimate, clean) / size.clamp(min=_LEAST)


_LEAST = torch.finfo(torch.float32).eps
