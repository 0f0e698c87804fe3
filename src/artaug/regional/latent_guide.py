"""Guides that move the latents before a step: the seam, the predictions that they may try, and the moves of one drawing.

A sampler goes from z_t to z_{t-1} by the denoiser's prediction at z_t. A move replaces z_t before that prediction is made, and the
scheduler steps from what it became. So the moves of a step take place inside the pipeline's first call of the denoiser in
that step, where all arguments of the call are known, also before the first step.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self, final

import torch
from jaxtyping import Float
from torch import Tensor

from artaug._internal.annotations import checked
from artaug._internal.contracts import check_result, contract_error
from artaug._internal.modules import frozen
from artaug.errors import GuideError, NonFiniteError
from artaug.regional.denoiser import ForwardKwargs
from artaug.regional.guide import Guide, declines
from artaug.regional.guided_run import DenoiserCall, GuidedRun, Mover


@final
@dataclass(frozen=True, eq=False)
class LatentStep:
    """A step of a drawing, before it is made."""

    number: int
    """From 0."""
    count: int
    """How many steps the drawing has."""
    run: GuidedRun
    """The drawing."""

    @property
    def progress(self) -> float:
        """Which part of the steps is made, from 0 to below 1."""
        return self.number / self.count


@final
class Predict:
    """What the denoiser predicts at latents, for one move of one step."""

    def __init__(self, run: GuidedRun, call: DenoiserCall) -> None:
        """Predict as ``call`` does, which the pipeline is about to make."""
        self._run, self._call = run, call
        self._block = ExitStack()
        self._guide = ExitStack()

    def __call__(
        self, latents: Float[Tensor, " batch *latent"], guide: Guide | None = None
    ) -> Float[Tensor, " batch *latent"]:
        """The prediction for the plans' prompts, as the pipeline would get it in this step, guided as the drawing is.

        Only the branch of the plans' prompts is computed. It has a gradient if the latents require one; take that before the
        next prediction.

        Args:
            latents: one row for each picture.
            guide: acts in this prediction beside those of the drawing, until the next one: an `artaug.AttentionProbe`.

        Returns:
            What the model predicts (velocity, noise), in the form of the latents and the type of the model.

        Raises:
            GuideError: if the pipeline calls the negative prompt's branch first.
        """
        run, call = self._run, self._call
        if not call.branches.cond:
            raise GuideError(
                f"the pipeline calls its {type(run.denoiser.module).__name__} for the negative prompt first, so there is no "
                "call for the plans' prompts to try latents with. Draw without a negative prompt."
            )
        self._guide.close()
        rows = run.denoiser.select_rows(call.kwargs, call.branches.cond)
        with torch.set_grad_enabled(latents.requires_grad):
            if guide is not None and not declines(guide, run.plans):
                self._guide.enter_context(guide.applied(run))
            # The module itself is called, not its forward, so that the hooks of all guides run as well.
            output = run.denoiser.module(**run.denoiser.with_latents(rows, latents))
            return run.denoiser.prediction(output)[:, : latents.shape[1]].reshape(latents.shape)

    def __enter__(self) -> Self:
        """Begin the trials of one move, for which gradients can be computed."""
        self._block.enter_context(self._run.trials())
        self._block.enter_context(torch.inference_mode(mode=False))
        self._block.enter_context(torch.enable_grad())
        self._block.enter_context(self._run.denoiser.with_gradients())
        # Not for the whole drawing: on a CPU, torch takes other kernels for frozen weights, which round otherwise.
        self._block.enter_context(frozen(self._run.denoiser.module))
        self._block.callback(self._guide.close)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End them."""
        self._block.__exit__(kind, error, at)


@checked
class LatentGuide(Guide):
    """Moves the latents before each step of a drawing, also those that it starts from.

    Several in `Together` act one after the other. A guide that keeps something from step to step (masks, a running mean)
    overrides ``applied`` and gives a function of its own to `artaug.regional.GuidedRun.latents_moved_by`: a guide is
    shared by drawings, so it has no place for what belongs to one.

    >>> import artaug as aa
    >>> class Brighter(aa.LatentGuide):
    ...     def moved(self, latents, step, predict):
    ...         return latents + 0.1 if step.progress < 0.5 else latents
    >>> Brighter().reads_regions
    False
    """

    @abstractmethod
    def moved(
        self, latents: Float[Tensor, " batch *latent"], step: LatentStep, predict: Predict
    ) -> Float[Tensor, " batch *latent"]:
        """The latents to make a step from.

        Gradients are enabled, and the weights of the model frozen. If what comes back equals ``latents``, the step is the
        plain one, bit for bit.

        Args:
            latents: those of all pictures at the step's noise level, as the pipeline holds them, float32.
            step: which step it is, and in which drawing.
            predict: the model at these or other latents: ``predict(latents)``, with a gradient if they require one, or
                ``predict(latents, probe)`` to read attention at the same time.

        Returns:
            Latents of the same shape. What moves one picture must not depend on the others of its batch.
        """

    @contextmanager
    def applied(self, run: GuidedRun) -> Iterator[None]:
        with run.latents_moved_by(self.moved):
            yield

    @property
    def reads_regions(self) -> bool:
        return False


