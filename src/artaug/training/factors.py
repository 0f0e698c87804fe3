"""The linear maps an adapter is made of: kept in float32, computed in the precision of what comes in.

All take (..., inputs) and give (..., outputs). Shapes are not in annotations here: they would be checked within blocks
that are compiled, and cannot be.
"""

import math

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from torch import Tensor, nn


class Factor(nn.Module):
    """A float32 matrix that computes in the precision of what comes in.

    PEFT turns a layer's input into float32 for it, and autograd keeps that copy: as much memory again as the whole layer
    takes, three times over where queries, keys and values come from one input. So the factor is turned into the input's
    precision instead, and what is kept is the input itself, as autocast would have it if it did not copy as well.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.weight.to(inputs.dtype))


class Repeated(Factor):
    """The same small matrix for each of several stretches of the input: ``I (x) weight``, times ``times``."""

    def __init__(self, weight: Tensor, *, times: int) -> None:
        super().__init__(weight)
        self._times = times

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs.unflatten(-1, (self._times, -1))).flatten(-2)


class Kronecker(nn.Module):
    """The Kronecker product of two float32 matrices, which is never formed: ``outer (x) inner``."""

    def __init__(self, outer: Tensor, inner: Tensor) -> None:
        super().__init__()
        self.outer, self.inner = nn.Parameter(outer), nn.Parameter(inner)

    def forward(self, inputs: Tensor) -> Tensor:
        outer, inner = self.outer.to(inputs.dtype), self.inner.to(inputs.dtype)
        stretches = inputs.unflatten(
            -1, (outer.shape[1], -1)
        )  # small ones: the outer matrix goes first, on few numbers
        return F.linear(outer @ stretches, inner).flatten(-2)


def kaiming(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A matrix Kaiming-uniform with a = sqrt(5), as PEFT and ``nn.Linear`` begin; drawn on the CPU."""
    return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[1])
