"""A step with the attention probe on all layers, or with latents moved by the maps, beside a plain one, drawing and training."""

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from matplotlib.figure import Figure

import artaug as aa
from artaug.recipes import AStar, AttendAndExcite
from artaug.regional import AttentionMaps, GuidedRun
from artaug.regional.guide import Guide, steer
from artaug.regional.latent_guide import LatentMoves
from benchmarks import _flux as flux
from benchmarks import _memory as memory
from benchmarks import _record as record
from benchmarks import _timing as timing

GOAL = 1.15
"""A step with the probe takes at most so many times as long as a plain one, at 1,024 image tokens and two phrases."""
PHRASES = ("red cone", "blue ball", "green cube", "grey wall")
_TOKENS_OF_A_PHRASE = 3
_PROMPT_TOKENS = 20
"""Of a prompt, without its padding: those that compete where latents are moved."""


def measure(*, quick: bool) -> Iterator[record.Row]:
    """Time steps of a FLUX transformer with random weights, plain and with `AttentionProbe` on all of its layers.

    With CUDA it is FLUX.1-dev's own geometry in bfloat16, without a FLUX scaled down to a sixth of the width, where attention is
    a larger part of a step, so that the ratio is rather too high. A phrase has three tokens. Rows differ in image tokens, in the
    number of phrases, in what probabilities are over, and in whether the step is one of drawing or of training, where the maps
    are part of the loss. ``with regions`` compares regional attention with the probe beside regional attention without it.
    In ``moving latents`` every step is moved once, by the gradient of a loss of the maps of all layers: a prediction more, and
    its way back. ``recomputed`` has gradient checkpointing there.
    """
    if torch.cuda.is_available():
        geometry = replace(flux.FLUX_DEV, double_blocks=2, single_blocks=2) if quick else flux.FLUX_DEV
        sides: tuple[int, ...] = (32,) if quick else (32, 64)
    else:
        geometry, sides = flux.SCALED_DOWN, (16,) if quick else (16, 32)
    for side in sides:
        yield from point_rows(geometry, side=side, rounds=3 if quick else 15, training=not quick)


def probes(received: list[AttentionMaps]) -> dict[str, Guide]:
    """The ways to read, by name."""

    def probe(phrases: int, **options: str) -> Guide:
        return aa.AttentionProbe(phrases=PHRASES[:phrases], receive=received.append, **options)  # type: ignore[arg-type]

    return {"2 phrases": probe(2), "4 phrases": probe(4), "2 phrases, over the prompt": probe(2, over="prompt")}


def movers() -> dict[str, Guide]:
    """The guides that move latents once in each step, by name."""
    phrases = PHRASES[:2]
    return {
        "Attend-and-Excite": AttendAndExcite(phrases=phrases, until=1.0, refinements=()),
        "Attend-and-Excite, recomputed": AttendAndExcite(phrases=phrases, until=1.0, refinements=()),
        "A-STAR": AStar(phrases=phrases),
    }


def point_rows(geometry: flux.Geometry, *, side: int, rounds: int, training: bool) -> list[record.Row]:
    """A row for each way to read, at one picture size."""
    model, received = geometry.model(), list[AttentionMaps]()
    regions = (aa.Region(aa.Box(0, 0, 0.5, 1), "a red cone"), aa.Region(aa.Box(0.5, 0, 1, 1), "a blue ball"))
    regional = aa.RegionalAttention()
    ways: dict[str, dict[str, Guide | None]] = {"drawing": {"plain": None, **probes(received)}}
    ways["drawing with regions"] = {
        "plain": regional,
        **{name: aa.Together((regional, probe)) for name, probe in probes(received).items() if name == "2 phrases"},
    }
    ways["moving latents"] = {"plain": None, **movers()}
    if training:
        ways["training"] = {"plain": None, "2 phrases": probes(received)["2 phrases"]}
    rows: list[record.Row] = []
    for task, guides in ways.items():
        pictures = (regions if "regions" in task else (),)
        setting = flux.Setting(
            geometry=geometry, model=model, side=side, pictures=pictures, gradients=task == "training"
        )
        run = replace(setting.run, phrase_tokens=_phrase_tokens, token_slices=[slice(0, _PROMPT_TOKENS)])
        timed = {
            name: partial(step_seconds, setting, run, guide, received, recomputed="recomputed" in name)
            for name, guide in guides.items()
        }
        peaks = {name: memory.observe(way, inputs=setting.inputs).peak_bytes for name, way in timed.items()}
        seconds = timing.interleaved(timed, rounds=rounds)
        rows += [
            {
                "task": task,
                "image_tokens": side**2,
                "text_tokens": geometry.base_tokens,
                "layers": geometry.double_blocks + geometry.single_blocks,
                "probe": name,
                **timing.timed_columns(seconds, name),
                "peak_to_plain": peaks[name] / peaks["plain"],
            }
            for name in guides
        ]
        gc.collect()
    return rows


def _phrase_tokens(_prompt: str, phrases: Sequence[str]) -> list[tuple[int, ...]]:
    """Some tokens of a prompt for each phrase, all for another text; which they are matters to no time."""
    return [
        tuple(range(start := 5 * PHRASES.index(phrase), start + _TOKENS_OF_A_PHRASE))
        if phrase in PHRASES
        else tuple(range(_PROMPT_TOKENS))
        for phrase in phrases
    ]


def step_seconds(
    setting: flux.Setting,
    run: GuidedRun,
    guide: Guide | None,
    received: list[AttentionMaps],
    *,
    recomputed: bool = False,
) -> float:
    """Seconds of one step, the second under its guide."""
    block: AbstractContextManager[object] = nullcontext() if guide is None else steer(guide, run)
    moves = LatentMoves(run, lambda: 2)
    seconds = 0.0
    if recomputed:
        setting.model.enable_gradient_checkpointing()
    with block:
        run.moves = moves
        for _ in range(2):
            received.clear()
            memory.synchronize()
            start = time.perf_counter()
            step(setting, received)
            moves.step_from(setting.kwargs["hidden_states"])
            memory.synchronize()
            seconds = time.perf_counter() - start
    setting.model.disable_gradient_checkpointing()
    return seconds


def step(setting: flux.Setting, received: Sequence[AttentionMaps]) -> None:
    """One step; in training the loss holds all maps that were received."""
    with torch.set_grad_enabled(setting.gradients):
        loss = setting.model(**setting.kwargs)[0].float().square().mean()
        if setting.gradients:
            for maps in received:
                loss = loss + torch.stack([layer.maps.square().sum() for layer in maps.layers]).sum()
            loss.backward()


def plot(rows: Sequence[record.Row]) -> Figure:
    """The time of a step over a plain one, with its quartiles and the goal."""
    probed = [row for row in rows if row["probe"] != "plain"]
    figure = Figure(figsize=(7, 0.4 * len(probed) + 1.2))
    axes = figure.add_subplot(xlabel="time of a step over a plain one")
    ratios = [row["ratio_to_plain"] for row in probed]
    spread = [
        [max(0.0, row["ratio_to_plain"] - row["ratio_low"]) for row in probed],
        [max(0.0, row["ratio_high"] - row["ratio_to_plain"]) for row in probed],
    ]
    labels = [f"{row['task']}, {row['image_tokens']} tokens, {row['probe']}" for row in probed]
    axes.barh(labels, ratios, xerr=spread)
    axes.axvline(GOAL, color="black", linestyle="dashed")
    axes.invert_yaxis()
    return figure


if __name__ == "__main__":
    record.run("probe", measure, plot)
