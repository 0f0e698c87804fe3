"""Tasks beside each other in one thread: each goes on when what it waits for is there, and their results come in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

T = TypeVar("T")

Steps: TypeAlias = Generator["Future[Any]", None, T]
"""A task: a generator that yields a future wherever it has to wait for it, and returns its result."""

_POLL_S = 0.1
"""How long a run waits before it looks whether it is to stop."""


@dataclass
class _Task(Generic[T]):
    steps: Steps[T]
    pending: "Future[Any] | None" = None
    results: list[T] = field(default_factory=list)
    """Its one result, when it is there."""

    @property
    def is_ready(self) -> bool:
        return not self.results and (self.pending is None or self.pending.done())

    def advance(self) -> None:
        """Run until it has to wait, or is done."""
        try:
            self.pending = next(self.steps)
        except StopIteration as end:
            self.results.append(end.value)


def run_in_order(tasks: Iterator[Steps[T]], *, depth: int, poll: Callable[[], None]) -> Iterator[T]:
    """Run tasks beside each other and yield their results in the order of the tasks.

    Of the tasks that can go on, the oldest one does; a new one begins when none can. What a task does itself, it does in
    the caller's thread: nothing of it needs a lock.

    Args:
        tasks: taken one at a time, as there is room.
        depth: tasks that are under way or wait for one before them, at most.
        poll: called at least every 0.1 s while all wait; raises to stop.

    Whatever ends this, all tasks under way are closed, the oldest first: each can finish in a ``finally`` what must not be lost.
    """
    under_way: deque[_Task[T]] = deque()
    try:
        while True:
            ready = next((task for task in under_way if task.is_ready), None)
            if ready is not None:
                ready.advance()
            elif under_way and under_way[0].results:
                yield under_way.popleft().results[0]
            elif len(under_way) < depth and (steps := next(tasks, None)) is not None:
                under_way.append(_Task(steps))
            elif under_way:
                pending = [task.pending for task in under_way if task.pending is not None and not task.results]
                wait(pending, _POLL_S, FIRST_COMPLETED)
                poll()
            else:
                return
    finally:
        with ExitStack() as stack:  # all of them, also if one raises
            for task in reversed(under_way):
                stack.callback(task.steps.close)
