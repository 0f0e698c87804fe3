"""One user of a pipeline at a time: threads that share it, or a part of it, take turns."""

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import DiffusionPipeline
from torch import nn

from artaug._internal.locking import all_held, locks_of
from artaug._internal.modules import unwrap
from artaug.errors import ModelError

_SHARED_PARTS = ("scheduler", "tokenizer")
"""Beside models, what a call changes: a scheduler counts steps, a tokenizer of transformers sets its truncation."""


@contextmanager
def exclusive_use(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Keep other threads from using any part of a pipeline in a ``with`` block; wait while one does.

    In the same thread a block may lie inside another (a training draws its validation), but not inside `exclusive_drawing`.

    Raises:
        ModelError: if this thread is drawing with a part: a hook or a callback called it.
    """
    locks = locks_of(_parts(pipeline))
    with all_held(locks):
        if any(lock.is_drawing for lock in locks):  # by this thread, since it holds them all
            raise ModelError(
                f"this {type(pipeline).__name__}, or a part that it shares, is drawing already, and a hook or a callback "
                "of that drawing asked it to draw or to train. Do so when the drawing has ended."
            )
        yield


@contextmanager
def exclusive_drawing(pipeline: DiffusionPipeline) -> Iterator[None]:
    """`exclusive_use`, inside which this thread can begin no other."""
    locks = locks_of(_parts(pipeline))
    with exclusive_use(pipeline):
        try:
            for lock in locks:
                lock.is_drawing = True
            yield
        finally:
            for lock in locks:
                lock.is_drawing = False


def _parts(pipeline: DiffusionPipeline) -> list[object]:
    """What a call of a pipeline changes or moves; a compiled model is the one it was compiled from."""
    return [
        unwrap(part) if isinstance(part, nn.Module) else part
        for name, part in pipeline.components.items()
        if isinstance(part, nn.Module) or (part is not None and name.startswith(_SHARED_PARTS))
    ]
