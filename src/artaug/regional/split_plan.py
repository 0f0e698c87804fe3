"""Attention under a sight as a few passes of plain, unmasked attention: exact, and fast wherever plain attention is.

Two ways lead there. *Grouped*: queries that see the same keys, all equally strongly, attend to just those keys in one
pass. *Merged*: queries attend to one group of keys after the other, and the results are averaged by their log-sum-exp
plus the logarithm of the group's weight, which is the same softmax, with weights that may differ from query to query.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from artaug.errors import GuideError
from artaug.regional.attention_mask import Sight

Tokens: TypeAlias = slice | Tensor
"""Which tokens of a sequence: a run of neighbours, or their numbers."""

_MANY_SIGNATURES = 24
"""Above this, one small pass each costs more than a merge of large ones."""
_MANY_RUNS = 12
"""Above this, taking tokens by number is cheaper than slice by slice."""


@dataclass(frozen=True, eq=False)
class Pass:
    """One plain attention of some queries to some keys."""

    queries: Tokens
    keys: tuple[Tokens, ...]
    """Runs of keys, side by side."""
    bias: Tensor | None
    """Logarithm of the weight for each query (queries,), or None for weight 1."""
    stage: Literal["alone", "first", "later"]
    """Whether these queries have this pass only, or this one before the others, or have to be merged with earlier ones."""

    def on(self, device: torch.device) -> "Pass":
        """The same pass with its numbers on a device."""
        return Pass(
            _on(self.queries, device),
            tuple(_on(some, device) for some in self.keys),
            None if self.bias is None else self.bias.to(device),
            self.stage,
        )


def passes(sight: Sight, how: Literal["auto", "grouped", "merged"] = "auto") -> tuple[Pass, ...]:
    """Plan the passes whose merged result is attention under ``sight``.

    Raises:
        GuideError: if ``how`` is ``"grouped"`` and the sight is not hard: weights need merging.

    >>> import torch
    >>> from artaug.regional.split_plan import passes
    >>> from artaug.regional.attention_mask import Sight
    >>> sight = Sight(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([0, 0, 1]), (slice(0, 2),))
    >>> len(passes(sight, "grouped")), len(passes(sight, "merged"))
    (2, 2)
    """
    if how == "grouped" and not sight.is_hard:
        raise GuideError(
            "grouped attention cannot follow weights between 0 and 1, which feathered, overlapping or partly covered "
            "tokens have. Use 'merged' (or 'auto'), or hard masks along the token grid."
        )
    planned: list[_Draft] = []
    for segment in sight.segments:
        weights = sight.weights[segment]
        weights = weights / weights.amax(dim=1, keepdim=True)
        choices: list[list[_Draft]] = []
        if how != "merged" and (how == "grouped" or _few_and_hard(weights)):
            choices.append(_grouped(weights, segment.start, sight.groups))
        if how != "grouped":
            choices.append(_merged(weights, segment.start, sight.groups))
        cheapest = min(choices, key=_moved)
        planned += cheapest
    return _finished(planned, len(sight.weights))


@dataclass(frozen=True, eq=False)
class _Draft:
    """A pass by numbers."""

    queries: Tensor
    keys: Tensor
    bias: Tensor | None


def _few_and_hard(weights: Tensor) -> bool:
    """Whether grouping can follow these weights, in no more passes than are worth it."""
    return bool(((weights == 0) | (weights == 1)).all()) and len(torch.unique(weights, dim=0)) <= _MANY_SIGNATURES


def _grouped(weights: Tensor, start: int, groups: Tensor) -> list[_Draft]:
    """One pass for all queries that see the same."""
    rows, inverse = torch.unique(weights, dim=0, return_inverse=True)
    return [
        _Draft((inverse == number).nonzero()[:, 0] + start, (row[groups] > 0).nonzero()[:, 0], None)
        for number, row in enumerate(rows)
    ]


def _merged(weights: Tensor, start: int, groups: Tensor) -> list[_Draft]:
    """One pass for every set of groups that all these queries weigh alike, that of most queries first."""
    columns, inverse = torch.unique(weights, dim=1, return_inverse=True)
    drafts = []
    for number, column in enumerate(columns.T):
        keys, queries = (inverse[groups] == number).nonzero()[:, 0], (column > 0).nonzero()[:, 0]
        if len(keys) and len(queries):
            bias = None if (column[queries] == 1).all() else column[queries].log()
            drafts.append(_Draft(queries + start, keys, bias))
    return sorted(drafts, key=lambda draft: -len(draft.queries))


def _moved(drafts: list[_Draft]) -> int:
    """Tokens that have to be copied or averaged beside the attention itself, which is the same for every plan."""
    moved, seen = 0, torch.zeros(0)
    for draft in drafts:
        scattered = not isinstance(_compact(draft.queries), slice)
        again = bool(torch.isin(draft.queries, seen).any())
        moved += len(draft.queries) * (2 * scattered + 4 * again)
        moved += 2 * len(draft.keys) * (not isinstance(_compact(draft.keys), slice))
        seen = torch.cat([seen, draft.queries])
    return moved


def _finished(drafts: Sequence[_Draft], count: int) -> tuple[Pass, ...]:
    """The passes in order, those that see the same keys as one; the first of each query before those it is merged with."""
    alike: dict[tuple[int, ...], list[Tensor]] = {}
    passes: list[_Draft] = []
    for draft in drafts:
        if draft.bias is None:
            alike.setdefault(tuple(draft.keys.tolist()), []).append(draft.queries)
        else:
            passes.append(draft)
    whole = [_Draft(torch.cat(queries).sort().values, torch.tensor(keys), None) for keys, queries in alike.items()]
    passes = sorted([*whole, *passes], key=lambda draft: -len(draft.queries))
    times, begun = torch.zeros(count), torch.zeros(count, dtype=torch.bool)
    for draft in passes:
        times[draft.queries] += 1
    finished = []
    for draft in passes:
        for queries in _apart(draft.queries, begun):
            bias = None if draft.bias is None else draft.bias[torch.isin(draft.queries, queries)]
            single = bool((times[queries] == 1).all())
            stage: Literal["alone", "first", "later"] = "later" if begun[queries[0]] else "alone" if single else "first"
            finished.append(Pass(_compact(queries), _runs(draft.keys), bias, stage))
        begun[draft.queries] = True
    return tuple(finished)


def _apart(queries: Tensor, begun: Tensor) -> list[Tensor]:
    """Queries that have had a pass already, and those that have not."""
    return [some for some in (queries[begun[queries]], queries[~begun[queries]]) if len(some)]


def _compact(tokens: Tensor) -> Tokens:
    """Numbers in rising order, as a slice where they are neighbours."""
    first, last = int(tokens[0]), int(tokens[-1])
    return slice(first, last + 1) if last - first + 1 == len(tokens) else tokens


def _runs(tokens: Tensor) -> tuple[Tokens, ...]:
    """Numbers in rising order as a few slices, or as they are where they are scattered."""
    breaks = ((tokens[1:] - tokens[:-1]) > 1).nonzero()[:, 0] + 1
    if len(breaks) >= _MANY_RUNS:
        return (tokens,)
    return tuple(_compact(run) for run in tokens.tensor_split(breaks.tolist()))


def _on(tokens: Tokens, device: torch.device) -> Tokens:
    return tokens if isinstance(tokens, slice) else tokens.to(device)


def taken(tensor: Tensor, where: Sequence[Tokens]) -> Tensor:
    """Tokens of (batch, heads, tokens, channels), copied only where they are not neighbours."""
    parts = [tensor[:, :, some] if isinstance(some, slice) else tensor.index_select(2, some) for some in where]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
