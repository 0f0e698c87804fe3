"""What a run's store costs: time beside the same loop without one, memory by prompts, reading 100,000 attempts, its parts."""

import io
import multiprocessing
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from matplotlib.figure import Figure
from PIL.Image import Image

import artaug as aa
from artaug import playground
from artaug._internal.files import sync_file
from artaug._internal.segments import write_segment
from artaug.critics import PhotometricCritic
from artaug.image_files import image_digest
from artaug.pairs import pair_digest
from artaug.run.storage.attempts import StoredAttempts
from artaug.run.storage.metadata import write_metadata
from artaug.run.storage.store import RunFolder
from artaug.scorers import Chroma
from benchmarks import _record as record
from benchmarks import _run_doubles as doubles

SIZE = 1024
"""Pixels a side, of stand-in pictures."""
DISTINCT = 16
"""Pictures that a long run on the disk of a developer's machine repeats."""


@dataclass(frozen=True)
class Loop:
    """A case of the loop, with a store and without."""

    name: str
    synthesizer: aa.Synthesizer
    critic: aa.Critic
    keep: aa.PairFilter
    prompts: Sequence[str]
    repeats: int

    def seconds(self, store: Path | None) -> tuple[float, float]:
        """Run the loop once: wall-clock and processor time."""
        start, cpu_start = time.perf_counter(), time.process_time()
        for _ in aa.improve(
            self.prompts,
            synthesizer=self.synthesizer,
            critic=self.critic,
            planner=aa.GreedyPlanner(max_regions=3),
            keep=self.keep,
            seed=0,
            store=store,
            progress=False,
        ):
            pass
        return time.perf_counter() - start, time.process_time() - cpu_start


def measure(*, quick: bool) -> Iterator[record.Row]:
    """Measure a run with a store beside the same run without one; files go to a temporary folder in ``runs``.

    ``ratio`` is the median over repeats of the time with a store over that without, which alternate, and ``low`` and
    ``high`` the least and the largest. ``kb per prompt`` is what the peak of the process's memory grows by between the two
    numbers of prompts. ``cpu_ratio`` is that of processor time, in all threads. Reading is of files that were just written, so from the system's cache.
    """
    Path("runs").mkdir(exist_ok=True)
    with TemporaryDirectory(dir="runs") as name:
        folder = Path(name)
        yield from parts(folder, repeats=2 if quick else 9)
        for case in loops(quick=quick):
            yield loop_row(case, folder)
        yield from memory_rows(folder, (8, 16) if quick else (200, 2000), distinct=DISTINCT)
        yield from memory_rows(folder, (4, 8) if quick else (200, 400), distinct=None)
        yield from reading_rows(folder, (800, 4_000) if quick else (10_000, 100_000))


def loops(*, quick: bool) -> Iterator[Loop]:
    """The playground, whose pictures are small and fast, and stand-in pictures of 1,024 px that take a second."""
    yield Loop(
        "playground",
        playground.synthesizer(guide=aa.RegionalAttention()),
        PhotometricCritic(contrast=0.15),
        aa.Gain(Chroma(), at_least=0),
        playground.prompts(8 if quick else 16, seed=3),
        repeats=1 if quick else 7,
    )
    yield Loop(
        "0.1 s a picture of 1,024 px" if quick else "1 s a picture of 1,024 px",
        doubles.PhotoSynthesizer(SIZE, seconds=0.1 if quick else 1.0),
        doubles.ThreeBoxes(),
        doubles.EveryOther(),
        doubles.prompts(8 if quick else 32),
        repeats=1 if quick else 3,
    )


def loop_row(case: Loop, folder: Path) -> record.Row:
    """Time a case with a store and without, in turn."""
    replace(case, prompts=case.prompts[:2]).seconds(None)  # what is loaded and compiled once
    without: list[tuple[float, float]] = []
    with_store: list[tuple[float, float]] = []
    for repeat in range(case.repeats):
        store = folder / f"loop-{repeat}"
        for arm in (None, store) if repeat % 2 else (store, None):
            (without if arm is None else with_store).append(case.seconds(arm))
        shutil.rmtree(store)
    ratios, cpu_ratios = (
        [ours[clock] / plain[clock] for ours, plain in zip(with_store, without, strict=True)] for clock in (0, 1)
    )
    return {
        "what": "loop",
        "case": case.name,
        "prompts": len(case.prompts),
        "repeats": case.repeats,
        "seconds": median(wall for wall, _ in with_store),
        "seconds_without": median(wall for wall, _ in without),
        "ratio": median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "cpu_ratio": median(cpu_ratios),
    }


