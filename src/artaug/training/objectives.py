"""Training objectives: the loss of a step, and which pairs and stages a training consists of.

Throughout, ``x_b`` and ``x_a`` are the clean latents before and after, ``d = x_a - x_b``, ``n`` the noise and ``s`` its level
(both shared by the two pictures of a pair), ``z_b`` and ``z_a`` the noisy latents, and ``alpha = sqrt(1 - s^2)``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol, TypeAlias, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from artaug._internal.calls import call_part
from artaug._internal.contracts import contract_error
from artaug.errors import InvalidValueError
from artaug.regional.denoiser import Conditioning
from artaug.training.noise_schedule import Latents, NoiseSchedule, Sigmas
from artaug.training.weighting import LossWeighting

LatentWeights: TypeAlias = Float[Tensor, "..."]
"""A number for every latent, of a shape that broadcasts to theirs."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PairBatch:
    """A batch of pairs for one forward and backward pass: latents, prompts, and the noise both pictures of a pair share."""

    before: Latents
    """Clean latents of the pictures before: float32, shape (batch, ...)."""
    after: Latents
    """Clean latents of the pictures after, same shape."""
    conditioning: Conditioning
    """Their prompts, encoded."""
    noise: Latents
    """Standard normal, same shape as the latents: one draw per pair."""
    sigmas: Sigmas
    """Noise levels: shape (batch,), in (0, 1]."""
    region_mask: LatentWeights | None = None
    """How much of every latent lies in the plan's regions, in [0, 1], broadcastable to the latents' shape; None:
    everywhere."""

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

    def teacher_predict(self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning) -> Latents:
        """The prediction without it, LoRAs of earlier rounds included: float32, without gradient."""


Loss: TypeAlias = Callable[[Student, PairBatch], Tensor]


@dataclass(frozen=True)
class Stage:
    """One run of the optimizer over a fresh LoRA."""

    loss: Loss
    """What it minimizes."""
    share: float = 1.0
    """Its share of the steps, relative to the other stages."""


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

    @abstractmethod
    def loss(self, model: Student, batch: PairBatch) -> Tensor:
        """The loss of one batch: a scalar, the mean over its pairs."""

    def training_plan(self, pairs: int) -> TrainingPlan:
        """How a training on this many pairs proceeds; unless overridden, all of them together in one stage."""
        return TrainingPlan((tuple(range(pairs)),), (Stage(self.loss),))

    def check(self, noise_schedule: NoiseSchedule) -> None:  # noqa: B027 - most can be minimized for every model
        """Called before anything is encoded; override it for an objective that not every model can minimize.

        Raises:
            ModelError: unless a model with this noise schedule can minimize it.
        """


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

    Where a pair knows the plan's regions (``PairBatch.region_mask``), errors outside them can count less, and what changed
    outside them can be taken back, so that only the planned change is learned.

    Raises:
        InvalidValueError: unless ``outside_weight`` is finite and at least 0.
    """

    recommended_echo: ClassVar[int] = 4
    """The teacher predicts once for four steps; ``benchmarks/echo.py`` finds no loss of quality."""

    outside_weight: float = 1.0
    """Weight of an error outside the plan's regions, where one inside counts 1. At 0 the LoRA is free there."""
    composite: bool = False
    """Learn from ``before + region_mask * (after - before)``: outside the regions the picture should stay as it was."""
    weighting: LossWeighting | None = None
    """How much an error counts by its noise level; None for all the same."""

    def __post_init__(self) -> None:
        _check_outside_weight(self, self.outside_weight)

    def check(self, noise_schedule: NoiseSchedule) -> None:
        _check_weighting(self.weighting, noise_schedule)

    def loss(self, model: Student, batch: PairBatch) -> Tensor:
        after = batch.after  # (batch, ...), as all latents here
        if self.composite and batch.region_mask is not None:
            after = batch.before + batch.region_mask * (batch.after - batch.before)
        noisy_before = model.noise_schedule.add_noise(batch.before, batch.noise, batch.sigmas)
        noisy_after = model.noise_schedule.add_noise(after, batch.noise, batch.sigmas)
        # At z_b, not at z_a: the difference of the two noisy pictures has to be in the target for the LoRA to learn it.
        teacher = model.teacher_predict(noisy_before, batch.sigmas, batch.conditioning)
        target = model.noise_schedule.paired_target(teacher, after - batch.before, batch.sigmas)
        prediction = model.predict(noisy_after, batch.sigmas, batch.conditioning)
        errors = mean_squared_errors(prediction, target, weights=batch.loss_weights(self.outside_weight))
        return weight_by_level(errors, model, batch, self.weighting).mean()


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

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise InvalidValueError(f"Bipolar(scale={self.scale}): need a finite scale above 0.")
        if type(self.objective).training_plan is not Objective.training_plan:
            raise InvalidValueError(
                f"Bipolar(objective={self.objective}): an objective with a training plan of its own cannot be reversed. "
                "Expected one with a loss alone, as PairedDifference or SupervisedFineTuning."
            )

    def check(self, noise_schedule: NoiseSchedule) -> None:
        self.objective.check(noise_schedule)

    def loss(self, model: Student, batch: PairBatch) -> Tensor:
        forward = compute_loss(self.objective.loss, _ScaledStudent(model, self.scale), batch)
        # Noise and levels stay with the pair, so that only the sign of d changes between the two directions.
        reversed_batch = replace(batch, before=batch.after, after=batch.before)
        return (forward + compute_loss(self.objective.loss, _ScaledStudent(model, -self.scale), reversed_batch)) / 2


