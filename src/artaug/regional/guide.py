"""How a plan's regions steer sampling, without knowing whose model it is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from torch import Tensor, nn

from artaug.plan import Region

Conditioning: TypeAlias = Mapping[str, Tensor]
"""Encoded prompts, by the model's own names; the first axis of every tensor counts the prompts."""


@dataclass(frozen=True)
class EncodedRegion:
    """A region and its encoded prompt (one row)."""

    region: Region
    conditioning: Conditioning


class Denoiser(Protocol):
    """What a guide knows of a model: one short class a family implements it."""

    @property
    def module(self) -> nn.Module:
        """The denoiser, called once a step with keyword arguments, its first output the prediction."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens; predictions are (batch, rows * columns, channels)."""

    def is_guided(self, call: Mapping[str, Any]) -> bool:
        """Whether this call is the branch the plan's own prompt governs, not that of the negative prompt."""

    def recondition(self, call: Mapping[str, Any], rows: Sequence[int], conditioning: Conditioning) -> dict[str, Any]:
        """The same call for these rows of the batch, their prompts replaced by ``conditioning`` (one row each)."""


class Guide(ABC):
    """Makes regions count while a denoiser samples; installed for one run, leaving no trace after it."""

    @abstractmethod
    def steering(self, denoiser: Denoiser, regions: Sequence[Sequence[EncodedRegion]]) -> AbstractContextManager[None]:
        """Steer ``denoiser`` inside a ``with`` block; ``regions`` holds those of each picture of the batch."""
