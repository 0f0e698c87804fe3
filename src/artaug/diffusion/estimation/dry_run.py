"""A training step on tensors without numbers: what it would hold at most, and how much it would compute."""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from PIL import Image
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from artaug.diffusion.families.base import Family
from artaug.lora.lora import LoRA, LowRank
from artaug.training.config import TrainingConfig
from artaug.training.objectives import PairBatch, Stage, compute_loss
from artaug.training.student import find_target_layers, inject_adapter
from artaug.training.teacher_cache import TeacherCache

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 - the one flash kernel meta knows
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001 - likewise


@dataclass(frozen=True)
class Cost:
    """What a piece of work takes."""

    peak_bytes: int
    """The most it holds at once, of what it makes itself."""
    flops: int
    """Multiplications and additions of matrix products, convolutions and attention."""


class MemoryTracker(TorchDispatchMode):
    """Notes what operations make, until nothing holds it any more, and what they compute.

    Storages are counted, not tensors: a view costs nothing, and what autograd saves is held as long as it saves it.
    What was there before is not counted, unless it goes: weights that are unpacked for a while give their place up.
    """

    def __init__(self, before: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.now = 0
        self.peak = 0
        self.flops = 0
        self._alive: set[int] = set()
        for one in before:
            self._hold(_storage(one), set())
        self.now = self.peak = 0

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - any operation
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever it makes
        made = func(*args, **(kwargs or {}))
        given = {_storage(one)._cdata for one in _tensors((args, kwargs))}  # noqa: SLF001 - a storage has no other name
        for one in _tensors(made):
            self._hold(_storage(one), given)
        packet = func._overloadpacket  # noqa: SLF001 - what torch's own table of formulas goes by
        if packet in (_FLASH, _FLASH_BACKWARD):
            # Two products of matrices there, and five on the way back, which forms the weights of attention again.
            query, key = args[:2] if packet is _FLASH else args[1:3]
            products = 2 if packet is _FLASH else 5
            self.flops += products * 2 * query.numel() * key.shape[-2]
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=made)
        return made

    def _hold(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        name, size = storage._cdata, storage.nbytes()  # noqa: SLF001 - as above
        if name in self._alive or name in given:
            return
        self._alive.add(name)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._let_go, name, size).atexit = False

    def _let_go(self, name: int, size: int) -> None:
        self._alive.discard(name)
        self.now -= size


class DeviceKernels(TorchFunctionMode):
    """Has operations work as an accelerator's kernels do, where the meta device would take a longer way.

    Attention keeps queries, keys, values, its output and one number a query, and no table of all queries and keys. The
    root mean square norm keeps its input and one number a row. What only values could tell is taken to be zero.
    """

    def __init__(self, *, fused_norms: bool) -> None:
        super().__init__()
        self._fused_norms = fused_norms

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401 - any function of torch
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever it gives
        named = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            named.update(zip(("query", "key", "value"), args, strict=False))
            return _FLASH(named["query"], named["key"], named["value"])[0]
        if self._fused_norms and func in (torch.rms_norm, F.rms_norm):
            return _FusedNorm.apply(args[0] if args else named["input"])  # type: ignore[no-untyped-call]  # likewise
        if func is Tensor.cpu and args[0].is_meta:
            return torch.zeros(args[0].shape, dtype=args[0].dtype)
        return func(*args, **named)


class _FusedNorm(torch.autograd.Function):
    """A norm over the last axis in one kernel, seen from its memory."""

    @staticmethod
    def forward(ctx: FunctionCtx, inputs: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, inputs.new_empty(inputs.shape[:-1], dtype=torch.float32))
        return torch.empty_like(inputs)

    @staticmethod
    def backward(_ctx: FunctionCtx, *gradients: Tensor) -> Tensor:
        return torch.empty_like(gradients[0])


