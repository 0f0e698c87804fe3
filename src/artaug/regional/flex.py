"""Attention under a sight by FlexAttention: one compiled kernel that skips whatever tiles nobody sees.

Tokens are sorted so that those with the same sight are neighbours, since in raster order nearly every tile of a region
is a partial one. The block mask comes straight from counting how many of each kind a tile holds; it is never built from
a mask of queries x keys. All that depends on the layout sits in tensors of rounded sizes, so that another layout of
about the same size runs the same kernel.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from artaug.regional.attention_mask import Sight

TILE = 128
_LENGTHS = 64
"""Kernels a process may compile, one for each padded length of queries and keys."""


@dataclass(frozen=True, eq=False)
class FlexSight:
    """A sight, ready for FlexAttention on one device."""

    queries: Tensor
    """Numbers of the queries in sorted order."""
    back: Tensor
    """Where in sorted order each query is."""
    keys: Tensor
    """Numbers of the keys in sorted order."""
    block_mask: BlockMask
    score_mod: Callable[..., Tensor] | None
    """Adds the logarithms of the weights; None where a query sees all it sees equally strongly."""

    @classmethod
    def of(cls, sight: Sight, device: torch.device) -> "FlexSight":
        """Sort the tokens, count the tiles."""
        weights = sight.weights / sight.weights.amax(dim=1, keepdim=True)
        patterns, kinds = torch.unique(weights > 0, dim=0, return_inverse=True)
        queries, keys = kinds.argsort(stable=True), sight.groups.argsort(stable=True)
        visible = _rounded(patterns)
        kind_of = _filled(kinds[queries], visible.shape[0] - 1)
        group_of = _filled(sight.groups[keys], visible.shape[1] - 1)
        tiles = _tiles(kind_of, group_of, visible)
        kind_of, group_of, visible = (one.to(device) for one in (kind_of, group_of, visible))

        def mask_mod(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return visible[kind_of[query], group_of[key]]

        lengths = (len(kind_of), len(group_of))
        partial, partial_at, full, full_at = (one.to(device) for one in tiles)
        block_mask = BlockMask.from_kv_blocks(
            partial, partial_at, full, full_at, BLOCK_SIZE=TILE, mask_mod=mask_mod, seq_lengths=lengths
        )
        score_mod = None if sight.is_hard else _weighing(weights[queries], visible.shape[1], group_of)
        return cls(queries.to(device), queries.argsort().to(device), keys.to(device), block_mask, score_mod)


def attention_by_flex(query: Tensor, key: Tensor, value: Tensor, sight: FlexSight, *, compiled: bool) -> Tensor:
    """Attention of (batch, heads, tokens, channels); equals `dense_attention` up to rounding.

    Args:
        query: what attends.
        key: what it attends to.
        value: what it gets from there.
        sight: prepared for their device.
        compiled: Run the compiled kernel; without it scores of queries x keys are in memory, in the manner of a test.
    """
    query, key, value = (
        _lengthened(one.index_select(2, order))
        for one, order in ((query, sight.queries), (key, sight.keys), (value, sight.keys))
    )
    run: Any = _fused if compiled else flex_attention
    mixed: Tensor = run(query, key, value, score_mod=sight.score_mod, block_mask=sight.block_mask)
    return mixed.index_select(2, sight.back)


def _fused(
    query: Tensor, key: Tensor, value: Tensor, *, score_mod: Callable[..., Tensor] | None, block_mask: BlockMask
) -> Tensor:
    """The compiled kernel: one a length. Past its limit the compiler would go on without it and hold all scores."""
    with torch._dynamo.config.patch(  # noqa: SLF001 - its only door
        recompile_limit=_LENGTHS, accumulated_recompile_limit=4 * _LENGTHS, fail_on_recompile_limit_hit=True
    ):
        return _compiled()(query, key, value, score_mod=score_mod, block_mask=block_mask)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """FlexAttention compiled, once a process."""
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)
    return compiled


def _rounded(patterns: Tensor) -> Tensor:
    """Kinds x groups in sizes that are powers of two, the last of each for the tokens that fill a tile up."""
    rows, columns = (max(16, 1 << length.bit_length()) for length in patterns.shape)
    return functional.pad(patterns, (0, columns - patterns.shape[1], 0, rows - patterns.shape[0]))


def _filled(kinds: Tensor, filler: int) -> Tensor:
    return functional.pad(kinds, (0, -len(kinds) % TILE), value=filler)


def _lengthened(tokens: Tensor) -> Tensor:
    return functional.pad(tokens, (0, 0, 0, -tokens.shape[2] % TILE))


def _tiles(kind_of: Tensor, group_of: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Partial and full tiles as `BlockMask.from_kv_blocks` takes them: counts and numbers, then both of the full ones."""
    kinds = functional.one_hot(kind_of.reshape(-1, TILE), visible.shape[0]).sum(dim=1).double()
    groups = functional.one_hot(group_of.reshape(-1, TILE), visible.shape[1]).sum(dim=1).double()
    seen = kinds @ visible.double() @ groups.T
    full = seen == TILE * TILE
    listed = [_listed((seen > 0) & ~full), _listed(full)]
    return (*listed[0], *listed[1])


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    counts = chosen.sum(dim=1).to(torch.int32)
    numbers = chosen.to(torch.int32).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], numbers[None, None].contiguous()


def _weighing(weights: Tensor, columns: int, group_of: Tensor) -> Callable[..., Tensor]:
    """Adds ``log w`` to a score; where w is 0 the mask decides, so any finite number will do."""
    logs = weights.clamp(min=1e-30).log()
    table = functional.pad(logs, (0, columns - logs.shape[1], 0, -len(logs) % TILE)).to(group_of.device)

    def score_mod(score: Tensor, _batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + table[query, group_of[key]]

    return score_mod
