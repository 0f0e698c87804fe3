"""The loop on Ray beside plain processes: what a worker is worth, what Ray costs, what overlap hides, and what memory does."""

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TypedDict

import torch
from matplotlib.figure import Figure
from PIL.Image import Image

import artaug as aa
from artaug import playground
from artaug.critics import PhotometricCritic
from artaug.scale import RayCluster
from artaug.scorers import Chroma
from artaug.testing import FixedCritic, FixedFilter, SwatchSynthesizer
from benchmarks import _record as record
from benchmarks import _timing as timing

GOALS = {"two workers over two plain processes": 0.95, "one worker over one process": 0.97, "hidden": 0.9}
BATCH = 8
ANSWER_S = 0.3
"""What the stand-in for a served critic takes for a batch of answers, asked all at once."""

build = partial(playground.synthesizer, guide=aa.OutputMix(), steps=4)


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    prompts: int
    repeats: int
    memory_prompts: int

    @classmethod
    def of(cls, *, quick: bool) -> "Effort":
        """A minute, or half an hour."""
        return cls(16, 1, 400) if quick else cls(256, 10, 10_000)


def measure(*, quick: bool) -> Iterator[record.Row]:
    """Time `improve` with a store on the playground: in this process, on Ray with one and two workers, and in two plain processes.

    All have one thread of torch each, the model loaded, and the same prompts; the two plain processes have one half each. They
    take turns. ``rate`` is the prompts a second over those of another way in the same turn: the median, with quartiles. Then a
    critic that takes 300 ms for a batch of answers, as a server does, once waited for and once beside drawing: ``hidden`` is
    the share of its time that a run does not notice. Then what `RunPlan.on` simulates from the seconds of one worker, beside
    what runs on one worker and on two: ``predicted``, over the seconds of the run in the same turn. Then the memory of the process that drives a cluster, over stand-in prompts.
    """
    torch.set_num_threads(1)
    effort = Effort.of(quick=quick)
    Path("runs").mkdir(exist_ok=True)
    with TemporaryDirectory(dir="runs") as name:
        yield from rate_rows(effort, Path(name).resolve())
        yield from overlap_rows(effort, Path(name).resolve())
        yield from simulation_rows(effort, Path(name).resolve())
        yield from memory_rows(effort, Path(name).resolve())


# Rates ------------------------------------------------------------------------------------------


class LoopParts(TypedDict):
    """What a run has beside its synthesizer."""

    critic: aa.Critic
    planner: aa.RegionPlanner
    keep: aa.PairFilter


def loop_parts() -> LoopParts:
    """Parts that take little beside drawing."""
    return {
        "critic": PhotometricCritic(contrast=0.15),
        "planner": aa.GreedyPlanner(max_regions=2),
        "keep": aa.Gain(Chroma(), at_least=0),
    }


def improve(prompts: Sequence[str], synthesizer: aa.Synthesizer, store: Path) -> float:
    """Seconds of a whole run."""
    start = time.perf_counter()
    for _ in aa.improve(
        prompts,
        synthesizer=synthesizer,
        **loop_parts(),
        seed=0,
        batch_size=BATCH,
        store=store,
        check="arguments",
        progress=False,
    ):
        pass
    seconds = time.perf_counter() - start
    shutil.rmtree(store)
    return seconds


def _plain_process(pipe: Connection, folder: str) -> None:
    """A process with a model, which runs what it is sent."""
    torch.set_num_threads(1)
    synthesizer = build()
    pipe.send("ready")
    while (prompts := pipe.recv()) is not None:
        pipe.send(improve(prompts, synthesizer, Path(folder) / f"by hand {os.getpid()}"))


