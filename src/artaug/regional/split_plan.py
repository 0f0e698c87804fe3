"""Split plans: masked attention as a few plain, unmasked attentions. Exact, and as fast as the plain kernels are.

There are two ways. *Grouped*: queries that attend to the same keys, with equal weights, attend to just those keys in one
plain attention; every query is in one split, and nothing has to be merged. *Merged*: queries attend to one group of keys
after the other, and the results are averaged with weights from their log-sum-exp (see `artaug.regional.attention`); the
weight of a group may differ from query to query.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from artaug.errors import GuideError
from artaug.regional.attention_mask import GroupMask

TokenIndex: TypeAlias = slice | Tensor
"""Which tokens of a sequence: a slice of neighbours, or their numbers in rising order."""

_MAX_GROUPED_SPLITS = 24
"""Above this, one small kernel for each pattern costs more than the merge of a few large ones."""
_MAX_SLICES = 12
"""From this on, one gather by number is cheaper than concatenating slices."""


@dataclass(frozen=True, eq=False)
class AttentionSplit:
    """One plain attention of some queries to some keys."""

    queries: TokenIndex
    keys: tuple[TokenIndex, ...]
    """Runs of keys, concatenated."""
    log_weights: Tensor | None
    """Logarithm of the keys' weight for each query (queries,), or None if it is 1 for all."""
    stage: Literal["only", "first", "merge"]
    """Whether the result is all that these queries attend to, or the first part of it, or has to be merged with the
    result of earlier splits."""

    def to(self, device: torch.device) -> "AttentionSplit":
        """The same split with its numbers on a device."""
        return AttentionSplit(
            self.queries if isinstance(self.queries, slice) else self.queries.to(device),
            tuple(index if isinstance(index, slice) else index.to(device) for index in self.keys),
            None if self.log_weights is None else self.log_weights.to(device),
            self.stage,
        )


def gather(tensor: Tensor, indices: Sequence[TokenIndex]) -> Tensor:
    """Tokens of (batch, heads, tokens, channels), copied only where they are not neighbours."""
    parts = [tensor[:, :, index] if isinstance(index, slice) else tensor.index_select(2, index) for index in indices]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def plan_splits(mask: GroupMask, method: Literal["auto", "grouped", "merged"] = "auto") -> tuple[AttentionSplit, ...]:
    """Plan the splits whose merged result is attention under ``mask``.

    Raises:
        GuideError: if ``method`` is ``"grouped"`` and the mask is not hard: weights need merging.

    >>> import torch
    >>> from artaug.regional.split_plan import plan_splits
    >>> from artaug.regional.attention_mask import GroupMask
    >>> mask = GroupMask(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([0, 0, 1]), (slice(0, 2),))
    >>> len(plan_splits(mask, "grouped")), len(plan_splits(mask, "merged"))
    (2, 2)
    """
    if method == "grouped" and not mask.is_hard:
        raise GuideError(
            "grouped attention cannot follow weights between 0 and 1, which feathered, overlapping or partly covered "
            "tokens have. Use 'merged' (or 'auto'), or hard masks along the token grid."
        )
    drafts: list[_Draft] = []
    # The choice is made for each segment: a prompt attends to few groups and is grouped, while the image, where every
    # token may have weights of its own, is merged.
    for segment in mask.segments:
        weights = mask.weights[segment]
        # The softmax divides a query's common factor out, so the largest weight can be 1: then a group with the largest
        # weight, usually the image itself, needs no log_weights and can share a split with other queries.
        weights = weights / weights.amax(dim=1, keepdim=True)
        candidates: list[list[_Draft]] = []
        if method == "grouped" or (method == "auto" and _is_groupable(weights)):
            candidates.append(_grouped(weights, segment.start, mask.groups))
        if method != "grouped":
            candidates.append(_merged(weights, segment.start, mask.groups))
        cheapest = min(candidates, key=_copy_cost)
        drafts += cheapest
    return _schedule(_join_equal_keys(drafts), len(mask.weights))


@dataclass(frozen=True, eq=False)
class _Draft:
    """A split whose tokens are given by number."""

    queries: Tensor
    keys: Tensor
    log_weights: Tensor | None


def _is_groupable(weights: Tensor) -> bool:
    """Whether grouping can follow these weights, in a number of splits that is worth it."""
    is_hard = ((weights == 0) | (weights == 1)).all()
    return bool(is_hard) and len(torch.unique(weights, dim=0)) <= _MAX_GROUPED_SPLITS


