"""Adapters: what is trained beside a frozen linear layer, and the update it is exported as (LoRA, LoKr, DoRA, full rank)."""

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias, final

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

from artaug._internal.annotations import Seam, checked
from artaug.errors import InvalidValueError
from artaug.lora.lora import LoRA, LowRank

AdapterTensors: TypeAlias = Mapping[str, Tensor]
"""The trained tensors of one layer by name: of the first factor (``down.``), of the second (``up.``), and more."""

_log = logging.getLogger(__name__)
_ENERGY_KEPT = 0.99
"""Share of the update's squared norm that an exported LoRA must keep; below it there is a warning."""


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """The weight of a frozen layer, with and without applied LoRAs: float32, (out_features, in_features)."""

    stored: Tensor
    """The layer's own weight."""
    used: Tensor
    """With the updates of the LoRAs that are applied to the layer."""


class Adapter(Seam):
    """What is trained beside each frozen layer. For every adapter, the training's result is an ordinary LoRA."""

    use_dora: ClassVar[bool] = False
    """Whether PEFT should learn the norm of every row of a weight as well (DoRA)."""

    @abstractmethod
    def build_factors(
        self, in_features: int, out_features: int, rank: int, generator: torch.Generator
    ) -> tuple[nn.Module, nn.Module]:
        """New modules that a layer's input goes through in this order (PEFT's lora_A and lora_B); their product is zero.

        PEFT reads the ``weight`` of the first module, and of both if ``use_dora``.
        """

    @abstractmethod
    def lora_rank(self, in_features: int, out_features: int, rank: int) -> int:
        """The rank of a layer of the exported LoRA."""

    @abstractmethod
    def to_lora(self, layers: Mapping[str, AdapterTensors], weights: Callable[[str], LayerWeights]) -> LoRA:
        """What has been learned, as a LoRA.

        Args:
            layers: the trained tensors, by the path of the layer they belong to.
            weights: returns the weights of a layer, by its path.
        """


@checked
@final
@dataclass(frozen=True, kw_only=True)
class PlainLoRA(Adapter):
    """Two thin matrices, whose product is added to the weight (Hu et al., arXiv 2106.09685, eq. 3)."""

    def build_factors(
        self, in_features: int, out_features: int, rank: int, generator: torch.Generator
    ) -> tuple[nn.Module, nn.Module]:
        return Factor(kaiming_uniform((rank, in_features), generator)), Factor(torch.zeros(out_features, rank))

    def lora_rank(self, in_features: int, out_features: int, rank: int) -> int:
        return rank

    def to_lora(self, layers: Mapping[str, AdapterTensors], weights: Callable[[str], LayerWeights]) -> LoRA:
        return LoRA({name: LowRank(tensors["down.weight"], tensors["up.weight"]) for name, tensors in layers.items()})


