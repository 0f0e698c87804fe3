"""Draws and scores a base and its candidates on the same prompts and seeds, and turns their scores into rows.

Every arm draws the same (prompt, seed) pairs, so what remains in the difference of two scores is the synthesizer. The
scores of a prompt are averaged over its seeds before they are paired: the prompt is the unit of every statistic.
"""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import product
from math import nan
from typing import Protocol

from PIL.Image import Image

from artaug._internal.annotations import checked
from artaug._internal.arguments import Faults, argument_error, check_argument, check_count, check_items
from artaug._internal.progress_bar import ProgressBar
from artaug._internal.prompts import check_sample
from artaug.errors import InvalidValueError
from artaug.evaluation.comparison.comparison import Arm, Comparison, paired_scores
from artaug.evaluation.comparison.judgments import ComparisonJudges
from artaug.evaluation.comparison.rows import Guardrail, ScoreRow
from artaug.evaluation.comparison.scoring_log import ScoringLog
from artaug.evaluation.statistics import holm, sign_flip
from artaug.images.similarity import SimilarityMetric
from artaug.images.similarity import diversity as diversity_of
from artaug.pairwise import PairwiseJudge
from artaug.placement import Placement, Resident
from artaug.plan import Plan
from artaug.scoring import Scorer, score_images
from artaug.synthesis import Synthesizer, draw_batches, picture_seeds

_LOG = logging.getLogger(__name__)
_DIVERSITY = "diversity"
_RESIDENT = Resident()


class HasScorers(Protocol):
    """What selects training pairs by scorers: a `PairFilter`, or a `BestOf`."""

    @property
    def scorers(self) -> frozenset[str]:
        """Names of the scorers that it uses."""


