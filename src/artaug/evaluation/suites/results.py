"""What a suite's checks come to: scores by category with intervals, alone or against a base."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, final

import numpy as np
from tqdm.auto import tqdm

from artaug._internal.values import value
from artaug.errors import InvalidValueError
from artaug.evaluation.comparison import Comparison, ScoreRow
from artaug.evaluation.prompts import PromptSet
from artaug.evaluation.statistics import holm, share_bootstrap, sign_flip
from artaug.evaluation.suites.suite import Outcome, Suite, SuiteScorer
from artaug.plan import Plan
from artaug.synthesis import Synthesizer, draw, picture_seeds

_OVERALL = "overall"


@value
class CategoryScore:
    """The score of one category, or of the whole suite, with how sure it is."""

    category: str
    score: float
    """In [0, 1]; some tables print it times 100."""
    low: float
    """Lower end of the 95% interval."""
    high: float
    """Upper end of it."""
    n: int
    """Number of prompts it rests on."""


@final
@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """How the pictures of a suite's prompts were judged. ``print`` it to read it."""

    suite: Suite
    judge: str
    """The name of what judged them."""
    overall: CategoryScore
    categories: tuple[CategoryScore, ...]
    """In the order of their first prompts."""
    outcomes: tuple[tuple[Outcome, ...], ...]
    """For each case one outcome a picture, with the reasons."""

    @classmethod
    def of(cls, judge: SuiteScorer, outcomes: Sequence[Sequence[Outcome]], *, seed: int = 0) -> "SuiteResult":
        """Sum up outcomes: of each case of the judge's suite, one a picture.

        Raises:
            InvalidValueError: if there are not as many as cases, or a case has none.
        """
        cases = judge.suite.cases
        if len(outcomes) != len(cases) or not all(outcomes):
            raise InvalidValueError(
                f"{len(outcomes)} lists of outcomes for {len(cases)} cases: need one each, not empty."
            )
        tallies = _tallies(outcomes)
        categories = tuple(
            CategoryScore(name, *_share([tally], seed=seed), n=tally.shape[1]) for name, tally in tallies.items()
        )
        if judge.suite.mean_over == "categories":
            groups = list(tallies.values())
        else:
            means = [np.mean([outcome.score for outcome in many]) for many in outcomes]
            groups = [np.array([means, np.ones(len(means))])]
        return cls(
            suite=judge.suite,
            judge=judge.name,
            overall=CategoryScore(_OVERALL, *_share(groups, seed=seed), n=len(cases)),
            categories=categories,
            outcomes=tuple(tuple(many) for many in outcomes),
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain types that JSON takes."""
        return {
            "suite": self.suite.name,
            "judge": self.judge,
            "overall": asdict(self.overall),
            "categories": [asdict(row) for row in self.categories],
            "prompts": [
                {
                    "prompt": case.prompt,
                    "pictures": [{"score": one.score, "reasons": list(one.reasons)} for one in many],
                }
                for case, many in zip(self.suite.cases, self.outcomes, strict=True)
            ],
        }

    def __str__(self) -> str:
        rows = [row for row in self.categories if row.category] + [self.overall]
        wide = max(len(row.category) for row in rows)
        lines = [
            f"{row.category:<{wide}}  {row.score:6.1%}  {row.low:6.1%} … {row.high:6.1%}  {row.n:4d} prompts"
            for row in rows
        ]
        pictures = len(self.outcomes[0])
        drawn = f"{self.judge}: share right, 95% interval, {pictures} picture{'s' * (pictures > 1)} a prompt"
        return "\n".join([drawn, *lines])


def evaluate(
    judge: SuiteScorer,
    synthesizer: Synthesizer,
    *,
    seed: int = 0,
    images_per_prompt: int = 1,
    batch_size: int = 8,
    progress: bool = True,
) -> SuiteResult:
    """Draw a suite's prompts and judge the pictures, which are let go as soon as they are judged.

    The pictures are those that `artaug.evaluation.comparison` draws of ``suite.prompts`` with the same ``seed`` and ``images_per_prompt``.

    Args:
        judge: an `ObjectScore` or `QuestionScore` of the suite.
        synthesizer: draws the prompts.
        seed: of the pictures and of the intervals.
        images_per_prompt: pictures a prompt; GenEval and DPG-Bench publish 4.
        batch_size: pictures drawn and judged at a time.
        progress: show a progress bar.

    Raises:
        InvalidValueError: for ``images_per_prompt`` or ``batch_size`` below 1.
        ContractError: if the synthesizer draws too few pictures, or the judge's model breaks its promise.
    """
    if images_per_prompt < 1 or batch_size < 1:
        raise InvalidValueError(
            f"evaluate(images_per_prompt={images_per_prompt}, batch_size={batch_size}): need at least 1 of each."
        )
    cases = judge.suite.cases
    seeds = picture_seeds(seed, len(cases) * images_per_prompt)
    found: list[list[Outcome]] = [[] for _ in cases]
    with tqdm(total=len(seeds), desc=judge.suite.name, unit="picture", disable=not progress) as bar:
        for first in range(0, len(seeds), len(cases)):
            for start in range(0, len(cases), batch_size):
                part = cases[start : start + batch_size]
                plans = [Plan(case.prompt) for case in part]
                images = draw(synthesizer, plans, seeds=seeds[first + start :][: len(part)])
                for at, outcome in enumerate(judge.outcomes(images, part), start=start):
                    found[at].append(outcome)
                bar.update(len(part))
    return SuiteResult.of(judge, found, seed=seed)


def by_category(comparison: Comparison, prompts: PromptSet, *, seed: int = 0) -> tuple[ScoreRow, ...]:
    """The rows of a comparison, category by category: where did it get better, and where worse?

    p-values are corrected over all rows of a candidate, since so many questions are asked at once.

    Args:
        comparison: of these prompts.
        prompts: with their categories, such as `Suite.prompts` or `artaug.PromptSet.read`.
        seed: of the bootstrap and the permutation test.

    Returns:
        Rows whose ``scorer`` is the scorer's name, a colon and the category.

    Raises:
        InvalidValueError: if the comparison is of other prompts, or a category has a single one that was scored.
    """
    if comparison.prompts != tuple(prompts):
        raise InvalidValueError("by_category: the comparison drew other prompts than these, or in another order.")
    places: defaultdict[str, list[int]] = defaultdict(list)
    for at, category in enumerate(prompts.categories):
        places[category].append(at)
    if alone := [category for category, of in places.items() if len(of) < 2]:
        raise InvalidValueError(
            f"by_category: {alone} have a single prompt, which says nothing about the spread: need 2."
        )
    return tuple(row for name in comparison.candidates for row in _rows(comparison, name, places, seed=seed))


def _rows(
    comparison: Comparison, candidate: str, places: Mapping[str, Sequence[int]], *, seed: int
) -> Iterator[ScoreRow]:
    count, arm = len(comparison.prompts), comparison.candidates[candidate]
    whole = [row for row in comparison.rows if row.candidate == candidate]
    cells = []
    for row, (category, of) in product(whole, places.items()):
        base, enhanced = (one.by_prompt(row.scorer, count)[of] for one in (comparison.base, arm))
        there = np.isfinite(base) & np.isfinite(enhanced)
        if there.sum() < 2:
            raise InvalidValueError(
                f"by_category: {row.scorer} raised on all but {there.sum()} prompts of {category!r}."
            )
        cells.append((row, category, base[there], enhanced[there]))
    p_values = holm([sign_flip(enhanced - base, seed=seed) for _, _, base, enhanced in cells])
    for (row, category, base, enhanced), p_value in zip(cells, p_values, strict=True):
        yield ScoreRow.of(
            f"{row.scorer}: {category}",
            candidate,
            base=base,
            enhanced=enhanced,
            p_value=p_value,
            filtered_by=row.filtered_by,
            seed=seed,
        )


def _tallies(outcomes: Sequence[Sequence[Outcome]]) -> dict[str, np.ndarray]:
    """By category, for each prompt that has something in it, how much was right and how much there was: (2, prompts)."""
    columns: defaultdict[str, list[list[float]]] = defaultdict(list)
    for many in outcomes:
        within: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for category, right in (part for outcome in many for part in outcome.parts):
            within[category][0] += right
            within[category][1] += 1
        for category, tally in within.items():
            columns[category].append(tally)
    return {category: np.array(tallies).T for category, tallies in columns.items()}


def _share(groups: Sequence[np.ndarray], *, seed: int) -> tuple[float, float, float]:
    score = float(np.mean([parts.sum() / wholes.sum() for parts, wholes in groups]))
    interval = share_bootstrap(groups, seed=seed)
    return score, interval.low, interval.high
