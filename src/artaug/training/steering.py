"""Predictions of the student under a guide, which stays in place for as long as layers may be computed again."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from artaug.errors import ModelError
from artaug.plan import Plan
from artaug.regional.denoiser import Conditioning
from artaug.regional.guide import Guide, declines, moves_embeddings, steer
from artaug.regional.guided_run import GuidedRun
from artaug.training.model import Predictor, Steerable


@dataclass(frozen=True, eq=False)
class _SteeredRun:
    """A guide that stays in place until the backward pass is over."""

    guide: Guide
    conditioning: Conditioning
    run: GuidedRun


class Steering:
    """The guides of one student's predictions.

    A guide acts on one prediction, and is taken off after it. Gradient checkpointing computes layers again in the backward pass,
    and needs the guide once more: then it stays until the end of `until_backward`, and other predictions go past it.
    """

    def __init__(self) -> None:
        self._stack: ExitStack | None = None
        self._kept: _SteeredRun | None = None

    @contextmanager
    def until_backward(self) -> Iterator[None]:
        """The forward and backward pass of one loss, in a ``with`` block."""
        with ExitStack() as stack:
            self._stack = stack
            try:
                yield
            finally:
                self._stack = self._kept = None

    @contextmanager
    def guided(
        self, model: Predictor, guide: Guide, plans: Sequence[Plan], conditioning: Conditioning
    ) -> Iterator[None]:
        """Act on the predictions of a ``with`` block.

        Raises:
            ModelError: if the model cannot be guided, the guide reads regions or moves embeddings, or layers that are computed again would not find it.
        """
        if guide.reads_regions:
            raise ModelError(
                f"{type(guide).__name__} reads regions, whose prompts are not encoded in training. Expected a guide that does "
                "not, as AttentionProbe."
            )
        if moves_embeddings(guide):
            raise ModelError(
                f"{type(guide).__name__} moves the embeddings of prompts before a drawing begins, and a training draws nothing. "
                "Expected a guide that does not, as AttentionProbe."
            )
        if declines(guide, plans):
            yield
        elif not getattr(model.module, "is_gradient_checkpointing", False):
            with steer(guide, _guided_run(model, guide, plans, conditioning)):
                yield
        else:
            self._keep(model, guide, plans, conditioning)
            yield

    def _keep(self, model: Predictor, guide: Guide, plans: Sequence[Plan], conditioning: Conditioning) -> None:
        """Have the guide in place until the backward pass is over."""
        if self._stack is None:
            raise ModelError(
                "with gradient checkpointing a prediction under a guide goes back through its layers while the guide is in place: "
                "let a trainer call the objective, or switch checkpointing off."
            )
        if self._kept is None:
            run = _guided_run(model, guide, plans, conditioning)
            self._stack.enter_context(steer(guide, run))
            self._kept = _SteeredRun(guide, conditioning, run)
        elif self._kept.guide is not guide or self._kept.conditioning is not conditioning:
            raise ModelError(
                f"the loss predicts under {type(guide).__name__} and, before, under another guide or for other prompts: with "
                "gradient checkpointing one guide and one batch of prompts is all that it can have. Switch it off."
            )

    @contextmanager
    def unguided(self) -> Iterator[None]:
        """Predict in a ``with`` block as if no guide were in place.

        Raises:
            ModelError: for a prediction with gradient whose layers would be computed again under the guide.
        """
        if self._kept is None:
            yield
        elif torch.is_grad_enabled():
            raise ModelError(
                f"the loss predicts under {type(self._kept.guide).__name__} and without it, both with gradient: with gradient "
                "checkpointing all have to be under the guide. Call predict_guided, or switch it off."
            )
        else:
            with self._kept.run.aside():
                yield


def as_steerable(model: object, *, reader: str) -> Steerable:
    """The model, if it says where its attention is and which tokens phrases are.

    Raises:
        ModelError: naming what wants to know, if it does not.
    """
    if isinstance(model, Steerable):
        return model
    raise ModelError(
        f"{reader} looks into the model, and {type(model).__name__} has no `denoiser` and `phrase_tokens`, as every "
        "artaug.diffusion.Family has: train another objective, or write them."
    )


def _guided_run(model: Predictor, guide: Guide, plans: Sequence[Plan], conditioning: Conditioning) -> GuidedRun:
    steerable = as_steerable(model, reader=type(guide).__name__)
    return GuidedRun(
        denoiser=steerable.denoiser(conditioning),
        plans=plans,
        regions=[()] * len(plans),
        phrase_tokens=steerable.phrase_tokens,
    )
