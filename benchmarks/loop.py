"""Where the time of the whole loop goes, by stage, and its drawing beside the bare pipeline's, with a store and without."""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from diffusers import DiffusionPipeline
from matplotlib.figure import Figure
from PIL.Image import Image

import artaug as aa
from artaug import playground
from artaug.critics import PhotometricCritic
from artaug.diffusion import DiffusersSynthesizer
from artaug.scorers import Chroma, Contrast, Exposure, MeanOf, Sharpness
from artaug.synthesis import attempt_seed
from benchmarks import _record as record
from benchmarks import _run_doubles as doubles
from benchmarks import _timing as timing
from benchmarks._flux_pipeline import flux_pipeline

GOAL = 0.97
"""Of the bare pipeline's pictures a second."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, and the loop around it."""

    name: str
    synthesizer: DiffusersSynthesizer
    critic: aa.Critic
    keep: aa.PairFilter
    trainer: aa.DifferentialLoRATrainer
    prompts: Sequence[str]
    held_out: Sequence[str]
    batch_sizes: Sequence[int]
    """Of drawings; the loop has the last one."""
    repeats: int
    """Of drawings."""


def measure(*, quick: bool) -> Iterator[record.Row]:
    """Time two rounds of `enhance` by stage, and the drawing stage of `improve` beside the bare pipeline.

    ``share`` is a stage's part of the time of `enhance`; ``compare`` is a comparison of both rounds after it. ``rate`` is
    the pictures a second of the loop's drawing stage over those of the pipeline in a for loop with the same prompts, seeds
    and batches: the median over repeats, which alternate, with quartiles. ``whole_rate`` counts all of `improve`, with what
    comes before the first picture and the files that are written after the last, and ``cpu_rate`` is that of processor time,
    in all threads. ``same_bits`` says whether the pictures are the same. Where there is a GPU, FLUX.1-dev's geometry with
    random weights follows.
    """
    Path("runs").mkdir(exist_ok=True)
    with TemporaryDirectory(dir="runs") as name:
        yield from case_rows(playground_case(quick=quick), Path(name))
        if torch.cuda.is_available():
            yield from case_rows(stand_in_case(quick=quick), Path(name))


def case_rows(case: Case, folder: Path) -> Iterator[record.Row]:
    """All rows of a case; files go to ``folder``."""
    for batch_size in case.batch_sizes:
        yield from drawing_rows(case, folder, batch_size)
    yield from stage_rows(case, folder)


def playground_case(*, quick: bool) -> Case:
    """The quickstart, with fewer prompts and steps."""
    keep: aa.PairFilter = aa.Gain(Chroma(), at_least=0.03) & aa.Gain(Contrast(), at_least=0.01)
    for attribute in ("color", "shape", "place"):
        keep &= aa.Floor(playground.Accuracy(attribute), at_least=1.0)
    count = 8 if quick else 32
    return Case(
        name="playground",
        synthesizer=playground.synthesizer(guide=aa.RegionalAttention()),
        critic=PhotometricCritic(contrast=0.15),
        keep=keep,
        trainer=aa.DifferentialLoRATrainer(rank=8, steps=4 if quick else 32, batch_size=count, learning_rate=1e-3),
        prompts=playground.prompts(count, seed=0),
        held_out=playground.prompts(count, seed=1, held_out=True),
        batch_sizes=(8,) if quick else (1, 8, 32),
        repeats=2 if quick else 15,
    )


def stand_in_case(*, quick: bool, size: int = 1024, pipeline: DiffusionPipeline | None = None) -> Case:
    """FLUX.1-dev's geometry with random weights: what a step, a prompt and a picture cost, and no picture worth a look."""
    steps = 4 if quick else 8
    return Case(
        name=f"FLUX.1-dev geometry, {size} px, {steps} steps",
        synthesizer=DiffusersSynthesizer(
            pipeline=flux_pipeline() if pipeline is None else pipeline,
            guide=aa.RegionalAttention(),
            width=size,
            height=size,
            steps=steps,
        ),
        critic=doubles.ThreeBoxes(),
        keep=doubles.EveryOther(),
        trainer=aa.DifferentialLoRATrainer(
            rank=16, steps=4, batch_size=1, learning_rate=1e-4, gradient_checkpointing=True
        ),
        prompts=doubles.prompts(5)[1:],
        held_out=[f"a held-out photograph of a harbor, number {number}" for number in range(6)],
        batch_sizes=(2,) if quick else (1, 4),
        repeats=2 if quick else 3,
    )


