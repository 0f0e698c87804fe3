"""Several LoRAs to one: exactly, or as well as a given rank allows. Dense updates are never formed."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from artaug.errors import InvalidValueError, LoRAError
from artaug.lora import LoRA, LowRank, summed


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
        return summed(loras)


@dataclass(frozen=True, kw_only=True)
class SvdFuser(Fuser):
    """Adds updates up and keeps, in every layer, the strongest directions: no LoRA of that rank comes closer.

    The error of a layer is the Eckart-Young bound, the root of the sum of squares of the singular values left out.
    Computed in float32 from the factors (QR, then the SVD of a matrix no larger than the ranks); the square roots of
    the singular values go to both factors, which suits the range of 16-bit files.

    Raises:
        InvalidValueError: unless the rank is at least 1 and the energy lies in (0, 1].

    >>> import artaug as aa, torch
    >>> from artaug.fusing import retained_energy
    >>> lora = aa.LoRA({"proj": aa.LowRank(torch.eye(3, 4), torch.diag(torch.tensor([3.0, 2.0, 1.0])))})
    >>> fused = aa.SvdFuser(rank=2).fuse([lora])
    >>> fused.rank, round(retained_energy(lora, fused)["proj"], 4)
    (2, 0.9286)
    """

    rank: int
    """At most this many directions a layer."""
    energy: float = 1.0
    """Stop earlier in a layer once this part of its squared Frobenius norm is kept, in (0, 1]."""

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 < self.energy <= 1:
            raise InvalidValueError(f"{self}: need a rank of at least 1 and an energy above 0, at most 1.")

    def fuse(self, loras: Sequence[LoRA]) -> LoRA:
        return LoRA({name: self._compressed(layer) for name, layer in summed(loras).layers.items()})

    def _compressed(self, layer: LowRank) -> LowRank:
        left, left_core = torch.linalg.qr(layer.up.float())
        right, right_core = torch.linalg.qr(layer.down.float().T)
        outputs, strengths, inputs = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
        kept = min(self.rank, self._sufficient(strengths))
        roots = strengths[:kept].sqrt()
        return LowRank(roots[:, None] * (inputs[:kept] @ right.T), (left @ outputs[:, :kept]) * roots)

    def _sufficient(self, strengths: Tensor) -> int:
        """How many of the descending singular values hold the wanted energy; at least one."""
        if self.energy == 1:
            return len(strengths)
        energies = strengths.double().square().cumsum(0)
        return 1 + int((energies < self.energy * energies[-1]).sum())


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
    rest = summed([full, fused.scaled(-1)]).layers
    return {name: _retained(_squared_norm(rest[name]), _squared_norm(layer)) for name, layer in full.layers.items()}


def _retained(lost: float, whole: float) -> float:
    if whole == 0:
        return 1.0 if lost == 0 else -torch.inf
    return 1 - lost / whole


def _squared_norm(layer: LowRank) -> float:
    """Squared Frobenius norm of ``up @ down``, from the factors' Gram matrices."""
    up, down = layer.up.double(), layer.down.double()
    return float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0))
