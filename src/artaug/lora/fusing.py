"""Several LoRAs to one: exactly, or as well as a given rank allows. Dense updates are never formed."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Annotated, final

import torch
from pydantic import Field
from torch import Tensor

from artaug._internal.text import table_html
from artaug._internal.values import value
from artaug.errors import InvalidValueError, LoRAError
from artaug.lora.lora import LoRA, LowRank, sum_loras


class Fuser(ABC):
    """Makes one LoRA of several, whose update is their sum. For a weighted mean, scale them first.

    >>> import artaug as aa, torch
    >>> rounds = [aa.LoRA({"proj": aa.LowRank(torch.ones(1, 4), torch.full((4, 1), k))}) for k in (1.0, 3.0)]
    >>> mean = aa.ConcatFuser().fuse([lora.scaled(1 / len(rounds)) for lora in rounds])
    >>> mean.layers["proj"].delta()[0, 0].item()
    2.0
    """

    @abstractmethod
    def fuse(self, loras: Sequence[LoRA]) -> LoRA:
        """Add LoRAs up, over all layers that any of them names.

        Raises:
            LoRAError: if there is none, or two of them give one layer different shapes.
        """


@dataclass(frozen=True, kw_only=True)
class ConcatFuser(Fuser):
    """Adds updates exactly by putting their ranks side by side; the rank of the result is the sum of theirs."""

    def fuse(self, loras: Sequence[LoRA]) -> LoRA:
        return sum_loras(loras)


@value
class CompressedLayer:
    """What became of one layer when its rank was cut down."""

    rank_before: Annotated[int, Field(ge=1)]
    """Directions that came in, over all LoRAs."""
    rank_after: Annotated[int, Field(ge=1)]
    """Directions kept."""
    energy: Annotated[float, Field(ge=0, le=1)]
    """Part of the update's squared Frobenius norm that was kept; 1 for an update of nothing."""


@final
@dataclass(frozen=True, kw_only=True)
class Compression:
    """LoRAs added up and cut down, and what that cost, layer by layer. ``print`` it, or look at it in a notebook."""

    lora: LoRA
    """The result."""
    layers: Mapping[str, CompressedLayer]
    """By layer name."""
    energy: float
    """Part of the squared Frobenius norm of the whole update, over all layers, that was kept."""

    def __str__(self) -> str:
        before = max(layer.rank_before for layer in self.layers.values())
        text = f"{len(self.layers)} layers, rank {before} to {self.lora.rank}, {self.energy:.4%} of the energy kept"
        lines = [f"{name}: rank {_ranks(layer)}, {layer.energy:.4%} kept" for name, layer in self._worst()]
        return "\n".join([f"{text}; least of it in", *(f"  {line}" for line in lines)])

    def _repr_html_(self) -> str:
        """Every layer, those that lost most first."""
        rows = ((name, _ranks(layer), f"{layer.energy:.4%}") for name, layer in self._worst(len(self.layers)))
        return (
            f"<details open><summary>{escape(str(self).partition(';')[0])}</summary>"
            f"<div style='max-height:20em;overflow:auto'>{table_html(('layer', 'rank', 'energy kept'), rows)}</div>"
            "</details>"
        )

    def _worst(self, count: int = 3) -> list[tuple[str, CompressedLayer]]:
        return sorted(self.layers.items(), key=lambda item: item[1].energy)[:count]


def _ranks(layer: CompressedLayer) -> str:
    return f"{layer.rank_before} to {layer.rank_after}"


