"""Attention under a group mask by FlexAttention: one compiled kernel that skips tiles without a visible pair.

FlexAttention works on tiles of 128 x 128 scores. A tile in which no query attends to any key is skipped, a *full* tile,
in which all attend to all, needs no mask, and only the *partial* ones evaluate it for each score. In raster order nearly
every tile of a region is partial, since a row of 128 image tokens crosses the region's border; so queries are sorted by
their pattern of visible groups, and keys by their group, which puts equal ones side by side.

The block mask lists these tiles. It comes from counting how many tokens of each pattern and group a tile holds, and is
never built from a mask of (queries, keys). All that depends on the layout is in tensors of rounded sizes, so that
another layout of about the same size runs the same kernel.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from artaug.regional.attention_mask import GroupMask

TILE = 128
_MAX_KERNELS = 64
"""Kernels a process may compile, one for each padded length of queries and keys."""


@dataclass(frozen=True, eq=False)
class FlexMask:
    """A group mask, prepared for FlexAttention on one device."""

    query_order: Tensor
    """Numbers of the queries in sorted order."""
    inverse_query_order: Tensor
    """The place of each query in sorted order."""
    key_order: Tensor
    """Numbers of the keys in sorted order."""
    block_mask: BlockMask
    score_mod: Callable[..., Tensor] | None
    """Adds ``log w`` to a score; None for a hard mask."""

    @classmethod
    def of(cls, mask: GroupMask, device: torch.device) -> "FlexMask":
        """Sort the tokens and count the tiles."""
        weights = mask.weights / mask.weights.amax(dim=1, keepdim=True)
        # A query's class: its pattern of visible groups. patterns is (classes, groups).
        patterns, query_classes = torch.unique(weights > 0, dim=0, return_inverse=True)
        query_order, key_order = query_classes.argsort(stable=True), mask.groups.argsort(stable=True)
        visible = _pad_to_powers_of_two(patterns)
        # The tokens that fill up the last tile have the last class and group, which attend to nothing and to which nothing
        # attends.
        class_of = _pad_to_tiles(query_classes[query_order], visible.shape[0] - 1)
        group_of = _pad_to_tiles(mask.groups[key_order], visible.shape[1] - 1)
        partial_tiles, full_tiles = _count_tiles(class_of, group_of, visible)
        class_of, group_of, visible = class_of.to(device), group_of.to(device), visible.to(device)

        def mask_mod(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return visible[class_of[query], group_of[key]]

        partial_counts, partial_numbers = (tensor.to(device) for tensor in _tile_lists(partial_tiles))
        full_counts, full_numbers = (tensor.to(device) for tensor in _tile_lists(full_tiles))
        block_mask = BlockMask.from_kv_blocks(
            partial_counts,
            partial_numbers,
            full_counts,
            full_numbers,
            BLOCK_SIZE=TILE,
            mask_mod=mask_mod,
            seq_lengths=(len(class_of), len(group_of)),
        )
        score_mod = None if mask.is_hard else _weighting(weights[query_order], visible.shape[1], group_of)
        orders = query_order.to(device), query_order.argsort().to(device), key_order.to(device)
        return cls(*orders, block_mask, score_mod)


def masked_flex_attention(query: Tensor, key: Tensor, value: Tensor, mask: FlexMask, *, compiled: bool) -> Tensor:
    """Attention of (batch, heads, tokens, channels); equals `dense_attention` up to rounding.

    Args:
        query: (batch, heads, queries, channels).
        key: (batch, heads, keys, channels).
        value: like ``key``.
        mask: prepared for their device.
        compiled: run the compiled kernel; without it the scores of (queries, keys) are in memory, which is for tests.
    """
    query, key, value = (
        functional.pad(tokens.index_select(2, order), (0, 0, 0, -len(order) % TILE))
        for tokens, order in ((query, mask.query_order), (key, mask.key_order), (value, mask.key_order))
    )
    attend: Any = _compiled_flex_attention if compiled else flex_attention
    out: Tensor = attend(query, key, value, score_mod=mask.score_mod, block_mask=mask.block_mask)
    return out.index_select(2, mask.inverse_query_order)


def _compiled_flex_attention(
    query: Tensor, key: Tensor, value: Tensor, *, score_mod: Callable[..., Tensor] | None, block_mask: BlockMask
) -> Tensor:
    """One kernel for each length. Past its limit the compiler would run without one and hold all scores: fail there."""
    with (
        torch.compiler.set_stance("default"),  # the model around it runs uncompiled
        torch._dynamo.config.patch(  # noqa: SLF001 - there is no public setting
            recompile_limit=_MAX_KERNELS, accumulated_recompile_limit=4 * _MAX_KERNELS, fail_on_recompile_limit_hit=True
        ),
    ):
        return _compile()(query, key, value, score_mod=score_mod, block_mask=block_mask)


@functools.cache
def _compile() -> Callable[..., Tensor]:
    """FlexAttention compiled, once a process."""
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)
    return compiled


def _pad_to_powers_of_two(patterns: Tensor) -> Tensor:
    """Patterns (classes, groups) in sizes that are powers of two, with at least one row and column more, of False."""
    rows, columns = (max(16, 1 << length.bit_length()) for length in patterns.shape)
    return functional.pad(patterns, (0, columns - patterns.shape[1], 0, rows - patterns.shape[0]))


def _pad_to_tiles(numbers: Tensor, padding: int) -> Tensor:
    return functional.pad(numbers, (0, -len(numbers) % TILE), value=padding)


def _count_tiles(class_of: Tensor, group_of: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Which tiles are partial and which are full: two of bool, (query tiles, key tiles)."""
    # A tile's visible pairs are sum over classes c and groups g of n_c m_g visible(c, g), with n_c of its queries in c
    # and m_g of its keys in g: at most 128 x 128, exact in float32. So two small histograms decide, and never the
    # 128 x 128 pairs.
    class_counts, group_counts = (
        functional.one_hot(rearrange(numbers, "(tiles token) -> tiles token", token=TILE), count).sum(dim=1).float()
        for numbers, count in ((class_of, visible.shape[0]), (group_of, visible.shape[1]))
    )
    visible_pairs = class_counts @ visible.float() @ group_counts.T
    full = visible_pairs == TILE * TILE
    return (visible_pairs > 0) & ~full, full


def _tile_lists(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Tiles as `BlockMask.from_kv_blocks` takes them: how many each row has, and their numbers ahead of all others."""
    counts = tiles.sum(dim=1).to(torch.int32)
    numbers = tiles.to(torch.int32).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], numbers[None, None].contiguous()


def _weighting(weights: Tensor, columns: int, group_of: Tensor) -> Callable[..., Tensor]:
    """Adds ``log w`` to a score. Where w is 0 the mask hides the pair, so that any finite number will do."""
    log_weights = weights.clamp(min=1e-30).log()
    padding = (0, columns - log_weights.shape[1], 0, -len(log_weights) % TILE)
    table = functional.pad(log_weights, padding).to(group_of.device)

    def score_mod(score: Tensor, _batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + table[query, group_of[key]]

    return score_mod
