"""The price of attention: a model with a few constants, by which ``method="auto"`` chooses how to compute.

A split costs what its scores cost, one for each pair of query and key, what is copied beside them, and a fixed time for each
kernel that is launched::

    seconds = kernels * kernel + rows * heads * scores * (score + channels * score_channel + [masked] masked_score)
              + rows * heads * channels * copied tokens * token_channel

The constants of a processor are fitted by ``python -m benchmarks.attention_costs``, which also shows how well they fit; what
``auto`` loses by following them is the *regret* that ``python -m benchmarks.regional`` reports. Only their ratios matter, so
they hold for processors of about the same balance. The number of threads does not enter: what a run computes must not depend
on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from artaug.regional.splits import SplitSize

TILE = 128
"""Queries, and keys, of a tile of FlexAttention."""
_DRAWING_STEPS = 28
"""Steps of a drawing, for the number of calls that a compilation is paid back over."""


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """All that a price depends on beside the layout: the tokens of one call, and how often it comes again."""

    device: torch.device
    dtype: torch.dtype
    rows: int
    """Of the batch."""
    heads: int
    channels: int
    """Of a head."""
    needs_grad: bool = False
    calls: int = 1
    """How often attention of this shape will be computed."""

    @classmethod
    def of(cls, query: torch.Tensor, *, layers: int, drawings: int) -> "AttentionShape":
        """The shape of queries (batch, heads, tokens, channels) in a model of so many layers."""
        return cls(
            device=query.device,
            dtype=query.dtype,
            rows=query.shape[0],
            heads=query.shape[1],
            channels=query.shape[3],
            needs_grad=torch.is_grad_enabled() and query.requires_grad,
            calls=drawings * _DRAWING_STEPS * layers,
        )


@dataclass(frozen=True, kw_only=True)
class AttentionCosts:
    """The constants of one kind of processor, in seconds."""

    kernel: float
    """Of launching one kernel, an attention or a copy."""
    score: float
    """Of one score, whatever the channels: its exponential."""
    score_channel: float
    """Of one channel of a score: products with the key and the value."""
    masked_score: float
    """Of adding a bias to a score."""
    token_channel: float
    """Of copying one channel of a token."""
    flex: float
    """How many times as long a score takes in FlexAttention."""
    flex_compile: float
    """Of compiling FlexAttention for one length of the sequence."""
    backward: float
    """The backward pass of a score over its forward pass."""
    merged_backward: float
    """The same where splits are merged."""

    def split_seconds(self, sizes: Sequence[SplitSize], shape: AttentionShape) -> float:
        """One call of attention in splits."""
        is_merged = any(size.stage != "only" for size in sizes)
        repeats = 1.0
        if shape.needs_grad:
            repeats += self.merged_backward if is_merged else self.backward
        return repeats * sum(self._split_seconds(size, shape, is_whole=len(sizes) == 1) for size in sizes)

    def flex_seconds(self, tiles: int, tokens: int, shape: AttentionShape) -> float:
        """One call of FlexAttention, its part of the compilation included.

        Args:
            tiles: that are computed, in all rows together.
            tokens: copied into sorted order and back, in one row.
            shape: of the call.
        """
        scores = shape.heads * tiles * TILE**2
        seconds = 8 * self.kernel + self.flex * scores * (self.score + shape.channels * self.score_channel)
        seconds += shape.rows * shape.heads * shape.channels * tokens * self.token_channel
        return seconds * (1 + self.backward * shape.needs_grad) + self.flex_compile / shape.calls

    def copy_seconds(self, tokens: int, rows: int, shape: AttentionShape) -> float:
        """Copying so many tokens of ``rows`` rows, in one kernel."""
        return self.kernel + rows * shape.heads * shape.channels * tokens * self.token_channel

    def _split_seconds(self, size: SplitSize, shape: AttentionShape, *, is_whole: bool) -> float:
        kernels, tokens = 1, 0  # the attention itself
        if size.gathers_queries:
            kernels, tokens = kernels + 1, tokens + size.queries
        if size.gathers_keys:
            kernels, tokens = kernels + 2, tokens + 2 * size.keys
        if size.stage == "merge":  # both results are read, one is written; and a few operations on their log-sum-exp
            kernels, tokens = kernels + 8, tokens + (4 if size.gathers_queries else 3) * size.queries
        elif not is_whole:
            kernels, tokens = kernels + 1 + (size.stage == "first"), tokens + size.queries
        score = self.score + shape.channels * self.score_channel + size.is_masked * self.masked_score
        per_head = size.queries * size.keys * score + shape.channels * tokens * self.token_channel
        return kernels * self.kernel + shape.rows * shape.heads * per_head


_CPU = AttentionCosts(
    kernel=8.9e-6,
    score=4.2e-10,
    score_channel=4.87e-11,
    masked_score=5.4e-10,
    token_channel=1.44e-9,
    flex=2.0,
    flex_compile=60.0,
    backward=2.4,
    merged_backward=3.8,
)
"""Float32 on an AMD EPYC, fitted (``benchmarks/results/2-core-epyc/attention_costs.json``). Flex never wins there."""
_CPU_HALF = AttentionCosts(
    kernel=1.3e-5,
    score=6.3e-10,
    score_channel=4.95e-11,
    masked_score=4.6e-10,
    token_channel=9.5e-10,
    flex=2.0,
    flex_compile=60.0,
    backward=1.85,
    merged_backward=3.6,
)
"""Bfloat16, on the same."""
_CUDA = AttentionCosts(
    kernel=4.0e-6,
    score=0.0,
    score_channel=6.7e-15,
    masked_score=2.6e-12,
    token_channel=1.5e-12,
    flex=1.1,
    flex_compile=20.0,
    backward=2.5,
    merged_backward=6.0,
)
"""Worked out by hand from the steps of FLUX.1-dev that were measured on an H200 (``benchmarks/results/h200/regional.json``), in
bfloat16: too few of them for a fit."""


def costs_on(device: torch.device, dtype: torch.dtype) -> AttentionCosts:
    """The constants for tokens of a device and type."""
    if device.type == "cpu":
        return _CPU if dtype == torch.float32 else _CPU_HALF
    return _CUDA
