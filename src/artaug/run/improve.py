"""The loop: draw, critique, plan, redraw, judge. Every prompt ends as one attempt, with a reason."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

from artaug.critique import Abstention, Critic, Critique, run_critic
from artaug.errors import CriticError
from artaug.filtering import BestOf, PairFilter, judge_pairs
from artaug.pairs import Attempt, Dropped, ImagePair, Kept, Skipped
from artaug.plan import Plan, RegionPlanner, run_planner
from artaug.run.checking import Check, check_run
from artaug.run.parts import LoopParts
from artaug.synthesis import Synthesizer, draw, picture_seeds

_MAX_SILENCE_S, _MANY_PICTURES = 600.0, 8
"""A critic that has not answered for so long, at so many pictures in a row, stops the run: the prompts to come would all be
drawn for nothing."""


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
    check: Check = "scorers",
) -> Iterator[Attempt]:
    """Draw every prompt, critique the picture, redraw it by the critic's plan and judge the pair.

    Lazy: a chunk of ``batch_size`` prompts runs when its first attempt is requested, one stage after the other, so
    that a GPU holds one model at a time. Every prompt ends as exactly one attempt, with a reason.

    Args:
        prompts: what to draw.
        synthesizer: draws before and after, with the same seed.
        critic: says what to improve; where it abstains, the prompt is skipped. Where that is transient, as after a timeout,
            the prompt is put off: drawn and asked again at the end, in a chunk of its own, and skipped if that fails too.
        planner: turns the critique into a plan; where the plan changes nothing, the prompt is skipped.
        keep: decides which pairs got better. Filters that compare pairs, like `TopFraction`, see one chunk at a time.
        seed: of the run; each prompt gets a seed of its own from it.
        candidates: tries every prompt several times and keeps the best pair of it; once if not given.
        batch_size: prompts in a chunk.
        on_stage: called after every stage of every chunk.
        check: how far to check before the first picture. ``"arguments"``: that all is of the right type and fits together;
            ``"scorers"``: also that the filter and every scorer can judge a plain grey picture; ``"everything"``: also
            that the critic answers, which may cost, as that of a server does.

    Returns:
        An iterator over one `Kept`, `Dropped` or `Skipped` for each prompt, in the order of the prompts; those that were
        put off come last.

    Raises:
        PromptError: at once, if there are no prompts or one is blank.
        CriticError: if the critic raises (one that cannot tell abstains), or has had transient faults only, for 10 minutes
            and at 8 pictures or more.
        GuideError: at once, if the planner makes regions and the synthesizer has no guide.
        InvalidValueError: at once, if an argument is of another type or out of its range; with a line for each thing if
            several are wrong.
        ContractError: if the synthesizer, critic, planner or filter returns something its seam does not allow.
    """
    parts = LoopParts(synthesizer=synthesizer, critic=critic, planner=planner, keep=keep, candidates=candidates)
    check_run("improve", prompts, parts, seed=seed, batch_size=batch_size, on_stage=on_stage, check=check)
    count = 1 if candidates is None else candidates.count
    # One row of seeds for the first candidate of every prompt, one for the second, ... The first row is the whole of
    # what a run without candidates draws with, and rows are cut into chunks as the prompts are.
    seeds = picture_seeds(seed, len(prompts) * count)
    rows = [seeds[first : first + len(prompts)] for first in range(0, len(seeds), len(prompts))]
    stages = _Stages(parts, stage_timer(on_stage))
    return stages.run(prompts, rows, batch_size=batch_size)


@dataclass
class _Silence:
    """How long, and at how many pictures in a row, a critic has had transient faults only."""

    since_s: float = 0.0
    pictures: int = 0
    reason: str = ""

    def note(self, answers: Sequence[Critique | Abstention], *, start_s: float) -> None:
        """Note the answers of a call that began at ``start_s``."""
        faults = [answer.reason for answer in answers if isinstance(answer, Abstention) and answer.transient]
        if len(faults) < len(answers):
            self.pictures = 0
            return
        if not self.pictures:
            self.since_s = start_s
        self.pictures += len(faults)
        self.reason = faults[-1]

    @property
    def is_long(self) -> bool:
        """Whether the critic, or its server, is probably down: one picture alone may be what it fails at."""
        return self.pictures >= _MANY_PICTURES and time.monotonic() - self.since_s >= _MAX_SILENCE_S

    def error(self, critic: Critic) -> CriticError:
        """The error that ends the run."""
        return CriticError(
            f"{type(critic).__name__} has not answered for {(time.monotonic() - self.since_s) / 60:.0f} minutes, at "
            f"{self.pictures} pictures in a row; the last time, {self.reason}. Make sure that its server runs, then run the "
            "same call to go on: what artaug.critics.Cached has stored is not asked again."
        )


@dataclass(frozen=True)
class _Stages:
    """The stages that a round of prompts goes through, chunk by chunk."""

    parts: LoopParts
    timed: StageTimer
    silence: _Silence = field(default_factory=_Silence)

    def run(self, prompts: Sequence[str], rows: Sequence[Sequence[int]], *, batch_size: int) -> Iterator[Attempt]:
        """Bring each prompt to its one attempt; those put off come last."""

        def run_chunk(indices: Sequence[int]) -> list[Attempt]:
            return self.run_chunk([prompts[i] for i in indices], [[row[i] for i in indices] for row in rows])

        put_off: dict[int, Skipped] = {}
        for indices in _chunks(range(len(prompts)), batch_size):
            for index, attempt in zip(indices, run_chunk(indices), strict=True):
                if isinstance(attempt, Skipped) and attempt.transient:
                    put_off[index] = attempt
                else:
                    yield attempt
            if self.silence.is_long:
                raise self.silence.error(self.parts.critic)
        for indices in _chunks(list(put_off), batch_size):
            # After a long silence here, the round is complete but for these: they are left as they are.
            yield from (put_off[i] for i in indices) if self.silence.is_long else run_chunk(indices)

    def run_chunk(self, prompts: Sequence[str], rows: Sequence[Sequence[int]]) -> list[Attempt]:
        """Bring each prompt to its one attempt; ``rows`` holds a seed for every prompt, for every candidate."""
        outcomes = self._make_pairs(list(prompts) * len(rows), [seed for row in rows for seed in row])
        # A prompt waits for all its candidates: the best of those that happened to be answered is not the best of all.
        waiting = {
            index % len(prompts): outcome
            for index, outcome in enumerate(outcomes)
            if isinstance(outcome, Skipped) and outcome.transient
        }
        outcomes = [waiting.get(index % len(prompts), outcome) for index, outcome in enumerate(outcomes)]
        with self.timed("judge"):
            if self.parts.candidates is not None:
                outcomes = self.parts.candidates.choose(outcomes, prompts=len(prompts))
            pairs = [outcome for outcome in outcomes if isinstance(outcome, ImagePair)]
            verdicts = judge_pairs(self.parts.keep, pairs)
        if self.parts.candidates is not None:
            verdicts = [self.parts.candidates.annotate(verdict) for verdict in verdicts]
        judged = (
            Kept(pair, verdict) if verdict.keep else Dropped(pair, verdict)
            for pair, verdict in zip(pairs, verdicts, strict=True)
        )
        return [outcome if isinstance(outcome, Skipped) else next(judged) for outcome in outcomes]

    def _make_pairs(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[ImagePair | Skipped]:
        """Draw, critique, plan and redraw, each stage over all prompts: a pair for each, or why there is none."""
        with self.timed("draw"):
            before = draw(self.parts.synthesizer, [Plan(prompt) for prompt in prompts], seeds=seeds)
        with self.timed("critique"):
            start_s = time.monotonic()
            answers = run_critic(self.parts.critic, before, prompts)
            self.silence.note(answers, start_s=start_s)
        plans = [self._plan(*planned) for planned in zip(prompts, seeds, answers, strict=True)]
        with self.timed("redraw"):
            changes = [(plan, seed) for plan, seed in zip(plans, seeds, strict=True) if isinstance(plan, Plan)]
            after = iter(
                draw(self.parts.synthesizer, [plan for plan, _ in changes], seeds=[seed for _, seed in changes])
            )
            return [
                plan
                if isinstance(plan, Skipped)
                else ImagePair(prompt=prompt, seed=seed, before=image, after=next(after), plan=plan)
                for prompt, seed, image, plan in zip(prompts, seeds, before, plans, strict=True)
            ]

    def _plan(self, prompt: str, seed: int, answer: Critique | Abstention) -> Plan | Skipped:
        if isinstance(answer, Abstention):
            return Skipped(prompt, seed, f"the critic abstained: {answer.reason}", "critique", answer.transient)
        plan = run_planner(self.parts.planner, prompt, answer)
        if plan == Plan(prompt):
            why = "the planner kept no suggestion" if answer.suggestions else "the critic suggested nothing"
            return Skipped(prompt, seed, why, "plan")
        return plan


def _chunks(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (indices[start : start + size] for start in range(0, len(indices), size))


def stage_timer(on_stage: Callable[[StageEvent], None] | None) -> StageTimer:
    """Make a context manager that reports how long a stage took, unless the stage raises."""

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if on_stage is not None:
            on_stage(StageEvent(stage, time.perf_counter() - start))

    return timed
