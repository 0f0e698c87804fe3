"""The plot of `benchmarks.online`: gain over the spread of the base, over draws, in rounds, and with boxes as weights."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import _record as record
from benchmarks._online_arms import ARMS, DENSE, LOOP, SELECTIONS

SHOWN_DRIFT = 0.002
"""The drift at which gains are shown."""
COLORS = ("#d1495b", "#00798c", "#66a182", "#edae49", "#8d5a97", "#2e4057", "#b08968", "#999999")
STYLES: Mapping[str, Mapping[str, Any]] = {
    name: {
        "color": color,
        "marker": "D" if name == LOOP else "o",
        "markersize": 4,
        "linewidth": 2 if name == LOOP else 1.2,
    }
    for name, color in zip((name for name in ARMS if name not in DENSE), COLORS, strict=True)
}
DRIFT_LABELS: Mapping[float | None, str] = {SHOWN_DRIFT: f"gain at drift {SHOWN_DRIFT:g}", None: "gain at strength 1"}


def plot(content: Mapping[str, Any]) -> Figure:
    """Means over seeds; error bars are 95% intervals over seeds and prompts."""
    rows, bases = content["estimates"], content["bases"]
    spreads = [row["spread"] for row in bases]
    usual = content["environment"]["settings"]["usual_draws"]
    figure = Figure(figsize=(11, 4 * (3 + (len(spreads) + 1) // 2)), layout="constrained")
    drawers: list[Callable[[Axes], None]] = [
        *(partial(_spread, rows=rows, bases=bases, usual=usual, drift=drift) for drift in DRIFT_LABELS),
        *(partial(_draws, rows=rows, spread=spread) for spread in spreads),
        *(partial(_rounds, rows=rows, usual=usual, spread=spread) for spread in (spreads[:1] + spreads[-1:])),
        partial(_boxes, rows=rows),
    ]
    panels = figure.subplots((len(drawers) + 1) // 2, 2).ravel()
    for axes in panels[len(drawers) :]:
        axes.remove()
    for axes, draw in zip(panels, drawers, strict=False):
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.5)
    measured = {row["arm"] for row in rows}
    handles = [
        figure.axes[0].plot([], [], label=name, **style)[0] for name, style in STYLES.items() if name in measured
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def _of(rows: Sequence[record.Row], **values: object) -> list[record.Row]:
    return [row for row in rows if values.items() <= row.items()]


def _line(axes: Axes, name: str, points: Sequence[tuple[float, record.Row]]) -> None:
    """Gains over x, with their intervals."""
    if points:
        gains = [row["gain"] for _, row in points]
        ends = [
            [row["gain"] - row["gain_low"] for _, row in points],
            [row["gain_high"] - row["gain"] for _, row in points],
        ]
        axes.errorbar([x for x, _ in points], gains, yerr=ends, capsize=2, elinewidth=0.6, **STYLES[name])


def _spread(
    axes: Axes, *, rows: Sequence[record.Row], bases: Sequence[record.Row], usual: int, drift: float | None
) -> None:
    axes.set(
        title=f"spread of the base, {usual} draws",
        xlabel="standard deviation of the score of one prompt's draws",
        ylabel=DRIFT_LABELS[drift],
    )
    for name in STYLES:
        draws = usual if name in SELECTIONS else 1
        mine = _of(rows, arm=name, draws=draws, rounds=1, at_drift=drift)
        _line(axes, name, [(base["deviation"], row) for base in bases for row in _of(mine, spread=base["spread"])])
    if drift is None:
        levels = [(base["deviation"], base["level"]) for base in bases]
        axes.plot(*zip(*levels, strict=True), color="black", linestyle=":", linewidth=1)
        axes.annotate("the base's own draws", levels[-1], ha="right", va="bottom", fontsize=8)


def _draws(axes: Axes, *, rows: Sequence[record.Row], spread: float) -> None:
    axes.set(
        title=f"draws of a prompt, same pictures in all, spread {spread:g}",
        xlabel="draws of each prompt",
        ylabel="gain at strength 1",
        xscale="log",
    )
    mine = _of(rows, spread=spread, rounds=1, at_drift=None)
    counts = sorted({row["draws"] for row in mine if row["arm"] in SELECTIONS})
    for name in SELECTIONS:
        points = [(row["draws"], row) for count in counts for row in _of(mine, arm=name, draws=count)]
        _line(axes, name, points)
    for row in _of(mine, arm=LOOP):
        axes.axhline(row["gain"], color=STYLES[LOOP]["color"], linewidth=2)
        axes.axhspan(row["gain_low"], row["gain_high"], color=STYLES[LOOP]["color"], alpha=0.12, linewidth=0)
    axes.set_xticks(counts, map(str, counts))
    axes.minorticks_off()


def _rounds(axes: Axes, *, rows: Sequence[record.Row], usual: int, spread: float) -> None:
    axes.set(
        title=f"rounds, spread {spread:g}", xlabel="drift at strength 1, in 1/1000 (numbers: rounds)", ylabel="gain"
    )
    for name in (LOOP, *SELECTIONS):
        draws = usual if name in SELECTIONS else 1
        mine = sorted(
            _of(rows, arm=name, draws=draws, spread=spread, at_drift=None), key=lambda row: int(row["rounds"])
        )
        axes.plot([1000 * row["drift"] for row in mine], [row["gain"] for row in mine], **STYLES[name])
        for row in mine:
            axes.annotate(f"{row['rounds']}", (1000 * row["drift"], row["gain"]), fontsize=9)


def _boxes(axes: Axes, *, rows: Sequence[record.Row]) -> None:
    axes.set(title="the critic's boxes as weights", xlabel=DRIFT_LABELS[SHOWN_DRIFT])
    mine = [row for name in DENSE for row in _of(rows, arm=name, at_drift=SHOWN_DRIFT)]
    for position, row in enumerate(mine):
        ends = [[row["gain"] - row["gain_low"]], [row["gain_high"] - row["gain"]]]
        axes.errorbar([row["gain"]], [position], xerr=ends, marker="o", color="#2e4057", capsize=3)
    axes.set_yticks(range(len(mine)), [row["arm"].removeprefix("boxes, ") for row in mine], fontsize=8)
    axes.invert_yaxis()
