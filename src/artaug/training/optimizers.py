"""Optimizers as values, and the learning rate schedule of a stage."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import final

import torch
from torch import nn

from artaug._internal.annotations import Seam, checked
from artaug._internal.extras import check_installed, optional
from artaug.errors import InvalidValueError


class Optimizer(Seam):
    """Builds the torch optimizer of a stage. Subclass it for one that is not here.

    >>> import artaug as aa, torch
    >>> class Momentum(aa.Optimizer):
    ...     def build(self, parameters, *, learning_rate):
    ...         return torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9)
    """

    @abstractmethod
    def build(self, parameters: Sequence[nn.Parameter], *, learning_rate: float) -> torch.optim.Optimizer:
        """An optimizer over these parameters; the trainer sets its ``lr`` before every step."""


@dataclass(frozen=True, kw_only=True)
class AdaptiveMoments(Optimizer):
    """The settings that Adam and its variants share.

    Raises:
        InvalidValueError: for a negative decay, or betas outside [0, 1).
    """

    weight_decay: float = 0.0
    """Part of every parameter that a step of learning rate 1 takes away, decoupled from the gradient."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square, in [0, 1)."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight_decay < math.inf or not all(0 <= beta < 1 for beta in self.betas):
            raise InvalidValueError(f"{self}: need a weight_decay of at least 0, and betas in [0, 1).")


@checked
@final
@dataclass(frozen=True, kw_only=True)
class AdamW(AdaptiveMoments):
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101)."""

    def build(self, parameters: Sequence[nn.Parameter], *, learning_rate: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=self.weight_decay, betas=self.betas)


@checked
@final
@dataclass(frozen=True, kw_only=True)
class AdamW8bit(AdaptiveMoments):
    """AdamW whose two moments take one byte a parameter (Dettmers et al., arXiv 2110.02861), by bitsandbytes.

    A LoRA's moments are small beside the frozen model; below rank 64 or so plain `AdamW` costs little more.

    Raises:
        MissingExtraError: also without the package.
    """

    def __post_init__(self) -> None:
        super().__post_init__()  # a package that a training needs is missed here, not after the pictures are drawn
        check_installed("bitsandbytes", required_by="AdamW8bit", extra="optimizers")

    def build(self, parameters: Sequence[nn.Parameter], *, learning_rate: float) -> torch.optim.Optimizer:
        with optional("bitsandbytes", required_by="AdamW8bit", extra="optimizers"):
            from bitsandbytes import optim  # noqa: PLC0415 - an extra
        optimizer: torch.optim.Optimizer = optim.AdamW8bit(
            parameters, lr=learning_rate, weight_decay=self.weight_decay, betas=self.betas
        )
        return optimizer


@checked
@final
@dataclass(frozen=True, kw_only=True)
class Prodigy(AdaptiveMoments):
    """AdamW that estimates its step length (Mishchenko and Defazio, arXiv 2306.06101). Set the trainer's ``learning_rate`` to 1.

    Raises:
        InvalidValueError: also for a growth rate of at most 1.
        MissingExtraError: without the package.
    """

    growth_rate: float = math.inf
    """By how much the estimate of the step length may grow in one step; above 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.growth_rate > 1:
            raise InvalidValueError(
                f"{self}: need a growth_rate above 1, or the estimate of the step length cannot grow."
            )
        check_installed("prodigyopt", required_by="Prodigy", extra="optimizers")

    def build(self, parameters: Sequence[nn.Parameter], *, learning_rate: float) -> torch.optim.Optimizer:
        with optional("prodigyopt", required_by="Prodigy", extra="optimizers"):
            from prodigyopt import Prodigy as ProdigyOptimizer  # noqa: PLC0415 - an extra
        optimizer: torch.optim.Optimizer = ProdigyOptimizer(
            parameters,
            lr=learning_rate,
            weight_decay=self.weight_decay,
            betas=self.betas,
            growth_rate=self.growth_rate,
            decouple=True,
        )
        return optimizer


@checked
@final
@dataclass(frozen=True, kw_only=True)
class ScheduleFree(AdaptiveMoments):
    """AdamW without a schedule: what is exported is a mean of all iterates (Defazio et al., arXiv 2405.15682).

    Leave the trainer's ``schedule`` constant.

    Raises:
        MissingExtraError: also without the package.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check_installed("schedulefree", required_by="ScheduleFree", extra="optimizers")

    def build(self, parameters: Sequence[nn.Parameter], *, learning_rate: float) -> torch.optim.Optimizer:
        with optional("schedulefree", required_by="ScheduleFree", extra="optimizers"):
            from schedulefree import AdamWScheduleFree  # noqa: PLC0415 - an extra
        optimizer: torch.optim.Optimizer = AdamWScheduleFree(
            parameters, lr=learning_rate, weight_decay=self.weight_decay, betas=self.betas, foreach=False
        )
        return optimizer


class Schedule(StrEnum):
    """The learning rate after the warmup, until the end of a stage.

    >>> import artaug as aa
    >>> [round(aa.Schedule.COSINE.multiplier(progress), 3) for progress in (0.0, 0.5, 1.0)]
    [1.0, 0.5, 0.0]
    """

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"

    def multiplier(self, progress: float) -> float:
        """What the learning rate is multiplied by at ``progress``, in [0, 1]."""
        match self:
            case Schedule.CONSTANT:
                return 1.0
            case Schedule.LINEAR:
                return 1.0 - progress
            case Schedule.COSINE:
                return (1 + math.cos(math.pi * progress)) / 2