@dataclass(frozen=True, eq=False)
class _ScaledStudent:
    """A student whose LoRA counts ``scale`` times."""

    student: Student
    scale: float

    @property
    def noise_schedule(self) -> NoiseSchedule:
        return self.student.noise_schedule

    def predict(self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning, *, scale: float = 1.0) -> Latents:
        return self.student.predict(noisy, sigmas, conditioning, scale=scale * self.scale)

    def teacher_predict(self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning) -> Latents:
        return self.student.teacher_predict(noisy, sigmas, conditioning)


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

    Raises:
        InvalidValueError: unless ``beta`` is above 0, ``anchor`` and ``outside_weight`` at least 0, and all finite.
    """

    beta: float = 20.0
    """How much a difference of mean squared errors counts: the smaller, the further the LoRA may go."""
    anchor: float = 0.01
    """How strongly both predictions are held to the teacher's, in units of ``beta / 2``; everywhere in the picture."""
    outside_weight: float = 1.0
    """Weight of an error outside the plan's regions in the preference, where one inside counts 1."""

    def __post_init__(self) -> None:
        _check_outside_weight(self, self.outside_weight)
        if not (0 < self.beta < math.inf and 0 <= self.anchor < math.inf):
            raise InvalidValueError(
                f"DirectPreference(beta={self.beta}, anchor={self.anchor}): need a finite beta above 0 and a finite "
                "anchor of at least 0."
            )

    def loss(self, model: Student, batch: PairBatch) -> Tensor:
        gain_after, distance_after = self._gain(model, batch, batch.after)
        gain_before, distance_before = self._gain(model, batch, batch.before)
        half = self.beta / 2
        # The mean over pairs comes last: each pair has a preference of its own, and logsigmoid is not linear.
        return (
            half * self.anchor * (distance_after + distance_before) - logsigmoid(half * (gain_after - gain_before))
        ).mean()

    def _gain(self, model: Student, batch: PairBatch, clean: Latents) -> tuple[Tensor, Tensor]:
        """By how much the student's error is below the teacher's, and their mean squared distance: both (batch,)."""
        noisy = model.noise_schedule.add_noise(clean, batch.noise, batch.sigmas)
        target = model.noise_schedule.target(clean, batch.noise, batch.sigmas)
        teacher = model.teacher_predict(noisy, batch.sigmas, batch.conditioning)
        student = model.predict(noisy, batch.sigmas, batch.conditioning)
        # The gain is weighted by regions, the distance is not: the anchor holds the prediction in the whole picture.
        weights = batch.loss_weights(self.outside_weight)
        gain = mean_squared_errors(teacher, target, weights=weights) - mean_squared_errors(
            student, target, weights=weights
        )
        return gain, mean_squared_errors(student, teacher)


@final
@dataclass(frozen=True, kw_only=True)
class SupervisedFineTuning(Objective):
    """Plain fine-tuning on the pictures after; the pictures before are not used. The control arm.

    The student should predict what the noisy picture was made of: ``noise - after`` (flow, arXiv 2210.02747), ``noise``
    (epsilon, arXiv 2006.11239, eq. 14) or ``alpha noise - s after`` (v, arXiv 2202.00512, section 4). The mean squared
    error is least at the mean over all pictures that could lie beneath the noise, which is why few pictures are
    memorised.

    Raises:
        InvalidValueError: unless ``outside_weight`` is finite and at least 0.
    """

    outside_weight: float = 1.0
    """Weight of an error outside the plan's regions, where one inside counts 1."""
    weighting: LossWeighting | None = None
    """How much an error counts by its noise level; None for all the same."""

    def __post_init__(self) -> None:
        _check_outside_weight(self, self.outside_weight)

    def check(self, noise_schedule: NoiseSchedule) -> None:
        _check_weighting(self.weighting, noise_schedule)

    def loss(self, model: Student, batch: PairBatch) -> Tensor:
        return _fine_tuning_loss(
            model, batch, batch.after, outside_weight=self.outside_weight, weighting=self.weighting
        )


