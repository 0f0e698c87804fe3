"""What a training step minimises, and how many steps of which kind make a training."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor
from torch.nn.functional import mse_loss

from artaug.errors import InvalidValueError
from artaug.training.model import Conditioning
from artaug.training.noising import Latents, Levels, Noising


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
    sigmas: Levels
    """Noise levels: shape (batch,), in (0, 1]."""


class Student(Protocol):
    """The model in training, as an objective sees it."""

    @property
    def noising(self) -> Noising:
        """How the model's pictures are noised, and what it predicts."""

    def predict(self, noisy: Latents, sigmas: Levels, conditioning: Conditioning) -> Latents:
        """The prediction with the LoRA that is being trained: float32, with gradient."""

    def teacher(self, noisy: Latents, sigmas: Levels, conditioning: Conditioning) -> Latents:
        """The prediction without it, LoRAs of earlier rounds included: float32, without gradient."""


Loss: TypeAlias = Callable[[Student, PairBatch], Tensor]


@dataclass(frozen=True)
class Stage:
    """One run of the optimiser over a fresh LoRA."""

    loss: Loss
    """What it minimises."""
    share: float = 1.0
    """How much of the steps it gets, relative to the other stages."""


@dataclass(frozen=True)
class Course:
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
                f"a Course needs at least one group, no empty group, and at least one stage with a share above 0, "
                f"received {len(self.groups)} group(s) and shares {[stage.share for stage in self.stages]}."
            )


class Objective(ABC):
    """What training minimises. Subclass it and write `loss`; override `course` for a training of several stages.

    >>> import artaug as aa
    >>> from torch.nn.functional import l1_loss
    >>> class Imitation(aa.Objective):
    ...     def loss(self, model, batch):
    ...         noisy = model.noising.mix(batch.after, batch.noise, batch.sigmas)
    ...         target = model.noising.target(batch.after, batch.noise, batch.sigmas)
    ...         return l1_loss(model.predict(noisy, batch.sigmas, batch.conditioning), target)
    """

    @abstractmethod
    def loss(self, model: Student, batch: PairBatch) -> Tensor:
        """The loss of one step, a scalar."""

    def course(self, pairs: int) -> Course:
        """How a training on this many pairs proceeds; unless overridden, all of them together in one stage."""
        return Course((tuple(range(pairs)),), (Stage(self.loss),))


@dataclass(frozen=True, kw_only=True)
class PairedDifference(Objective):
    """Learns what separates after from before and nothing else, in one run.

    The frozen model looks at the noisy *before* picture, the student at the noisy *after* picture, with the same noise
    and level; the student's clean estimate is to be the teacher's plus ``d = after - before``. For flow models that
    is ``v(z_after) -> stopgrad(v_base(z_before)) - d``. Equal pictures give a loss of exactly zero at the start, so
    what did not change (guidance or step distillation, for instance) is never un-learned.
    """

    def loss(self, model: Student, batch: PairBatch) -> Tensor:
        before = model.noising.mix(batch.before, batch.noise, batch.sigmas)
        after = model.noising.mix(batch.after, batch.noise, batch.sigmas)
        teacher = model.teacher(before, batch.sigmas, batch.conditioning)
        target = model.noising.paired_target(teacher, batch.after - batch.before, batch.sigmas)
        return mse_loss(model.predict(after, batch.sigmas, batch.conditioning), target)


@dataclass(frozen=True, kw_only=True)
class SupervisedFineTuning(Objective):
    """Plain fine-tuning on the pictures after; the pictures before are not looked at. The control arm."""

    def loss(self, model: Student, batch: PairBatch) -> Tensor:
        return _fine_tuning(model, batch, batch.after)


@dataclass(frozen=True, kw_only=True)
class TwoStage(Objective):
    """The paper's recipe: one LoRA copies *before*, a second learns *after* on top of it, and the first is dropped.

    arXiv 2412.12888 (differential training); the averaging over pairs is DiffSynth-Studio's advice for it.

    Raises:
        InvalidValueError: unless ``copying`` lies strictly between 0 and 1.
    """

    per_pair: bool = True
    """Train every pair alone and average the second LoRAs exactly (rank: pairs x rank); else pool all pairs."""
    copying: float = 0.5
    """Part of the steps that goes into the first LoRA, in (0, 1)."""

    def __post_init__(self) -> None:
        if not 0 < self.copying < 1:
            raise InvalidValueError(f"TwoStage(copying={self.copying}): need a part of the steps, above 0 and below 1.")

    def loss(self, model: Student, batch: PairBatch) -> Tensor:
        return _fine_tuning(model, batch, batch.after)

    def course(self, pairs: int) -> Course:
        together = tuple(range(pairs))
        groups = tuple((number,) for number in together) if self.per_pair else (together,)
        return Course(groups, (Stage(_copying, self.copying), Stage(self.loss, 1 - self.copying)))


def _copying(model: Student, batch: PairBatch) -> Tensor:
    """The first stage of `TwoStage`: draw the pictures before."""
    return _fine_tuning(model, batch, batch.before)


def _fine_tuning(model: Student, batch: PairBatch, clean: Latents) -> Tensor:
    noisy = model.noising.mix(clean, batch.noise, batch.sigmas)
    target = model.noising.target(clean, batch.noise, batch.sigmas)
    return mse_loss(model.predict(noisy, batch.sigmas, batch.conditioning), target)
