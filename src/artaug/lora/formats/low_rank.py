"""The update of one layer as two low-rank factors, and the shapes that a file gives them."""

import math
from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from artaug._internal.annotations import checked
from artaug.errors import LoRAError

FACTOR_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_KERNEL_AXES = 3
_SMALL_IN_FLOAT16 = 2.0**-8
"""A factor with no larger element has many below 6e-5, where float16 loses bits."""
_MAX_NUMEL = 1 << 28
"""Most elements of a factor that is computed from smaller ones: 1 GiB. A file of a few kilobytes can describe more."""


@checked
@dataclass(frozen=True, eq=False)
class LowRank:
    """The update of one layer: ``delta = up @ down``. Alpha and scale are already in the factors.

    The weight of a convolution, (outputs, inputs, kernel...), is a matrix of shape (outputs, inputs * kernel). As two
    convolutions, ``down`` has the kernel and ``up`` is 1 x 1. Stride, padding, dilation and groups belong to the layer
    and do not change what is added to its weight.

    The factors are of any floating-point type of 16 bits or more, not necessarily of one. All sums are in float32
    or better, whatever the types.

    Raises:
        LoRAError: if the two factors do not share a rank of at least 1, hold NaN or infinity, or are of another type
            (integers, complex numbers, 8 bits).

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
        for factor in (self.down, self.up):
            if factor.dtype not in FACTOR_DTYPES:
                raise LoRAError(
                    f"low-rank factors are of {', '.join(map(str, FACTOR_DTYPES))}; received {factor.dtype}. Convert "
                    "them, with .float() for instance."
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

    def scaled(self, scale: float) -> "LowRank":
        """The update times ``scale``. The factor ``up`` takes it, and ``down`` stays as it is.

        The product is computed in float32 (float64 for factors of that type). ``up`` keeps its own type only where that
        holds every product exactly, such as half of a bfloat16; else it becomes float32. Not even a power of two is exact
        in float16, whose numbers lose bits below 6e-5: 1/128 of a usual factor loses a fifth of the update.

        Raises:
            LoRAError: if ``scale`` is not finite, or a product is too large for float32.

        >>> import artaug as aa, torch
        >>> layer = aa.LowRank(torch.ones(1, 4), torch.ones(4, 1, dtype=torch.float16))
        >>> layer.scaled(0.5).up.dtype, layer.scaled(2.0**-30).up.dtype, layer.scaled(1 / 3).up.dtype
        (torch.float16, torch.float32, torch.float32)
        """
        if scale == 1:
            return self
        exact = self.up.to(torch.promote_types(self.up.dtype, torch.float32)) * scale
        if not exact.isfinite().all():
            raise LoRAError(
                f"times {scale}, a low-rank factor of up to {float(self.up.abs().max()):.3g} leaves the range of "
                f"{exact.dtype}. Expected a smaller scale."
            )
        stored = exact.to(self.up.dtype)
        return LowRank(self.down, stored if torch.equal(stored.to(exact.dtype), exact) else exact)

    def factors_like(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """``down`` and ``up`` in the type and on the device of a tensor, to compute with.

        For float16 a power of two goes from the larger factor to the smaller one, if that is near the lower end of the
        type's range; the product of the two stays the same.
        """
        down, up = self.down, self.up
        if tensor.dtype == torch.float16:
            largest = [float(factor.abs().max()) for factor in (down, up)]
            if 0 < min(largest) < _SMALL_IN_FLOAT16:
                shift = 2.0 ** round(math.log2(largest[1] / largest[0]) / 2)
                down, up = down.float() * shift, up.float() / shift
        return down.to(tensor), up.to(tensor)

    def delta(self) -> Float[Tensor, "outputs inputs *kernel"]:
        """The dense update of the layer's weight, in float32 and of its ``shape``."""
        return (self.up.float() @ self.down.float().flatten(1)).reshape(self.shape)

    def energy(self) -> float:
        """Squared Frobenius norm of the update, in float64, without the dense update.

        ``|U D|^2 = trace(D^T U^T U D) = sum((U^T U) * (D D^T))``: two Gram matrices of shape (rank, rank).
        """
        up, down = self.up.cpu().double(), self.down.cpu().double().flatten(1)
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
    if not down.ndim == up.ndim >= 2 or any(size != 1 for size in up.shape[2:]):
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
    check_numel(down.shape[0], down.shape[1], *mid.shape[2:])
    down_matrix = rearrange(down.float(), "rank_in inputs ... -> rank_in (inputs ...)")
    merged = einsum(mid.float(), down_matrix, "rank_out rank_in ..., rank_in inputs -> rank_out inputs ...")
    return LowRank(merged, up.flatten(1))


def check_numel(*sizes: int) -> None:
    """Refuse to compute a factor of that shape if it is absurdly large.

    Raises:
        LoRAError: if it has more than 2^28 elements.
    """
    if math.prod(sizes) > _MAX_NUMEL:
        raise LoRAError(f"as a LoRA it would need factors of {sizes}, more than {_MAX_NUMEL:,} numbers in one of them.")


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
    down = torch.cat([actual.down.cpu().double(), expected.down.cpu().double()])
    up = torch.cat([actual.up.cpu().double(), -expected.up.cpu().double()], dim=1)
    error, reference = LowRank(down, up).energy(), expected.energy()
    if reference == 0:
        return math.inf if error else 0.0
    return math.sqrt(error / reference)
