"""The plot of the ablation: the fronts, the rounds, passes to a gain, and the axes of few arms."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle
from math import ceil
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import _record as record
from benchmarks._ablation_arms import ARMS
from benchmarks._ablation_cells import CONTROLS, KINDS

FAMILIES: Mapping[str, str] = {
    "PairedDifference": "#d1495b",
    "Bipolar": "#8d5a97",
    "TwoStage": "#b08968",
    "SupervisedFineTuning": "#edae49",
    "PairedPreference": "#6a4c93",
    "DirectPreference": "#00798c",
    "NegativeAware": "#66a182",
}
"""A colour per objective."""
OTHERS = "#777777"
STYLES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3)))
"""A line style per setting of an objective."""
MARKS = "os^DvPX"
TITLES = {"passes": "equal passes", "steps": "equal steps"}


def plot(content: Mapping[str, Any]) -> Figure:
    """Gain against drift by kind of pairs and budget, gain by round and by passes, and the axes of few arms.

    Points are means over seeds; a thin line is a seed, an error bar spans the lowest and the highest. What has not been measured has
    no panel.
    """
    rows, styles, default = content["rows"], line_styles(content["arms"]), content["default"]
    trained = _of(rows, axis="front", arm=default, kind=KINDS[0], strength=1.0)
    panels: list[tuple[Sequence[record.Row], Callable[..., None]]] = [
        *(
            (_within_budget(rows, kind, budget), partial(_front, styles=styles, title=f"pairs by {kind}, {title}"))
            for budget, title in TITLES.items()
            for kind in KINDS
        ),
        *(
            (
                _of(rows, axis="rounds", kind=kind, strength=1.0),
                partial(_rounds, styles=styles, kind=kind, at_once=_of(rows, axis="one long round", kind=kind)),
            )
            for kind in KINDS
        ),
        *((_of(content["costs"], kind=kind), partial(_costs, styles=styles, kind=kind)) for kind in KINDS),
        (_of(rows, axis="pairs"), partial(_few, styles=styles, along="pairs", label="training pairs, same steps")),
        (_of(rows, axis="yield"), partial(_few, styles=styles, along="share", label="share of the candidates kept")),
        (_of(rows, axis="noise"), partial(_few, styles=styles, along="noise", label="share of wrong boxes")),
        (_of(rows, axis="control"), partial(_controls, default=default, trained=trained)),
    ]
    measured = [(mine, draw) for mine, draw in panels if mine]
    figure = Figure(figsize=(11, 4.2 * ceil(len(measured) / 2)), layout="constrained")
    for place, (mine, draw) in enumerate(measured, start=1):
        axes = figure.add_subplot(ceil(len(measured) / 2), 2, place)
        draw(axes, mine)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.set_axisbelow(True)
    if measured:
        shown = {row["arm"] for mine, _ in measured for row in mine}
        handles = [
            figure.axes[0].plot([], [], label=name, **style)[0] for name, style in styles.items() if name in shown
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def _within_budget(rows: Sequence[record.Row], kind: str, budget: str) -> list[record.Row]:
    """The rows of a front; nothing if all that is within the budget was measured for the other one."""
    mine = [row for row in _of(rows, axis="front", kind=kind) if budget in row["budgets"]]
    return mine if any(row["budgets"] == [budget] for row in mine) else []


def line_styles(arms: Iterable[str]) -> Mapping[str, Mapping[str, Any]]:
    """Colour, line and mark of every arm."""
    settings: dict[str, Iterator[tuple[Any, str]]] = defaultdict(lambda: zip(cycle(STYLES), cycle(MARKS)))
    styles = {}
    for name in arms:
        family = type(ARMS[name].objective).__name__
        line, mark = next(settings[family])
        styles[name] = {
            "color": FAMILIES.get(family, OTHERS),
            "linestyle": line,
            "marker": mark,
            "markersize": 4,
            "linewidth": 1.3,
        }
    return styles


def _means(rows: Sequence[record.Row], along: str, *names: str) -> list[tuple[float, ...]]:
    """For every value of a column: the value, and the means of other columns over seeds."""
    values = sorted({row[along] for row in rows})
    return [(value, *(fmean(row[name] for row in rows if row[along] == value) for name in names)) for value in values]


def _of(rows: Sequence[record.Row], **values: object) -> list[record.Row]:
    return [row for row in rows if values.items() <= row.items()]


def _arms(rows: Sequence[record.Row]) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in rows))


Styles = Mapping[str, Mapping[str, Any]]


def _front(axes: Axes, rows: Sequence[record.Row], *, styles: Styles, title: str) -> None:
    axes.set(
        title=title,
        xlabel="drift: change of pictures that need none, in 1/1000",
        ylabel="gain, LoRA at rising strength (ring: 1)",
        xscale="log",
    )
    for arm in _arms(rows):
        arm_rows = _of(rows, arm=arm)
        for seed in {row["seed"] for row in arm_rows}:
            curve = sorted((row["strength"], 1000 * row["drift"], row["gain"]) for row in _of(arm_rows, seed=seed))
            axes.plot(*zip(*((x, y) for _, x, y in curve), strict=True), color=styles[arm]["color"], alpha=0.15, lw=0.5)
        means = _means(arm_rows, "strength", "drift", "gain")
        axes.plot([1000 * drift for _, drift, _ in means], [gain for *_, gain in means], **styles[arm])
        for strength, drift, gain in means:
            if strength == 1:
                axes.scatter(1000 * drift, gain, s=50, facecolor="none", edgecolor=styles[arm]["color"])
    ticks = [0.1, 0.2, 0.5, 1, 2, 4, 8, 16, 32]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _rounds(
    axes: Axes, rows: Sequence[record.Row], *, styles: Styles, kind: str, at_once: Sequence[record.Row]
) -> None:
    axes.set(
        title=f"rounds, pairs by {kind}, equal passes",
        xlabel="drift, in 1/1000 (numbers: rounds)",
        ylabel="gain at strength 1",
    )
    for arm in _arms(rows):
        means = _means(_of(rows, arm=arm), "rounds", "drift", "gain")
        axes.plot([1000 * drift for _, drift, _ in means], [gain for *_, gain in means], **styles[arm])
        for number, drift, gain in means:
            axes.annotate(f"{number:g}", (1000 * drift, gain), color=styles[arm]["color"], fontsize=9)
    for row in at_once:
        axes.scatter(1000 * row["drift"], row["gain"], s=30, marker="x", color="grey")


def _costs(axes: Axes, rows: Sequence[record.Row], *, styles: Styles, kind: str) -> None:
    axes.set(
        title=f"passes to a gain, pairs by {kind}",
        xlabel="denoiser passes (thin: learning in one round; thick: rounds, pairs included)",
        ylabel="gain at strength 1",
        xscale="log",
    )
    for over, width in (("learning", 0.8), ("rounds", 1.8)):
        mine = _of(rows, over=over)
        for arm in _arms(mine):
            same_length = [
                row for row in _of(mine, arm=arm) if len(row["gains"]) == len(_of(mine, arm=arm)[0]["gains"])
            ]
            passes, gains = (
                [fmean(values) for values in zip(*(row[name] for row in same_length), strict=True)]
                for name in ("passes", "gains")
            )
            axes.plot(passes, gains, **{**styles[arm], "linewidth": width})


def _few(axes: Axes, rows: Sequence[record.Row], *, styles: Styles, along: str, label: str) -> None:
    filtered = along == "noise"
    axes.set(title=rows[0]["axis"], xlabel=label, ylabel="gain at strength 1", xscale="linear" if filtered else "log")
    lines = [(arm, share) for arm in _arms(rows) for share in ((None, 1.0) if filtered else (...,))]
    for arm, share in lines:
        arm_rows = _of(rows, arm=arm) if share is ... else _of(rows, arm=arm, share=share)
        values = sorted({row[along] for row in arm_rows})
        gains = [[row["gain"] for row in arm_rows if row[along] == value] for value in values]
        means = [fmean(of_value) for of_value in gains]
        spread = [
            [mean - min(of_value) for mean, of_value in zip(means, gains, strict=True)],
            [max(of_value) - mean for mean, of_value in zip(means, gains, strict=True)],
        ]
        name = arm if share is ... else "pairs not filtered" if share else "pairs filtered"
        style = {**styles[arm], "linestyle": "--" if share == 1 else "-"}
        axes.errorbar(values, means, yerr=spread, capsize=2, label=name, **style)
    ticks = sorted({row[along] for row in rows})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)


def _controls(axes: Axes, rows: Sequence[record.Row], *, default: str, trained: Sequence[record.Row]) -> None:
    axes.set(title=f"without training, and {default}", ylabel="gain")
    bars = {name: _of(rows, arm=name) for name in CONTROLS if name != "nothing"} | {default: trained}
    bars = {name: mine for name, mine in bars.items() if mine}
    for position, mine in enumerate(bars.values()):
        height = fmean(row["gain"] for row in mine)
        axes.bar(position, height, color="#bbbbbb", width=0.6)
        passes = fmean(row["drawing_passes"] for row in mine)
        axes.annotate(f"{passes:.3g} passes\na picture", (position, height), ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(bars)), [name.replace(" ", "\n", 1) for name in bars], fontsize=8)
    axes.margins(y=0.15)
