"""The update of one linear layer as two thin factors."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from artaug.errors import LoRAError


@dataclass(frozen=True, eq=False)
class LowRank:
    """The update of one linear layer: ``up @ down``, nothing hidden.

    Raises:
        LoRAError: if the two factors do not share a rank of at least 1, or hold NaN or infinity.
    """

    down: Tensor
    """Shape (rank, inputs); called ``lora_A`` in PEFT files."""
    up: Tensor
    """Shape (outputs, rank); called ``lora_B`` in PEFT files."""

    def __post_init__(self) -> None:
        flat = self.down.ndim == self.up.ndim == 2
        if not (flat and self.down.shape[0] == self.up.shape[1] >= 1):
            raise LoRAError(
                f"low-rank factors need shapes (rank, inputs) and (outputs, rank) with a rank of at least 1, "
                f"received {tuple(self.down.shape)} and {tuple(self.up.shape)}."
            )
        if not (self.down.isfinite().all() and self.up.isfinite().all()):
            raise LoRAError("low-rank factors hold NaN or infinity. The training that made them diverged.")

    @property
    def rank(self) -> int:
        """Number of rows of ``down``."""
        return self.down.shape[0]

    def delta(self) -> Float[Tensor, "outputs inputs"]:
        """What is added to the layer's weight: float32, shape (outputs, inputs)."""
        return self.up.float() @ self.down.float()

    def energy(self) -> float:
        """Squared Frobenius norm of the update, in float64, from the factors' Gram matrices: it is never formed."""
        up, down = self.up.double(), self.down.double()
        return float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0))


def relative_error(found: LowRank, wanted: LowRank) -> float:
    """How far one update is from another: the Frobenius norm of the difference over that of ``wanted``.

    It is computed in float64 from the factors, without forming either update, and is exact to about 1e-7. Infinite if
    the shapes differ, or if nothing was wanted and something found.

    >>> import torch
    >>> from artaug.formats.low_rank import LowRank, relative_error
    >>> one = LowRank(torch.ones(1, 4), torch.ones(3, 1))
    >>> round(relative_error(LowRank(one.down, 1.5 * one.up), one), 6)
    0.5
    """
    if (found.up.shape[0], found.down.shape[1]) != (wanted.up.shape[0], wanted.down.shape[1]):
        return math.inf
    down = torch.cat([found.down.double().cpu(), wanted.down.double().cpu()])
    up = torch.cat([found.up.double().cpu(), -wanted.up.double().cpu()], dim=1)
    missing, whole = LowRank(down, up).energy(), wanted.energy()
    if whole == 0:
        return math.inf if missing else 0.0
    return math.sqrt(missing / whole)