@checked
@final
@dataclass(frozen=True, kw_only=True)
class LoKr(Adapter):
    """A small matrix times a thin one, by Kronecker's product: a high rank from few numbers (arXiv 2309.14859, section 3.4).

    With ``f`` the factor, the update of a layer is ``C (x) (B A)``: ``C`` is ``f`` by ``f``, and ``B A`` of the trainer's
    rank is ``f`` times smaller than the weight in both dimensions. Since ``C (x) (B A) = (C (x) B) (I (x) A)``, it *is* a LoRA
    of ``f`` times the rank (or of the layer's smaller side, if that is less), and is exported as that without any loss. The
    product is never formed in training: a layer's input is folded into ``f`` rows, and a step takes about the memory of a
    LoRA of the trainer's rank.

    Raises:
        InvalidValueError: unless the factor is at least 2.

    >>> import artaug as aa
    >>> aa.DifferentialLoRATrainer(rank=4, adapter=aa.LoKr(factor=4)).adapter
    LoKr(factor=4)
    """

    factor: int = 4
    """Size of the small matrix; a layer that it does not divide gets the next smaller number that does."""

    def __post_init__(self) -> None:
        if self.factor < 2:
            raise InvalidValueError(f"{self}: need a factor of at least 2; at 1 it is a PlainLoRA.")

    def build_factors(
        self, in_features: int, out_features: int, rank: int, generator: torch.Generator
    ) -> tuple[nn.Module, nn.Module]:
        columns, rows = self._divisor(in_features), self._divisor(out_features)  # the shape of C
        down = kaiming_uniform((rank, in_features // columns), generator)
        outer = kaiming_uniform((rows, columns), generator)
        return BlockDiagonalFactor(down, blocks=columns), KroneckerFactor(
            outer, torch.zeros(out_features // rows, rank)
        )

    def lora_rank(self, in_features: int, out_features: int, rank: int) -> int:
        return min(rank * self._divisor(in_features), in_features, out_features)

    def to_lora(self, layers: Mapping[str, AdapterTensors], weights: Callable[[str], LayerWeights]) -> LoRA:
        return LoRA({name: self._low_rank(tensors) for name, tensors in layers.items()})

    def _low_rank(self, tensors: AdapterTensors) -> LowRank:
        outer = tensors["up.outer"]
        identity = torch.eye(outer.shape[1], dtype=outer.dtype, device=outer.device)
        down, up = torch.kron(identity, tensors["down.weight"]), torch.kron(outer, tensors["up.inner"])
        if len(down) <= min(down.shape[1], len(up)):
            return LowRank(down, up)
        return _whole(up @ down)  # of more ranks than the layer has

    def _divisor(self, size: int) -> int:
        return max(divisor for divisor in range(1, self.factor + 1) if size % divisor == 0)


@checked
@final
@dataclass(frozen=True, kw_only=True)
class FullRank(Adapter):
    """A whole matrix that is added to the weight: plain fine-tuning of the layer, whatever the trainer's rank.

    Gradients are those of the weight itself, so a step of the optimizer is one of fine-tuning; weight decay pulls to the
    pretrained weight instead of zero. The exported LoRA is exact, of the smaller side of each layer as rank: about twice the
    size of the layers, so it is for few of them, such as the keys of cross-attention.

    >>> import artaug as aa
    >>> aa.DifferentialLoRATrainer(adapter=aa.FullRank(), targets="attn2.to_k").adapter
    FullRank()
    """

    def build_factors(
        self, in_features: int, out_features: int, rank: int, generator: torch.Generator
    ) -> tuple[nn.Module, nn.Module]:
        return IdentityFactor(), Factor(torch.zeros(out_features, in_features))

    def lora_rank(self, in_features: int, out_features: int, rank: int) -> int:
        return min(in_features, out_features)

    def to_lora(self, layers: Mapping[str, AdapterTensors], weights: Callable[[str], LayerWeights]) -> LoRA:
        return LoRA({name: _whole(tensors["up.weight"]) for name, tensors in layers.items()})


@checked
@final
@dataclass(frozen=True, kw_only=True)
class DoRA(Adapter):
    """A LoRA for the direction of every row of a weight, and a number for its norm (arXiv 2402.09353, eq. 5), by PEFT.

    ``W' = m (W + B A) / |W + B A|``, row by row. That is no low-rank update: with the norms, all of ``W`` changes. So the
    exported LoRA is the nearest of rank ``export_rank``, and a warning says how much it leaves out; let `Validation` judge
    the result. Objectives that need minus the update (`Bipolar`) are refused, since DoRA's update has no scale.

    Raises:
        InvalidValueError: unless the exported rank is at least 1.
    """

    use_dora: ClassVar[bool] = True

    export_rank: int = 64
    """Rank of the exported LoRA."""

    def __post_init__(self) -> None:
        if self.export_rank < 1:
            raise InvalidValueError(f"{self}: need an export_rank of at least 1.")

    def build_factors(
        self, in_features: int, out_features: int, rank: int, generator: torch.Generator
    ) -> tuple[nn.Module, nn.Module]:
        return PlainLoRA().build_factors(in_features, out_features, rank, generator)

    def lora_rank(self, in_features: int, out_features: int, rank: int) -> int:
        return min(self.export_rank, in_features, out_features)

    def to_lora(self, layers: Mapping[str, AdapterTensors], weights: Callable[[str], LayerWeights]) -> LoRA:
        exported, update_energy = {}, 0.0
        for name, tensors in layers.items():
            update = _dora_update(weights(name), tensors)
            exported[name] = _best_low_rank(update, self.export_rank)
            update_energy += float(update.cpu().double().square().sum())
        kept = sum(layer.energy() for layer in exported.values()) / update_energy if update_energy else 1.0
        if kept < _ENERGY_KEPT:
            _log.warning(
                "a LoRA of rank %d keeps %.1f%% of the squared norm of DoRA's update: raise DoRA(export_rank=%d).",
                *(self.export_rank, 100 * kept, self.export_rank),
            )
        return LoRA(exported)


def _dora_update(weights: LayerWeights, tensors: AdapterTensors) -> Tensor:
    """``W' - W`` of a layer, with applied LoRAs in ``W``: (out_features, in_features).

    PEFT takes the norm of the rows of the stored weight plus ``B A``, without applied LoRAs; so does this.
    """
    product = (tensors["up.weight"] @ tensors["down.weight"]).to(weights.stored)
    norm: Tensor = torch.linalg.norm(weights.stored + product, dim=1)
    scale = tensors["magnitude"].to(norm) / norm
    return scale[:, None] * (weights.used + product) - weights.used


def _whole(update: Tensor) -> LowRank:
    """An update of full rank, exactly: itself, beside an identity on its smaller side."""
    out_features, in_features = update.shape
    if out_features < in_features:
        return LowRank(update, torch.eye(out_features))
    return LowRank(torch.eye(in_features), update)


def _best_low_rank(update: Tensor, rank: int) -> LowRank:
    """The best approximation of a rank (Eckart and Young), by a randomised SVD (Halko et al., arXiv 0909.4061).

    What it misses is next to nothing, with 8 dimensions more than the rank and 4 power iterations.
    """
    rank = min(rank, *update.shape)
    with torch.random.fork_rng(devices=[update.device] if update.is_cuda else []):
        # Not torch.manual_seed: it would reach the generators of devices that are not restored.
        generator = torch.cuda.default_generators[update.get_device()] if update.is_cuda else torch.default_generator
        generator.manual_seed(0)
        left, singular_values, right = torch.svd_lowrank(update, q=min(rank + 8, *update.shape), niter=4)
    # U S V^T = (U sqrt(S)) (V sqrt(S))^T: both factors get the same norm.
    roots = singular_values[:rank].sqrt()
    return LowRank((right[:, :rank] * roots).T.contiguous().cpu(), (left[:, :rank] * roots).cpu())


# The modules below take (..., in_features) and give (..., out_features). Their shapes are not in annotations, which would
# be checked within blocks that are compiled, and cannot be.


class Factor(nn.Module):
    """A float32 matrix that computes in the dtype of its input.

    PEFT casts a layer's input to float32 for its factors, and autograd keeps that copy: as much memory again as the layer
    takes, three times over where queries, keys and values share one input. So the factor is cast to the input's dtype
    instead, and autograd keeps the input itself, as under autocast without its copies.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight: nn.Parameter = nn.Parameter(weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.weight.to(inputs.dtype))


class IdentityFactor(nn.Module):
    """Hands its input on."""

    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(1))  # PEFT asks for its type

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs


class BlockDiagonalFactor(Factor):
    """The same small matrix for each of several blocks of the input: ``I (x) weight`` with ``blocks`` rows in ``I``."""

    def __init__(self, weight: Tensor, *, blocks: int) -> None:
        super().__init__(weight)
        self._blocks = blocks

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs.unflatten(-1, (self._blocks, -1))).flatten(-2)


class KroneckerFactor(nn.Module):
    """The Kronecker product ``outer (x) inner`` of two float32 matrices, which is never formed."""

    def __init__(self, outer: Tensor, inner: Tensor) -> None:
        super().__init__()
        self.outer: nn.Parameter = nn.Parameter(outer)
        self.inner: nn.Parameter = nn.Parameter(inner)

    def forward(self, inputs: Tensor) -> Tensor:
        # (C (x) B) vec(X) = vec(C X B^T), X the input as rows (columns of C, columns of B). C first: B makes rows longer.
        outer, inner = self.outer.to(inputs.dtype), self.inner.to(inputs.dtype)
        rows = inputs.unflatten(-1, (outer.shape[1], -1))
        return F.linear(outer @ rows, inner).flatten(-2)


def kaiming_uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A matrix Kaiming-uniform with a = sqrt(5), the start of PEFT and ``nn.Linear``: uniform within 1 / sqrt(columns)."""
    return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[1])
