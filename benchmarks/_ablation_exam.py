"""One exam for everything the ablation compares: held-out prompts, drawn by whoever sits it with the same seeds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

import numpy as np
from PIL.Image import Image

import artaug as aa
from artaug.critics import PhotometricCritic
from artaug.critique import run_critic
from artaug.evaluation.statistics import paired_bootstrap
from artaug.images.similarity import diversity
from artaug.scorers import Exposure, Photometric, Sharpness
from benchmarks._ablation_pairs import CHUNK, PLANNER
from benchmarks.objectives import FAITHFUL, NEEDS_NOTHING, mean_score, mean_squared_change

Draw = Callable[[Sequence[str], Sequence[int]], list[Image]]
"""Draws one picture a prompt and seed."""
JUDGES: Mapping[str, aa.Scorer] = {"gain": Photometric(), "exposure": Exposure(), "sharpness": Sharpness()}


@dataclass(frozen=True)
class Sitting:
    """All that a candidate drew."""

    images: Sequence[Image]
    """Of the held-out prompts."""
    again: Sequence[Image]
    """Of the first of them, with other seeds."""
    fine: Sequence[Image]
    """Of prompts that already say everything a critic could ask for."""


@dataclass(frozen=True)
class Exam:
    """What to draw, and how it is judged beside what the base model draws."""

    base: aa.Synthesizer
    prompts: Sequence[str]
    again: int
    """How many of the prompts are drawn twice, and as many fine ones once."""

    def results(self, draw: Draw) -> dict[str, Any]:
        """The columns of a row, and ``gains``: one number a prompt.

        Gain is the rise of the mean of the four photometric scorers over the base model, with a 95% bootstrap interval
        over prompts; exposure and sharpness, which no pair is filtered by, are rises too. Alignment is the share of
        asked colours, shapes and places that are right, drift the mean squared change (pixels in [0, 1]) of pictures
        that needed none, diversity 1 less the structural similarity of two draws of a prompt.
        """
        mine, before = self._sat(draw), self._before
        rises = {
            name: np.subtract(
                judge.score_batch(mine.images, self.prompts), judge.score_batch(before.images, self.prompts)
            )
            for name, judge in JUDGES.items()
        }
        within = paired_bootstrap(rises["gain"])
        twice = zip(mine.images, mine.again, strict=False)
        return {
            **{name: float(rise.mean()) for name, rise in rises.items()},
            "gain_low": within.low,
            "gain_high": within.high,
            "alignment": fmean(mean_score(one, mine.images, self.prompts) for one in FAITHFUL),
            "drift": mean_squared_change(before.fine, mine.fine),
            "diversity": fmean(diversity(aa.StructuralSimilarity(), pair) for pair in twice),
            "gains": rises["gain"].round(6).tolist(),
        }

    @cached_property
    def _before(self) -> Sitting:
        return self._sat(plainly(self.base))

    def _sat(self, draw: Draw) -> Sitting:
        count, some = len(self.prompts), self.prompts[: self.again]
        fine = [prompt + NEEDS_NOTHING for prompt in some]
        return Sitting(
            images=in_chunks(draw, self.prompts, range(count)),
            again=in_chunks(draw, some, range(count, count + len(some))),
            fine=in_chunks(draw, fine, range(len(some))),
        )


def in_chunks(draw: Draw, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
    """Draw so many at once that memory does not grow with the number of prompts."""
    starts = range(0, len(prompts), CHUNK)
    return [one for at in starts for one in draw(prompts[at : at + CHUNK], seeds[at : at + CHUNK])]


def plainly(synthesizer: aa.Synthesizer) -> Draw:
    """Draw prompts as they are."""

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        return synthesizer.synthesize_batch([aa.Plan(prompt) for prompt in prompts], seeds=seeds)

    return draw


def with_all_words(synthesizer: aa.Synthesizer) -> Draw:
    """What a prompt rewriter would do: add every word that helps, unless it is there already."""

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        return plainly(synthesizer)([prompt.removesuffix(NEEDS_NOTHING) + NEEDS_NOTHING for prompt in prompts], seeds)

    return draw


def with_asked_words(synthesizer: aa.Synthesizer) -> Draw:
    """Draw, ask a critic about the whole picture, and draw again with its words added to the prompt."""
    return _redrawing(synthesizer, PhotometricCritic(max_regions=0), globally=True)


def with_regions(synthesizer: aa.Synthesizer) -> Draw:
    """The interaction itself, at every picture: draw, ask, redraw with regions."""
    return _redrawing(synthesizer, PhotometricCritic(), globally=False)


def _redrawing(synthesizer: aa.Synthesizer, critic: aa.Critic, *, globally: bool) -> Draw:
    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        answers = run_critic(critic, plainly(synthesizer)(prompts, seeds), prompts)
        plans = [
            PLANNER.plan(prompt, answer) if isinstance(answer, aa.Critique) else aa.Plan(prompt)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        if globally:
            plans = [aa.Plan(plan.regions[0].prompt) if plan.regions else plan for plan in plans]
        return synthesizer.synthesize_batch(plans, seeds=seeds)

    return draw
