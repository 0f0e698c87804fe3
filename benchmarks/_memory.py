"""Peak memory of a function, as torch's allocator counts it."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], object], *, inputs: Iterable[Tensor]) -> int:
    """Call ``work`` and return its peak memory: the tensors passed as ``inputs``, and all that it allocated."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        work()
        return int(torch.cuda.max_memory_allocated())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now, most = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += int(event.nbytes())
        most = max(most, now)
    return most + sum(tensor.numel() * tensor.element_size() for tensor in inputs)


def synchronize() -> None:
    """Wait until the device has finished all work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
