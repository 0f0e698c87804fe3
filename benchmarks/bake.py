"""The time and memory of baking a LoRA into a checkpoint, compared with copying the checkpoint, and where the time goes."""

import json
import os
import resource
import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory

import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file

import artaug as aa
from artaug.lora.baking.checkpoint import CheckpointFile
from artaug.lora.baking.rounding import WeightUpdate
from artaug.lora.baking.stream import ByteRange, write_chunk
from benchmarks import _record as record

SHARDS = 3
RANK = 16


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The size of a transformer with the proportions of FLUX.1's."""

    channels: int = 1536
    double_blocks: int = 6
    single_blocks: int = 14

    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shapes of all matrices of the blocks, by module path."""
        width = self.channels
        shapes: dict[str, tuple[int, int]] = {}
        for number in range(self.double_blocks):
            block = f"transformer_blocks.{number}"
            for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
                shapes[f"{block}.attn.{name}"] = (width, width)
            for stream in ("", "_context"):
                shapes[f"{block}.ff{stream}.net.0.proj"] = (4 * width, width)
                shapes[f"{block}.ff{stream}.net.2"] = (width, 4 * width)
                shapes[f"{block}.norm1{stream}.linear"] = (6 * width, width)
        for number in range(self.single_blocks):
            block = f"single_transformer_blocks.{number}"
            shapes |= {f"{block}.attn.{name}": (width, width) for name in ("to_q", "to_k", "to_v")}
            shapes[f"{block}.proj_mlp"] = (4 * width, width)
            shapes[f"{block}.proj_out"] = (width, 5 * width)
            shapes[f"{block}.norm.linear"] = (3 * width, width)
        return shapes


@dataclass(frozen=True, kw_only=True)
class Case:
    """A checkpoint and a way to round its weights."""

    geometry: Geometry = Geometry()
    dtype: torch.dtype = torch.bfloat16
    cold: bool = False
    """Read the checkpoint from disk, not from the page cache."""
    stochastic_seed: int | None = None
    rounds: int = 5


SMALL = Case(geometry=Geometry(double_blocks=1, single_blocks=2), rounds=15)
"""0.3 GB, where the start and the end of a bake count most."""
CASES = (
    SMALL,
    Case(),
    Case(cold=True),
    Case(stochastic_seed=0),
    Case(dtype=torch.float32),
)


def measure(*, quick: bool) -> Iterator[record.Row]:
    """Bake a LoRA on attention and MLPs into FLUX-like shards, interleaved with ``cp`` of the same files, same disk.

    Both end with the files on disk: baking syncs its files before it renames them, and ``cp`` is followed by ``sync`` of
    its files. ``ratio_to_cp`` is the throughput of baking over that of ``cp`` and ``sync``, the median of the ratios
    within rounds; ``ratio_to_cp_unsynced`` is the same without ``sync``. Low and high are quartiles. ``cold`` files are
    dropped from the page cache before each measurement. ``peak_bytes`` is the growth of a fresh process without the LoRA.

    ``cpu_seconds`` and ``cp_cpu_seconds`` say what both cost on a machine where others work. Where they go:
    ``read_seconds``, ``update_seconds``, ``hash_seconds`` and ``write_seconds`` of the processor, for each part of a bake
    alone, in one thread; ``sync_seconds`` of the clock, for what is then left to wait for.
    """
    yield from run_cases((replace(SMALL, rounds=3),) if quick else CASES)


def run_cases(cases: Sequence[Case]) -> Iterator[record.Row]:
    """Measure every case; yield a row for each."""
    Path("runs").mkdir(exist_ok=True)
    with TemporaryDirectory(dir="runs", prefix="bake-") as name:
        for case in cases:
            source = Path(name) / f"{case.geometry.double_blocks}-{str(case.dtype).removeprefix('torch.')}"
            if not source.exists():
                write_checkpoint(source, case.geometry, case.dtype)
            yield time_case(case, source)


def time_case(case: Case, source: Path) -> record.Row:
    """Measure baking and copying in alternating order, and then the parts of baking and its memory."""
    lora, out, copied = lora_for(case.geometry), source.with_name("baked"), source.with_name("copied")
    commands: dict[str, Callable[[], object]] = {
        "bake": lambda: aa.bake(source, lora, out, stochastic_seed=case.stochastic_seed, progress=False),
        "cp": lambda: subprocess.run(["cp", "-r", source, copied], check=True),  # noqa: S603, S607
        "sync": lambda: subprocess.run(["sync", *copied.iterdir()], check=True),  # noqa: S603, S607
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    processor: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(case.rounds):
        for name in ("bake", "cp", "sync") if number % 2 else ("cp", "sync", "bake"):
            if name != "sync":
                prepare(source, cold=case.cold, removing=(out, copied))
            before = processor_seconds()
            seconds[name].append(wall_seconds(commands[name]))
            processor[name].append(processor_seconds() - before)
    prepare(source, cold=case.cold, removing=(out, copied))
    parts = part_seconds(case, source, out)
    prepare(source, cold=case.cold, removing=(out, copied))
    with ProcessPoolExecutor(
        1, get_context("spawn")
    ) as process:  # whose memory holds nothing of the measurements above
        peak = process.submit(memory_growth, case, source).result()
    prepare(source, cold=False, removing=(out,))
    size = sum(path.stat().st_size for path in source.iterdir())
    return {
        **result_row(case, seconds, size=size),
        "cpu_seconds": median(processor["bake"]),
        "cp_cpu_seconds": median(map(sum, zip(processor["cp"], processor["sync"], strict=True))),
        **{f"{name}_seconds": parts[name] for name in ("read", "update", "hash", "write", "sync")},
        "peak_bytes": peak,
    }


def result_row(case: Case, seconds: Mapping[str, Sequence[float]], *, size: int) -> record.Row:
    """The case, and how baking compares with copying."""
    durable = [copying + syncing for copying, syncing in zip(seconds["cp"], seconds["sync"], strict=True)]
    ratios = [copying / baking for copying, baking in zip(durable, seconds["bake"], strict=True)]
    unsynced = [copying / baking for copying, baking in zip(seconds["cp"], seconds["bake"], strict=True)]
    return {
        "dtype": str(case.dtype).removeprefix("torch."),
        "rounding": "nearest" if case.stochastic_seed is None else "stochastic",
        "cold": case.cold,
        "bytes": size,
        "lora_layers": len(lora_for(case.geometry).layers),
        "rank": RANK,
        **quartiles("seconds", seconds["bake"]),
        **quartiles("cp_seconds", durable),
        **quartiles("ratio_to_cp", ratios),
        **quartiles("ratio_to_cp_unsynced", unsynced),
        "rounds": len(ratios),
    }


def quartiles(name: str, numbers: Sequence[float]) -> dict[str, float]:
    """The median and the quartiles, as entries of a row."""
    low, _, high = quantiles(numbers, n=4, method="inclusive")
    return {name: median(numbers), f"{name}_low": low, f"{name}_high": high}


def lora_for(geometry: Geometry) -> aa.LoRA:
    """Random updates of 3% of the weights' norm on attention and MLPs; modulation layers have none."""
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
    """Remove earlier output, flush the disk, and put the source into the page cache or out of it."""
    for folder in removing:
        shutil.rmtree(folder, ignore_errors=True)
    os.sync()
    for path in source.iterdir():
        with path.open("rb", buffering=0) as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(1 << 24):
                    pass


