"""What an objective is: the loss of a step, and which pairs and stages a training consists of."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from artaug._internal.annotations import checked
from artaug._internal.calls import call_part
from artaug._internal.contracts import contract_error
from artaug.errors import InvalidValueError
from artaug.plan import Plan
from artaug.regional.denoiser import Conditioning
from artaug.regional.guide import Guide
from artaug.training.adapters import Adapter, PlainLoRA
from artaug.training.noise_schedule import DecodedPictures, Latents, NoiseSchedule, Sigmas

LatentWeights: TypeAlias = Float[Tensor, "..."]
"""A number for every latent, of a shape that broadcasts to theirs."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptBatch:
    """A batch of prompts for one forward and backward pass, encoded, with noise; with pictures it is a `PairBatch`."""

    conditioning: Conditioning
    """The prompts, encoded."""
    noise: Latents
    """Standard normal, shape (batch, ...) of the latents: one draw per row."""
    sigmas: Sigmas
    """Noise levels: shape (batch,), in (0, 1]."""
    plans: tuple[Plan, ...] = ()
    """What each row shows: its prompt, as it is encoded, with the regions of its plan, whose own prompt may be another one.
    Empty in a batch made by hand."""
    phrase_tokens: tuple[tuple[tuple[int, ...], ...], ...] | None = None
    """For each row the tokens of each of its phrases, numbers in a row of ``conditioning``; None unless the objective has
    phrases (`artaug.Objective.phrases_of`)."""
    own_noise: Latents | None = None
    """What each row was drawn from, rebuilt from its seed; None unless asked for (`artaug.Objective.reads_own_noise`)."""
    extra_noise: tuple[Latents, ...] = ()
    """More draws like ``noise``, independent of it: as many as `artaug.Objective.extra_noise` says."""
    negative: Conditioning | None = None
    """`artaug.Objective.negative_prompt`, encoded, once for each row; None unless the objective has one."""
    region_mask: LatentWeights | None = None
    """How much of every latent lies in the plan's regions, in [0, 1], broadcastable to the latents' shape; None:
    everywhere."""

    def noisy(self, noise_schedule: NoiseSchedule, *, latent_std: float = 1.0) -> Latents:
        """Noisy latents at the batch's levels: of the pictures after; without pictures, of noise in their place.

        The sum of two independent normal variables is one whose variance is the sum of theirs. So latents drawn from a normal
        distribution and noised are distributed as the noise is, scaled, and no second draw is needed.

        Args:
            noise_schedule: the model's.
            latent_std: the standard deviation of the latents that stand for pictures.
        """
        ones, zeros = torch.ones_like(self.noise), torch.zeros_like(self.noise)
        of_latents = noise_schedule.add_noise(latent_std * ones, zeros, self.sigmas)
        return torch.hypot(of_latents, noise_schedule.add_noise(zeros, ones, self.sigmas)) * self.noise


@dataclass(frozen=True, kw_only=True, eq=False)
class PairBatch(PromptBatch):
    """A batch of pairs for one forward and backward pass: latents, prompts, and the noise both pictures of a pair share."""

    before: Latents
    """Clean latents of the pictures before: float32, shape (batch, ...)."""
    after: Latents
    """Clean latents of the pictures after, same shape."""
    rewards: Float[Tensor, "batch 2"] | None = None
    """How good the pictures before and after are, in [0, 1]; None where no pair says."""

    def noisy(self, noise_schedule: NoiseSchedule, *, latent_std: float = 1.0) -> Latents:
        return noise_schedule.add_noise(self.after, self.noise, self.sigmas)

    def loss_weights(self, outside_weight: float) -> LatentWeights | None:
        """Weight of each latent's error: 1 in the plan's regions, ``outside_weight`` elsewhere, linear in the mask."""
        if self.region_mask is None or outside_weight == 1:
            return None
        return outside_weight + (1 - outside_weight) * self.region_mask


