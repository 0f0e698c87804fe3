"""The update of one linear layer, or of one convolution, as two thin factors."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from artaug.errors import LoRAError

_MOST_AXES = 3


@dataclass(frozen=True, eq=False)
class LowRank:
    """The update of one layer: ``up @ down``, nothing hidden.

    The weight of a convolution is a matrix, too, whose columns are the inputs at every place of the kernel. Stride,
    padding, dilation and groups are the layer's own and do not change what is added to its weight.

    Raises:
        LoRAError: if the two factors do not share a rank of at least 1, or hold NaN or infinity.

    >>> import artaug as aa, torch
    >>> aa.LowRank(torch.ones(2, 4, 3, 3), torch.ones(8, 2)).delta().shape
    torch.Size([8, 4, 3, 3])
    """

    down: Tensor
    """Shape (rank, inputs), of a convolution (rank, inputs, ...); called ``lora_A`` in PEFT files."""
    up: Tensor
    """Shape (outputs, rank); called ``lora_B`` in PEFT files."""

    def __post_init__(self) -> None:
        fits = 2 <= self.down.ndim <= 2 + _MOST_AXES and self.up.ndim == 2
        if not (fits and self.down.shape[0] == self.up.shape[1] >= 1):
            raise LoRAError(
                f"low-rank factors need shapes (rank, inputs), with the kernel behind if it is a convolution's, and "
                f"(outputs, rank), with a rank of at least 1, received {tuple(self.down.shape)} and "
                f"{tuple(self.up.shape)}."
            )
        if not (self.down.isfinite().all() and self.up.isfinite().all()):
            raise LoRAError("low-rank factors hold NaN or infinity. The training that made them diverged.")

    @property
    def rank(self) -> int:
        """Number of rows of ``down``."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the layer's weight: (outputs, inputs), of a convolution (outputs, inputs, ...)."""
        return (self.up.shape[0], *self.down.shape[1:])

    def flat(self) -> "LowRank":
        """The same update as that of a linear layer: a kernel's places are inputs of their own."""
        return self if self.down.ndim == 2 else LowRank(self.down.flatten(1), self.up)

    def delta(self) -> Float[Tensor, "outputs inputs *kernel"]:
        """What is added to the layer's weight: float32, of its ``shape``."""
        return (self.up.float() @ self.down.float().flatten(1)).reshape(self.shape)

    def energy(self) -> float:
        """Squared Frobenius norm of the update, in float64, from the factors' Gram matrices: it is never formed."""
        up, down = self.up.double(), self.down.double().flatten(1)
        return float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0))


def relative_error(found: LowRank, wanted: LowRank) -> float:
    """How far one update is from another: the Frobenius norm of the difference over that of ``wanted``.

    It is computed in float64 from the factors, without forming either update, and is exact to about 1e-7. Infinite if
    the shapes differ, or if nothing was wanted and something found.

    >>> import torch
    >>> from artaug.lora.formats.low_rank import LowRank, relative_error
    >>> one = LowRank(torch.ones(1, 4), torch.ones(3, 1))
    >>> round(relative_error(LowRank(one.down, 1.5 * one.up), one), 6)
    0.5
    """
    if found.shape != wanted.shape:
        return math.inf
    down = torch.cat([found.down.double().cpu(), wanted.down.double().cpu()])
    up = torch.cat([found.up.double().cpu(), -wanted.up.double().cpu()], dim=1)
    missing, whole = LowRank(down, up).energy(), wanted.energy()
    if whole == 0:
        return math.inf if missing else 0.0
    return math.sqrt(missing / whole)
