"""A guided call: what the rows of one call of the denoiser hold, and how attention and LoRA layers get to know it."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from artaug.plan import Region
from artaug.regional.bias import GroupBias
from artaug.regional.denoiser import Span
from artaug.regional.prepared import PreparedAttention


@dataclass(frozen=True)
class GuidedRow:
    """One row of a call's batch."""

    spans: tuple[Span, ...]
    """Its joint sequence, in order."""
    regions: tuple[Region, ...]
    """The regions whose prompts are in the sequence; the i-th has the spans of prompt i + 1."""
    lora_regions: tuple[Region, ...]
    """All regions of the picture. Their LoRAs apply in the negative branch as well, whose sequence may lack their
    prompts: a LoRA in one branch only would be multiplied by the guidance scale."""

    @property
    def areas(self) -> tuple[Hashable, ...]:
        """Where the regions are, and how strong: all of them that attention depends on."""
        return tuple((region.area, region.weight, region.feather) for region in self.regions)


@dataclass(frozen=True, eq=False)
class GuidedCall:
    """One call of a denoiser under a guide; without rows, a call in which no region counts. Steps alike share it."""

    rows: tuple[GuidedRow, ...] = ()
    prepared: dict[Hashable, PreparedAttention] = field(default_factory=dict, repr=False)
    """Attention of these rows, for each kind of layer."""
    biases: dict[Hashable, GroupBias] = field(default_factory=dict, repr=False)
    """What their weights add to the scores, for each kind of layer that is observed."""

    @property
    def has_prompts(self) -> bool:
        """Whether any row holds a region's prompt, so that attention differs from the model's own."""
        return any(row.regions for row in self.rows)

    @cached_property
    def row_numbers(self) -> Mapping[GuidedRow, Sequence[int]]:
        """Different rows with the numbers of the batch rows that are equal to them: they are computed together."""
        numbers: dict[GuidedRow, list[int]] = {}
        for number, row in enumerate(self.rows):
            numbers.setdefault(row, []).append(number)
        return numbers


class CurrentCall:
    """Carries the guided call to layers which the model calls, with tensors only: attention processors and LoRA hooks.

    One run owns one of these. Its pre-forward hook sets ``value`` once a call, before any layer runs; layers only read
    it. It is not cleared when the forward ends, because gradient checkpointing computes layers once more in the backward
    pass, after the forward, and they need the same call again.
    """

    value: GuidedCall
    """The call under way."""
    number: Tensor
    """Its number among the different calls of the run, for compiled code, which takes tensors only."""

    def __init__(self) -> None:
        self._calls: dict[tuple[GuidedRow, ...], GuidedCall] = {}  # few: branches of guidance, and one without rows
        self.begin(())

    def begin(self, rows: tuple[GuidedRow, ...]) -> None:
        """Make a call of these rows the one under way."""
        self.value = self._calls.setdefault(rows, GuidedCall(rows))
        self.number = torch.tensor(list(self._calls).index(rows), device="cpu")

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Return to the call under way at the end of a ``with`` block, whatever other calls are made in it."""
        value, number = self.value, self.number
        try:
            yield
        finally:
            self.value, self.number = value, number

    @contextmanager
    def back_at(self, number: Tensor) -> Iterator[None]:
        """Return to an earlier call in a ``with`` block: the backward pass may come after other calls."""
        last = self.value
        self.value = list(self._calls.values())[int(number)]
        try:
            yield
        finally:
            self.value = last
