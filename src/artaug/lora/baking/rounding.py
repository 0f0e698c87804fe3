"""Adding an update to stored weights: one sum in float32, one cast, and a count of what the cast has cost."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
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
"""What can be baked into, as safetensors calls it. Of an update to 8-bit weights next to nothing would arrive."""
_AT_ONCE = 1 << 17
"""Numbers worked on at a time, few enough for a processor's cache."""
_BITS = {2: torch.int16, 4: torch.int32}


class Addition:
    """Adds one layer's update to its stored weight, row after row, in place.

    The same weight, update and seed give the same bits, wherever in a file the weight lies and in whatever pieces it
    comes, as long as all pieces but the last are multiples of ``unit`` bytes.
    """

    def __init__(self, update: LowRank, *, scale: float, dtype: str, seed: int | None, name: str) -> None:
        self._update, self._scale = update, scale
        self._name, self._kind, self._dtype = name, dtype, DTYPES[dtype]
        self._outputs, self._inputs = update.up.shape[0], update.down.shape[1]
        self._rows = min(max(_AT_ONCE // self._inputs, 1), self._outputs)
        self._noise = None if seed is None else np.random.default_rng(_seed_for(seed, name))
        self._room: _Room | None = None
        self._row = self._unchanged = 0
        self._lost = 0.0

    @property
    def unit(self) -> int:
        """Bytes worked on at a time."""
        return self._rows * self._inputs * self._dtype.itemsize

    def __call__(self, piece: memoryview) -> None:
        """Add the update of the next rows to them.

        Raises:
            NonFiniteError: if a weight is, or becomes, NaN or infinite.
        """
        if self._room is None:
            self._room = _Room.of(self._factors(), rows=self._rows, dtype=self._dtype)
        for block in torch.frombuffer(piece, dtype=self._dtype).view(-1, self._inputs).split(self._rows):
            self._add(block, self._room)
        if not math.isfinite(self._lost):
            raise NonFiniteError(
                f"{self._name!r} holds NaN or infinity, or does once the LoRA is added ({self._kind} reaches "
                f"{torch.finfo(self._dtype).max:.3g}). Check the checkpoint, or use a smaller scale."
            )
        if self._row == self._outputs:
            self._room = None

    def report(self) -> BakedLayer:
        """What has become of the weight, once all rows are through."""
        return BakedLayer(
            dtype=self._kind,
            weights=self._outputs * self._inputs,
            unchanged=self._unchanged,
            update=self._factors().energy() ** 0.5,
            error=self._lost**0.5,
        )

    def _factors(self) -> LowRank:
        return LowRank(self._update.down.float().cpu(), self._update.up.float().cpu() * self._scale)

    def _add(self, block: Tensor, room: "_Room") -> None:
        count = len(block)
        wanted, stored = room.wanted[:count], room.stored[:count]
        wanted.copy_(block)
        wanted.addmm_(room.update.up[self._row : self._row + count], room.update.down)
        if self._noise is None:
            stored.copy_(wanted)
        elif self._dtype == torch.bfloat16:
            words = self._noise.integers(1 << 64, size=-(-wanted.numel() // 4), dtype=np.uint64)
            carry(wanted, stored, words.view(np.uint16)[: wanted.numel()])
        else:
            drawn = self._noise.random(tuple(wanted.shape), dtype=np.float32)
            stored.copy_(stochastically(wanted, self._dtype, torch.from_numpy(drawn)))
        self._unchanged += _alike(stored, block)
        block.copy_(stored)
        missed = wanted.sub_(stored).view(-1)
        self._lost += float(missed @ missed)
        self._row += count


@dataclass(frozen=True, eq=False)
class _Room:
    """What is needed while a layer is worked on, and not before or after."""

    update: LowRank
    """In float32."""
    wanted: Tensor
    stored: Tensor

    @classmethod
    def of(cls, update: LowRank, *, rows: int, dtype: torch.dtype) -> "_Room":
        shape = (rows, update.down.shape[1])
        return cls(update, torch.empty(shape), torch.empty(shape, dtype=dtype))


def carry(wanted: Tensor, stored: Tensor, drawn: np.ndarray) -> None:
    """Round float32 to one of its two neighbours in bfloat16, so that the mean over many draws is the number itself.

    A bfloat16 is the upper half of a float32. The lower half, as a part of 65,536, is how far it is on the way to the next:
    so a random number is added there, and what is carried decides. A few operations on whole numbers are all it takes.

    Args:
        wanted: what to round.
        stored: where it goes: bfloat16, of the same shape.
        drawn: uniform in [0, 65536), a number of 16 bits for each.
    """
    carried = wanted.numpy().reshape(-1).view(np.uint32) + drawn
    np.right_shift(carried, 16, out=stored.view(torch.int16).numpy().reshape(-1).view(np.uint16), casting="unsafe")


def stochastically(wanted: Tensor, dtype: torch.dtype, drawn: Tensor) -> Tensor:
    """Round float32 to one of its two neighbours in ``dtype``, so that the mean over many draws is the number itself.

    ``w`` between ``a`` and ``b`` goes to ``b`` with probability ``(w - a) / (b - a)``. What ``dtype`` can hold stays.

    Args:
        wanted: what to round.
        dtype: bfloat16 (`carry` is quicker), float16 or float32.
        drawn: uniform in [0, 1), of the same shape.

    >>> import torch
    >>> from artaug.lora.baking.rounding import stochastically
    >>> quarter = torch.full((4,), 1 + 2**-9)  # of the way from 1 to the next number bfloat16 has
    >>> stochastically(quarter, torch.bfloat16, torch.tensor([0.1, 0.3, 0.5, 0.9])).tolist()
    [1.0078125, 1.0, 1.0, 1.0]
    """
    nearest = wanted.to(dtype)
    if dtype == torch.float32:
        return nearest
    off = wanted - nearest.float()
    bits = nearest.view(_BITS[nearest.itemsize])
    other = torch.where((off > 0) == (nearest > 0), bits + 1, bits - 1).view(dtype)
    smallest = torch.ones((), dtype=bits.dtype).view(dtype)
    other = torch.where(nearest == 0, torch.where(off > 0, smallest, -smallest), other)
    gap = other.float() - nearest.float()
    return torch.where((off != 0) & (drawn < off / gap), other, nearest)


def _seed_for(seed: int, name: str) -> int:
    """A seed of every layer's own, so that the order of layers and shards does not matter."""
    return int.from_bytes(sha256(f"{seed} {name}".encode()).digest()[:8], "big")


def _alike(one: Tensor, other: Tensor) -> int:
    """How many numbers of two tensors have the same bits."""
    bits = _BITS[one.itemsize]
    return int(np.count_nonzero(one.view(bits).numpy() == other.view(bits).numpy()))
