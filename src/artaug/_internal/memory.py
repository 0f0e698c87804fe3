"""Which errors say that memory ran out: they are never wrapped, so that callers can free some and go on."""

import torch

_MESSAGES = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")  # MPS, cuDNN, the CPU, cuBLAS


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the machine or of a device ran out.

    >>> from artaug._internal.memory import is_out_of_memory
    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("MPS backend out of memory"))
    (True, True)
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)