class Student(Protocol):
    """The model in training, as an objective uses it."""

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """How the model's pictures are noised, and what it predicts."""

    def predict(self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning, *, scale: float = 1.0) -> Latents:
        """The prediction with ``scale`` times the LoRA in training: float32, with gradient.

        The gradient is that of the LoRA at that scale, also where the forward pass is computed again in the backward
        pass (gradient checkpointing), and predictions at several scales may be parts of one loss.
        """

    def teacher_predict(
        self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning, *, with_gradient: bool = False
    ) -> Latents:
        """The prediction without it, LoRAs of earlier rounds included: float32, without gradient.

        Args:
            noisy: as in `predict`.
            sigmas: as in `predict`.
            conditioning: as in `predict`.
            with_gradient: let the gradient flow to ``noisy``, as a loss of what the teacher says of the student's own picture
                may need; it takes the memory of a prediction of the student.
        """

    def companion_predict(self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning) -> Latents:
        """The prediction with the companion's adapter in place of the student's: float32.

        The gradient flows to ``noisy``, and in `artaug.training.Companion.loss` to the companion; call it under
        ``torch.no_grad()`` where none is needed.
        """

    def companion_head(self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning) -> Tensor:
        """What `artaug.training.Companion.head` makes of the features of that prediction, with the same gradients."""

    def predict_guided(
        self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning, *, guide: Guide, plans: Sequence[Plan]
    ) -> Latents:
        """The prediction with the LoRA in training under a guide, such as an `AttentionProbe`: float32, with gradient.

        Regions are not encoded, so a guide that reads them is refused.

        Args:
            noisy: as in `predict`.
            sigmas: as in `predict`.
            conditioning: as in `predict`.
            guide: acts on this prediction alone.
            plans: what each row shows, `artaug.training.PromptBatch.plans`.
        """

    def decode(self, latents: Latents) -> DecodedPictures:
        """Pictures of clean latents: float32, (batch, 3, height, width), in [0, 1], with gradient to the latents.

        Only for an objective that `artaug.Objective.decodes`. `artaug.diffusion.Family.decode_latents` says what it costs.
        """


@dataclass(frozen=True, eq=False)
class StudentWrapper:
    """A `Student` that hands everything on to another one. An objective around an objective overrides what it changes."""

    student: Student

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The student's."""
        return self.student.noise_schedule

    def predict(self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning, *, scale: float = 1.0) -> Latents:
        """See `Student`, as for all that follows."""
        return self.student.predict(noisy, sigmas, conditioning, scale=scale)

    def predict_guided(
        self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning, *, guide: Guide, plans: Sequence[Plan]
    ) -> Latents:
        return self.student.predict_guided(noisy, sigmas, conditioning, guide=guide, plans=plans)

    def teacher_predict(
        self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning, *, with_gradient: bool = False
    ) -> Latents:
        return self.student.teacher_predict(noisy, sigmas, conditioning, with_gradient=with_gradient)

    def companion_predict(self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning) -> Latents:
        return self.student.companion_predict(noisy, sigmas, conditioning)

    def companion_head(self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning) -> Tensor:
        return self.student.companion_head(noisy, sigmas, conditioning)

    def decode(self, latents: Latents) -> DecodedPictures:
        return self.student.decode(latents)


Loss: TypeAlias = Callable[[Student, Any], Tensor]
"""Of a student and a batch: a `PairBatch`, or a `PromptBatch` where an objective reads no pictures."""


@checked
@dataclass(frozen=True, kw_only=True)
class Companion:
    """A second learner, which the student's loss asks: one that learns what the student draws now, or tells it from real pictures.

    It has an adapter of its own on the student's layers, which starts at the teacher, a head, or both. Before every step of the
    student it takes ``updates`` steps on the same prompts and pictures, each with noise and levels of its own. Its optimizer is of
    the trainer's kind, with the trainer's schedule, batch, and limit of the gradient's norm. It is kept in checkpoints, ends with
    its stage, and is no part of the LoRA that is returned.

    Raises:
        InvalidValueError: unless it has something to train, ``features`` if and only if it has a head, a positive and finite
            learning rate, and a rank and updates of at least 1; or for an adapter that is a `DoRA`.

    >>> from artaug.training import Companion
    >>> def fake_loss(model, batch):
    ...     ...
    >>> Companion(loss=fake_loss, learning_rate=1e-3).updates
    1
    """

    loss: Loss
    """What it minimizes. Student and teacher are frozen in it; draw the student's pictures under ``torch.no_grad()``."""
    learning_rate: float | None = None
    """Its own, which warms up and decays as the trainer's does; None for the trainer's."""
    updates: int = 1
    """Steps that it takes before each of the student's."""
    adapter: Adapter | None = field(default_factory=PlainLoRA)
    """What is trained beside each layer that learns; None for a head alone, on the features of the teacher."""
    rank: int | None = None
    """None for the trainer's."""
    features: str = ""
    """Regular expression: outputs of the linear layers in whose path it is found, each (batch, tokens, channels), are what the
    head reads."""
    head: Callable[[Sequence[int]], nn.Module] | None = None
    """Makes a module, in float32 and without buffers, from the channels of each of these layers; it is called with a list of
    their outputs in float32. Its initial parameters follow from the training's seed."""

    def __post_init__(self) -> None:
        learning_rate, rank = self.learning_rate, self.rank
        is_legal = {
            "adapter": (self.adapter is not None or self.head is not None)
            and (self.adapter is None or not self.adapter.use_dora),
            "features": bool(self.features) == (self.head is not None),
            "learning_rate": learning_rate is None or 0 < learning_rate < math.inf,
            "rank": rank is None or rank >= 1,
            "updates": self.updates >= 1,
        }
        if illegal := [f"{name}={getattr(self, name)!r}" for name, legal in is_legal.items() if not legal]:
            raise InvalidValueError(
                f"Companion({', '.join(illegal)}): need an adapter or a head to train, no DoRA, features if and only if there is a "
                "head, a finite learning_rate above 0, and rank and updates of at least 1."
            )


