"""The update of one layer as two low-rank factors, and the shapes that a file gives them."""

import math
from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from artaug.errors import LoRAError

_MAX_KERNEL_AXES = 3


@dataclass(frozen=True, eq=False)
class LowRank:
    """The update of one layer: ``delta = up @ down``. Alpha and scale are already in the factors.

    The weight of a convolution, (outputs, inputs, kernel...), is a matrix of shape (outputs, inputs * kernel). As two
    convolutions, ``down`` has the kernel and ``up`` is 1 x 1. Stride, padding, dilation and groups belong to the layer
    and do not change what is added to its weight.

    Raises:
        LoRAError: if the two factors do not share a rank of at least 1, or hold NaN or infinity.

    >>> import artaug as aa, torch
    >>> aa.LowRank(torch.ones(2, 4, 3, 3), torch.ones(8, 2)).delta().shape
    torch.Size([8, 4, 3, 3])
    """

    down: Tensor
    """Shape (rank, inputs), or (rank, inputs, kernel...) for a convolution; called ``lora_A`` in PEFT files."""
    up: Tensor
    """Shape (outputs, rank); called ``lora_B`` in PEFT files."""

    def __post_init__(self) -> None:
        valid_axes = 2 <= self.down.ndim <= 2 + _MAX_KERNEL_AXES and self.up.ndim == 2
        if not (valid_axes and self.down.shape[0] == self.up.shape[1] >= 1):
            raise LoRAError(
                f"low-rank factors need shapes (rank, inputs), or (rank, inputs, kernel...) for a convolution, and "
                f"(outputs, rank), with a rank of at least 1. Received {tuple(self.down.shape)} and "
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
        """Shape of the layer's weight: (outputs, inputs), or (outputs, inputs, kernel...) for a convolution."""
        return (self.up.shape[0], *self.down.shape[1:])

    def flat(self) -> "LowRank":
        """The same update with the kernel flattened into the inputs, as of a linear layer."""
        return self if self.down.ndim == 2 else LowRank(self.down.flatten(1), self.up)

    def delta(self) -> Float[Tensor, "outputs inputs *kernel"]:
        """The dense update of the layer's weight, in float32 and of its ``shape``."""
        return (self.up.float() @ self.down.float().flatten(1)).reshape(self.shape)

    def energy(self) -> float:
        """Squared Frobenius norm of the update, in float64, without the dense update.

        ``|U D|^2 = trace(D^T U^T U D) = sum((U^T U) * (D D^T))``: two Gram matrices of shape (rank, rank).
        """
        up, down = self.up.double(), self.down.double().flatten(1)
        return float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0))  # rounding may end below 0


def to_file_factors(layer: LowRank) -> tuple[Tensor, Tensor]:
    """The factors ``down`` and ``up`` as a file holds them: ``up`` of a convolution gets a kernel of 1.

    >>> import torch
    >>> from artaug.lora.formats.low_rank import LowRank, to_file_factors
    >>> [tuple(factor.shape) for factor in to_file_factors(LowRank(torch.ones(2, 4, 3, 3), torch.ones(8, 2)))]
    [(2, 4, 3, 3), (8, 2, 1, 1)]
    """
    return layer.down, layer.up.reshape(*layer.up.shape, *(1 for _ in layer.down.shape[2:]))


def from_file_factors(down: Tensor, up: Tensor, mid: Tensor | None = None) -> LowRank:
    """The layer of the factors that a file holds.

    Args:
        down: as the file holds it.
        up: as the file holds it.
        mid: ``lora_mid`` of LyCORIS, a CP decomposition: a convolution of shape (rank, rank, kernel...) between two
            with a kernel of 1. It is multiplied into ``down``, which is exact.

    Raises:
        LoRAError: if their shapes are not those of one layer.
    """
    shapes = ", ".join(str(tuple(factor.shape)) for factor in (down, mid, up) if factor is not None)
    if down.ndim != up.ndim or any(size != 1 for size in up.shape[2:]):
        raise LoRAError(
            "low-rank factors need shapes (rank, inputs) and (outputs, rank), or those of two convolutions, the second "
            f"with a kernel of 1, as (rank, inputs, 3, 3) and (outputs, rank, 1, 1). Received {shapes}."
        )
    if mid is None:
        return LowRank(down, up.flatten(1))
    ranks_match = mid.shape[:2] == (up.shape[1], down.shape[0])
    if mid.ndim != down.ndim or not ranks_match or any(size != 1 for size in down.shape[2:]):
        raise LoRAError(
            "low-rank factors with a middle one (lora_mid) need shapes (rank, inputs, 1, 1), (rank, rank, 3, 3) and "
            f"(outputs, rank, 1, 1); the middle one may have any kernel. Received {shapes}."
        )
    down_matrix = rearrange(down.float(), "rank_in inputs ... -> rank_in (inputs ...)")
    merged = einsum(mid.float(), down_matrix, "rank_out rank_in ..., rank_in inputs -> rank_out inputs ...")
    return LowRank(merged, up.flatten(1))


def relative_error(actual: LowRank, expected: LowRank) -> float:
    """Relative error of an update: the Frobenius norm of the difference over that of ``expected``.

    It is computed in float64 from the factors, without the dense updates, and is exact to about 1e-7. It is infinite if
    the shapes differ, or if ``expected`` is zero and ``actual`` is not.

    >>> import torch
    >>> from artaug.lora.formats.low_rank import LowRank, relative_error
    >>> expected = LowRank(torch.ones(1, 4), torch.ones(3, 1))
    >>> round(relative_error(LowRank(expected.down, 1.5 * expected.up), expected), 6)
    0.5
    """
    if actual.shape != expected.shape:
        return math.inf
    # actual - expected = [U_f, -U_w] @ [D_f; D_w], again low-rank
    down = torch.cat([actual.down.double().cpu(), expected.down.double().cpu()])
    up = torch.cat([actual.up.double().cpu(), -expected.up.double().cpu()], dim=1)
    error, reference = LowRank(down, up).energy(), expected.energy()
    if reference == 0:
        return math.inf if error else 0.0
    return math.sqrt(error / reference)
