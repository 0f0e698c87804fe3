"""A run as the page shows it: its rounds, where the prompts went, the losses, the times and the pairs."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from artaug._internal.text import duration
from artaug.geometry import Box, Mask
from artaug.images.html import BOX_COLORS, data_address
from artaug.pairs import Dropped, Kept
from artaug.plan import Region
from artaug.report.image_store import Album
from artaug.report.text import View, number, numbers, tone
from artaug.run.funnel import Funnel
from artaug.run.results import Enhancement, Round

_POINTS = 240
_REASONS = 4


def headline_of_run(result: Enhancement) -> View:
    """The run in a sentence, for a page without a comparison."""
    attempts = [attempt for one in result.rounds for attempt in one.attempts]
    kept = sum(isinstance(attempt, Kept) for attempt in attempts)
    last = next((one.gain for one in reversed(result.rounds) if one.gain), None)
    gain = last and {"row": last, "tone": tone(last), "numbers": numbers(last, last.decimals)}
    return {"kept": f"{kept:,}", "asked": f"{len(attempts):,}", "rounds": len(result.rounds), "gain": gain}


def facts_of(result: Enhancement) -> list[tuple[str, str]]:
    """The run in a few numbers, each with what it counts."""
    attempts = [attempt for one in result.rounds for attempt in one.attempts]
    kept = sum(isinstance(attempt, Kept) for attempt in attempts)
    accepted = [one.lora for one in result.rounds if one.accepted]
    facts = [
        (f"{len(attempts):,}", "prompts asked"),
        (f"{kept:,}", "pairs learned from"),
        (f"{len(accepted)} of {len(result.rounds)}", "rounds helped"),
        (duration(sum(sum(one.seconds.values()) for one in result.rounds)), "from start to end"),
    ]
    return [*facts, (f"rank {accepted[-1].rank}", f"LoRA on {len(accepted[-1].layers)} layers")] if accepted else facts


def round_of(one: Round, *, album: Album, shown: int) -> View:
    """One round, with at most so many of its kept pairs and as many of those refused."""
    kept = [attempt for attempt in one.attempts if isinstance(attempt, Kept)]
    refused = [attempt for attempt in one.attempts if isinstance(attempt, Dropped)]
    return {
        "number": one.number,
        "accepted": one.accepted,
        "funnel": _funnel(Funnel.of(one.attempts)),
        "gain": one.gain and {"row": one.gain, "tone": tone(one.gain), "numbers": numbers(one.gain, one.gain.decimals)},
        "kept": [_pair(attempt, album) for attempt in kept[:shown]],
        "kept_of": len(kept),
        "refused": [_pair(attempt, album) for attempt in refused[:shown]],
        "refused_of": len(refused),
        "loss": _curve(one.training.losses),
        "training": one.training,
        "seconds": [{"stage": stage, "share": taken, "text": duration(taken)} for stage, taken in one.seconds.items()],
        "total": duration(sum(one.seconds.values())),
    }


def _funnel(funnel: Funnel) -> list[View]:
    asked = max(funnel.steps[0].count, 1)
    views = []
    for step in funnel.steps:
        rest = step.lost[_REASONS:]
        others = [(f"for {len(rest)} other reasons", sum(count for _, count in rest))] if rest else []
        share = round(100 * step.count / asked, 2)
        views.append({"name": step.name, "count": step.count, "share": share, "lost": [*step.lost[:_REASONS], *others]})
    return views


def _pair(attempt: Kept | Dropped, album: Album) -> View:
    pair, verdict = attempt.pair, attempt.verdict
    width, height = pair.before.size
    return {
        "prompt": pair.prompt,
        "ratio": f"{width} / {height}",
        "before": {"name": "before", "src": album.address(pair.before)},
        "afters": [{"name": "after", "src": album.address(pair.after)}],
        "rewritten": pair.plan.prompt if pair.plan.prompt != pair.prompt else "",
        "regions": [_region(at, region) for at, region in enumerate(pair.plan.regions)],
        "reason": verdict.reason,
        "scores": [(name, number(score, 3)) for name, score in verdict.scores.items()],
        "seed": pair.seed,
    }


def _region(at: int, region: Region) -> View:
    """A region as the overlay draws it: a rectangle, or a tint where it is a mask; relative to the picture."""
    colour = BOX_COLORS[at % len(BOX_COLORS)]
    area, tint = region.area, ""
    if isinstance(area, Mask):
        weights = area.to_array()
        rows, columns = np.flatnonzero(weights.max(axis=1)), np.flatnonzero(weights.max(axis=0))
        edges = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        tint = _tinted(weights, colour)
        area = Box.from_pixels(*edges, size=weights.shape[::-1])
    return {"number": at + 1, "prompt": region.prompt, "colour": colour, "box": area, "tint": tint}


def _tinted(weights: np.ndarray, colour: str) -> str:
    layer = Image.new("RGB", (weights.shape[1], weights.shape[0]), colour)
    layer.putalpha(Image.fromarray((weights * 150).round().astype(np.uint8)))
    return data_address(layer)


def _curve(losses: Sequence[float]) -> View:
    """A loss curve as SVG points in a box of 100 x 100: every step (thinned to a few hundred) and a running mean."""
    if not losses:
        return {"steps": 0}
    thin = np.array([part.mean() for part in np.array_split(np.asarray(losses), min(len(losses), _POINTS))])
    smooth = smoothed(thin)
    top = max(1.15 * float(np.quantile(thin, 0.98)), float(smooth.max()) * 1.05, 1e-12)
    across = np.linspace(0, 100, len(thin)) if len(thin) > 1 else np.array([50.0])

    def points(values: np.ndarray) -> str:
        return " ".join(f"{x:.2f},{100 - 100 * y / top:.2f}" for x, y in zip(across, values, strict=True))

    ends = {"first": f"{smooth[0]:.3g}", "last": f"{smooth[-1]:.3g}", "top": f"{top:.2g}"}
    return {"steps": len(losses), "raw": points(thin), "smooth": points(smooth), **ends}


def smoothed(losses: np.ndarray) -> np.ndarray:
    """The running mean of a curve over a sixth of its length: (steps,) to (steps,)."""
    width = max(len(losses) // 12, 1)
    return np.array([losses[max(at - width, 0) : at + width + 1].mean() for at in range(len(losses))])
