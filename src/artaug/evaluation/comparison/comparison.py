"""The result of a comparison as a value: its rows, the scores they are computed from, the table and the verdicts."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from math import isnan, nan
from typing import Any

import numpy as np
from PIL.Image import Image

from artaug._internal.annotations import checked
from artaug._internal.mappings import FrozenDict
from artaug._internal.prompts import prompt_clusters
from artaug._internal.text import table_html
from artaug._internal.values import from_json, value
from artaug.critique import Abstention
from artaug.errors import InvalidValueError
from artaug.evaluation.comparison.position_bias import PositionBias
from artaug.evaluation.comparison.rows import Guardrail, ScoreRow, ScoringFailure, describe_row, finite_pairs
from artaug.pairwise import Judgment, Preference


@value
class _ComparisonDict:
    """What `Comparison.to_dict` returns."""

    rows: tuple[ScoreRow, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    scores: dict[str, dict[str, tuple[float | None, ...]]]
    guardrails: tuple[Guardrail, ...]
    failures: tuple[ScoringFailure, ...]
    verdicts: dict[str, str]
    synthesizers: dict[str, str]
    judgments: dict[str, dict[str, tuple[Preference | Abstention | None, ...]]] = field(default_factory=dict)


_HEADINGS = ("scorer", "candidate", "base", "enhanced", "difference", "95% interval", "wins")
_LEFT_ALIGNED = (0, 1)


@checked
@dataclass(frozen=True, kw_only=True)
class Arm:
    """One synthesizer of a comparison: the base or a candidate, with its scores and its first pictures."""

    synthesizer: str
    """The synthesizer, as its ``repr``."""
    scores: Mapping[str, tuple[float, ...]] = field(repr=False)
    """By scorer, one score a picture: those of the first seed in the order of the prompts, then those of the second.

    Diversity has one score a prompt, however many seeds there are. NaN stands where the scorer raised.
    """
    images: Sequence[Image] = field(repr=False)
    """The pictures of the first prompts, drawn with their first seeds; of a run's store, each is read when it is looked at."""
    judgments: Mapping[str, tuple[Judgment | None, ...]] = field(default_factory=dict, repr=False)
    """By judge, what it said of each picture against the base's, in the order of ``scores``; this arm's picture is the first of
    the two. None stands where the judge raised. Its ``scores`` are 1 for a win, 0.5 for a tie, 0, and NaN without an answer."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", FrozenDict(self.scores))
        object.__setattr__(self, "judgments", FrozenDict(self.judgments))

    def by_prompt(self, scorer: str, prompts: int) -> np.ndarray:
        """One score a prompt, the mean over its seeds: (prompts,), from (seeds x prompts,)."""
        means: np.ndarray = np.reshape(self.scores[scorer], (-1, prompts)).mean(axis=0)
        return means


def paired_scores(base: Arm, candidate: Arm, scorer: str, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The scores of two arms, one a different prompt, without those on which the scorer failed."""
    before, after = (arm.by_prompt(scorer, len(prompts)) for arm in (base, candidate))
    return finite_pairs(before, after, prompt_clusters(prompts))


