"""Running out of memory: which errors say so, how to release what can be, and batches that are halved until they fit."""

import errno
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from artaug.errors import ArtAugError

Item = TypeVar("Item")
Result = TypeVar("Result")

_LOG = logging.getLogger(__name__)
_MESSAGES = (
    "out of memory",  # CUDA's driver, MPS, XPU
    "can't allocate memory",  # the CPU's allocator on Unix
    "not enough memory",  # and on Windows
    "alloc_failed",  # cuBLAS, cuDNN, cuFFT, cuSOLVER, hipBLAS
    "allocation_failed",  # cuDNN 9
    "rocblas_status_memory_error",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the machine or of a device ran out.

    Such errors are never wrapped, so an `ArtAugError` is none: at most, it quotes what a server said of its own memory.

    >>> from artaug._internal.memory import is_out_of_memory
    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("MPS backend out of memory"))
    (True, True)
    """
    if isinstance(error, ArtAugError):
        return False
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(message in text for message in _MESSAGES)


def release_memory() -> None:
    """Give back what no living object needs: cycles of Python, then the blocks that the devices' allocators keep."""
    gc.collect()  # an exception, its traceback and the frames' tensors are often such a cycle
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if torch.xpu.is_initialized():
        torch.xpu.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


@dataclass(eq=False)
class FittingBatches:
    """Calls a function in batches; where memory runs out, they are halved and stay so.

    >>> from artaug._internal.memory import FittingBatches
    >>> batches = FittingBatches(3)
    >>> list(batches.run(sum, range(5), owner="sum", item="number", remedy="Add less."))
    [(range(0, 3), 3), (range(3, 5), 7)]
    """

    largest: int
    """Items in a batch, at most; lowered when memory runs out."""

    def run(
        self, function: Callable[[Sequence[Item]], Result], items: Sequence[Item], *, owner: str, item: str, remedy: str
    ) -> Iterator[tuple[Sequence[Item], Result]]:
        """Yield each batch and what the function made of it.

        Args:
            function: called with the items of one batch; again with fewer, should memory run out.
            items: all of them, taken in their order.
            owner: whose function it is, for the log.
            item: what one of the items is called, in the singular.
            remedy: what to do if not even a single one fits, for the note of the error.

        Raises:
            MemoryError, RuntimeError: the error that said that memory ran out, if that was for a single item.
        """
        start = 0
        while start < len(items):
            batch = items[start : start + self.largest]
            try:
                result = function(batch)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if len(batch) == 1:
                    error.add_note(f"{owner} ran out of memory at a single {item}. {remedy}")
                    raise
                what = f"{type(error).__name__}: {error}"
            else:
                yield batch, result
                start += len(batch)
                continue
            self.halve(len(batch), owner=owner, item=item, what=what)

    def halve(self, count: int, *, owner: str, item: str, what: str) -> None:
        """Go on with half of a batch of ``count`` that did not fit. Call it where the error is gone, with its frames' tensors."""
        release_memory()
        self.largest = count // 2
        _LOG.warning(
            "%s ran out of memory at %d %ss together, so they are %d at a time from now on (%s)",
            *(owner, count, item, self.largest, what),
        )