@dataclass(frozen=True, kw_only=True, eq=False)
class DryRun:
    """A family's model without weights, and how it is to be trained."""

    family: Family
    config: TrainingConfig
    text: Mapping[str, tuple[int, ...]]
    """Shapes of an encoded prompt."""
    dtype: torch.dtype
    fused_norms: bool

    @property
    def pairs(self) -> int:
        """How many are worked on at a time."""
        return min(self.config.micro_batch_size or self.config.batch_size, self.config.batch_size)

    def encoding(self) -> Cost:
        """What encoding pictures takes, as many at a time as there are pairs in a step."""
        return self._watched(self._latents)

    def exported(self) -> int:
        """How many numbers the LoRA has that the training comes to."""
        layers = find_target_layers(self.family.module, self.config.targets)
        return sum(one.down.numel() + one.up.numel() for one in _of_zeros(layers, self.config).layers.values())

    def step(self, stage: Stage, *, under: int, remembered: bool = False) -> tuple[Cost, int]:
        """What the forward and backward passes of some pairs take, and how many numbers are trained.

        Args:
            stage: says what is minimized.
            under: LoRAs of earlier stages that are worn.
            remembered: whether the batch was there before, and what the teacher said of it is known.
        """
        family, config = self.family, self.config
        module: Any = family.module
        layers = find_target_layers(module, config.targets)
        with ExitStack() as worn:
            for _ in range(under):
                worn.enter_context(_of_zeros(layers, config).applied_to(module))
            student = worn.enter_context(
                inject_adapter(
                    family,
                    rank=config.rank,
                    targets=config.targets,
                    generator=torch.Generator(),
                    adapter=config.adapter,
                    teacher_cache=_Remembered() if remembered else None,
                )
            )
            if config.gradient_checkpointing:
                module.enable_gradient_checkpointing(gradient_checkpointing_func=self._recomputed)
            for factor in student.parameters():
                factor.grad = torch.zeros_like(factor)
            with DeviceKernels(fused_norms=self.fused_norms):
                latents = self._latents()
            work = self._watched(lambda: compute_loss(stage.loss, student, self._pairs(latents)).backward())
            return work, sum(factor.numel() for factor in student.parameters())

    def _recomputed(self, layer: Callable[..., Any], *args: Any) -> Any:  # noqa: ANN401 - as diffusers hands them on
        """Run a layer as diffusers does, with the same kernels again in the backward pass, which switches modes off."""
        again = DeviceKernels(fused_norms=self.fused_norms)
        return checkpoint(layer, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again))

    def _watched(self, work: Callable[[], object]) -> Cost:
        with MemoryTracker(self.family.module.parameters()) as ledger, DeviceKernels(fused_norms=self.fused_norms):
            work()
        return Cost(ledger.peak, ledger.flops)

    def _latents(self) -> Tensor:
        picture = Image.new("RGB", (self.family.width, self.family.height))
        return self.family.encode_images([picture] * self.pairs)

    def _pairs(self, latents: Tensor) -> PairBatch:
        texts = {
            name: torch.ones(self.pairs, *shape, dtype=torch.long)
            if name.endswith("_mask")
            else torch.empty(self.pairs, *shape, dtype=self.dtype, device="meta")
            for name, shape in self.text.items()
        }
        return PairBatch(
            before=torch.empty_like(latents, dtype=torch.float32),
            after=torch.empty_like(latents, dtype=torch.float32),
            noise=torch.empty_like(latents, dtype=torch.float32),
            sigmas=torch.empty(self.pairs, device="meta"),
            conditioning=texts,
        )


class _Remembered(TeacherCache):
    """Knows every answer, so nothing is asked."""

    def get_or_compute(self, asked: Mapping[str, Tensor], ask: Callable[[], Tensor]) -> Tensor:
        return torch.empty_like(asked["noisy"])


def _of_zeros(layers: Mapping[str, Any], config: TrainingConfig) -> LoRA:
    """A LoRA that takes no memory here, and does on the device."""
    zero, found = torch.zeros(1), {}
    for name, one in layers.items():
        inputs, outputs = one.in_features, one.out_features
        rank = config.adapter.lora_rank(inputs, outputs, config.rank)
        found[name] = LowRank(zero.expand(rank, inputs), zero.expand(outputs, rank))
    return LoRA(found)


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def _tensors(nested: object) -> list[Tensor]:
    return [one for one in tree_leaves(nested) if isinstance(one, Tensor)]
