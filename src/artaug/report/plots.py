"""Figures for papers, drawn by matplotlib: intervals, losses, times and pictures, in a colour-blind safe palette.

Each returns a `matplotlib.figure.Figure`, which a notebook shows, and touches no global state; ``figure.savefig("figure.pdf")``
writes it.
The figure of a run's funnel is `artaug.Funnel.figure`.
"""

from collections.abc import Sequence
from itertools import groupby
from textwrap import wrap
from typing import TYPE_CHECKING

import numpy as np

from artaug._internal.extras import optional
from artaug._internal.images import as_rgb
from artaug.errors import InvalidValueError
from artaug.evaluation.comparison import Comparison
from artaug.pairs import ImagePair
from artaug.report.runs import running_mean
from artaug.run.results import Enhancement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999")
"""Okabe and Ito's palette (2008), colour-blind safe, without its black and its yellow."""

_INK, _SOFT, _FAINT = "#222", "#666", "#ddd"
_COLUMN_IN = 3.4


def intervals(comparison: Comparison) -> "Figure":
    """A forest plot with a panel for each scorer: mean difference and 95% interval of each candidate.

    Filled marks are significant (the whole interval on one side of zero, p below 0.05 after Holm's correction), hollow
    ones are not. An asterisk marks scorers that the training pairs were filtered by; a dotted line is a guardrail.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    groups = [(name, list(rows)) for name, rows in groupby(comparison.rows, key=lambda row: row.scorer)]
    candidates = list(comparison.candidates)
    columns = min(len(groups), 3)
    rows_of_panels = -(-len(groups) // columns)
    figure = _figure(2.7 * columns + 0.6, rows_of_panels * (0.62 + 0.3 * len(candidates)))
    grid = figure.subplots(rows_of_panels, columns, sharey=True, squeeze=False).ravel()
    guardrails = {guardrail.scorer: guardrail for guardrail in comparison.guardrails}
    for (name, rows), axes in zip(groups, grid, strict=False):
        for index, row in enumerate(rows):
            color = PALETTE[index % len(PALETTE)]
            axes.plot([row.ci_low, row.ci_high], [index, index], color=color, linewidth=2, solid_capstyle="round")
            axes.plot(
                row.delta, index, "o", color=color, markersize=6, markerfacecolor=color if row.significant else "white"
            )
        if name in guardrails:
            axes.axvline(-guardrails[name].margin(rows[0]), color=_SOFT, linewidth=1, linestyle=":")
        axes.axvline(0, color=_SOFT, linewidth=0.8, zorder=0)
        axes.set_title(name + " *" * rows[0].filtered_by, fontsize=9, loc="left", color=_INK)
        axes.set_ylim(len(candidates) - 0.5, -0.5)
        axes.set_yticks(range(len(candidates)), candidates)
        axes.margins(x=0.12)
        axes.locator_params(axis="x", nbins=4)
        _style_axes(axes)
    for axes in grid[len(groups) :]:
        axes.set_visible(False)
    figure.supxlabel("difference to the base, with its 95% interval", fontsize=8, color=_SOFT)
    return figure


def losses(result: Enhancement) -> "Figure":
    """The loss of every training step, faint, and its running mean, with a curve for each round.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    figure = _figure(_COLUMN_IN * 1.4, _COLUMN_IN * 0.8)
    axes = figure.add_subplot()
    for index, round_ in enumerate(result.rounds):
        values = np.asarray(round_.training.losses)
        if not len(values):
            continue
        steps, color = np.arange(1, len(values) + 1), PALETTE[index % len(PALETTE)]
        label = f"round {round_.number}" + " (rejected)" * (not round_.accepted)
        axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.3)
        axes.plot(steps, running_mean(values), color=color, linewidth=1.8, label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("training step", fontsize=9)
    axes.set_ylabel("loss", fontsize=9)
    if axes.lines:
        axes.legend(frameon=False, fontsize=8)
    _style_axes(axes)
    return figure


def times(result: Enhancement) -> "Figure":
    """Time of each stage in minutes: a stacked bar for each round, the stages in their order.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    figure = _figure(_COLUMN_IN * 1.8, 0.9 + 0.42 * max(len(result.rounds), 1))
    axes = figure.add_subplot()
    names = [f"round {round_.number}" for round_ in result.rounds]
    ends = np.zeros(len(names))
    stages = dict.fromkeys(stage for round_ in result.rounds for stage in round_.seconds)
    for index, stage in enumerate(stages):
        minutes = np.array([round_.seconds.get(stage, 0.0) / 60 for round_ in result.rounds])
        axes.barh(names, minutes, left=ends, height=0.62, color=PALETTE[index % len(PALETTE)], label=stage)
        ends += minutes
    axes.invert_yaxis()
    axes.set_xlabel("minutes", fontsize=9)
    if names:
        axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
    _style_axes(axes)
    return figure


def gallery(comparison: Comparison, *, prompts: int = 6) -> "Figure":
    """The first prompts of a comparison as rows of pictures: the base and every candidate, drawn with one seed.

    Args:
        comparison: it has to hold pictures, see ``keep_images`` of `artaug.compare`.
        prompts: largest number of columns, at least 1.

    Raises:
        InvalidValueError: if there are no pictures to show.
        MissingExtraError: if matplotlib is not installed.
    """
    arms = {"base": comparison.base, **comparison.candidates}
    count = min(prompts, len(comparison.base.images))
    if count < 1:
        raise InvalidValueError(
            f"gallery(prompts={prompts}) of a comparison that holds {len(comparison.base.images)} pictures an arm: "
            "need at least one of both. compare(keep_images=...) says how many are held."
        )
    return _image_grid([arm.images[:count] for arm in arms.values()], list(arms), comparison.prompts[:count])


def pairs(image_pairs: Sequence[ImagePair]) -> "Figure":
    """Pairs as two rows of pictures, before above after, each column with its prompt.

    Raises:
        InvalidValueError: without pairs.
        MissingExtraError: if matplotlib is not installed.
    """
    if not image_pairs:
        raise InvalidValueError("plots.pairs received no pair: need at least one to show.")
    rows = [[pair.before for pair in image_pairs], [pair.after for pair in image_pairs]]
    return _image_grid(rows, ["before", "after"], [pair.prompt for pair in image_pairs])


def _image_grid(rows: Sequence[Sequence["Image"]], names: Sequence[str], prompts: Sequence[str]) -> "Figure":
    width, height = rows[0][0].size
    side = 1.15
    figure = _figure(side * len(prompts) + 0.3, side * len(rows) * height / width + 0.5)
    figure.set_layout_engine("constrained", w_pad=0.015, h_pad=0.015, wspace=0.02, hspace=0.02)
    grid = figure.subplots(len(rows), len(prompts), squeeze=False)
    for axes_row, images, name in zip(grid, rows, names, strict=True):
        axes_row[0].set_ylabel(name, fontsize=8, color=_INK)
        for axes, image in zip(axes_row, images, strict=True):
            axes.imshow(np.asarray(as_rgb(image)), interpolation="lanczos")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    for axes, prompt in zip(grid[-1], prompts, strict=True):
        axes.set_xlabel(_wrap_prompt(prompt), fontsize=6, color=_SOFT)
    return figure


def _wrap_prompt(prompt: str, width: int = 22, max_lines: int = 3) -> str:
    lines = wrap(prompt.replace("$", r"\$"), width) or [""]
    return "\n".join(lines if len(lines) <= max_lines else [*lines[: max_lines - 1], f"{lines[max_lines - 1]} ..."])


def _figure(width: float, height: float) -> "Figure":
    with optional("matplotlib", required_by="artaug.report.plots", extra="report"):
        from artaug._internal.figures import NotebookFigure  # noqa: PLC0415 - an extra
    return NotebookFigure(figsize=(width, height), dpi=200, layout="constrained")


def _style_axes(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.tick_params(colors=_SOFT, labelsize=8, length=0)
