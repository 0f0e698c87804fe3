"""The training objectives side by side: the same pairs, the same number of optimiser steps, three seeds each."""

from collections.abc import Sequence
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure
from PIL.Image import Image

import artaug as aa
from artaug import playground
from artaug.critics import PhotometricCritic
from artaug.scorers import Chroma, Contrast, Photometric
from benchmarks import _record as record

FAITHFUL = [playground.Accuracy(of) for of in ("colour", "shape", "place")]
NEEDS_NOTHING = ", vivid, softly lit, sharp, glowing"
OBJECTIVES: dict[str, aa.Objective] = {
    "PairedDifference": aa.PairedDifference(),
    "TwoStage pooled": aa.TwoStage(per_pair=False),
    "TwoStage per pair": aa.TwoStage(per_pair=True),
    "SupervisedFineTuning": aa.SupervisedFineTuning(),
}


def measure(*, quick: bool) -> list[record.Row]:
    """Train each objective on the same pairs; report gain, alignment and drift on held-out prompts.

    Gain is the mean rise of the photometric scorers, alignment the share of asked colours, shapes and places that
    are right, drift the mean squared change (pixels in [0, 1]) of pictures that needed no change: prompts that
    already carry every adjective.
    """
    base = playground.synthesizer(guide=aa.OutputMix())
    pairs = kept_pairs(base, 12 if quick else 64)[: 4 if quick else 32]
    unseen = playground.prompts(8 if quick else 128, seed=1, held_out=True)
    fine = [prompt + NEEDS_NOTHING for prompt in unseen[: len(unseen) // 2]]
    before, fine_before = draw(base, unseen), draw(base, fine)
    rows: list[record.Row] = []
    for seed in range(1 if quick else 3):
        for name, objective in OBJECTIVES.items():
            trainer = aa.DifferentialLoRATrainer(
                objective=objective, rank=8, steps=16 if quick else 128, batch_size=32, learning_rate=1e-3
            )
            training = trainer.train(pairs, base, seed=seed)
            student = base.with_lora(training.lora)
            after = draw(student, unseen)
            rows.append(
                {
                    "objective": name,
                    "seed": seed,
                    "gain": mean_score(Photometric(), after, unseen) - mean_score(Photometric(), before, unseen),
                    "alignment": fmean(mean_score(one, after, unseen) for one in FAITHFUL),
                    "drift": mean_squared_change(fine_before, draw(student, fine)),
                    "seconds": training.seconds,
                    "pairs": training.pairs,
                    "steps": training.steps,
                }
            )
    return rows


def kept_pairs(synthesizer: aa.Synthesizer, count: int) -> list[aa.ImagePair]:
    """The pairs every objective learns from, filtered as in the quickstart."""
    keep = aa.Gain(Chroma(), at_least=0.03) & aa.Gain(Contrast(), at_least=0.01)
    for accuracy in FAITHFUL:
        keep &= aa.Floor(accuracy, at_least=1.0)
    found = aa.improve(
        playground.prompts(count, seed=0),
        synthesizer=synthesizer,
        critic=PhotometricCritic(),
        planner=aa.GreedyPlanner(max_regions=3),
        keep=keep,
        seed=0,
        batch_size=32,
    )
    return [attempt.pair for attempt in found if isinstance(attempt, aa.Kept)]


def draw(synthesizer: aa.Synthesizer, prompts: Sequence[str], *, batch_size: int = 32) -> list[Image]:
    """One picture a prompt, its seed the prompt's place in the list."""
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
    """Gain against drift: up and to the left is better."""
    figure = Figure(figsize=(6, 4))
    axes = figure.add_subplot(xlabel="drift on prompts that needed no change", ylabel="gain, mean of four scorers")
    for name in OBJECTIVES:
        mine = [row for row in rows if row["objective"] == name]
        axes.scatter([row["drift"] for row in mine], [row["gain"] for row in mine], label=name)
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.legend()
    return figure


if __name__ == "__main__":
    record.run("objectives", measure, plot)
