"""The cost of a guided step relative to a plain one: every method of regional attention, and the paper's mixing."""

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from statistics import median, quantiles

import torch
from matplotlib.figure import Figure
from torch import Tensor

import artaug as aa
from artaug.regional import ELIGEN, INSTANTX, Guide, Isolation
from benchmarks import _flux as flux
from benchmarks import _memory as memory
from benchmarks import _record as record

METHODS = ("plain", "dense", "merged", "grouped", "flex", "output_mix")


@dataclass(frozen=True, kw_only=True)
class Layouts:
    """Layouts that differ in their number of regions only."""

    feather: float = 0.0
    isolation: Isolation = ELIGEN
    methods: tuple[str, ...] = ("plain", "dense", "merged", "flex")


LAYOUTS = {
    "hard": Layouts(methods=METHODS),
    "soft": Layouts(feather=0.03),
    "apart": Layouts(isolation=INSTANTX),
}
"""Boxes along the token grid; the same boxes, feathered; and regions isolated, with a weak plan's prompt in them. Only
the first can be grouped, and `OutputMix` takes equally long for each."""

MIXING_ROUNDS = 3
"""Rounds in which `OutputMix` is timed: each of its steps takes as long as 1 + regions others."""


def measure(*, quick: bool) -> Iterator[record.Row]:
    """Time whole denoiser steps, interleaved, over picture size and number of regions; count what they compute.

    With CUDA the transformer is FLUX.1-dev's own geometry in bfloat16, else a scaled-down one in float32; its weights are
    random. A round takes every method once, each time beginning with another one: ``seconds`` is the median over rounds,
    ``ratio_to_plain`` the median of the ratios within rounds, low and high are quartiles. ``first_seconds`` is the first
    step of a drawing, in which the layout is prepared. ``peak_bytes`` holds weights, inputs, and the most that torch's
    allocator held at once beside them while a layout was prepared and a step computed.
    """
    on_gpu = torch.cuda.is_available()
    geometry, sides = (flux.FLUX_DEV, (64, 128)) if on_gpu else (flux.SCALED_DOWN, (32, 48))
    if quick:
        small = replace(geometry, double_blocks=1, single_blocks=2)
        return measured(small, [Series(kind="hard", side=sides[0], counts=(1, 4))], rounds=2)
    # On a GPU flex compiles for each count, so there are fewer.
    many, few = ((1, 4, 16), (4,)) if on_gpu else ((1, 2, 4, 8, 16), (1, 4, 16))
    others = few if on_gpu else many
    series = [Series(kind=kind, side=sides[0], counts=many if kind == "hard" else others) for kind in LAYOUTS]
    return measured(geometry, [*series, Series(kind="hard", side=sides[1], counts=few)], rounds=5)


@dataclass(frozen=True, kw_only=True)
class Series:
    """Layouts of one kind on pictures of one size."""

    kind: str
    """One of `LAYOUTS`."""
    side: int
    """Image tokens on a side."""
    counts: tuple[int, ...]
    """Numbers of regions."""


def measured(geometry: flux.Geometry, series: Sequence[Series], *, rounds: int) -> Iterator[record.Row]:
    """Measure one model: a row for each layout and method."""
    model = geometry.model()
    for item in series:
        layouts = LAYOUTS[item.kind]
        for count in item.counts:
            areas = flux.boxes(count, side=item.side)
            setting = flux.Setting(
                geometry=geometry,
                model=model,
                side=item.side,
                regions=tuple(aa.Region(area, "a", feather=layouts.feather) for area in areas),
                isolation=layouts.isolation,
            )
            yield from layout_rows(setting, item.kind, rounds)
            torch.compiler.reset()  # one graph a size, and past eight of them torch stops compiling
            gc.collect()


def layout_rows(setting: flux.Setting, kind: str, rounds: int) -> list[record.Row]:
    """One row for each method, for one layout."""
    guides = {method: make_guide(method, setting.isolation) for method in LAYOUTS[kind].methods}
    for guide in guides.values():
        step_seconds(setting, guide, count=1)  # compiles, and warms the device up
    peaks = {method: peak_bytes(setting, guide) for method, guide in guides.items()}
    timed: dict[str, list[Sequence[float]]] = {method: [] for method in guides}
    names = list(guides)
    for number in range(rounds):
        for method in (*names[number % len(names) :], *names[: number % len(names)]):
            if method == "output_mix" and number >= MIXING_ROUNDS:
                continue
            prepares = method not in {"plain", "output_mix"}
            timed[method].append(step_seconds(setting, guides[method], count=2 if prepares else 1))
    return [row(setting, kind, method, timed, peaks) for method in guides]


