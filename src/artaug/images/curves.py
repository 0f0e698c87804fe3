"""Curves for notebooks, as SVG: no library is loaded, and text and axes have the page's own color."""

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from artaug.drawing import BOX_COLORS

_WIDTH, _HEIGHT = 460, 170
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 10, 24, 34
_MOST_POINTS = 200


def curves_svg(curves: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str) -> str:
    """Draw curves over one axis, each with its name; of more than 200 points, means of equal parts.

    Args:
        curves: by name, the points ``(x, y)`` in the order of x; what is not finite is left out.
        x: what the horizontal axis counts.
        y: what the vertical axis measures.

    >>> from artaug.images.curves import curves_svg
    >>> curves_svg({"loss": [(1, 0.5), (2, 0.25)]}, x="step", y="loss").count("<polyline")
    1
    """
    drawn = {name: points for name, values in curves.items() if len(points := _thinned(values))}
    if not drawn:
        return ""
    every = np.concatenate(list(drawn.values()))
    (x_low, y_low), (x_high, y_high) = every.min(axis=0), every.max(axis=0)
    if y_low == y_high:  # a level line in the middle
        y_low, y_high = y_low - (abs(y_low) or 1) / 2, y_high + (abs(y_high) or 1) / 2
    spans = np.array([x_high - x_low or 1, y_high - y_low])
    inner = np.array([_WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM])
    lines = []
    for index, (name, points) in enumerate(drawn.items()):
        places = (points - (x_low, y_low)) / spans * inner * (1, -1) + (_LEFT, _HEIGHT - _BOTTOM)
        color = BOX_COLORS[index % len(BOX_COLORS)]
        path = " ".join(f"{across:.1f},{down:.1f}" for across, down in places)
        dots = "".join(f'<circle cx="{across:.1f}" cy="{down:.1f}" r="2.5" fill="{color}"/>' for across, down in places)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        lines.append(dots * (len(points) <= _WIDTH // 20))
        lines.append(_text(_WIDTH - _RIGHT, _TOP - 10 + 12 * index, name, anchor="end", color=color) * (len(drawn) > 1))
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    axes = f'<path d="M{_LEFT},{_TOP}V{bottom}H{right}" fill="none" stroke="currentColor" stroke-opacity="0.5"/>'
    labels = [
        _text(_LEFT - 6, _TOP + 4, f"{y_high:.3g}", anchor="end"),
        _text(_LEFT - 6, bottom + 4, f"{y_low:.3g}", anchor="end"),
        _text(_LEFT, bottom + 14, f"{x_low:g}"),
        _text(right, bottom + 14, f"{x_high:g}", anchor="end"),
        _text((_LEFT + right) / 2, bottom + 28, x, anchor="middle"),
        _text(_LEFT, _TOP - 10, y),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
        f'role="img" aria-label="{escape(y)} by {escape(x)}" style="max-width:100%">{axes}{"".join(lines + labels)}</svg>'
    )


def _thinned(points: Sequence[tuple[float, float]]) -> np.ndarray:
    """The points as rows, at most 200 of them."""
    values: np.ndarray = np.array(points, dtype=float).reshape(-1, 2)
    values = values[np.isfinite(values).all(axis=1)]
    parts = np.array_split(values, _MOST_POINTS) if len(values) > _MOST_POINTS else [values]
    return values if len(parts) == 1 else np.stack([part.mean(axis=0) for part in parts])


def _text(across: float, down: float, words: str, *, anchor: str = "start", color: str = "currentColor") -> str:
    place = f'x="{across:g}" y="{down:g}" text-anchor="{anchor}" fill="{color}"'
    return f'<text {place} font-family="sans-serif" font-size="11">{escape(words)}</text>'
