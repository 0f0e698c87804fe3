"""A training step on the meta device: its peak memory and its floating-point operations, without any data."""

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
from artaug.training.injection import find_target_layers, inject_adapter
from artaug.training.objectives import PairBatch, Stage, compute_loss
from artaug.training.teacher_cache import TeacherCache

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 - the one flash kernel meta knows
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001 - likewise


@dataclass(frozen=True)
class Cost:
    """Memory and compute of some operations."""

    peak_bytes: int
    """Peak of the memory that the operations allocate themselves."""
    flops: int
    """Multiplications and additions of matrix products, convolutions and attention."""


@dataclass(frozen=True)
class StepCost:
    """What a step takes, and how many parameters learn in it."""

    cost: Cost
    trainable: int
    """Of the student."""
    of_companion: int


class MemoryTracker(TorchDispatchMode):
    """Tracks live tensor storage and FLOPs of the operations inside a ``with`` block.

    Storages are counted, not tensors: a view costs nothing, and what autograd saves counts as long as it is saved.
    Tensors that existed before do not count, but freeing one of ``existing`` lowers the count: layerwise casting replaces
    the stored weights by unpacked ones for the time of a call.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.live_bytes: int = 0
        self.peak_bytes: int = 0
        self.flops: int = 0
        self._live: set[int] = set()
        for tensor in existing:
            self._track(tensor.untyped_storage())
        self.live_bytes = self.peak_bytes = 0

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - any operation
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever it returns
        output = func(*args, **(kwargs or {}))
        inputs = {_storage_id(tensor) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(output):
            if _storage_id(tensor) not in inputs:  # else a view, or an operation in place
                self._track(tensor.untyped_storage())
        packet = func._overloadpacket  # noqa: SLF001 - the key of torch's own table of formulas
        if packet in (_FLASH, _FLASH_BACKWARD):
            # A product of queries and keys takes 2 * (batch * heads * queries * channels) * keys FLOPs. The forward pass
            # has two (QK^T and PV), the backward pass five (QK^T again, dV, dP, dQ, dK).
            query, key = args[:2] if packet is _FLASH else args[1:3]
            products = 2 if packet is _FLASH else 5
            self.flops += products * 2 * query.numel() * key.shape[-2]
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=output)
        return output

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()  # noqa: SLF001 - the identity of a storage; its wrappers differ
        if key in self._live:
            return
        self._live.add(key)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._on_free, key, size).atexit = False

    def _on_free(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.live_bytes -= size


class DeviceKernels(TorchFunctionMode):
    """Replaces operations by ones with the memory of an accelerator's kernels, which the meta device does not use.

    Attention saves queries, keys, values, its output and one number a query, and no matrix of queries by keys. The
    RMS norm saves its input and one number a row. A tensor that is moved to the CPU to be read is taken to be zero.
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
    ) -> Any:  # noqa: ANN401 - whatever it returns
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            kwargs.update(zip(("query", "key", "value"), args, strict=False))
            return _FLASH(kwargs["query"], kwargs["key"], kwargs["value"])[0]
        if self._fused_norms and func in (torch.rms_norm, F.rms_norm):
            return _FusedRMSNorm.apply(args[0] if args else kwargs["input"])  # type: ignore[no-untyped-call]  # likewise
        if func is Tensor.cpu and args[0].is_meta:
            return torch.zeros(args[0].shape, dtype=args[0].dtype)
        return func(*args, **kwargs)


class _FusedRMSNorm(torch.autograd.Function):
    """The memory of an RMS norm over the last axis in one kernel: it saves the input and one number a row."""

    @staticmethod
    def forward(ctx: FunctionCtx, inputs: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, inputs.new_empty(inputs.shape[:-1], dtype=torch.float32))
        return torch.empty_like(inputs)

    @staticmethod
    def backward(_ctx: FunctionCtx, *gradients: Tensor) -> Tensor:
        return torch.empty_like(gradients[0])


