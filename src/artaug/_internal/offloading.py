"""Moving models between a device and host memory: which cannot be moved, and the weights that wait in host memory."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

_HOOKS_IN_PLACE = {"layerwise_casting", "peft_autocast_disable"}
"""Hooks of diffusers that do not move a part."""
_SLAB_BYTES = 2**28
"""Pinned memory is taken in pieces of this size: torch rounds each up to a power of two, which for the matrices of
FLUX.1, of 18.9 and 75.5 MB, would waste 70%."""
_ALIGNMENT = 512


def offload_hooks(module: nn.Module) -> bool:
    """Whether hooks of diffusers or accelerate move a module's weights around its calls."""
    return any(hasattr(part, "_hf_hook") or _has_moving_hook(part) for part in module.modules())


def is_sharded(module: nn.Module) -> bool:
    """Whether a module's weights are spread over processes (FSDP, DTensor, DistributedDataParallel) or devices."""
    return any(
        type(part).__name__ in {"FullyShardedDataParallel", "DistributedDataParallel", "DataParallel"}
        for part in module.modules()
    ) or any(hasattr(parameter, "device_mesh") for parameter in module.parameters())


def unmovable_reason(module: nn.Module) -> str | None:
    """Why a module cannot be moved to a device and off it, as the end of a sentence; None if it can."""
    return next(_obstacles(module), None)


def _obstacles(module: nn.Module) -> Iterator[str]:
    if offload_hooks(module):
        yield (
            "hooks of accelerate or diffusers move its weights themselves (enable_model_cpu_offload, "
            "enable_sequential_cpu_offload, enable_group_offload, or a device_map of several devices). Load it without"
        )
    if is_sharded(module):
        yield "its weights are sharded over processes, or copied to several devices. Load it in one piece"
    tensors = [*module.parameters(), *module.buffers()]
    if any(type(tensor).__name__ == "Int8Params" for tensor in tensors):
        yield "its weights are in 8 bits of bitsandbytes, which stay on their device. Load it in nf4 or in bfloat16"
    devices = sorted({str(tensor.device) for tensor in tensors})
    if "meta" in devices:
        yield "some of its weights are on the meta device, so not in memory. Load them"
    if len(devices) > 1:
        yield f"its weights are on several devices, {' and '.join(devices)}. Put it on one"
    if _uses_cuda_graphs(module):
        yield (
            "it is compiled with CUDA graphs, which hold the addresses of its weights. Compile it without "
            "mode='reduce-overhead' or 'max-autotune'"
        )


def device_of(module: nn.Module) -> torch.device | None:
    """Where a module's weights are; None for one without any."""
    return next((tensor.device for tensors in (module.parameters(), module.buffers()) for tensor in tensors), None)


def _has_moving_hook(module: nn.Module) -> bool:
    registry: Any = getattr(module, "_diffusers_hook", None)
    return registry is not None and bool(set(registry.hooks) - _HOOKS_IN_PLACE)


def _uses_cuda_graphs(module: nn.Module) -> bool:
    for part in module.modules():
        # torch.compile(module) makes a module that has this method, module.compile() keeps a function that has it.
        for compiled in (part, vars(part).get("_compiled_call_impl")):
            config: Any = getattr(compiled, "get_compiler_config", lambda: None)()
            if isinstance(config, dict) and config.get("triton.cudagraphs"):
                return True
    return False


@dataclass(frozen=True, eq=False)
class _HostCopy:
    """The weight that waits in host memory while what stands for it is on a device."""

    data: Tensor
    version: int
    """Of the weight when it was moved; torch counts the changes of a tensor, but for those through ``.data``."""
    storage: StorageWeakRef
    """What the weight was moved to. A weak reference, since others may take the weight off the device meanwhile."""

    @classmethod
    def of(cls, data: Tensor, on_device: Tensor) -> "_HostCopy":
        return cls(data, on_device._version, StorageWeakRef(on_device.untyped_storage()))  # noqa: SLF001

    def matches(self, weight: Tensor) -> bool:
        """Whether the weight on the device is still as it came there."""
        is_same = not self.storage.expired() and self.storage == StorageWeakRef(weight.untyped_storage())
        return is_same and weight._version == self.version  # noqa: SLF001


class _HostCopies:
    """The host copies of all modules in this process that are on a device for a while."""

    def __init__(self) -> None:
        self.parameters: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.buffers: WeakKeyDictionary[nn.Module, dict[str, _HostCopy]] = WeakKeyDictionary()


