"""The loop: draw, critique, plan, redraw, judge. Every prompt ends as one attempt, with a reason."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TypeAlias

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


StageTimer: TypeAlias = Callable[[str], AbstractContextManager[None]]
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
    """Draw every prompt, critique the picture, redraw it by the critic's plan and judge the pair.

    Lazy: a chunk of ``batch_size`` prompts runs when its first attempt is requested, one stage after the other, so
    that a GPU holds one model at a time. Every prompt ends as exactly one attempt, with a reason.

    Args:
        prompts: what to draw.
        synthesizer: draws before and after, with the same seed.
        critic: says what to improve; where it abstains, the prompt is skipped.
        planner: turns the critique into a plan; where the plan changes nothing, the prompt is skipped.
        keep: decides which pairs got better. Filters that compare pairs, like `TopFraction`, see one chunk at a time.
        seed: of the run; each prompt gets a seed of its own from it.
        candidates: tries every prompt several times and keeps the best pair of it; once if not given.
        batch_size: prompts in a chunk.
        on_stage: called after every stage of every chunk.

    Returns:
        An iterator over one `Kept`, `Dropped` or `Skipped` for each prompt, in the order of the prompts.

    Raises:
        PromptError: at once, if there are no prompts or one is blank.
        CriticError: if the critic raises; a critic that cannot tell abstains.
        ContractError: if the synthesizer, critic, planner or filter returns something its seam does not allow.
    """
    check_prompts(prompts)
    if batch_size < 1:
        raise InvalidValueError(f"batch_size is {batch_size}: need at least 1 prompt in a chunk.")
    count = 1 if candidates is None else candidates.count
    # One row of seeds for the first candidate of every prompt, one for the second, ... The first row is the whole of
    # what a run without candidates draws with, and rows are cut into chunks as the prompts are.
    seeds = picture_seeds(seed, len(prompts) * count)
    rows = [seeds[first : first + len(prompts)] for first in range(0, len(seeds), len(prompts))]
    stages = _Stages(synthesizer, critic, planner, keep, candidates, stage_timer(on_stage))
    chunks = (slice(start, start + batch_size) for start in range(0, len(prompts), batch_size))
    return (attempt for chunk in chunks for attempt in stages.run_chunk(prompts[chunk], [row[chunk] for row in rows]))


@dataclass(frozen=True)
class _Stages:
    """The stages that a chunk of prompts goes through."""

    synthesizer: Synthesizer
    critic: Critic
    planner: RegionPlanner
    keep: PairFilter
    candidates: BestOf | None
    timed: StageTimer

    def run_chunk(self, prompts: Sequence[str], rows: Sequence[Sequence[int]]) -> list[Attempt]:
        """Bring each prompt to its one attempt; ``rows`` holds a seed for every prompt, for every candidate."""
        outcomes = self._make_pairs(list(prompts) * len(rows), [seed for row in rows for seed in row])
        with self.timed("judge"):
            if self.candidates is not None:
                outcomes = self.candidates.choose(outcomes, prompts=len(prompts))
            pairs = [outcome for outcome in outcomes if isinstance(outcome, ImagePair)]
            verdicts = judge_pairs(self.keep, pairs)
        if self.candidates is not None:
            verdicts = [self.candidates.annotate(verdict) for verdict in verdicts]
        judged = (
            Kept(pair, verdict) if verdict.keep else Dropped(pair, verdict)
            for pair, verdict in zip(pairs, verdicts, strict=True)
        )
        return [outcome if isinstance(outcome, Skipped) else next(judged) for outcome in outcomes]

    def _make_pairs(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[ImagePair | Skipped]:
        """Draw, critique, plan and redraw, each stage over all prompts: a pair for each, or why there is none."""
        with self.timed("draw"):
            before = draw(self.synthesizer, [Plan(prompt) for prompt in prompts], seeds=seeds)
        with self.timed("critique"):
            answers = run_critic(self.critic, before, prompts)
        plans = [self._plan(*planned) for planned in zip(prompts, seeds, answers, strict=True)]
        with self.timed("redraw"):
            changes = [(plan, seed) for plan, seed in zip(plans, seeds, strict=True) if isinstance(plan, Plan)]
            after = iter(draw(self.synthesizer, [plan for plan, _ in changes], seeds=[seed for _, seed in changes]))
            return [
                plan
                if isinstance(plan, Skipped)
                else ImagePair(prompt=prompt, seed=seed, before=image, after=next(after), plan=plan)
                for prompt, seed, image, plan in zip(prompts, seeds, before, plans, strict=True)
            ]

    def _plan(self, prompt: str, seed: int, answer: Critique | Abstention) -> Plan | Skipped:
        if isinstance(answer, Abstention):
            return Skipped(prompt, seed, f"the critic abstained: {answer.reason}", "critique")
        plan = run_planner(self.planner, prompt, answer)
        if plan == Plan(prompt):
            why = "the planner kept no suggestion" if answer.suggestions else "the critic suggested nothing"
            return Skipped(prompt, seed, why, "plan")
        return plan


def check_prompts(prompts: Sequence[object]) -> None:
    """Refuse what is no list of prompts.

    Raises:
        PromptError: if there are none, one is blank, or it is one string.
    """
    if isinstance(prompts, str):
        raise PromptError(f"expected a list of prompts, received one string: {prompts!r}. Write [{prompts!r}].")
    if not prompts:
        raise PromptError("there are no prompts: received an empty list, need at least one prompt.")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise PromptError(f"prompt number {index} is {prompt!r}: need a text that says what to draw.")


def stage_timer(on_stage: Callable[[StageEvent], None] | None) -> StageTimer:
    """Make a context manager that reports how long a stage took, unless the stage raises."""

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if on_stage is not None:
            on_stage(StageEvent(stage, time.perf_counter() - start))

    return timed