# Drawing ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watching(aa.Critic):
    """Holds what it is shown, and abstains: so that the loop only draws."""

    seen: list[Image] = field(default_factory=list, repr=False)

    def critique(self, image: Image, prompt: str) -> aa.Abstention:
        self.seen.append(image)
        return aa.Abstention("only drawings are timed")


@dataclass
class Drawing:
    """The drawing of the first prompts of a case, by the bare pipeline or by the loop."""

    case: Case
    batch_size: int
    folder: Path
    images: dict[str, list[Image]] = field(default_factory=dict)
    """Of the last call of each way."""
    whole: dict[str, list[float]] = field(default_factory=dict)
    """Seconds of all of `improve`, by its way."""
    cpu: dict[str, list[float]] = field(default_factory=dict)
    """Processor time of each way, in all threads."""

    @property
    def prompts(self) -> Sequence[str]:
        """Up to 4 whole batches of them."""
        batches = min(4, max(16, self.batch_size) // self.batch_size, len(self.case.prompts) // self.batch_size)
        return self.case.prompts[: batches * self.batch_size]

    def bare(self) -> float:
        """Call the pipeline in a for loop, and return its seconds."""
        synthesizer, images = self.case.synthesizer, list[Image]()
        seeds = [attempt_seed(0, round_number=1, prompt_index=index) for index in range(len(self.prompts))]
        start, cpu_start = time.perf_counter(), time.process_time()
        for first in range(0, len(self.prompts), self.batch_size):
            batch = slice(first, first + self.batch_size)
            images += synthesizer.pipeline(
                list(self.prompts[batch]),
                width=synthesizer.width,
                height=synthesizer.height,
                num_inference_steps=synthesizer.steps,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[batch]],
                max_sequence_length=synthesizer.max_sequence_length or 512,
            ).images
        seconds = time.perf_counter() - start
        self.cpu.setdefault("bare", []).append(time.process_time() - cpu_start)
        self.images["bare"] = images
        return seconds

    def loop(self, way: str) -> float:
        """Draw by `improve`, and return the seconds of its drawing stage."""
        critic, drawing = Watching(), list[float]()

        def note(event: aa.RunEvent) -> None:
            if isinstance(event, aa.StageEvent) and event.stage == "draw":
                drawing.append(event.seconds)

        store = self.folder / "drawn" if way == "store" else None
        start, cpu_start = time.perf_counter(), time.process_time()
        for _ in aa.improve(
            self.prompts,
            synthesizer=self.case.synthesizer,
            critic=critic,
            planner=aa.GreedyPlanner(),
            keep=doubles.EveryOther(),
            seed=0,
            batch_size=self.batch_size,
            store=store,
            on_event=note,
            check="arguments",
            progress=False,
        ):
            pass
        self.whole.setdefault(way, []).append(time.perf_counter() - start)
        self.cpu.setdefault(way, []).append(time.process_time() - cpu_start)
        if store is not None:
            shutil.rmtree(store)
        self.images[way] = critic.seen
        return sum(drawing)