_COPIES = _HostCopies()


def bring(module: nn.Module, device: torch.device) -> None:
    """Move a module to a device, and keep its weights in host memory, so that `take_off` copies nothing.

    A module's parameters stay the same objects, and tied ones tied.
    """
    # Tensors made in a caller's inference mode could never be trained on.
    with torch.inference_mode(False), torch.no_grad():
        parameters = [(parameter, parameter.data) for parameter in module.parameters() if _is_plain(parameter)]
        buffers = [(part, name, buffer) for part, name, buffer in _buffers(module) if _is_plain(buffer)]
        try:
            module.to(device)
        finally:  # also if the device was full half way
            for parameter, data in parameters:
                _COPIES.parameters[parameter] = _HostCopy.of(data, parameter)
            for part, name, buffer in buffers:
                on_device = part._buffers[name]  # noqa: SLF001 - Module.to puts another object there
                if on_device is not None:
                    _COPIES.buffers.setdefault(part, {})[name] = _HostCopy.of(buffer, on_device)


def take_off(module: nn.Module) -> None:
    """Move a module to host memory: what `bring` kept there is put back, what is new or was changed is copied."""
    with torch.inference_mode(False), torch.no_grad():
        for parameter in module.parameters():
            copy = _COPIES.parameters.pop(parameter, None)
            if copy is not None and copy.matches(parameter):
                parameter.data = copy.data
        for part, name, buffer in _buffers(module):
            copy = _COPIES.buffers.get(part, {}).pop(name, None)
            if copy is not None and copy.matches(buffer):
                part._buffers[name] = copy.data  # noqa: SLF001 - as Module.to does
        module.to("cpu")  # also what a module moves in a `to` of its own
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_brought(module: nn.Module) -> bool:
    """Whether a module is on its device by `bring`, so that its weights are in host memory as well."""
    return any(parameter in _COPIES.parameters for parameter in module.parameters())


def pin(module: nn.Module) -> list[nn.Parameter]:
    """Put weights in host memory into pinned memory, which a GPU reads and writes itself; return those it was done for.

    Those whose memory overlaps with another's, or that leave gaps in it, stay where they are.
    """
    plain = [parameter for parameter in module.parameters() if _is_plain(parameter) and not parameter.data.is_pinned()]
    parameters = _alone(plain)
    total = sum(_aligned_bytes(parameter) for parameter in parameters)
    slab, used = torch.empty(0, dtype=torch.uint8), 0
    for parameter in parameters:
        size = parameter.numel() * parameter.element_size()
        if used + size > len(slab):
            slab, used = torch.empty(max(size, min(_SLAB_BYTES, total)), dtype=torch.uint8, pin_memory=True), 0
        pinned = slab[used : used + size].view(parameter.dtype).as_strided(parameter.size(), parameter.stride())
        parameter.data = pinned.copy_(parameter.data)
        used += _aligned_bytes(parameter)
    return parameters


def unpin(parameters: Iterable[nn.Parameter]) -> None:
    """Put weights that `pin` moved, as far as they are in host memory, into memory of their own.

    Pinned weights share their memory, which safetensors refuses to save.
    """
    with torch.inference_mode(False), torch.no_grad():
        for parameter in parameters:
            if parameter.device.type == "cpu" and parameter.data.is_pinned():
                parameter.data = parameter.data.clone()


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is one of torch's own in host memory, whose data can be exchanged."""
    return (
        type(tensor) in {nn.Parameter, Tensor}
        and type(tensor.data) is Tensor
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not tensor.is_inference()  # torch does not count their changes
    )


def _buffers(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for part in module.modules():
        for name, buffer in list(part._buffers.items()):  # noqa: SLF001 - named_buffers leaves out shared ones
            if buffer is not None:
                yield part, name, buffer


def _alone(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Those that fill a piece of memory of which no other has a part."""
    spans = sorted((*_span(parameter), index) for index, parameter in enumerate(parameters) if parameter.numel())
    alone, reach = [], 0
    for (start, end, index), following in zip(spans, [*spans[1:], None], strict=True):
        is_free = start >= reach and (following is None or following[0] >= end)
        if is_free and end - start == parameters[index].numel() * parameters[index].element_size():
            alone.append(parameters[index])
        reach = max(reach, end)
    return alone


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses of the first byte and after the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _aligned_bytes(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
