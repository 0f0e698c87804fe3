"""Looking at pictures while a LoRA learns: which step and strength is best, told by held-out prompts, not by the loss."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL.Image import Image

from artaug._internal.digests import digest
from artaug.errors import InvalidValueError
from artaug.lora.lora import LoRA
from artaug.plan import Plan
from artaug.scoring import Scorer, score_images
from artaug.synthesis import Synthesizer, draw, picture_seeds


@dataclass(frozen=True, kw_only=True)
class ValidationResult:
    """What held-out pictures said of a LoRA at one step and strength."""

    step: int
    strength: float
    win_rate: float
    """Part of the prompts whose picture scores higher than the base's; ties count half."""
    gain: float
    """Mean score over the base's, in the scorer's units."""
    pictures: tuple[Image, ...] = field(default=(), repr=False, compare=False)
    """One a prompt, for whoever watches; not kept in a `TrainingResult`."""

    @property
    def rank(self) -> tuple[float, float]:
        """What looks are compared by: win rate, then gain."""
        return self.win_rate, self.gain


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Chooses the step and the strength of a LoRA by pictures of held-out prompts.

    Pictures are drawn by the synthesizer itself, wearing the LoRA as it would be saved, so what is looked at is what a
    user gets. The one with the highest win rate over the base is the training's result, its strength folded in.

    Raises:
        InvalidValueError: without prompts, or for a number out of its range.

    >>> import artaug as aa
    >>> from artaug.scorers import Exposure
    >>> look = aa.Validation(scorer=Exposure(), prompts=["a red cone"], every=50, strengths=(0.75, 1.0), patience=3)
    >>> look.every
    50
    """

    scorer: Scorer
    """Judges the pictures. For an honest choice, not one that the pairs are filtered by."""
    prompts: Sequence[str]
    """What to draw; none of those learned from."""
    every: int = 100
    """Steps between two looks; there is always one at the end. A training of several groups or stages has only that."""
    strengths: tuple[float, ...] = (1.0,)
    """How strongly the LoRA is worn, one after the other."""
    patience: int | None = None
    """Stop after so many looks in a row without a better one; None to go on to the end."""
    batch_size: int = 8
    """Pictures drawn at a time."""
    on_validation: Callable[[ValidationResult], None] | None = field(default=None, repr=False)
    """Called after every look, with its pictures."""

    def __post_init__(self) -> None:
        legal = (
            self.prompts
            and self.every >= 1
            and self.strengths
            and all(0 < one < math.inf for one in self.strengths)
            and (self.patience is None or self.patience >= 1)
            and self.batch_size >= 1
        )
        if not legal:
            raise InvalidValueError(
                f"{self}: need at least one prompt and one strength above 0; every, patience and batch_size of at least 1."
            )

    @property
    def fingerprint(self) -> str:
        """What decides its choice, as one line: the same in every process."""
        asked = digest(*self.prompts)[:16]
        how = f"every {self.every}, strengths {self.strengths}, patience {self.patience}"
        return f"{self.scorer.name} on {len(self.prompts)} prompts {asked}, {how}"

    def scores(self, synthesizer: Synthesizer, *, seed: int) -> tuple[tuple[float, ...], tuple[Image, ...]]:
        """Draw all prompts and score them, one seed a prompt."""
        seeds = picture_seeds(seed, len(self.prompts))
        pictures: list[Image] = []
        for start in range(0, len(self.prompts), self.batch_size):
            some = slice(start, start + self.batch_size)
            plans = [Plan(prompt) for prompt in self.prompts[some]]
            pictures += draw(synthesizer, plans, seeds=seeds[some])
        return tuple(score_images(self.scorer, pictures, self.prompts)), tuple(pictures)

    def evaluate(
        self, lora: LoRA, synthesizer: Synthesizer, base: Sequence[float], *, step: int, seed: int
    ) -> list[ValidationResult]:
        """ValidationResult at a LoRA at every strength; ``base`` are the scores without it."""
        found = []
        for strength in self.strengths:
            scores, pictures = self.scores(synthesizer.with_lora(lora, scale=strength), seed=seed)
            gains = [after - before for after, before in zip(scores, base, strict=True)]
            wins = sum(0.5 if gain == 0 else float(gain > 0) for gain in gains)
            look = ValidationResult(
                step=step,
                strength=strength,
                win_rate=wins / len(gains),
                gain=math.fsum(gains) / len(gains),
                pictures=pictures,
            )
            if self.on_validation is not None:
                self.on_validation(look)
            found.append(replace(look, pictures=()))
        return found

    def should_stop(self, looks: Sequence[ValidationResult]) -> bool:
        """Whether the last ``patience`` looks brought nothing better than those before them."""
        if self.patience is None:
            return False
        recent = self.patience * len(self.strengths)
        return len(looks) > recent and best(looks[:-recent]).rank >= best(looks[-recent:]).rank


def best(looks: Sequence[ValidationResult]) -> ValidationResult:
    """The first of those that nobody beats."""
    return max(looks, key=lambda look: look.rank)


def as_json(look: ValidationResult) -> dict[str, Any]:
    """A look as JSON holds it."""
    return {"step": look.step, "strength": look.strength, "win_rate": look.win_rate, "gain": look.gain}
