"""The plot of the ablation: a panel per axis, and the cost."""

from collections.abc import Callable, Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import _record as record
from benchmarks._ablation_bench import ARMS, CONTROLS, LONG, OURS

COLORS = dict(
    zip([*ARMS, LONG], ["#d1495b", "#8d5a97", "#edae49", "#66a182", "#00798c", "#2e4057", "#888888"], strict=True)
)
MARKS = dict(zip([*ARMS, LONG], "os^DvPx", strict=True))


def plot(rows: Sequence[record.Row]) -> Figure:
    """Gain along every axis, gain beside drift and alignment, what needs no training, and the cost.

    Points are means over seeds, bars reach from the lowest seed to the highest.
    """
    figure = Figure(figsize=(10, 15), layout="constrained")
    panels = figure.subplots(4, 2).ravel()
    drawn = [_pairs, _rounds, _yields, _noises, _drift, _alignment, _controls, _cost]
    for axes, draw in zip(panels, drawn, strict=True):
        draw(axes, rows)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.set_axisbelow(True)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    return figure


def _lines(axes: Axes, rows: Sequence[record.Row], along: str, *, label: Callable[[record.Row], str]) -> None:
    """A line for all rows of one label."""
    for name in dict.fromkeys(map(label, rows)):
        mine = [row for row in rows if label(row) == name]
        places = sorted({row[along] for row in mine})
        heights = [[row["gain"] for row in mine if row[along] == place] for place in places]
        arm = mine[0]["arm"]
        axes.errorbar(
            places,
            [fmean(gains) for gains in heights],
            yerr=[[fmean(gains) - min(gains) for gains in heights], [max(gains) - fmean(gains) for gains in heights]],
            color=COLORS[arm],
            marker=MARKS[arm],
            markersize=5,
            capsize=2,
            linewidth=1.2,
            linestyle="--" if mine[0]["share"] == 1 and along == "noise" else "-",
            label=name,
        )
    axes.set_ylabel("gain")
    low, high = axes.get_ylim()
    axes.set_ylim(min(0, low), max(high, 0) + 0.08 * (high - low))


def _of(rows: Sequence[record.Row], axis: str) -> list[record.Row]:
    return [row for row in rows if row["axis"] == axis]


def _pairs(axes: Axes, rows: Sequence[record.Row]) -> None:
    axes.set(title="pairs", xlabel="pairs learned from, in as many steps", xscale="log")
    _lines(axes, _of(rows, "pairs"), "pairs", label=lambda row: row["arm"])
    ticks = sorted({row["pairs"] for row in _of(rows, "pairs")})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()


def _rounds(axes: Axes, rows: Sequence[record.Row]) -> None:
    axes.set(title="rounds", xlabel="rounds, or as many pairs and steps in one")
    _lines(axes, _of(rows, "rounds"), "rounds", label=lambda row: row["arm"])
    axes.set_xticks(sorted({row["rounds"] for row in _of(rows, "rounds")}))
    axes.legend(frameon=False)


def _yields(axes: Axes, rows: Sequence[record.Row]) -> None:
    mine = _of(rows, "yield")
    axes.set(title="yield", xlabel="share of the candidates kept, the best ones", xscale="log")
    _lines(axes, mine, "share", label=lambda row: row["arm"])
    ticks = sorted({row["share"] for row in mine})
    axes.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False)


def _noises(axes: Axes, rows: Sequence[record.Row]) -> None:
    mine = _of(rows, "noise")
    axes.set(title="critic noise", xlabel="share of wrong boxes")
    _lines(axes, mine, "noise", label=lambda row: "pairs filtered" if row["share"] is None else "pairs not filtered")
    ticks = sorted({row["noise"] for row in mine})
    axes.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
    axes.legend(frameon=False)


def _beside(axes: Axes, rows: Sequence[record.Row], across: str, *, times: float = 1) -> None:
    """Gain beside another column: a point per seed and number of pairs, hollow for scales above 1; lines join rounds."""
    for row in [*_of(rows, "pairs"), *_of(rows, "scale")]:
        color, mark = COLORS[row["arm"]], MARKS[row["arm"]]
        face = "none" if row["axis"] == "scale" else color
        axes.scatter(times * row[across], row["gain"], s=24, marker=mark, facecolor=face, edgecolor=color, alpha=0.8)
    going = _of(rows, "rounds")
    for arm in dict.fromkeys(row["arm"] for row in going if row["arm"] != LONG):
        mine = [row for row in going if row["arm"] == arm]
        numbers = sorted({row["rounds"] for row in mine})
        means = [
            tuple(fmean(row[name] for row in mine if row["rounds"] == number) for name in (across, "gain"))
            for number in numbers
        ]
        axes.plot([times * x for x, _ in means], [y for _, y in means], color=COLORS[arm], linewidth=1)
        for number, (x, y) in zip(numbers, means, strict=True):
            if number > 1:
                axes.annotate(str(number), (times * x, y), color=COLORS[arm], fontsize=9, fontweight="bold")
    axes.set_ylabel("gain")


def _drift(axes: Axes, rows: Sequence[record.Row]) -> None:
    axes.set(title="gain and drift (numbers: rounds)", xlabel="drift: change of pictures that needed none, in 1/1000")
    _beside(axes, rows, "drift", times=1000)


def _alignment(axes: Axes, rows: Sequence[record.Row]) -> None:
    axes.set(title="gain and alignment", xlabel="alignment: share of what was asked that is right (dotted: before)")
    _beside(axes, rows, "alignment")
    for row in _of(rows, "control"):
        if row["arm"] == "nothing":
            axes.axvline(row["alignment"], color="grey", linewidth=0.8, linestyle=":")


def _controls(axes: Axes, rows: Sequence[record.Row]) -> None:
    axes.set(title="without training, beside ours", ylabel="gain")
    trained = [row for row in _of(rows, "pairs") if row["arm"] == OURS]
    usual = _of(rows, "noise")[0]["pairs"]
    bars = {name: [row for row in _of(rows, "control") if row["arm"] == name] for name in CONTROLS if name != "nothing"}
    bars[OURS] = [row for row in trained if row["pairs"] == usual]
    for place, (name, mine) in enumerate(bars.items()):
        height = fmean(row["gain"] for row in mine)
        axes.bar(place, height, color=COLORS.get(name, "#bbbbbb"), width=0.6)
        passes = fmean(row["drawing_passes"] for row in mine)
        axes.annotate(f"{passes:.3g} passes\na picture", (place, height), ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(bars)), [name.replace(" ", "\n", 1) for name in bars], fontsize=8)
    axes.margins(y=0.15)


def _cost(axes: Axes, rows: Sequence[record.Row]) -> None:
    usual = _of(rows, "noise")[0]["pairs"]
    axes.set(title=f"cost, {usual} pairs", xlabel="denoiser passes (dark: making pairs; light: learning)")
    for place, name in enumerate(reversed([*ARMS])):
        mine = [row for row in _of(rows, "pairs") if (row["arm"], row["pairs"]) == (name, usual)]
        made = fmean(row["passes"] - row["learning_passes"] for row in mine)
        learned = fmean(row["learning_passes"] for row in mine)
        axes.barh(place, made, color=COLORS[name])
        axes.barh(place, learned, left=made, color=COLORS[name], alpha=0.45)
    axes.set_yticks(range(len(ARMS)), [*reversed([*ARMS])], fontsize=8)