def memory_rows(folder: Path, counts: tuple[int, int], *, distinct: int | None) -> Iterator[record.Row]:
    """Peak memory of runs with two numbers of prompts, all attempts held, and then read from the disk."""
    base: dict[str, Any] = {}
    for count in counts:
        store = folder / f"memory-{count}"
        found = in_process(run_in_memory, count, distinct, store)
        row = {"what": "memory", "case": "store", "pictures": distinct or "all differ", "prompts": count, **found}
        yield row | _growth(row, base)
        base = row
        shutil.rmtree(store)
        if distinct is None and count == counts[0]:
            found = in_process(run_in_memory, count, distinct, None)
            yield {"what": "memory", "case": "no store", "pictures": "all differ", "prompts": count, **found}


def _growth(row: dict[str, Any], base: dict[str, Any]) -> dict[str, float]:
    more = row["prompts"] - base.get("prompts", 0)
    return {
        name.replace("_mb", "_kb_per_prompt"): (row[name] - base[name]) * 1000 / more
        for name in row
        if base and name.endswith("_mb")
    }


def run_in_memory(count: int, distinct: int | None, store: Path | None) -> dict[str, float]:
    """Run the loop, hold its attempts, and read them again from the store with a look at some pictures."""
    start = time.perf_counter()
    attempts = list(
        aa.improve(
            doubles.prompts(count),
            synthesizer=doubles.PhotoSynthesizer(SIZE, distinct=distinct),
            critic=doubles.ThreeBoxes(),
            planner=aa.GreedyPlanner(),
            keep=doubles.EveryOther(),
            seed=0,
            store=store,
            progress=False,
        )
    )
    found = {"seconds": time.perf_counter() - start, "peak_mb": peak_mb()}
    if store is not None:
        for place, attempt in enumerate(StoredAttempts(doubles.round_folder(store))):
            if place % 16 == 0 and not isinstance(attempt, aa.Skipped):
                attempt.pair.after.load()
        found["peak_after_reading_mb"] = peak_mb()
    kinds = [type(attempt).__name__.lower() for attempt in attempts]
    return found | {kind: kinds.count(kind) for kind in ("kept", "dropped", "skipped")}


def reading_rows(folder: Path, counts: Sequence[int]) -> Iterator[record.Row]:
    """Write rounds of so many attempts, and read all of them in a process of its own."""
    base: dict[str, Any] = {}
    for count in counts:
        place = folder / f"round-of-{count}"
        doubles.write_round(doubles.round_folder(place), count)
        files = [file for file in place.rglob("*.json") if file.is_file()]
        found = in_process(read_all, place)
        row = {"what": "reading", "case": "all attempts", "prompts": count, "files": len(files), **found}
        yield row | _growth(row, base) | {"record_kb": sum(file.stat().st_size for file in files) / 1000 / count}
        yield {"what": "reading", "case": "list of pairs", "prompts": count, **in_process(list_pairs, place)}
        base = row
        shutil.rmtree(place)


def read_all(folder: Path) -> dict[str, float]:
    """Look at every attempt of a round once."""
    before = peak_mb()
    start, cpu_start = time.perf_counter(), time.process_time()
    attempts = StoredAttempts(doubles.round_folder(folder))
    total = len(attempts)
    opened = time.perf_counter() - start
    kept = sum(isinstance(attempt, aa.Kept) for attempt in attempts)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    return {
        "opening_s": opened,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "attempts": total,
        "kept": kept,
        "grown_mb": peak_mb() - before,
    }


def list_pairs(folder: Path) -> dict[str, float]:
    """Write the list of a run's pairs, as at the end of each round."""
    before, start = peak_mb(), time.perf_counter()
    write_metadata(RunFolder(folder))
    return {"seconds": time.perf_counter() - start, "grown_mb": peak_mb() - before}


