"""A run for the report's template: summary, rounds, funnels, losses, times and pairs."""

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
from PIL import Image

from artaug._internal.images import data_url
from artaug._internal.text import duration
from artaug.canvas import Canvas
from artaug.geometry import Box, Mask
from artaug.image_files import ImageFile, image_digest
from artaug.images.html import BOX_COLORS
from artaug.pairs import Attempt, Dropped, Kept, Skipped
from artaug.plan import Region
from artaug.report.image_store import ImageStore
from artaug.report.text import TemplateContext, format_number, row_context
from artaug.run.funnel import Funnel
from artaug.run.planning.run_plan import RunPlan
from artaug.run.results import Enhancement, Round

_CURVE_POINTS = 240
_SHOWN_REASONS = 4


def run_headline(rounds: Sequence[Round], attempts: Sequence[Attempt]) -> TemplateContext:
    """The run as a sentence, for a page without a comparison; ``attempts`` are those of a round without a training."""
    prompts, kept = _counts(rounds, attempts)
    gain = next((round_.gain for round_ in reversed(rounds) if round_.gain), None)
    return {
        "kept": f"{kept:,}",
        "prompts": f"{prompts:,}",
        "rounds": len(rounds) + bool(attempts),
        "gain": gain and row_context(gain),
    }


def run_summary(rounds: Sequence[Round], attempts: Sequence[Attempt]) -> list[tuple[str, str]]:
    """The run in a few numbers, each with its label; see `run_headline`."""
    prompts, kept = _counts(rounds, attempts)
    accepted = [round_.lora for round_ in rounds if round_.accepted]
    rows = [
        (f"{prompts:,}", "prompts"),
        (f"{kept:,}", "training pairs"),
        (f"{len(accepted)} of {len(rounds)}", "rounds accepted"),
        (duration(sum(sum(round_.seconds.values()) for round_ in rounds)), "total time"),
    ]
    return [*rows, (f"rank {accepted[-1].rank}", f"LoRA on {len(accepted[-1].layers)} layers")] if accepted else rows


def _counts(rounds: Sequence[Round], attempts: Sequence[Attempt]) -> tuple[int, int]:
    """How many prompts all rounds had, and how many kept pairs."""
    everything = chain(chain.from_iterable(round_.attempts for round_ in rounds), attempts)
    kept = Counter(isinstance(attempt, Kept) for attempt in everything)
    return kept.total(), kept[True]


def round_context(round_: Round, *, store: ImageStore, max_pairs: int) -> TemplateContext:
    """One round, with at most ``max_pairs`` of its kept pairs and as many of its dropped ones."""
    return {
        **untrained_context(round_.number, round_.attempts, store=store, max_pairs=max_pairs),
        "accepted": round_.accepted,
        "gain": round_.gain and row_context(round_.gain),
        "loss": _loss_curve(round_.training.losses),
        "training": round_.training,
        "times": [
            {"stage": stage, "seconds": seconds, "text": duration(seconds)} for stage, seconds in round_.seconds.items()
        ],
        "total_time": duration(sum(round_.seconds.values())),
    }


def untrained_context(
    number: int, attempts: Iterable[Attempt], *, store: ImageStore, max_pairs: int
) -> TemplateContext:
    """One round that has no training; see `round_context`."""
    shown: dict[type, list[TemplateContext]] = {Kept: [], Dropped: []}
    total: Counter[type] = Counter()
    for attempt in attempts:
        total[type(attempt)] += 1
        if not isinstance(attempt, Skipped) and total[type(attempt)] <= max_pairs:
            shown[type(attempt)].append(_pair_card(attempt, store))
    return {
        "number": number,
        "accepted": True,
        "funnel": _funnel(Funnel.of(attempts)),
        "gain": None,
        "kept": shown[Kept],
        "kept_total": total[Kept],
        "dropped": shown[Dropped],
        "dropped_total": total[Dropped],
        "loss": _loss_curve(()),
        "training": None,
        "times": [],
        "total_time": "",
    }


def plan_context(plan: RunPlan, result: Enhancement) -> TemplateContext:
    """What was planned beside what the rounds that ran took: by stage, in all, and the pairs that were kept."""
    rows = plan.against(result)
    planned_s, real_s = sum(planned for _, planned, _ in rows), sum(real for *_, real in rows)
    prompts = sum(len(finished.attempts) for finished in result.rounds)
    kept = sum(finished.training.pairs for finished in result.rounds)
    ratio = f"{real_s / planned_s:.2f}" if planned_s else "-"
    return {
        "rows": [
            *((stage, duration(planned), duration(real)) for stage, planned, real in rows if planned or real),
            ("all", duration(planned_s), duration(real_s)),
            ("pairs kept", f"{plan.pairs * len(result.rounds):,.0f}", f"{kept:,}"),
            ("prompts", f"{plan.prompts * len(result.rounds):,}", f"{prompts:,}"),
        ],
        "ratio": ratio,
        "sample": plan.sample,
        "rounds": plan.rounds,
        "ran": len(result.rounds),
    }