def drawing_rows(case: Case, folder: Path, batch_size: int) -> Iterator[record.Row]:
    """Time the bare pipeline and the loop's drawing in turn."""
    drawing = Drawing(case, batch_size, folder)
    case.synthesizer.pipeline.set_progress_bar_config(disable=True)
    ways: dict[str, Callable[[], float]] = {
        "bare": drawing.bare,
        **{way: partial(drawing.loop, way) for way in ("no store", "store")},
    }
    timing.interleaved(ways, rounds=1)  # what is loaded and compiled once
    same = {way: [image.tobytes() for image in images] for way, images in drawing.images.items()}
    drawing.whole.clear()
    drawing.cpu.clear()
    seconds = timing.interleaved(ways, rounds=case.repeats)
    for way in drawing.whole:
        rates = timing.ratios(seconds, "bare", way)
        yield {
            "what": "drawing",
            "case": case.name,
            "batch": batch_size,
            "way": way,
            "pictures": len(drawing.prompts),
            "repeats": case.repeats,
            "ms_per_picture": 1000 * median(seconds[way]) / len(drawing.prompts),
            "bare_ms_per_picture": 1000 * median(seconds["bare"]) / len(drawing.prompts),
            "rate": median(rates),
            **timing.spread("rate", rates),
            "whole_rate": median(timing.ratios({**seconds, way: drawing.whole[way]}, "bare", way)),
            "cpu_rate": median(timing.ratios(drawing.cpu, "bare", way)),
            "same_bits": same[way] == same["bare"],
        }


# Stages -----------------------------------------------------------------------------------------


def stage_rows(case: Case, folder: Path) -> Iterator[record.Row]:
    """Two rounds of `enhance`, and a comparison of both with the base."""
    start = time.perf_counter()
    result = aa.enhance(
        case.prompts,
        synthesizer=case.synthesizer,
        critic=case.critic,
        planner=aa.GreedyPlanner(max_regions=3),
        keep=case.keep,
        trainer=case.trainer,
        rounds=2,
        stop=aa.StopRule(MeanOf((Exposure(), Sharpness())), case.held_out, at_least=-1),
        seed=0,
        batch_size=case.batch_sizes[-1],
        store=folder / "enhanced",
        progress=False,
    )
    whole = time.perf_counter() - start
    shutil.rmtree(folder / "enhanced")
    stages = [finished.seconds for finished in result.rounds]
    seconds = {stage: sum(each[stage] for each in stages) for stage in stages[0]}
    seconds["other"] = whole - sum(seconds.values())
    row = {"what": "stage", "case": case.name, "prompts": len(case.prompts), "held_out": len(case.held_out)}
    for stage, each in seconds.items():
        yield {**row, "stage": stage, "rounds": len(stages), "seconds": each, "share": each / whole}
    start = time.perf_counter()
    aa.compare(
        case.synthesizer,
        {f"round {finished.number}": case.synthesizer.with_lora(finished.lora) for finished in result.rounds},
        case.held_out,
        scorers=[Exposure(), Sharpness(), Chroma(), Contrast()],
        batch_size=case.batch_sizes[-1],
        progress=False,
    )
    compared = time.perf_counter() - start
    yield {**row, "stage": "compare", "rounds": len(stages), "seconds": compared, "share": compared / whole}


def plot(rows: Sequence[record.Row]) -> Figure:
    """The share of every stage, and the drawing's rate beside the bare pipeline's."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    shares, rates = figure.subplots(1, 2)
    stages, drawings = ([row for row in rows if row["what"] == what] for what in ("stage", "drawing"))
    names = list(dict.fromkeys(row["stage"] for row in stages))
    cases = list(dict.fromkeys(row["case"] for row in stages))
    for number, case in enumerate(cases):
        places = [names.index(row["stage"]) + 0.4 * number for row in stages if row["case"] == case]
        shares.bar(places, [row["share"] for row in stages if row["case"] == case], width=0.4, label=case)
    shares.set_xticks(range(len(names)), names, rotation=45, ha="right")
    shares.set(title="two rounds of enhance, and a comparison", ylabel="time over that of enhance")
    if cases:
        shares.legend(fontsize=7)
    for place, row in enumerate(drawings):
        spread = [[row["rate"] - row["rate_low"]], [row["rate_high"] - row["rate"]]]
        rates.errorbar([place], [row["rate"]], yerr=spread, marker="o", capsize=4)
    labels = [f"{row['case']}\nbatch {row['batch']}, {row['way']}" for row in drawings]
    rates.set_xticks(range(len(labels)), labels, rotation=45, ha="right", fontsize=7)
    rates.axhline(1, color="#888", linewidth=0.8)
    rates.axhline(GOAL, color="#c33", linewidth=0.8, linestyle=":")
    rates.set_title("pictures a second, over the bare pipeline's")
    return figure


if __name__ == "__main__":
    record.run("loop", measure, plot)
