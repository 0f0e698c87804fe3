"""What a training step minimizes, and how many steps of which kind make a training."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from jaxtyping import Float
from torch import Tensor

from artaug.errors import InvalidValueError
from artaug.training.model import Conditioning
from artaug.training.noise_schedule import Latents, NoiseSchedule, Sigmas

LatentWeights: TypeAlias = Float[Tensor, "..."]
"""A number for every latent, of a shape that broadcasts to theirs."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PairBatch:
    """Some pairs, ready for one step: latents, prompts, and the noise both pictures of a pair share."""

    before: Latents
    """Clean latents of the pictures before: float32, shape (batch, ...)."""
    after: Latents
    """Clean latents of the pictures after, same shape."""
    conditioning: Conditioning
    """Their prompts, encoded."""
    noise: Latents
    """Standard normal, same shape as the latents: one draw a pair."""
    sigmas: Sigmas
    """Noise levels: shape (batch,), in (0, 1]."""
    region_mask: LatentWeights | None = None
    """How much of every latent lies in the plan's regions, in [0, 1], broadcastable to the latents' shape; None:
    everywhere."""

    def weights(self, outside: float) -> LatentWeights | None:
        """What a latent's error counts: 1 in the plan's regions, ``outside`` elsewhere, between them on an edge."""
        return None if self.region_mask is None or outside == 1 else outside + (1 - outside) * self.region_mask


class Student(Protocol):
    """The model in training, as an objective sees it."""

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """How the model's pictures are noised, and what it predicts."""

    def predict(self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning, *, scale: float = 1.0) -> Latents:
        """The prediction with the LoRA that is being trained, ``scale`` times: float32, with gradient.

        The gradient is that of the LoRA at that scale, also where the forward pass is computed again in the backward
        pass (gradient checkpointing), and predictions at several scales may be parts of one loss.
        """

    def teacher_predict(self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning) -> Latents:
        """The prediction without it, LoRAs of earlier rounds included: float32, without gradient."""


Loss: TypeAlias = Callable[[Student, PairBatch], Tensor]


@dataclass(frozen=True)
class Stage:
    """One run of the optimizer over a fresh LoRA."""

    loss: Loss
    """What it minimizes."""
    share: float = 1.0
    """How much of the steps it gets, relative to the other stages."""


@dataclass(frozen=True)
class TrainingPlan:
    """How a training proceeds: which pairs are learned together, and in which stages.

    Every group of pairs goes through all stages. What an earlier stage has learned is worn, frozen, while the later
    ones learn, and then dropped: the last stage's LoRA is the group's result, and the mean over groups the training's.
    """

    groups: tuple[tuple[int, ...], ...]
    """Numbers of the pairs that are learned together."""
    stages: tuple[Stage, ...]
    """In the order they are run."""

    def __post_init__(self) -> None:
        if not (self.groups and all(self.groups) and self.stages and all(stage.share > 0 for stage in self.stages)):
            raise InvalidValueError(
                f"a TrainingPlan needs at least one group, no empty group, and at least one stage with a share above 0, "
                f"received {len(self.groups)} group(s) and shares {[stage.share for stage in self.stages]}."
            )


class Objective(ABC):
    """What training minimizes. Subclass it and write `loss`; override `training_plan` for a training of several stages.

    >>> import artaug as aa
    >>> from torch.nn.functional import l1_loss
    >>> class Imitation(aa.Objective):
    ...     def loss(self, model, batch):
    ...         noisy = model.noise_schedule.add_noise(batch.after, batch.noise, batch.sigmas)
    ...         target = model.noise_schedule.target(batch.after, batch.noise, batch.sigmas)
    ...         return l1_loss(model.predict(noisy, batch.sigmas, batch.conditioning), target)
    """

    @abstractmethod
    def loss(self, model: Student, batch: PairBatch) -> Tensor:
        """The loss of one step, a scalar."""

    def training_plan(self, pairs: int) -> TrainingPlan:
        """How a training on this many pairs proceeds; unless overridden, all of them together in one stage."""
        return TrainingPlan((tuple(range(pairs)),), (Stage(self.loss),))