def _grouped(weights: Tensor, start: int, groups: Tensor) -> list[_Draft]:
    """One split for each set of queries with equal rows of weights (queries, groups)."""
    rows, row_of_query = torch.unique(weights, dim=0, return_inverse=True)
    return [
        _Draft((row_of_query == number).nonzero()[:, 0] + start, (row[groups] > 0).nonzero()[:, 0], None)
        for number, row in enumerate(rows)
    ]


def _merged(weights: Tensor, start: int, groups: Tensor) -> list[_Draft]:
    """One split for each set of groups with equal columns of weights (queries, groups), the most queries first."""
    columns, column_of_group = torch.unique(weights, dim=1, return_inverse=True)
    drafts = []
    for number, column in enumerate(columns.T):
        keys, queries = (column_of_group[groups] == number).nonzero()[:, 0], (column > 0).nonzero()[:, 0]
        if len(keys) and len(queries):
            log_weights = None if (column[queries] == 1).all() else column[queries].log()
            drafts.append(_Draft(queries + start, keys, log_weights))
    return sorted(drafts, key=lambda draft: -len(draft.queries))


def _copy_cost(drafts: list[_Draft]) -> int:
    """Tokens that are copied or averaged beside the attention itself.

    The cost model counts memory traffic only. Every plan computes the same scores, one for each visible pair of query
    and key, so plans differ in what surrounds the kernels. Scattered queries are gathered and their results scattered:
    2 tokens each. Scattered keys are gathered, and so are their values: 2. The queries of a split that has to be merged
    read two results and write one: counted as 4.
    """
    cost, started = 0, torch.zeros(0)
    for draft in drafts:
        scattered = not isinstance(_as_slice(draft.queries), slice)
        merges = bool(torch.isin(draft.queries, started).any())
        cost += len(draft.queries) * (2 * scattered + 4 * merges)
        cost += 2 * len(draft.keys) * (not isinstance(_as_slice(draft.keys), slice))
        started = torch.cat([started, draft.queries])
    return cost


def _join_equal_keys(drafts: Sequence[_Draft]) -> list[_Draft]:
    """The drafts with the most queries first; those that attend to the same keys with weight 1 become one.

    So image and plan's prompt, which are planned apart, attend to what both of them see in one large attention.
    """
    queries_of: dict[tuple[int, ...], list[Tensor]] = {}
    weighted: list[_Draft] = []
    for draft in drafts:
        if draft.log_weights is None:
            queries_of.setdefault(tuple(draft.keys.tolist()), []).append(draft.queries)
        else:
            weighted.append(draft)
    joined = [_Draft(torch.cat(parts).sort().values, torch.tensor(keys), None) for keys, parts in queries_of.items()]
    return sorted([*joined, *weighted], key=lambda draft: -len(draft.queries))


def _schedule(drafts: Sequence[_Draft], num_queries: int) -> tuple[AttentionSplit, ...]:
    """The splits in order, each with its stage. A draft with queries of two stages becomes two splits."""
    num_splits, started = torch.zeros(num_queries), torch.zeros(num_queries, dtype=torch.bool)
    for draft in drafts:
        num_splits[draft.queries] += 1
    splits = []
    for draft in drafts:
        is_started = started[draft.queries]
        for queries in (draft.queries[is_started], draft.queries[~is_started]):
            if not len(queries):
                continue
            log_weights = draft.log_weights
            if log_weights is not None:
                log_weights = log_weights[torch.isin(draft.queries, queries)]
            stage: Literal["only", "first", "merge"] = "merge"
            if not started[queries[0]]:
                stage = "only" if (num_splits[queries] == 1).all() else "first"
            splits.append(AttentionSplit(_as_slice(queries), _as_slices(draft.keys), log_weights, stage))
        started[draft.queries] = True
    return tuple(splits)


def _as_slice(tokens: Tensor) -> TokenIndex:
    """Numbers in rising order, as a slice if they are neighbours."""
    first, last = int(tokens[0]), int(tokens[-1])
    return slice(first, last + 1) if last - first + 1 == len(tokens) else tokens


def _as_slices(tokens: Tensor) -> tuple[TokenIndex, ...]:
    """Numbers in rising order as a few slices, or as they are if they are scattered."""
    breaks = ((tokens[1:] - tokens[:-1]) > 1).nonzero()[:, 0] + 1
    if len(breaks) >= _MAX_SLICES:
        return (tokens,)
    return tuple(_as_slice(run) for run in tokens.tensor_split(breaks.tolist()))
