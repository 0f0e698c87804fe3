"""The cost of regions over plain drawing: every method on a grid, and what the choice of ``auto`` costs over the best."""

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from artaug.regional import Guide, GuidedRun
from artaug.regional.guide import steer
from benchmarks import _drawings as drawings
from benchmarks import _flux as flux
from benchmarks import _grid as grid
from benchmarks import _memory as memory
from benchmarks import _record as record
from benchmarks import _regional_report as report
from benchmarks import _timing as timing


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long a point is measured."""

    seconds: float
    """About so long, if the limits allow it."""
    min_rounds: int = 3
    max_rounds: int = 15

    def rounds(self, seconds_per_round: float) -> int:
        """Rounds in that time, within the limits."""
        return max(self.min_rounds, min(self.max_rounds, int(self.seconds / seconds_per_round)))


ON_CPU, ON_GPU = Effort(seconds=5.0), Effort(seconds=12.0, max_rounds=7)
GPU_LIMIT_S = 300.0
"""After so long no further point is begun on a GPU, whose time is dear: a point takes up to a minute and a half."""
QUICK = Effort(seconds=1.5, min_rounds=2, max_rounds=5)


def measure(*, quick: bool) -> Iterator[record.Row]:
    """Measure every method of regional attention, and ``auto``, on a grid of batches, in turn.

    ``part`` ``step``: a whole denoiser step of a batch. With CUDA the transformer is FLUX.1-dev's own geometry in
    bfloat16, else a scaled-down one, the smaller the longer its sequences; its weights are random. ``part`` ``drawing``,
    without CUDA: whole drawings of the playground's model, each with prompts not drawn before.

    A round takes every method once, each time beginning with another one: ``seconds`` is the median over rounds,
    ``ratio_to_plain`` the median of the ratios within rounds, low and high are quartiles. ``first_seconds`` is the first
    step, in which the layouts are prepared; ``compile_seconds`` what it took longer than the second where it compiled.
    ``peak_bytes`` holds weights, inputs, and the most that torch's allocator held at once beside them in the first step
    of a layout, what is kept of the layout included.
    ``attention_calls`` counts calls of attention kernels in the denoiser. In a row of ``auto``, ``regret`` is its time over
    that of the ``best`` method at the same point; ``choice`` is the method whose kernels it called, if it is one of
    them, and ``choice_regret`` is that method's time over the best one's.
    """
    if torch.cuda.is_available():
        points = grid.gpu_points()
        if quick:
            shallow = replace(flux.FLUX_DEV, double_blocks=1, single_blocks=2)
            points = [replace(point, geometry=shallow) for point in points[:3]]
        yield from measured(points, effort=QUICK if quick else ON_GPU, limit_s=GPU_LIMIT_S)
    elif quick:
        yield from measured(grid.quick_points(), effort=QUICK)
        yield from drawings.measured([drawings.Batch(size=4, rows="unlike")], rounds=2, steps=3)
    else:
        yield from drawings.measured(rounds=5)
        yield from measured(grid.cpu_points(), effort=ON_CPU)


def measured(points: Sequence[grid.Point], *, effort: Effort, limit_s: float = float("inf")) -> Iterator[record.Row]:
    """The rows of the points, each point's as soon as it is measured. A model is built once for neighbors in the list.

    Args:
        points: what to measure, the most valuable first.
        effort: how long each takes.
        limit_s: seconds after which no further point is begun.
    """
    start = time.monotonic()
    model: FluxTransformer2DModel | None = None
    built: flux.Geometry | None = None
    for point in points:
        if time.monotonic() - start > limit_s:
            return
        if model is None or point.geometry != built:
            model = None  # so that two models are never held
            model, built = point.geometry.model(), point.geometry
        yield from point_rows(point, model, effort=effort)
        torch.compiler.reset()  # one graph a size, and past eight of them torch stops compiling
        gc.collect()


def point_rows(point: grid.Point, model: FluxTransformer2DModel, *, effort: Effort) -> list[dict[str, Any]]:
    """One row for each method, for one point.

    Args:
        point: what to measure.
        model: of the point's geometry.
        effort: how long.
    """
    setting, other = (make_setting(point, model, variant=variant) for variant in (0, 1000))
    guides = {method: point.guide(method) for method in point.methods}
    with uncached_kernels() if "flex" in guides else nullcontext():
        # Other boxes: a layout is prepared once a process, and what that holds in memory is observed below.
        first = {method: step_seconds(other, guide, count=2) for method, guide in guides.items()}
    observed = {
        method: memory.observe(partial(step_seconds, setting, guide, count=1), inputs=setting.inputs)
        for method, guide in guides.items()
    }
    timed = _timed_steps(first["plain"][1])
    rounds = effort.rounds((1 + timed) * sum(steps[1] for steps in first.values()))
    ways = {method: partial(_visit, setting, guide, timed) for method, guide in guides.items()}
    seconds = timing.interleaved(ways, rounds=rounds)
    rows = [_row(point, method, seconds, first[method], observed) for method in guides]
    choice = chosen(observed)
    rows[-1] |= {"choice": choice, **timing.regret(seconds, "auto", among=grid.EXACT, choice=choice).columns}
    return rows


def make_setting(point: grid.Point, model: FluxTransformer2DModel, *, variant: int = 0) -> flux.Setting:
    """What a point is measured on; a setting for each variant, which differ in their boxes."""
    return flux.Setting(
        geometry=point.geometry,
        model=model,
        side=point.side,
        pictures=point.pictures(variant=variant),
        gradients=point.gradients,
    )


def uncached_kernels() -> AbstractContextManager[None]:
    """A ``with`` block in which torch's compiler finds no kernel of an earlier process, so that compiling takes its time."""
    from torch._inductor.utils import fresh_cache  # noqa: PLC0415 - loads torch's compiler

    return fresh_cache()


