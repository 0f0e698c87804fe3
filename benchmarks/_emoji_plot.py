"""The plots of the emoji: how far and how well each arm goes, and what it draws."""

from collections.abc import Sequence
from statistics import fmean

from matplotlib.figure import Figure
from torch import Tensor

from benchmarks import _record as record
from benchmarks._emoji_arms import ARMS, Bench, Cell

COLORS = dict(
    zip(
        ARMS,
        ["#d1495b", "#e07a5f", "#8d5a97", "#118ab2", "#7fc8f8", "#66a182", "#edae49", "#00798c", "#2e4057"],
        strict=True,
    )
)
MARKS = dict(zip(ARMS, "oX^phsDvP", strict=True))
_SHOWN = 12


def plot(rows: Sequence[record.Row]) -> Figure:
    """Progress by pairs, and what it costs: distance beside the way, and subjects that are no longer recognized.

    Points are means over seeds, lines go through the strengths, bars span the lowest and the highest seed.
    """
    trained = [row for row in rows if "pairs" in row and not row["tuning"]]
    sizes = sorted({row["pairs"] for row in trained})
    figure = Figure(figsize=(4 * len(sizes), 8), layout="constrained")
    panels = figure.subplots(2, len(sizes), sharex=True, sharey="row", squeeze=False)
    (base,) = (row for row in rows if row["arm"] == "base")
    for column, pairs in enumerate(sizes):
        for axes, (key, label) in zip(
            panels[:, column],
            (("distance", "distance to the true 3D picture, base = 1"), ("subject", "share recognized")),
            strict=True,
        ):
            axes.axhline(base[key], color="grey", linewidth=0.6)
            for name in ARMS:
                mine = [row for row in trained if (row["arm"], row["pairs"]) == (name, pairs)]
                scales = sorted({row["scale"] for row in mine})
                points = [[row for row in mine if row["scale"] == scale] for scale in scales]
                heights = [[row[key] for row in point] for point in points]
                axes.errorbar(
                    [fmean(row["progress"] for row in point) for point in points],
                    [fmean(values) for values in heights],
                    yerr=[
                        [fmean(values) - min(values) for values in heights],
                        [max(values) - fmean(values) for values in heights],
                    ],
                    color=COLORS[name],
                    marker=MARKS[name],
                    markersize=5,
                    capsize=2,
                    linewidth=1,
                    label=name,
                )
            axes.set_xlabel("progress from flat to 3D")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25, linewidth=0.5)
            if column == 0:
                axes.set_ylabel(label)
        panels[0, column].set_title(f"{pairs} pairs")
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    return figure


def contact_sheet(bench: Bench, cells: Sequence[Cell]) -> Figure:
    """The first tested names: true pictures flat and 3D, the base's, and those of cells at the first strength."""
    truth = bench.drawn(tuning=False)
    lines: list[tuple[str, Tensor]] = [
        ("true, flat", truth.flat),
        ("true, 3D", truth.solid),
        ("base", bench.base_pictures(tuning=False)),
        *((cell.arm, next(bench.pictures(cell))[1]) for cell in cells),
    ]
    columns = min(_SHOWN, len(truth.names))
    figure = Figure(figsize=(columns + 1.5, len(lines)), layout="constrained")
    panels = figure.subplots(len(lines), columns, squeeze=False)
    for line, (label, pictures) in zip(panels, lines, strict=True):
        for axes, picture in zip(line, pictures, strict=False):
            axes.imshow(picture.clamp(0, 1).permute(1, 2, 0).numpy())
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    for axes, name in zip(panels[0], truth.names, strict=False):
        axes.set_title("\n".join(name.split()), fontsize=6)
    return figure
