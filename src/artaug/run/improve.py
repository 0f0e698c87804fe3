"""The loop: draw, criticise, plan, redraw, judge. Every prompt ends as one attempt, with a reason."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TypeAlias

from PIL.Image import Image

from artaug.critique import Abstention, Critic, Critique, run_critic
from artaug.errors import InvalidValueError, PromptError
from artaug.filtering import BestOf, PairFilter, judge_pairs
from artaug.pairs import Attempt, Dropped, ImagePair, Kept, Skipped
from artaug.plan import Plan, RegionPlanner, run_planner
from artaug.synthesis import Synthesizer, draw, picture_seeds


@dataclass(frozen=True)
class StageEvent:
    """One stage of the loop has ended, for one chunk of prompts or one round."""

    stage: str
    """``draw``, ``critique``, ``redraw``, ``judge``; in `enhance` also ``train``, ``combine`` and ``measure``."""
    seconds: float
    """Wall-clock time it took."""


Timed: TypeAlias = Callable[[str], AbstractContextManager[None]]
"""Times a stage: ``with timed("draw"): ...``."""


def improve(  # noqa: PLR0913 - one verb over many nouns, as `enhance`
    prompts: Sequence[str],
    *,
    synthesizer: Synthesizer,
    critic: Critic,
    planner: RegionPlanner,
    keep: PairFilter,
    seed: int,
    candidates: BestOf | None = None,
    batch_size: int = 8,
    on_stage: Callable[[StageEvent], None] | None = None,
) -> Iterator[Attempt]:
    """Draw every prompt, have it criticised, redraw it by the critic's plan and judge the pair.

    Lazy: a chunk of ``batch_size`` prompts is worked on when its first attempt is asked for, one stage after the
    other, so that a GPU holds one model at a time. Every prompt ends as exactly one attempt, with a reason.

    Args:
        prompts: what to draw.
        synthesizer: draws before and after, with the same seed.
        critic: says what to improve; where it abstains, the prompt is skipped.
        planner: turns the critique into a plan; where the plan changes nothing, the prompt is skipped.
        keep: decides which pairs got better. Filters that compare pairs, like `TopFraction`, see one chunk at a time.
        seed: of the run; each prompt gets a seed of its own from it.
        candidates: tries every prompt several times and lets the best pair stand for it; once if not given.
        batch_size: prompts a chunk.
        on_stage: called after every stage of every chunk.

    Returns:
        An iterator over one `Kept`, `Dropped` or `Skipped` a prompt, in the order of the prompts.

    Raises:
        PromptError: at once, if there are no prompts or one is blank.
        CriticError: if the critic raises; a critic that cannot tell abstains.
        ContractError: if the synthesizer, critic, planner or filter returns something its seam does not allow.
    """
    _check_prompts(prompts, batch_size)
    asked, tries = len(prompts), 1 if candidates is None else candidates.count
    seeds = picture_seeds(seed, asked * tries)  # the first of every prompt, then the second of every prompt, ...
    crew = _Crew(synthesizer, critic, planner, keep, candidates, stopwatch(on_stage))
    return (
        attempt
        for start in range(0, asked, batch_size)
        for attempt in crew.work(
            prompts[start : start + batch_size],
            [
                seed
                for first in range(0, asked * tries, asked)
                for seed in seeds[first:][:asked][start : start + batch_size]
            ],
        )
    )


@dataclass(frozen=True)
class _Crew:
    """Who works on a chunk of prompts, stage after stage."""

    synthesizer: Synthesizer
    critic: Critic
    planner: RegionPlanner
    keep: PairFilter
    candidates: BestOf | None
    timed: Timed

    def work(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Attempt]:
        """End every prompt as one attempt; there are as many seeds a prompt as it has candidates."""
        outcomes = self._draft(list(prompts) * (len(seeds) // len(prompts)), seeds)
        with self.timed("judge"):
            if self.candidates is not None:
                outcomes = self.candidates.choose(outcomes, prompts=len(prompts))
            pairs = [outcome for outcome in outcomes if isinstance(outcome, ImagePair)]
            verdicts = judge_pairs(self.keep, pairs)
        if self.candidates is not None:
            verdicts = [self.candidates.annotate(verdict) for verdict in verdicts]
        endings = (Kept(*end) if end[1].keep else Dropped(*end) for end in zip(pairs, verdicts, strict=True))
        return [outcome if isinstance(outcome, Skipped) else next(endings) for outcome in outcomes]

    def _draft(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[ImagePair | Skipped]:
        """Go as far as a pair, where there is one to be had."""
        with self.timed("draw"):
            before = draw(self.synthesizer, [Plan(prompt) for prompt in prompts], seeds=seeds)
        with self.timed("critique"):
            answers = run_critic(self.critic, before, prompts)
        plans = [self._plan(*draft) for draft in zip(prompts, seeds, answers, strict=True)]
        with self.timed("redraw"):
            pairs = iter(self._redraw(prompts, seeds, before, plans))
        return [plan if isinstance(plan, Skipped) else next(pairs) for plan in plans]

    def _plan(self, prompt: str, seed: int, answer: Critique | Abstention) -> Plan | Skipped:
        if isinstance(answer, Abstention):
            return Skipped(prompt, seed, f"the critic abstained: {answer.reason}")
        plan = run_planner(self.planner, prompt, answer)
        if plan == Plan(prompt):
            asked = len(answer.suggestions)
            why = "the planner kept no suggestion" if asked else "the critic suggested nothing"
            return Skipped(prompt, seed, why, "plan")
        return plan

    def _redraw(
        self, prompts: Sequence[str], seeds: Sequence[int], before: Sequence[Image], plans: Sequence[Plan | Skipped]
    ) -> list[ImagePair]:
        drafts = [
            (prompt, seed, image, plan)
            for prompt, seed, image, plan in zip(prompts, seeds, before, plans, strict=True)
            if isinstance(plan, Plan)
        ]
        if not drafts:
            return []
        after = draw(self.synthesizer, [draft[3] for draft in drafts], seeds=[draft[1] for draft in drafts])
        return [
            ImagePair(prompt=prompt, seed=seed, before=image, after=redrawn, plan=plan)
            for (prompt, seed, image, plan), redrawn in zip(drafts, after, strict=True)
        ]


def _check_prompts(prompts: Sequence[object], batch_size: int) -> None:
    if isinstance(prompts, str):
        raise PromptError(f"expected a list of prompts, received one string: {prompts!r}. Write [{prompts!r}].")
    if not prompts:
        raise PromptError("there are no prompts: received an empty list, need at least one prompt.")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise PromptError(f"prompt number {index} is {prompt!r}: need a text that says what to draw.")
    if batch_size < 1:
        raise InvalidValueError(f"batch_size is {batch_size}: need at least 1 prompt a chunk.")


def stopwatch(on_stage: Callable[[StageEvent], None] | None) -> Timed:
    """Make a context manager that reports how long a stage took, unless the stage raises."""

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        if on_stage is not None:
            on_stage(StageEvent(stage, time.perf_counter() - begun))

    return timed
