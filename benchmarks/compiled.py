"""A guided step beside a plain one, as the model is written and with its blocks compiled."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from matplotlib.figure import Figure

from artaug.regional import Guide
from benchmarks import _flux as flux
from benchmarks import _grid as grid
from benchmarks import _record as record
from benchmarks import _timing as timing
from benchmarks import regional

METHODS = ("plain", "auto")
COMPILED = ", compiled"


def measure(*, quick: bool) -> Iterator[record.Row]:
    """Time steps of plain drawing and of ``auto`` with four regions, on a model as it is written and on compiled blocks.

    With CUDA the transformer is FLUX.1-dev's own geometry in bfloat16, at 512 and 1,024 px, else a scaled-down one. Blocks
    are compiled as diffusers' ``compile_repeated_blocks`` does. ``first_seconds`` is the first step, in which they are;
    ``ratio_to_plain`` is over plain drawing as written, ``ratio_to_compiled`` over plain drawing compiled.
    """
    if torch.cuda.is_available():
        geometry = replace(flux.FLUX_DEV, double_blocks=2, single_blocks=2) if quick else flux.FLUX_DEV
        sides = (32,) if quick else (32, 64)
    else:
        geometry, sides = replace(flux.SCALED_DOWN, double_blocks=1, single_blocks=2), (16,) if quick else (16, 32)
    for side in sides:
        yield from point_rows(grid.Point(tokens=side**2, regions=4, geometry=geometry), rounds=2 if quick else 5)


def point_rows(point: grid.Point, *, rounds: int, backend: str = "inductor") -> list[record.Row]:
    """A row for each method and each way to run it."""
    model = point.geometry.model()
    model.compile_repeated_blocks(backend=backend)
    setting = flux.Setting(geometry=point.geometry, model=model, side=point.side, pictures=point.pictures())
    guides = {method: point.guide(method) for method in METHODS}
    ways = {
        method + COMPILED * compiled: partial(step_seconds, setting, guide, compiled=compiled)
        for compiled in (False, True)
        for method, guide in guides.items()
    }
    with torch.compiler.config.patch(force_disable_caches=True):  # type: ignore[attr-defined]
        first = {name: way(count=1) for name, way in ways.items()}
    for way in ways.values():
        way(count=2)
    seconds = timing.interleaved({name: partial(way, count=2) for name, way in ways.items()}, rounds=rounds)
    torch.compiler.reset()
    gc.collect()
    return [
        {
            **point.columns,
            "pixels": 16 * point.side,
            "method": name.removesuffix(COMPILED),
            "compiled": name.endswith(COMPILED),
            **timing.timed_columns(seconds, name),
            "ratio_to_compiled": median(timing.ratios(seconds, name, "plain" + COMPILED)),
            "first_seconds": first[name],
        }
        for name in ways
    ]


def step_seconds(setting: flux.Setting, guide: Guide | None, *, compiled: bool, count: int) -> float:
    """Seconds of the last of some steps."""
    with nullcontext() if compiled else torch.compiler.set_stance("force_eager"):
        return regional.step_seconds(setting, guide, count=count)[-1]


def plot(rows: Sequence[record.Row]) -> Figure:
    """Milliseconds of a step: a bar for each method and each way."""
    figure = Figure(figsize=(6, 3.6))
    axes = figure.add_subplot(ylabel="milliseconds a step")
    labels = [f"{row['method']}\n{'compiled' if row['compiled'] else 'as written'}\n{row['pixels']} px" for row in rows]
    axes.bar(range(len(rows)), [1000 * row["seconds"] for row in rows])
    axes.set_xticks(range(len(rows)), labels, fontsize=7)
    return figure


if __name__ == "__main__":
    record.run("compiled", measure, plot)
