"""Errors of predictions, and what they are weighted by: parts that several objectives share."""

import math

import torch
from torch import Tensor

from artaug.errors import InvalidValueError
from artaug.training.noise_schedule import Latents, NoiseSchedule, Sigmas
from artaug.training.objectives.base import LatentWeights, Objective, PairBatch, Student
from artaug.training.weighting import LossWeighting


def mean_squared_errors(prediction: Latents, target: Latents, *, weights: LatentWeights | None = None) -> Sigmas:
    """Weighted squared errors, averaged over the latents of each row: shape (batch,). Weights are not normalized."""
    errors = (prediction - target).square()  # (batch, ...)
    return (errors if weights is None else weights * errors).flatten(1).mean(1)


def weight_by_level(errors: Sigmas, model: Student, batch: PairBatch, weighting: LossWeighting | None) -> Sigmas:
    """Errors (batch,) of predictions, weighted by their noise levels. Weights are not normalized over the batch."""
    if weighting is None:
        return errors
    return weighting.weights(model.noise_schedule, batch.sigmas) * errors


def changed_in_regions(batch: PairBatch) -> Latents:
    """The latents after, with what changed outside the plan's regions taken back: those of a plan without regions as they are."""
    if batch.region_mask is None:
        return batch.after
    return batch.before + batch.region_mask * (batch.after - batch.before)


def norm_excess(prediction: Latents, teacher: Latents) -> Sigmas:
    """A hinge after NormGuard: the square of the part by which predictions are longer than the teacher's, 0 where they are not.

    As in arXiv 2606.27771 it acts where ``|student| > |teacher|`` alone, and is added to the loss. The paper's abstract says no
    more, and its formula has not been compared with this one: ``relu(|student| / |teacher| - 1)^2``. Lengths are relative to the
    teacher's, so that a weight means the same at every noise level. Shape (batch,).
    """
    norms, limits = (tensor.flatten(1).norm(dim=1) for tensor in (prediction, teacher))
    excess: Tensor = (norms / limits.clamp(min=torch.finfo(limits.dtype).tiny) - 1).relu()
    return excess.square()


def fine_tuning_loss(
    model: Student,
    batch: PairBatch,
    clean: Latents,
    *,
    outside_weight: float = 1.0,
    weighting: LossWeighting | None = None,
) -> Tensor:
    """The loss of plain fine-tuning on some clean latents: a scalar."""
    noisy = model.noise_schedule.add_noise(clean, batch.noise, batch.sigmas)
    target = model.noise_schedule.target(clean, batch.noise, batch.sigmas)
    prediction = model.predict(noisy, batch.sigmas, batch.conditioning)
    errors = mean_squared_errors(prediction, target, weights=batch.loss_weights(outside_weight))
    return weight_by_level(errors, model, batch, weighting).mean()


def check_outside_weight(objective: Objective, outside_weight: float) -> None:
    """Raise InvalidValueError unless the weight of errors outside the regions is finite and at least 0."""
    if not 0 <= outside_weight < math.inf:
        raise InvalidValueError(
            f"{type(objective).__name__}(outside_weight={outside_weight}): need a finite weight of at least 0; at 1 all "
            "errors count the same."
        )


def check_range(
    objective: Objective, name: str, *, least: float, most: float = math.inf, open_at_least: bool = False
) -> None:
    """Raise InvalidValueError unless a setting is finite, at least ``least`` (above it, if open), and at most ``most``."""
    value = getattr(objective, name)
    if not (math.isfinite(value) and least <= value <= most and not (open_at_least and value == least)):
        low = f"above {least:g}" if open_at_least else f"at least {least:g}"
        raise InvalidValueError(
            f"{type(objective).__name__}({name}={value}): need a finite number, {low}"
            f"{'' if most == math.inf else f' and at most {most:g}'}."
        )


def check_weighting(weighting: LossWeighting | None, noise_schedule: NoiseSchedule) -> None:
    """Raise ModelError unless models with this schedule can be weighted so."""
    if weighting is not None:
        weighting.weights(noise_schedule, torch.ones(1))