@dataclass(frozen=True, kw_only=True)
class SvdFuser(Fuser):
    """Adds updates up and keeps, in every layer, the strongest directions: no LoRA of that rank comes closer.

    The error of a layer is the Eckart-Young bound, the root of the sum of squares of the singular values left out.
    Computed in float32 from the factors (QR, then the SVD of a matrix no larger than the ranks); the square roots of
    the singular values go to both factors, which suits the range of 16-bit files.

    Raises:
        InvalidValueError: unless the rank is at least 1, the energy lies in (0, 1], and one of them leaves out
            anything.

    >>> import artaug as aa, torch
    >>> lora = aa.LoRA({"proj": aa.LowRank(torch.eye(3, 4), torch.diag(torch.tensor([3.0, 2.0, 1.0])))})
    >>> aa.SvdFuser(rank=2).fuse([lora])
    LoRA(1 layers, rank 2)
    >>> print(aa.SvdFuser(energy=0.9).compress([lora]))
    1 layers, rank 3 to 2, 92.8571% of the energy kept; least of it in
      proj: rank 3 to 2, 92.8571% kept
    """

    rank: int | None = None
    """At most this many directions a layer; None for as many as the energy takes."""
    energy: float = 1.0
    """Stop earlier in a layer once this part of its squared Frobenius norm is kept, in (0, 1]."""

    def __post_init__(self) -> None:
        if (self.rank is not None and self.rank < 1) or not 0 < self.energy <= 1:
            raise InvalidValueError(f"{self}: need a rank of at least 1 and an energy above 0, at most 1.")
        if self.rank is None and self.energy == 1:
            raise InvalidValueError(
                f"{self} would leave out nothing. Give it a rank, or an energy such as 0.99; ConcatFuser adds exactly."
            )

    def fuse(self, loras: Sequence[LoRA]) -> LoRA:
        return self.compress(loras).lora

    def compress(self, loras: Sequence[LoRA]) -> Compression:
        """Add LoRAs up as `fuse` does, and say what every layer lost. Nothing is computed twice.

        Raises:
            LoRAError: as `fuse` does.
        """
        cut = {name: self._cut(layer) for name, layer in sum_loras(loras).layers.items()}
        whole = math.fsum(one.whole for one in cut.values())
        return Compression(
            lora=LoRA({name: one.layer for name, one in cut.items()}),
            layers={name: one.report() for name, one in cut.items()},
            energy=_share(math.fsum(one.kept for one in cut.values()), whole),
        )

    def _cut(self, layer: LowRank) -> "_Cut":
        left, left_core = torch.linalg.qr(layer.up.float())
        right, right_core = torch.linalg.qr(layer.down.float().flatten(1).T)
        outputs, strengths, inputs = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
        energies = strengths.double().square().cumsum(0)
        enough = min(self._sufficient(energies), self.rank or len(strengths))
        roots = strengths[:enough].sqrt()
        down = (roots[:, None] * (inputs[:enough] @ right.T)).reshape(-1, *layer.down.shape[1:])
        compressed = LowRank(down, (left @ outputs[:, :enough]) * roots)
        return _Cut(compressed, layer.rank, kept=float(energies[enough - 1]), whole=float(energies[-1]))

    def _sufficient(self, energies: Tensor) -> int:
        """How many of the strongest directions hold the wanted part of ``energies[-1]``; at least one."""
        if self.energy == 1:
            return len(energies)
        return 1 + int((energies[:-1] < self.energy * energies[-1]).sum())


@dataclass(frozen=True)
class _Cut:
    """A layer after compression, with the squared norms of what was kept and of the whole."""

    layer: LowRank
    rank_before: int
    kept: float
    whole: float

    def report(self) -> CompressedLayer:
        return CompressedLayer(
            rank_before=self.rank_before, rank_after=self.layer.rank, energy=_share(self.kept, self.whole)
        )


def _share(kept: float, whole: float) -> float:
    return min(kept / whole, 1.0) if whole > 0 else 1.0


def retained_energy(full: LoRA, fused: LoRA) -> dict[str, float]:
    """How much of every layer's update ``fused`` keeps: ``1 - |full - fused|^2 / |full|^2`` in Frobenius norm.

    1 means the same update; a layer that ``fused`` leaves out has 0, and one that ``full`` does not change has 1 if
    ``fused`` does not either, else minus infinity.

    Raises:
        LoRAError: if ``fused`` names a layer ``full`` does not have, or gives it another shape.
    """
    strange = [name for name in fused.layers if name not in full.layers]
    if strange:
        raise LoRAError(f"the fused LoRA updates {strange[0]!r}, which the full one does not. Are they related?")
    rest = sum_loras([full, fused.scaled(-1)]).layers
    return {name: _retained(rest[name].energy(), layer.energy()) for name, layer in full.layers.items()}


def _retained(lost: float, whole: float) -> float:
    if whole == 0:
        return 1.0 if lost == 0 else -torch.inf
    return 1 - lost / whole