@dataclass(frozen=True, kw_only=True, eq=False)
class DryRun:
    """The model of a family on the meta device, and the training to estimate."""

    family: Family
    config: TrainingConfig
    text: Mapping[str, tuple[int, ...]]
    """Shapes of an encoded prompt."""
    dtype: torch.dtype
    fused_norms: bool

    @property
    def micro_batch_size(self) -> int:
        """Pairs in one forward and backward pass."""
        return min(self.config.micro_batch_size or self.config.batch_size, self.config.batch_size)

    def encoding_cost(self) -> Cost:
        """Cost of encoding one micro-batch of pictures."""
        return self._measure(self._latents)

    def lora_parameters(self) -> int:
        """Number of parameters of the LoRA that the training exports."""
        layers = find_target_layers(self.family.module, self.config.targets)
        lora = _zero_lora(layers, self.config)
        return sum(layer.down.numel() + layer.up.numel() for layer in lora.layers.values())

    def step_cost(self, stage: Stage, *, active_loras: int, cached_teacher: bool = False) -> StepCost:
        """Cost of the forward and backward passes of one micro-batch, those of a companion included.

        Args:
            stage: gives the loss.
            active_loras: LoRAs of earlier stages that are active while this one trains.
            cached_teacher: whether the teacher's predictions for the batch are in its cache.
        """
        family, config = self.family, self.config
        module: Any = family.module
        layers = find_target_layers(module, config.targets)
        with ExitStack() as stack:
            for _ in range(active_loras):
                stack.enter_context(_zero_lora(layers, config).applied_to(module))
            student = stack.enter_context(
                inject_adapter(
                    family,
                    rank=config.rank,
                    targets=config.targets,
                    generator=torch.Generator(),
                    adapter=config.adapter,
                    teacher_cache=_FullTeacherCache() if cached_teacher else None,
                    companion=stage.companion,
                )
            )
            if config.gradient_checkpointing:
                module.enable_gradient_checkpointing(gradient_checkpointing_func=self._checkpoint)
            of_companion = [] if student.companion is None else student.companion.parameters()
            for parameter in (*student.parameters(), *of_companion):
                parameter.grad = torch.zeros_like(parameter)
            with DeviceKernels(fused_norms=self.fused_norms):
                latents = self._latents()
            cost = self._measure(lambda: compute_loss(stage.loss, student, self._pair_batch(latents)).backward())
            if (companion := stage.companion) is not None:
                with student.roles.learning("companion"):
                    update = self._measure(
                        lambda: compute_loss(companion.loss, student, self._pair_batch(latents)).backward()
                    )
                cost = Cost(max(cost.peak_bytes, update.peak_bytes), cost.flops + companion.updates * update.flops)
            return StepCost(
                cost,
                trainable=sum(parameter.numel() for parameter in student.parameters()),
                of_companion=sum(parameter.numel() for parameter in of_companion),
            )

    def _checkpoint(self, layer: Callable[..., Any], *args: Any) -> Any:  # noqa: ANN401 - as diffusers passes them
        """Checkpoint a layer as diffusers does; the backward pass turns modes off, so recomputing enters them again."""
        kernels = DeviceKernels(fused_norms=self.fused_norms)
        return checkpoint(layer, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), kernels))

    def _measure(self, operations: Callable[[], object]) -> Cost:
        with MemoryTracker(self.family.module.parameters()) as tracker, DeviceKernels(fused_norms=self.fused_norms):
            operations()
        return Cost(tracker.peak_bytes, tracker.flops)

    def _latents(self) -> Tensor:
        image = Image.new("RGB", (self.family.width, self.family.height))
        return self.family.encode_images([image] * self.micro_batch_size)

    def _pair_batch(self, latents: Tensor) -> PairBatch:
        size = self.micro_batch_size
        conditioning = {
            name: torch.ones(size, *shape, dtype=torch.long)
            if name.endswith("_mask")
            else torch.empty(size, *shape, dtype=self.dtype, device="meta")
            for name, shape in self.text.items()
        }
        objective = self.config.objective

        def blank() -> Tensor:
            return torch.empty_like(latents, dtype=torch.float32)

        return PairBatch(
            before=blank(),
            after=blank(),
            noise=blank(),
            sigmas=torch.empty(size, device="meta"),
            conditioning=conditioning,
            own_noise=blank() if objective.reads_own_noise else None,
            extra_noise=tuple(blank() for _ in range(objective.extra_noise)),
            negative=None if objective.negative_prompt is None else conditioning,
        )


class _FullTeacherCache(TeacherCache):
    """A cache that holds every prediction, so the teacher is never called."""

    def get_or_compute(self, inputs: Mapping[str, Tensor], compute: Callable[[], Tensor]) -> Tensor:
        return torch.empty_like(inputs["noisy"])


def _zero_lora(layers: Mapping[str, Any], config: TrainingConfig) -> LoRA:
    """A LoRA of zeros whose factors are views of one number here, and take their full size on the model's device."""
    zero, zero_layers = torch.zeros(1), {}
    for name, layer in layers.items():
        inputs, outputs = layer.in_features, layer.out_features
        rank = config.adapter.lora_rank(inputs, outputs, config.rank)
        zero_layers[name] = LowRank(zero.expand(rank, inputs), zero.expand(outputs, rank))
    return LoRA(zero_layers)


def _storage_id(tensor: Tensor) -> int:
    identity: int = tensor.untyped_storage()._cdata  # noqa: SLF001 - torch has no public identity of a storage
    return identity


def _tensors(nested: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]
