"""Split plans: masked attention as a few large attentions, most of them unmasked. Exact, and as fast as the kernels are.

There are two ways. *Grouped*: queries that attend to the same keys, with equal weights, attend to just those keys in one
plain attention; every query is in one split, and nothing has to be merged. *Merged*: queries attend to one set of keys
after the other, and the results are averaged with weights from their log-sum-exp (see `artaug.regional.attention`). What all
queries see alike is a plain attention then. The rest is one for each group of keys, or a *strip*: one attention with a mask
of these keys only, a few hundred of them, for all groups and all rows of a batch at once, however their layouts differ.

Every choice between them is made by its price, see `artaug.regional.attention_costs`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from artaug._internal.unique_rows import unique_rows
from artaug.errors import GuideError
from artaug.regional.attention_mask import GroupMask
from artaug.regional.splits import AttentionSplit, Price, SplitSize, SplitStage, as_slice, as_slices

_MAX_GROUPED_SPLITS = 24
"""Above this, one small kernel for each pattern costs more than the merge of a few large ones."""
_MIN_WEIGHTED_KEYS = 64
"""Keys of one group from which on a strip may leave them to an attention of their own, averaged with a weight a query."""


@dataclass(frozen=True, eq=False)
class SplitPlan:
    """Splits whose merged result is attention under masks, before their biases are in memory."""

    rows: tuple["_Row", ...]
    """One for each row of the batch, or one for all."""
    drafts: tuple["_Draft", ...]

    @property
    def sizes(self) -> list[SplitSize]:
        """What the price depends on, of each split."""
        return [draft.size for draft in self.drafts]

    @property
    def mask_numel(self) -> int:
        """Numbers in the biases."""
        masked = sum(len(draft.queries) * len(draft.keys) for draft in self.drafts if draft.is_masked)
        return masked * len(self.rows)

    def splits(self, device: torch.device, dtype: torch.dtype) -> tuple[AttentionSplit, ...]:
        """The splits, ready to be computed on tokens of a device and type."""
        return tuple(draft.split(self.rows).to(device, dtype) for draft in self.drafts)


def plan_splits(
    masks: Sequence[GroupMask], method: Literal["auto", "grouped", "merged", "dense"], price: Price
) -> SplitPlan:
    """Plan the splits whose merged result is attention under ``masks``, at the least price.

    Args:
        masks: one for each row of the batch, or one for all rows alike.
        method: ``"grouped"`` or ``"merged"``, for all queries; ``"auto"`` for either, or both for different queries; ``"dense"``
            for one split with the whole mask as its bias.
        price: of splits.

    Raises:
        GuideError: if ``method`` is ``"grouped"`` and a mask is not hard, since weights need merging, or the masks differ,
            since queries are grouped in one layout.

    >>> import torch
    >>> from artaug.regional.split_plan import plan_splits
    >>> from artaug.regional.attention_mask import GroupMask
    >>> mask = GroupMask(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([0, 0, 1]), (slice(0, 2),))
    >>> [size.stage for size in plan_splits([mask], "grouped", len).sizes]
    ['only', 'only']
    """
    masks = tuple(masks)
    if method == "grouped" and not all(mask.is_hard for mask in masks):
        raise GuideError(
            "grouped attention cannot follow weights between 0 and 1, which feathered, overlapping or partly covered "
            "tokens have. Use 'merged' (or 'auto'), or hard masks along the token grid."
        )
    if method == "grouped" and len(masks) > 1:
        raise GuideError(f"grouped attention is planned for one layout at a time, received {len(masks)} that differ.")
    rows = tuple(_Row.of(mask) for mask in masks)
    if method == "dense":
        all_queries, all_keys = torch.arange(len(masks[0].weights)), torch.arange(len(masks[0].groups))
        return SplitPlan(rows, (_Draft(all_queries, all_keys, is_masked=True),))
    planner = _Planner(rows, method, price)
    # Small segments (prompts) are planned one by one, or together, where rows that differ leave no other way.
    partitions = _partitions(masks) if method != "grouped" else [[(segment,) for segment in masks[0].segments]]
    options = [[draft for block in partition for draft in planner.cheapest(block)] for partition in partitions]
    plans = [_schedule(_join_equal_keys(drafts)) for drafts in options]
    return SplitPlan(rows, tuple(min(plans, key=lambda drafts: price([draft.size for draft in drafts]))))


@dataclass(frozen=True, eq=False)
class _Row:
    """The mask of one row of a batch, with the largest weight of each query 1."""

    weights: Tensor
    """(queries, groups)."""
    groups: Tensor
    """(keys,)."""

    @classmethod
    def of(cls, mask: GroupMask) -> "_Row":
        # The softmax divides a query's common factor out. A group with the largest weight, usually the image itself, then
        # needs no log_weights and can share a split with other queries.
        return cls(mask.weights / mask.weights.amax(dim=1, keepdim=True), mask.groups)

    @cached_property
    def patterns(self) -> tuple[Tensor, Tensor]:
        """The different weights that queries give to the groups, (patterns, groups), and which of them each query gives."""
        return unique_rows(self.weights)

    def of_queries(self, queries: Tensor) -> "_Row":
        return _Row(self.weights[queries], self.groups)


_Block: TypeAlias = tuple[slice, ...]
"""Queries that are planned together."""


def _partitions(masks: Sequence[GroupMask]) -> list[list[_Block]]:
    """Ways to part the queries into blocks: all segments apart where rows agree, or the small ones together."""
    apart = [segment for segment in masks[0].segments if all(segment in mask.segments for mask in masks)]
    by_size = sorted(apart, key=lambda segment: segment.start - segment.stop)
    partitions: list[list[_Block]] = []
    for kept in (apart, by_size[:2], by_size[:1]):
        rest = _complement(kept, len(masks[0].weights))
        blocks = [*((segment,) for segment in kept), *([rest] if rest else [])]
        if blocks not in partitions:
            partitions.append(blocks)
    return partitions


def _complement(segments: Sequence[slice], count: int) -> _Block:
    """The tokens that are in none of the segments."""
    is_free = torch.ones(count, dtype=torch.bool)
    for segment in segments:
        is_free[segment] = False
    free = is_free.nonzero()[:, 0]
    breaks = ((free[1:] - free[:-1]) > 1).nonzero()[:, 0] + 1
    runs = free.tensor_split(breaks.tolist()) if len(free) else ()
    return tuple(slice(int(run[0]), int(run[-1]) + 1) for run in runs)


@dataclass(frozen=True, eq=False)
class _Draft:
    """A split whose tokens are given by number."""

    queries: Tensor
    keys: Tensor
    log_weights: Tensor | None = None
    """(rows, queries)."""
    is_masked: bool = False
    """Whether the keys' weights differ from key to key, and make a bias."""
    stage: SplitStage = "only"

    @property
    def size(self) -> SplitSize:
        keys = as_slices(self.keys)
        return SplitSize(
            queries=len(self.queries),
            keys=len(self.keys),
            gathers_queries=not isinstance(as_slice(self.queries), slice),
            gathers_keys=len(keys) > 1 or not isinstance(keys[0], slice),
            is_masked=self.is_masked,
            stage=self.stage,
        )

    def split(self, rows: Sequence[_Row]) -> AttentionSplit:
        """The split itself, with its bias in memory."""
        log_weights, bias = self.log_weights, None
        if self.is_masked:
            bias = torch.stack([row.weights[self.queries].log()[:, row.groups[self.keys]] for row in rows])
            hides_all = (bias == -torch.inf).all(dim=-1)  # (rows, queries)
            if hides_all.any():  # a softmax over nothing: plain here, with weight 0 in the merge
                bias[hides_all] = 0
                hidden = torch.where(hides_all, -torch.inf, 0.0)
                log_weights = hidden if log_weights is None else log_weights + hidden
        return AttentionSplit(
            as_slice(self.queries),
            as_slices(self.keys),
            self.stage,
            None if log_weights is None else log_weights[:, None],
            None if bias is None else bias[:, None],
        )


