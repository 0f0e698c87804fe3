"""What a GPU is asked, the most valuable first; the same jobs at a reduced size for a rehearsal."""

import gc
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import FluxTransformer2DModel
from matplotlib.figure import Figure

from artaug.regional import ELIGEN, Isolation
from benchmarks import _flux as flux
from benchmarks import _gpu_tests as gpu_tests
from benchmarks import _grid as grid
from benchmarks import _record as record
from benchmarks import _regional_report as regional_report
from benchmarks import attention, attention_costs, compiled, loop, regional, training
from benchmarks._schedule import Job

_LEARNS = "tests/training/test_on_a_gpu.py::test_a_gpu_learns_what_a_cpu_learns"
GUARDS = (
    "tests/regional/test_attention.py::test_cuda_merges_to_the_definition[dtype1]",
    "tests/regional/test_flex.py::test_cuda_compiles_flex_to_the_definition[dtype1]",
    f"{_LEARNS}[paired]",
    "tests/test_placement.py::test_on_a_gpu_pictures_and_loras_are_those_of_a_resident_pipeline",
)
"""The tests without which no number is worth a second: what is measured computes the right thing."""
FILES = (
    "tests/regional/test_attention.py",
    "tests/regional/test_flex.py",
    "tests/training/test_on_a_gpu.py",
    "tests/diffusion/test_offload.py",
    "tests/test_placement.py",
)
"""All files with tests that need a GPU; the rest of the suite imports more than a lent machine has."""
_WITHOUT_BITSANDBYTES = ("-k", "not (bitsandbytes or nf4)", "--deselect", f"{_LEARNS}[eight bits]")
"""A package that may be too large to be carried to a machine without a network."""
_SMALL = replace(flux.SCALED_DOWN, double_blocks=1, single_blocks=1, heads=2)
_EFFORT = regional.Effort(seconds=10.0, max_rounds=7)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The sizes of all jobs."""

    geometry: flux.Geometry
    side: int
    """Image tokens on a side of what stands for 1,024 px."""
    effort: regional.Effort
    rounds: int
    """Of training steps."""
    operations: attention.Sizes
    prices: tuple[attention_costs.Point, ...]
    """Where the price of attention is measured, the most telling first."""
    guards: tuple[str, ...]
    """Arguments of pytest."""
    tests: tuple[str, ...]

    def side_of(self, pixels: int) -> int:
        """Image tokens on a side of what stands for a picture of so many pixels."""
        return self.side * pixels // 1024


def price_points(*sides: int, geometry: flux.Geometry, regions: Sequence[int]) -> tuple[attention_costs.Point, ...]:
    """One picture at every size, and four at the first ones; steps of training at the first."""
    first = attention_costs.Point(
        side=sides[0],
        regions=4,
        rows=1,
        heads=geometry.heads,
        channels=geometry.head_channels,
        dtype=geometry.dtype,
        device=geometry.device,
    )
    weighted = Isolation(base_weight=0.3)
    points = [
        replace(first, side=side, regions=count, rows=rows, isolation=isolation)
        for rows, counted in ((1, sides), (4, sides[:2]))
        for side in counted
        for count in regions
        for isolation in (ELIGEN, weighted)
    ]
    learned = [replace(first, isolation=isolation, needs_grad=True) for isolation in (ELIGEN, weighted)]
    return (*points, *learned)


ON_GPU = Scale(
    geometry=flux.FLUX_DEV,
    side=64,
    effort=_EFFORT,
    rounds=3,
    operations=attention.ON_GPU,
    prices=price_points(64, 32, 128, geometry=flux.FLUX_DEV, regions=(4, 1, 16)),
    guards=("-m", "gpu", *GUARDS),
    tests=("-m", "gpu", *(option for test in GUARDS for option in ("--deselect", test)), *FILES),
)
REHEARSAL = Scale(
    geometry=_SMALL,
    side=16,
    effort=regional.Effort(seconds=0.5, min_rounds=2, max_rounds=2),
    rounds=2,
    operations=attention.QUICK,
    prices=price_points(16, 8, geometry=_SMALL, regions=(4, 1)),
    guards=("-k", "log_sum_exp", "tests/regional/test_attention.py"),
    tests=("-k", "compiled", "tests/training/test_on_a_gpu.py"),
)


def jobs(*, rehearse: bool) -> list[Job]:
    """All jobs in order. Estimates are for an H100 or H200; a rehearsal on two cores takes about as long."""
    scale = REHEARSAL if rehearse else ON_GPU
    tests = scale.tests
    if not rehearse and importlib.util.find_spec("bitsandbytes") is None:
        tests = (*_WITHOUT_BITSANDBYTES, *tests)
    half, one, two = (
        grid.Point(tokens=scale.side_of(pixels) ** 2, regions=4, geometry=scale.geometry, extra=("flex",))
        for pixels in (512, 1024, 2048)
    )
    step = partial(_grid_job, scale)
    train = partial(_training_job, scale)
    operations = partial(operation_rows, scale.geometry, scale.operations)
    return [
        _tests_job("tests: guards", 60, scale.guards),
        step("grid: 1,024 px, R = 4", 55, one),
        step("grid: 1,024 px, R = 16", 55, replace(one, regions=16)),
        step("grid: 1,024 px, R = 1", 55, replace(one, regions=1)),
        step("grid: 1,024 px, R = 4, unlike batch of 4", 85, replace(one, batch=4, rows="unlike")),
        train("training: 1,024 px", 50),
        train("training: 512 px", 40, pixels=512),
        step("grid: 2,048 px, R = 4", 120, two),
        Job(
            name="price of attention", benchmark="attention_costs", seconds=100, rows=partial(price_rows, scale.prices)
        ),
        Job(name="operations of attention", benchmark="attention", seconds=80, rows=operations),
        train("training: 1,024 px, batch of 4", 90, batch=4),
        Job(name="loop: drawing", benchmark="loop", seconds=120, rows=partial(drawing_rows, quick=rehearse)),
        Job(name="compiled blocks: 512 px", benchmark="compiled", seconds=120, rows=partial(compiled_rows, half)),
        step("grid: 1,024 px, R = 4, balanced", 50, replace(one, layout="balanced", extra=())),
        step("grid: 512 px, R = 4, unlike batch of 16", 90, replace(half, batch=16, rows="unlike")),
        step("grid: 512 px, R = 4, batch of 4", 50, replace(half, batch=4)),
        step("grid: 1,024 px, R = 4, without cuDNN", 55, one, cudnn_attention=False),
        _tests_job("tests: all others", 120, tests),
        step("grid: 1,024 px, R = 4, soft", 50, replace(one, layout="soft")),
        train("training: 512 px, batch of 4", 50, pixels=512, batch=4),
        Job(name="loop: stages", benchmark="loop", seconds=120, rows=partial(stage_rows, quick=rehearse)),
        Job(name="compiled blocks: 1,024 px", benchmark="compiled", seconds=120, rows=partial(compiled_rows, one)),
        step("grid: 2,048 px, R = 16", 130, replace(two, regions=16)),
        train("training: 512 px, with cuDNN", 45, pixels=512, cudnn_attention=True),
    ]


def _grid_job(scale: Scale, name: str, seconds: float, point: grid.Point, *, cudnn_attention: bool = True) -> Job:
    return Job(
        name=name,
        benchmark="regional" if cudnn_attention else "regional_without_cudnn",
        seconds=seconds,
        rows=partial(grid_rows, point, scale.effort),
        cudnn_attention=cudnn_attention,
    )


def _training_job(
    scale: Scale, name: str, seconds: float, *, pixels: int = 1024, batch: int = 1, cudnn_attention: bool = False
) -> Job:
    """Without cuDNN's attention, whose backward pass failed with torch 2.11: see the traps in docs/training.md."""
    case = training.Case(side=scale.side_of(pixels), batch=batch, recomputing=True)
    return Job(
        name=name,
        benchmark="training_with_cudnn" if cudnn_attention else "training",
        seconds=seconds,
        rows=partial(training_rows, scale.geometry, case, scale.rounds),
        cudnn_attention=cudnn_attention,
    )


