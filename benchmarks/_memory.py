"""What one call of a function takes: peak memory as torch's allocator counts it, and the kernels that it runs."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

_Event = Any
"""An event of torch's profiler (kineto)."""
_ATTENTION = "aten::_scaled_dot_product_"
_COMPILED = "Torch-Compiled Region"


@dataclass(frozen=True)
class Observed:
    """One call of a function."""

    peak_bytes: int
    """The tensors that it was called with, and the most that it allocated beside them at once."""
    linear_flops: int
    """FLOPs of its linear layers, forward; a multiplication and an addition are two."""
    attention_flops: int | None
    """FLOPs of queries times keys and probabilities times values, forward, hidden pairs included where a kernel computes
    them; None if compiled code ran, which does not tell."""
    attention_calls: Mapping[str, int] = field(repr=False)
    """How often each attention kernel was called, by its name and the shapes of its tensors. Compiled code counts as one."""

    @property
    def flops(self) -> int | None:
        """The sum of both, if both are known."""
        return None if self.attention_flops is None else self.linear_flops + self.attention_flops

    @property
    def is_compiled(self) -> bool:
        """Whether compiled code ran."""
        return _COMPILED in self.attention_calls

    @property
    def num_attention_calls(self) -> int:
        """Calls of attention kernels."""
        return sum(self.attention_calls.values())


def observe(work: Callable[[], object], *, inputs: Iterable[Tensor], within: str | None = None) -> Observed:
    """Call ``work`` once under torch's profiler, which makes it slower.

    Args:
        work: the function.
        inputs: tensors that it was given.
        within: the name of a `torch.profiler.record_function` block; kernels outside such blocks are not counted.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=not on_gpu, record_shapes=True) as recorded:
        work()
    events: Sequence[_Event] = recorded.profiler.kineto_results.events()
    peak = torch.cuda.max_memory_allocated() if on_gpu else _allocated(events) + _num_bytes(inputs)
    kernels = [event for event in events if event.name() != "[memory]"]
    if within is not None:
        kernels = _inside([event for event in kernels if event.name() == within], kernels)
    attention = [event for event in kernels if event.name().startswith(_ATTENTION)]
    forward = [event for event in attention if not event.name().endswith("_backward")]
    compiled = sum(event.name().startswith(_COMPILED) for event in kernels)
    calls = Counter(f"{event.name()} {event.shapes()}" for event in attention)
    return Observed(
        peak_bytes=int(peak),
        linear_flops=sum(_linear_flops(*event.shapes()[:2]) for event in kernels if event.name() == "aten::linear"),
        attention_flops=None if compiled else sum(_attention_flops(*event.shapes()[:3]) for event in forward),
        attention_calls=calls + Counter({_COMPILED: compiled}),  # the sum drops a count of 0
    )


def peak_bytes(work: Callable[[], object], *, inputs: Iterable[Tensor]) -> int:
    """Call ``work`` and return its peak memory: the tensors passed as ``inputs``, and all that it allocated."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        work()
        return int(torch.cuda.max_memory_allocated())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    return _allocated(recorded.profiler.kineto_results.events()) + _num_bytes(inputs)


def synchronize() -> None:
    """Wait until the device has finished all work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _allocated(events: Iterable[_Event]) -> int:
    """The most that was allocated at once."""
    now, most = 0, 0
    changes = [event for event in events if event.name() == "[memory]"]
    for event in sorted(changes, key=lambda event: event.start_ns()):
        now += int(event.nbytes())
        most = max(most, now)
    return most


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _inside(blocks: Sequence[_Event], events: Sequence[_Event]) -> list[_Event]:
    """The events that began inside one of the blocks."""
    spans = [(block.start_ns(), block.start_ns() + block.duration_ns()) for block in blocks]
    return [event for event in events if any(start <= event.start_ns() <= end for start, end in spans)]


def _linear_flops(tokens: Sequence[int], weight: Sequence[int]) -> int:
    return 2 * math.prod(tokens) * weight[0]


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> int:
    """Of (batch, heads, tokens, channels)."""
    return 2 * math.prod(query[:3]) * key[2] * (query[3] + value[3])
