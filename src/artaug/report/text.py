"""Numbers and rows of scores as text for the report's template."""

from typing import Any, TypeAlias

from artaug.evaluation.comparison import ScoreRow

TemplateContext: TypeAlias = dict[str, Any]
"""Values by name, as a template reads them."""


def format_number(value: float, decimals: int, *, sign: str = "") -> str:
    """Format a number with a minus sign that is as wide as a plus."""
    return f"{value:{sign}.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def format_row(row: ScoreRow, decimals: int) -> dict[str, str]:
    """Format the numbers of a row, by field."""
    signed = {name: format_number(getattr(row, name), decimals, sign="+") for name in ("delta", "ci_low", "ci_high")}
    unsigned = {name: format_number(getattr(row, name), decimals) for name in ("base", "enhanced")}
    p_value = "< 0.001" if row.p_value < 0.001 else f"{row.p_value:.2g}"
    ties = f"{row.tie_rate:.0%}" if row.tie_rate else ""
    return {**signed, **unsigned, "win_rate": f"{row.win_rate:.0%}", "ties": ties, "p_value": p_value}


def row_context(row: ScoreRow, decimals: int | None = None) -> TemplateContext:
    """A row of scores: itself, its outcome, and its numbers as text."""
    return {
        "score_row": row,
        "outcome": outcome(row),
        "numbers": format_row(row, row.decimals if decimals is None else decimals),
    }


def outcome(row: ScoreRow) -> str:
    """``better`` or ``worse`` if the difference is significant, else ``unclear``."""
    if not row.significant:
        return "unclear"
    return "better" if row.delta > 0 else "worse"
