"""What is trained beside a frozen layer, and the low-rank update it comes to: a LoRA, a LoKr or a DoRA."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from artaug.errors import InvalidValueError
from artaug.lora.lora import LoRA, LowRank
from artaug.training.factors import Factor, Kronecker, Repeated, kaiming

AdapterTensors: TypeAlias = Mapping[str, Tensor]
"""What is trained of one layer, by name: of the factor that comes first (``down.``), of the second (``up.``), and more."""

_log = logging.getLogger(__name__)
_MUCH = 0.99
"""Of an update has to be in the exported LoRA, or it is said."""


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """What a frozen layer multiplies with: float32, (outputs, inputs)."""

    stored: Tensor
    """Its own weight."""
    used: Tensor
    """With the updates of the LoRAs that the layer wears."""


class Adapter(ABC):
    """What is trained beside each frozen layer. Whatever it is, the training's result is an ordinary LoRA."""

    use_dora: ClassVar[bool] = False
    """Whether PEFT is to learn the length of every row of a weight as well: DoRA."""

    @abstractmethod
    def factors(self, inputs: int, outputs: int, rank: int, generator: torch.Generator) -> tuple[nn.Module, nn.Module]:
        """What a layer's input goes through, one after the other, drawn afresh; together they start at zero.

        PEFT asks the first for its ``weight``, and if the adapter is directional both.
        """

    @abstractmethod
    def lora_rank(self, inputs: int, outputs: int, rank: int) -> int:
        """The rank of a layer of the exported LoRA."""

    @abstractmethod
    def lora(self, layers: Mapping[str, AdapterTensors], weights: Callable[[str], LayerWeights]) -> LoRA:
        """What has been learned, as a LoRA.

        Args:
            layers: what was trained, by the path of the layer it stands beside.
            weights: says what a layer multiplies with, by its path.
        """


@dataclass(frozen=True, kw_only=True)
class PlainLoRA(Adapter):
    """Two thin matrices, whose product is added to the weight (Hu et al., arXiv 2106.09685, eq. 3)."""

    def factors(self, inputs: int, outputs: int, rank: int, generator: torch.Generator) -> tuple[nn.Module, nn.Module]:
        return Factor(kaiming((rank, inputs), generator)), Factor(torch.zeros(outputs, rank))

    def lora_rank(self, inputs: int, outputs: int, rank: int) -> int:
        return rank

    def lora(self, layers: Mapping[str, AdapterTensors], weights: Callable[[str], LayerWeights]) -> LoRA:
        return LoRA({name: LowRank(parts["down.weight"], parts["up.weight"]) for name, parts in layers.items()})


