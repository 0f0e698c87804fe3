"""One user at a time: a lock for every model or other part, so that threads which share a part take turns."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn


@dataclass(eq=False)
class PartLock:
    """The lock of one part."""

    order: tuple[bool, int]
    """Locks are taken in this order, so that two threads never wait for each other. Models come first: a stage of a run
    holds those of a pipeline while it calls the pipeline, which then takes the locks of its other parts, too."""
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
        self._by_part: WeakKeyDictionary[object, PartLock] = WeakKeyDictionary()

    def of(self, parts: Sequence[object]) -> list[PartLock]:
        with self._guard:
            locks = {
                self._by_part.setdefault(part, PartLock((not isinstance(part, nn.Module), next(self._numbers))))
                for part in parts
            }
        return sorted(locks, key=lambda lock: lock.order)


_LOCKS = _Locks()
if hasattr(os, "register_at_fork"):  # POSIX
    os.register_at_fork(after_in_child=_LOCKS.reset)


def locks_of(parts: Sequence[object]) -> list[PartLock]:
    """The locks of parts, in the order in which they are to be taken; a part that is there twice has one."""
    return _LOCKS.of(parts)


@contextmanager
def all_held(locks: Sequence[PartLock]) -> Iterator[None]:
    """Hold locks, which are in their order, in a ``with`` block."""
    # Nested blocks and no ExitStack: an interrupt between taking a lock and noting it would hold it for ever.
    if not locks:
        yield
        return
    with locks[0].lock, all_held(locks[1:]):
        yield
