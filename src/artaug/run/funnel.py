"""How far the prompts of a run got, stage by stage, and why the others did not."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, final

from artaug._internal.annotations import checked
from artaug._internal.extras import optional
from artaug._internal.text import short_repr, shorten
from artaug.errors import InvalidValueError
from artaug.pairs import SKIPPING_STAGES, Attempt, Dropped, Skipped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
_BAR, _REST, _TEXT = "#0072b2", "#d9dee5", "#555"
_MAX_REASONS = 3
_LONGEST_REASON = 160
_WIDTH = 40


class _Reasons:
    """Counts reasons; those that differ only in numbers are counted as one.

    >>> from artaug.run.funnel import _Reasons
    >>> reasons = _Reasons()
    >>> for reason in ["Chroma fell by 0.2", "too dark", "Chroma fell by 0.3"]:
    ...     reasons.add(reason)
    >>> reasons.groups()
    (('Chroma fell by ...', 2), ('too dark', 1))
    """

    def __init__(self) -> None:
        self._groups: dict[str, tuple[str, int]] = {}  # by the reason without numbers: as it is shown, and its count

    def add(self, reason: str) -> None:
        """Count one."""
        pattern = _NUMBER.sub("...", reason)
        shown, count = self._groups.get(pattern, (reason, 0))
        self._groups[pattern] = (shown if shown == reason else pattern, count + 1)

    def groups(self) -> tuple[tuple[str, int], ...]:
        """Reasons and their counts, most frequent first."""
        return tuple(sorted(self._groups.values(), key=lambda group: -group[1]))


@checked
@final
@dataclass(frozen=True)
class FunnelStep:
    """How many prompts reached a step, and why the others of the step before did not."""

    name: str
    """``prompts``, ``drawn``, ``critiqued``, ``redrawn`` or ``kept``."""
    count: int
    lost: tuple[tuple[str, int], ...] = ()
    """Reasons and their counts, most frequent first; reasons that differ only in numbers are counted as one."""

    __repr__ = short_repr


@checked
@final
@dataclass(frozen=True)
class Funnel:
    """How far the prompts of a run got: drawn, critiqued, redrawn, kept. A notebook shows it as bars.

    ``redrawn`` prompts became a pair; the filter keeps some of them.

    >>> import artaug as aa
    >>> funnel = aa.Funnel.of([aa.Skipped("a moor", 1, "too dark"), aa.Skipped("a pond", 2, "nothing to do", "plan")])
    >>> [(step.name, step.count) for step in funnel.steps]
    [('prompts', 2), ('drawn', 2), ('critiqued', 1), ('redrawn', 0), ('kept', 0)]
    """

    steps: tuple[FunnelStep, ...]
    """In order; no count is above the one before, and every prompt that was lost has a reason."""

    def __post_init__(self) -> None:
        for before, step in pairwise(self.steps):
            if before.count - step.count != sum(count for _, count in step.lost):
                raise InvalidValueError(
                    f"a Funnel has {before.count} {before.name} and {step.count} {step.name}, with reasons for "
                    f"{sum(count for _, count in step.lost)} lost: need one for each of the {before.count - step.count}."
                )

    @classmethod
    def of(cls, attempts: Iterable[Attempt]) -> "Funnel":
        """Count the attempts of a run, of a round, or of several; they are gone through once, and none is held."""
        total = 0
        lost = {stage: _Reasons() for stage in (*SKIPPING_STAGES, "judge")}
        for attempt in attempts:
            total += 1
            if isinstance(attempt, Skipped):
                lost[attempt.stage].add(attempt.reason)
            elif isinstance(attempt, Dropped):
                lost["judge"].add(attempt.verdict.reason)
        steps, left = [FunnelStep("prompts", total)], total
        for name, reasons in zip(("drawn", "critiqued", "redrawn", "kept"), lost.values(), strict=True):
            groups = reasons.groups()
            left -= sum(count for _, count in groups)
            steps.append(FunnelStep(name, left, groups))
        return cls(tuple(steps))

    @property
    def kept_fraction(self) -> float:
        """Fraction of the prompts that ended as kept pairs, in [0, 1]; 0 if there were none."""
        return self._fraction(self.steps[-1])

    def figure(self) -> "Figure":
        """Draw it as a matplotlib figure, for a paper: ``funnel.figure().savefig("funnel.pdf")``.

        Raises:
            MissingExtraError: if matplotlib is not installed.
        """
        with optional("matplotlib", required_by="Funnel.figure", extra="report"):
            from artaug._internal.figures import NotebookFigure  # noqa: PLC0415 - an extra
        figure = NotebookFigure(figsize=(6.4, 0.55 * len(self.steps) + 0.4), layout="constrained")
        axes = figure.add_subplot()
        names, counts = [step.name for step in self.steps], [step.count for step in self.steps]
        axes.barh(names, [self.steps[0].count] * len(names), color=_REST, height=0.66)
        axes.barh(names, counts, color=_BAR, height=0.66)
        for row, step in enumerate(self.steps):
            axes.text(1.02, row, self._label(step), va="center", fontsize=9, transform=axes.get_yaxis_transform())
        axes.invert_yaxis()
        axes.set_xlim(0, max(self.steps[0].count, 1))
        axes.set_xlabel("prompts", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_REST)
        axes.tick_params(labelsize=9, length=0)
        return figure

    def __repr__(self) -> str:
        """The counts on one line."""
        return f"Funnel({', '.join(f'{step.count:,} {step.name}' for step in self.steps)})"

    def __str__(self) -> str:
        lines = []
        for step in self.steps:
            lines.append(
                f"{step.name:>10}  {'#' * round(_WIDTH * self._fraction(step)):<{_WIDTH}}  {self._label(step)}"
            )
            lines += [f"{'':>10}  - {count:,} {reason}" for reason, count in _most_frequent(step.lost)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Bars and reasons for notebooks; no script, no other file."""
        return f'<table style="border-collapse:collapse">{"".join(map(self._html_row, self.steps))}</table>'

    def _html_row(self, step: FunnelStep) -> str:
        bar = f'<div style="width:{100 * self._fraction(step):.2f}%;height:1em;background:{_BAR}"></div>'
        lost = "".join(f"<br>&minus;{count:,} {escape(reason)}" for reason, count in _most_frequent(step.lost))
        return (
            f'<tr><th style="text-align:right">{step.name}</th>'
            f'<td style="width:16em"><div style="background:{_REST}">{bar}</div></td>'
            f'<td style="text-align:left">{self._label(step)}<small style="color:{_TEXT}">{lost}</small></td></tr>'
        )

    def _fraction(self, step: FunnelStep) -> float:
        return step.count / self.steps[0].count if self.steps[0].count else 0.0

    def _label(self, step: FunnelStep) -> str:
        return f"{step.count:,} ({self._fraction(step):.1%})"


def _most_frequent(lost: Sequence[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """The most frequent reasons, and the sum of the others."""
    yield from ((shorten(reason, _LONGEST_REASON), count) for reason, count in lost[:_MAX_REASONS])
    if rest := lost[_MAX_REASONS:]:
        yield f"for {len(rest)} other reasons", sum(count for _, count in rest)