@checked
@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A base and its candidates on the same prompts and seeds: the rows, and the scores they are computed from."""

    rows: tuple[ScoreRow, ...]
    """One for each scorer and candidate, in the order they were given, scorers first."""
    prompts: tuple[str, ...] = field(repr=False)
    seeds: tuple[int, ...] = field(repr=False)
    """One a picture, the same for every arm: the first of every prompt, then the second of every prompt."""
    base: Arm
    candidates: Mapping[str, Arm]
    """By name."""
    guardrails: tuple[Guardrail, ...] = ()
    """How far scorers may fall."""
    failures: tuple[ScoringFailure, ...] = ()
    """Pictures on which a scorer raised. Empty, except in the comparison that a `ScoringError` holds."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "candidates", FrozenDict(self.candidates))

    @property
    def images_per_prompt(self) -> int:
        """Pictures a prompt."""
        return len(self.seeds) // len(self.prompts)

    @property
    def position_bias(self) -> tuple[PositionBias, ...]:
        """For each judge, how much its answers about all candidates depend on which picture is shown first."""
        judges = dict.fromkeys(judge for arm in self.candidates.values() for judge in arm.judgments)
        return tuple(
            PositionBias.of(
                judge,
                (
                    judgment
                    for arm in self.candidates.values()
                    for judgment in arm.judgments.get(judge, ())
                    if judgment is not None
                ),
            )
            for judge in judges
        )

    def verdict(self, candidate: str) -> str:
        """How one candidate compares to the base, in words, row by row, guardrails included.

        A row is up or down only if its whole interval lies on one side of zero and its p-value, corrected for the
        number of scorers, is below 0.05. It is unchanged only where a guardrail says how large a change would matter.
        A scorer that the pairs were filtered by is marked.

        Raises:
            InvalidValueError: if there is no such candidate.
        """
        if candidate not in self.candidates:
            raise InvalidValueError(f"this comparison has no candidate {candidate!r}. There are: {[*self.candidates]}.")
        guardrails = {guardrail.scorer: guardrail for guardrail in self.guardrails}
        return "; ".join(
            describe_row(row, guardrails.get(row.scorer)) for row in self.rows if row.candidate == candidate
        )

    def paired_scores(self, scorer: str, candidate: str) -> tuple[np.ndarray, np.ndarray]:
        """The scores of base and candidate that a row is computed from: one a different prompt, (different prompts,) each.

        Raises:
            InvalidValueError: if there is no such row, naming those there are.
        """
        self.row(scorer, candidate)
        return paired_scores(self.base, self.candidates[candidate], scorer, self.prompts)

    def row(self, scorer: str, candidate: str) -> ScoreRow:
        """The row of one scorer and candidate.

        Raises:
            InvalidValueError: if there is none, naming those there are.
        """
        for row in self.rows:
            if (row.scorer, row.candidate) == (scorer, candidate):
                return row
        names = ", ".join(f"({row.scorer!r}, {row.candidate!r})" for row in self.rows)
        raise InvalidValueError(f"this comparison has no row ({scorer!r}, {candidate!r}). There are: {names}.")

    def table(self) -> str:
        """The rows as aligned text; an asterisk marks scorers that the training pairs were filtered by."""
        lines = [_HEADINGS, *self._cells()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, tuple("-" * width for width in widths))
        aligned = [
            "  ".join(
                cell.ljust(width) if column in _LEFT_ALIGNED else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([*aligned, "", *self.notes()])

    def notes(self) -> list[str]:
        """How to read the rows, one sentence an item, and where scorers failed."""
        notes = self.design_notes()
        for scorer in dict.fromkeys(failure.scorer for failure in self.failures):
            failures = [failure for failure in self.failures if failure.scorer == scorer]
            first = f"first on {failures[0].arm}'s of {failures[0].prompt!r} ({failures[0].error:.120})"
            notes.append(f"{scorer} raised on {len(failures)} pictures, {first}: its rows leave their prompts out.")
        return [*notes, *map(str, self.position_bias)]

    def design_notes(self) -> list[str]:
        """How to read the rows, one sentence an item, in words of artaug alone."""
        seeds = "seed" if self.images_per_prompt == 1 else f"{self.images_per_prompt} seeds"
        different = int(prompt_clusters(self.prompts).max()) + 1
        repeated = f" ({different} different ones, each counts once)" if different < len(self.prompts) else ""
        design = f"{len(self.prompts)} prompts{repeated}, each drawn with the same {seeds} by every candidate"
        notes = [f"{design}; interval: bootstrap over prompts; wins: ties count half."]
        if any(row.judged for row in self.rows):
            notes.append(
                "Of judges, enhanced is the win rate against the base's pictures: a win has to hold in both orders, and ties "
                "count half."
            )
        if any(row.filtered_by for row in self.rows):
            notes.append("* The training pairs were filtered by this scorer, so it says less than the others.")
        return notes

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, in plain types for JSON; None stands for a score that is missing."""
        arms = {"base": self.base, **self.candidates}
        return {
            "rows": [asdict(row) for row in self.rows],
            "prompts": list(self.prompts),
            "seeds": list(self.seeds),
            "scores": {
                name: {
                    scorer: [None if isnan(score) else score for score in scores]
                    for scorer, scores in arm.scores.items()
                }
                for name, arm in arms.items()
            },
            "guardrails": [asdict(guardrail) for guardrail in self.guardrails],
            "failures": [asdict(failure) for failure in self.failures],
            "verdicts": {name: self.verdict(name) for name in self.candidates},
            "synthesizers": {name: arm.synthesizer for name, arm in arms.items()},
            "judgments": {
                name: {
                    judge: [None if judgment is None else asdict(judgment) for judgment in judgments]
                    for judge, judgments in arm.judgments.items()
                }
                for name, arm in self.candidates.items()
            },
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Comparison":
        """The comparison that `to_dict` wrote, without its pictures.

        Raises:
            InvalidValueError: for something else.
        """
        try:
            record = from_json(_ComparisonDict, json.dumps(content))
        except (TypeError, ValueError) as error:
            raise InvalidValueError(f"this is not what Comparison.to_dict returns: {error}") from None
        arms = {
            name: Arm(
                synthesizer=synthesizer,
                scores={
                    scorer: tuple(nan if score is None else score for score in scores)
                    for scorer, scores in record.scores.get(name, {}).items()
                },
                images=(),
                judgments=record.judgments.get(name, {}),
            )
            for name, synthesizer in record.synthesizers.items()
        }
        try:
            base = arms.pop("base")
        except KeyError:
            raise InvalidValueError(
                f"this is not what Comparison.to_dict returns: there is no base among {[*arms]}."
            ) from None
        return cls(
            rows=record.rows,
            prompts=record.prompts,
            seeds=record.seeds,
            base=base,
            candidates=arms,
            guardrails=record.guardrails,
            failures=record.failures,
        )

    def _cells(self) -> Iterator[tuple[str, ...]]:
        """The table's cells, row by row: a scorer is named in its first row, and all its rows have the same decimals."""
        decimals: dict[str, int] = {}
        for row in self.rows:
            decimals[row.scorer] = max(row.decimals, decimals.get(row.scorer, 0))
        previous = ""
        for row in self.rows:
            places = decimals[row.scorer]
            yield (
                "" if row.scorer == previous else row.scorer + " *" * row.filtered_by,
                row.candidate,
                f"{row.base:.{places}f}",
                f"{row.enhanced:.{places}f}",
                f"{row.delta:+.{places}f}",
                f"{row.ci_low:+.{places}f} to {row.ci_high:+.{places}f}",
                f"{row.win_rate:.1%}" + f" ({row.tie_rate:.1%} ties)" * (row.tie_rate > 0),
            )
            previous = row.scorer

    def _repr_html_(self) -> str:
        """The table and the verdicts, for notebooks."""
        verdicts = "".join(f"<li><b>{escape(name)}</b>: {escape(self.verdict(name))}</li>" for name in self.candidates)
        notes = "<br>".join(escape(note) for note in self.notes())
        return f"{table_html(_HEADINGS, self._cells())}<ul>{verdicts}</ul><small>{notes}</small>"
