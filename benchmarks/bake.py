"""What baking a LoRA into a checkpoint costs beside copying the checkpoint."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory

import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file

import artaug as aa
from benchmarks import _record as record

SHARDS = 3
RANK = 16


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """FLUX.1's transformer, in its own proportions."""

    channels: int = 1536
    double_blocks: int = 6
    single_blocks: int = 14

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Every matrix of the blocks, by module path."""
        wide = self.channels
        found: dict[str, tuple[int, int]] = {}
        for number in range(self.double_blocks):
            block = f"transformer_blocks.{number}"
            for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
                found[f"{block}.attn.{name}"] = (wide, wide)
            for side in ("", "_context"):
                found[f"{block}.ff{side}.net.0.proj"] = (4 * wide, wide)
                found[f"{block}.ff{side}.net.2"] = (wide, 4 * wide)
                found[f"{block}.norm1{side}.linear"] = (6 * wide, wide)
        for number in range(self.single_blocks):
            block = f"single_transformer_blocks.{number}"
            found |= {f"{block}.attn.{name}": (wide, wide) for name in ("to_q", "to_k", "to_v")}
            found[f"{block}.proj_mlp"] = (4 * wide, wide)
            found[f"{block}.proj_out"] = (wide, 5 * wide)
            found[f"{block}.norm.linear"] = (3 * wide, wide)
        return found


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way of baking."""

    dtype: torch.dtype
    cold: bool = False
    """Whether the checkpoint has to be read from disk, instead of from memory that caches it."""
    stochastic_seed: int | None = None


BFLOAT16 = Case(dtype=torch.bfloat16)
CASES = (
    BFLOAT16,
    Case(dtype=torch.bfloat16, cold=True),
    Case(dtype=torch.bfloat16, stochastic_seed=0),
    Case(dtype=torch.float32),
)


def measure(*, quick: bool) -> list[record.Row]:
    """Bake a LoRA on attention and MLPs into FLUX-like shards, interleaved with ``cp`` of the same files, same disk.

    Both end with the files on disk: baking syncs its files before they take their name, and ``cp`` is followed by
    ``sync`` of its files. ``ratio_to_cp`` is the throughput of baking by that of ``cp`` and ``sync``, the median of the
    ratios within rounds; ``ratio_to_cp_unsynced`` leaves the ``sync`` out of ``cp`` alone. Low and high are quartiles.
    ``cold`` files have been dropped from the page cache before each. ``peak_bytes`` is what a fresh process grew by,
    the LoRA not counted.
    """
    if quick:
        return measured(Geometry(double_blocks=1, single_blocks=2), (BFLOAT16,), rounds=3)
    return measured(Geometry(), CASES, rounds=5)


def measured(geometry: Geometry, cases: Sequence[Case], *, rounds: int) -> list[record.Row]:
    """A row for every case."""
    Path("runs").mkdir(exist_ok=True)
    with TemporaryDirectory(dir="runs", prefix="bake-") as name:
        folder, rows = Path(name), []
        for case in cases:
            source = folder / str(case.dtype).removeprefix("torch.")
            if not source.exists():
                write_checkpoint(source, geometry, case.dtype)
            rows.append(timed(case, source, geometry, rounds=rounds))
        return rows


