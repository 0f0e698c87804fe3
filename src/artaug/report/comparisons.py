"""A comparison as the page shows it: the headline, the table with its whiskers, the verdicts and the pictures."""

from collections.abc import Sequence
from itertools import groupby

from artaug.evaluation.comparison import Comparison, Guardrail, ScoreRow
from artaug.evaluation.comparison.rows import describe_row
from artaug.report.image_store import Album
from artaug.report.text import View, number, numbers, tone


def told_by(comparison: Comparison) -> ScoreRow:
    """The row the headline tells: the last candidate, by the first scorer that did not choose the pairs."""
    rows = [row for row in comparison.rows if row.candidate == comparison.rows[-1].candidate]
    return next((row for row in rows if not row.filtered_by), rows[0])


def headline_of(comparison: Comparison) -> View:
    """The comparison in a sentence, and what speaks against it."""
    row = told_by(comparison)
    verb = {"better": "rises from", "open": "does not clearly change, from", "worse": "falls from"}[tone(row)]
    outside = [
        one.scorer
        for one in comparison.guardrails
        if one.status(comparison.row(one.scorer, row.candidate)) == "outside"
    ]
    return {
        "row": row,
        "tone": tone(row),
        "numbers": numbers(row, row.decimals),
        "words": f"{row.scorer} {verb} {number(row.base, row.decimals)} to {number(row.enhanced, row.decimals)}",
        "n": row.n,
        "outside": outside,
    }


def table_of(comparison: Comparison) -> list[View]:
    """The table: scorers, their candidates, and where on a common axis each whisker lies, in percent."""
    guards = {guardrail.scorer: guardrail for guardrail in comparison.guardrails}
    views = []
    for scorer, group in groupby(comparison.rows, key=lambda row: row.scorer):
        rows = list(group)
        lines = _lines(rows, guards.get(scorer))
        views.append({"name": scorer, "filtered_by": rows[0].filtered_by, "rows": lines})
    return views


def verdicts_of(comparison: Comparison) -> list[View]:
    """What became of each candidate, in words, the last first; a part a scorer."""
    guards = {guardrail.scorer: guardrail for guardrail in comparison.guardrails}
    return [
        {
            "name": name,
            "parts": [
                (tone(row), describe_row(row, guards.get(row.scorer)))
                for row in comparison.rows
                if row.candidate == name
            ],
        }
        for name in reversed(list(comparison.candidates))
    ]


def _lines(rows: Sequence[ScoreRow], guardrail: Guardrail | None) -> list[View]:
    """The rows of one scorer, on one axis, with one number of decimals."""
    low, high = min(0.0, *(row.ci_low for row in rows)), max(0.0, *(row.ci_high for row in rows))
    margin, decimals = 0.06 * (high - low) or 1.0, max(row.decimals for row in rows)
    low, span = low - margin, high - low + 2 * margin

    def at(value: float) -> float:
        return round(100 * (value - low) / span, 2)

    return [
        {
            "row": row,
            "tone": tone(row),
            "numbers": numbers(row, decimals),
            "whisker": {"zero": at(0), "low": at(row.ci_low), "high": at(row.ci_high), "mean": at(row.delta)},
            "guard": guardrail and {"place": guardrail.status(row), "limit": _limit(guardrail)},
        }
        for row in rows
    ]


def _limit(guardrail: Guardrail) -> str:
    limit = f"{100 * guardrail.max_drop:.3g}%" if guardrail.relative else f"{guardrail.max_drop:.3g}"
    return f"\N{MINUS SIGN}{limit}"


def gallery_of(comparison: Comparison, album: Album) -> View:
    """The first prompts, base against each candidate."""
    told = told_by(comparison)
    arms = {"base": comparison.base, **comparison.candidates}
    cards = []
    for at, prompt in enumerate(comparison.prompts[: len(comparison.base.images)]):
        shots = [
            {
                "name": name,
                "src": album.address(arm.images[at]),
                "score": number(arm.scores[told.scorer][at], min(told.decimals, 3)),
            }
            for name, arm in arms.items()
        ]
        width, height = comparison.base.images[at].size
        cards.append({"prompt": prompt, "ratio": f"{width} / {height}", "before": shots[0], "afters": shots[1:]})
    return {"cards": cards, "arms": list(arms)[1:], "scorer": told.scorer, "of": len(comparison.prompts)}