@dataclass(frozen=True, kw_only=True)
class LoKr(Adapter):
    """A small matrix times a thin one, by Kronecker's product: many ranks from few numbers (arXiv 2309.14859, section 3.4).

    With ``f`` the factor, the update of a layer is ``C (x) (B A)``: ``C`` is ``f`` by ``f``, and ``B A`` of the trainer's
    rank is ``f`` times smaller than the weight each way. Since ``C (x) (B A) = (C (x) B) (I (x) A)``, it *is* a LoRA, of
    ``f`` times the rank (or as many as the layer has at most), and is exported as that without any loss. It is never formed: what goes through a layer is folded
    into ``f`` rows, and a step takes about the memory of a LoRA of that rank.

    Raises:
        InvalidValueError: unless the factor is at least 2.

    >>> import artaug as aa
    >>> aa.DifferentialLoRATrainer(rank=4, adapter=aa.LoKr(factor=4)).adapter
    LoKr(factor=4)
    """

    factor: int = 4
    """Size of the small matrix; a layer that it does not divide gets the next smaller that does."""

    def __post_init__(self) -> None:
        if self.factor < 2:
            raise InvalidValueError(f"{self}: need a factor of at least 2; at 1 it is a PlainLoRA.")

    def factors(self, inputs: int, outputs: int, rank: int, generator: torch.Generator) -> tuple[nn.Module, nn.Module]:
        across, down = self._divisor(inputs), self._divisor(outputs)
        small = kaiming((rank, inputs // across), generator)
        outer = kaiming((down, across), generator)
        return Repeated(small, times=across), Kronecker(outer, torch.zeros(outputs // down, rank))

    def lora_rank(self, inputs: int, outputs: int, rank: int) -> int:
        return min(rank * self._divisor(inputs), inputs, outputs)

    def lora(self, layers: Mapping[str, AdapterTensors], weights: Callable[[str], LayerWeights]) -> LoRA:
        return LoRA({name: self._layer(parts) for name, parts in layers.items()})

    def _layer(self, parts: AdapterTensors) -> LowRank:
        outer = parts["up.outer"]
        once = torch.eye(outer.shape[1], dtype=outer.dtype, device=outer.device)
        down, up = torch.kron(once, parts["down.weight"]), torch.kron(outer, parts["up.inner"])
        rank, inputs, outputs = len(down), down.shape[1], len(up)
        if rank <= min(inputs, outputs):
            return LowRank(down, up)
        return LowRank(up @ down, torch.eye(outputs)) if outputs < inputs else LowRank(torch.eye(inputs), up @ down)

    def _divisor(self, size: int) -> int:
        return max(one for one in range(1, self.factor + 1) if size % one == 0)


@dataclass(frozen=True, kw_only=True)
class DoRA(Adapter):
    """A LoRA for the direction of every row of a weight, and a number for its length (arXiv 2402.09353, eq. 5), by PEFT.

    ``W' = m (W + B A) / |W + B A|``, row by row. That is no low-rank update: with the lengths, all of ``W`` changes. So the
    exported LoRA is the nearest of rank ``export_rank``, and what it leaves out is said in a warning; let `Validation` judge
    what is left. Objectives that ask for minus the update (`Bipolar`) are refused, since this one has none.

    Raises:
        InvalidValueError: unless the exported rank is at least 1.
    """

    use_dora: ClassVar[bool] = True

    export_rank: int = 64
    """Rank of the LoRA it comes to."""

    def __post_init__(self) -> None:
        if self.export_rank < 1:
            raise InvalidValueError(f"{self}: need an exported rank of at least 1.")

    def factors(self, inputs: int, outputs: int, rank: int, generator: torch.Generator) -> tuple[nn.Module, nn.Module]:
        return PlainLoRA().factors(inputs, outputs, rank, generator)

    def lora_rank(self, inputs: int, outputs: int, rank: int) -> int:
        return min(self.export_rank, inputs, outputs)

    def lora(self, layers: Mapping[str, AdapterTensors], weights: Callable[[str], LayerWeights]) -> LoRA:
        nearest, whole = {}, 0.0
        for name, parts in layers.items():
            update = _turned(weights(name), parts)
            nearest[name] = _nearest(update, self.export_rank)
            whole += float(update.double().square().sum())
        kept = sum(one.energy() for one in nearest.values()) / whole if whole else 1.0
        if kept < _MUCH:
            _log.warning(
                "a LoRA of rank %d keeps %.1f%% of the squared norm of what DoRA has learned: raise DoRA(exported=%d).",
                *(self.export_rank, 100 * kept, self.export_rank),
            )
        return LoRA(nearest)


def _turned(weights: LayerWeights, parts: AdapterTensors) -> Tensor:
    """What DoRA has done to a weight. Rows are as long as PEFT says: by the stored weight, whatever is worn on top."""
    learned = (parts["up.weight"] @ parts["down.weight"]).to(weights.stored)
    length: Tensor = torch.linalg.norm(weights.stored + learned, dim=1)
    scale = parts["magnitude"].to(length) / length
    return scale[:, None] * (weights.used + learned) - weights.used


def _nearest(update: Tensor, rank: int) -> LowRank:
    """The best update of a rank, but for what a randomised SVD misses (Halko et al., arXiv 0909.4061): next to nothing."""
    wanted = min(rank, *update.shape)
    with torch.random.fork_rng(devices=[update.device] if update.is_cuda else []):
        # Not torch.manual_seed: it would reach the generators of devices that are not put back.
        here = torch.cuda.default_generators[update.get_device()] if update.is_cuda else torch.default_generator
        here.manual_seed(0)
        left, strengths, right = torch.svd_lowrank(update, q=min(wanted + 8, *update.shape), niter=4)
    roots = strengths[:wanted].sqrt()
    return LowRank((right[:, :wanted] * roots).T.contiguous().cpu(), (left[:, :wanted] * roots).cpu())