def timed(case: Case, source: Path, geometry: Geometry, *, rounds: int) -> record.Row:
    """Bake and copy in turn, each time beginning with the other."""
    lora, out, copied = lora_for(geometry), source.with_name("baked"), source.with_name("copied")
    ways: dict[str, Callable[[], object]] = {
        "bake": lambda: aa.bake(source, lora, out, stochastic_seed=case.stochastic_seed, progress=False),
        "cp": lambda: subprocess.run(["cp", "-r", source, copied], check=True),  # noqa: S603, S607
        "sync": lambda: subprocess.run(["sync", *copied.iterdir()], check=True),  # noqa: S603, S607
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in ("bake", "cp", "sync") if number % 2 else ("cp", "sync", "bake"):
            if way != "sync":
                prepare(source, cold=case.cold, removing=(out, copied))
            seconds[way].append(clocked(ways[way]))
    prepare(source, cold=case.cold, removing=(out, copied))
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:  # where no memory is left over from before
        peak = fresh.submit(grown, case, source, geometry).result()
    prepare(source, cold=False, removing=(out,))
    return row(case, geometry, seconds, peak=peak, size=sum(one.stat().st_size for one in source.iterdir()))


def row(case: Case, geometry: Geometry, seconds: Mapping[str, Sequence[float]], *, peak: int, size: int) -> record.Row:
    """What became of one case."""
    durable = [copying + syncing for copying, syncing in zip(seconds["cp"], seconds["sync"], strict=True)]
    ratios = [whole / mine for whole, mine in zip(durable, seconds["bake"], strict=True)]
    unsynced = [copying / mine for copying, mine in zip(seconds["cp"], seconds["bake"], strict=True)]
    return {
        "dtype": str(case.dtype).removeprefix("torch."),
        "rounding": "nearest" if case.stochastic_seed is None else "stochastic",
        "cold": case.cold,
        "bytes": size,
        "lora_layers": len(lora_for(geometry).layers),
        "rank": RANK,
        **spread("seconds", seconds["bake"]),
        **spread("cp_seconds", durable),
        **spread("ratio_to_cp", ratios),
        **spread("ratio_to_cp_unsynced", unsynced),
        "peak_bytes": peak,
        "rounds": len(ratios),
    }


def spread(name: str, numbers: Sequence[float]) -> dict[str, float]:
    """The median and the quartiles."""
    low, _, high = quantiles(numbers, n=4, method="inclusive")
    return {name: median(numbers), f"{name}_low": low, f"{name}_high": high}


def lora_for(geometry: Geometry) -> aa.LoRA:
    """Random updates of 3% of the weights' norm on attention and MLPs; modulation is left alone."""
    generator = torch.Generator().manual_seed(1)
    layers = {}
    for name, (outputs, inputs) in geometry.shapes().items():
        if "norm" not in name:
            down = torch.randn(RANK, inputs, generator=generator)
            layers[name] = aa.LowRank(down, torch.randn(outputs, RANK, generator=generator) * 6e-4 / RANK**0.5)
    return aa.LoRA(layers)


def write_checkpoint(folder: Path, geometry: Geometry, dtype: torch.dtype) -> None:
    """Random weights in shards with their index, as diffusers writes them."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    shapes = list(geometry.shapes().items())
    weight_map: dict[str, str] = {}
    for number in range(SHARDS):
        file = f"diffusion_pytorch_model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        tensors = {
            f"{name}.weight": (torch.randn(shape, generator=generator) * 0.02).to(dtype)
            for name, shape in shapes[number * len(shapes) // SHARDS : (number + 1) * len(shapes) // SHARDS]
        }
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def prepare(source: Path, *, cold: bool, removing: Sequence[Path]) -> None:
    """Remove what was written before, let the disk come to rest, and have the source in memory or not."""
    for one in removing:
        shutil.rmtree(one, ignore_errors=True)
    os.sync()
    for path in source.iterdir():
        with path.open("rb", buffering=0) as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(1 << 24):
                    pass


def clocked(way: Callable[[], object]) -> float:
    """Seconds by the clock on the wall."""
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


def grown(case: Case, source: Path, geometry: Geometry) -> int:
    """By how many bytes a process grows while it bakes, the LoRA not counted."""
    torch.set_num_threads(1)
    lora = lora_for(geometry)
    Path("/proc/self/clear_refs").write_text("5")  # the most held from now on
    before = memory("VmRSS")
    aa.bake(source, lora, source.with_name("baked"), stochastic_seed=case.stochastic_seed, progress=False)
    return memory("VmHWM") - before


def memory(kind: str) -> int:
    """What Linux says of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))


def plot(rows: Sequence[record.Row]) -> Figure:
    """Throughput beside that of cp."""
    figure = Figure(figsize=(7, 3))
    axes = figure.add_subplot(xlabel="throughput, GiB/s")
    names = [f"{row['dtype']}, {row['rounding']}{', cold' * row['cold']}" for row in rows]
    for shift, (label, key) in enumerate((("bake", "seconds"), ("cp and sync", "cp_seconds"))):
        speeds = [row["bytes"] / row[key] / 2**30 for row in rows]
        axes.barh([place + 0.4 * shift for place in range(len(rows))], speeds, 0.4, label=label)
    axes.set_yticks([place + 0.2 for place in range(len(rows))], names)
    axes.invert_yaxis()
    axes.legend()
    return figure


if __name__ == "__main__":
    record.run("bake", measure, plot)
