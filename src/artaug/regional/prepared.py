"""Attention under the masks of a batch's rows, prepared once for a layout: the choice of a method, and what it needs."""

import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from artaug.errors import GuideError
from artaug.regional.attention import split_attention, split_attention_with_lse, supports_merging
from artaug.regional.attention_costs import AttentionCosts, AttentionShape, costs_on
from artaug.regional.attention_mask import GroupMask
from artaug.regional.split_plan import SplitPlan, plan_splits
from artaug.regional.splits import SplitSize

_log = logging.getLogger(__name__)

Method: TypeAlias = Literal["auto", "grouped", "merged", "flex", "dense"]

_MAX_MASK_BYTES = 128 << 20
"""What ``auto`` may hold as masks of queries and keys, for one layout."""


@dataclass(frozen=True, eq=False)
class PreparedAttention:
    """Attention of one layout, ready to be called."""

    attention: Callable[[Tensor, Tensor, Tensor], Tensor]
    method: str
    """How it is computed: a `Method`; ``"apart"`` where rows of different layouts are computed one after the other."""
    tensors: Sequence[Tensor]
    """What it holds in memory."""
    with_lse: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    """The same with the log-sum-exp of each query (see `split_attention_with_lse`); None where a kernel returns none."""

    @property
    def num_bytes(self) -> int:
        """The bytes of its tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)


@dataclass(frozen=True, eq=False)
class AttentionOption:
    """A way to compute attention, and its price."""

    method: str
    seconds: float
    mask_bytes: int
    prepare: Callable[[], PreparedAttention]


def prepare_attention(
    masks: Sequence[GroupMask], rows: Sequence[Sequence[int]], method: Method, shape: AttentionShape
) -> PreparedAttention:
    """Attention under masks, by the cheapest of the ways that ``method`` allows.

    Args:
        masks: of the different layouts in a batch, all of the same length.
        rows: the numbers of the batch's rows that each layout has.
        method: see `RegionalAttention`.
        shape: of the tokens.

    Raises:
        GuideError: if the method cannot do it.
    """
    options = list(attention_options(masks, rows, method, shape))
    if method == "auto":
        options = [option for option in options if option.mask_bytes <= _MAX_MASK_BYTES] or options
    cheapest = min(options, key=lambda option: option.seconds)
    if (method, cheapest.method) == ("auto", "flex"):
        _tell_of_compilation(costs_on(shape.device, shape.dtype).flex_compile)
    return cheapest.prepare()


def attention_options(
    masks: Sequence[GroupMask], rows: Sequence[Sequence[int]], method: Method, shape: AttentionShape
) -> Iterator[AttentionOption]:
    """The ways that a method allows."""
    costs, merges = costs_on(shape.device, shape.dtype), supports_merging(shape.device)
    layout_of = {row: mask for mask, numbers in zip(masks, rows, strict=True) for row in numbers}
    by_row = masks if len(masks) == 1 else [layout_of[row] for row in range(shape.rows)]
    is_hard = all(mask.is_hard for mask in masks)
    if method == "merged" and not merges:
        raise GuideError(
            f"attention on {shape.device} does not return its log-sum-exp, so splits cannot be merged there. "
            "Use method='auto' or 'dense'."
        )
    together = [_split_option(by_row, name, shape, costs) for name in _together(method, can_merge=merges)]
    yield from together
    if method == "grouped" or (method == "auto" and is_hard and not merges):
        yield _apart_option(masks, rows, "grouped", shape, costs)
    elif len(masks) > 1 and merges and method in {"auto", "merged"}:
        # Planning takes a while for each layout, and need not begin where even the least price would be too high.
        least = sum(_least_seconds(mask, len(numbers), shape, costs) for mask, numbers in zip(masks, rows, strict=True))
        if least < min(option.seconds for option in together):
            yield _apart_option(masks, rows, method, shape, costs)
    if method == "flex" or (method == "auto" and _flex_can_win(shape)):
        yield _flex_option(by_row, shape, costs)


def _together(method: Method, *, can_merge: bool) -> list[Method]:
    """The ways in splits that all rows share, which a method allows."""
    if method == "auto":
        return ["auto", "dense"] if can_merge else ["dense"]
    return [method] if method in {"merged", "dense"} else []


def _least_seconds(mask: GroupMask, rows: int, shape: AttentionShape, costs: AttentionCosts) -> float:
    """A price below that of any splits of one layout: its visible pairs, in one kernel, and the copies of its rows."""
    visible = (mask.weights > 0).float() @ mask.groups.bincount(minlength=mask.weights.shape[1]).float()
    keys = len(mask.groups)
    size = SplitSize(
        queries=int(visible.sum()) // keys,
        keys=keys,
        gathers_queries=False,
        gathers_keys=False,
        is_masked=False,
        stage="only",
    )
    return costs.split_seconds([size], replace(shape, rows=rows)) + _copy_seconds(mask, rows, shape, costs)


def _copy_seconds(mask: GroupMask, rows: int, shape: AttentionShape, costs: AttentionCosts) -> float:
    """Taking some rows out of a batch's queries, keys and values, and putting their result back."""
    tokens = 2 * len(mask.weights) + 2 * len(mask.groups)
    return 3 * costs.kernel + costs.copy_seconds(tokens, rows, shape)


