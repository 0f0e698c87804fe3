"""SHA-256 digests of texts and tensors: the same for the same content in every process, so that they can name files."""

from collections.abc import Mapping
from functools import lru_cache
from hashlib import sha256

import torch
from torch import Tensor

_ROW_WORDS = 4096
_LANES = 4


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


def tensors_key(tensors: Mapping[str, Tensor]) -> str:
    """A key for tensors by name within a process: the same for the same names, data types, shapes, bits and device.

    For `tensors_digest` every byte leaves the GPU, which waits. Here 1 in 500 does: tensors on another device than the CPU are
    condensed there. Two given mappings have one key with a chance of about 2^-130; whoever wants to can make two that do.

    >>> import torch
    >>> from artaug._internal.digests import tensors_key
    >>> tensors_key({"noisy": torch.zeros(2)}) == tensors_key({"noisy": -torch.zeros(2)})
    False
    """
    named = sorted(tensors.items())
    return digest(
        *(f"{name} {tensor.dtype} {tuple(tensor.shape)}" for name, tensor in named),
        *(tensor if tensor.device.type == "cpu" else condensed(tensor) for _, tensor in named),
    )


def condensed(tensor: Tensor) -> Tensor:
    """Hashes of the rows of a tensor's bits: int64, shape (rows, lanes).

    A row of 32-bit words ``x`` has the hashes ``sum_i w_i x_i mod 2^64``, each with random ``w`` of its own (multilinear hashing,
    arXiv 1202.4961). Where a word differs, it does by 2^k times an odd number with k at most 31, so the product with ``w_i``
    takes 2^(64 - k) values, all as likely: two rows have one sum with a chance of at most 2^-33, and four with 2^-132.
    """
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    padded = data.new_zeros(-(-data.numel() // (4 * _ROW_WORDS)) * 4 * _ROW_WORDS)
    padded[: data.numel()] = data
    words = padded.view(torch.int32).view(-1, _ROW_WORDS).long()
    return torch.stack([(words * lane).sum(1) for lane in _lane_weights().to(tensor.device)], dim=1)


@lru_cache(maxsize=1)
def _lane_weights() -> Tensor:
    """Random numbers of 64 bits, the same in every process: int64, shape (lanes, words)."""
    shape, generator = (_LANES, _ROW_WORDS), torch.Generator().manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=generator)
