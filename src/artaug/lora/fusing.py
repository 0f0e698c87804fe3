"""Fuse several LoRAs into one: exactly by concatenation, or to a given rank by SVD. Dense updates are never computed."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Annotated, final

import torch
from pydantic import Field
from torch import Tensor

from artaug._internal.annotations import Seam, checked
from artaug._internal.calls import call_part
from artaug._internal.contracts import check_result, contract_error
from artaug._internal.text import table_html
from artaug._internal.values import value
from artaug.errors import InvalidValueError, LoRAError
from artaug.lora.lora import LoRA, LowRank, sum_loras


class Fuser(Seam):
    """Fuses several LoRAs into one whose update is their sum. For a weighted mean, scale them first.

    >>> import artaug as aa, torch
    >>> rounds = [aa.LoRA({"proj": aa.LowRank(torch.ones(1, 4), torch.full((4, 1), k))}) for k in (1.0, 3.0)]
    >>> mean = aa.ConcatFuser().fuse([lora.scaled(1 / len(rounds)) for lora in rounds])
    >>> mean.layers["proj"].delta()[0, 0].item()
    2.0
    """

    @abstractmethod
    def fuse(self, loras: Sequence[LoRA]) -> LoRA:
        """Add LoRAs up. The result has every layer that any of them names, with the same shape.

        Raises:
            LoRAError: if there is none, or two of them give one layer different shapes.
        """


def fuse_loras(fuser: Fuser, loras: Sequence[LoRA]) -> LoRA:
    """Fuse LoRAs and check the result.

    Raises:
        PartError: if the fuser raised; an `ArtAugError` of its own is raised as it is, with a note.
        ContractError: if it returned something that is not a `LoRA`, or a LoRA that lacks a layer, has one that
            none of ``loras`` has, or has one with another shape.
    """
    owner, inputs = type(fuser).__name__, f"{len(loras)} LoRA{'s' * (len(loras) != 1)}"
    fused = call_part(lambda: fuser.fuse(loras), owner=owner, inputs=inputs)
    check_result(owner, "fuse", fused, of=LoRA, inputs=inputs)
    expected = {name: layer.shape for lora in loras for name, layer in lora.layers.items()}
    shapes = {name: layer.shape for name, layer in fused.layers.items()}
    # that the factors are finite, LowRank has checked
    for name in expected | shapes:
        if shapes.get(name) != expected.get(name):
            raise contract_error(
                owner,
                "fuse",
                received=f"a LoRA in which {name!r} has shape {shapes[name]}"
                if name in shapes
                else f"a LoRA without {name!r}",
                inputs=inputs,
                expected=f"shape {expected[name]}" if name in expected else "only layers of the LoRAs that it fuses",
            )
    return fused


@checked
@final
@dataclass(frozen=True, kw_only=True)
class ConcatFuser(Fuser):
    """Adds updates exactly by concatenating their factors; the rank of the result is the sum of their ranks."""

    def fuse(self, loras: Sequence[LoRA]) -> LoRA:
        return sum_loras(loras)


@value
class CompressedLayer:
    """The rank and the energy of one layer before and after compression."""

    rank_before: Annotated[int, Field(ge=1)]
    """Sum of the ranks of all LoRAs."""
    rank_after: Annotated[int, Field(ge=1)]
    """Singular values kept."""
    energy: Annotated[float, Field(ge=0, le=1)]
    """Share of the update's squared Frobenius norm that was kept; 1 for an update of zero."""


@checked
@final
@dataclass(frozen=True, kw_only=True)
class Compression:
    """A sum of LoRAs at a lower rank, and the energy lost in every layer. ``print`` it, or display it in a notebook."""

    lora: LoRA
    """The result."""
    layers: Mapping[str, CompressedLayer]
    """By layer name."""
    energy: float
    """Share of the squared Frobenius norm of the whole update, over all layers, that was kept."""

    def __str__(self) -> str:
        before = max(layer.rank_before for layer in self.layers.values())
        text = f"{len(self.layers)} layers, rank {before} to {self.lora.rank}, {self.energy:.4%} of the energy kept"
        lines = [f"{name}: rank {_rank_change(layer)}, {layer.energy:.4%} kept" for name, layer in self._worst_first()]
        return "\n".join([f"{text}; least of it in", *(f"  {line}" for line in lines)])

    def _repr_html_(self) -> str:
        """Every layer, those that lost most first."""
        rows = (
            (name, _rank_change(layer), f"{layer.energy:.4%}") for name, layer in self._worst_first(len(self.layers))
        )
        return (
            f"<details open><summary>{escape(str(self).partition(';')[0])}</summary>"
            f"<div style='max-height:20em;overflow:auto'>{table_html(('layer', 'rank', 'energy kept'), rows)}</div>"
            "</details>"
        )

    def _worst_first(self, count: int = 3) -> list[tuple[str, CompressedLayer]]:
        return sorted(self.layers.items(), key=lambda item: item[1].energy)[:count]


def _rank_change(layer: CompressedLayer) -> str:
    return f"{layer.rank_before} to {layer.rank_after}"


