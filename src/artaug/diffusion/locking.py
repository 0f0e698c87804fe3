"""One user at a time: a lock for every part of a pipeline, so that threads which share a part take turns."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

from diffusers import DiffusionPipeline
from torch import nn

from artaug._internal.modules import unwrap
from artaug.errors import ModelError

_SHARED_PARTS = ("scheduler", "tokenizer")
"""Beside models, what a call changes: a scheduler counts steps, a tokenizer of transformers sets its truncation."""


@dataclass(eq=False)
class _PartLock:
    number: int
    """Locks are taken in the order of their numbers, so that two threads never wait for each other."""
    lock: Any = field(default_factory=RLock)
    """Reentrant, since a training draws pictures of its own."""
    is_drawing: bool = False


class _Locks:
    """The locks of all parts in this process, by the part itself: pipelines that share a part share its lock."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all locks, in a forked child: threads that held some are not there to release them."""
        self._guard = Lock()
        self._numbers = count()
        self._by_part: WeakKeyDictionary[object, _PartLock] = WeakKeyDictionary()

    def of(self, parts: Sequence[object]) -> list[_PartLock]:
        with self._guard:
            locks = {self._by_part.setdefault(part, _PartLock(next(self._numbers))) for part in parts}
        return sorted(locks, key=lambda lock: lock.number)


_LOCKS = _Locks()
if hasattr(os, "register_at_fork"):  # POSIX
    os.register_at_fork(after_in_child=_LOCKS.reset)


@contextmanager
def exclusive_use(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Keep other threads from using any part of a pipeline in a ``with`` block; wait while one does.

    In the same thread a block may lie inside another (a training draws its validation), but not inside `exclusive_drawing`.

    Raises:
        ModelError: if this thread is drawing with a part: a hook or a callback called it.
    """
    locks = _LOCKS.of(_parts(pipeline))
    with _all_held(locks):
        if any(lock.is_drawing for lock in locks):  # by this thread, since it holds them all
            raise ModelError(
                f"this {type(pipeline).__name__}, or a part that it shares, is drawing already, and a hook or a callback "
                "of that drawing asked it to draw or to train. Do so when the drawing has ended."
            )
        yield


@contextmanager
def exclusive_drawing(pipeline: DiffusionPipeline) -> Iterator[None]:
    """`exclusive_use`, inside which this thread can begin no other."""
    locks = _LOCKS.of(_parts(pipeline))
    with exclusive_use(pipeline):
        try:
            for lock in locks:
                lock.is_drawing = True
            yield
        finally:
            for lock in locks:
                lock.is_drawing = False


@contextmanager
def _all_held(locks: Sequence[_PartLock]) -> Iterator[None]:
    # Nested blocks and no ExitStack: an interrupt between taking a lock and noting it would hold it for ever.
    if not locks:
        yield
        return
    with locks[0].lock, _all_held(locks[1:]):
        yield


def _parts(pipeline: DiffusionPipeline) -> list[object]:
    """What a call of a pipeline changes or moves; a compiled model is the one it was compiled from."""
    return [
        unwrap(part) if isinstance(part, nn.Module) else part
        for name, part in pipeline.components.items()
        if isinstance(part, nn.Module) or (part is not None and name.startswith(_SHARED_PARTS))
    ]