def _split_option(
    masks: Sequence[GroupMask], method: Method, shape: AttentionShape, costs: AttentionCosts
) -> AttentionOption:
    """All rows in the same splits."""
    plan = plan_splits(masks, method, lambda sizes: costs.split_seconds(sizes, shape))  # type: ignore[arg-type]
    seconds = costs.split_seconds(plan.sizes, shape)
    return AttentionOption(
        method, seconds, plan.mask_numel * shape.dtype.itemsize, lambda: _prepare_splits(plan, method, shape)
    )


def _prepare_splits(plan: SplitPlan, method: str, shape: AttentionShape) -> PreparedAttention:
    splits = plan.splits(shape.device, shape.dtype)
    return PreparedAttention(
        lambda query, key, value: split_attention(query, key, value, splits),
        method,
        [tensor for split in splits for tensor in split.tensors],
        (lambda query, key, value: split_attention_with_lse(query, key, value, splits))
        if supports_merging(shape.device)
        else None,
    )


def _apart_option(
    masks: Sequence[GroupMask],
    rows: Sequence[Sequence[int]],
    method: Method,
    shape: AttentionShape,
    costs: AttentionCosts,
) -> AttentionOption:
    """The rows of each layout by themselves, one layout after the other."""
    parts = [
        _split_option([mask], method, replace(shape, rows=len(numbers)), costs)
        for mask, numbers in zip(masks, rows, strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    copying = sum(_copy_seconds(mask, len(numbers), shape, costs) for mask, numbers in zip(masks, rows, strict=True))
    return AttentionOption(
        "apart",
        copying + sum(part.seconds for part in parts),
        sum(part.mask_bytes for part in parts),
        lambda: _prepare_apart([part.prepare() for part in parts], rows),
    )


def _prepare_apart(parts: Sequence[PreparedAttention], rows: Sequence[Sequence[int]]) -> PreparedAttention:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        for part, numbers in zip(parts, rows, strict=True):
            out[numbers] = part.attention(query[numbers], key[numbers], value[numbers])
        return out

    def with_lse(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
        for part, numbers in zip(parts, rows, strict=True):
            assert part.with_lse is not None  # noqa: S101 - of all parts or of none
            out[numbers], lse[numbers] = part.with_lse(query[numbers], key[numbers], value[numbers])
        return out, lse

    has_lse = all(part.with_lse is not None for part in parts)
    tensors = [tensor for part in parts for tensor in part.tensors]
    return PreparedAttention(attention, "apart", tensors, with_lse if has_lse else None)


def _flex_can_win(shape: AttentionShape) -> bool:
    """Whether FlexAttention is worth a thought: compiled by Triton, for tokens whose kernels it has."""
    return shape.device.type == "cuda" and torch.utils._triton.has_triton() and shape.channels >= 16  # noqa: SLF001


def _flex_option(masks: Sequence[GroupMask], shape: AttentionShape, costs: AttentionCosts) -> AttentionOption:
    if shape.needs_grad and shape.device.type == "cpu":
        raise GuideError("compiled FlexAttention has no backward on the CPU. Use method='auto' for training.")
    from artaug.regional.flex import FlexMask, masked_flex_attention  # noqa: PLC0415 - loads torch's compiler

    mask = FlexMask.of(masks, shape.device)
    tokens = 2 * len(masks[0].weights) + 2 * len(masks[0].groups)
    seconds = costs.flex_seconds(mask.num_tiles * (shape.rows // len(masks)), tokens, shape)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return masked_flex_attention(query, key, value, mask, compiled=True)

    return AttentionOption("flex", seconds, 0, lambda: PreparedAttention(attention, "flex", mask.tensors))


@functools.cache
def _tell_of_compilation(seconds: float) -> None:
    _log.warning(
        "Regional attention compiles FlexAttention, which is faster here and takes about %.0f s for each new length of "
        "the sequence. RegionalAttention(method='merged') draws without, expected_drawings says how many are to come.",
        seconds,
    )


class LayoutCache:
    """Prepared attention by what it was prepared for, kept between drawings: the last used, up to a number of bytes.

    What is prepared depends on its key alone, so a drawing is the same whether or not its layout was drawn before.
    """

    def __init__(self, max_bytes: int) -> None:
        """Keep at most ``max_bytes``."""
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Hashable, PreparedAttention] = OrderedDict()
        self._lock = Lock()

    def get_or_prepare(self, key: Hashable, prepare: Callable[[], PreparedAttention]) -> PreparedAttention:
        """What was prepared for ``key``, by ``prepare`` if it is not there."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        prepared = prepare()
        if prepared.num_bytes <= self._max_bytes:
            with self._lock:
                self._kept[key] = prepared
                while sum(item.num_bytes for item in self._kept.values()) > self._max_bytes:
                    self._kept.popitem(last=False)
        return prepared
