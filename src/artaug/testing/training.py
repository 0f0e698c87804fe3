"""Checks of what training is made of: objectives, on a tiny student, and fusers, on tiny LoRAs."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import product

import torch
from torch import Tensor

from artaug._internal.annotations import checked
from artaug.errors import LoRAError
from artaug.lora.fusing import Fuser
from artaug.lora.lora import LoRA, LowRank
from artaug.plan import Plan
from artaug.regional.guide import Guide
from artaug.testing.guides import find_words, predict_under, tiny_transformer
from artaug.training import (
    Companion,
    EpsilonPrediction,
    FlowMatching,
    NoiseSchedule,
    Objective,
    PairBatch,
    PromptBatch,
    TrainingPlan,
    VPrediction,
)
from artaug.training.objectives import Loss

_CHANNELS, _SIDE, _FEATURES = 2, 4, 5
_LATENTS = _CHANNELS * _SIDE * _SIDE


@checked
def check_objective(objective: Objective, *, prompts: Sequence[str] = ("a red barn", "a lake", "a blue door")) -> None:
    """Check that an objective's losses can be trained on: finite scalars with a gradient that follow from the batch.

    Every stage of the objective's training plan is called with models of all three noise schedules, with and without a
    region mask, and without pictures if it reads none. So is the loss of a companion, whose head gets a single layer of features.

    Args:
        objective: what to check.
        prompts: of a batch, of at most six words, which are its tokens; give some that hold the objective's phrases.

    Raises:
        AssertionError: if they cannot; the message says which rule was broken.
    """
    name = type(objective).__name__
    pairs = 4
    plan = objective.training_plan(pairs)
    assert isinstance(plan, TrainingPlan), f"{name}.training_plan returned {type(plan).__name__}: expected TrainingPlan"
    unknown = sorted({index for group in plan.groups for index in group} - set(range(pairs)))
    assert not unknown, f"{name}.training_plan({pairs}) names the pairs {unknown}: expected numbers below {pairs}"
    kinds = {"without a region mask": (False, True), "with a region mask": (True, True)}
    if not objective.reads_pictures:
        kinds["without pictures"] = (False, False)
    for schedule in (FlowMatching(), EpsilonPrediction(), VPrediction()):
        for stage, (kind, (masked, pictured)) in product(plan.stages, kinds.items()):
            student = _TinyStudent(schedule, stage.companion)
            batch = _batch(objective, prompts, masked=masked, pictured=pictured)
            _check_loss(stage.loss, student, batch, call=f"{name}: the loss of a batch {kind} ({schedule})")
            if stage.companion is not None:
                student.let_companion_learn()
                call = f"{name}: the companion's loss of a batch {kind} ({schedule})"
                _check_loss(stage.companion.loss, student, batch, call=call)


def _check_loss(loss_fn: Loss, student: "_TinyStudent", batch: PromptBatch, *, call: str) -> None:
    """Check that a loss is one to train on: a finite scalar with a gradient, which follows from the batch."""
    before = {field: tensor.clone() for field, tensor in _tensors(batch).items()}
    loss = loss_fn(student, batch)
    assert isinstance(loss, Tensor), f"{call} is {type(loss).__name__}: expected a torch.Tensor"
    assert loss.ndim == 0, f"{call} has shape {tuple(loss.shape)}: expected a scalar"
    assert loss.isfinite(), f"{call} is {loss.item()}: expected a finite number"
    assert loss.requires_grad, f"{call} has no gradient: make it of model.predict, and do not detach that"
    loss.backward()
    gradients = [parameter.grad for parameter in student.parameters if parameter.grad is not None]
    assert any(gradient.any() for gradient in gradients), f"{call} has a gradient of 0 for what learns"
    assert all(gradient.isfinite().all() for gradient in gradients), f"{call} has a gradient that is not finite"
    changed = [field for field, tensor in _tensors(batch).items() if not torch.equal(tensor, before[field])]
    assert not changed, f"{call} changed the batch's {', '.join(changed)} in place"
    repeated = loss_fn(student, batch)
    assert torch.equal(repeated, loss), (
        f"{call} is {loss.item()} and then {repeated.item()} for the same batch: draw no random numbers in a loss, "
        "use batch.noise"
    )


class _TinyStudent:
    """A `Student`: a frozen linear denoiser, and LoRAs of rank 2 on it that are not zero, its own and a companion's."""

    def __init__(self, noise_schedule: NoiseSchedule, companion: Companion | None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.noise_schedule = noise_schedule
        self._weight = torch.randn(_LATENTS, _LATENTS, generator=generator) / _LATENTS**0.5
        self._text_weight = torch.randn(_LATENTS, _FEATURES, generator=generator)
        self._down = torch.nn.Parameter(torch.randn(2, _LATENTS, generator=generator) / _LATENTS**0.5)
        self._up = torch.nn.Parameter(torch.randn(_LATENTS, 2, generator=generator) / 10)
        self._transformer = tiny_transformer()  # whose weights are all trained
        self.parameters = (self._down, self._up, *self._transformer.parameters())
        self._companion = companion
        if companion is not None:
            self._companion_down = torch.nn.Parameter(torch.randn(2, _LATENTS, generator=generator) / _LATENTS**0.5)
            self._companion_up = torch.nn.Parameter(torch.randn(_LATENTS, 2, generator=generator) / 10)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                self._head = None if companion.head is None else companion.head([_CHANNELS])
            for parameter in self._companion_parameters:
                parameter.requires_grad = False

    @property
    def _companion_parameters(self) -> tuple[torch.nn.Parameter, ...]:
        of_head = () if self._head is None else tuple(self._head.parameters())
        return (self._companion_down, self._companion_up, *of_head)

    def let_companion_learn(self) -> None:
        """From now on gradients are the companion's."""
        for parameter in self.parameters:
            parameter.requires_grad = False
        self.parameters = self._companion_parameters
        for parameter in self.parameters:
            parameter.requires_grad, parameter.grad = True, None

    def companion_predict(self, noisy: Tensor, sigmas: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        if self._companion is None or self._companion.adapter is None:
            raise AssertionError("the loss calls companion_predict, and the objective has no companion with an adapter")
        weight = self._weight + self._companion_up @ self._companion_down
        return self._predict(noisy, sigmas, conditioning, weight)

    def companion_head(self, noisy: Tensor, sigmas: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        if self._companion is None or self._head is None:
            raise AssertionError("the loss calls companion_head, and the objective has no companion with a head")
        if self._companion.adapter is None:
            features = self.teacher_predict(noisy, sigmas, conditioning, with_gradient=True)
        else:
            features = self.companion_predict(noisy, sigmas, conditioning)
        judged: Tensor = self._head([features.flatten(2).mT])  # (batch, tokens, channels)
        return judged

    def predict(
        self, noisy: Tensor, sigmas: Tensor, conditioning: Mapping[str, Tensor], *, scale: float = 1.0
    ) -> Tensor:
        return self._predict(noisy, sigmas, conditioning, self._weight + scale * self._up @ self._down)

    def teacher_predict(
        self, noisy: Tensor, sigmas: Tensor, conditioning: Mapping[str, Tensor], *, with_gradient: bool = False
    ) -> Tensor:
        with torch.set_grad_enabled(with_gradient and torch.is_grad_enabled()):
            return self._predict(noisy, sigmas, conditioning, self._weight)

    def decode(self, latents: Tensor) -> Tensor:
        rgb = torch.cat([latents, latents.mean(1, keepdim=True)], dim=1)  # of two channels three
        return rgb.repeat_interleave(2, -2).repeat_interleave(2, -1).sigmoid()

    def predict_guided(
        self,
        noisy: Tensor,
        sigmas: Tensor,
        _conditioning: Mapping[str, Tensor],
        *,
        guide: Guide,
        plans: Sequence[Plan],
    ) -> Tensor:
        return predict_under(guide, self._transformer, noisy, sigmas, plans)

    def _predict(self, noisy: Tensor, sigmas: Tensor, conditioning: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        text = conditioning["embeds"] @ self._text_weight.T
        return (noisy.flatten(1) @ weight.T + text + sigmas[:, None]).reshape(noisy.shape)


def _batch(objective: Objective, prompts: Sequence[str], *, masked: bool, pictured: bool) -> PromptBatch:
    generator, rows = torch.Generator().manual_seed(1), len(prompts)
    before, after, noise = torch.randn(3, rows, _CHANNELS, _SIDE, _SIDE, generator=generator)
    extra_noise = torch.randn(objective.extra_noise, *noise.shape, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(rows, 1, _SIDE, _SIDE)
    mask[..., : _SIDE // 2] = 1
    plans = tuple(map(Plan, prompts))
    phrases = [objective.phrases_of(plan) for plan in plans]
    batch = PromptBatch(
        conditioning={"embeds": torch.randn(rows, _FEATURES, generator=generator)},
        noise=noise,
        sigmas=torch.tensor([0.2, 0.5, 0.9]).repeat(rows)[:rows],
        region_mask=mask if masked else None,
        plans=plans,
        phrase_tokens=tuple(map(tuple, map(find_words, prompts, phrases))) if any(phrases) else None,
        extra_noise=tuple(extra_noise),
        negative=None if objective.negative_prompt is None else {"embeds": torch.ones(rows, _FEATURES)},
        own_noise=noise.flip(0) if objective.reads_own_noise else None,
    )
    if not pictured:
        return batch
    return PairBatch(**{item.name: getattr(batch, item.name) for item in fields(batch)}, before=before, after=after)


def _tensors(batch: PromptBatch) -> dict[str, Tensor]:
    tensors = {item.name: getattr(batch, item.name) for item in fields(batch)}
    tensors |= {f"conditioning[{name!r}]": tensor for name, tensor in batch.conditioning.items()}
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


@checked
def check_fuser(fuser: Fuser) -> None:
    """Check that a fuser makes one LoRA of several whose update is their sum, and does not change them.

    A fuser may approximate. Exact is what it has to be where the updates of a layer all lie along one direction, since
    a LoRA of rank 1 holds their sum.

    Raises:
        AssertionError: if it does not; the message says which rule was broken.
    """
    name = type(fuser).__name__
    loras = [_lora({"first": (4, 6, 2), "second": (5, 3, 1)}, seed=0), _lora({"first": (4, 6, 1)}, seed=1)]
    before = [lora.digest for lora in loras]
    fused = fuser.fuse(loras)
    assert isinstance(fused, LoRA), f"{name}.fuse returned {type(fused).__name__}: expected artaug.LoRA"
    assert set(fused.layers) == {"first", "second"}, (
        f"{name}.fuse of LoRAs of the layers 'first' and 'second' returned the layers {sorted(fused.layers)}"
    )
    shapes = {layer: tuple(update.delta().shape) for layer, update in fused.layers.items()}
    assert shapes == {"first": (4, 6), "second": (5, 3)}, f"{name}.fuse changed the shapes of updates: {shapes}"
    assert all(update.delta().isfinite().all() for update in fused.layers.values()), f"{name}.fuse made NaN or infinity"
    assert [lora.digest for lora in loras] == before, f"{name}.fuse changed the LoRAs it was given"
    assert fuser.fuse(loras).digest == fused.digest, f"{name}.fuse returned two LoRAs for the same arguments"
    lora = _lora({"first": (4, 6, 1)}, seed=2)
    tripled = fuser.fuse([lora, lora.scaled(2)]).layers["first"].delta()
    expected = 3 * lora.layers["first"].delta()
    assert torch.allclose(tripled, expected, rtol=1e-3, atol=1e-5), (
        f"{name}.fuse of a LoRA and twice that LoRA is not three times it: expected the sum of their updates"
    )
    try:
        nothing = fuser.fuse([])
    except LoRAError:
        return
    raise AssertionError(f"{name}.fuse([]) returned {nothing!r}: expected artaug.LoRAError, there is nothing to fuse")


def _lora(layers: Mapping[str, tuple[int, int, int]], *, seed: int) -> LoRA:
    """A random LoRA of layers by name, each of (outputs, inputs, rank)."""
    generator = torch.Generator().manual_seed(seed)
    return LoRA(
        {
            name: LowRank(
                torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)
            )
            for name, (outputs, inputs, rank) in layers.items()
        }
    )
