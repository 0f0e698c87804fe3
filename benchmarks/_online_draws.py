"""Several draws of a prompt, from a base model that sometimes draws better than it usually does, and what to learn from them."""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

import artaug as aa
from artaug import playground
from artaug.pairwise import judge_images
from artaug.playground.world import ADJECTIVES
from artaug.recipes import draw_pairs, normalized_rewards
from artaug.synthesis import picture_seeds
from benchmarks._ablation_evaluation import draw_in_chunks, plain
from benchmarks._ablation_pairs import SELECTED_BY
from benchmarks.objectives import FAITHFUL

Array = NDArray[np.float64]


def drawn_as(prompt: str, *, spread: float, key: str) -> str:
    """What is drawn for a prompt: it gets each of the adjectives with the chance ``spread``, by a key of its own.

    What is learned is the prompt alone, so that it is as if the model sometimes drew better pictures of it.
    """
    rng = random.Random(f"{key}: {prompt}")
    return ", ".join([prompt, *(word for word in ADJECTIVES if rng.random() < spread)])


def as_learned(pair: aa.ImagePair) -> aa.ImagePair:
    """A pair without the adjectives that its prompt was drawn with."""
    return replace(pair, prompt=pair.prompt.partition(",")[0])


@dataclass(frozen=True, kw_only=True, eq=False)
class Draws:
    """Several pictures of each prompt, all from seeds of their own."""

    prompts: Sequence[str]
    images: Sequence[Sequence[Image]]
    """Of each prompt, as many."""

    @classmethod
    def drawn(cls, synthesizer: aa.Synthesizer, *, pictures: int, of_each: int, spread: float, seed: int) -> "Draws":
        """Draw a number of pictures in all, ``of_each`` prompt: the fewer of each, the more prompts."""
        prompts = playground.prompts(pictures // of_each, seed=seed)
        words = [
            drawn_as(prompt, spread=spread, key=f"{seed} {number}") for prompt in prompts for number in range(of_each)
        ]
        images = draw_in_chunks(plain(synthesizer), words, picture_seeds(seed, len(words)))
        starts = range(0, len(images), of_each)
        return cls(prompts=prompts, images=[images[start : start + of_each] for start in starts])

    @property
    def pictures(self) -> int:
        """How many pictures were drawn."""
        return sum(map(len, self.images))

    def scores(self, scorer: aa.Scorer) -> Array:
        """A score of each picture: (prompts, draws)."""
        flat = [image for images in self.images for image in images]
        prompts = [prompt for prompt, images in zip(self.prompts, self.images, strict=True) for _ in range(len(images))]
        return np.reshape(np.array(scorer.score_batch(flat, prompts)), (len(self.prompts), -1))

    @cached_property
    def right(self) -> NDArray[np.bool_]:
        """Which pictures show all that their prompts ask for: (prompts, draws)."""
        right: NDArray[np.bool_] = np.min([self.scores(accuracy) for accuracy in FAITHFUL], axis=0) == 1
        return right


class Chooser(ABC):
    """What says how good draws of one prompt are beside each other."""

    @abstractmethod
    def rewards(self, draws: Draws) -> Array:
        """A reward of each picture, in [0, 1], a half where it is as good as the others: (prompts, draws)."""


@dataclass(frozen=True)
class ByScorer(Chooser):
    """A scorer, normalized as DiffusionNFT does."""

    scorer: aa.Scorer = SELECTED_BY

    def rewards(self, draws: Draws) -> Array:
        return normalized_rewards(draws.scores(self.scorer))


@dataclass(frozen=True)
class ByJudge(Chooser):
    """A judge of two pictures: the reward of one is how often it is preferred to the others, ties as half."""

    judge: aa.PairwiseJudge

    def rewards(self, draws: Draws) -> Array:
        count = len(draws.images[0])
        won = np.zeros((len(draws.prompts), count))
        for one, other in combinations(range(count), 2):
            first, second = ([images[number] for images in draws.images] for number in (one, other))
            for row, judgment in enumerate(judge_images(self.judge, first, second, draws.prompts)):
                score = judgment.score if isinstance(judgment, aa.Preference) else 0.5
                won[row, one] += score
                won[row, other] += 1 - score
        return won / max(count - 1, 1)


@dataclass(frozen=True)
class NoticeableDifference(aa.PairwiseJudge):
    """A judge by a rule: the picture that a scorer puts ahead, and a tie where the two are too close to tell apart."""

    scorer: aa.Scorer = SELECTED_BY
    least: float = 0.02
    """The least difference that is noticed; that of the loop's filter, on the mean of its two scorers."""

    def prefer(self, first: Image, second: Image, prompt: str) -> float:
        one, other = self.scorer.score_batch([first, second], [prompt, prompt])
        return 0.5 if abs(one - other) < self.least else float(one > other)


def extremes(draws: Draws, chooser: Chooser) -> list[aa.ImagePair]:
    """Of every prompt the worst draw as before and the best one as after.

    The best one is the best of those that show what was requested; a prompt without one, or whose best is no better than its
    worst, has no pair. Fine-tuning on *after* is DreamSync (arXiv 2311.17946).
    """
    pairs = []
    for prompt, images, rewards, right in zip(
        draws.prompts, draws.images, chooser.rewards(draws), draws.right, strict=True
    ):
        worst, best = int(rewards.argmin()), int(np.where(right, rewards, -1).argmax())
        if right[best] and rewards[best] > rewards[worst]:
            pairs.append(aa.ImagePair(prompt=prompt, before=images[worst], after=images[best]))
    return pairs


def packed(draws: Draws, chooser: Chooser) -> list[aa.ImagePair]:
    """All draws, two by two, with their rewards; a picture that does not show what was requested has none.

    A prompt with an odd number of draws has its last two in two pairs with others: the last but one is in both.
    """
    rewards = np.where(draws.right, chooser.rewards(draws), 0.0)
    groups = zip(draws.prompts, draws.images, rewards.tolist(), strict=True)
    return [pair for prompt, images, mine in groups for pair in draw_pairs(prompt, images, mine)]


def unselected(draws: Draws) -> list[aa.ImagePair]:
    """Every draw that shows what was requested, as a pair in which nothing changed: to fine-tune on, without any choice."""
    return [
        aa.ImagePair.unchanged(image, prompt=prompt)
        for prompt, images, right in zip(draws.prompts, draws.images, draws.right, strict=True)
        for image, is_right in zip(images, right, strict=True)
        if is_right
    ]