@checked
def compare(  # noqa: PLR0913 - the one entry point, and everything after scorers has a default
    base: Synthesizer,
    candidates: Mapping[str, Synthesizer],
    prompts: Sequence[str],
    *,
    scorers: Sequence[Scorer] = (),
    judges: Sequence[PairwiseJudge] = (),
    seed: int = 0,
    images_per_prompt: int = 1,
    diversity: SimilarityMetric | None = None,
    guardrails: Sequence[Guardrail] = (),
    batch_size: int = 8,
    filtered_by: Collection[str | HasScorers] = (),
    keep_images: int = 12,
    placement: Placement = _RESIDENT,
    progress: bool = True,
) -> Comparison:
    """Draw the same prompts with the same seeds by a base and by candidates, and compare their scores in pairs.

    The base is drawn once. Only the first pictures are held in memory; the others are scored and released.

    Args:
        base: what the candidates are measured against.
        candidates: by their names in tables.
        prompts: what to draw, at least 2 different ones; best held out from training. One that is listed more than once
            counts once, by the mean of its pictures; letter case, blanks and punctuation at the ends make no difference.
        scorers: score the pictures; their names must differ, also from those of judges.
        judges: say which of two pictures is better, the candidate's or the base's of the same prompt and seed, in both
            orders. Each adds a row with the win rate, see `ScoreRow.judged`; the base's pictures wait in a temporary folder.
        seed: of the pictures and of the bootstrap; the same arguments give the same comparison. Take another than that of
            an `improve` whose pairs the candidates learned from, or they are judged on the noise that they saw.
        images_per_prompt: pictures of a prompt, each with a seed of its own; a prompt still counts once, by the mean
            of its pictures.
        diversity: how alike two pictures are (`ImageSimilarity`, or a function of two pictures); adds a row
            ``diversity``, 1 less the mean similarity of the pictures of a prompt. It needs ``images_per_prompt`` of at
            least 2.
        guardrails: how far which rows may fall, for `Comparison.verdict`.
        batch_size: pictures drawn and scored at a time.
        filtered_by: what selected the training pairs, ``[keep, candidates]``: filters, a `BestOf`, or names of
            scorers. Rows of scorers that depend on one of these are marked.
        keep_images: how many pictures of each arm to keep, those of the first prompts with their first seeds.
        placement: where the models of synthesizers and scorers are while others compute; with `OneAtATime` they move for
            every batch, so give it a large ``batch_size``.
        progress: show a progress bar for each arm.

    Raises:
        PromptError: for fewer than two prompts, or one string in place of a list.
        InvalidValueError: without candidates, or without scorers and judges, for scorers of one name, for diversity of a single picture a
            prompt, or for a guardrail on a row that does not exist.
        ScoringError: if a scorer or judge raises, or gives no finite number, for some pictures. All others are drawn and
            scored first, and the comparison of those is in the error. At once, if it fails on all of the first pictures, or
            has not answered for ten minutes. Also if a judge has no answer for all prompts but one.
        ContractError: if a synthesizer or scorer returns something its interface does not allow.
        NonFiniteError: if all scores of the first pictures are NaN or infinite, naming the prompt.

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
    faults = Faults("compare")
    for name, number, least in (
        ("seed", seed, 0),
        ("images_per_prompt", images_per_prompt, 1),
        ("batch_size", batch_size, 1),
        ("keep_images", keep_images, 0),
    ):
        with faults.collected():
            check_count("compare", name, number, least=least)
    with faults.collected():
        check_items("compare", "guardrails", guardrails, Guardrail)
    _check_arms(faults, base, candidates)
    _check_prompts_and_scorers(faults, prompts, scorers, judges)
    faults.raise_any()
    check_argument("compare", "placement", placement, Placement)
    measures = {**{scorer.name: scorer for scorer in scorers}, **{judge.name: judge for judge in judges}}
    owners = {"base": base, **candidates, **measures, "diversity": diversity}
    placement.check("compare", owners)
    filter_scorers = scorer_names(filtered_by)
    seeds = tuple(picture_seeds(seed, len(prompts) * images_per_prompt))
    evaluator = Evaluator(
        prompts=tuple(prompts),
        seeds=seeds,
        scorers=tuple(scorers),
        judges=tuple(judges),
        diversity=diversity,
        batch_size=batch_size,
        keep_images=keep_images,
    )
    evaluator.check_guardrails(guardrails)
    return evaluator.compare(
        {"base": base, **candidates},
        seed=seed,
        filtered_by=filter_scorers,
        guardrails=guardrails,
        placement=placement,
        progress=progress,
    )


@dataclass(frozen=True)
class Evaluator:
    """Evaluates every arm of a comparison on the same prompts, with the same seeds and scorers."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    """One a picture: the first of every prompt, then the second of every prompt."""
    scorers: tuple[Scorer, ...]
    judges: tuple[PairwiseJudge, ...]
    diversity: SimilarityMetric | None
    batch_size: int
    keep_images: int

    def __post_init__(self) -> None:
        if self.diversity is not None and (
            self.images_per_prompt < 2 or _DIVERSITY in _names(self.scorers, self.judges)
        ):
            raise InvalidValueError(
                f"compare(diversity=..., images_per_prompt={self.images_per_prompt}): need at least 2 pictures a prompt "
                f"to measure how they differ, and no scorer called {_DIVERSITY!r}."
            )

    @property
    def images_per_prompt(self) -> int:
        return len(self.seeds) // len(self.prompts)

    @property
    def row_dependencies(self) -> dict[str, frozenset[str]]:
        """The names of the rows, each with the names of the scorers that it depends on."""
        dependencies = {scorer.name: scorer.depends_on for scorer in self.scorers}
        if self.diversity is not None:
            dependencies[_DIVERSITY] = frozenset()
        return dependencies | {judge.name: judge.depends_on for judge in self.judges}

    def check_guardrails(self, guardrails: Sequence[Guardrail]) -> None:
        """Refuse guardrails on a row that does not exist, and two on the same row."""
        guarded = [guardrail.scorer for guardrail in guardrails]
        if not set(guarded) <= set(self.row_dependencies) or len(set(guarded)) < len(guarded):
            raise InvalidValueError(
                f"compare received guardrails on {guarded}. Expected different ones of {[*self.row_dependencies]}."
            )

    def compare(
        self,
        arms: Mapping[str, Synthesizer | Arm],
        *,
        seed: int,
        filtered_by: Collection[str] = (),
        guardrails: Sequence[Guardrail] = (),
        placement: Placement = _RESIDENT,
        progress: bool = True,
    ) -> Comparison:
        """Evaluate synthesizers and compare them to the one called ``base``.

        Args:
            arms: by name, the base first; an `Arm` is what this evaluator made of a synthesizer before, and is not drawn and
                scored again. If there are judges, only the base may be one, and has all of its pictures.
            seed: of the statistics.
            filtered_by: names of scorers.
            guardrails: see `check_guardrails`.
            placement: of the models of all of them.
            progress: show a bar for each synthesizer.

        Raises:
            ScoringError: see `artaug.compare`.
        """
        log = ScoringLog()
        synthesizers = [arm for arm in arms.values() if not isinstance(arm, Arm)]
        candidates: dict[str, Arm] = {}
        drawn = arms["base"] if isinstance(arms["base"], Arm) else None
        with (
            placement.opened(*synthesizers, *self.scorers, *self.judges, self.diversity) as opened,
            ComparisonJudges.opened(self.judges, drawn, pictures=len(self.seeds)) as judges,
        ):
            for name, arm in arms.items():
                if isinstance(arm, Arm):
                    log.scores[name] = {row: [*scores] for row, scores in arm.scores.items()}
                    candidates[name] = arm
                else:
                    candidates[name] = self.evaluate(
                        arm, name, log=log, judges=judges, placement=opened, progress=progress
                    )
        # What judges say of an arm is relative to the base of its comparison; of the base itself they say nothing.
        base = candidates.pop("base")
        base = replace(base, scores={**base.scores, **judges.base_scores()}, judgments={})
        judges.check_answered(candidates, len(self.prompts))
        if log.failures and not self.has_enough_scores(base, candidates):
            raise log.error(None) from log.exceptions[0]
        comparison = Comparison(
            rows=self.score_rows(base, candidates, seed=seed, filtered_by=filtered_by),
            prompts=self.prompts,
            seeds=self.seeds,
            base=base,
            candidates=candidates,
            guardrails=tuple(guardrails),
            failures=tuple(log.failures),
        )
        for bias in comparison.position_bias:
            if bias.significant:
                _LOG.warning("%s", bias)
        if log.failures:
            raise log.error(comparison) from log.exceptions[0]
        return comparison

    def evaluate(
        self,
        synthesizer: Synthesizer,
        name: str,
        *,
        log: ScoringLog,
        judges: ComparisonJudges,
        placement: Placement,
        progress: bool,
    ) -> Arm:
        """Draw all prompts with all seeds, score and judge the pictures; only the first ``keep_images`` are kept."""
        prompt_count = len(self.prompts)
        scores = {scorer.name: [nan] * len(self.seeds) for scorer in self.scorers}
        if self.diversity is not None:
            scores[_DIVERSITY] = [nan] * prompt_count
        log.scores[name] = scores
        kept: list[Image] = []
        drawn = draw_batches(synthesizer, self._batches())
        with (
            closing(drawn),
            ProgressBar(f"compare {name}", total=len(self.seeds), unit="picture", show=progress) as bar,
        ):
            for start in range(0, prompt_count, self.batch_size):
                prompts = self.prompts[start : start + self.batch_size]
                images_by_seed = []
                for first in range(start, len(self.seeds), prompt_count):
                    batch = slice(first, first + len(prompts))
                    seeds = self.seeds[batch]
                    with placement.stage(synthesizer):
                        images = next(drawn)
                    for scorer in self.scorers:
                        with placement.stage(scorer):
                            scores[scorer.name][batch] = _scored(scorer, images, prompts, seeds, log=log, arm=name)
                    if name == "base":
                        judges.keep(batch, images)
                    else:
                        judges.judge(batch, images, prompts, seeds=seeds, arm=name, log=log, placement=placement)
                    images_by_seed.append(images)
                    bar.advance(len(prompts))
                if self.diversity is not None:
                    with placement.stage(self.diversity):
                        scores[_DIVERSITY][start : start + len(prompts)] = [
                            diversity_of(self.diversity, images) for images in zip(*images_by_seed, strict=True)
                        ]
                kept += images_by_seed[0][: self.keep_images - len(kept)]
        return Arm(
            synthesizer=repr(synthesizer),
            scores={row: tuple(row_scores) for row, row_scores in scores.items()} | judges.candidate_scores(name),
            images=tuple(kept),
            judgments={judge: tuple(answers) for judge, answers in judges.judgments.get(name, {}).items()},
        )

    def _batches(self) -> Iterator[tuple[Sequence[Plan], Sequence[int]]]:
        """The plans and seeds of each batch; picture i is of prompt i % len(prompts)."""
        for start in range(0, len(self.prompts), self.batch_size):
            plans = [Plan(prompt) for prompt in self.prompts[start : start + self.batch_size]]
            # Steps of so many stay on these prompts, a seed further.
            for first in range(start, len(self.seeds), len(self.prompts)):
                yield plans, self.seeds[first : first + len(plans)]

    def has_enough_scores(self, base: Arm, candidates: Mapping[str, Arm]) -> bool:
        """Whether every row has at least two prompts, without which it has no interval."""
        return all(
            len(paired_scores(base, arm, row, self.prompts)[0]) >= 2
            for row, arm in product(self.row_dependencies, candidates.values())
        )

    def score_rows(
        self, base: Arm, candidates: Mapping[str, Arm], *, seed: int, filtered_by: Collection[str]
    ) -> tuple[ScoreRow, ...]:
        """One row for each scorer and candidate, scorers first.

        The p-values of one candidate are Holm-corrected over its rows: the family is all comparisons of that candidate.
        """
        pairs = {
            (row, name): paired_scores(base, arm, row, self.prompts)
            for row, (name, arm) in product(self.row_dependencies, candidates.items())
        }
        p_values: dict[tuple[str, str], float] = {}
        for name in candidates:
            family = [(row, name) for row in self.row_dependencies]
            raw = [sign_flip(pairs[key][1] - pairs[key][0], seed=seed) for key in family]
            p_values |= dict(zip(family, holm(raw), strict=True))
        return tuple(
            ScoreRow.of(
                row,
                name,
                base=base_scores,
                enhanced=candidate_scores,
                p_value=p_values[row, name],
                filtered_by=not self.row_dependencies[row].isdisjoint(filtered_by),
                judged=row in {judge.name for judge in self.judges},
                seed=seed,
            )
            for (row, name), (base_scores, candidate_scores) in pairs.items()
        )


def _scored(
    scorer: Scorer,
    images: Sequence[Image],
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    log: ScoringLog,
    arm: str,
) -> list[float]:
    """The scores of a batch, NaN where the scorer raised."""
    scores = log.ask(
        scorer.name,
        lambda part: score_images(scorer, images[part], prompts[part]),
        prompts,
        seeds=seeds,
        arm=arm,
    )
    return [nan if score is None else score for score in scores]


def scorer_names(filtered_by: Collection[str | HasScorers]) -> frozenset[str]:
    """The names of all scorers in ``filtered_by``.

    Raises:
        InvalidValueError: for one string or one filter in place of a list, or for an item without scorers.
    """
    expected = "expected a list of names, filters and BestOf"
    if isinstance(filtered_by, str) or not isinstance(filtered_by, Collection):
        raise InvalidValueError(
            f"compare(filtered_by={filtered_by!r}): {expected}, received one {type(filtered_by).__name__}."
        )
    names: set[str] = set()
    for selector in filtered_by:
        if not isinstance(selector, str) and not isinstance(getattr(selector, "scorers", None), frozenset):
            raise InvalidValueError(f"compare(filtered_by=...): {expected}, received {selector!r:.120} among them.")
        names |= {selector} if isinstance(selector, str) else selector.scorers
    return frozenset(names)


def _check_arms(faults: Faults, base: Synthesizer, candidates: Mapping[str, Synthesizer]) -> None:
    """Refuse a base that is no synthesizer, and candidates that are not synthesizers by name."""
    with faults.collected():
        check_argument("compare", "base", base, Synthesizer)
    with faults.collected():
        if not isinstance(candidates, Mapping):
            advice = "Give it a name, such as {'round 1': synthesizer}."
            raise argument_error("compare", "candidates", candidates, expected="synthesizers by name", advice=advice)
        if not candidates or "base" in candidates:
            raise InvalidValueError(
                f"compare received candidates {list(candidates)}. Expected at least one, by name, and none called 'base'."
            )
        for name, candidate in candidates.items():
            check_argument("compare", f"candidates[{name!r}]", candidate, Synthesizer)


def _names(scorers: Sequence[Scorer], judges: Sequence[PairwiseJudge]) -> list[str]:
    return [*(scorer.name for scorer in scorers), *(judge.name for judge in judges)]


def _check_prompts_and_scorers(
    faults: Faults, prompts: Sequence[str], scorers: Sequence[Scorer], judges: Sequence[PairwiseJudge]
) -> None:
    """Refuse prompts that are too few, and scorers and judges that cannot be told apart."""
    with faults.collected():
        check_sample("compare", prompts)
    with faults.collected():
        check_items("compare", "scorers", scorers, Scorer)
        check_items("compare", "judges", judges, PairwiseJudge)
        names = _names(scorers, judges)
        if not names or len(set(names)) < len(names):
            raise InvalidValueError(
                f"compare received scorers{' and judges' * bool(judges)} named {names}. Expected at least one, and different "
                f"names: override Scorer.name{' or PairwiseJudge.name' * bool(judges)}."
            )