class _Planner:
    """Plans blocks of queries, each at the least price."""

    def __init__(self, rows: Sequence[_Row], method: Literal["auto", "grouped", "merged"], price: Price) -> None:
        self._rows = rows
        self._method = method
        self._price = price
        self._planned: dict[tuple[tuple[int, int], ...], list[_Draft]] = {}

    def cheapest(self, block: _Block) -> list[_Draft]:
        """The cheapest drafts for the queries of a block."""
        key = tuple((part.start, part.stop) for part in block)  # slices can be keys from Python 3.12 on
        if key not in self._planned:
            queries = torch.cat([torch.arange(*bounds) for bounds in key])
            self._planned[key] = min(self._candidates(queries), key=self._price_of)
        return self._planned[key]

    def _price_of(self, drafts: Sequence[_Draft]) -> float:
        return self._price([draft.size for draft in _schedule(drafts)])

    def _candidates(self, queries: Tensor) -> Iterable[list[_Draft]]:
        rows = [row.of_queries(queries) for row in self._rows]
        if len(rows) == 1 and (self._method == "grouped" or (self._method == "auto" and _is_groupable(rows[0]))):
            yield _grouped(queries, rows[0])
        if len(rows) == 1 and self._method != "grouped":
            yield _merged(queries, rows[0])
        if self._method != "grouped":
            yield from _with_strips(queries, rows)


def _is_groupable(row: _Row) -> bool:
    """Whether grouping can follow these weights, in a number of splits that is worth it."""
    is_hard = ((row.weights == 0) | (row.weights == 1)).all()
    return bool(is_hard) and len(row.patterns[0]) <= _MAX_GROUPED_SPLITS


