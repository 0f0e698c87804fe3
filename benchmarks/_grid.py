"""The grid on which methods of regional attention are compared: which batches, on which geometry, with which methods."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch

import artaug as aa
from artaug.regional import BALANCED, ELIGEN, INSTANTX, Guide, Isolation
from benchmarks import _flux as flux

Rows: TypeAlias = Literal["alike", "unlike", "ragged"]
Layout: TypeAlias = Literal["hard", "soft", "balanced", "apart"]

EXACT = ("dense", "merged", "grouped", "flex")
"""Methods of `RegionalAttention` that compute the same, of which ``auto`` takes one."""
FEATHER = 0.03
ISOLATIONS: dict[str, Isolation] = {"hard": ELIGEN, "soft": ELIGEN, "balanced": BALANCED, "apart": INSTANTX}
"""The isolation of each kind of layout. ``hard``: boxes along the token grid; ``soft``: the same, feathered; ``balanced``:
hard boxes under the default, in which the plan's prompt weighs less inside regions; ``apart``: regions isolated. Only the
first can be grouped."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One batch, on which every method is measured."""

    tokens: int
    """Image tokens of a picture, a square number."""
    regions: int
    """Regions of a picture; of the first one if rows are ragged."""
    batch: int = 1
    """Pictures."""
    rows: Rows = "alike"
    """Whether all pictures have the same boxes, or each its own, or each its own and fewer of them: R, R / 2 ... 1, none,
    and again."""
    layout: Layout = "hard"
    """One of `ISOLATIONS`."""
    gradients: bool = False
    """Whether the steps are those of training, with a backward pass."""
    geometry: flux.Geometry
    extra: tuple[str, ...] = ()
    """Methods measured here beside those that are measured everywhere: ``flex``, which takes a compiler half a minute, and
    ``output_mix``, whose steps take as long as 1 + R others."""

    @property
    def side(self) -> int:
        """Image tokens on a side."""
        return math.isqrt(self.tokens)

    @property
    def methods(self) -> tuple[str, ...]:
        """What is measured."""
        grouped = ("grouped",) if self.layout == "hard" else ()
        return ("plain", "dense", "merged", *grouped, *self.extra, "auto")

    def pictures(self, *, variant: int = 0) -> tuple[tuple[aa.Region, ...], ...]:
        """The regions of every picture; another ``variant`` has other boxes of the same kind."""
        variants, found = itertools.count(variant), []
        for number in range(self.batch):
            count = self.regions >> (number % (self.regions.bit_length() + 1) if self.rows == "ragged" else 0)
            candidates = (self._regions(count, variant if self.rows == "alike" else other) for other in variants)
            found.append(next(regions for regions in candidates if self._may_repeat(regions) or regions not in found))
        return tuple(found)

    @property
    def columns(self) -> dict[str, object]:
        """The point, as columns of a row."""
        return {
            "image_tokens": self.tokens,
            "regions": self.regions,
            "batch": self.batch,
            "rows": self.rows,
            "layout": self.layout,
            "dtype": str(self.geometry.dtype).removeprefix("torch."),
            "gradients": self.gradients,
        }

    def guide(self, method: str) -> Guide | None:
        """The guide of a method; None for plain drawing."""
        return make_guide(method, ISOLATIONS[self.layout])

    def _may_repeat(self, regions: tuple[aa.Region, ...]) -> bool:
        return self.rows == "alike" or not regions

    def _regions(self, count: int, variant: int) -> tuple[aa.Region, ...]:
        areas = flux.boxes(count, side=self.side, variant=variant) if count else []
        return tuple(aa.Region(area, "a", feather=FEATHER * (self.layout == "soft")) for area in areas)


def make_guide(method: str, isolation: Isolation | None) -> Guide | None:
    """The guide of a method; None for plain drawing."""
    if method == "plain":
        return None
    if method == "output_mix":
        return aa.OutputMix()
    return aa.RegionalAttention(method=method, isolation=isolation)  # type: ignore[arg-type]


_SHORT = replace(flux.SCALED_DOWN, double_blocks=1, single_blocks=2)
_NARROW = replace(flux.SCALED_DOWN, double_blocks=1, single_blocks=1, heads=2)
_ONE_LAYER = replace(flux.SCALED_DOWN, double_blocks=1, single_blocks=0, heads=1)
ON_CPU = {64: flux.PLAYGROUND, 256: flux.PLAYGROUND, 1024: _SHORT, 4096: _NARROW, 16384: _ONE_LAYER}
"""Geometries for pictures of so many image tokens: the smaller, the longer its sequences."""


def quick_points() -> list[Point]:
    """A few points that take two cores less than a minute."""
    return [
        _on_cpu(64, 4, batch=4, rows="unlike", extra=("output_mix",)),
        _on_cpu(64, 4, layout="balanced"),
        _on_cpu(256, 16),
        _on_cpu(1024, 4),
    ]


