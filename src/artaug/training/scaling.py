"""Predictions at several scales of one LoRA in one loss, also where checkpoints compute the forward pass again."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from artaug.training.noise_schedule import Latents


def backward_at_scale(prediction: Latents, wear: Callable[[float], None], scale: float) -> Latents:
    """The same prediction, whose backward pass is computed with the LoRA at ``scale``.

    Gradient checkpointing throws activations away and runs the layers again in the backward pass, long after the
    forward pass has put the LoRA's scale back: without this, a prediction at -1 would get the gradient of one at +1,
    and no error. Autograd computes what was predicted last first, and finishes it before it turns to what was predicted
    before: so a scale that is set where the gradient enters a prediction holds until all of it is computed. A model
    whose layers are spread over several devices is worked on by several threads, and gives no such promise.

    Args:
        prediction: what the model predicted at ``scale``.
        wear: sets the scale of the LoRA's layers; it is left at 1 after the backward pass.
        scale: the scale.
    """
    return cast("Tensor", _AtScale.apply(prediction, wear, scale))  # type: ignore[no-untyped-call]


class _AtScale(Function):
    @staticmethod
    def forward(ctx: Any, prediction: Tensor, wear: Callable[[float], None], scale: float) -> Tensor:  # noqa: ANN401
        ctx.wear, ctx.scale = wear, scale
        return prediction.view_as(prediction)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        ctx.wear(ctx.scale)
        engine = torch.autograd.Variable._execution_engine  # noqa: SLF001 - as DistributedDataParallel does
        engine.queue_callback(lambda: ctx.wear(1.0))
        return gradient, None, None