def _timed_steps(seconds: float) -> int:
    """How many steps of so many seconds are timed at once: more of short ones, whose times vary more."""
    return max(1, min(8, int(0.05 / seconds)))


def _visit(setting: flux.Setting, guide: Guide | None, timed: int) -> float:
    """Seconds of a step: the median of some, after one that prepares the layouts and warms the caches."""
    return median(step_seconds(setting, guide, count=1 + timed)[1:])


def chosen(observed: Mapping[str, memory.Observed]) -> str | None:
    """The method whose attention kernels ``auto`` called, as often and on tensors of the same shapes."""
    calls = observed["auto"].attention_calls
    return next((name for name in grid.EXACT if name in observed and observed[name].attention_calls == calls), None)


def _row(
    point: grid.Point,
    method: str,
    seconds: timing.Seconds,
    first: Sequence[float],
    observed: Mapping[str, memory.Observed],
) -> dict[str, Any]:
    own, plain = observed[method], observed["plain"]
    flops, plain_flops = own.flops, plain.flops
    added = 0 if method in {"plain", "output_mix"} else point.regions * point.geometry.region_tokens
    return {
        "part": "step",
        **point.columns,
        "method": method,
        "pixels": 16 * point.side,
        "tokens": point.tokens + point.geometry.base_tokens + added,
        **timing.timed_columns(seconds, method),
        "first_seconds": first[0],
        "compile_seconds": first[0] - first[1] if own.is_compiled else None,
        "peak_bytes": own.peak_bytes,
        "peak_to_plain": own.peak_bytes / plain.peak_bytes,
        "flops": flops,
        "flops_to_plain": flops / plain_flops if flops and plain_flops else None,
        "attention_flops": own.attention_flops,
        "attention_calls": own.num_attention_calls,
    }


def steering(setting: flux.Setting, guide: Guide | None) -> AbstractContextManager[GuidedRun | None]:
    """A ``with`` block in which the guide steers the batch."""
    return nullcontext() if guide is None else steer(guide, setting.run)


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


if __name__ == "__main__":
    record.run("regional", measure, report.plot, report=report.text, summarize=report.summarize)
