"""Attend-and-Excite: before each of the first steps the latents move until every phrase has attention somewhere."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor

from artaug._internal.annotations import checked
from artaug._internal.arguments import argument_error, check_count, check_finite_number
from artaug.errors import InvalidValueError
from artaug.recipes.phrase_maps import PhraseMaps, PlanPhrases, per_picture
from artaug.regional import Guide, GuidedRun, LatentStep, Predict
from artaug.regional.attention_losses import Smoothing, attend_and_excite_loss, normalize_gradient


@checked
@final
@dataclass(frozen=True, kw_only=True)
class AttendAndExcite(Guide):
    """Moves the latents so that no phrase of a prompt is neglected (Attend-and-Excite, arXiv 2301.13826).

    Before each of the first steps, L = max_i max(0, 1 - max_xy G(A_i)) is computed of the phrases' maps, and the latents move by
    z - alpha sqrt(c) dL/dz. At some steps this is repeated until every phrase reaches a value.

    *The paper's and its code's:* the loss with its blur; the second softmax of 100 times the maps over the prompt's tokens, without
    the first and the last; maps of 16 x 16 tokens, averaged over layers and heads; alpha 20, with c from 1 to 0.5 along all
    steps; the first 25 of 50 steps; the values 0.05, 0.5 and 0.8 at steps 0, 10 and 20, 20 repetitions at most. *Ours:* steps are
    parts of a drawing, so that another number of them works; a phrase of several tokens is the sum of theirs; each picture of a batch
    moves by itself; maps of another size where a model has none of 16 x 16, and joint attention over the prompt alone, for
    MMDiT models, on which the method was not published: there the size of the step is to be tried, and ``normalize`` helps.

    Raises:
        InvalidValueError: without phrases, or for a number out of its range.

    >>> from artaug.recipes import AttendAndExcite
    >>> AttendAndExcite(phrases=["cat", "frog"]).step_size
    20.0
    """

    phrases: PlanPhrases
    """What must not be missing: parts of the plans' prompts, or a function that gives those of each plan."""
    step_size: float = 20.0
    """Alpha: how far latents move, a factor of the gradient."""
    scales: tuple[float, float] = (1.0, 0.5)
    """c at the first and at the last step of the drawing; the step is scaled by its root."""
    until: float = 0.5
    """Which part of the steps is guided."""
    refinements: Sequence[tuple[float, float]] = ((0.0, 0.05), (0.2, 0.5), (0.4, 0.8))
    """Where the move is repeated, as part of the steps, and the value in [0, 1] that every phrase has to reach there."""
    most_refinements: int = 20
    """How often it is repeated at most."""
    sharpness: float | None = 100.0
    """What maps are multiplied by before the second softmax; None for none."""
    smoothing: Smoothing | None = Smoothing()  # noqa: RUF009 - a frozen value
    """The blur of a map; None for none."""
    layers: Sequence[int] | None = None
    """The layers whose maps are averaged; None for those with maps nearest to 16 x 16 tokens."""
    normalize: Literal["abs_max", "norm"] | None = None
    """What the gradient of each picture is divided by, see `artaug.regional.attention_losses.normalize_gradient`; None for nothing."""

    def __post_init__(self) -> None:
        if not callable(self.phrases) and (isinstance(self.phrases, str) or not self.phrases):
            raise argument_error("AttendAndExcite", "phrases", self.phrases, expected="a list of one phrase or more")
        for name in ("step_size", "until"):
            check_finite_number("AttendAndExcite", name, getattr(self, name))
        check_count("AttendAndExcite", "most_refinements", self.most_refinements, least=0)
        if min(self.scales) < 0:
            raise InvalidValueError(f"AttendAndExcite(scales={self.scales}): expected two numbers of 0 or more.")
        if any(not (0 <= part <= 1 and 0 <= value <= 1) for part, value in self.refinements):
            raise InvalidValueError(
                f"AttendAndExcite(refinements={self.refinements}): expected pairs of a part of the steps and a value, in [0, 1]."
            )

        for name in ("phrases", "refinements", "layers"):
            if isinstance(given := getattr(self, name), Sequence):
                object.__setattr__(self, name, tuple(given))  # a list, too

    @property
    def reads_regions(self) -> bool:
        return False

    @contextmanager
    def applied(self, run: GuidedRun) -> Iterator[None]:
        maps = PhraseMaps.of(run, self.phrases, layers=self.layers, sharpness=self.sharpness)

        def moved(latents: Tensor, step: LatentStep, predict: Predict) -> Tensor:
            return self._moved(maps, latents, step, predict)

        with run.latents_moved_by(moved):
            yield

    def _moved(self, maps: PhraseMaps, latents: Tensor, step: LatentStep, predict: Predict) -> Tensor:
        if step.progress >= self.until:
            return latents
        first, last = self.scales
        size = self.step_size * math.sqrt(first + (last - first) * step.number / max(1, step.count - 1))
        loss, gradient = self._gradient(maps, latents, predict)
        target = self._target(step)
        for _ in range(self.most_refinements):
            if target is None or not (neglected := loss > 1 - target).any():
                break
            latents = latents - size * gradient * per_picture(neglected, latents)
            loss, gradient = self._gradient(maps, latents, predict)
        return latents - size * gradient

    def _target(self, step: LatentStep) -> float | None:
        """What every phrase has to reach at a step; None if the move is not repeated there."""
        # A millionth more, or 0.29 of 100 steps would be step 28 by rounding.
        reached = [value for part, value in self.refinements if int(part * step.count + 1e-6) == step.number]
        return max(reached, default=None)

    def _gradient(self, maps: PhraseMaps, latents: Tensor, predict: Predict) -> tuple[Tensor, Tensor]:
        loss, gradient = maps.loss_and_gradient(
            lambda _, of_phrases, grid: attend_and_excite_loss(of_phrases, grid, smoothing=self.smoothing),
            latents,
            predict,
        )
        return loss, gradient if self.normalize is None else normalize_gradient(gradient, by=self.normalize)