def _grouped(queries: Tensor, row: _Row) -> list[_Draft]:
    """One split for each set of queries with equal weights of all groups."""
    patterns, pattern_of_query = row.patterns
    return [
        _Draft(queries[pattern_of_query == number], (pattern[row.groups] > 0).nonzero()[:, 0])
        for number, pattern in enumerate(patterns)
    ]


def _merged(queries: Tensor, row: _Row) -> list[_Draft]:
    """One split for each set of groups that all queries weigh alike, the most queries first."""
    columns, column_of_group = unique_rows(row.weights.T)
    drafts = []
    for number, column in enumerate(columns):
        keys, seeing = (column_of_group[row.groups] == number).nonzero()[:, 0], (column > 0).nonzero()[:, 0]
        if len(keys) and len(seeing):
            log_weights = None if (column[seeing] == 1).all() else column[seeing].log()[None]
            drafts.append(_Draft(queries[seeing], keys, log_weights))
    return sorted(drafts, key=lambda draft: -len(draft.queries))


def _with_strips(queries: Tensor, rows: Sequence[_Row]) -> Iterable[list[_Draft]]:
    """A plain attention to what these queries see alike in all rows, and a strip for the rest, in a few variants."""
    is_open = torch.stack([(row.weights == 1).all(dim=0)[row.groups] for row in rows]).all(dim=0)
    is_seen = torch.stack([(row.weights > 0).any(dim=0)[row.groups] for row in rows]).any(dim=0)
    open_keys, rest = is_open.nonzero()[:, 0], (is_seen & ~is_open).nonzero()[:, 0]
    if not len(open_keys):
        yield [_Draft(queries, rest, is_masked=True)]
        return
    plain = _Draft(queries, open_keys)
    if not len(rest):
        yield [plain]
        return
    yield [plain, _Draft(queries, rest, is_masked=True)]
    weighted, others = _large_groups(queries, rest, rows)
    if not len(others):
        yield [plain, *weighted]
        return
    if weighted:
        yield [plain, *weighted, _Draft(queries, others, is_masked=True)]
    sees_others = torch.stack([(row.weights[:, row.groups[others].unique()] > 0).any(dim=1) for row in rows]).any(dim=0)
    if not sees_others.all():
        yield [plain, *weighted, _Draft(queries[sees_others], others, is_masked=True)]


def _large_groups(queries: Tensor, keys: Tensor, rows: Sequence[_Row]) -> tuple[list[_Draft], Tensor]:
    """Splits of those keys that are one large group in every row, and the keys that are left."""
    groups, set_of_key = unique_rows(torch.stack([row.groups[keys] for row in rows], dim=1))
    sizes = set_of_key.bincount()
    is_large = sizes >= _MIN_WEIGHTED_KEYS
    drafts = []
    for number in is_large.nonzero()[:, 0].tolist():
        columns = torch.stack([row.weights[:, group] for row, group in zip(rows, groups[number].tolist(), strict=True)])
        drafts.append(_Draft(queries, keys[set_of_key == number], columns.log()))
    return drafts, keys[~is_large[set_of_key]]


def _join_equal_keys(drafts: Sequence[_Draft]) -> list[_Draft]:
    """The drafts with the most queries first; those that attend to the same keys with weight 1 become one.

    So image and plan's prompt, which are planned apart, attend to what both of them see in one large attention.
    """
    joined: dict[bytes, _Draft] = {}
    others: list[_Draft] = []
    for draft in drafts:
        if draft.log_weights is not None or draft.is_masked:
            others.append(draft)
            continue
        key = draft.keys.numpy().tobytes()
        before = [joined[key].queries] if key in joined else []
        joined[key] = _Draft(torch.cat([*before, draft.queries]).sort().values, draft.keys)
    # What is plain comes first among equals: a strip may hide all its keys from a query, which no first split can.
    return sorted([*joined.values(), *others], key=lambda draft: -len(draft.queries))


def _schedule(drafts: Sequence[_Draft]) -> list[_Draft]:
    """The drafts in order, each with its stage. One with queries of two stages becomes two."""
    num_queries = 1 + max(int(draft.queries[-1]) for draft in drafts)
    num_splits, started = torch.zeros(num_queries), torch.zeros(num_queries, dtype=torch.bool)
    for draft in drafts:
        num_splits[draft.queries] += 1
    scheduled = []
    for draft in drafts:
        is_started = started[draft.queries]
        for part in (is_started, ~is_started):
            if not part.any():
                continue
            queries = draft.queries[part]
            log_weights = None if draft.log_weights is None else draft.log_weights[:, part]
            stage: SplitStage = "merge"
            if not started[queries[0]]:
                stage = "only" if (num_splits[queries] == 1).all() else "first"
            scheduled.append(_Draft(queries, draft.keys, log_weights, draft.is_masked, stage))
        started[draft.queries] = True
    return scheduled
