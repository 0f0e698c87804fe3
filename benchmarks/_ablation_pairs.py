"""The pairs of the loop's interaction, and their cost."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import islice
from operator import add, and_
from time import perf_counter

from PIL.Image import Image

import artaug as aa
from artaug import playground
from artaug.diffusion import DiffusersSynthesizer
from artaug.scorers import Chroma, Contrast, MeanOf
from benchmarks.objectives import FAITHFUL

KEEP: aa.PairFilter = reduce(
    and_,
    [aa.Floor(accuracy, at_least=1.0) for accuracy in FAITHFUL],
    aa.Gain(Chroma(), at_least=0.03) & aa.Gain(Contrast(), at_least=0.01),
)
"""The filter of the loop's pairs, as in the quickstart."""
SELECTED_BY = MeanOf((Chroma(), Contrast()))
"""The scorer of selections: the same ones."""
PLANNER = aa.GreedyPlanner(max_regions=3)
MOST_PROMPTS = 1280
CHUNK = 32


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of some pairs or of a training."""

    images: int = 0
    critic_calls: int = 0
    passes: int = 0
    """Denoiser calls, counted per picture; a backward pass counts as two."""
    seconds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            images=self.images + other.images,
            critic_calls=self.critic_calls + other.critic_calls,
            passes=self.passes + other.passes,
            seconds=self.seconds + other.seconds,
        )


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """Pairs to learn from, how many prompts were drawn for them, and what that cost."""

    pairs: Sequence[aa.ImagePair]
    prompts: int
    cost: Cost


@dataclass(frozen=True, kw_only=True)
class NoisyCritic(aa.Critic):
    """A critic whose boxes are wrong with a given chance: replaced by a box of random place and size."""

    critic: aa.Critic
    wrong: float
    """The chance, in [0, 1]."""
    seed: int

    def critique(self, image: Image, prompt: str) -> aa.Critique | aa.Abstention:
        answer = self.critic.critique(image, prompt)
        if isinstance(answer, aa.Abstention):
            return answer
        rng = random.Random(f"{self.seed}: {prompt}")
        moved = tuple(
            replace(suggestion, box=_random_box(rng)) if rng.random() < self.wrong else suggestion
            for suggestion in answer.suggestions
        )
        return replace(answer, suggestions=moved)


def _random_box(rng: random.Random) -> aa.Box:
    """A box from a fifth to three fifths of the picture's side wide and high, as regions of the loop are."""
    wide, high = (rng.uniform(0.2, 0.6) for _ in range(2))
    left, top = rng.uniform(0, 1 - wide), rng.uniform(0, 1 - high)
    return aa.Box(left, top, left + wide, top + high)


@dataclass(kw_only=True)
class Interaction:
    """The loop: attempts are made on demand and shared by all cells."""

    synthesizer: DiffusersSynthesizer
    critic: aa.Critic
    sampling_steps: int
    seed: int
    prompts: Sequence[str] | None = None
    """None: those of the seed."""
    attempts: list[tuple[aa.Attempt, Cost]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.more = aa.improve(
            playground.prompts(MOST_PROMPTS, seed=self.seed) if self.prompts is None else self.prompts,
            synthesizer=self.synthesizer,
            critic=self.critic,
            planner=PLANNER,
            keep=KEEP,
            seed=self.seed,
            batch_size=CHUNK,
            progress=False,
        )

    def kept(self, count: int, *, at_most: int = MOST_PROMPTS) -> PairSet:
        """The first pairs that the filter keeps: fewer, if it keeps fewer of ``at_most`` prompts."""
        pairs: list[aa.ImagePair] = []
        for number in range(at_most):
            if len(pairs) == count:
                return self._pair_set(pairs, number)
            attempt = self._attempt(number)
            pairs += [attempt.pair] if isinstance(attempt, aa.Kept) else []
        return self._pair_set(pairs, at_most)

    def within(self, pictures: int) -> PairSet:
        """All pairs that the filter keeps of the first prompts, as many as can be drawn and redrawn with so many pictures."""
        pairs: list[aa.ImagePair] = []
        drawn = number = 0
        while True:
            attempt = self._attempt(number)
            drawn += self.attempts[number][1].images
            if drawn > pictures:
                return self._pair_set(pairs, number)
            pairs += [attempt.pair] if isinstance(attempt, aa.Kept) else []
            number += 1

    def best(self, count: int, *, of: float) -> PairSet:
        """The best ``count`` pairs of ``count / of``, with no other filter; if ``of`` is 1, all of them in their order."""
        candidates = round(count / of)
        pairs: list[aa.ImagePair] = []
        number = 0
        while len(pairs) < candidates:
            attempt = self._attempt(number)
            pairs += [] if isinstance(attempt, aa.Skipped) else [attempt.pair]
            number += 1
        verdicts = aa.TopFraction(SELECTED_BY, of).judge_batch(pairs)
        return self._pair_set([pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.keep], number)

    def _attempt(self, number: int) -> aa.Attempt:
        if number == len(self.attempts):
            start = perf_counter()
            chunk = list(islice(self.more, CHUNK))
            seconds = (perf_counter() - start) / len(chunk)
            self.attempts += [(attempt, self._cost(attempt, seconds)) for attempt in chunk]
        return self.attempts[number][0]

    def _pair_set(self, pairs: Sequence[aa.ImagePair], prompts: int) -> PairSet:
        return PairSet(pairs=pairs, prompts=prompts, cost=_sum(cost for _, cost in self.attempts[:prompts]))

    def _cost(self, attempt: aa.Attempt, seconds: float) -> Cost:
        """A picture; and if it was redrawn, another: `OutputMix` has a pass of its own for every region at every step."""
        redrawn = []
        if not isinstance(attempt, aa.Skipped):
            mixed = isinstance(self.synthesizer.guide, aa.OutputMix)
            redrawn = [1 + (len(attempt.pair.plan.regions) if mixed else 0)]
        passes = self.sampling_steps * sum([1, *redrawn])
        return Cost(images=1 + len(redrawn), critic_calls=1, passes=passes, seconds=seconds)


def _sum(costs: Iterable[Cost]) -> Cost:
    return reduce(add, costs, Cost())
