"""Attention under a group mask: the dense definition, and several attentions merged by log-sum-exp.

For one query and a set of keys S, plain attention gives the result ``o_S = sum_{k in S} exp(s_k) v_k / Z_S`` and the
log-sum-exp ``l_S = log Z_S``, with ``s_k = q k / sqrt(d)`` and ``Z_S = sum_{k in S} exp(s_k)``. If S has the weight w, all
of its terms are multiplied by w, so ``o_S`` stays and ``l_S`` becomes ``l_S + log w``; weights that differ from key to key are
a bias ``log w_k`` of the scores. Two disjoint sets A and B merge into

    o = (Z_A o_A + Z_B o_B) / (Z_A + Z_B) = lerp(o_A, o_B, sigmoid(l_B - l_A)),    l = logaddexp(l_A, l_B).

This is the softmax over all keys, term by term, hence exact up to rounding. It costs a vector of weights for each split
instead of a matrix of (queries, keys).
"""

import functools
import logging
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.attention import SDPBackend

from artaug.errors import GuideError
from artaug.regional.splits import AttentionSplit, TokenIndex, gather

_log = logging.getLogger(__name__)

_Context: TypeAlias = Any  # autograd's ctx, which takes any attribute
_BACKWARD_QUERIES = 1024
"""Queries whose scores the backward pass holds in memory at a time."""


def dense_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """The definition: scaled dot product attention with a mask of (queries, keys) in memory. Slow; the oracle.

    Args:
        query: (batch, heads, queries, channels).
        key: (batch, heads, keys, channels).
        value: like ``key``.
        bias: `GroupMask.bias`.

    Returns:
        (batch, heads, queries, channels).
    """
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query))


def split_attention(query: Tensor, key: Tensor, value: Tensor, splits: Sequence[AttentionSplit]) -> Tensor:
    """Attention in the splits of `artaug.regional.split_plan`; equals `dense_attention` up to rounding.

    Differentiable in query, key and value. The forward pass never holds anything of the size queries x keys, but for the
    biases that splits have.

    Raises:
        GuideError: if splits have to be merged on a device whose attention does not return its log-sum-exp.
    """
    if any(split.stage != "only" for split in splits):
        merged: Tensor = _MergedAttention.apply(query, key, value, splits)[0]  # type: ignore[no-untyped-call]
        return merged
    if len(splits) == 1:  # of all queries
        return _plain(query, key, value, splits[0])
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    for split in splits:
        out[:, :, split.queries] = _plain(query, key, value, split)
    return out


def split_attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, splits: Sequence[AttentionSplit]
) -> tuple[Tensor, Tensor]:
    """`split_attention`, and the log-sum-exp of each query over all its keys: (batch, heads, queries) in float32.

    Scores have the logarithms of their weights added, with the largest weight of each query 1. It has no gradient.

    Raises:
        GuideError: on a device whose attention does not return its log-sum-exp.
    """
    if any(split.stage != "only" for split in splits):
        out, lse = _MergedAttention.apply(query, key, value, splits)  # type: ignore[no-untyped-call]
        return out, lse
    out, lse = _merge_splits(query, key, value, splits)
    return out, lse.detach()


def _plain(query: Tensor, key: Tensor, value: Tensor, split: AttentionSplit) -> Tensor:
    """The attention of one split."""
    return functional.scaled_dot_product_attention(
        gather(query, (split.queries,)), gather(key, split.keys), gather(value, split.keys), attn_mask=split.bias
    )


def supports_merging(device: torch.device) -> bool:
    """Whether attention on a device returns its log-sum-exp, which merging needs."""
    return device.type in {"cpu", "cuda"}


class _MergedAttention(torch.autograd.Function):
    """Splits merged by log-sum-exp. The kernels pass no gradient through their log-sum-exp, so this has a backward.

    The backward is that of FlashAttention (Dao et al. 2022), one split at a time. With lse the log-sum-exp over *all*
    keys, the probabilities of one split are ``P = exp(s - lse + log w)``, without regard to the others. Then

        dV = P^T dO,    dP = dO V^T,    dS = P * (dP - delta),    dQ = dS K / sqrt(d),    dK = dS^T Q / sqrt(d)

    with ``delta = rowsum(dO * O)``, which equals ``rowsum(P * dP)`` over all keys: the softmax's own term.
    """

    @staticmethod
    def forward(
        ctx: _Context, query: Tensor, key: Tensor, value: Tensor, splits: Sequence[AttentionSplit]
    ) -> tuple[Tensor, Tensor]:
        out, lse_total = _merge_splits(query, key, value, splits)
        ctx.save_for_backward(query, key, value, out, lse_total)
        ctx.mark_non_differentiable(lse_total)
        ctx.splits = splits
        return out, lse_total

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, dout: Tensor, _dlse: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, lse_total = ctx.saved_tensors
        dquery, dkey, dvalue = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in (query, key, value))
        delta = (dout.float() * out.float()).sum(dim=-1)  # (batch, heads, queries)
        scale = query.shape[-1] ** -0.5
        for split in ctx.splits:
            split_key, split_value = gather(key, split.keys).float(), gather(value, split.keys).float()
            # A kernel would recompute the scores tile by tile; here they are held, for some queries at a time.
            for queries, part in _query_chunks(split, query.shape[2]):
                chunk_query, chunk_dout = query[:, :, queries].float(), dout[:, :, queries].float()
                scores = chunk_query @ split_key.mT * scale - lse_total[:, :, queries, None]
                if split.log_weights is not None:
                    scores = scores + split.log_weights[:, :, part, None]
                if split.bias is not None:
                    scores = scores + split.bias[:, :, part]
                probs = scores.exp()
                dscores = probs * (chunk_dout @ split_value.mT - delta[:, :, queries, None]) * scale
                dquery[:, :, queries] += dscores @ split_key
                _scatter_add(dkey, split.keys, dscores.mT @ chunk_query)
                _scatter_add(dvalue, split.keys, probs.mT @ chunk_dout)
        return dquery.to(query), dkey.to(key), dvalue.to(value), None


