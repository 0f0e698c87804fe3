"""Where a comparison is drawn and scored: every arm by the same prompts, seeds and scorers."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import nan
from types import MappingProxyType
from typing import Protocol

import numpy as np
from PIL.Image import Image
from tqdm.auto import tqdm

from artaug.errors import InvalidValueError, PromptError
from artaug.evaluation.comparison.comparison import Arm
from artaug.evaluation.comparison.rows import Guardrail, ScoreRow
from artaug.evaluation.comparison.scoring_log import ScoringLog
from artaug.evaluation.statistics import holm, sign_flip
from artaug.images.similarity import SimilarityMetric
from artaug.images.similarity import diversity as diversity_of
from artaug.plan import Plan
from artaug.scoring import Scorer
from artaug.synthesis import Synthesizer, draw

_DIVERSITY = "diversity"


@dataclass(frozen=True)
class Evaluator:
    """What every arm is drawn and judged by."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    scorers: tuple[Scorer, ...]
    diversity: SimilarityMetric | None
    batch_size: int
    keep_images: int

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.keep_images < 0 or self.images_per_prompt < 1:
            raise InvalidValueError(
                f"compare(batch_size={self.batch_size}, keep_images={self.keep_images}, images_per_prompt={self.images_per_prompt}): need "
                "batch_size >= 1, keep_images >= 0 and images_per_prompt >= 1."
            )
        if self.diversity is not None and (
            self.images_per_prompt < 2 or _DIVERSITY in {scorer.name for scorer in self.scorers}
        ):
            raise InvalidValueError(
                f"compare(diversity=..., images_per_prompt={self.images_per_prompt}): need at least 2 pictures a prompt to tell how unlike they "
                f"are, and no scorer called {_DIVERSITY!r}."
            )

    @property
    def images_per_prompt(self) -> int:
        """Pictures a prompt."""
        return len(self.seeds) // len(self.prompts)

    @property
    def judges(self) -> dict[str, frozenset[str]]:
        """The rows there will be: names, and the names of the scorers each rests on."""
        known = {scorer.name: scorer.depends_on for scorer in self.scorers}
        return known if self.diversity is None else {**known, _DIVERSITY: frozenset()}

    def check_guardrails(self, guardrails: Sequence[Guardrail]) -> None:
        """Refuse guardrails that watch no row, or the same one."""
        watched = [guardrail.scorer for guardrail in guardrails]
        if not set(watched) <= set(self.judges) or len(set(watched)) < len(watched):
            raise InvalidValueError(
                f"compare received guardrails on {watched}. Expected different ones of {[*self.judges]}."
            )

    def enough(self, before: Arm, after: Mapping[str, Arm]) -> bool:
        """Whether every row has two prompts to rest on."""
        count = len(self.prompts)
        both = (
            _both(before.by_prompt(one, count), arm.by_prompt(one, count))
            for one in self.judges
            for arm in after.values()
        )
        return all(len(base) >= 2 for base, _ in both)

    def draw(self, synthesizer: Synthesizer, name: str, *, ledger: ScoringLog, progress: bool) -> Arm:
        """Draw all prompts with all seeds and score them; only the first pictures are kept."""
        count, scores = len(self.prompts), {judge: [nan] * len(self.seeds) for judge in self.judges}
        ledger.scores[name] = scores
        if self.diversity is not None:
            scores[_DIVERSITY] = [nan] * count
        kept: list[Image] = []
        with tqdm(total=len(self.seeds), desc=f"compare: {name}", unit="picture", disable=not progress) as bar:
            for start in range(0, count, self.batch_size):
                prompts = self.prompts[start : start + self.batch_size]
                drawn = []
                for first in range(start, len(self.seeds), count):
                    part = slice(first, first + len(prompts))
                    drawn.append(_drawn(synthesizer, prompts, self.seeds[part]))
                    for scorer in self.scorers:
                        scores[scorer.name][part] = ledger.score_images(
                            scorer, drawn[-1], prompts, seeds=self.seeds[part], arm=name
                        )
                    bar.update(len(prompts))
                if self.diversity is not None:
                    unlike = [diversity_of(self.diversity, images) for images in zip(*drawn, strict=True)]
                    scores[_DIVERSITY][start : start + len(prompts)] = unlike
                kept += drawn[0][: self.keep_images - len(kept)]
        return Arm(
            synthesizer=repr(synthesizer),
            scores=MappingProxyType({scorer: tuple(numbers) for scorer, numbers in scores.items()}),
            images=tuple(kept),
        )


def rows_of(
    studio: Evaluator, before: Arm, after: Mapping[str, Arm], *, seed: int, filtered_by: Collection[str]
) -> tuple[ScoreRow, ...]:
    """One row a scorer and candidate, scorers first; p-values corrected over the scorers of each candidate."""
    count = len(studio.prompts)
    pairs = {
        (judge, name): _both(before.by_prompt(judge, count), arm.by_prompt(judge, count))
        for judge, (name, arm) in product(studio.judges, after.items())
    }
    corrected: dict[tuple[str, str], float] = {}
    for name in after:
        raw = [sign_flip(np.subtract(*pairs[judge, name][::-1]), seed=seed) for judge in studio.judges]
        corrected |= {(judge, name): p_value for judge, p_value in zip(studio.judges, holm(raw), strict=True)}
    return tuple(
        ScoreRow.of(
            judge,
            name,
            base=base,
            enhanced=enhanced,
            p_value=corrected[judge, name],
            filtered_by=not studio.judges[judge].isdisjoint(filtered_by),
            seed=seed,
        )
        for (judge, name), (base, enhanced) in pairs.items()
    )


def _both(base: np.ndarray, enhanced: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The prompts that both have a score of."""
    there = np.isfinite(base) & np.isfinite(enhanced)
    return base[there], enhanced[there]


def check(
    candidates: Mapping[str, Synthesizer],
    prompts: Sequence[str],
    scorers: Sequence[Scorer],
) -> None:
    """Refuse what cannot be compared, before anything is drawn."""
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


def _drawn(synthesizer: Synthesizer, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
    return draw(synthesizer, [Plan(prompt) for prompt in prompts], seeds=seeds)


class HasScorers(Protocol):
    """What has chosen the training pairs by scorers: a `PairFilter`, or a `BestOf`."""

    @property
    def scorers(self) -> frozenset[str]:
        """Names of the scorers it rests on."""


def names_of(filtered_by: Collection[str | HasScorers]) -> frozenset[str]:
    """The names of all scorers that have chosen.

    Raises:
        InvalidValueError: for one string or one filter in place of several, or something that rests on no scorers.
    """
    wanted = "expected a list of names, filters and BestOf"
    if isinstance(filtered_by, str) or not isinstance(filtered_by, Collection):
        raise InvalidValueError(
            f"compare(filtered_by={filtered_by!r}): {wanted}, received one {type(filtered_by).__name__}."
        )
    names: set[str] = set()
    for one in filtered_by:
        if not isinstance(one, str) and not isinstance(getattr(one, "scorers", None), frozenset):
            raise InvalidValueError(f"compare(filtered_by=...): {wanted}, and {one!r:.120} is none.")
        names |= {one} if isinstance(one, str) else one.scorers
    return frozenset(names)