@final
@dataclass(frozen=True, kw_only=True)
class TwoStage(Objective):
    """The paper's recipe: one LoRA copies *before*, a second learns *after* on top of it, and the first is dropped.

    arXiv 2412.12888 (differential training); the averaging over pairs is DiffSynth-Studio's advice for it. Both stages
    minimize what `SupervisedFineTuning` minimizes. With ``W`` the frozen weights, ``A`` the first LoRA and ``B`` the second::

        stage 1:  v(W + A)      reproduces before, so A holds what the model fails to predict of it
        stage 2:  v(W + A + B)  reproduces after, so B holds little but the change
        result:   v(W + B)      the subtraction of A happens in weights, not in predictions

    ``v(W + A + B) - v(W + A)`` equals ``v(W + B) - v(W)`` up to terms that hold both ``A`` and ``B``: the recipe is right to
    first order in ``A``.

    How the paper weights noise levels is not published. DiffSynth-Studio, whose authors wrote it, multiplies the loss of both
    stages by 0 to 1.8, depending on the level: ``weighting=BellShaped()``.

    Raises:
        InvalidValueError: unless ``copy_fraction`` lies strictly between 0 and 1.
    """

    per_pair: bool = True
    """Train every pair alone and average the second LoRAs exactly (rank: pairs x rank); else pool all pairs."""
    copy_fraction: float = 0.5
    """Share of the steps for the first LoRA, in (0, 1)."""
    weighting: LossWeighting | None = None
    """How much an error counts by its noise level, in both stages. DiffSynth-Studio's is `BellShaped`; None for all the
    same."""

    def __post_init__(self) -> None:
        if not 0 < self.copy_fraction < 1:
            raise InvalidValueError(
                f"TwoStage(copy_fraction={self.copy_fraction}): need a share of the steps, above 0 and below 1."
            )

    def check(self, noise_schedule: NoiseSchedule) -> None:
        _check_weighting(self.weighting, noise_schedule)

    def loss(self, model: Student, batch: PairBatch) -> Tensor:
        return _fine_tuning_loss(model, batch, batch.after, weighting=self.weighting)

    def _copy_loss(self, model: Student, batch: PairBatch) -> Tensor:
        """The first stage: reproduce the pictures before."""
        return _fine_tuning_loss(model, batch, batch.before, weighting=self.weighting)

    def training_plan(self, pairs: int) -> TrainingPlan:
        together = tuple(range(pairs))
        groups = tuple((index,) for index in together) if self.per_pair else (together,)
        # Shares are relative within a group, so every pair gets the same number of steps, up to rounding.
        return TrainingPlan(
            groups, (Stage(self._copy_loss, self.copy_fraction), Stage(self.loss, 1 - self.copy_fraction))
        )


def compute_loss(loss: Loss, student: Student, batch: PairBatch) -> Tensor:
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


def mean_squared_errors(prediction: Latents, target: Latents, *, weights: LatentWeights | None = None) -> Sigmas:
    """Weighted squared errors, averaged over the latents of each row: shape (batch,). Weights are not normalized."""
    errors = (prediction - target).square()  # (batch, ...)
    return (errors if weights is None else weights * errors).flatten(1).mean(1)


def weight_by_level(errors: Sigmas, model: Student, batch: PairBatch, weighting: LossWeighting | None) -> Sigmas:
    """Errors (batch,) of predictions, weighted by their noise levels. Weights are not normalized over the batch."""
    if weighting is None:
        return errors
    return weighting.weights(model.noise_schedule, batch.sigmas) * errors


def _fine_tuning_loss(
    model: Student,
    batch: PairBatch,
    clean: Latents,
    *,
    outside_weight: float = 1.0,
    weighting: LossWeighting | None = None,
) -> Tensor:
    noisy = model.noise_schedule.add_noise(clean, batch.noise, batch.sigmas)
    target = model.noise_schedule.target(clean, batch.noise, batch.sigmas)
    prediction = model.predict(noisy, batch.sigmas, batch.conditioning)
    errors = mean_squared_errors(prediction, target, weights=batch.loss_weights(outside_weight))
    return weight_by_level(errors, model, batch, weighting).mean()


def _check_outside_weight(objective: Objective, outside_weight: float) -> None:
    if not 0 <= outside_weight < math.inf:
        raise InvalidValueError(
            f"{type(objective).__name__}(outside_weight={outside_weight}): need a finite weight of at least 0; at 1 all "
            "errors count the same."
        )


def _check_weighting(weighting: LossWeighting | None, noise_schedule: NoiseSchedule) -> None:
    if weighting is not None:
        weighting.weights(noise_schedule, torch.ones(1))
