"""Numbers as a reader of the report meets them."""

from typing import Any, TypeAlias

from artaug.evaluation.comparison import ScoreRow

View: TypeAlias = dict[str, Any]
"""What the template reads of one thing."""


def number(value: float, decimals: int, *, sign: str = "") -> str:
    """A number with its minus sign as wide as its plus."""
    return f"{value:{sign}.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def numbers(row: ScoreRow, decimals: int) -> dict[str, str]:
    """A row of the table as text."""
    signed = {name: number(getattr(row, name), decimals, sign="+") for name in ("delta", "ci_low", "ci_high")}
    plain = {name: number(getattr(row, name), decimals) for name in ("base", "enhanced")}
    p_value = "< 0.001" if row.p_value < 0.001 else f"{row.p_value:.2g}"
    ties = f"{row.tie_rate:.0%}" if row.tie_rate else ""
    return {**signed, **plain, "win_rate": f"{row.win_rate:.0%}", "ties": ties, "p_value": p_value}


def tone(row: ScoreRow) -> str:
    """Which way a row went: ``better``, ``worse``, or ``open`` as long as it is not settled."""
    if not row.significant:
        return "open"
    return "better" if row.delta > 0 else "worse"
