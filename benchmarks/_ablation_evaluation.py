"""The evaluation of the ablation: held-out prompts, drawn by every candidate with the same seeds."""

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
"""Draws one picture per prompt and seed."""
JUDGES: Mapping[str, aa.Scorer] = {"gain": Photometric(), "exposure": Exposure(), "sharpness": Sharpness()}


@dataclass(frozen=True)
class DrawnImages:
    """All pictures of a candidate."""

    images: Sequence[Image]
    """Of the held-out prompts."""
    again: Sequence[Image]
    """Of the first of them, with other seeds."""
    fine: Sequence[Image]
    """Of prompts that already contain every adjective a critic could suggest."""


@dataclass(frozen=True)
class HeldOutEvaluation:
    """The held-out prompts, and how a candidate's pictures are judged beside the base model's."""

    base: aa.Synthesizer
    prompts: Sequence[str]
    again: int
    """How many of the prompts are drawn twice, and how many prompts that need no change are drawn once."""

    def results(self, draw: Draw) -> dict[str, Any]:
        """The columns of a row, and ``gains``: one number per prompt.

        Gain is the rise of the mean of the four photometric scorers over the base model, with a 95% bootstrap interval
        over prompts; exposure and sharpness, which no pair is filtered by, are rises too. Alignment is the share of
        requested colours, shapes and places that are right, drift the mean squared change (pixels in [0, 1]) of pictures
        that needed none, diversity 1 less the structural similarity of two draws of a prompt.
        """
        candidate, before = self._draw_all(draw), self._before
        rises = {
            name: np.subtract(
                judge.score_batch(candidate.images, self.prompts), judge.score_batch(before.images, self.prompts)
            )
            for name, judge in JUDGES.items()
        }
        interval = paired_bootstrap(rises["gain"])
        redrawn = zip(candidate.images, candidate.again, strict=False)
        return {
            **{name: float(rise.mean()) for name, rise in rises.items()},
            "gain_low": interval.low,
            "gain_high": interval.high,
            "alignment": fmean(mean_score(scorer, candidate.images, self.prompts) for scorer in FAITHFUL),
            "drift": mean_squared_change(before.fine, candidate.fine),
            "diversity": fmean(diversity(aa.StructuralSimilarity(), pair) for pair in redrawn),
            "gains": rises["gain"].round(6).tolist(),
        }

    @cached_property
    def _before(self) -> DrawnImages:
        return self._draw_all(plain(self.base))

    def _draw_all(self, draw: Draw) -> DrawnImages:
        count, subset = len(self.prompts), self.prompts[: self.again]
        fine = [prompt + NEEDS_NOTHING for prompt in subset]
        return DrawnImages(
            images=draw_in_chunks(draw, self.prompts, range(count)),
            again=draw_in_chunks(draw, subset, range(count, count + len(subset))),
            fine=draw_in_chunks(draw, fine, range(len(subset))),
        )


def draw_in_chunks(draw: Draw, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
    """Draw in chunks, so that memory does not grow with the number of prompts."""
    starts = range(0, len(prompts), CHUNK)
    return [image for start in starts for image in draw(prompts[start : start + CHUNK], seeds[start : start + CHUNK])]


def plain(synthesizer: aa.Synthesizer) -> Draw:
    """Draw prompts as they are."""

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        return synthesizer.synthesize_batch([aa.Plan(prompt) for prompt in prompts], seeds=seeds)

    return draw


def with_all_words(synthesizer: aa.Synthesizer) -> Draw:
    """The control of a prompt rewriter: add all adjectives that help, unless the prompt has them."""

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        return plain(synthesizer)([prompt.removesuffix(NEEDS_NOTHING) + NEEDS_NOTHING for prompt in prompts], seeds)

    return draw


def with_critic_words(synthesizer: aa.Synthesizer) -> Draw:
    """Draw, critique the whole picture, and draw again with the critic's words added to the prompt."""
    return _redrawing(synthesizer, PhotometricCritic(max_regions=0), globally=True)


def with_regions(synthesizer: aa.Synthesizer) -> Draw:
    """The interaction itself, for every picture: draw, critique, redraw with regions."""
    return _redrawing(synthesizer, PhotometricCritic(), globally=False)


def _redrawing(synthesizer: aa.Synthesizer, critic: aa.Critic, *, globally: bool) -> Draw:
    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        answers = run_critic(critic, plain(synthesizer)(prompts, seeds), prompts)
        plans = [
            PLANNER.plan(prompt, answer) if isinstance(answer, aa.Critique) else aa.Plan(prompt)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        if globally:
            plans = [aa.Plan(plan.regions[0].prompt) if plan.regions else plan for plan in plans]
        return synthesizer.synthesize_batch(plans, seeds=seeds)

    return draw
