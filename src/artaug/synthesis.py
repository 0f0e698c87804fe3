"""The seam that draws pictures from plans, and the seeds of a run's pictures."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import numpy as np
from PIL.Image import Image

from artaug._internal.arguments import check_count
from artaug._internal.contracts import check_batch
from artaug.errors import ModelError
from artaug.lora.lora import LoRA
from artaug.plan import Plan


class Synthesizer(ABC):
    """Draws pictures from plans. The same plan and seed give the same picture, whatever was drawn before."""

    @property
    def draws_regions(self) -> bool:
        """Whether it draws plans with regions; a run with a planner that makes regions asks before it begins."""
        return True

    @property
    def picture_size(self) -> tuple[int, int]:
        """Width and height in pixels of what it draws, for the stand-ins of a check before a run; 64 by 64 if not said."""
        return 64, 64

    @abstractmethod
    def synthesize(self, plan: Plan, *, seed: int) -> Image:
        """Draw one picture."""

    def synthesize_batch(self, plans: Sequence[Plan], *, seeds: Sequence[int]) -> list[Image]:
        """Draw many pictures, one for each plan and seed. Override it where a batch is faster than a loop."""
        return [self.synthesize(plan, seed=seed) for plan, seed in zip(plans, seeds, strict=True)]

    def with_lora(self, lora: LoRA, *, scale: float = 1.0) -> Self:
        """A synthesizer that draws with ``lora`` on top, with the same weights in memory; this one is not changed.

        Raises:
            ModelError: if this synthesizer cannot take a LoRA.
            LoRAMismatchError: if the LoRA names layers the model does not have.
        """
        raise ModelError(f"{type(self).__name__} cannot draw with a LoRA: it does not override with_lora.")


def draw(synthesizer: Synthesizer, plans: Sequence[Plan], *, seeds: Sequence[int]) -> list[Image]:
    """Draw pictures and check that there is one for each plan; without plans, the synthesizer is not called.

    Raises:
        ContractError: if the synthesizer returned too few or too many pictures, or something that is not a PIL image.
    """
    if not plans:
        return []
    return check_batch(
        type(synthesizer).__name__,
        "synthesize_batch",
        synthesizer.synthesize_batch(plans, seeds=seeds),
        of=Image,
        count=len(plans),
        per="plan",
        prompts=[plan.prompt for plan in plans],
    )


def picture_seeds(seed: int, count: int) -> list[int]:
    """Seeds for ``count`` pictures of a run: the same for the same ``seed``, unrelated to those of any other.

    >>> from artaug.synthesis import picture_seeds
    >>> picture_seeds(0, 3) == picture_seeds(0, 5)[:3]
    True
    """
    check_count("picture_seeds", "seed", seed, least=0)
    return [int(word) for word in np.random.SeedSequence(seed).generate_state(count)]


def held_out_seed(seed: int) -> int:
    """A seed for pictures that are only measured, unrelated to those that a run with ``seed`` learns from.

    `picture_seeds` of one seed are the same words wherever they are used: a model would be judged on the very noise that
    it was trained on.

    >>> from artaug.synthesis import held_out_seed, picture_seeds
    >>> set(picture_seeds(held_out_seed(0), 1000)).isdisjoint(picture_seeds(0, 1000))
    True
    """
    check_count("held_out_seed", "seed", seed, least=0)
    return int(np.random.SeedSequence(seed, spawn_key=(1,)).generate_state(1)[0])