def parts(folder: Path, *, repeats: int) -> Iterator[record.Row]:
    """Time the parts of storing pictures of 1,024 px; those of a chunk are given by picture."""
    images = [doubles.photo(number, SIZE) for number in range(doubles.CHUNK)]
    pictures, encoded = aa.ImageFolder(folder / "images"), encode(images[0])
    pair = aa.ImagePair(prompt="a market", before=images[0], after=images[1])
    chunk, path = doubles.chunk_record(doubles.prompts(doubles.CHUNK), range(doubles.CHUNK), pictures), folder / "file"

    def fresh(repeat: int) -> list[Image]:
        return [doubles.photo((repeat + 1) * 1000 + number, SIZE) for number in range(doubles.CHUNK)]

    works: dict[str, tuple[Callable[[int], Any], Callable[[Any], Any], int]] = {
        "encode": (lambda _: images[0], encode, 1),
        "digest": (lambda _: images[0], image_digest, 1),
        "pair digest": (lambda _: pair, pair_digest, 1),
        "flush one file": (lambda _: path.write_bytes(encoded), lambda _: sync_file(path), 1),
        "store a chunk's pictures": (fresh, pictures.add_all, doubles.CHUNK),
        "store them again": (lambda _: images, pictures.add_all, doubles.CHUNK),
        "write the chunk's file": (
            lambda repeat: folder / f"segments/{repeat}.json",
            lambda target: write_segment(target, chunk, what="a chunk", remedy="Make room."),
            doubles.CHUNK,
        ),
    }
    pictures.add_all(images)
    for name, (prepare, work, count) in works.items():
        times = []
        for repeat in range(repeats):
            given = prepare(repeat)
            start = time.perf_counter()
            work(given)
            times.append((time.perf_counter() - start) * 1000 / count)
        yield {"what": "part", "case": name, "ms": median(times), "low": min(times), "high": max(times)}


def encode(image: Image) -> bytes:
    """A picture as `ImageFolder` writes it."""
    buffer = io.BytesIO()
    image.save(buffer, "webp", lossless=True, method=0, quality=0)
    return buffer.getvalue()


def in_process(work: Callable[..., dict[str, float]], *arguments: object) -> dict[str, float]:
    """What a function returns in a new process, whose peak of memory is its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks._record", "benchmarks._run_doubles"])  # so that torch is imported once
    with context.Pool(1) as pool:
        return pool.apply(work, arguments)


def peak_mb() -> float:
    """The most memory that this process has had, in units of 10^6 bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # there getrusage begins with the peak of the parent
        return (
            next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
            * 1.024e-3
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1e-6 if sys.platform == "darwin" else 1.024e-3)


def plot(rows: Sequence[record.Row]) -> Figure:
    """The ratio of every loop, the peak by prompts, and the parts."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    ratios, peaks, costs = figure.subplots(1, 3)
    loop, memory, part = ([row for row in rows if row["what"] == what] for what in ("loop", "memory", "part"))
    for place, row in enumerate(loop):
        spread = [[row["ratio"] - row["low"]], [row["high"] - row["ratio"]]]
        ratios.errorbar([place], [row["ratio"]], yerr=spread, marker="o", capsize=4)
    ratios.set_xticks(range(len(loop)), [row["case"] for row in loop], fontsize=7)
    ratios.axhline(1, color="#888", linewidth=0.8)
    ratios.set_title("time with a store / without")
    for case, kind in dict.fromkeys((row["case"], row["pictures"]) for row in memory):
        line = [row for row in memory if (row["case"], row["pictures"]) == (case, kind)]
        label = f"{case}, pictures: {kind}"
        peaks.plot([row["prompts"] for row in line], [row["peak_mb"] for row in line], marker="o", label=label)
    peaks.set(title="peak memory", xlabel="prompts", ylabel="MB", ylim=(0, None))
    peaks.legend(fontsize=7)
    costs.barh([row["case"] for row in part], [row["ms"] for row in part])
    costs.set(title="a picture of 1,024 px", xlabel="ms")
    return figure


if __name__ == "__main__":
    record.run("runs", measure, plot)
