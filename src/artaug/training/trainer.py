"""Differential training: pairs in, a LoRA out, and the model it was trained on left as it was."""

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Self

import torch
from torch import Tensor
from tqdm.auto import tqdm

from artaug.errors import InvalidValueError, NothingToLearnError, SeamError, TrainingDivergedError
from artaug.lora import LoRA, summed
from artaug.pairs import ImagePair
from artaug.synthesis import picture_seeds
from artaug.training.adapters import AdaptedModel, adapted
from artaug.training.batches import EncodedPairs
from artaug.training.model import DiffusionModel, Trainable
from artaug.training.objectives import Course, Loss, Objective, PairBatch, PairedDifference

ATTENTION_AND_MLP = r"attn|attention|feed_forward|\bff|mlp|blocks\.\d+\.proj_out"
"""Linear layers of attention and MLPs, as FLUX, SD3, Qwen-Image and the UNets name them; modulation is left alone."""


@dataclass(frozen=True, kw_only=True)
class StepEvent:
    """What a trainer reports after every step."""

    step: int
    """Counted from 1."""
    steps: int
    """How many there will be."""
    loss: float
    seconds: float
    """Since training began."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a training gave."""

    lora: LoRA
    losses: tuple[float, ...] = field(repr=False)
    """The loss of every step."""
    pairs: int
    """How many pairs were learned from."""
    steps: int
    seconds: float
    """Wall-clock time, encoding included."""


@dataclass(frozen=True, kw_only=True)
class DifferentialLoRATrainer:
    """Trains a LoRA on what separates the pictures of pairs.

    All pairs are learned jointly unless the objective says otherwise. The optimiser is AdamW on float32 factors,
    whatever the model's own precision; alpha equals the rank. The same seed gives the same LoRA, bit for bit on a CPU.

    Raises:
        InvalidValueError: for a value out of its range.

    >>> import artaug as aa
    >>> trainer = aa.DifferentialLoRATrainer(rank=8, steps=100, learning_rate=1e-3)
    >>> trainer.objective
    PairedDifference()
    """

    rank: int = 16
    steps: int = 400
    """Optimiser steps in all, over every stage and pair, so that objectives compare at equal cost."""
    batch_size: int = 4
    learning_rate: float = 1e-4
    targets: str = ATTENTION_AND_MLP
    """Regular expression, searched for in the paths of linear layers, that says which of them learn."""
    objective: Objective = field(default_factory=PairedDifference)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Gradients longer than this are shortened to it."""
    warmup: float = 0.05
    """Part of every stage in which the learning rate rises linearly to its constant value, in [0, 1]."""
    sigmas: tuple[float, float] = (0.0, 1.0)
    """Lowest and highest noise level to train at: high levels decide composition, low ones texture."""

    def __post_init__(self) -> None:
        faults = {
            "rank": self.rank >= 1,
            "steps": self.steps >= 1,
            "batch_size": self.batch_size >= 1,
            "learning_rate": 0 < self.learning_rate < math.inf,
            "weight_decay": 0 <= self.weight_decay < math.inf,
            "max_grad_norm": self.max_grad_norm > 0,
            "warmup": 0 <= self.warmup <= 1,
            "sigmas": 0 <= self.sigmas[0] < self.sigmas[1] <= 1,
        }
        wrong = [f"{name}={getattr(self, name)!r}" for name, legal in faults.items() if not legal]
        if wrong:
            raise InvalidValueError(
                f"DifferentialLoRATrainer({', '.join(wrong)}): need rank, steps and batch_size of at least 1, "
                "learning_rate and max_grad_norm above 0, weight_decay at least 0, warmup in [0, 1], and sigmas as "
                "(lowest, highest) in [0, 1]."
            )
        try:
            re.compile(self.targets)
        except re.error as fault:
            raise InvalidValueError(
                f"DifferentialLoRATrainer(targets={self.targets!r}) is no regular expression: {fault}."
            ) from None

    def train(
        self,
        pairs: Sequence[ImagePair],
        synthesizer: Trainable,
        *,
        seed: int,
        on_step: Callable[[StepEvent], None] | None = None,
        progress: bool = True,
    ) -> Training:
        """Learn from pairs. The synthesizer's model is as before afterwards, also after an exception.

        Args:
            pairs: pictures of one size.
            synthesizer: lends the model; LoRAs it draws with are part of the teacher and stay as they are.
            seed: decides the start, the order of the pairs, and the noise.
            on_step: called after every step; an exception it raises ends the training.
            progress: show a progress bar.

        Raises:
            NothingToLearnError: if there is no pair.
            InvalidValueError: if there are fewer steps than the objective needs for this many pairs.
            ModelError: if the pictures are not all of one size, or of none the model takes.
            LoRAMismatchError: if ``targets`` selects no layer.
            TrainingDivergedError: if a loss is not finite; that step is not taken.
        """
        if not pairs:
            raise NothingToLearnError(
                "received 0 pairs, and training needs at least one. Ask for more prompts, or loosen the filter."
            )
        course = self.objective.course(len(pairs))
        steps = _steps_by_group(course, self.steps, self.objective)
        seeds = picture_seeds(seed, len(course.groups))
        loras: list[LoRA] = []
        with _Log(self.steps, on_step, progress=progress) as log, synthesizer.training() as model:
            encoded = EncodedPairs.encode(model, pairs, at_once=self.batch_size)
            for group, counts, group_seed in zip(course.groups, steps, seeds, strict=True):
                generator = torch.Generator().manual_seed(group_seed)
                batches = encoded.batches(group, size=self.batch_size, generator=generator, within=self.sigmas)
                stages = [_Run(stage.loss, count) for stage, count in zip(course.stages, counts, strict=True)]
                loras.append(self._learn(model, stages, batches, generator=generator, log=log))
        return Training(
            lora=summed([lora.scaled(1 / len(loras)) for lora in loras]),
            losses=tuple(log.losses),
            pairs=len(pairs),
            steps=self.steps,
            seconds=log.seconds,
        )

    def _learn(
        self,
        model: DiffusionModel,
        stages: Sequence["_Run"],
        batches: Iterator[PairBatch],
        *,
        generator: torch.Generator,
        log: "_Log",
    ) -> LoRA:
        """Go through the stages, each on top of what the ones before it have learned; give the last one's LoRA."""
        first, *later = stages
        with adapted(model, rank=self.rank, targets=self.targets, generator=generator) as student:
            self._optimise(student, first, batches, log=log)
            lora = student.lora()
        if not later:
            return lora
        with lora.worn_by(model.module):
            return self._learn(model, later, batches, generator=generator, log=log)

    def _optimise(self, student: AdaptedModel, run: "_Run", batches: Iterator[PairBatch], *, log: "_Log") -> None:
        factors = student.parameters()
        optimiser = torch.optim.AdamW(factors, lr=self.learning_rate, weight_decay=self.weight_decay)
        rising = math.ceil(self.warmup * run.steps)
        with torch.enable_grad():
            for number in range(1, run.steps + 1):
                optimiser.param_groups[0]["lr"] = self.learning_rate * min(1.0, number / max(rising, 1))
                loss = _checked(run.loss(student, next(batches)), step=log.step + 1)
                optimiser.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(factors, self.max_grad_norm)
                optimiser.step()
                log.record(loss.item())


