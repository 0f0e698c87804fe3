"""What is added to the scores of an attention, read for some queries and keys at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from artaug.regional.attention_mask import GroupMask


class Bias(Protocol):
    """Adds to the scores of an attention: minus infinity where a key is hidden."""

    def of_rows(self, rows: Sequence[int]) -> "Bias":
        """The bias of these rows of a batch alone."""

    def of_queries(self, queries: slice) -> "Bias":
        """The bias of these queries alone."""

    def at(self, queries: slice, keys: Tensor) -> Tensor:
        """For some queries, at other keys in every row, (rows, keys): (rows, heads or 1, queries or 1, keys)."""

    def of(self, queries: slice) -> Tensor:
        """For some queries, at all keys: (rows or 1, heads or 1, queries or 1, keys)."""


@dataclass(frozen=True, eq=False)
class MaskBias:
    """A bias that is in memory."""

    mask: Tensor
    """(rows, heads or 1, queries or 1, keys)."""

    def of_rows(self, rows: Sequence[int]) -> "MaskBias":
        return self if len(self.mask) == 1 else MaskBias(self.mask[list(rows)])

    def of_queries(self, queries: slice) -> "MaskBias":
        return MaskBias(self.of(queries))

    def at(self, queries: slice, keys: Tensor) -> Tensor:
        mask = self.of(queries)
        mask = mask.expand(len(keys), -1, -1, -1)
        return mask.gather(3, keys[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1))

    def of(self, queries: slice) -> Tensor:
        return self.mask if self.mask.shape[2] == 1 else self.mask[:, :, queries]


@dataclass(frozen=True, eq=False)
class GroupBias:
    """The logarithms of a group mask's weights, with the largest of each query 0, as splits have them."""

    log_weights: Tensor
    """(rows or 1, queries, groups)."""
    groups: Tensor
    """The group of each key, (rows or 1, keys)."""

    @classmethod
    def of_masks(cls, masks: Sequence[GroupMask], device: torch.device) -> "GroupBias":
        """The bias of a batch's rows, each with its mask, or of all rows if there is one mask."""
        most = max(mask.weights.shape[1] for mask in masks)
        weights = [
            pad(mask.weights / mask.weights.amax(dim=1, keepdim=True), (0, most - mask.weights.shape[1]))
            for mask in masks
        ]
        return cls(torch.stack(weights).log().to(device), torch.stack([mask.groups for mask in masks]).to(device))

    def of_rows(self, rows: Sequence[int]) -> "GroupBias":
        if len(self.groups) == 1:
            return self
        return GroupBias(self.log_weights[list(rows)], self.groups[list(rows)])

    def of_queries(self, queries: slice) -> "GroupBias":
        return GroupBias(self.log_weights[:, queries], self.groups)

    def at(self, queries: slice, keys: Tensor) -> Tensor:
        return self._at(queries, self.groups.expand(len(keys), -1).gather(1, keys))

    def of(self, queries: slice) -> Tensor:
        return self._at(queries, self.groups)

    def _at(self, queries: slice, groups: Tensor) -> Tensor:
        weights = self.log_weights[:, queries].expand(len(groups), -1, -1)
        return weights.gather(2, groups[:, None].expand(-1, weights.shape[1], -1))[:, None]


@dataclass(frozen=True, eq=False)
class WindowBias:
    """The bias at neighbouring keys alone, of which every row may see a part."""

    inner: Bias | None
    start: int
    hidden: Tensor
    """Minus infinity where a row does not see a key of the window, else 0: (rows, 1, 1, keys)."""

    @classmethod
    def of_keys(cls, inner: Bias | None, window: slice, seen: Sequence[slice], device: torch.device) -> "WindowBias":
        """The bias of a window of keys, where each row sees its own part of them."""
        hidden = torch.full((len(seen), window.stop - window.start), -torch.inf)
        for row, part in enumerate(seen):
            hidden[row, part.start - window.start : part.stop - window.start] = 0
        return cls(inner, window.start, hidden[:, None, None].to(device))

    def of_rows(self, rows: Sequence[int]) -> "WindowBias":
        inner = None if self.inner is None else self.inner.of_rows(rows)
        return WindowBias(inner, self.start, self.hidden[list(rows)])

    def of_queries(self, queries: slice) -> "WindowBias":
        return WindowBias(None if self.inner is None else self.inner.of_queries(queries), self.start, self.hidden)

    def at(self, queries: slice, keys: Tensor) -> Tensor:
        hidden = self.hidden.gather(3, keys[:, None, None])
        return hidden if self.inner is None else hidden + self.inner.at(queries, keys + self.start)

    def of(self, queries: slice) -> Tensor:
        if self.inner is None:
            return self.hidden
        return self.hidden + self.inner.of(queries)[..., self.start : self.start + self.hidden.shape[3]]
