"""Where a comparison is drawn and scored: every arm by the same prompts, seeds and scorers."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType

from PIL.Image import Image
from tqdm.auto import tqdm

from artaug.compare.comparison import Arm
from artaug.compare.rows import Guardrail, ScoreRow
from artaug.errors import InvalidValueError, PromptError, SeamError
from artaug.likeness import Measure
from artaug.likeness import diversity as diversity_of
from artaug.plan import Plan
from artaug.scoring import Scorer, scored
from artaug.statistics import holm, paired_bootstrap, sign_flip, tie_rate, win_rate
from artaug.synthesis import Synthesizer

_DIVERSITY = "diversity"


@dataclass(frozen=True)
class Studio:
    """What every arm is drawn and judged by."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    scorers: tuple[Scorer, ...]
    diversity: Measure | None
    batch_size: int
    pictures: int

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.pictures < 0 or self.draws < 1:
            raise InvalidValueError(
                f"compare(batch_size={self.batch_size}, pictures={self.pictures}, draws={self.draws}): need "
                "batch_size >= 1, pictures >= 0 and draws >= 1."
            )
        if self.diversity is not None and (self.draws < 2 or _DIVERSITY in {scorer.name for scorer in self.scorers}):
            raise InvalidValueError(
                f"compare(diversity=..., draws={self.draws}): need at least 2 pictures a prompt to tell how unlike they "
                f"are, and no scorer called {_DIVERSITY!r}."
            )

    @property
    def draws(self) -> int:
        """Pictures a prompt."""
        return len(self.seeds) // len(self.prompts)

    @property
    def judges(self) -> dict[str, frozenset[str]]:
        """The rows there will be: names, and the names of the scorers each rests on."""
        known = {scorer.name: scorer.rests_on for scorer in self.scorers}
        return known if self.diversity is None else {**known, _DIVERSITY: frozenset()}

    def check_guardrails(self, guardrails: Sequence[Guardrail]) -> None:
        """Refuse guardrails that watch no row, or the same one."""
        watched = [guardrail.scorer for guardrail in guardrails]
        if not set(watched) <= set(self.judges) or len(set(watched)) < len(watched):
            raise InvalidValueError(
                f"compare received guardrails on {watched}. Expected different ones of {[*self.judges]}."
            )

    def draw(self, synthesizer: Synthesizer, name: str, *, progress: bool) -> Arm:
        """Draw all prompts with all seeds and score them; only the first pictures are kept."""
        count, scores = len(self.prompts), {name: [0.0] * len(self.seeds) for name in self.judges}
        if self.diversity is not None:
            scores[_DIVERSITY] = [0.0] * count
        kept: list[Image] = []
        with tqdm(total=len(self.seeds), desc=f"compare: {name}", unit="picture", disable=not progress) as bar:
            for start in range(0, count, self.batch_size):
                prompts = self.prompts[start : start + self.batch_size]
                drawn = []
                for first in range(start, len(self.seeds), count):
                    part = slice(first, first + len(prompts))
                    drawn.append(_drawn(synthesizer, prompts, self.seeds[part]))
                    for scorer in self.scorers:
                        scores[scorer.name][part] = scored(scorer, drawn[-1], prompts)
                    bar.update(len(prompts))
                if self.diversity is not None:
                    unlike = [diversity_of(self.diversity, images) for images in zip(*drawn, strict=True)]
                    scores[_DIVERSITY][start : start + len(prompts)] = unlike
                kept += drawn[0][: self.pictures - len(kept)]
        return Arm(
            drawn_by=repr(synthesizer),
            scores=MappingProxyType({scorer: tuple(numbers) for scorer, numbers in scores.items()}),
            pictures=tuple(kept),
        )


def rows_of(
    studio: Studio, before: Arm, after: Mapping[str, Arm], *, seed: int, filtered_by: Collection[str]
) -> tuple[ScoreRow, ...]:
    """One row a scorer and candidate, scorers first; p-values corrected over the scorers of each candidate."""
    count = len(studio.prompts)
    corrected: dict[tuple[str, str], float] = {}
    for name, arm in after.items():
        raw = [sign_flip(arm.by_prompt(one, count) - before.by_prompt(one, count), seed=seed) for one in studio.judges]
        corrected |= {(one, name): p_value for one, p_value in zip(studio.judges, holm(raw), strict=True)}
    rows = []
    for (scorer, rests_on), (name, arm) in product(studio.judges.items(), after.items()):
        base, enhanced = before.by_prompt(scorer, count), arm.by_prompt(scorer, count)
        interval = paired_bootstrap(enhanced - base, seed=seed)
        rows.append(
            ScoreRow(
                scorer=scorer,
                candidate=name,
                base=base.mean(),
                enhanced=enhanced.mean(),
                delta=(enhanced - base).mean(),
                ci_low=interval.low,
                ci_high=interval.high,
                win_rate=win_rate(enhanced - base),
                n=count,
                filtered_by=not rests_on.isdisjoint(filtered_by),
                tie_rate=tie_rate(enhanced - base),
                p_value=corrected[scorer, name],
            )
        )
    return tuple(rows)


def check(
    candidates: Mapping[str, Synthesizer],
    prompts: Sequence[str],
    scorers: Sequence[Scorer],
    filtered_by: Collection[str],
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
    if isinstance(filtered_by, str):
        raise InvalidValueError(
            f"compare(filtered_by={filtered_by!r}): expected names, like PairFilter.scorers, received one string."
        )


def _drawn(synthesizer: Synthesizer, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
    images = synthesizer.synthesize_batch([Plan(prompt) for prompt in prompts], seeds=seeds)
    if len(images) != len(prompts):
        name = type(synthesizer).__name__
        raise SeamError(f"{name}.synthesize_batch returned {len(images)} pictures for {len(prompts)} plans.")
    return images