def _funnel(funnel: Funnel) -> list[TemplateContext]:
    total = max(funnel.steps[0].count, 1)
    steps = []
    for step in funnel.steps:
        rest = step.lost[_SHOWN_REASONS:]
        others = [(f"for {len(rest)} other reasons", sum(count for _, count in rest))] if rest else []
        lost = [*step.lost[:_SHOWN_REASONS], *others]
        steps.append(
            {"name": step.name, "count": step.count, "share": round(100 * step.count / total, 2), "lost": lost}
        )
    return steps


def _pair_card(attempt: Kept | Dropped, store: ImageStore) -> TemplateContext:
    pair, verdict = attempt.pair, attempt.verdict
    width, height = pair.size
    before, after = pair.references
    return {
        "prompt": pair.prompt,
        "ratio": f"{width} / {height}",
        "before": {"name": "before", "src": store.url(before)},
        "afters": [{"name": "after", "src": store.url(after)}],
        "rewritten_prompt": pair.plan.prompt if pair.plan.prompt != pair.prompt else "",
        "canvas": "" if pair.plan.canvas is None else _canvas(pair.plan.canvas, before),
        "regions": [_region(index, region) for index, region in enumerate(pair.plan.regions)],
        "reason": verdict.reason,
        "scores": [(name, format_number(score, 3)) for name, score in verdict.scores.items()],
        "seed": pair.seed,
    }


def _canvas(canvas: Canvas, before: Image.Image | ImageFile) -> str:
    """What a picture was redrawn from, in words."""
    count = len(canvas.references)
    beside = (", with a control picture" if canvas.has_control else "") + (
        f", with {count} reference(s)" if count else ""
    )
    if not canvas.has_image:
        return f"noise{beside}"
    picture = "the picture before" if image_digest(canvas.pictures[0]) == image_digest(before) else "another picture"
    where = "" if canvas.mask is None else ", inside a mask"
    strength = "" if canvas.strength is None else f", at strength {canvas.strength:g}"
    return f"{picture}{where}{strength}{beside}"


def _region(index: int, region: Region) -> TemplateContext:
    """A region for the overlay: a rectangle relative to the picture, with a tinted image where the area is a mask."""
    color = BOX_COLORS[index % len(BOX_COLORS)]
    area, tint = region.area, ""
    if isinstance(area, Mask):
        weights = area.to_array()  # (rows, columns) in [0, 1], the opacity of the tint
        rows, columns = np.flatnonzero(weights.max(axis=1)), np.flatnonzero(weights.max(axis=0))
        edges = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        layer = Image.new("RGB", (weights.shape[1], weights.shape[0]), color)
        layer.putalpha(Image.fromarray((weights * 150).round().astype(np.uint8)))
        png = io.BytesIO()
        layer.save(png, "png", optimize=True)
        tint = data_url(png.getvalue(), "png")  # a layer over a picture, whose transparency stays
        area = Box.from_pixels(*edges, size=weights.shape[::-1])
    return {"number": index + 1, "prompt": region.prompt, "color": color, "box": area, "tint": tint}


def _loss_curve(losses: Sequence[float]) -> TemplateContext:
    """A loss curve as SVG points in a box of 100 x 100: the steps, thinned to at most 240, and their running mean."""
    if not losses:
        return {"steps": 0}
    thinned = np.array([part.mean() for part in np.array_split(np.asarray(losses), min(len(losses), _CURVE_POINTS))])
    smooth = running_mean(thinned)
    top = max(1.15 * float(np.quantile(thinned, 0.98)), float(smooth.max()) * 1.05, 1e-12)
    xs = np.linspace(0, 100, len(thinned)) if len(thinned) > 1 else np.array([50.0])

    def points(values: np.ndarray) -> str:
        return " ".join(f"{x:.2f},{100 - 100 * y / top:.2f}" for x, y in zip(xs, values, strict=True))

    labels = {"first": f"{smooth[0]:.3g}", "last": f"{smooth[-1]:.3g}", "top": f"{top:.2g}"}
    return {"steps": len(losses), "raw": points(thinned), "smooth": points(smooth), **labels}


def running_mean(losses: np.ndarray) -> np.ndarray:
    """The running mean of a curve over a sixth of its length: (steps,) to (steps,)."""
    half_width = max(len(losses) // 12, 1)
    return np.array(
        [losses[max(index - half_width, 0) : index + half_width + 1].mean() for index in range(len(losses))]
    )
