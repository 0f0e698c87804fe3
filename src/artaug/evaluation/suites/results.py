"""Results of suites: drawing and checking a suite, and scores by category with intervals, alone or against a base."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, final

import numpy as np

from artaug._internal.annotations import checked
from artaug._internal.contracts import check_batch
from artaug._internal.progress_bar import ProgressBar
from artaug._internal.prompts import prompt_clusters
from artaug._internal.values import value
from artaug.errors import InvalidValueError
from artaug.evaluation.comparison import Comparison, ScoreRow
from artaug.evaluation.comparison.rows import finite_pairs
from artaug.evaluation.prompts import PromptSet
from artaug.evaluation.statistics import holm, share_bootstrap, sign_flip
from artaug.evaluation.suites.suite import Outcome, Suite, SuiteScorer
from artaug.plan import Plan
from artaug.synthesis import Synthesizer, draw_batches, picture_seeds

_OVERALL = "overall"


@value
class CategoryScore:
    """The score of one category, or of the whole suite, with its interval."""

    category: str
    score: float
    """In [0, 1]; some tables print it times 100."""
    ci_low: float
    """Lower end of the 95% interval."""
    ci_high: float
    """Upper end of it."""
    n: int
    """Number of different prompts; the interval is computed as if one that is listed more than once were one sample."""


@checked
@final
@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """The scores of a suite, overall and by category. ``print`` it to read it."""

    suite: Suite
    scorer: str
    """The name of the scorer that checked the pictures."""
    overall: CategoryScore
    categories: tuple[CategoryScore, ...]
    """In the order of their first prompts."""
    outcomes: tuple[tuple[Outcome, ...], ...]
    """For each case, the outcomes of its pictures."""

    @classmethod
    def of(cls, scorer: SuiteScorer, outcomes: Sequence[Sequence[Outcome]], *, seed: int = 0) -> "SuiteResult":
        """Sum up outcomes: for each case of the scorer's suite, one a picture; ``seed`` is the bootstrap's.

        Raises:
            InvalidValueError: if there is not one list for each case, or a list is empty.
        """
        cases = scorer.suite.cases
        if len(outcomes) != len(cases) or not all(outcomes):
            raise InvalidValueError(
                f"{len(outcomes)} lists of outcomes for {len(cases)} cases: need one each, not empty."
            )
        clusters = prompt_clusters(case.prompt for case in cases)
        tallies = _category_tallies(outcomes, clusters)
        categories = tuple(
            CategoryScore(name, *_share([tally], seed=seed), n=tally.shape[1]) for name, tally in tallies.items()
        )
        if scorer.suite.mean_over == "categories":
            groups = list(tallies.values())
        else:
            means = [np.mean([outcome.score for outcome in case_outcomes]) for case_outcomes in outcomes]
            groups = [np.array([np.bincount(clusters, weights=means), np.bincount(clusters)])]
        return cls(
            suite=scorer.suite,
            scorer=scorer.name,
            overall=CategoryScore(_OVERALL, *_share(groups, seed=seed), n=int(clusters.max()) + 1),
            categories=categories,
            outcomes=tuple(tuple(case_outcomes) for case_outcomes in outcomes),
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain types for JSON."""
        return {
            "suite": self.suite.name,
            "scorer": self.scorer,
            "overall": asdict(self.overall),
            "categories": [asdict(row) for row in self.categories],
            "prompts": [
                {
                    "prompt": case.prompt,
                    "pictures": [{"score": outcome.score, "reasons": list(outcome.reasons)} for outcome in outcomes],
                }
                for case, outcomes in zip(self.suite.cases, self.outcomes, strict=True)
            ],
        }

    def __str__(self) -> str:
        rows = [row for row in self.categories if row.category] + [self.overall]
        width = max(len(row.category) for row in rows)
        lines = [
            f"{row.category:<{width}}  {row.score:6.1%}  {row.ci_low:6.1%} to {row.ci_high:6.1%}  {row.n:4d} prompts"
            for row in rows
        ]
        pictures = len(self.outcomes[0])
        heading = f"{self.scorer}: share right, 95% interval, {pictures} picture{'s' * (pictures > 1)} a prompt"
        return "\n".join([heading, *lines])


