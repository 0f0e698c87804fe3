"""Attention under a sight, several ways, one result."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from artaug.errors import GuideError
from artaug.regional.split_plan import Pass, Tokens, taken

_Context: TypeAlias = Any  # autograd's, on which anything may be kept
_BACKWARD_QUERIES = 1024
"""Queries whose scores the backward pass holds at a time."""


def dense_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """The definition: scaled dot product attention with a mask of (queries, keys) in memory. Slow; the oracle.

    Args:
        query: (batch, heads, queries, channels).
        key: (batch, heads, keys, channels).
        value: like ``key``.
        bias: `Sight.bias`.

    Returns:
        (batch, heads, queries, channels).
    """
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query))


def attention_in_passes(query: Tensor, key: Tensor, value: Tensor, planned: Sequence[Pass]) -> Tensor:
    """Attention in the passes of `artaug.regional.split_plan`; equals `dense_attention` up to rounding.

    Differentiable in query, key and value. Nothing of the size queries x keys is ever in memory on the way forward.

    Raises:
        GuideError: if passes have to be merged on a device whose attention does not tell its log-sum-exp.
    """
    if all(one.stage == "alone" for one in planned):
        return _apart(query, key, value, planned)
    mixed: Tensor = _Merged.apply(query, key, value, planned)  # type: ignore[no-untyped-call]
    return mixed


def can_merge(device: torch.device) -> bool:
    """Whether attention on a device tells its log-sum-exp, which merging needs."""
    return device.type in {"cpu", "cuda"}


def _apart(query: Tensor, key: Tensor, value: Tensor, planned: Sequence[Pass]) -> Tensor:
    result = query.new_empty(*query.shape[:3], value.shape[-1])
    for one in planned:
        seen, said = taken(key, one.keys), taken(value, one.keys)
        result[:, :, one.queries] = functional.scaled_dot_product_attention(taken(query, (one.queries,)), seen, said)
    return result


class _Merged(torch.autograd.Function):
    """Passes merged by log-sum-exp. Kernels that tell it pass no gradient through it, so the backward is our own."""

    @staticmethod
    def forward(context: _Context, query: Tensor, key: Tensor, value: Tensor, planned: Sequence[Pass]) -> Tensor:
        result, total = _merged(query, key, value, planned)
        context.save_for_backward(query, key, value, result, total)
        context.planned = planned
        return result

    @staticmethod
    @once_differentiable
    def backward(context: _Context, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, result, total = context.saved_tensors
        grads = tuple(torch.zeros_like(one, dtype=torch.float32) for one in (query, key, value))
        inner = (grad.float() * result.float()).sum(dim=-1)
        for one in context.planned:
            seen, said = taken(key, one.keys).float(), taken(value, one.keys).float()
            for queries, bias in _parts(one, query.shape[2]):
                asked, outer = query[:, :, queries].float(), grad[:, :, queries].float()
                scale = asked.shape[-1] ** -0.5
                scores = asked @ seen.mT * scale - total[:, :, queries, None]
                share = (scores if bias is None else scores + bias[:, None]).exp()
                slope = share * (outer @ said.mT - inner[:, :, queries, None]) * scale
                grads[0][:, :, queries] += slope @ seen
                _add(grads[1], one.keys, slope.mT @ asked)
                _add(grads[2], one.keys, share.mT @ outer)
        return (*(one.to(like) for one, like in zip(grads, (query, key, value), strict=True)), None)  # type: ignore[return-value]


def _merged(query: Tensor, key: Tensor, value: Tensor, planned: Sequence[Pass]) -> tuple[Tensor, Tensor]:
    """The result, and the logarithm of each query's softmax denominator, (batch, heads, queries) in float32."""
    result = query.new_empty(*query.shape[:3], value.shape[-1])
    total = query.new_empty(query.shape[:3], dtype=torch.float32)
    for one in planned:
        seen, said = taken(key, one.keys), taken(value, one.keys)
        here, sums = attention_with_sums(taken(query, (one.queries,)), seen, said)
        if one.bias is not None:
            sums = sums + one.bias
        if one.stage == "later":
            before = total[:, :, one.queries]
            share = torch.sigmoid(sums - before).unsqueeze(-1).to(here.dtype)
            here, sums = torch.lerp(result[:, :, one.queries], here, share), torch.logaddexp(before, sums)
        result[:, :, one.queries] = here
        total[:, :, one.queries] = sums
    return result, total


def attention_with_sums(
    query: Float[Tensor, "batch heads queries channels"],
    key: Float[Tensor, "batch heads keys channels"],
    value: Float[Tensor, "batch heads keys channels"],
) -> tuple[Tensor, Tensor]:
    """Plain attention, and the log-sum-exp of each query's scaled scores: (batch, heads, queries) in float32.

    Raises:
        GuideError: on a device whose kernels do not tell.
    """
    aten = torch.ops.aten
    if query.device.type == "cpu":
        mixed, sums = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)  # noqa: SLF001
    elif query.device.type != "cuda":
        raise GuideError(
            f"attention on {query.device} does not tell its log-sum-exp, so passes cannot be merged there. "
            "Use method='grouped' with hard masks, or method='dense'."
        )
    elif query.dtype == torch.float32:
        mixed, sums, *_ = aten._scaled_dot_product_efficient_attention(query, key, value, None, True)  # noqa: SLF001
    else:
        mixed, sums, *_ = aten._scaled_dot_product_flash_attention(query, key, value)  # noqa: SLF001
    return mixed, sums[:, :, : query.shape[2]].float()


def _parts(one: Pass, count: int) -> list[tuple[Tokens, Tensor | None]]:
    """The queries of a pass a few at a time, with their biases."""
    parts: list[Tokens]
    if isinstance(one.queries, slice):
        start, stop, _ = one.queries.indices(count)
        parts = [slice(low, min(low + _BACKWARD_QUERIES, stop)) for low in range(start, stop, _BACKWARD_QUERIES)]
    else:
        parts = list(one.queries.split(_BACKWARD_QUERIES))
    biases = [None] * len(parts) if one.bias is None else one.bias.split(_BACKWARD_QUERIES)
    return list(zip(parts, biases, strict=True))


def _add(total: Tensor, where: Sequence[Tokens], part: Tensor) -> None:
    """Add tokens to where they were taken from."""
    start = 0
    for some in where:
        length = some.stop - some.start if isinstance(some, slice) else len(some)
        total[:, :, some] += part[:, :, start : start + length]
        start += length