@dataclass(frozen=True)
class _Run:
    """A stage with its number of steps."""

    loss: Loss
    steps: int


class _Log:
    """The losses so far, shown as a bar and reported to whoever listens."""

    def __init__(self, steps: int, on_step: Callable[[StepEvent], None] | None, *, progress: bool) -> None:
        self.losses: list[float] = []
        self._steps = steps
        self._on_step = on_step
        self._started = time.perf_counter()
        self._bar = tqdm(total=steps, desc="Training the LoRA", unit="step", disable=not progress)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    @property
    def step(self) -> int:
        return len(self.losses)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def record(self, loss: float) -> None:
        self.losses.append(loss)
        self._bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
        self._bar.update()
        if self._on_step is not None:
            self._on_step(StepEvent(step=self.step, steps=self._steps, loss=loss, seconds=self.seconds))


def _checked(loss: Tensor, *, step: int) -> Tensor:
    """The loss, if an optimiser can do something with it."""
    if loss.ndim != 0 or not loss.requires_grad:
        raise SeamError(
            f"the objective returned a loss of shape {tuple(loss.shape)}, "
            f"{'with' if loss.requires_grad else 'without'} gradient. Expected a scalar made from model.predict."
        )
    if not loss.isfinite():
        raise TrainingDivergedError(step, loss.item())
    return loss


def _steps_by_group(course: Course, steps: int, objective: Objective) -> list[list[int]]:
    """Share all steps among groups and their stages, whole steps each; they add up to ``steps``.

    Raises:
        InvalidValueError: if someone would get none.
    """
    shares = [stage.share for _ in course.groups for stage in course.stages]
    whole = math.fsum(shares)
    ends = [round(steps * end / whole) for end in accumulate(shares)]
    counts = [end - start for start, end in pairwise([0, *ends])]
    if min(counts) < 1:
        raise InvalidValueError(
            f"steps={steps} are too few for {objective}: {len(course.groups)} group(s) of pairs with "
            f"{len(course.stages)} stage(s) each need at least one step a stage. Give it more steps, or fewer pairs."
        )
    width = len(course.stages)
    return [counts[start : start + width] for start in range(0, len(counts), width)]