def row(
    setting: flux.Setting,
    kind: str,
    method: str,
    timed: Mapping[str, Sequence[Sequence[float]]],
    peaks: Mapping[str, int],
) -> record.Row:
    """The row of one method."""
    seconds = [step[-1] for step in timed[method]]
    ratios = [guided / plain[-1] for guided, plain in zip(seconds, timed["plain"], strict=False)]
    cost, plain_cost = flux.step_cost(setting, method), flux.step_cost(setting, "plain")
    added = 0 if method in {"plain", "output_mix"} else len(setting.regions) * setting.geometry.region_tokens
    return {
        "method": method,
        "regions": len(setting.regions),
        "layout": kind,
        "pixels": 16 * setting.side,
        "tokens": setting.side**2 + setting.geometry.base_tokens + added,
        "seconds": median(seconds),
        **spread("seconds", seconds),
        "first_seconds": median(step[0] for step in timed[method]),
        "ratio_to_plain": median(ratios),
        **spread("ratio", ratios),
        "peak_bytes": peaks[method],
        "peak_to_plain": peaks[method] / peaks["plain"],
        "flops": cost.flops,
        "flops_to_plain": cost.flops / plain_cost.flops,
        "attention_flops": cost.attention_flops,
        "mask_bytes": cost.mask_bytes,
    }


def spread(name: str, numbers: Sequence[float]) -> dict[str, float]:
    """The quartiles."""
    low, _, high = quantiles(numbers, n=4, method="inclusive")
    return {f"{name}_low": low, f"{name}_high": high}


def make_guide(method: str, isolation: Isolation) -> Guide | None:
    """The guide of a method; None for plain drawing."""
    if method == "plain":
        return None
    if method == "output_mix":
        return aa.OutputMix()
    return aa.RegionalAttention(method=method, isolation=isolation)  # type: ignore[arg-type]


def steering(setting: flux.Setting, guide: Guide | None) -> AbstractContextManager[None]:
    """A ``with`` block in which the guide steers one picture."""
    return nullcontext() if guide is None else guide.steering(setting.denoiser, [setting.encoded])


def step_seconds(setting: flux.Setting, guide: Guide | None, *, count: int) -> list[float]:
    """Seconds of the first steps of a drawing."""
    seconds = []
    with steering(setting, guide):
        for _ in range(count):
            memory.synchronize()
            start = time.perf_counter()
            setting.step()
            memory.synchronize()
            seconds.append(time.perf_counter() - start)
    return seconds


def peak_bytes(setting: flux.Setting, guide: Guide | None) -> int:
    """The most memory held at once in the first step of a drawing."""
    inputs = [tensor for tensor in setting.kwargs.values() if isinstance(tensor, Tensor)]
    return memory.peak_bytes(
        lambda: step_seconds(setting, guide, count=1), inputs=[*inputs, *setting.model.parameters()]
    )


def plot(rows: Sequence[record.Row]) -> Figure:
    """Time relative to a plain step over the number of regions: a panel for every size and kind of layout."""
    panels = sorted({(row["pixels"], row["layout"]) for row in rows})
    figure = Figure(figsize=(4 * len(panels), 3.6))
    for number, (pixels, layout) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1, title=f"{pixels} x {pixels}, {layout}", xlabel="regions")
        for method in METHODS[1:]:
            method_rows = [
                row for row in rows if (row["pixels"], row["layout"], row["method"]) == (pixels, layout, method)
            ]
            if method_rows:
                errors = [[row["ratio_to_plain"] - row["ratio_low"] for row in method_rows]]
                errors += [[row["ratio_high"] - row["ratio_to_plain"] for row in method_rows]]
                counts = [row["regions"] for row in method_rows]
                axes.errorbar(counts, [row["ratio_to_plain"] for row in method_rows], errors, label=method, marker=".")
        axes.axhline(1, color="grey", linewidth=0.5)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        if number == 0:
            axes.set_ylabel("time of a step, plain = 1")
            axes.legend(fontsize=7)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    record.run("regional", measure, plot)
