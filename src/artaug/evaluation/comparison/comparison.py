"""A base and its candidates side by side, as a value: the rows, the scores behind them, and how they read."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from html import escape
from math import isnan
from typing import Any

import numpy as np
from PIL.Image import Image

from artaug._internal.text import table_html
from artaug.errors import InvalidValueError
from artaug.evaluation.comparison.rows import Guardrail, ScoreRow, ScoringFailure, describe_row

_HEADINGS = ("scorer", "candidate", "base", "enhanced", "difference", "95% interval", "wins")
_LEFT = (0, 1)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What one synthesizer drew in a comparison."""

    synthesizer: str
    """The synthesizer, as its ``repr``."""
    scores: Mapping[str, tuple[float, ...]]
    """By scorer, one number a picture: those of the first seed in the order of the prompts, then those of the second.

    Diversity has one number a prompt, whatever the seeds. NaN stands where the scorer raised.
    """
    images: tuple[Image, ...]
    """The pictures of the first prompts, drawn with their first seeds."""

    def by_prompt(self, scorer: str, prompts: int) -> np.ndarray:
        """One number a prompt, the mean of its pictures: (prompts,)."""
        means: np.ndarray = np.reshape(self.scores[scorer], (-1, prompts)).mean(axis=0)
        return means


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A base and its candidates on the same prompts and seeds: the table, and all that it rests on."""

    rows: tuple[ScoreRow, ...]
    """One a scorer and candidate, in the order they were given, scorers first."""
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    """One a picture, the same for every arm: the first of every prompt, then the second of every prompt."""
    base: Arm
    candidates: Mapping[str, Arm]
    """By name."""
    guardrails: tuple[Guardrail, ...] = ()
    """How far scorers may fall."""
    failures: tuple[ScoringFailure, ...] = ()
    """Pictures that a scorer raised on; `compare` returns none, but raises a `ScoringError` that holds the comparison."""

    @property
    def images_per_prompt(self) -> int:
        """Pictures a prompt."""
        return len(self.seeds) // len(self.prompts)

    def verdict(self, candidate: str) -> str:
        """What became of one candidate, in words, guardrails included.

        A row counts as up or down only if its whole interval lies on one side of zero and its p-value, corrected for
        the number of scorers, is below 0.05. "Unchanged" is said only where a guardrail says how much would matter.
        A scorer that the pairs were filtered by is named as such.

        Raises:
            InvalidValueError: if there is no such candidate.
        """
        if candidate not in self.candidates:
            raise InvalidValueError(f"this comparison has no candidate {candidate!r}. There are: {[*self.candidates]}.")
        guards = {guardrail.scorer: guardrail for guardrail in self.guardrails}
        rows = [row for row in self.rows if row.candidate == candidate]
        return "; ".join(describe_row(row, guards.get(row.scorer)) for row in rows)

    def row(self, scorer: str, candidate: str) -> ScoreRow:
        """The row of one scorer and candidate.

        Raises:
            InvalidValueError: if there is none, naming those there are.
        """
        for row in self.rows:
            if (row.scorer, row.candidate) == (scorer, candidate):
                return row
        known = ", ".join(f"({row.scorer!r}, {row.candidate!r})" for row in self.rows)
        raise InvalidValueError(f"this comparison has no row ({scorer!r}, {candidate!r}). There are: {known}.")

    def table(self) -> str:
        """The rows as aligned text; a dagger marks scorers that the training pairs were filtered by."""
        lines = [_HEADINGS, *self._cells()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rule = tuple("─" * width for width in widths)
        sides = [str.ljust if column in _LEFT else str.rjust for column in range(len(widths))]
        text = [
            "  ".join(side(cell, width) for side, cell, width in zip(sides, line, widths, strict=True)).rstrip()
            for line in (lines[0], rule, *lines[1:])
        ]
        return "\n".join([*text, "", *self.notes()])

    def notes(self) -> list[str]:
        """What a reader of the rows has to know, one sentence an item."""
        seeds = "seed" if self.images_per_prompt == 1 else f"{self.images_per_prompt} seeds"
        drawn = f"{len(self.prompts)} prompts, each drawn with the same {seeds} by every candidate"
        notes = [f"{drawn}; interval: bootstrap over prompts; wins: ties count half."]
        if any(row.filtered_by for row in self.rows):
            notes.append("† The training pairs were filtered by this scorer, so it says less than the others.")
        for scorer in dict.fromkeys(fault.scorer for fault in self.failures):
            failures = [fault for fault in self.failures if fault.scorer == scorer]
            first = f"first on {failures[0].arm}'s of {failures[0].prompt!r} ({failures[0].error:.120})"
            notes.append(f"{scorer} raised on {len(failures)} pictures, {first}: its rows leave their prompts out.")
        return notes

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, in plain types that JSON takes."""
        arms = {"base": self.base, **self.candidates}
        return {
            "rows": [asdict(row) for row in self.rows],
            "prompts": list(self.prompts),
            "seeds": list(self.seeds),
            "scores": {
                name: {of: [None if isnan(one) else one for one in each] for of, each in arm.scores.items()}
                for name, arm in arms.items()
            },
            "guardrails": [asdict(guardrail) for guardrail in self.guardrails],
            "failures": [asdict(fault) for fault in self.failures],
            "verdicts": {name: self.verdict(name) for name in self.candidates},
            "synthesizer": {name: arm.synthesizer for name, arm in arms.items()},
        }

    def _cells(self) -> Iterator[tuple[str, ...]]:
        """What the table says, row by row; a scorer's name only where it changes, its decimals all alike."""
        decimals = {one.scorer: max(row.decimals for row in self.rows if row.scorer == one.scorer) for one in self.rows}
        seen = ""
        for row in self.rows:
            to, name = decimals[row.scorer], row.scorer + " †" * row.filtered_by
            yield (
                "" if row.scorer == seen else name,
                row.candidate,
                f"{row.base:.{to}f}",
                f"{row.enhanced:.{to}f}",
                f"{row.delta:+.{to}f}",
                f"{row.ci_low:+.{to}f} … {row.ci_high:+.{to}f}",
                f"{row.win_rate:.1%}" + f" ({row.tie_rate:.1%} ties)" * (row.tie_rate > 0),
            )
            seen = row.scorer

    def _repr_html_(self) -> str:
        """The table and the verdicts, for notebooks."""
        verdicts = "".join(f"<li><b>{escape(name)}</b>: {escape(self.verdict(name))}</li>" for name in self.candidates)
        notes = "<br>".join(escape(note) for note in self.notes())
        return f"{table_html(_HEADINGS, self._cells())}<ul>{verdicts}</ul><small>{notes}</small>"
