"""What a person looks at after a run: one HTML file with the pictures, the pairs, the numbers and where they came from."""

import base64
import platform
from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from artaug.compare import Comparison, ScoreRow
from artaug.errors import InvalidValueError, MissingExtraError
from artaug.funnel import alike_reasons
from artaug.geometry import Box, Mask
from artaug.pairs import Dropped, Kept, Skipped
from artaug.plan import Region
from artaug.rounds import Enhancement, Round
from artaug.showing import COLOURS, data_address

_TEMPLATES = Path(__file__).parent / "templates"
_PACKAGES = ("artaug", "torch", "diffusers", "transformers", "peft", "numpy", "pillow")
_POINTS = 240
_REFUSED = 4

_View: TypeAlias = dict[str, Any]
"""What the template reads of one thing."""


def write_report(
    path: str | Path,
    *,
    result: Enhancement,
    comparison: Comparison,
    title: str = "What the model learned",
    about: Mapping[str, object] = MappingProxyType({}),
    pairs: int = 12,
) -> Path:
    """Write one self-contained HTML file: it needs no network, no server and no other file.

    The same result and comparison give the same bytes. The file appears whole or not at all.

    Args:
        path: where to write; folders in between are made.
        result: the run.
        comparison: base and rounds on held-out prompts; its last candidate is the one the headline is about.
        title: heads the page.
        about: objects of the run by name (critic, trainer, ...), printed as their ``repr`` in the provenance; text as it is.
        pairs: how many of the pairs of each round to show.

    Returns:
        The path written.

    Raises:
        MissingExtraError: if jinja2 is not installed.
        InvalidValueError: if ``pairs`` is negative.
    """
    try:
        import jinja2  # noqa: PLC0415 - an extra
    except ImportError:
        raise MissingExtraError("write_report", package="jinja2", extra="report") from None
    if pairs < 0:
        raise InvalidValueError(f"write_report(pairs={pairs}): need a number of pairs to show, at least 0.")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    page = environment.get_template("report.html.j2").render(
        title=title,
        style=(_TEMPLATES / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_digest=base64.b64encode(sha256(script.encode()).digest()).decode(),
        headline=_headline(comparison),
        facts=_facts(result),
        gallery=_gallery(comparison),
        scorers=_scorers(comparison),
        notes=comparison.notes(),
        rounds=[_round(one, shown=pairs) for one in result.rounds],
        stopped=result.stopped,
        provenance=_provenance(result, comparison, about),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    return partial.replace(path)


# The comparison ----------------------------------------------------------------------------------


def _told_by(comparison: Comparison) -> ScoreRow:
    """The row the headline tells: the last candidate, by the first scorer that did not choose the pairs."""
    rows = [row for row in comparison.rows if row.candidate == comparison.rows[-1].candidate]
    return next((row for row in rows if not row.filtered_by), rows[0])


def _headline(comparison: Comparison) -> _View:
    row = _told_by(comparison)
    verb = {1: "rises from", 0: "does not clearly change, from", -1: "falls from"}[row.direction]
    return {
        "row": row,
        "numbers": _numbers(row, row.decimals),
        "words": f"{row.scorer} {verb} {_number(row.base, row.decimals)} to {_number(row.enhanced, row.decimals)}",
        "n": row.n,
    }


def _scorers(comparison: Comparison) -> list[_View]:
    """The table: scorers, their candidates, and where on a common axis each whisker lies, in percent."""
    views = []
    for scorer, group in groupby(comparison.rows, key=lambda row: row.scorer):
        rows = list(group)
        low, high = min(0.0, *(row.ci_low for row in rows)), max(0.0, *(row.ci_high for row in rows))
        margin, decimals = 0.06 * (high - low) or 1.0, max(row.decimals for row in rows)
        low, span = low - margin, high - low + 2 * margin

        def at(number: float, low: float = low, span: float = span) -> float:
            return round(100 * (number - low) / span, 2)

        lines = [
            {
                "row": row,
                "numbers": _numbers(row, decimals),
                "whisker": {"zero": at(0), "low": at(row.ci_low), "high": at(row.ci_high), "mean": at(row.delta)},
            }
            for row in rows
        ]
        views.append({"name": scorer, "filtered_by": rows[0].filtered_by, "rows": lines})
    return views


def _numbers(row: ScoreRow, decimals: int) -> dict[str, str]:
    signed = {name: _number(getattr(row, name), decimals, sign="+") for name in ("delta", "ci_low", "ci_high")}
    plain = {name: _number(getattr(row, name), decimals) for name in ("base", "enhanced")}
    return {**signed, **plain, "win_rate": f"{row.win_rate:.1%}"}


def _number(number: float, decimals: int, *, sign: str = "") -> str:
    return f"{number:{sign}.{decimals}f}".replace("-", "\N{MINUS SIGN}")  # as wide as the plus


def _gallery(comparison: Comparison) -> _View:
    told = _told_by(comparison)
    arms = {"base": comparison.base, **comparison.candidates}
    cards = [
        {
            "prompt": prompt,
            "seed": seed,
            "shots": [
                {
                    "name": name,
                    "src": data_address(arm.pictures[at]),
                    "score": _number(arm.scores[told.scorer][at], told.decimals),
                }
                for name, arm in arms.items()
            ],
        }
        for at, (prompt, seed) in enumerate(
            zip(comparison.prompts, comparison.seeds[: len(comparison.prompts)], strict=True)
        )
        if at < len(comparison.base.pictures)
    ]
    return {"cards": cards, "arms": len(arms), "scorer": told.scorer, "of": len(comparison.prompts)}


# The rounds --------------------------------------------------------------------------------------


def _facts(result: Enhancement) -> list[tuple[str, str]]:
    """The run in a few numbers, each with what it counts."""
    attempts = [attempt for one in result.rounds for attempt in one.attempts]
    kept = sum(isinstance(attempt, Kept) for attempt in attempts)
    accepted = [one.lora for one in result.rounds if one.accepted]
    facts = [
        (f"{len(attempts):,}", "prompts asked"),
        (f"{kept:,}", "pairs learned from"),
        (f"{len(accepted)} of {len(result.rounds)}", "rounds helped"),
        (_duration(sum(sum(one.seconds.values()) for one in result.rounds)), "from start to end"),
    ]
    return [*facts, (f"rank {accepted[-1].rank}", f"LoRA on {len(accepted[-1].layers)} layers")] if accepted else facts


def _round(one: Round, *, shown: int) -> _View:
    kept = [attempt for attempt in one.attempts if isinstance(attempt, Kept)]
    dropped = [attempt for attempt in one.attempts if isinstance(attempt, Dropped)]
    skipped = [attempt for attempt in one.attempts if isinstance(attempt, Skipped)]
    reasons = {
        "kept": [],
        "dropped": alike_reasons(attempt.verdict.reason for attempt in dropped),
        "skipped": alike_reasons(attempt.reason for attempt in skipped),
    }
    counts = {"kept": len(kept), "dropped": len(dropped), "skipped": len(skipped)}
    return {
        "number": one.number,
        "accepted": one.accepted,
        "asked": len(one.attempts),
        "ends": [{"name": name, "count": count, "reasons": reasons[name]} for name, count in counts.items()],
        "gain": one.gain and {"row": one.gain, "numbers": _numbers(one.gain, one.gain.decimals)},
        "kept": [_pair(attempt) for attempt in kept[:shown]],
        "refused": [_pair(attempt) for attempt in dropped[: min(shown, _REFUSED)]],
        "loss": _curve(one.training.losses),
        "training": one.training,
        "seconds": [{"stage": stage, "share": taken, "text": _duration(taken)} for stage, taken in one.seconds.items()],
        "total": _duration(sum(one.seconds.values())),
    }


def _pair(attempt: Kept | Dropped) -> _View:
    pair, verdict = attempt.pair, attempt.verdict
    return {
        "prompt": pair.prompt,
        "seed": pair.seed,
        "shots": [{"name": name, "src": data_address(getattr(pair, name))} for name in ("before", "after")],
        "rewritten": pair.plan.prompt if pair.plan.prompt != pair.prompt else "",
        "regions": [_region(number, region) for number, region in enumerate(pair.plan.regions)],
        "reason": verdict.reason,
        "scores": [(name, _number(score, 3)) for name, score in verdict.scores.items()],
    }


def _region(number: int, region: Region) -> _View:
    """A region as the overlay draws it: a rectangle, or a tint where it is a mask; relative to the picture."""
    colour = COLOURS[number % len(COLOURS)]
    area, tint = region.area, ""
    if isinstance(area, Mask):
        weights = area.to_array()
        rows, columns = np.flatnonzero(weights.max(axis=1)), np.flatnonzero(weights.max(axis=0))
        edges = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        tint = _tinted(weights, colour)
        area = Box.from_pixels(*edges, size=weights.shape[::-1])
    return {"number": number + 1, "prompt": region.prompt, "colour": colour, "box": area, "tint": tint}


def _tinted(weights: np.ndarray, colour: str) -> str:
    layer = Image.new("RGB", (weights.shape[1], weights.shape[0]), colour)
    layer.putalpha(Image.fromarray((weights * 150).round().astype(np.uint8)))
    return data_address(layer)


def _curve(losses: Sequence[float]) -> _View:
    """A loss curve as SVG points in a box of 100 x 100: every step (thinned to a few hundred) and a running mean."""
    if not losses:
        return {"steps": 0}
    thin = np.array([part.mean() for part in np.array_split(np.asarray(losses), min(len(losses), _POINTS))])
    width = max(len(thin) // 12, 1)
    smooth = np.array([thin[max(at - width, 0) : at + width + 1].mean() for at in range(len(thin))])
    top = max(1.15 * float(np.quantile(thin, 0.98)), float(smooth.max()) * 1.05, 1e-12)
    across = np.linspace(0, 100, len(thin)) if len(thin) > 1 else np.array([50.0])

    def points(values: np.ndarray) -> str:
        return " ".join(f"{x:.2f},{100 - 100 * y / top:.2f}" for x, y in zip(across, values, strict=True))

    ends = {"first": f"{smooth[0]:.3g}", "last": f"{smooth[-1]:.3g}", "top": f"{top:.2g}"}
    return {"steps": len(losses), "raw": points(thin), "smooth": points(smooth), **ends}


# Everything else ---------------------------------------------------------------------------------


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


def _provenance(result: Enhancement, comparison: Comparison, about: Mapping[str, object]) -> list[tuple[str, str]]:
    arms = {"base": comparison.base, **comparison.candidates}
    accepted = [one.lora for one in result.rounds if one.accepted]
    seeds = ", ".join(str(seed) for seed in comparison.seeds[:4]) + ", …" * (len(comparison.seeds) > 4)
    return [
        *((name, thing if isinstance(thing, str) else repr(thing)) for name, thing in about.items()),
        *((f"{name} drawn by", arm.drawn_by) for name, arm in arms.items()),
        ("result", repr(accepted[-1]) if accepted else "no LoRA: no round was accepted"),
        ("picture seeds", f"{seeds} ({len(comparison.seeds)} in all, the same for every arm)"),
        ("versions", ", ".join(f"{name} {version(name)}" for name in _PACKAGES)),
        ("machine", f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"),
    ]