class LatentMoves:
    """The moves of one drawing: before the first call of each step, in all its calls, and in what the scheduler steps from."""

    def __init__(self, run: GuidedRun, count_steps: Callable[[], int]) -> None:
        """Move the latents of a run of so many steps, counted when the first one begins."""
        self._run, self._count_steps = run, count_steps
        self._held: Tensor | None = None
        """What the pipeline holds since the last step; None before the first."""
        self._moved: Tensor | None = None
        """What guides made of it; None where nothing was moved."""
        self._replaced: Tensor | None = None
        """What hooks of a guide have put into a call in its place; None where they did not."""
        self._number = 0
        self._has_begun = False

    def before_call(self, call: DenoiserCall) -> DenoiserCall:
        """The same call with the latents of its step."""
        if not self._has_begun:
            self._has_begun, self._moved = True, self._move(call)
        if self._moved is None:
            return call
        return replace(call, kwargs=self._run.denoiser.with_latents(call.kwargs, self._moved))

    def after_hooks(self, call: DenoiserCall, kwargs: ForwardKwargs) -> None:
        """Take over the latents that hooks have replaced: the prediction is made at those, so the step has to be, too."""
        denoiser = self._run.denoiser
        if self._replaced is not None or kwargs.get(denoiser.latents_name) is call.kwargs.get(denoiser.latents_name):
            return
        replaced, given = denoiser.latents_in(kwargs), denoiser.latents_in(call.kwargs)
        if replaced.shape == given.shape and not torch.equal(replaced, given):
            self._replaced = replaced.detach()

    def step_from(self, sample: Tensor) -> Tensor:
        """What the scheduler makes its step from, in place of what the pipeline holds."""
        moved = self._moved if self._replaced is None else self._replaced
        self._moved, self._replaced, self._has_begun = None, None, False
        self._number += 1
        return sample if moved is None else moved.to(sample)

    def end_step(self, latents: Tensor) -> None:
        """Keep what the pipeline holds after a step.

        Raises:
            GuideError: if the pipeline has made it without its scheduler, so that a move was lost.
        """
        if self._moved is not None or self._replaced is not None:
            raise GuideError(
                f"the latents that were moved before step {self._number + 1} are lost: the pipeline has made the step without "
                "its scheduler's `step`. Put that to use in the pipeline, or draw without guides that move latents."
            )
        self._held, self._has_begun = latents, False

    def _move(self, call: DenoiserCall) -> Tensor | None:
        run = self._run
        held = run.denoiser.latents_in(call.kwargs) if self._held is None else self._held
        step = LatentStep(self._number, self._count_steps(), run)
        with torch.inference_mode(mode=False):  # outside which a copy can require a gradient
            start = held.detach().to(torch.promote_types(held.dtype, torch.float32), copy=True)
        latents = start.clone()  # a guide may change it in place
        for move in run.movers:
            with Predict(run, call) as predict:
                latents = _checked(move, move(latents, step, predict), start, step)
        return None if torch.equal(latents, start) else latents


def _checked(move: Mover, answer: object, start: Tensor, step: LatentStep) -> Tensor:
    """What a move gave, if it is latents."""
    owner = getattr(move, "__qualname__", repr(move))
    moved = check_result(owner, "", answer, of=Tensor, inputs=f"step {step.number + 1}").detach()
    if moved.shape != start.shape:
        raise contract_error(
            owner,
            "",
            received=f"latents of shape {tuple(moved.shape)}",
            inputs=f"step {step.number + 1}",
            expected=f"the shape {tuple(start.shape)} of those that it was given",
        )
    if not moved.isfinite().all():
        raise NonFiniteError(
            f"{owner} moved the latents to NaN or infinity before step {step.number + 1} of {step.count}. Take smaller steps."
        )
    return moved.to(start)
