"""Add a low-rank update to a stored weight: sum in float32, cast once, and measure the rounding error."""

import math
from collections.abc import Mapping
from hashlib import sha256
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from artaug.errors import NonFiniteError
from artaug.lora.baking.report import BakedLayer
from artaug.lora.formats.low_rank import LowRank

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
)
"""Types that can be baked into, by their names in safetensors. In 8 bits most of a small update would be rounded away."""
_BLOCK_ELEMENTS = 1 << 19
"""Elements of a weight that are processed at a time: few enough for a processor's cache, many enough for its instructions."""
_INTEGER_TYPES = {2: torch.int16, 4: torch.int32}
"""Integer types by item size, to view the bits of floats."""


class WeightUpdate:
    """Adds one layer's update to its stored weight, block after block of rows, in place.

    Weight and update are summed in float32 and cast once. A sum in bfloat16, with its 8 bits of precision, would round
    the update before it is added, and every further addition would round the sum again.

    The same weight, update and seed give the same bits, wherever the weight is in a file.

    Args:
        update: what to add.
        scale: of the update.
        dtype: of the stored weight, as safetensors calls it.
        seed: of stochastic rounding; None rounds to the nearest.
        name: of the weight.
    """

    def __init__(self, update: LowRank, *, scale: float, dtype: str, seed: int | None, name: str) -> None:
        self._down, self._up = update.down.float().cpu(), update.up.float().cpu() * scale
        self._update_norm = abs(scale) * update.energy() ** 0.5
        self._name, self._dtype_name, self._dtype = name, dtype, DTYPES[dtype]
        self._rng = None if seed is None else np.random.default_rng(_layer_seed(seed, name))
        self.row_bytes: int = self._down.shape[1] * self._dtype.itemsize
        block_shape = min(max(_BLOCK_ELEMENTS // self._down.shape[1], 1), len(self._up)), self._down.shape[1]
        # kept for all blocks: memory that is new from the system is slow
        self._before = torch.empty(block_shape, dtype=self._dtype)
        self._exact, self._rounded = torch.empty(block_shape), torch.empty(block_shape)
        self._rows = self._unchanged = 0
        self._squared_error = 0.0

    def add_to(self, data: memoryview) -> None:
        """Add the update to the next rows of the weight.

        Raises:
            NonFiniteError: if a weight is, or becomes, NaN or infinite.
        """
        for block in torch.frombuffer(data, dtype=self._dtype).view(-1, self._down.shape[1]).split(len(self._exact)):
            self._add(block)
        if not math.isfinite(self._squared_error):  # NaN and infinity reach this sum from any weight
            raise NonFiniteError(
                f"{self._name!r} holds NaN or infinity, or does once the LoRA is added ({self._dtype_name} reaches "
                f"{torch.finfo(self._dtype).max:.3g}). Check the checkpoint, or use a smaller scale."
            )

    def report(self) -> BakedLayer:
        """The rounding error of the layer, after all rows were processed."""
        return BakedLayer(
            dtype=self._dtype_name,
            numel=self._rows * self._down.shape[1],
            unchanged=self._unchanged,
            update_norm=self._update_norm,
            error_norm=self._squared_error**0.5,
        )

    def _add(self, block: Tensor) -> None:
        before, exact, rounded = (buffer[: len(block)] for buffer in (self._before, self._exact, self._rounded))
        before.copy_(block)
        exact.copy_(block).addmm_(self._up[self._rows : self._rows + len(block)], self._down)
        self._round(exact, block)
        self._unchanged += _count_equal_bits(block, before)
        error = rounded.copy_(block).sub_(exact).view(-1)
        self._squared_error += float(error @ error)
        self._rows += len(block)

    def _round(self, exact: Tensor, block: Tensor) -> None:
        if self._rng is None:
            block.copy_(exact)
        elif self._dtype == torch.bfloat16:
            # one draw of 64 bits is four of 16, which is all that bfloat16 needs
            words = self._rng.integers(1 << 64, size=-(-exact.numel() // 4), dtype=np.uint64)
            stochastic_round_bf16(exact, block, words.view(np.uint16)[: exact.numel()])
        else:
            draws = self._rng.random(tuple(exact.shape), dtype=np.float32)
            block.copy_(stochastic_round(exact, self._dtype, torch.from_numpy(draws)))


def stochastic_round_bf16(exact: Tensor, rounded: Tensor, draws: np.ndarray) -> None:
    """Round float32 to one of its two neighbours in bfloat16, with the exact number as the mean over many draws.

    A bfloat16 is the upper 16 bits of a float32. Of the lower 16 bits ``low``, ``low / 2^16`` is the distance to the
    neighbour away from zero, in units of the gap. ``low + draw`` carries into the upper half if ``draw >= 2^16 - low``,
    that is with probability ``low / 2^16``; the lower half is then cut off. Sign and magnitude are stored apart, so this
    holds for negative numbers, too, and a carry into the exponent gives the next power of two.

    Args:
        exact: the numbers to round.
        rounded: receives the result: bfloat16, of the same shape.
        draws: uniform integers in [0, 65536), one of 16 bits for each number.
    """
    sums = exact.numpy().reshape(-1).view(np.uint32) + draws
    np.right_shift(sums, 16, out=rounded.view(torch.int16).numpy().reshape(-1).view(np.uint16), casting="unsafe")


def stochastic_round(exact: Tensor, dtype: torch.dtype, draws: Tensor) -> Tensor:
    """Round float32 to one of its two neighbours in ``dtype``, with the exact number as the mean over many draws.

    ``w`` between the neighbours ``a`` and ``b`` becomes ``b`` with probability ``(w - a) / (b - a)``, so its mean is
    ``a + (b - a) (w - a) / (b - a) = w``. What ``dtype`` can hold stays.

    Args:
        exact: the numbers to round.
        dtype: bfloat16 (`stochastic_round_bf16` is faster), float16 or float32.
        draws: uniform in [0, 1), of the same shape.

    >>> import torch
    >>> from artaug.lora.baking.rounding import stochastic_round
    >>> quarter = torch.full((4,), 1 + 2**-9)  # of the way from 1 to the next number bfloat16 has
    >>> stochastic_round(quarter, torch.bfloat16, torch.tensor([0.1, 0.3, 0.5, 0.9])).tolist()
    [1.0078125, 1.0, 1.0, 1.0]
    """
    nearest = exact.to(dtype)
    if dtype == torch.float32:
        return nearest
    # a is the nearest number, b its neighbour on the other side of `exact`: floats of one sign are ordered as their bits,
    # so b is one integer further from zero, or nearer to it
    offset = exact - nearest.float()
    bits = nearest.view(_INTEGER_TYPES[nearest.itemsize])
    neighbor = torch.where((offset > 0) == (nearest > 0), bits + 1, bits - 1).view(dtype)
    smallest = torch.ones((), dtype=bits.dtype).view(dtype)
    # next to zero is the smallest number with the sign of the offset
    neighbor = torch.where(nearest == 0, torch.where(offset > 0, smallest, -smallest), neighbor)
    gap = neighbor.float() - nearest.float()
    return torch.where((offset != 0) & (draws < offset / gap), neighbor, nearest)


def _layer_seed(seed: int, name: str) -> int:
    """A seed for each layer, so that the order of layers and shards does not matter."""
    return int.from_bytes(sha256(f"{seed} {name}".encode()).digest()[:8], "big")


def _count_equal_bits(first: Tensor, second: Tensor) -> int:
    """How many numbers of two tensors have the same bits."""
    integers = _INTEGER_TYPES[first.itemsize]
    return int(np.count_nonzero(first.view(integers).numpy() == second.view(integers).numpy()))