@checked
def evaluate(
    scorer: SuiteScorer,
    synthesizer: Synthesizer,
    *,
    seed: int = 0,
    images_per_prompt: int = 1,
    batch_size: int = 8,
    progress: bool = True,
) -> SuiteResult:
    """Draw a suite's prompts and check the pictures, which are released as soon as they are checked.

    The pictures are those that `artaug.compare` draws of ``suite.prompts`` with the same ``seed`` and
    ``images_per_prompt``.

    Args:
        scorer: an `ObjectScore` or `QuestionScore` of the suite.
        synthesizer: draws the prompts.
        seed: of the pictures and of the intervals.
        images_per_prompt: pictures of a prompt; GenEval and DPG-Bench publish 4.
        batch_size: pictures drawn and checked at a time.
        progress: show a progress bar.

    Raises:
        InvalidValueError: for ``images_per_prompt`` or ``batch_size`` below 1.
        ContractError: if the synthesizer, the scorer or the scorer's model returns something its interface does not
            allow.
    """
    if images_per_prompt < 1 or batch_size < 1:
        raise InvalidValueError(
            f"evaluate(images_per_prompt={images_per_prompt}, batch_size={batch_size}): need at least 1 of each."
        )
    cases = scorer.suite.cases
    seeds = picture_seeds(seed, len(cases) * images_per_prompt)
    outcomes: list[list[Outcome]] = [[] for _ in cases]
    batches = [
        (start, first + start, cases[start : start + batch_size])
        for first in range(0, len(seeds), len(cases))
        for start in range(0, len(cases), batch_size)
    ]
    drawn = draw_batches(
        synthesizer,
        (([Plan(case.prompt) for case in batch], seeds[place:][: len(batch)]) for _, place, batch in batches),
    )
    with closing(drawn), ProgressBar(scorer.suite.name, total=len(seeds), unit="picture", show=progress) as bar:
        for (start, _, batch), images in zip(batches, drawn, strict=True):
            checked = check_batch(
                scorer.name,
                "check_images",
                scorer.check_images(images, batch),
                of=Outcome,
                count=len(batch),
                per="picture",
                prompts=[case.prompt for case in batch],
            )
            for case_outcomes, outcome in zip(outcomes[start : start + len(batch)], checked, strict=True):
                case_outcomes.append(outcome)
            bar.advance(len(batch))
    return SuiteResult.of(scorer, outcomes, seed=seed)


@checked
def by_category(comparison: Comparison, prompts: PromptSet, *, seed: int = 0) -> tuple[ScoreRow, ...]:
    """The rows of a comparison, category by category: where did it get better, and where worse?

    The p-values of a candidate are Holm-corrected over all rows returned for it.

    Args:
        comparison: of these prompts.
        prompts: with their categories, such as `Suite.prompts` or `artaug.PromptSet.read`.
        seed: of the bootstrap and the permutation test.

    Returns:
        Rows whose ``scorer`` is the scorer's name, a colon and the category.

    Raises:
        InvalidValueError: if the comparison is of other prompts, or a category has fewer than two prompts with scores.
    """
    if comparison.prompts != tuple(prompts):
        raise InvalidValueError("by_category: the comparison drew other prompts than these, or in another order.")
    indices: defaultdict[str, list[int]] = defaultdict(list)
    for index, category in enumerate(prompts.categories):
        indices[category].append(index)
    clusters = prompt_clusters(prompts)
    if single := [category for category, members in indices.items() if len(set(clusters[members])) < 2]:
        raise InvalidValueError(f"by_category: {single} have a single prompt, which has no spread: need at least 2.")
    return tuple(row for name in comparison.candidates for row in _category_rows(comparison, name, indices, seed=seed))


def _category_rows(
    comparison: Comparison, candidate: str, indices: Mapping[str, Sequence[int]], *, seed: int
) -> Iterator[ScoreRow]:
    count, arm, clusters = (
        len(comparison.prompts),
        comparison.candidates[candidate],
        prompt_clusters(comparison.prompts),
    )
    rows = [row for row in comparison.rows if row.candidate == candidate]
    cells = []
    for row, (category, members) in product(rows, indices.items()):
        base, enhanced = finite_pairs(
            comparison.base.by_prompt(row.scorer, count)[members],
            arm.by_prompt(row.scorer, count)[members],
            clusters[members],
        )
        if len(base) < 2:
            raise InvalidValueError(f"by_category: {row.scorer} raised on all but {len(base)} prompts of {category!r}.")
        cells.append((row, category, base, enhanced))
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


def _category_tallies(outcomes: Sequence[Sequence[Outcome]], clusters: np.ndarray) -> dict[str, np.ndarray]:
    """For each category the number of right and of all results of each different prompt that has any: (2, prompts)."""
    tallies: defaultdict[str, dict[int, list[float]]] = defaultdict(dict)
    for case_outcomes, cluster in zip(outcomes, clusters.tolist(), strict=True):
        for category, right in (result for outcome in case_outcomes for result in outcome.category_results):
            tally = tallies[category].setdefault(cluster, [0.0, 0.0])
            tally[0] += right
            tally[1] += 1
    return {category: np.array([*by_cluster.values()]).T for category, by_cluster in tallies.items()}


def _share(groups: Sequence[np.ndarray], *, seed: int) -> tuple[float, float, float]:
    """The mean of the groups' shares, and its interval."""
    share = float(np.mean([numerators.sum() / denominators.sum() for numerators, denominators in groups]))
    interval = share_bootstrap(groups, seed=seed)
    return share, interval.low, interval.high
