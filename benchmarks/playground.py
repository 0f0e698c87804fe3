"""Quality of the playground's model: alignment, and the effect of adjectives on the picture and in a region."""

from collections.abc import Sequence
from statistics import fmean

from matplotlib.figure import Figure
from PIL.Image import Image

import artaug as aa
from artaug import playground
from artaug.scorers import Chroma, Contrast, Exposure, Sharpness
from benchmarks import _record as record

ADJECTIVES = ("vivid", "softly lit", "sharp", "glowing")
PHOTOMETRIC = (Exposure(), Chroma(), Contrast(), Sharpness())
FAITHFUL = tuple(playground.Accuracy(of) for of in ("color", "shape", "place"))
HALVES = {"left": aa.Box(0, 0, 0.5, 1), "right": aa.Box(0.5, 0, 1, 1)}


def measure(*, quick: bool) -> list[record.Row]:
    """Draw held-out prompts in several ways; report alignment and photometric scores of the pictures.

    ``drawn by`` is the renderer (ground truth, which also measures the detector) or the model; ``chroma left`` and
    ``chroma right`` are measured in the two halves, to tell a regional change from a global one.
    """
    prompts = playground.prompts(16 if quick else 256, seed=7, held_out=True)
    model = playground.synthesizer(guide=aa.OutputMix())
    everything = ", ".join(["", *ADJECTIVES])
    suffixes = {"nothing": "", "everything": everything, **{word: f", {word}" for word in ADJECTIVES}}
    rows: list[record.Row] = []
    for name, suffix in suffixes.items():
        texts = [prompt + suffix for prompt in prompts]
        if name in {"nothing", "everything"}:
            truth = [playground.render(prompt, seed=seed) for seed, prompt in enumerate(texts)]
            rows.append(score_row("renderer", name, truth, prompts))
        rows.append(score_row("model", name, draw(model, [aa.Plan(prompt) for prompt in texts]), prompts))
    for side, half in HALVES.items():
        plans = [aa.Plan(prompt, (aa.Region(half, prompt + everything),)) for prompt in prompts]
        rows.append(score_row("model", f"everything, {side} half", draw(model, plans), prompts))
    return rows


def draw(synthesizer: aa.Synthesizer, plans: Sequence[aa.Plan], *, batch_size: int = 32) -> list[Image]:
    """One picture for each plan, with the plan's number in the list as the seed."""
    return [
        image
        for start in range(0, len(plans), batch_size)
        for image in synthesizer.synthesize_batch(
            plans[start : start + batch_size], seeds=range(start, min(start + batch_size, len(plans)))
        )
    ]


def score_row(drawn_by: str, adjectives: str, images: Sequence[Image], prompts: Sequence[str]) -> record.Row:
    """The mean of every scorer over pictures of prompts."""
    halves = {side: [image.crop(half.to_pixels(image.size)) for image in images] for side, half in HALVES.items()}
    return {
        "drawn by": drawn_by,
        "adjectives": adjectives,
        "prompts": len(prompts),
        **{scorer.name: fmean(scorer.score_batch(images, prompts)) for scorer in (*FAITHFUL, *PHOTOMETRIC)},
        **{f"chroma {side}": fmean(Chroma().score_batch(half, prompts)) for side, half in halves.items()},
    }


def plot(rows: Sequence[record.Row]) -> Figure:
    """The photometric scores of every way of drawing."""
    figure = Figure(figsize=(9, 4))
    axes = figure.add_subplot(ylabel="mean score", ylim=(0, 1))
    names = [f"{row['drawn by']}\n{row['adjectives']}" for row in rows]
    for number, scorer in enumerate(PHOTOMETRIC):
        places = [place + 0.2 * number for place in range(len(rows))]
        axes.bar(places, [row[scorer.name] for row in rows], width=0.2, label=scorer.name)
    axes.set_xticks([place + 0.3 for place in range(len(rows))], names, rotation=60, ha="right", fontsize=7)
    axes.legend()
    return figure


if __name__ == "__main__":
    record.run("playground", measure, plot)