def _merge_splits(query: Tensor, key: Tensor, value: Tensor, splits: Sequence[AttentionSplit]) -> tuple[Tensor, Tensor]:
    """The result, and the log-sum-exp of each query over all its keys, (batch, heads, queries) in float32."""
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    lse_total = query.new_empty(query.shape[:3], dtype=torch.float32)
    for split in splits:
        split_out, lse = attention_with_lse(
            gather(query, (split.queries,)), gather(key, split.keys), gather(value, split.keys), split.bias
        )
        if split.log_weights is not None:
            lse = lse + split.log_weights
        if split.stage == "merge":
            # sigmoid(l_B - l_A) = Z_B / (Z_A + Z_B), without an exponential of either that could overflow.
            lse_before = lse_total[:, :, split.queries]
            fraction = torch.sigmoid(lse - lse_before).unsqueeze(-1).to(split_out.dtype)
            if isinstance(split.queries, slice):
                out[:, :, split.queries].lerp_(split_out, fraction)
            else:
                out[:, :, split.queries] = torch.lerp(out[:, :, split.queries], split_out, fraction)
            lse = torch.logaddexp(lse_before, lse)
        else:
            out[:, :, split.queries] = split_out
        lse_total[:, :, split.queries] = lse
    return out, lse_total


def attention_with_lse(
    query: Float[Tensor, "batch heads queries channels"],
    key: Float[Tensor, "batch heads keys channels"],
    value: Float[Tensor, "batch heads keys channels"],
    bias: Float[Tensor, "rows 1 queries keys"] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention, and the log-sum-exp of each query's scaled and biased scores: (batch, heads, queries) in float32.

    Raises:
        GuideError: on a device whose kernels do not return it.
    """
    aten = torch.ops.aten
    if query.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=bias)  # noqa: SLF001
    elif query.device.type != "cuda":
        raise GuideError(
            f"attention on {query.device} does not return its log-sum-exp, so splits cannot be merged there. "
            "Use method='grouped' with hard masks, or method='dense'."
        )
    elif query.dtype == torch.float32 or bias is not None:
        full_bias = None if bias is None else bias.expand(*query.shape[:2], -1, -1)
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(query, key, value, full_bias, True)  # noqa: SLF001
    elif _prefers_cudnn(query, key, value) and _cudnn_agrees(query.device, query.dtype, query.shape[-1]):
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(query, key, value, None, True)  # noqa: SLF001
        lse = lse.reshape(query.shape[:3])  # its last axis has length 1
    else:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(query, key, value)  # noqa: SLF001
    return out, lse[:, :, : query.shape[2]].float()  # CUDA kernels round the number of queries up


def _prefers_cudnn(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether torch itself would compute this plain attention by cuDNN, whose kernels are the fastest on recent GPUs."""
    choice: int = torch._fused_sdp_choice(query, key, value)  # noqa: SLF001 - there is no public name
    return choice == SDPBackend.CUDNN_ATTENTION.value


@functools.cache
def _cudnn_agrees(device: torch.device, dtype: torch.dtype, channels: int) -> bool:
    """Whether cuDNN's log-sum-exp is what flash attention's is: nothing documents it, so it is compared once a process."""
    generator = torch.Generator().manual_seed(0)  # torch's global state is not ours
    query, key, value = torch.randn(3, 1, 1, 128, channels, generator=generator).to(device, dtype)
    aten = torch.ops.aten
    _, flash, *_ = aten._scaled_dot_product_flash_attention(query, key, value)  # noqa: SLF001
    _, cudnn, *_ = aten._scaled_dot_product_cudnn_attention(query, key, value, None, True)  # noqa: SLF001
    if cudnn.numel() == 128 and torch.allclose(cudnn.flatten().float(), flash[..., :128].flatten().float(), atol=0.02):
        return True
    _log.warning(
        "cuDNN's attention returns another log-sum-exp than expected, so regions are merged by flash attention."
    )
    return False


def _query_chunks(split: AttentionSplit, num_queries: int) -> list[tuple[TokenIndex, slice]]:
    """The queries of a split, `_BACKWARD_QUERIES` at a time, and which of the split's they are."""
    if isinstance(split.queries, slice):
        start, stop, _ = split.queries.indices(num_queries)
        parts = [
            slice(low, min(low + _BACKWARD_QUERIES, stop - start)) for low in range(0, stop - start, _BACKWARD_QUERIES)
        ]
        return [(slice(start + part.start, start + part.stop), part) for part in parts]
    count = len(split.queries)
    parts = [slice(low, min(low + _BACKWARD_QUERIES, count)) for low in range(0, count, _BACKWARD_QUERIES)]
    return [(split.queries[part], part) for part in parts]


def _scatter_add(total: Tensor, indices: Sequence[TokenIndex], tokens: Tensor) -> None:
    """Add tokens to the places that `gather` took them from."""
    start = 0
    for index in indices:
        length = index.stop - index.start if isinstance(index, slice) else len(index)
        total[:, :, index] += tokens[:, :, start : start + length]
        start += length