class PlainProcesses:
    """Processes that each run their part of the prompts, started by hand, without Ray."""

    def __init__(self, count: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        for _ in range(count):
            here, there = context.Pipe()
            context.Process(target=_plain_process, args=(there, str(folder)), daemon=True).start()
            self._pipes.append(here)
        for pipe in self._pipes:
            pipe.recv()

    def run(self, prompts: Sequence[str]) -> float:
        """Seconds until the last one is done."""
        start, half = time.perf_counter(), len(prompts) // len(self._pipes)
        for number, pipe in enumerate(self._pipes):
            pipe.send(prompts[number * half : (number + 1) * half])
        for pipe in self._pipes:
            pipe.recv()
        return time.perf_counter() - start

    def close(self) -> None:
        """Let them end."""
        for pipe in self._pipes:
            pipe.send(None)


def rate_rows(effort: Effort, folder: Path) -> Iterator[record.Row]:
    """Start everything, and time all ways in turn."""
    prompts = playground.prompts(effort.prompts, seed=0)
    with ExitStack() as stack:
        start = time.perf_counter()
        cluster = stack.enter_context(RayCluster())
        ray_s = time.perf_counter() - start
        pools = {}
        for replicas in (1, 2):
            start = time.perf_counter()
            pools[replicas] = cluster.synthesizer(build, replicas=replicas, cpus=0)
            pools[replicas].pool.wait_for_all()
            yield {
                "what": "start",
                "way": f"Ray, {replicas} workers",
                "ray_s": ray_s,
                "workers_s": time.perf_counter() - start,
                "load_s": pools[replicas].pool.description.load_s,
            }
        plain = PlainProcesses(2, folder)
        stack.callback(plain.close)
        here = build()
        ways: dict[str, Callable[[], float]] = {
            "one process": lambda: improve(prompts, here, folder / "one process"),
            "two processes by hand": lambda: plain.run(prompts),
            "Ray, 1 worker": lambda: improve(prompts, pools[1], folder / "one worker"),
            "Ray, 2 workers": lambda: improve(prompts, pools[2], folder / "two workers"),
        }
        timing.interleaved({name: partial(_warm, way) for name, way in ways.items()}, rounds=1)
        seconds = timing.interleaved(ways, rounds=effort.repeats)
        for name in ways:
            row = {"what": "rate", "way": name, "prompts": len(prompts), "repeats": effort.repeats}
            row["prompts_per_s"] = len(prompts) / median(seconds[name])
            for over in ("one process", "two processes by hand"):
                rates = timing.ratios(seconds, over, name)
                column = f"rate_over_{over.replace(' ', '_')}"
                row |= {column: median(rates), **timing.spread(column, rates)}
            yield row
        yield {"what": "loads", "way": "Ray, 2 workers", "loads": pools[2].loads, "runs": effort.repeats + 1}


def _warm(way: Callable[[], float]) -> float:
    return way()


# Overlap ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ServedStandIn(aa.Critic):
    """Takes as long as a server for a batch of answers, and as little of this machine."""

    seconds: float
    is_beside: bool
    """Whether a run draws meanwhile."""

    @property
    def max_concurrency(self) -> int:
        return int(self.is_beside)

    def critique(self, image: Image, prompt: str) -> aa.Critique | aa.Abstention:
        return self.critique_batch([image], [prompt])[0]

    def critique_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[aa.Critique | aa.Abstention]:
        time.sleep(self.seconds)
        return [aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), prompt),)) for prompt in prompts]