def wall_seconds(command: Callable[[], object]) -> float:
    """Wall-clock seconds of a call."""
    started = time.perf_counter()
    command()
    return time.perf_counter() - started


def processor_seconds() -> float:
    """Processor time of this process and of those that it has waited for."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def part_seconds(case: Case, source: Path, out: Path) -> Mapping[str, float]:
    """What a bake does with the weights of a checkpoint, one part after the other: the seconds of each."""
    seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def timed(part: str, clock: Callable[[], float] = time.thread_time) -> Iterator[None]:
        started = clock()
        yield
        seconds[part] += clock() - started

    lora, digest = lora_for(case.geometry), sha256()
    out.mkdir()
    for file in map(CheckpointFile.read, sorted(source.glob("*.safetensors"))):
        with file.path.open("rb", buffering=0) as reader, (out / file.path.name).open("xb", buffering=0) as writer:
            os.posix_fallocate(writer.fileno(), 0, file.size)
            for name, info in file.tensors.items():
                update, unit = None, 1
                if layer := lora.layers.get(name.removesuffix(".weight")):
                    with timed("update"):
                        dtype, seed = info.dtype, case.stochastic_seed
                        update = WeightUpdate(layer, scale=1, dtype=dtype, seed=seed, name=name)
                        unit = update.row_bytes
                for size in ByteRange(info.end - info.start, unit=unit).chunk_sizes():
                    chunk = np.empty(size, np.uint8).data
                    with timed("read"):
                        reader.readinto(chunk)
                    if update is not None:
                        with timed("update"):
                            update.add_to(chunk)
                    with timed("hash"):
                        digest.update(chunk)
                    with timed("write"):
                        write_chunk(writer, chunk, writer.tell())
            with timed("sync", time.perf_counter):
                os.fsync(writer.fileno())
    return seconds


def memory_growth(case: Case, source: Path) -> int:
    """Bytes that this process grows by while it bakes, without the LoRA."""
    torch.set_num_threads(1)
    lora = lora_for(case.geometry)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak, VmHWM
    before = process_memory("VmRSS")
    aa.bake(source, lora, source.with_name("baked"), stochastic_seed=case.stochastic_seed, progress=False)
    return process_memory("VmHWM") - before


def process_memory(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def plot(rows: Sequence[record.Row]) -> Figure:
    """Bars of the throughput of baking and of cp."""
    figure = Figure(figsize=(7, 3))
    axes = figure.add_subplot(xlabel="throughput, GiB/s")
    names = [f"{row['bytes'] / 1e9:.1f} GB, {row['dtype']}, {row['rounding']}{', cold' * row['cold']}" for row in rows]
    for shift, (label, key) in enumerate((("bake", "seconds"), ("cp and sync", "cp_seconds"))):
        speeds = [row["bytes"] / row[key] / 2**30 for row in rows]
        axes.barh([position + 0.4 * shift for position in range(len(rows))], speeds, 0.4, label=label)
    axes.set_yticks([position + 0.2 for position in range(len(rows))], names)
    axes.invert_yaxis()
    axes.legend()
    return figure


if __name__ == "__main__":
    record.run("bake", measure, plot)
