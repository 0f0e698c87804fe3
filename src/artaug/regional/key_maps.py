"""How much queries attend to a few of the keys: exact probabilities in blocks, with a gradient, never a matrix of all.

The probability of key k for a query is ``P_k = exp(s_k - l)``, with ``s_k = q k / sqrt(d) + bias_k`` and l the log-sum-exp of all
scores, which fast kernels return. A map is a sum of such probabilities, ``M_j = sum_k A_jk P_k``, with A 1 for the keys of a
phrase. Its gradient goes to every key, since l depends on all of them::

    dP_k = sum_j A_jk dM_j,    dS_k = P_k (dP_k - delta),    delta = sum_k P_k dP_k,
    dQ = dS K / sqrt(d),       dK = dS^T Q / sqrt(d)

which are the equations of FlashAttention's backward pass (Dao et al. 2022) with A in the place of the values. dP is zero but for the
selected keys, so that what all keys get is ``-delta P``, and dS is never made: ``-delta P K`` is added to what the selected keys give dQ, and
``-P^T (delta Q)`` to what they give dK. The forward pass holds scores of the selected keys, the backward pass those of all keys, for a
block of queries at a time.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from artaug.regional.bias import Bias
from artaug.regional.compiled_attention import Autograd

_BLOCK_SCORES = 1 << 22
"""Scores that are in memory at a time: 16 MB in float32."""


def key_maps(
    query: Float[Tensor, "batch heads queries channels"],
    key: Float[Tensor, "batch heads keys channels"],
    selected: Int[Tensor, "batch selected"],
    members: Float[Tensor, "batch maps selected"],
    *,
    lse: Float[Tensor, "batch heads queries"] | None = None,
    bias: Bias | None = None,
    heads: bool = False,
) -> Float[Tensor, "batch maps *heads queries"]:
    """The probability of several sets of keys for every query.

    Args:
        query: of the attention, any part of its queries.
        key: all keys of the attention.
        selected: numbers of the keys that the maps are made of.
        members: how much each of them counts in each map, 0 for one that stands for nothing.
        lse: of each query's scores, None to compute it here from all keys.
        bias: of the scores, None for none.
        heads: keep the heads apart; else their mean.

    Returns:
        Float32 or better, shape (batch, maps, queries), or (batch, maps, heads, queries).
    """
    maps: Tensor = _KeyMaps.apply(query, key, selected, members, lse, bias, heads)  # type: ignore[no-untyped-call]
    return maps


class _KeyMaps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Autograd,
        query: Tensor,
        key: Tensor,
        selected: Tensor,
        members: Tensor,
        lse: Tensor | None,
        bias: Bias | None,
        heads: bool,
    ) -> Tensor:
        dtype = torch.promote_types(query.dtype, torch.float32)
        index = selected[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
        chosen = key.gather(2, index).to(dtype)  # (batch, heads, selected, channels)
        members = members.to(chosen)
        scale = query.shape[-1] ** -0.5
        parts = []
        with torch.autocast(query.device.type, enabled=False):  # which would round these products
            if lse is None:
                lse = _log_sum_exp(query, key, bias, dtype)
            for block in _blocks(query, selected.shape[1]):
                scores = query[:, :, block].to(dtype) * scale @ chosen.mT
                if bias is not None:
                    scores = scores + bias.at(block, selected).to(dtype)
                probs = (scores - lse[:, :, block, None]).exp()
                if heads:
                    parts.append(torch.einsum("bhqs,bms->bmhq", probs, members))
                else:
                    parts.append(torch.einsum("bqs,bms->bmq", probs.mean(dim=1), members))
        ctx.save_for_backward(query, key, selected, members, lse)
        ctx.bias, ctx.heads = bias, heads
        return torch.cat(parts, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Autograd, dmaps: Tensor) -> tuple[Tensor | None, ...]:
        query, key, selected, members, lse = ctx.saved_tensors
        dtype = lse.dtype
        full_key = key.to(dtype)
        index = selected[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
        chosen_key = full_key.gather(2, index)
        dquery, dkey = (torch.zeros_like(tensor, dtype=dtype) for tensor in (query, key))
        scale = query.shape[-1] ** -0.5
        if not ctx.heads:  # every head has its share of the mean
            dmaps = dmaps[:, :, None] / query.shape[1]
        for block in _blocks(query, key.shape[2]):
            block_query = query[:, :, block].to(dtype) * scale
            probs = _scores(block_query, full_key, ctx.bias, block).sub_(lse[:, :, block, None]).exp_()
            dprobs = torch.einsum("bmhq,bms->bhqs", dmaps[..., block].to(dtype), members)
            places = selected[:, None, None].expand(-1, *probs.shape[1:3], -1)
            weighted = probs.gather(3, places).mul_(dprobs)  # P_k dP_k
            delta = weighted.sum(dim=-1, keepdim=True)
            dquery[:, :, block] = (weighted @ chosen_key).addcmul_(delta, probs @ full_key, value=-1).mul_(scale)
            dkey.sub_(probs.mT @ (delta * block_query)).scatter_add_(2, index, weighted.mT @ block_query)
        return dquery.to(query), dkey.to(key), None, None, None, None, None


def _scores(query: Tensor, key: Tensor, bias: Bias | None, block: slice) -> Tensor:
    """The scores of a block of queries, which are scaled already, for all keys."""
    scores = query @ key.mT
    return scores if bias is None else scores + bias.of(block).to(scores.dtype)


def _log_sum_exp(query: Tensor, key: Tensor, bias: Bias | None, dtype: torch.dtype) -> Tensor:
    full_key, scale = key.to(dtype), query.shape[-1] ** -0.5
    parts = [
        _scores(query[:, :, block].to(dtype) * scale, full_key, bias, block).logsumexp(dim=-1)
        for block in _blocks(query, key.shape[2])
    ]
    return torch.cat(parts, dim=-1)


def _blocks(query: Tensor, keys: int) -> Iterator[slice]:
    """Queries in blocks that have not too many scores with so many keys."""
    batch, heads, queries, _ = query.shape
    size = max(1, _BLOCK_SCORES // max(1, batch * heads * keys))
    yield from (slice(start, min(start + size, queries)) for start in range(0, queries, size))
