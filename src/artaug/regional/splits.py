"""Splits: the parts of masked attention that are one attention each, and what their price depends on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

TokenIndex: TypeAlias = slice | Tensor
"""Which tokens of a sequence: a slice of neighbours, or their numbers in rising order."""

SplitStage: TypeAlias = Literal["only", "first", "merge"]
"""Whether the result of a split is all that its queries attend to, or the first part of it, or has to be merged with the
result of earlier splits."""

_MAX_SLICES = 12
"""From this on, one gather by number is cheaper than concatenating slices."""
_BIAS_ALIGNMENT = 16
"""In numbers: what `scaled_dot_product_attention` itself pads a mask to."""


@dataclass(frozen=True, eq=False)
class AttentionSplit:
    """One attention of some queries to some keys, in all rows of a batch."""

    queries: TokenIndex
    keys: tuple[TokenIndex, ...]
    """Runs of keys, concatenated."""
    stage: SplitStage
    log_weights: Tensor | None = None
    """Logarithm of the keys' weight for each query, (rows, 1, queries), or None if it is 1 for all; one row stands for all."""
    bias: Tensor | None = None
    """Logarithm of each key's weight for each query, (rows, 1, queries, keys), or None if it is 0 for all."""

    def to(self, device: torch.device, dtype: torch.dtype) -> "AttentionSplit":
        """The same split with its numbers on a device, its bias in the type of the tokens."""
        return AttentionSplit(
            self.queries if isinstance(self.queries, slice) else self.queries.to(device),
            tuple(index if isinstance(index, slice) else index.to(device) for index in self.keys),
            self.stage,
            None if self.log_weights is None else self.log_weights.to(device),
            None if self.bias is None else _aligned(self.bias.to(device, dtype)),
        )

    @property
    def tensors(self) -> list[Tensor]:
        """All that it holds in memory."""
        parts = (self.queries, *self.keys, self.log_weights, self.bias)
        return [part for part in parts if isinstance(part, Tensor)]


def _aligned(bias: Tensor) -> Tensor:
    """The same bias with rows that begin at multiples of 16 numbers, which CUDA's kernels ask for.

    `scaled_dot_product_attention` would copy it in every call.
    """
    keys = bias.shape[-1]
    return functional.pad(bias, (0, -keys % _BIAS_ALIGNMENT))[..., :keys]


@dataclass(frozen=True)
class SplitSize:
    """What the price of a split depends on."""

    queries: int
    keys: int
    gathers_queries: bool
    """Whether its queries are no neighbours, so that they are copied, and their results scattered."""
    gathers_keys: bool
    """Whether its keys are several runs, or scattered, so that they and their values are copied."""
    is_masked: bool
    stage: SplitStage


Price: TypeAlias = Callable[[Sequence[SplitSize]], float]
"""Seconds that splits take, or anything in proportion."""


def gather(tensor: Tensor, indices: Sequence[TokenIndex]) -> Tensor:
    """Tokens of (batch, heads, tokens, channels), copied only where they are not neighbours."""
    parts = [tensor[:, :, index] if isinstance(index, slice) else tensor.index_select(2, index) for index in indices]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def as_slice(tokens: Tensor) -> TokenIndex:
    """Numbers in rising order, as a slice if they are neighbours."""
    first, last = int(tokens[0]), int(tokens[-1])
    return slice(first, last + 1) if last - first + 1 == len(tokens) else tokens


def as_slices(tokens: Tensor) -> tuple[TokenIndex, ...]:
    """Numbers in rising order as a few slices, or as they are if they are scattered."""
    breaks = ((tokens[1:] - tokens[:-1]) > 1).nonzero()[:, 0] + 1
    if len(breaks) >= _MAX_SLICES:
        return (tokens,)
    return tuple(as_slice(run) for run in tokens.tensor_split(breaks.tolist()))
