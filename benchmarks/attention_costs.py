"""The constants of the price of attention: measured on this machine, fitted, and compared with what was measured."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise, product
from statistics import median

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import artaug as aa
from artaug.regional import ELIGEN, Isolation, Span
from artaug.regional.attention import split_attention
from artaug.regional.attention_costs import AttentionCosts, AttentionShape
from artaug.regional.attention_mask import GroupMask, joint_mask
from artaug.regional.flex import FlexMask, masked_flex_attention
from artaug.regional.region_weights import split_grid
from artaug.regional.split_plan import SplitPlan, plan_splits
from artaug.regional.splits import SplitSize
from benchmarks import _memory as memory
from benchmarks import _record as record

LINEAR = ("kernel", "score", "score_channel", "masked_score", "token_channel")
"""Constants that a price is linear in; the others follow from them."""
_MOST_SCORES = 4 * 32**4
"""Of a point on a CPU, in one head."""
_NOTHING = AttentionCosts(**dict.fromkeys((item.name for item in fields(AttentionCosts)), 0.0))


@dataclass(frozen=True, kw_only=True)
class Point:
    """One layout, and the tokens it is computed on."""

    side: int
    """Image tokens on a side."""
    regions: int
    rows: int
    heads: int
    channels: int
    dtype: torch.dtype
    isolation: Isolation = ELIGEN
    device: str = "cpu"
    needs_grad: bool = False

    @property
    def shape(self) -> AttentionShape:
        """As the price takes it."""
        return AttentionShape(
            device=torch.device(self.device),
            dtype=self.dtype,
            rows=self.rows,
            heads=self.heads,
            channels=self.channels,
            needs_grad=self.needs_grad,
        )

    @property
    def mask(self) -> GroupMask:
        """The layout: prompts of 16 tokens, a plan's prompt of an eighth of the image."""
        edges = [round(number * self.side / self.regions) / self.side for number in range(self.regions + 1)]
        regions = [aa.Region(aa.Box(left, 0.25, right, 1), "a") for left, right in pairwise(edges)]
        spans = [Span("text", 16, number + 1) for number in range(self.regions)]
        spans += [Span("text", max(16, self.side**2 // 8)), Span("image", self.side**2)]
        weights = split_grid(regions, (self.side, self.side), base_weight=self.isolation.base_weight)
        return joint_mask(spans, weights, self.isolation)

    def tokens(self) -> list[Tensor]:
        """Random queries, keys and values, laid out in memory as a transformer's projections are."""
        size = (self.rows, len(self.mask.groups), self.heads, self.channels)
        return [
            torch.randn(size, device=self.device).to(self.dtype).transpose(1, 2).requires_grad_(self.needs_grad)
            for _ in range(3)
        ]


def plans(mask: GroupMask) -> dict[str, SplitPlan]:
    """The same attention in splits that differ as much as they can."""
    prices: dict[str, Callable[[Sequence[SplitSize]], float]] = {
        "few kernels": len,
        "few scores": lambda sizes: sum(size.queries * size.keys for size in sizes),
        "few copies": lambda sizes: sum(
            size.queries * (size.gathers_queries + (size.stage == "merge")) + size.keys * size.gathers_keys
            for size in sizes
        ),
    }
    planned = {name: plan_splits([mask], "merged", price) for name, price in prices.items()}
    if mask.is_hard:
        planned["grouped"] = plan_splits([mask], "grouped", len)
    return planned | {"dense": plan_splits([mask], "dense", len)}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is varied; every combination that is not too long for a CPU is a point."""

    dtypes: tuple[torch.dtype, ...]
    heads: tuple[tuple[int, int], ...]
    """Heads, and channels of a head."""
    sides: tuple[int, ...]
    regions: tuple[int, ...]
    rows: tuple[int, ...]


ON_CPU = Sizes(
    dtypes=(torch.float32, torch.bfloat16),
    heads=((4, 128), (4, 32)),
    sides=(8, 16, 32, 64),
    regions=(1, 3, 8),
    rows=(1, 4, 16),
)
ON_GPU = Sizes(dtypes=(torch.bfloat16,), heads=((24, 128),), sides=(32, 64, 128), regions=(1, 4, 16), rows=(1, 4))
"""FLUX's own heads."""


def points(*, quick: bool) -> list[Point]:
    """Where the constants are measured."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = ON_GPU if device == "cuda" else ON_CPU
    if quick:
        sizes = replace(
            sizes,
            dtypes=sizes.dtypes[:1],
            heads=sizes.heads[-1:],
            sides=sizes.sides[:2],
            regions=sizes.regions[:2],
            rows=sizes.rows[:2],
        )
    chosen = [
        Point(
            side=side,
            regions=regions,
            rows=rows,
            heads=heads,
            channels=channels,
            dtype=dtype,
            device=device,
            isolation=isolation,
        )
        for dtype, (heads, channels), rows, side, regions, isolation in product(
            sizes.dtypes,
            sizes.heads,
            sizes.rows,
            sizes.sides,
            sizes.regions,
            (ELIGEN, Isolation(base_weight=0.3)),
        )
        if device == "cuda" or rows * side**4 <= _MOST_SCORES
    ]
    middle = sizes.sides[len(sizes.sides) // 2]
    with_grad = [replace(point, needs_grad=True) for point in chosen if (point.rows, point.side) == (1, middle)]
    return chosen + with_grad


def measure(*, quick: bool) -> Iterator[record.Row]:
    """Time attention alone in splits of every kind, fit the constants of its price, and say how far the price is off.

    A measurement is the least of several, interleaved over the ways to compute one layout. The last row of each type holds
    the constants as `artaug.regional.attention_costs` has them, least squares of the *relative* errors. On a GPU also FlexAttention, and
    the seconds that its compilation takes.
    """
    measured: dict[torch.dtype, list[tuple[Point, str, Sequence[SplitSize], float]]] = {}
    for point in points(quick=quick):
        for name, plan, seconds in point_seconds(point, repeats=3 if quick else 5):
            measured.setdefault(point.dtype, []).append((point, name, plan.sizes, seconds))
    for dtype, rows in measured.items():
        costs = fit(rows)
        for point, name, sizes, seconds in rows:
            yield point_row(point, name) | {
                "seconds": seconds,
                "price_to_seconds": costs.split_seconds(sizes, point.shape) / seconds,
            }
        flexes = flex_rows(costs, points(quick=True)) if torch.cuda.is_available() else []
        yield from flexes
        errors = [abs(np.log(costs.split_seconds(sizes, point.shape) / seconds)) for point, _, sizes, seconds in rows]
        yield {
            "dtype": str(dtype).removeprefix("torch."),
            "way": "fit",
            "median_error": float(np.exp(median(errors)) - 1),
            **{name: getattr(costs, name) for name in (*LINEAR, "backward", "merged_backward")},
        }


def point_row(point: Point, name: str) -> dict[str, object]:
    """The names of a point."""
    return {
        "dtype": str(point.dtype).removeprefix("torch."),
        "way": name,
        "image_tokens": point.side**2,
        "regions": point.regions,
        "rows": point.rows,
        "heads": point.heads,
        "channels": point.channels,
        "base_weight": point.isolation.base_weight,
        "needs_grad": point.needs_grad,
    }


def point_seconds(point: Point, *, repeats: int) -> Iterator[tuple[str, SplitPlan, float]]:
    """The least seconds of every way to compute one layout."""
    planned = plans(point.mask)
    query, key, value = point.tokens()
    splits = {name: plan.splits(query.device, query.dtype) for name, plan in planned.items()}
    seconds: dict[str, list[float]] = {name: [] for name in planned}
    # On a CPU the time of the process, which what else is running does not change.
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    for _ in range(repeats + 1):
        for name in planned:
            memory.synchronize()
            start = clock()
            out = split_attention(query, key, value, splits[name])
            if point.needs_grad:
                out.sum().backward()
            memory.synchronize()
            seconds[name].append(clock() - start)
    for name, plan in planned.items():
        yield name, plan, min(seconds[name][1:])


def fit(rows: Sequence[tuple[Point, str, Sequence[SplitSize], float]]) -> AttentionCosts:
    """The constants that minimize the mean squared relative error, none below zero."""
    forward = [row for row in rows if not row[0].needs_grad]
    bases = [replace(_NOTHING, **{name: 1.0}) for name in LINEAR]
    features = np.array(
        [[base.split_seconds(sizes, point.shape) / seconds for base in bases] for point, _, sizes, seconds in forward]
    )
    costs = replace(_NOTHING, **dict(zip(LINEAR, nonnegative_least_squares(features), strict=True)))
    factors: dict[bool, list[float]] = {True: [], False: []}
    for point, _, sizes, seconds in rows:
        if point.needs_grad:
            alone = costs.split_seconds(sizes, replace(point.shape, needs_grad=False))
            factors[any(size.stage != "only" for size in sizes)].append(seconds / alone - 1)
    return replace(
        costs,
        backward=median(factors[False] or [2.5]),
        merged_backward=median(factors[True] or [6.0]),
    )


def nonnegative_least_squares(features: np.ndarray) -> list[float]:
    """Least squares of ``features @ x = 1``, scaled for its conditioning; what would be negative is left out."""
    scale = np.linalg.norm(features, axis=0)
    scale[scale == 0] = 1
    kept = list(range(features.shape[1]))
    while True:
        solution = np.linalg.lstsq(features[:, kept] / scale[kept], np.ones(len(features)), rcond=None)[0]
        if (solution >= 0).all():
            break
        kept.pop(int(solution.argmin()))
    result = np.zeros(features.shape[1])
    result[kept] = solution / scale[kept]
    return [float(number) for number in result]


def flex_rows(costs: AttentionCosts, points: Sequence[Point]) -> list[record.Row]:
    """FlexAttention on the same layouts: its time over the price of as many scores, and seconds to compile."""
    rows: list[record.Row] = []
    for point in points:
        query, key, value = point.tokens()
        mask = FlexMask.of([point.mask], query.device)
        seconds = []
        for _ in range(6):
            memory.synchronize()
            start = time.perf_counter()
            masked_flex_attention(query, key, value, mask, compiled=True)
            memory.synchronize()
            seconds.append(time.perf_counter() - start)
        price = replace(costs, flex=1.0, flex_compile=0.0).flex_seconds(
            mask.num_tiles * point.rows, 4 * query.shape[2], point.shape
        )
        rows.append(
            point_row(point, "flex")
            | {"seconds": min(seconds[1:]), "compile_seconds": seconds[0], "price_to_seconds": price / min(seconds[1:])}
        )
    return rows


def plot(rows: Sequence[record.Row]) -> Figure:
    """The price of everything that was measured over its time."""
    figure = Figure(figsize=(5, 4.5))
    axes = figure.add_subplot(xlabel="measured, s", ylabel="price, s", title="attention of one layer")
    for way in dict.fromkeys(row["way"] for row in rows):
        shown = [row for row in rows if row["way"] == way and "seconds" in row]
        if shown:
            seconds = [row["seconds"] for row in shown]
            axes.scatter(seconds, [row["price_to_seconds"] * row["seconds"] for row in shown], s=8, label=way)
    limits = axes.get_xlim()
    axes.plot(limits, limits, color="grey", linewidth=0.5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.legend(fontsize=7)
    return figure


if __name__ == "__main__":
    record.run("attention_costs", measure, plot)
