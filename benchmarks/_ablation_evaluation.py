"""The evaluation of the ablation: held-out prompts, drawn by every candidate with the same seeds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL.Image import Image

import artaug as aa
from artaug.critics import PhotometricCritic
from artaug.critique import run_critic
from artaug.images.similarity import diversity
from artaug.scorers import Exposure, Photometric, Sharpness
from artaug.synthesis import picture_seeds
from benchmarks._ablation_pairs import CHUNK, PLANNER
from benchmarks.objectives import FAITHFUL, NEEDS_NOTHING, mean_squared_change

Draw = Callable[[Sequence[str], Sequence[int]], list[Image]]
"""Draws one picture per prompt and seed."""
RISES: Mapping[str, aa.Scorer] = {"gain": Photometric(), "exposure": Exposure(), "sharpness": Sharpness()}
"""Scorers whose rise over the base model's pictures is measured."""
Measures = Mapping[str, np.ndarray]
"""Of each measure one number per prompt."""


@dataclass(frozen=True)
class DrawnImages:
    """All pictures of a candidate."""

    first: Sequence[Image]
    """Of the held-out prompts."""
    second: Sequence[Image]
    """Of the same prompts, with other seeds."""
    fine: Sequence[Image]
    """Of the same prompts with every adjective that a critic could suggest."""


@dataclass(frozen=True)
class HeldOutEvaluation:
    """The held-out prompts, and how a candidate's pictures are judged beside the base model's."""

    base: aa.Synthesizer
    prompts: Sequence[str]
    seed: int = 0
    """Of the pictures."""

    @property
    def pictures(self) -> int:
        """How many a candidate draws."""
        return 3 * len(self.prompts)

    def measure(self, draw: Draw) -> Measures:
        """Judge a candidate's pictures.

        Gain is the rise of the mean of the four photometric scorers over the base model; exposure and sharpness, which no
        pair is filtered by, are rises too. Alignment is the share of requested colours, shapes and places that are right.
        All of them are means over two pictures of a prompt. Drift is the mean squared change (pixels in [0, 1]) of a picture
        that needed none, diversity 1 less the structural similarity of the two pictures.
        """
        return self._judge(self._draw_all(draw))

    @cached_property
    def before(self) -> Measures:
        """The measures of the base model: those of a LoRA at strength 0."""
        return self._judge(self._before)

    @cached_property
    def _before(self) -> DrawnImages:
        return self._draw_all(plain(self.base))

    def _judge(self, drawn: DrawnImages) -> Measures:
        return {
            **{name: self._score(scorer, drawn) - self._score(scorer, self._before) for name, scorer in RISES.items()},
            "alignment": np.mean([self._score(scorer, drawn) for scorer in FAITHFUL], axis=0),
            "drift": np.array(
                [mean_squared_change([old], [new]) for old, new in zip(self._before.fine, drawn.fine, strict=True)]
            ),
            "diversity": np.array(
                [diversity(aa.StructuralSimilarity(), images) for images in zip(drawn.first, drawn.second, strict=True)]
            ),
        }

    def _score(self, scorer: aa.Scorer, drawn: DrawnImages) -> np.ndarray:
        """One number per prompt: the mean over its two pictures."""
        scores = [scorer.score_batch(images, self.prompts) for images in (drawn.first, drawn.second)]
        means: np.ndarray = np.mean(scores, axis=0)
        return means

    def _draw_all(self, draw: Draw) -> DrawnImages:
        seeds = picture_seeds(self.seed, self.pictures)
        fine = [prompt + NEEDS_NOTHING for prompt in self.prompts]
        return DrawnImages(
            *(
                draw_in_chunks(draw, prompts, seeds[number::3])
                for number, prompts in enumerate((self.prompts, self.prompts, fine))
            )
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
    return _redrawing(synthesizer, PhotometricCritic(contrast=0.15, max_regions=0), globally=True)


def with_regions(synthesizer: aa.Synthesizer) -> Draw:
    """The interaction itself, for every picture: draw, critique, redraw with regions."""
    return _redrawing(synthesizer, PhotometricCritic(contrast=0.15), globally=False)


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
