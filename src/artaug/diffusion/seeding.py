"""Randomness of a drawing: all of it comes from the pictures' generators, the noise that a scheduler adds as well."""

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from artaug.errors import ModelError

_WITHOUT_GENERATOR = "DPMSolverSDEScheduler"
"""The one scheduler of diffusers that draws noise and takes no generator: its Brownian tree seeds itself for a batch."""

_CHECKED_CALLS = 2
"""Calls of a scheduler that are watched, a third of a millisecond each: a solver of second order adds noise in its second."""


def check_reproducible(pipeline: DiffusionPipeline) -> None:
    """Refuse a pipeline that would not draw the same picture twice.

    Raises:
        ModelError: if a part is in training mode, or the scheduler draws noise that no seed reaches.
    """
    training = [
        name
        for name, part in pipeline.components.items()
        if isinstance(part, nn.Module) and (part.training or any(map(_varies, part.modules())))
    ]
    if training:
        raise ModelError(f"{training} of the pipeline are in training mode, where dropout is random. Call .eval().")
    if any(base.__name__ == _WITHOUT_GENERATOR for base in type(pipeline.scheduler).__mro__):
        raise ModelError(
            f"{type(pipeline.scheduler).__name__} draws noise that depends on no picture's seed, and on the other pictures "
            "of a batch: its step takes no generator. Use DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, "
            "algorithm_type='sde-dpmsolver++'), which takes one."
        )


def _varies(module: nn.Module) -> bool:
    """Whether a layer that is in training mode computes another thing in each call.

    The mode alone says little: factors that are being trained are in training mode, and a training may draw.
    """
    drops = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0  # noqa: SLF001 - the base of all dropouts
    return module.training and (drops or isinstance(module, nn.modules.batchnorm._BatchNorm))  # noqa: SLF001 - likewise


@contextmanager
def seeded_scheduler(scheduler: Any, generators: Sequence[torch.Generator]) -> Iterator[None]:  # noqa: ANN401 - diffusers'
    """Hand a scheduler one generator for each picture in every step of a ``with`` block; after it the scheduler is as before.

    Most pipelines of flow models call ``scheduler.step`` without the generator that they were given, so a scheduler that
    adds noise would draw it from torch's global state: https://github.com/huggingface/diffusers/issues/13678. The block
    also undoes what a run leaves behind: its timesteps, and settings that some schedulers change for good (the
    singlestep solver its last orders, by the number of steps), which a later picture would depend on.

    Raises:
        ModelError: if the scheduler draws from torch's global state nevertheless, in one of its first two calls.
    """
    state = dict(vars(scheduler))
    step = scheduler.step
    calls = count()
    takes_generator = "generator" in inspect.signature(step).parameters

    @functools.wraps(step)  # with its signature, by which pipelines decide what to pass
    def seeded_step(*args: object, **kwargs: object) -> object:
        if takes_generator:
            kwargs["generator"] = list(generators)
        with _NoGlobalRandomness(type(scheduler).__name__) if next(calls) < _CHECKED_CALLS else nullcontext():
            return step(*args, **kwargs)

    try:
        scheduler.step = seeded_step
        yield
    finally:
        vars(scheduler).clear()
        vars(scheduler).update(state)


class _NoGlobalRandomness(TorchDispatchMode):
    """Refuses operations of this thread that draw random numbers without a generator."""

    # A mode, and no comparison of the global state before and after: another thread may draw from it at any time.
    def __init__(self, owner: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self._owner = owner

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - torch gives operators no type
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        named = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and not any(
            isinstance(value, torch.Generator) for value in (*args, *named.values())
        ):
            raise ModelError(
                f"{self._owner}.step draws noise from torch's global state ({func}), so the same seed would give another "
                "picture each time. Let its step take a generator and draw with it, or use another scheduler."
            )
        return func(*args, **named)
