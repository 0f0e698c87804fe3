"""A-STAR: at every step the latents move so that phrases do not share image tokens, and stay where they were a step before."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor

from artaug._internal.annotations import checked
from artaug._internal.arguments import argument_error, check_finite_number
from artaug.errors import InvalidValueError
from artaug.recipes.phrase_maps import PhraseMaps, PlanPhrases
from artaug.regional import Guide, GuidedRun, LatentStep, Predict
from artaug.regional.attention_losses import (
    high_activation_masks,
    normalize_gradient,
    retention_loss,
    segregation_loss,
)


@checked
@final
@dataclass(frozen=True, kw_only=True)
class AStar(Guide):
    """Moves the latents along the gradient of two losses of attention maps (A-STAR, arXiv 2306.14544).

    Segregation (equation 2): no two phrases share image tokens. Retention (equation 3): each phrase stays where it was strong at
    the step before.

    *The paper's:* both losses and their sum, on maps of 16 x 16 tokens, and the step z - alpha_t dL/dz, at all steps. *Ours:*
    the size of the step, which the paper does not give; the threshold of the masks, likewise; the masks of a step are those of its
    maps before it is moved; maps of another size where a model has none of 16 x 16, and joint attention over the prompt alone,
    for MMDiT models, on which the method was not published.

    Raises:
        InvalidValueError: for fewer than two phrases, or a number out of its range.

    >>> from artaug.recipes import AStar
    >>> AStar(phrases=["red cone", "blue ball"]).threshold
    0.5
    """

    phrases: PlanPhrases
    """What is to be kept apart: parts of the plans' prompts, or a function that gives those of each plan. One phrase alone is retained."""
    step_size: float = 20.0
    """How far latents move, a factor of the gradient."""
    segregation: float = 1.0
    """The weight of that loss."""
    retention: float = 1.0
    """The weight of that loss."""
    threshold: float = 0.5
    """From which part of its maximum on a map is strong, in (0, 1]."""
    until: float = 1.0
    """Which part of the steps is guided: the paper says that the first five alone do not suffice."""
    layers: Sequence[int] | None = None
    """The layers whose maps are averaged; None for those with maps nearest to 16 x 16 tokens."""
    normalize: Literal["abs_max", "norm"] | None = None
    """What the gradient of each picture is divided by, see `artaug.regional.attention_losses.normalize_gradient`; None for nothing."""

    def __post_init__(self) -> None:
        if not callable(self.phrases) and (isinstance(self.phrases, str) or len(self.phrases) < 2):
            raise argument_error("AStar", "phrases", self.phrases, expected="a list of two phrases or more")
        for name in ("step_size", "segregation", "retention", "until"):
            check_finite_number("AStar", name, getattr(self, name))
        if not 0 < self.threshold <= 1:
            raise InvalidValueError(
                f"AStar(threshold={self.threshold}): expected a part of each map's maximum, in (0, 1]."
            )

        for name in ("phrases", "layers"):
            if isinstance(given := getattr(self, name), Sequence):
                object.__setattr__(self, name, tuple(given))  # a list, too

    @property
    def reads_regions(self) -> bool:
        return False

    @contextmanager
    def applied(self, run: GuidedRun) -> Iterator[None]:
        maps = PhraseMaps.of(run, self.phrases, layers=self.layers)
        strong: dict[int, Tensor] = {}  # of each picture, where its phrases were strong at the step before

        def loss(number: int, of_phrases: Tensor, _grid: tuple[int, int]) -> Tensor:
            total = of_phrases.new_zeros(1)
            if of_phrases.shape[1] > 1:  # the sum over pairs of one phrase is empty
                total = self.segregation * segregation_loss(of_phrases)
            if number in strong:
                total = total + self.retention * retention_loss(of_phrases, strong[number])
            strong[number] = high_activation_masks(of_phrases, threshold=self.threshold)
            return total

        def moved(latents: Tensor, step: LatentStep, predict: Predict) -> Tensor:
            if step.progress >= self.until:
                return latents
            _, gradient = maps.loss_and_gradient(loss, latents, predict)
            if self.normalize is not None:
                gradient = normalize_gradient(gradient, by=self.normalize)
            return latents - self.step_size * gradient

        with run.latents_moved_by(moved):
            yield
