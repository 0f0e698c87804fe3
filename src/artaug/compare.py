"""Did it get better, and how sure is that: synthesizers drawn side by side with the same seeds, in paired statistics."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from math import floor, log10
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np
from PIL.Image import Image
from pydantic import Field
from tqdm.auto import tqdm

from artaug.errors import InvalidValueError, PromptError, SeamError
from artaug.plan import Plan
from artaug.scoring import Scorer, scored
from artaug.statistics import paired_bootstrap, win_rate
from artaug.synthesis import Synthesizer, picture_seeds
from artaug.values import value

_HEADINGS = ("scorer", "candidate", "base", "enhanced", "difference", "95% interval", "wins")
_LEFT = (0, 1)


@value
class ScoreRow:
    """One scorer's answer to one question: is this candidate better than the base?"""

    scorer: str
    candidate: str
    base: float
    """Mean score of the base's pictures."""
    enhanced: float
    """Mean score of the candidate's pictures of the same prompts and seeds."""
    delta: float
    """Mean paired difference, candidate less base."""
    ci_low: float
    """Lower end of the 95% bootstrap interval of ``delta``."""
    ci_high: float
    """Upper end of it."""
    win_rate: Annotated[float, Field(ge=0, le=1)]
    """Share of prompts on which the candidate scores higher; ties count half."""
    n: Annotated[int, Field(gt=0)]
    """Number of prompts."""
    filtered_by: bool = False
    """Whether the training pairs were filtered by this scorer or a part of it, which then says less than the others."""

    @property
    def decimals(self) -> int:
        """Decimals worth printing: enough to show the interval's half width, from 3 to 8."""
        half = (self.ci_high - self.ci_low) / 2
        return min(max(-floor(log10(half)), 3), 8) if half > 0 else 3

    @property
    def direction(self) -> int:
        """1 if the whole interval lies above zero, -1 if it lies below, else 0: not settled."""
        return int(self.ci_low > 0) - int(self.ci_high < 0)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What one synthesizer drew in a comparison."""

    drawn_by: str
    """The synthesizer, as its ``repr``."""
    scores: Mapping[str, tuple[float, ...]]
    """By scorer, one number a prompt, in the order of the prompts."""
    pictures: tuple[Image, ...]
    """The pictures of the first prompts."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A base and its candidates on the same prompts and seeds: the table, and all that it rests on."""

    rows: tuple[ScoreRow, ...]
    """One a scorer and candidate, in the order they were given, scorers first."""
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    """One a prompt, the same for every arm."""
    base: Arm
    candidates: Mapping[str, Arm]
    """By name."""

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
        drawn = f"{len(self.prompts)} prompts, each drawn with the same seed by every candidate"
        notes = [f"{drawn}; interval: bootstrap over prompts; wins: ties count half."]
        if any(row.filtered_by for row in self.rows):
            notes.append("† The training pairs were filtered by this scorer, so it says less than the others.")
        return notes

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, in plain types that JSON takes."""
        arms = {"base": self.base, **self.candidates}
        return {
            "rows": [asdict(row) for row in self.rows],
            "prompts": list(self.prompts),
            "seeds": list(self.seeds),
            "scores": {name: {of: list(each) for of, each in arm.scores.items()} for name, arm in arms.items()},
            "drawn_by": {name: arm.drawn_by for name, arm in arms.items()},
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
                f"{row.win_rate:.1%}",
            )
            seen = row.scorer

    def _repr_html_(self) -> str:
        """The table for notebooks."""

        def line(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = "".join(line(cells, "td") for cells in self._cells())
        notes = "<br>".join(escape(note) for note in self.notes())
        return f"<table><thead>{line(_HEADINGS, 'th')}</thead><tbody>{body}</tbody></table><small>{notes}</small>"


def compare(  # noqa: PLR0913 - one verb, and all of these have a default
    base: Synthesizer,
    candidates: Mapping[str, Synthesizer],
    prompts: Sequence[str],
    *,
    scorers: Sequence[Scorer],
    seed: int = 0,
    batch_size: int = 8,
    filtered_by: Collection[str] = (),
    pictures: int = 12,
    progress: bool = True,
) -> Comparison:
    """Draw the same prompts with the same seeds by a base and by candidates, and compare their scores in pairs.

    The base is drawn once. Only the first pictures are held in memory, the others are scored and let go.

    Args:
        base: what the candidates are measured against.
        candidates: by the name tables call them.
        prompts: what to draw, at least 2; best held out from training.
        scorers: judge the pictures; their names must differ.
        seed: of the seeds and of the bootstrap; the same arguments give the same comparison.
        batch_size: pictures drawn and scored at a time.
        filtered_by: names of the scorers that the training pairs were filtered by (`PairFilter.scorers` of the filter);
            rows of scorers that rest on one of them are marked.
        pictures: how many pictures of each arm to keep for looking at.
        progress: show a progress bar an arm.

    Raises:
        PromptError: for fewer than two prompts, or one string in place of a list.
        InvalidValueError: without scorers or candidates, or for scorers of one name.
        SeamError: if a synthesizer or scorer returns something its seam does not allow.
        NonFiniteError: if a score is NaN or infinite, naming the prompt.

    >>> import artaug as aa
    >>> from PIL import Image
    >>> class Grey(aa.Synthesizer):
    ...     def __init__(self, light):
    ...         self.light = light
    ...     def synthesize(self, plan, *, seed):
    ...         return Image.new("L", (8, 8), self.light + seed % 16)
    >>> class Light(aa.Scorer):
    ...     def score(self, image, prompt):
    ...         return image.getpixel((0, 0)) / 255
    >>> comparison = aa.compare(Grey(51), {"lit": Grey(102)}, ["a harbour", "a hill"], scorers=[Light()], progress=False)
    >>> row = comparison.row("Light", "lit")
    >>> round(row.delta, 3), row.win_rate, row.n
    (0.2, 1.0, 2)
    """
    _check(candidates, prompts, scorers, filtered_by)
    if batch_size < 1 or pictures < 0:
        raise InvalidValueError(
            f"compare(batch_size={batch_size}, pictures={pictures}): need batch_size >= 1 and pictures >= 0."
        )
    studio = _Studio(tuple(prompts), tuple(picture_seeds(seed, len(prompts))), tuple(scorers), batch_size, pictures)
    before = studio.draw(base, "base", progress=progress)
    after = {name: studio.draw(each, name, progress=progress) for name, each in candidates.items()}
    rows = tuple(
        _row(scorer.name, name, before, arm, seed=seed, filtered_by=not scorer.rests_on.isdisjoint(filtered_by))
        for scorer in scorers
        for name, arm in after.items()
    )
    return Comparison(
        rows=rows, prompts=studio.prompts, seeds=studio.seeds, base=before, candidates=MappingProxyType(after)
    )


def _check(
    candidates: Mapping[str, Synthesizer],
    prompts: Sequence[str],
    scorers: Sequence[Scorer],
    filtered_by: Collection[str],
) -> None:
    if isinstance(prompts, str) or len(prompts) < 2:
        received = repr(prompts) if isinstance(prompts, str) else f"{len(prompts)}"
        raise PromptError(f"compare needs a list of at least 2 prompts, received {received}. More make it surer.")
    if not candidates or "base" in candidates:
        raise InvalidValueError(
            f"compare received candidates {list(candidates)}. Expected at least one, by name, and none called 'base'."
        )
    names = [scorer.name for scorer in scorers]
    if not names or len(set(names)) < len(names):
        raise InvalidValueError(
            f"compare received scorers named {names}. Expected at least one, and different names: override Scorer.name."
        )
    if isinstance(filtered_by, str):
        raise InvalidValueError(
            f"compare(filtered_by={filtered_by!r}): expected names, like PairFilter.scorers, received one string."
        )


@dataclass(frozen=True)
class _Studio:
    """What every arm is drawn and judged by."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    scorers: tuple[Scorer, ...]
    batch_size: int
    pictures: int

    def draw(self, synthesizer: Synthesizer, name: str, *, progress: bool) -> Arm:
        scores: dict[str, list[float]] = {scorer.name: [] for scorer in self.scorers}
        kept: list[Image] = []
        with tqdm(total=len(self.prompts), desc=f"compare: {name}", unit="picture", disable=not progress) as bar:
            for start in range(0, len(self.prompts), self.batch_size):
                prompts = self.prompts[start : start + self.batch_size]
                images = self._batch(synthesizer, prompts, self.seeds[start : start + self.batch_size])
                for scorer in self.scorers:
                    scores[scorer.name] += scored(scorer, images, prompts)
                kept += images[: self.pictures - len(kept)]
                bar.update(len(images))
        return Arm(
            drawn_by=repr(synthesizer),
            scores=MappingProxyType({scorer: tuple(numbers) for scorer, numbers in scores.items()}),
            pictures=tuple(kept),
        )

    @staticmethod
    def _batch(synthesizer: Synthesizer, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        images = synthesizer.synthesize_batch([Plan(prompt) for prompt in prompts], seeds=seeds)
        if len(images) != len(prompts):
            name = type(synthesizer).__name__
            raise SeamError(f"{name}.synthesize_batch returned {len(images)} pictures for {len(prompts)} plans.")
        return images


def _row(scorer: str, candidate: str, before: Arm, after: Arm, *, seed: int, filtered_by: bool) -> ScoreRow:
    base, enhanced = np.array(before.scores[scorer]), np.array(after.scores[scorer])
    differences = enhanced - base
    interval = paired_bootstrap(differences, seed=seed)
    return ScoreRow(
        scorer=scorer,
        candidate=candidate,
        base=base.mean(),
        enhanced=enhanced.mean(),
        delta=differences.mean(),
        ci_low=interval.low,
        ci_high=interval.high,
        win_rate=win_rate(differences),
        n=len(differences),
        filtered_by=filtered_by,
    )