@dataclass(frozen=True)
class Stage:
    """One run of the optimizer over a fresh LoRA."""

    loss: Loss
    """What it minimizes."""
    share: float = 1.0
    """Its share of the steps, relative to the other stages."""
    companion: Companion | None = None
    """What learns beside it."""


@dataclass(frozen=True)
class TrainingPlan:
    """How a training proceeds: which pairs are learned together, and in which stages.

    Every group of pairs goes through all stages. The LoRA of an earlier stage is applied, frozen, while the later
    ones learn, and then dropped: the last stage's LoRA is the group's result, and the mean over groups the training's.
    """

    groups: tuple[tuple[int, ...], ...]
    """Indices of the pairs that are learned together."""
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

    recommended_echo: ClassVar[int] = 1
    """How many steps use each batch unless the trainer says otherwise. More than 1 saves time where the loss asks the teacher,
    which predicts once per batch; where it does not, it would only mean less noise."""

    @property
    def reads_pictures(self) -> bool:
        """Whether the loss needs pictures: prompts without any are refused then, else their batches are `PromptBatch`."""
        return True

    @property
    def reads_own_noise(self) -> bool:
        """Whether the loss needs ``batch.own_noise``: a pair without a seed is refused then."""
        return False

    @property
    def extra_noise(self) -> int:
        """How many draws of noise the loss needs beside ``batch.noise``, such as those that it draws pictures from."""
        return 0

    @property
    def negative_prompt(self) -> str | None:
        """What the loss leads away from, often ``""``, as classifier-free guidance does: ``batch.negative`` has it, encoded."""
        return None

    @property
    def companion(self) -> Companion | None:
        """A second learner that the loss asks; None for none."""
        return None

    @property
    def decodes(self) -> bool:
        """Whether the loss looks at pixels, by `artaug.training.Student.decode`: the VAE stays on the device then."""
        return False

    @abstractmethod
    def loss(self, model: Student, batch: Any) -> Tensor:  # noqa: ANN401 - the one or the other, as the objective reads pictures
        """The loss of one batch: a scalar, the mean over its rows.

        Args:
            model: the model in training.
            batch: a `artaug.training.PairBatch`; of prompts without pictures, where the objective reads none, a
                `artaug.training.PromptBatch`.
        """

    def phrases_of(self, plan: Plan) -> Sequence[str]:
        """The parts of a prompt whose tokens the loss needs as ``batch.phrase_tokens``; unless overridden, none.

        Args:
            plan: what a pair shows, see `artaug.training.PromptBatch.plans`.
        """
        return ()

    def training_plan(self, pairs: int) -> TrainingPlan:
        """How a training on this many pairs proceeds; unless overridden, all of them together in one stage."""
        return TrainingPlan((tuple(range(pairs)),), (Stage(self.loss, companion=self.companion),))

    def check(self, noise_schedule: NoiseSchedule) -> None:  # noqa: B027 - most can be minimized for every model
        """Called before anything is encoded; override it for an objective that not every model can minimize.

        Raises:
            ModelError: unless a model with this noise schedule can minimize it.
        """


def compute_loss(loss: Loss, student: Student, batch: PromptBatch) -> Tensor:
    """Call an objective's loss and check that an optimizer can minimize what it returns.

    Raises:
        PartError: if the objective raised; an `ArtAugError` of its own is raised as it is, with a note.
        ContractError: unless it is a scalar tensor with gradient.
    """
    objective = getattr(loss, "__self__", None)  # of a method; a stage may have a plain function, too
    name = getattr(loss, "__name__", repr(loss))
    owner, inputs = name if objective is None else type(objective).__name__, f"a batch of {len(batch.sigmas)}"
    value: object = call_part(lambda: loss(student, batch), owner=owner, inputs=inputs, retry=False)
    if isinstance(value, Tensor) and value.ndim == 0 and value.requires_grad:
        return value
    if isinstance(value, Tensor):
        received = f"a tensor of shape {tuple(value.shape)} {'with' if value.requires_grad else 'without'} gradient"
    else:
        received = repr(value)
    raise contract_error(
        owner,
        "" if objective is None else name,
        received=received,
        inputs=inputs,
        expected="a scalar tensor with gradient, computed from model.predict",
    )