@checked
@final
@dataclass(frozen=True, kw_only=True)
class SvdFuser(Fuser):
    """Adds updates up and keeps the largest singular values of every layer: no LoRA of that rank is closer to the sum.

    The error of a layer, in Frobenius norm, is the root of the sum of squares of the singular values left out
    (Eckart and Young). The square roots of the singular values go to both factors, which suits the range of 16-bit files.

    Raises:
        InvalidValueError: if the rank is below 1, if the energy is not in (0, 1], or if neither of them limits the rank.

    >>> import artaug as aa, torch
    >>> lora = aa.LoRA({"proj": aa.LowRank(torch.eye(3, 4), torch.diag(torch.tensor([3.0, 2.0, 1.0])))})
    >>> aa.SvdFuser(rank=2).fuse([lora])
    LoRA(1 layers, rank 2)
    >>> print(aa.SvdFuser(energy=0.9).compress([lora]))
    1 layers, rank 3 to 2, 92.8571% of the energy kept; least of it in
      proj: rank 3 to 2, 92.8571% kept
    """

    rank: int | None = None
    """Largest rank of a layer; None for as many singular values as the energy needs."""
    energy: float = 1.0
    """Keep only as many singular values as hold this share of a layer's squared Frobenius norm, in (0, 1]."""

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
        """Fuse as `fuse` does, and report the energy lost in every layer.

        Raises:
            LoRAError: as `fuse` does.
        """
        truncated = {name: self._truncate(layer) for name, layer in sum_loras(loras).layers.items()}
        total = math.fsum(layer.total_energy for layer in truncated.values())
        return Compression(
            lora=LoRA({name: layer.factors for name, layer in truncated.items()}),
            layers={name: layer.report() for name, layer in truncated.items()},
            energy=_share(math.fsum(layer.kept_energy for layer in truncated.values()), total),
        )

    def _truncate(self, layer: LowRank) -> "_TruncatedLayer":
        """The truncated SVD of ``up @ down`` from the factors, in float32.

        With QR of both factors, ``U = Q_u R_u`` and ``D^T = Q_d R_d``, the update is ``U D = Q_u (R_u R_d^T) Q_d^T``.
        ``Q_u`` and ``Q_d`` have orthonormal columns, so the singular values of the update are those of the core
        ``R_u R_d^T``, of shape (rank, rank) at most. For a weight of shape (m, n) and a summed rank r this takes
        O((m + n) r^2 + r^3) operations, where the SVD of the dense update takes O(m n min(m, n)).
        """
        q_up, r_up = torch.linalg.qr(layer.up.float())  # (outputs, k), (k, r) with k = min(outputs, r)
        q_down, r_down = torch.linalg.qr(layer.down.float().flatten(1).T)  # the same with inputs
        left, singular_values, right = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
        energies = singular_values.cpu().double().square().cumsum(0)
        rank = min(self._sufficient_rank(energies), self.rank or len(singular_values))
        roots = singular_values[:rank].sqrt()
        down = (roots[:, None] * (right[:rank] @ q_down.T)).reshape(-1, *layer.down.shape[1:])
        up = (q_up @ left[:, :rank]) * roots
        return _TruncatedLayer(
            LowRank(down, up), layer.rank, kept_energy=float(energies[rank - 1]), total_energy=float(energies[-1])
        )

    def _sufficient_rank(self, energies: Tensor) -> int:
        """The smallest rank whose energy is the given share of ``energies[-1]``, given cumulative energies; at least 1."""
        if self.energy == 1:
            return len(energies)
        return 1 + int((energies[:-1] < self.energy * energies[-1]).sum())


@dataclass(frozen=True)
class _TruncatedLayer:
    """A layer after compression, with the squared norms of what was kept and of the whole."""

    factors: LowRank
    rank_before: int
    kept_energy: float
    total_energy: float

    def report(self) -> CompressedLayer:
        return CompressedLayer(
            rank_before=self.rank_before,
            rank_after=self.factors.rank,
            energy=_share(self.kept_energy, self.total_energy),
        )


def _share(kept: float, total: float) -> float:
    return min(kept / total, 1.0) if total > 0 else 1.0


def retained_energy(full: LoRA, fused: LoRA) -> dict[str, float]:
    """The share of every layer's update that ``fused`` keeps: ``1 - |full - fused|^2 / |full|^2`` in Frobenius norm.

    1 means the same update. A layer that ``fused`` leaves out has 0. A layer that ``full`` does not change has 1 if
    ``fused`` does not change it either, else minus infinity.

    Raises:
        LoRAError: if ``fused`` names a layer that ``full`` does not have, or gives it another shape.
    """
    unknown = [name for name in fused.layers if name not in full.layers]
    if unknown:
        raise LoRAError(
            f"the fused LoRA updates {unknown[0]!r}, which the full one does not. Pass the LoRA that it was fused from."
        )
    difference = sum_loras([full, fused.scaled(-1)]).layers
    retained = {}
    for name, layer in full.layers.items():
        lost, total = difference[name].energy(), layer.energy()
        if total == 0:
            retained[name] = 1.0 if lost == 0 else -torch.inf
        else:
            retained[name] = 1 - lost / total
    return retained