def overlap_rows(effort: Effort, folder: Path) -> Iterator[record.Row]:
    """A critic that takes no time, one that is waited for, and one that answers beside drawing."""
    prompts, synthesizer = playground.prompts(max(effort.prompts // 4, 16), seed=0), build()

    def run(critic: aa.Critic) -> float:
        start = time.perf_counter()
        for _ in aa.improve(
            prompts,
            synthesizer=synthesizer,
            critic=critic,
            planner=aa.GreedyPlanner(),
            keep=FixedFilter(keep=True),
            seed=0,
            batch_size=BATCH,
            store=folder / "overlap",
            check="arguments",
            progress=False,
        ):
            pass
        seconds = time.perf_counter() - start
        shutil.rmtree(folder / "overlap")
        return seconds

    ways = {
        "no time": partial(run, ServedStandIn(0.0, is_beside=False)),
        "waited for": partial(run, ServedStandIn(ANSWER_S, is_beside=False)),
        "beside drawing": partial(run, ServedStandIn(ANSWER_S, is_beside=True)),
    }
    timing.interleaved(ways, rounds=1)
    seconds = timing.interleaved(ways, rounds=effort.repeats)
    turns = zip(*(seconds[way] for way in ways), strict=True)
    hidden = [(waited - beside) / (waited - free) for free, waited, beside in turns]
    yield {
        "what": "overlap",
        "prompts": len(prompts),
        "repeats": effort.repeats,
        **{f"{way.replace(' ', '_')}_s": median(seconds[way]) for way in ways},
        "hidden": median(hidden),
        **timing.spread("hidden", hidden),
    }


# Simulation -------------------------------------------------------------------------------------


def simulation_rows(effort: Effort, folder: Path) -> Iterator[record.Row]:
    """What a plan simulates for one worker and for two, over what runs on them: in each turn, a plan and both runs."""
    prompts = playground.prompts(effort.prompts, seed=0)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    predicted: dict[int, list[float]] = {1: [], 2: []}
    with RayCluster() as cluster:
        pools = {replicas: cluster.synthesizer(build, replicas=replicas, cpus=0) for replicas in seconds}
        for replicas, synthesizer in pools.items():
            synthesizer.pool.wait_for_all()
            improve(prompts, synthesizer, folder / f"warm {replicas}")
        for turn in range(effort.repeats):
            plan = aa.plan_run(
                prompts,
                synthesizer=pools[1],
                **loop_parts(),
                trainer=aa.DifferentialLoRATrainer(rank=2, steps=1, batch_size=1),
                rounds=1,
                batch_size=BATCH,
                sample=2 * BATCH,
                steps=1,
                check="arguments",
                progress=False,
            )
            for replicas, size in zip(pools, plan.on([*pools]).sizes, strict=True):
                predicted[replicas].append(size.seconds_by_phase["loop"])
                seconds[replicas].append(improve(prompts, pools[replicas], folder / f"simulated {replicas} {turn}"))
    for replicas, taken in seconds.items():
        ratios = [ours / real for ours, real in zip(predicted[replicas], taken, strict=True)]
        yield {
            "what": "simulation",
            "way": f"Ray, {replicas} workers",
            "prompts": len(prompts),
            "repeats": effort.repeats,
            "predicted_s": median(predicted[replicas]),
            "seconds": median(taken),
            "predicted": median(ratios),
            **timing.spread("predicted", ratios),
        }


# Memory -----------------------------------------------------------------------------------------


def memory_rows(effort: Effort, folder: Path) -> Iterator[record.Row]:
    """The memory of this process at eight places of a run of stand-in prompts on a worker."""
    prompts = [f"prompt {number}" for number in range(effort.memory_prompts)]
    with RayCluster() as cluster:
        run = aa.improve(
            prompts,
            synthesizer=cluster.synthesizer(SwatchSynthesizer, cpus=0),
            critic=FixedCritic(aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a window"),))),
            planner=aa.GreedyPlanner(),
            keep=FixedFilter(keep=True),
            seed=0,
            batch_size=BATCH,
            store=folder / "memory",
            progress=False,
        )
        every = len(prompts) // 8
        for number, _ in enumerate(run, start=1):
            if number % every == 0:
                yield {"what": "memory", "prompts": number, "resident_mb": _resident_bytes() / 2**20}


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def plot(rows: Sequence[record.Row]) -> Figure:
    """The rates beside one process and two by hand, and the memory over a run."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    bars, memory = figure.subplots(1, 2)
    rates = [row for row in rows if row["what"] == "rate"]
    column = "rate_over_two_processes_by_hand"
    for place, row in enumerate(rates):
        spread = [[row[column] - row[f"{column}_low"]], [row[f"{column}_high"] - row[column]]]
        bars.errorbar([place], [row[column]], yerr=spread, marker="o", capsize=4, color="#3366aa")
    bars.set_xticks(range(len(rates)), [row["way"] for row in rates], rotation=20, ha="right", fontsize=8)
    bars.axhline(1, color="#888", linewidth=0.8)
    bars.axhline(GOALS["two workers over two plain processes"], color="#c33", linewidth=0.8, linestyle=":")
    bars.set(title="prompts a second, over two plain processes by hand", ylim=(0, None))
    sizes = [row for row in rows if row["what"] == "memory"]
    memory.plot([row["prompts"] for row in sizes], [row["resident_mb"] for row in sizes], marker="o", color="#3366aa")
    top = 1.2 * max(row["resident_mb"] for row in sizes)
    memory.set(title="memory of the driving process, MiB", xlabel="prompts", ylim=(0, top))
    return figure


if __name__ == "__main__":
    record.run("scale", measure, plot)
