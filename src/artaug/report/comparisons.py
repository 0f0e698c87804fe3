"""A comparison for the report's template: headline, table with whiskers, verdicts and images."""

from collections.abc import Sequence
from itertools import groupby

from artaug.evaluation.comparison import Comparison, Guardrail, ScoreRow
from artaug.evaluation.comparison.rows import describe_row
from artaug.report.image_store import ImageStore
from artaug.report.text import TemplateContext, format_number, outcome, row_context


def headline_row(comparison: Comparison) -> ScoreRow:
    """The row of the headline: of the last candidate, by the first scorer that did not filter the training pairs."""
    rows = [row for row in comparison.rows if row.candidate == comparison.rows[-1].candidate]
    return next((row for row in rows if not row.filtered_by), rows[0])


def headline_context(comparison: Comparison) -> TemplateContext:
    """The comparison as a sentence, and the guardrails that the candidate violates."""
    row = headline_row(comparison)
    verb = {"better": "rises from", "unclear": "does not clearly change, from", "worse": "falls from"}[outcome(row)]
    means = f"{format_number(row.base, row.decimals)} to {format_number(row.enhanced, row.decimals)}"
    violated = [
        guardrail.scorer
        for guardrail in comparison.guardrails
        if guardrail.status(comparison.row(guardrail.scorer, row.candidate)) == "outside"
    ]
    return {**row_context(row), "text": f"{row.scorer} {verb} {means}", "n": row.n, "violated": violated}


def score_table(comparison: Comparison) -> list[TemplateContext]:
    """The table, scorer by scorer, each with a row for every candidate."""
    guardrails = {guardrail.scorer: guardrail for guardrail in comparison.guardrails}
    table = []
    for scorer, group in groupby(comparison.rows, key=lambda row: row.scorer):
        rows = list(group)
        contexts = _table_rows(rows, guardrails.get(scorer))
        table.append({"name": scorer, "filtered_by": rows[0].filtered_by, "rows": contexts})
    return table


def verdicts(comparison: Comparison) -> list[TemplateContext]:
    """The verdict on each candidate as text, the last candidate first, with a part for each scorer."""
    guardrails = {guardrail.scorer: guardrail for guardrail in comparison.guardrails}
    return [
        {
            "name": name,
            "rows": [
                (outcome(row), describe_row(row, guardrails.get(row.scorer)))
                for row in comparison.rows
                if row.candidate == name
            ],
        }
        for name in reversed(list(comparison.candidates))
    ]


def _table_rows(rows: Sequence[ScoreRow], guardrail: Guardrail | None) -> list[TemplateContext]:
    """The rows of one scorer, with the same axis for their whiskers and the same number of decimals."""
    low, high = min(0.0, *(row.ci_low for row in rows)), max(0.0, *(row.ci_high for row in rows))
    margin, decimals = 0.06 * (high - low) or 1.0, max(row.decimals for row in rows)
    low, span = low - margin, high - low + 2 * margin

    def percent(value: float) -> float:
        return round(100 * (value - low) / span, 2)

    return [
        {
            **row_context(row, decimals),
            "whisker": {
                "zero": percent(0),
                "low": percent(row.ci_low),
                "high": percent(row.ci_high),
                "mean": percent(row.delta),
            },
            "guardrail": guardrail and {"status": guardrail.status(row), "limit": _limit(guardrail)},
        }
        for row in rows
    ]


def _limit(guardrail: Guardrail) -> str:
    limit = f"{100 * guardrail.max_drop:.3g}%" if guardrail.relative else f"{guardrail.max_drop:.3g}"
    return f"\N{MINUS SIGN}{limit}"


def gallery_context(comparison: Comparison, store: ImageStore) -> TemplateContext:
    """The images of the first prompts: the base and every candidate."""
    row = headline_row(comparison)
    arms = {"base": comparison.base, **comparison.candidates}
    cards = []
    for index, prompt in enumerate(comparison.prompts[: len(comparison.base.images)]):
        before, *afters = (
            {
                "name": name,
                "src": store.url(arm.images[index]),
                "score": format_number(arm.scores[row.scorer][index], min(row.decimals, 3)),
            }
            for name, arm in arms.items()
        )
        width, height = comparison.base.images[index].size
        cards.append({"prompt": prompt, "ratio": f"{width} / {height}", "before": before, "afters": afters})
    return {"cards": cards, "arms": list(arms)[1:], "scorer": row.scorer, "total": len(comparison.prompts)}