@dataclass(frozen=True, kw_only=True)
class PairedDifference(Objective):
    """Learns what separates after from before and nothing else, in one run.

    With ``d = after - before`` and the same noise and level for both pictures, the student's clean estimate at the noisy
    *after* picture is to be the frozen teacher's at the noisy *before* picture, moved by exactly ``d``::

        x0(z_a, student) = x0(z_b, teacher) + d,     z_a - z_b = (1 - s) d  (flow)  or  alpha d  (epsilon, v)

    Solved for the prediction, which is linear in the clean estimate, with ``alpha = sqrt(1 - s^2)``::

        flow:     x0 = z - s v             so   v(z_a)   = v0(z_b) - d
        epsilon:  x0 = (z - s e) / alpha   so   e(z_a)   = e0(z_b)
        v:        x0 = alpha z - s v       so   v(z_a)   = v0(z_b) - s d

    What the teacher gets wrong about *before*, its noise included, is wrong in the target alike: fine-tuning's residual
    has that as variance, and a LoRA of few pairs memorises it; here it cancels. Equal pictures give a loss and a gradient
    of exactly zero at the start, so guidance or step distillation is the reference and never un-learned.

    Where a pair knows the plan's regions (``PairBatch.region_mask``), errors outside them can count less, and what changed
    outside them can be taken back, so that only what was asked for is learned.

    Raises:
        InvalidValueError: unless ``outside`` is finite and at least 0.
    """

    outside_weight: float = 1.0
    """What an error outside the plan's regions counts, where one inside counts 1. At 0 the LoRA is free there."""
    composite: bool = False
    """Learn from ``before + inside * (after - before)``: outside the regions the picture is to stay as it was."""

    def __post_init__(self) -> None:
        check_outside_weight(self, self.outside_weight)

    def loss(self, model: Student, batch: PairBatch) -> Tensor:
        clean = batch.after
        if self.composite and batch.region_mask is not None:
            clean = batch.before + batch.region_mask * (batch.after - batch.before)
        before = model.noise_schedule.add_noise(batch.before, batch.noise, batch.sigmas)
        after = model.noise_schedule.add_noise(clean, batch.noise, batch.sigmas)
        teacher = model.teacher_predict(before, batch.sigmas, batch.conditioning)
        target = model.noise_schedule.paired_target(teacher, clean - batch.before, batch.sigmas)
        learned = model.predict(after, batch.sigmas, batch.conditioning)
        return mean_squared_errors(learned, target, weights=batch.weights(self.outside_weight)).mean()


@dataclass(frozen=True, kw_only=True)
class SupervisedFineTuning(Objective):
    """Plain fine-tuning on the pictures after; the pictures before are not looked at. The control arm.

    The student is to predict what the noisy picture was made of: ``noise - after`` (flow, arXiv 2210.02747), ``noise``
    (epsilon, arXiv 2006.11239, eq. 14) or ``alpha noise - s after`` (v, arXiv 2202.00512, section 4). The mean squared
    error is least at the mean over all pictures that could lie beneath the noise, which is why few pictures are learned
    by heart.

    Raises:
        InvalidValueError: unless ``outside`` is finite and at least 0.
    """

    outside_weight: float = 1.0
    """What an error outside the plan's regions counts, where one inside counts 1."""

    def __post_init__(self) -> None:
        check_outside_weight(self, self.outside_weight)

    def loss(self, model: Student, batch: PairBatch) -> Tensor:
        return _fine_tuning(model, batch, batch.after, outside_weight=self.outside_weight)


@dataclass(frozen=True, kw_only=True)
class TwoStage(Objective):
    """The paper's recipe: one LoRA copies *before*, a second learns *after* on top of it, and the first is dropped.

    arXiv 2412.12888 (differential training); the averaging over pairs is DiffSynth-Studio's advice for it. Both stages
    minimize what `SupervisedFineTuning` minimizes. The first LoRA takes up what the model fails to predict of *before*,
    so the second finds little but the change left to learn. That subtraction happens in weights, though: the second is
    learned on top of the first and used without it, which is right to first order in the first.

    Raises:
        InvalidValueError: unless ``copying`` lies strictly between 0 and 1.
    """

    per_pair: bool = True
    """Train every pair alone and average the second LoRAs exactly (rank: pairs x rank); else pool all pairs."""
    copy_fraction: float = 0.5
    """Part of the steps that goes into the first LoRA, in (0, 1)."""

    def __post_init__(self) -> None:
        if not 0 < self.copy_fraction < 1:
            raise InvalidValueError(
                f"TwoStage(copy_fraction={self.copy_fraction}): need a part of the steps, above 0 and below 1."
            )

    def loss(self, model: Student, batch: PairBatch) -> Tensor:
        return _fine_tuning(model, batch, batch.after)

    def training_plan(self, pairs: int) -> TrainingPlan:
        together = tuple(range(pairs))
        groups = tuple((number,) for number in together) if self.per_pair else (together,)
        return TrainingPlan(groups, (Stage(_copying, self.copy_fraction), Stage(self.loss, 1 - self.copy_fraction)))


def mean_squared_errors(prediction: Latents, target: Latents, *, weights: LatentWeights | None = None) -> Sigmas:
    """Mean squared errors, one a row; each latent's error counts its weight, and the mean is over all latents."""
    errors = (prediction - target).square()
    return (errors if weights is None else weights * errors).flatten(1).mean(1)


def check_outside_weight(objective: Objective, outside: float) -> None:
    """Refuse a weight that is none.

    Raises:
        InvalidValueError: naming the objective.
    """
    if not 0 <= outside < math.inf:
        raise InvalidValueError(
            f"{type(objective).__name__}(outside_weight={outside}): need a finite weight of at least 0; 1 counts all alike."
        )


def _copying(model: Student, batch: PairBatch) -> Tensor:
    """The first stage of `TwoStage`: draw the pictures before."""
    return _fine_tuning(model, batch, batch.before)


def _fine_tuning(model: Student, batch: PairBatch, clean: Latents, *, outside_weight: float = 1.0) -> Tensor:
    noisy = model.noise_schedule.add_noise(clean, batch.noise, batch.sigmas)
    target = model.noise_schedule.target(clean, batch.noise, batch.sigmas)
    learned = model.predict(noisy, batch.sigmas, batch.conditioning)
    return mean_squared_errors(learned, target, weights=batch.weights(outside_weight)).mean()