def cpu_points() -> list[Point]:
    """The grid for two cores, about 20 minutes: from small pictures in batches to 16,384 tokens."""
    small = [
        _on_cpu(tokens, regions, batch=batch, rows=rows, extra=("output_mix",) if (regions, batch) == (4, 4) else ())
        for tokens in (64, 256)
        for batch in (1, 4, 16)
        for rows in _rows(batch)
        for regions in (1, 4, 16)
        if tokens * batch < 4096 or (regions, rows) in {(4, "alike"), (4, "unlike"), (16, "unlike")}
    ]
    large = [_on_cpu(tokens, regions) for tokens in (1024, 4096) for regions in (1, 4, 16)]
    large += [_on_cpu(16384, 4)]
    batches = [
        _on_cpu(64, 2, batch=8, rows="unlike"),
        _on_cpu(64, 8, batch=2, rows="unlike"),
        _on_cpu(64, 4, batch=16, rows="ragged"),
        _on_cpu(1024, 4, batch=4, rows="unlike"),
        _on_cpu(1024, 4, batch=4, rows="ragged"),
        _on_cpu(4096, 4, batch=2, rows="unlike"),
    ]
    weighted: list[Point] = []
    layouts: Sequence[Layout] = ("soft", "balanced", "apart")
    for layout in layouts:
        weighted += [_on_cpu(64, regions, layout=layout) for regions in (1, 4, 16)]
        weighted += [_on_cpu(64, 4, batch=16, rows=rows, layout=layout) for rows in _rows(16)]
        weighted += [_on_cpu(1024, 4, layout=layout)]
    weighted += [
        _on_cpu(1024, 16, layout="balanced"),
        _on_cpu(4096, 4, layout="balanced"),
    ]
    learned = [
        _on_cpu(64, 4, batch=4, rows="unlike", gradients=True),
        _on_cpu(256, 4, gradients=True),
        _on_cpu(256, 4, layout="balanced", gradients=True),
        _on_cpu(1024, 4, gradients=True),
    ]
    compiled = [_on_cpu(256, 4, batch=2, rows="unlike", extra=("flex",)), _on_cpu(4096, 8, extra=("flex",))]
    return [*small, *batches, *weighted, *large, *half_precision(), *learned, *compiled]


def half_precision() -> list[Point]:
    """A few points in bfloat16, where the processor multiplies in it."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # noqa: SLF001 - no public name
        return []
    return [
        _on_cpu(64, 4, batch=16, rows="unlike", dtype=torch.bfloat16),
        _on_cpu(256, 4, dtype=torch.bfloat16),
        _on_cpu(1024, 4, dtype=torch.bfloat16),
        _on_cpu(1024, 16, dtype=torch.bfloat16),
        _on_cpu(1024, 4, layout="balanced", dtype=torch.bfloat16),
        _on_cpu(4096, 4, dtype=torch.bfloat16),
    ]


def gpu_points() -> list[Point]:
    """The grid for one GPU, FLUX.1-dev in bfloat16, the most valuable points first."""
    one, two = 64**2, 128**2  # 1,024 px and 2,048 px
    return [
        _on_gpu(one, 4),
        _on_gpu(one, 16),
        _on_gpu(one, 4, batch=4, rows="unlike"),
        _on_gpu(two, 4),
        _on_gpu(one, 4, layout="balanced", extra=("flex", "output_mix")),
        _on_gpu(one, 1),
        _on_gpu(one // 4, 4, batch=4, rows="alike"),
        _on_gpu(one // 4, 4, batch=16, rows="unlike"),
        _on_gpu(one, 4, layout="soft"),
        _on_gpu(one, 4, layout="apart"),
        _on_gpu(one // 16, 4, batch=4, rows="unlike"),
        _on_gpu(two, 16),
    ]


def _rows(batch: int) -> Sequence[Rows]:
    return ("alike", "unlike") if batch > 1 else ("alike",)


def _on_cpu(
    tokens: int,
    regions: int,
    *,
    batch: int = 1,
    rows: Rows = "alike",
    layout: Layout = "hard",
    dtype: torch.dtype = torch.float32,
    gradients: bool = False,
    extra: tuple[str, ...] = (),
) -> Point:
    return Point(
        tokens=tokens,
        regions=regions,
        batch=batch,
        rows=rows,
        layout=layout,
        gradients=gradients,
        geometry=replace(ON_CPU[tokens], dtype=dtype),
        extra=extra,
    )


def _on_gpu(
    tokens: int,
    regions: int,
    *,
    batch: int = 1,
    rows: Rows = "alike",
    layout: Layout = "hard",
    extra: tuple[str, ...] = ("flex",),
) -> Point:
    return Point(
        tokens=tokens, regions=regions, batch=batch, rows=rows, layout=layout, geometry=flux.FLUX_DEV, extra=extra
    )