def _tests_job(name: str, seconds: float, selection: Sequence[str]) -> Job:
    ordered = ("-q", "-p", "no:randomly", "--continue-on-collection-errors", *selection)
    return Job(name=name, benchmark="gpu_tests", seconds=seconds, rows=partial(gpu_tests.rows, ordered))


@lru_cache(maxsize=1)
def transformer(geometry: flux.Geometry) -> FluxTransformer2DModel:
    """The model of the last geometry, which the jobs of one process share."""
    return geometry.model()


def grid_rows(point: grid.Point, effort: regional.Effort) -> Iterator[record.Row]:
    """One point of the grid, every method."""
    yield from regional.point_rows(point, transformer(point.geometry), effort=effort)
    torch.compiler.reset()  # past eight sizes torch stops compiling
    gc.collect()


def training_rows(geometry: flux.Geometry, case: training.Case, rounds: int) -> Iterator[record.Row]:
    """One case of the training benchmark, every method."""
    yield from training.measure_case(geometry, transformer(geometry), case, rounds=rounds)
    gc.collect()


def loop_case(*, quick: bool) -> loop.Case:
    """FLUX.1-dev's geometry in a whole pipeline; the playground's model for a rehearsal."""
    transformer.cache_clear()
    return loop.playground_case(quick=True) if quick else loop.stand_in_case(quick=False)


