"""The training objectives side by side: the same pairs, more and more optimizer steps, three seeds each."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL.Image import Image
from torch import Tensor

import artaug as aa
from artaug import playground
from artaug.critics import PhotometricCritic
from artaug.diffusion import DiffusersSynthesizer
from artaug.scorers import Chroma, Contrast, Photometric
from benchmarks import _record as record

FAITHFUL = [playground.Accuracy(of) for of in ("color", "shape", "place")]
NEEDS_NOTHING = ", vivid, softly lit, sharp, glowing"
GAIN = 0.05
"""Four fifths of the gain that most methods reach in the end."""
METHODS: dict[str, tuple[aa.Objective, int]] = {
    "PairedDifference, echo=1": (aa.PairedDifference(), 1),
    "PairedDifference, echo=2": (aa.PairedDifference(), 2),
    "PairedDifference, echo=4": (aa.PairedDifference(), 4),
    "TwoStage pooled": (aa.TwoStage(per_pair=False), 1),
    "TwoStage per pair": (aa.TwoStage(per_pair=True), 1),
    "SupervisedFineTuning": (aa.SupervisedFineTuning(), 1),
}
"""Objectives and their echo."""


def measure(*, quick: bool) -> list[record.Row]:
    """Train each objective on the same pairs; report gain, alignment and drift on held-out prompts, and the cost.

    Gain is the mean rise of the photometric scorers, alignment the share of requested colours, shapes and places that
    are right, drift the mean squared change (pixels in [0, 1]) of pictures that needed no change: prompts that
    already carry every adjective. ``passes`` counts pictures through the denoiser, forward and backward.
    ``passes_to_gain`` is the number that a method takes to gain `GAIN`, interpolated between two lengths of a training. All
    gains still rise fast there, so it depends mostly on the cost of a step; the final quality of each is in its longest
    training.
    """
    base = playground.synthesizer(guide=aa.OutputMix())
    pairs = kept_pairs(base, 12 if quick else 64)[: 4 if quick else 32]
    unseen = playground.prompts(8 if quick else 128, seed=1, held_out=True)
    evaluation = Evaluation.of(base, unseen)
    rows: list[record.Row] = []
    for seed in range(1 if quick else 3):
        seed_rows: list[record.Row] = []
        for name, (objective, echo) in METHODS.items():
            for steps in (4, 8) if quick else (8, 16, 32, 64):
                if objective.training_plan(len(pairs)).groups[1:] and steps < 2 * len(pairs):
                    continue  # a step for every pair and stage is the least
                trainer = aa.DifferentialLoRATrainer(
                    objective=objective, echo=echo, rank=8, steps=steps, batch_size=32, learning_rate=1e-3
                )
                with passes_counted(base) as passes:
                    training = trainer.train(pairs, base, seed=seed, progress=False)
                scores = evaluation.evaluate(base.with_lora(training.lora))
                cost = {"pairs": len(pairs), "steps": steps, "passes": passes.both, "seconds": training.seconds}
                seed_rows.append({"method": name, "seed": seed, **cost, **scores})
        rows += [{**row, "passes_to_gain": passes_to_gain(row["method"], seed_rows)} for row in seed_rows]
    return rows


@dataclass
class Passes:
    """Pictures through the denoiser: forward, and back where there is a gradient."""

    forward: int = 0
    backward: int = 0

    @property
    def both(self) -> int:
        """Pictures forward and back."""
        return self.forward + self.backward

    @property
    def denoiser_calls(self) -> int:
        """The work in forward passes: one back is about two forward."""
        return self.forward + 2 * self.backward


@contextmanager
def passes_counted(synthesizer: DiffusersSynthesizer) -> Iterator[Passes]:
    """Count while the block runs."""
    passes = Passes()

    def count(_: object, __: object, kwargs: Mapping[str, Tensor]) -> None:
        pictures = len(kwargs["hidden_states"])
        passes.forward += pictures
        passes.backward += pictures if torch.is_grad_enabled() else 0

    handle = synthesizer.pipeline.transformer.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()


def passes_to_gain(method: str, rows: Sequence[record.Row]) -> float | None:
    """Passes until a method first gains `GAIN`, by linear interpolation; None if it never does."""
    curve = [(0.0, 0.0), *((row["gain"], row["passes"]) for row in rows if row["method"] == method)]
    for (gain, passes), (more, later) in pairwise(curve):
        if gain < GAIN <= more:
            return float(passes + (later - passes) * (GAIN - gain) / (more - gain))
    return None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out prompts, and the base's pictures of them and of prompts that need no change."""

    prompts: Sequence[str]
    before: Sequence[Image]
    fine: Sequence[str]
    fine_before: Sequence[Image]

    @classmethod
    def of(cls, base: aa.Synthesizer, prompts: Sequence[str]) -> "Evaluation":
        """Draw with the base."""
        fine = [prompt + NEEDS_NOTHING for prompt in prompts[: len(prompts) // 2]]
        return cls(prompts=prompts, before=draw(base, prompts), fine=fine, fine_before=draw(base, fine))

    def evaluate(self, student: aa.Synthesizer) -> record.Row:
        """Gain, alignment and drift of a student."""
        after = draw(student, self.prompts)
        gain = mean_score(Photometric(), after, self.prompts) - mean_score(Photometric(), self.before, self.prompts)
        return {
            "gain": gain,
            "alignment": fmean(mean_score(scorer, after, self.prompts) for scorer in FAITHFUL),
            "drift": mean_squared_change(self.fine_before, draw(student, self.fine)),
        }


def kept_pairs(synthesizer: aa.Synthesizer, count: int) -> list[aa.ImagePair]:
    """The pairs every objective learns from, filtered as in the quickstart."""
    keep = aa.Gain(Chroma(), at_least=0.03) & aa.Gain(Contrast(), at_least=0.01)
    for accuracy in FAITHFUL:
        keep &= aa.Floor(accuracy, at_least=1.0)
    attempts = aa.improve(
        playground.prompts(count, seed=0),
        synthesizer=synthesizer,
        critic=PhotometricCritic(contrast=0.15),
        planner=aa.GreedyPlanner(max_regions=3),
        keep=keep,
        seed=0,
        batch_size=32,
        progress=False,
    )
    return [attempt.pair for attempt in attempts if isinstance(attempt, aa.Kept)]


def draw(synthesizer: aa.Synthesizer, prompts: Sequence[str], *, batch_size: int = 32) -> list[Image]:
    """One picture per prompt, seeded by the prompt's index."""
    return [
        image
        for start in range(0, len(prompts), batch_size)
        for image in synthesizer.synthesize_batch(
            [aa.Plan(prompt) for prompt in prompts[start : start + batch_size]],
            seeds=range(start, min(start + batch_size, len(prompts))),
        )
    ]


def mean_score(scorer: aa.Scorer, images: Sequence[Image], prompts: Sequence[str]) -> float:
    """The scorer's mean over pictures."""
    return fmean(scorer.score_batch(images, prompts))


def mean_squared_change(before: Sequence[Image], after: Sequence[Image]) -> float:
    """Mean squared difference of pixels in [0, 1]."""
    arrays = [np.stack([np.asarray(image, dtype=np.float32) / 255 for image in images]) for images in (before, after)]
    return float(np.mean((arrays[1] - arrays[0]) ** 2))


def plot(rows: Sequence[record.Row]) -> Figure:
    """Gain over what it cost, and over drift: up and to the left is better."""
    figure = Figure(figsize=(10, 4))
    for place, (key, label) in enumerate(
        (("passes", "pictures through the denoiser, forward and back"), ("drift", "drift where nothing was needed"))
    ):
        axes = figure.add_subplot(1, 2, place + 1, xlabel=label, ylabel="gain, mean of four scorers")
        for name in METHODS:
            steps = sorted({row["steps"] for row in rows if row["method"] == name})
            means = [
                [
                    fmean(row[column] for row in rows if (row["method"], row["steps"]) == (name, count))
                    for count in steps
                ]
                for column in (key, "gain")
            ]
            axes.plot(*means, marker="o", markersize=3, label=name)
        axes.axhline(0, color="grey", linewidth=0.5)
    figure.axes[0].legend(fontsize=7)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    record.run("objectives", measure, plot)
