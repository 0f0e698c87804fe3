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
    """Gain along every axis, gain against drift and alignment, the arms without training, and the cost.

    Points are means over seeds; error bars span the lowest and the highest seed.
    """
    figure = Figure(figsize=(10, 15), layout="constrained")
    panels = figure.subplots(4, 2).ravel()
    plotters = [_pairs, _rounds, _yields, _noises, _drift, _alignment, _controls, _cost]
    for axes, draw in zip(panels, plotters, strict=True):
        draw(axes, rows)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.set_axisbelow(True)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    return figure


def _lines(axes: Axes, rows: Sequence[record.Row], along: str, *, label: Callable[[record.Row], str]) -> None:
    """Plot a line for the rows of each label."""
    for name in dict.fromkeys(map(label, rows)):
        arm_rows = [row for row in rows if label(row) == name]
        positions = sorted({row[along] for row in arm_rows})
        gains_by_position = [[row["gain"] for row in arm_rows if row[along] == position] for position in positions]
        arm = arm_rows[0]["arm"]
        axes.errorbar(
            positions,
            [fmean(gains) for gains in gains_by_position],
            yerr=[
                [fmean(gains) - min(gains) for gains in gains_by_position],
                [max(gains) - fmean(gains) for gains in gains_by_position],
            ],
            color=COLORS[arm],
            marker=MARKS[arm],
            markersize=5,
            capsize=2,
            linewidth=1.2,
            linestyle="--" if arm_rows[0]["share"] == 1 and along == "noise" else "-",
            label=name,
        )
    axes.set_ylabel("gain")
    low, high = axes.get_ylim()
    axes.set_ylim(min(0, low), max(high, 0) + 0.08 * (high - low))


def _of(rows: Sequence[record.Row], axis: str) -> list[record.Row]:
    return [row for row in rows if row["axis"] == axis]


def _pairs(axes: Axes, rows: Sequence[record.Row]) -> None:
    axes.set(title="pairs", xlabel="training pairs, same number of steps", xscale="log")
    _lines(axes, _of(rows, "pairs"), "pairs", label=lambda row: row["arm"])
    ticks = sorted({row["pairs"] for row in _of(rows, "pairs")})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()


def _rounds(axes: Axes, rows: Sequence[record.Row]) -> None:
    axes.set(title="rounds", xlabel="rounds, or one with as many pairs and steps")
    _lines(axes, _of(rows, "rounds"), "rounds", label=lambda row: row["arm"])
    axes.set_xticks(sorted({row["rounds"] for row in _of(rows, "rounds")}))
    axes.legend(frameon=False)


def _yields(axes: Axes, rows: Sequence[record.Row]) -> None:
    arm_rows = _of(rows, "yield")
    axes.set(title="yield", xlabel="share of the candidates kept, the best ones", xscale="log")
    _lines(axes, arm_rows, "share", label=lambda row: row["arm"])
    ticks = sorted({row["share"] for row in arm_rows})
    axes.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False)


def _noises(axes: Axes, rows: Sequence[record.Row]) -> None:
    arm_rows = _of(rows, "noise")
    axes.set(title="critic noise", xlabel="share of wrong boxes")
    _lines(
        axes, arm_rows, "noise", label=lambda row: "pairs filtered" if row["share"] is None else "pairs not filtered"
    )
    ticks = sorted({row["noise"] for row in arm_rows})
    axes.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
    axes.legend(frameon=False)


def _beside(axes: Axes, rows: Sequence[record.Row], across: str, *, times: float = 1) -> None:
    """Plot gain against another column: a point per seed and number of pairs, hollow for scales above 1; lines join rounds."""
    for row in [*_of(rows, "pairs"), *_of(rows, "scale")]:
        color, mark = COLORS[row["arm"]], MARKS[row["arm"]]
        face = "none" if row["axis"] == "scale" else color
        axes.scatter(times * row[across], row["gain"], s=24, marker=mark, facecolor=face, edgecolor=color, alpha=0.8)
    round_rows = _of(rows, "rounds")
    for arm in dict.fromkeys(row["arm"] for row in round_rows if row["arm"] != LONG):
        arm_rows = [row for row in round_rows if row["arm"] == arm]
        numbers = sorted({row["rounds"] for row in arm_rows})
        means = [
            tuple(fmean(row[name] for row in arm_rows if row["rounds"] == number) for name in (across, "gain"))
            for number in numbers
        ]
        axes.plot([times * x for x, _ in means], [y for _, y in means], color=COLORS[arm], linewidth=1)
        for number, (x, y) in zip(numbers, means, strict=True):
            if number > 1:
                axes.annotate(str(number), (times * x, y), color=COLORS[arm], fontsize=9, fontweight="bold")
    axes.set_ylabel("gain")


def _drift(axes: Axes, rows: Sequence[record.Row]) -> None:
    axes.set(title="gain and drift (numbers: rounds)", xlabel="drift: change of pictures that need none, in 1/1000")
    _beside(axes, rows, "drift", times=1000)


def _alignment(axes: Axes, rows: Sequence[record.Row]) -> None:
    axes.set(
        title="gain and alignment", xlabel="alignment: share of requested attributes that are right (dotted: before)"
    )
    _beside(axes, rows, "alignment")
    for row in _of(rows, "control"):
        if row["arm"] == "nothing":
            axes.axvline(row["alignment"], color="grey", linewidth=0.8, linestyle=":")


def _controls(axes: Axes, rows: Sequence[record.Row]) -> None:
    axes.set(title="without training, and PairedDifference", ylabel="gain")
    trained = [row for row in _of(rows, "pairs") if row["arm"] == OURS]
    default_pairs = _of(rows, "noise")[0]["pairs"]
    bars = {name: [row for row in _of(rows, "control") if row["arm"] == name] for name in CONTROLS if name != "nothing"}
    bars[OURS] = [row for row in trained if row["pairs"] == default_pairs]
    for position, (name, arm_rows) in enumerate(bars.items()):
        height = fmean(row["gain"] for row in arm_rows)
        axes.bar(position, height, color=COLORS.get(name, "#bbbbbb"), width=0.6)
        passes = fmean(row["drawing_passes"] for row in arm_rows)
        axes.annotate(f"{passes:.3g} passes\na picture", (position, height), ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(bars)), [name.replace(" ", "\n", 1) for name in bars], fontsize=8)
    axes.margins(y=0.15)


def _cost(axes: Axes, rows: Sequence[record.Row]) -> None:
    default_pairs = _of(rows, "noise")[0]["pairs"]
    axes.set(title=f"cost, {default_pairs} pairs", xlabel="denoiser passes (dark: making pairs; light: learning)")
    for position, name in enumerate(reversed([*ARMS])):
        arm_rows = [row for row in _of(rows, "pairs") if (row["arm"], row["pairs"]) == (name, default_pairs)]
        making = fmean(row["passes"] - row["learning_passes"] for row in arm_rows)
        learned = fmean(row["learning_passes"] for row in arm_rows)
        axes.barh(position, making, color=COLORS[name])
        axes.barh(position, learned, left=making, color=COLORS[name], alpha=0.45)
    axes.set_yticks(range(len(ARMS)), [*reversed([*ARMS])], fontsize=8)
