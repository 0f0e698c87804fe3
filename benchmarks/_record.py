"""Output of every benchmark: a table and JSON of its rows, with the machine and versions, and a plot."""

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

from artaug._internal.files import atomic_write

Row = Mapping[str, Any]


def run(
    name: str,
    measure: Callable[..., Iterable[Row]],
    plot: Callable[[Sequence[Row]], Figure],
    *,
    report: Callable[[Sequence[Row]], str] | None = None,
    summarize: Callable[[Sequence[Row]], Row] | None = None,
) -> None:
    """Read options from the command line, measure, print a report of the rows, write NAME.json and NAME.png.

    The JSON is replaced after every row, so that a run that is killed or interrupted keeps the rows measured so far.

    Args:
        name: of the files.
        measure: the benchmark. It takes ``quick``, and its docstring is the help.
        plot: draws the rows.
        report: the rows as text; None for `table`.
        summarize: figures of all rows together, which are kept as ``summary``.
    """
    parser = argparse.ArgumentParser(description=measure.__doc__)
    parser.add_argument("--quick", action="store_true", help="a small run that ends within a minute on two cores")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="where to write")
    parser.add_argument("--without-cudnn-attention", action="store_true", help="torch's own kernels on a GPU instead")
    options = parser.parse_args()
    mpl.use("Agg")
    if options.without_cudnn_attention:
        torch.backends.cuda.enable_cudnn_sdp(False)
    recorded = environment() | {"quick": options.quick}
    rows: list[Row] = []
    for row in measure(quick=options.quick):
        rows.append(row)
        write(options.out / f"{name}.json", recorded, rows, summarize(rows) if summarize else None)
    print((report or table)(rows))
    plot(rows).savefig(options.out / f"{name}.png", dpi=150, bbox_inches="tight")


def write(path: Path, recorded: Row, rows: Sequence[Row], summary: Row | None = None) -> None:
    """Write a benchmark's record: the environment, the rows so far, and figures of all of them. Replaces it atomically."""
    content = {"environment": recorded, **({"summary": summary} if summary else {}), "rows": rows}
    with atomic_write(
        path, what="the result of a benchmark", remedy="Give --out a folder that can be written."
    ) as file:
        file.write_text(json.dumps(content, indent=2) + "\n")


def environment() -> dict[str, Any]:
    """Versions, processor or GPU, threads, date and commit."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)  # noqa: S607
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("artaug", "torch", "diffusers", "transformers", "peft")},
        "processor": _processor(),
        "gpu": gpu,
        "cudnn_attention": torch.backends.cuda.cudnn_sdp_enabled() if gpu else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit.stdout.strip() or None,
    }


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text; columns that a row lacks are empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_format_cell(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _format_cell(cell: object) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()
