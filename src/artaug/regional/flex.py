"""Attention under a group mask by FlexAttention: one compiled kernel that skips tiles without a visible pair.

FlexAttention works on tiles of 128 x 128 scores. A tile in which no query attends to any key is skipped, a *full* tile,
in which all attend to all, needs no mask, and only the *partial* ones evaluate it for each score. In raster order nearly
every tile of a region is partial, since a row of 128 image tokens crosses the region's border; so queries are sorted by
their pattern of visible groups, and keys by their group, which puts equal ones side by side.

The block mask lists these tiles. It comes from counting how many tokens of each pattern and group a tile holds, and is
never built from a mask of (queries, keys). Rows of a batch whose layouts differ have a block mask each, in one kernel. All
that depends on the layout is in tensors of rounded sizes, so that another layout of about the same size runs the same
kernel.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from artaug._internal.unique_rows import unique_rows
from artaug.regional.attention_costs import TILE
from artaug.regional.attention_mask import GroupMask

_MAX_KERNELS = 64
"""Kernels a process may compile, one for each padded length of queries and keys."""


@dataclass(frozen=True, eq=False)
class FlexMask:
    """Group masks, prepared for FlexAttention on one device: one for each row of a batch, or one for all rows."""

    query_order: Tensor
    """Numbers of the queries in sorted order, (rows, queries)."""
    inverse_query_order: Tensor
    """The place of each query in sorted order, (rows, queries)."""
    key_order: Tensor
    """Numbers of the keys in sorted order, (rows, keys)."""
    block_mask: BlockMask
    score_mod: Callable[..., Tensor] | None
    """Adds ``log w`` to a score; None for hard masks."""

    @classmethod
    def of(cls, masks: Sequence[GroupMask], device: torch.device) -> "FlexMask":
        """Sort the tokens and count the tiles."""
        rows = [_SortedRow.of(mask) for mask in masks]
        sizes = [max(row.visible.shape[axis] for row in rows) for axis in (0, 1)]
        visible = torch.stack([_pad(row.visible, sizes) for row in rows])
        # The tokens that fill up the last tiles have the last class and group, which attend to nothing and to which nothing
        # attends.
        class_of = torch.stack([_pad_to_tiles(row.class_of, sizes[0] - 1) for row in rows])
        group_of = torch.stack([_pad_to_tiles(row.group_of, sizes[1] - 1) for row in rows])
        partial_tiles, full_tiles = _count_tiles(class_of, group_of, visible)
        partial_counts, partial_numbers = (tensor.to(device) for tensor in _tile_lists(partial_tiles))
        full_counts, full_numbers = (tensor.to(device) for tensor in _tile_lists(full_tiles))
        class_of, group_of, visible = class_of.to(device), group_of.to(device), visible.to(device)
        row_of = _row_numbering(len(rows))

        def mask_mod(batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            row = row_of(batch)
            return visible[row, class_of[row, query], group_of[row, key]]

        block_mask = BlockMask.from_kv_blocks(
            partial_counts,
            partial_numbers,
            full_counts,
            full_numbers,
            BLOCK_SIZE=TILE,
            mask_mod=mask_mod,
            seq_lengths=(class_of.shape[1], group_of.shape[1]),
        )
        is_hard = all(mask.is_hard for mask in masks)
        score_mod = None if is_hard else _weighting([row.weights for row in rows], sizes[1], group_of, row_of)
        orders = torch.stack([row.query_order for row in rows]), torch.stack([row.key_order for row in rows])
        return cls(orders[0].to(device), orders[0].argsort().to(device), orders[1].to(device), block_mask, score_mod)

    @property
    def num_tiles(self) -> int:
        """Tiles that the kernel computes, in all rows together."""
        full = self.block_mask.full_kv_num_blocks
        assert full is not None  # noqa: S101 - `of` gave it
        return int(self.block_mask.kv_num_blocks.sum()) + int(full.sum())

    @property
    def tensors(self) -> list[Tensor]:
        """All that it holds in memory, what its functions have closed over as well."""
        values = [*vars(self).values(), *vars(self.block_mask).values()]
        for function in (self.block_mask.mask_mod, self.score_mod):
            values += [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
        return list({id(value): value for value in values if isinstance(value, Tensor)}.values())


@dataclass(frozen=True, eq=False)
class _SortedRow:
    """One mask with its tokens sorted."""

    query_order: Tensor
    key_order: Tensor
    class_of: Tensor
    """The class of each query in sorted order: its pattern of visible groups."""
    group_of: Tensor
    """The group of each key in sorted order."""
    visible: Tensor
    """Which groups each class sees, (classes, groups), with a class and a group more, of False at least."""
    weights: Tensor
    """(queries, groups), in sorted order; the largest of each query is 1."""

    @classmethod
    def of(cls, mask: GroupMask) -> "_SortedRow":
        weights = mask.weights / mask.weights.amax(dim=1, keepdim=True)
        patterns, query_classes = unique_rows(weights > 0)
        query_order, key_order = query_classes.argsort(stable=True), mask.groups.argsort(stable=True)
        return cls(
            query_order,
            key_order,
            query_classes[query_order],
            mask.groups[key_order],
            _pad(patterns, [max(16, 1 << length.bit_length()) for length in patterns.shape]),
            weights[query_order],
        )


def masked_flex_attention(query: Tensor, key: Tensor, value: Tensor, mask: FlexMask, *, compiled: bool) -> Tensor:
    """Attention of (batch, heads, tokens, channels); equals `dense_attention` up to rounding.

    Args:
        query: (batch, heads, queries, channels).
        key: (batch, heads, keys, channels).
        value: like ``key``.
        mask: prepared for their device, for as many rows or for one.
        compiled: run the compiled kernel; without it the scores of (queries, keys) are in memory, which is for tests.
    """
    padding = [-tokens.shape[2] + _padded_length(tokens.shape[2]) for tokens in (query, key, value)]
    orders = (mask.query_order, mask.key_order, mask.key_order)
    query, key, value = (
        functional.pad(_in_order(tokens, order), (0, 0, 0, more))
        for tokens, order, more in zip((query, key, value), orders, padding, strict=True)
    )
    attend: Any = _compiled_flex_attention if compiled else flex_attention
    out: Tensor = attend(query, key, value, score_mod=mask.score_mod, block_mask=mask.block_mask)
    return _in_order(out, mask.inverse_query_order)


def _in_order(tokens: Tensor, order: Tensor) -> Tensor:
    """Tokens (batch, heads, tokens, channels) by number; ``order`` is (rows, numbers)."""
    if len(order) == 1:
        return tokens.index_select(2, order[0])
    return torch.take_along_dim(tokens, order[:, None, :, None], dim=2)


def _row_numbering(rows: int) -> Callable[[Tensor], Tensor]:
    """The row of tables that a row of the batch reads: its own, or the only one."""
    return (lambda batch: batch) if rows > 1 else (lambda batch: 0 * batch)


def _compiled_flex_attention(
    query: Tensor, key: Tensor, value: Tensor, *, score_mod: Callable[..., Tensor] | None, block_mask: BlockMask
) -> Tensor:
    """One kernel for each length. Past its limit the compiler would run without one and hold all scores: fail there."""
    with (
        torch.compiler.set_stance("default"),  # the model around it may run uncompiled
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


def _pad(patterns: Tensor, sizes: Sequence[int]) -> Tensor:
    """Patterns (classes, groups) with more rows and columns, of False."""
    return functional.pad(patterns, (0, sizes[1] - patterns.shape[1], 0, sizes[0] - patterns.shape[0]))


def _pad_to_tiles(numbers: Tensor, padding: int) -> Tensor:
    return functional.pad(numbers, (0, _padded_length(len(numbers)) - len(numbers)), value=padding)


def _padded_length(length: int) -> int:
    """The next length that has a kernel: whole tiles, and at most eight lengths between a power of two and the next."""
    # Prompts differ in length, and every length is compiled for. The tiles between cost nothing: all of them are skipped.
    step = max(TILE, (1 << length.bit_length()) // 16)
    return -(-length // step) * step


def _count_tiles(class_of: Tensor, group_of: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Which tiles are partial and which are full: two of bool, (rows, query tiles, key tiles)."""
    # A tile's visible pairs are sum over classes c and groups g of n_c m_g visible(c, g), with n_c of its queries in c
    # and m_g of its keys in g: at most 128 x 128, exact in float32. So two small histograms decide, and never the
    # 128 x 128 pairs.
    class_counts, group_counts = (
        functional.one_hot(rearrange(numbers, "rows (tiles token) -> rows tiles token", token=TILE), count)
        .sum(dim=2)
        .float()
        for numbers, count in ((class_of, visible.shape[1]), (group_of, visible.shape[2]))
    )
    visible_pairs = class_counts @ visible.float() @ group_counts.mT
    full = visible_pairs == TILE * TILE
    return (visible_pairs > 0) & ~full, full


def _tile_lists(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Tiles as `BlockMask.from_kv_blocks` takes them: how many each row has, and their numbers ahead of all others."""
    counts = tiles.sum(dim=-1).to(torch.int32)
    numbers = tiles.to(torch.int32).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return counts[:, None], numbers[:, None].contiguous()


def _weighting(
    weights: Sequence[Tensor], columns: int, group_of: Tensor, row_of: Callable[[Tensor], Tensor]
) -> Callable[..., Tensor]:
    """Adds ``log w`` to a score. Where w is 0 the mask hides the pair, so that any finite number will do."""
    logarithms = [row.clamp(min=1e-30).log() for row in weights]
    more = _padded_length(len(logarithms[0])) - len(logarithms[0])
    table = torch.stack([functional.pad(row, (0, columns - row.shape[1], 0, more)) for row in logarithms])
    table = table.to(group_of.device)

    def score_mod(score: Tensor, batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = row_of(batch)
        return score + table[row, query, group_of[row, key]]

    return score_mod
