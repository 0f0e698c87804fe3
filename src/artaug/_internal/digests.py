"""SHA-256 digests of texts and tensors: the same for the same content in every process, so that they can name files."""

from collections.abc import Mapping
from hashlib import sha256

import torch
from torch import Tensor


def digest(*parts: str | bytes | Tensor) -> str:
    """SHA-256 of the parts in their order, as 64 hexadecimal digits.

    Each part is hashed with its type and its size, so parts never run into each other. Of a tensor, data type, shape and
    bits count; its device and its strides do not.

    >>> from artaug._internal.digests import digest
    >>> digest("ab", "c") == digest("a", "bc")
    False
    """
    state = sha256()
    for part in parts:
        if isinstance(part, Tensor):
            state.update(f"tensor {part.dtype} {tuple(part.shape)}\0".encode())
            state.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            data = part.encode() if isinstance(part, str) else part
            state.update(f"{type(part).__name__} {len(data)}\0".encode())
            state.update(data)
    return state.hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors by name, as 64 hexadecimal digits; the order of the mapping does not count."""
    return digest(*(part for name in sorted(tensors) for part in (name, tensors[name])))
