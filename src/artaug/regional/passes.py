"""Attention under a sight as a few passes of plain, unmasked attention: exact, and fast wherever plain attention is.

Two ways lead there. *Grouped*: queries that see the same keys, all equally strongly, attend to just those keys in one
pass. *Merged*: queries attend to one group of keys after the other, and the results are averaged by their log-sum-exp
plus the logarithm of the group's weight, which is the same softmax, with weights that may differ from query to query.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from artaug.errors import GuideError
from artaug.regional.sight import Sight

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
    alone: bool
    """Whether these queries have no other pass, so that nothing has to be merged."""

    def on(self, device: torch.device) -> "Pass":
        """The same pass with its numbers on a device."""
        return Pass(
            _on(self.queries, device),
            tuple(_on(some, device) for some in self.keys),
            None if self.bias is None else self.bias.to(device),
            self.alone,
        )


def passes(sight: Sight, how: Literal["auto", "grouped", "merged"] = "auto") -> tuple[Pass, ...]:
    """Plan the passes whose merged result is attention under ``sight``.

    Raises:
        GuideError: if ``how`` is ``"grouped"`` and the sight is not hard: weights need merging.

    >>> import torch
    >>> from artaug.regional.passes import passes
    >>> from artaug.regional.sight import Sight
    >>> sight = Sight(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([0, 0, 1]), (slice(0, 2),))
    >>> len(passes(sight, "grouped")), len(passes(sight, "merged"))
    (2, 2)
    """
    if how == "grouped" and not sight.is_hard:
        raise GuideError(
            "grouped attention cannot follow weights between 0 and 1, which feathered, overlapping or partly covered "
            "tokens have. Use 'merged' (or 'auto'), or hard masks along the token grid."
        )
    planned: list[Pass] = []
    for segment in sight.segments:
        weights = sight.weights[segment]
        weights = weights / weights.amax(dim=1, keepdim=True)
        rows, inverse = torch.unique(weights, dim=0, return_inverse=True)
        hard = bool(((rows == 0) | (rows == 1)).all())
        groupable = hard and (how == "grouped" or len(rows) <= _MANY_SIGNATURES)
        merging = how == "merged" and len(rows) > 1
        if groupable and not merging:
            planned += _grouped(rows, inverse, segment.start, sight.groups)
        else:
            planned += _merged(weights, segment.start, sight.groups)
    return tuple(planned)


def _grouped(rows: Tensor, inverse: Tensor, start: int, groups: Tensor) -> Iterator[Pass]:
    for number, row in enumerate(rows):
        queries = (inverse == number).nonzero()[:, 0] + start
        yield Pass(_compact(queries), _runs(row[groups] > 0), None, alone=True)


def _merged(weights: Tensor, start: int, groups: Tensor) -> list[Pass]:
    """One pass for every set of groups that all these queries weigh alike."""
    held = torch.bincount(groups, minlength=weights.shape[1]) > 0
    columns, inverse = torch.unique(weights, dim=1, return_inverse=True)
    parts = []
    for number, column in enumerate(columns.T):
        keys = (inverse[groups] == number) & held[groups]
        seeing = (column > 0).nonzero()[:, 0]
        if len(seeing) and keys.any():
            parts.append((seeing, keys, column[seeing]))
    parts.sort(key=lambda part: -len(part[0]))  # the pass that most queries share goes first
    times = torch.zeros(len(weights))
    for seeing, _, _ in parts:
        times[seeing] += 1
    return [
        Pass(
            _compact(seeing + start),
            _runs(keys),
            None if (column == 1).all() else column.log(),
            alone=bool((times[seeing] == 1).all() and (column == 1).all()),
        )
        for seeing, keys, column in parts
    ]


def _compact(tokens: Tensor) -> Tokens:
    """Numbers in rising order, as a slice where they are neighbours."""
    first, last = int(tokens[0]), int(tokens[-1])
    return slice(first, last + 1) if last - first + 1 == len(tokens) else tokens


def _runs(chosen: Tensor) -> tuple[Tokens, ...]:
    """The chosen tokens as a few slices, or by number where they are scattered."""
    tokens = chosen.nonzero()[:, 0]
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
