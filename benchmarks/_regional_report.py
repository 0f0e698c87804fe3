"""What a run of the grid says: a line for each point, the regret of ``auto``, and a plot of both."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import _record as record
from benchmarks import _timing as timing

POINT = ("part", "image_tokens", "regions", "batch", "rows", "layout", "dtype", "gradients")
"""The columns that name a point."""
COLORS = {
    "dense": "tab:blue",
    "merged": "tab:orange",
    "grouped": "tab:green",
    "flex": "tab:red",
    "output_mix": "tab:brown",
    "auto": "black",
}
METHODS = tuple(COLORS)
_AXES = {"image_tokens": "image tokens", "regions": "regions", "batch": "pictures in a batch"}


def by_point(rows: Sequence[record.Row]) -> dict[tuple[object, ...], dict[str, record.Row]]:
    """The rows of each point by method, in the order measured."""
    points: dict[tuple[object, ...], dict[str, record.Row]] = {}
    for row in rows:
        points.setdefault(tuple(row[name] for name in POINT), {})[row["method"]] = row
    return points


def summarize(rows: Sequence[record.Row]) -> dict[str, Any]:
    """The regret of ``auto`` over all points, as measured, and of its choices."""
    chosen = [row for row in rows if row["method"] == "auto"]
    if not chosen:
        return {}
    worst = max(chosen, key=lambda row: float(row["regret"]))
    choices = [row["choice_regret"] for row in chosen if row["choice_regret"] is not None]
    return {
        "regret": timing.summary([row["regret"] for row in chosen]),
        "choice_regret": timing.summary(choices) if choices else None,
        "worst": {name: worst[name] for name in (*POINT, "choice", "best", "regret")},
    }


def text(rows: Sequence[record.Row]) -> str:
    """A line for each point, with every method's time over plain drawing; and the regret of ``auto``."""
    lines = []
    for key, methods in by_point(rows).items():
        ratios = {name: methods[name]["ratio_to_plain"] if name in methods else "" for name in METHODS}
        auto: Mapping[str, Any] = methods.get("auto", {})
        lines.append(
            dict(zip(POINT, key, strict=True))
            | {"plain, s": methods["plain"]["seconds"]}
            | ratios
            | {"choice": auto.get("choice") or "mixed", "best": auto.get("best", ""), "regret": auto.get("regret", "")}
        )
    parts = [record.table(lines)]
    for name, figures in summarize(rows).items():
        if figures:
            parts.append(f"{name}: " + ", ".join(f"{key} {_format(figure)}" for key, figure in figures.items()))
    return "\n".join(parts)


def _format(figure: object) -> str:
    return f"{figure:.3f}" if isinstance(figure, float) else str(figure)


def plot(rows: Sequence[record.Row]) -> Figure:
    """Above, every method's time over the best one's at every point; below, time over plain by size, regions and batch."""
    points = by_point(rows)
    figure = Figure(figsize=(max(9.0, 0.19 * len(points) + 2), 9), layout="constrained")
    layout = figure.add_gridspec(2, len(_AXES), height_ratios=(3, 2))
    _plot_regret(figure.add_subplot(layout[0, :]), points)
    for number, axis in enumerate(_AXES):
        _plot_slice(figure.add_subplot(layout[1, number]), axis, points)
    return figure


def _plot_regret(axes: Axes, points: Mapping[tuple[object, ...], Mapping[str, record.Row]]) -> None:
    """Time over the best method's, point by point: where the ring of ``auto`` is above the band, it is off."""
    exact = [name for name in METHODS if name not in {"auto", "output_mix"}]
    axes.axhspan(1, timing.TOLERANCE, color="tab:green", alpha=0.2)
    for name in exact:
        places, over_best = [], []
        for place, methods in enumerate(points.values()):
            if name in methods:
                best = min(methods[other]["ratio_to_plain"] for other in exact if other in methods)
                places.append(place)
                over_best.append(methods[name]["ratio_to_plain"] / best)
        if places:
            axes.plot(places, over_best, ".", color=COLORS[name], label=name)
    measured = [(place, methods["auto"]) for place, methods in enumerate(points.values()) if "auto" in methods]
    regrets = [row["regret"] for _, row in measured]
    errors = [
        [max(0.0, row["regret"] - row["regret_low"]) for _, row in measured],
        [max(0.0, row["regret_high"] - row["regret"]) for _, row in measured],
    ]
    places = [place for place, _ in measured]
    axes.errorbar(
        places, regrets, errors, fmt="o", color=COLORS["auto"], markerfacecolor="none", linewidth=0.7, label="auto"
    )
    labels = [_label(key) for key in points]
    axes.set_xticks(range(len(points)), labels, rotation=90, fontsize=6)
    axes.set_yscale("log", base=2)
    axes.set_yticks([1, 1.05, 1.25, 1.5, 2, 4], ["1", "1.05", "1.25", "1.5", "2", "4"])
    axes.set_ylim(0.9, 4)
    axes.set_ylabel("time over the best method's")
    axes.set_title("the regret of auto (tokens, regions, batch, rows, layout, dtype)", fontsize=9)
    axes.legend(fontsize=7, ncols=len(METHODS), loc="upper right")


def _label(key: Sequence[object]) -> str:
    """What a point, or a line of points, is: steps without gradients are the usual."""
    part, *words, gradients = key
    return " ".join(str(word) for word in (*[part] * (part != "step"), *words, *["gradients"] * bool(gradients)))


def _plot_slice(axes: Axes, axis: str, points: Mapping[tuple[object, ...], Mapping[str, record.Row]]) -> None:
    """Time over plain drawing along one axis, the others fixed where the most points are."""
    index = POINT.index(axis)
    slices: dict[tuple[object, ...], dict[Any, Mapping[str, record.Row]]] = {}
    for key, methods in points.items():
        slices.setdefault((*key[:index], *key[index + 1 :]), {})[key[index]] = methods
    # Of lines with equally many points the one of four regions, which other benchmarks have, too.
    fixed, chosen = max(slices.items(), key=lambda item: (len(item[1]), item[0][POINT.index("regions")] == 4))
    for name in METHODS:
        line = sorted((value, methods[name]) for value, methods in chosen.items() if name in methods)
        if line:
            ratios = [row["ratio_to_plain"] for _, row in line]
            errors = [[row["ratio_to_plain"] - row["ratio_low"] for _, row in line]]
            errors += [[row["ratio_high"] - row["ratio_to_plain"] for _, row in line]]
            axes.errorbar([value for value, _ in line], ratios, errors, color=COLORS[name], label=name, marker=".")
    axes.axhline(1, color="grey", linewidth=0.5)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(chosen), [str(value) for value in sorted(chosen)])
    axes.set_xlabel(_AXES[axis])
    axes.set_title(_label(fixed), fontsize=7)
    axes.set_ylabel("time, plain = 1")
    axes.legend(fontsize=6)