def drawing_rows(*, quick: bool) -> Iterator[record.Row]:
    """The loop's drawing beside the bare pipeline's, with the smallest batch."""
    case = loop_case(quick=quick)
    with TemporaryDirectory() as folder:
        yield from loop.drawing_rows(case, Path(folder), case.batch_sizes[0])


def stage_rows(*, quick: bool) -> Iterator[record.Row]:
    """Where the time of `enhance` goes."""
    with TemporaryDirectory() as folder:
        yield from loop.stage_rows(loop_case(quick=quick), Path(folder))


def compiled_rows(point: grid.Point) -> Iterator[record.Row]:
    """Plain and guided steps, with blocks compiled and without."""
    transformer.cache_clear()  # blocks stay compiled: this job has a model of its own
    yield from compiled.point_rows(point, rounds=5)


def price_rows(points: Sequence[attention_costs.Point]) -> Iterator[record.Row]:
    """The seconds of attention in splits of every kind, then the constants fitted on all of them, and flex beside both."""
    transformer.cache_clear()
    measured = []
    for point in points:
        for name, plan, seconds in attention_costs.point_seconds(point, repeats=5):
            measured.append((point, name, plan.sizes, seconds))
            yield attention_costs.point_row(point, name) | {"seconds": seconds}
    costs = attention_costs.fit(measured)
    fitted = (*attention_costs.LINEAR, "backward", "merged_backward")
    yield {"way": "fit", **{name: getattr(costs, name) for name in fitted}}
    torch.compiler.reset()
    with torch.compiler.config.patch(force_disable_caches=True):  # type: ignore[attr-defined]
        for side in sorted({point.side for point in points}, reverse=True)[:2]:
            yield from attention_costs.flex_rows(costs, [replace(points[0], side=side)])


def operation_rows(geometry: flux.Geometry, sizes: attention.Sizes) -> Iterator[record.Row]:
    """Single operations of a layer."""
    transformer.cache_clear()  # their sizes reach into its memory
    yield from attention.measure_layer(attention.Layer.of(geometry), sizes)


COLUMNS = {
    "attention": ("operation", "queries", "regions", "seconds", "first_seconds", "error"),
    "compiled": ("method", "compiled", "pixels", "seconds", "ratio_to_plain", "ratio_to_compiled", "first_seconds"),
    "loop": ("what", "stage", "way", "batch", "seconds", "share", "ms_per_picture", "rate", "whole_rate", "same_bits"),
    "training": ("method", "pixels", "batch", "seconds_per_step", "ratio_to_sft", "peak_to_script"),
}
"""Of the tables at the end of a run."""


def text(benchmark: str, rows: Sequence[record.Row]) -> str:
    """The rows of a benchmark, as short as they can be told: a lent machine may return the end of its output only."""
    if benchmark.startswith("regional"):
        return regional_report.text(rows)
    if benchmark == "gpu_tests":
        failed = [row for row in rows if row["outcome"] == "failed"]
        return "\n".join(
            [f"{len(rows) - len(failed)} of {len(rows)} did not fail", *(str(row["test"]) for row in failed)]
        )
    if benchmark == "attention":
        rows = [row for row in rows if row["operation"].startswith("layout") or "error" in row]
    if benchmark == "attention_costs":
        fits = [row for row in rows if row["way"] in {"fit", "flex"}]
        return "\n".join([f"{len(rows) - len(fits)} measured", *(str(dict(row)) for row in fits)])
    columns = COLUMNS.get(benchmark.partition("_")[0], ())
    return record.table([{name: row[name] for name in columns or row if name in row} for row in rows])


def write(folder: Path, benchmark: str, recorded: record.Row, rows: Sequence[record.Row]) -> None:
    """A benchmark's record and its plot, as it writes them itself."""
    on_grid = benchmark.startswith("regional")
    record.write(folder / f"{benchmark}.json", recorded, rows, regional_report.summarize(rows) if on_grid else None)
    plots: dict[str, Callable[[Sequence[record.Row]], Figure]] = {
        "regional": regional_report.plot,
        "regional_without_cudnn": regional_report.plot,
        "training": training.plot,
        "training_with_cudnn": training.plot,
        "attention": attention.plot,
        "compiled": compiled.plot,
        "loop": loop.plot,
    }
    plot = plots.get(benchmark)
    if plot:
        plot(rows).savefig(folder / f"{benchmark}.png", dpi=150, bbox_inches="tight")
