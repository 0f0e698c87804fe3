"""Validation: which step and strength of a LoRA is best, judged by pictures of held-out prompts, not by the loss."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

from PIL.Image import Image

from artaug._internal.annotations import checked
from artaug._internal.arguments import check_argument, check_count, check_items
from artaug._internal.digests import digest
from artaug._internal.prompts import check_prompts
from artaug.errors import InvalidValueError
from artaug.lora.lora import LoRA
from artaug.placement import Placement, Resident
from artaug.plan import Plan
from artaug.scoring import Scorer, score_images
from artaug.synthesis import Synthesizer, draw, picture_seeds

_RESIDENT = Resident()


@checked
@dataclass(frozen=True, kw_only=True)
class ValidationResult:
    """How the pictures of a LoRA at one step and strength score beside the base's."""

    step: int
    strength: float
    win_rate: float
    """Part of the prompts whose picture scores higher than the base's; ties count half."""
    gain: float
    """Mean score over the base's, in the scorer's units."""
    images: tuple[Image, ...] = field(default=(), repr=False, compare=False)
    """One per prompt, for ``on_validation``; not kept in a `TrainingResult`."""

    @property
    def rank(self) -> tuple[float, float]:
        """What results are compared by: win rate, then gain."""
        return self.win_rate, self.gain

    def to_dict(self) -> dict[str, Any]:
        """All but the images, as JSON can hold it."""
        return {"step": self.step, "strength": self.strength, "win_rate": self.win_rate, "gain": self.gain}


@checked
@dataclass(frozen=True, kw_only=True)
class Validation:
    """Chooses the step and the strength of a LoRA by pictures of held-out prompts.

    Pictures are drawn by the synthesizer itself with the LoRA as it would be saved, so what is judged is what a
    user gets. The one with the highest win rate over the base is the training's result, its strength folded in.

    Raises:
        PromptError: without prompts, for a blank one, or for one string in place of a list.
        InvalidValueError: for a scorer that is none, or a number out of its range.

    >>> import artaug as aa
    >>> from artaug.scorers import Exposure
    >>> validation = aa.Validation(scorer=Exposure(), prompts=["a red cone"], every=50, strengths=(0.75, 1.0), patience=3)
    >>> validation.every
    50
    """

    scorer: Scorer
    """Judges the pictures. For an honest choice, not one that the pairs are filtered by."""
    prompts: Sequence[str]
    """What to draw; none of those learned from."""
    every: int = 100
    """Steps between two validations; the last step always has one. A training of several groups or stages has only that."""
    strengths: tuple[float, ...] = (1.0,)
    """Scales of the LoRA, one after the other."""
    patience: int | None = None
    """Stop after so many validations in a row without a better result; None to go on to the end."""
    batch_size: int = 8
    """Pictures drawn at a time."""
    on_validation: Callable[[ValidationResult], None] | None = field(default=None, repr=False)
    """Called with every result, images included."""

    def __post_init__(self) -> None:
        check_argument("Validation", "scorer", self.scorer, Scorer)
        check_prompts(self.prompts)
        check_items("Validation", "strengths", self.strengths, Real)
        if not self.strengths or not all(0 < strength < math.inf for strength in self.strengths):
            raise InvalidValueError(f"{self}: need at least one strength, all above 0 and finite.")
        for name in ("every", "batch_size", *(() if self.patience is None else ("patience",))):
            check_count("Validation", name, getattr(self, name))

    @property
    def fingerprint(self) -> str:
        """What decides its choice, as one line: the same in every process."""
        prompts = digest(*self.prompts)[:16]
        settings = f"every {self.every}, strengths {self.strengths}, patience {self.patience}"
        return f"{self.scorer.name} on {len(self.prompts)} prompts {prompts}, {settings}"

    def score(
        self, synthesizer: Synthesizer, *, seed: int, placement: Placement = _RESIDENT
    ) -> tuple[tuple[float, ...], tuple[Image, ...]]:
        """Draw all prompts and score them, each with a seed of its own."""
        seeds = picture_seeds(seed, len(self.prompts))
        images: list[Image] = []
        with placement.stage(synthesizer):
            for start in range(0, len(self.prompts), self.batch_size):
                batch = slice(start, start + self.batch_size)
                images += draw(synthesizer, [Plan(prompt) for prompt in self.prompts[batch]], seeds=seeds[batch])
        with placement.stage(self.scorer):
            return tuple(score_images(self.scorer, images, self.prompts)), tuple(images)

    def evaluate(
        self,
        lora: LoRA,
        synthesizer: Synthesizer,
        base_scores: Sequence[float],
        *,
        step: int,
        seed: int,
        placement: Placement = _RESIDENT,
    ) -> list[ValidationResult]:
        """Judge a LoRA at every strength; ``base_scores`` are the scores without it, with the same seed."""
        results = []
        for strength in self.strengths:
            scores, images = self.score(synthesizer.with_lora(lora, scale=strength), seed=seed, placement=placement)
            gains = [score - base for score, base in zip(scores, base_scores, strict=True)]
            wins = sum(0.5 if gain == 0 else float(gain > 0) for gain in gains)
            result = ValidationResult(
                step=step,
                strength=strength,
                win_rate=wins / len(gains),
                gain=math.fsum(gains) / len(gains),
                images=images,
            )
            if self.on_validation is not None:
                self.on_validation(result)
            results.append(replace(result, images=()))
        return results

    def should_stop(self, results: Sequence[ValidationResult]) -> bool:
        """Whether the last ``patience`` validations brought nothing better than those before them."""
        if self.patience is None:
            return False
        recent = self.patience * len(self.strengths)
        return len(results) > recent and best_result(results[:-recent]).rank >= best_result(results[-recent:]).rank


def best_result(results: Sequence[ValidationResult]) -> ValidationResult:
    """The one of the highest rank, and the first of equals."""
    return max(results, key=lambda result: result.rank)
