"""Tasks beside each other in one thread: each goes on when what it waits for is there, and their results come in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Generic, TypeAlias, TypeVar

T = TypeVar("T")


class Turn(Enum):
    """What a task may let go first where it has nothing to wait for."""

    OLDER = "the tasks before it, as far as they can go on"
    NEXT = "the beginning of the task after it, if there is one and room for it"


Steps: TypeAlias = Generator["Future[Any] | Turn", None, T]
"""A task: a generator that yields a future wherever it has to wait for it, and returns its result."""

_POLL_S = 0.1
"""How long a run waits before it looks whether it is to stop."""


@dataclass
class _Task(Generic[T]):
    steps: Steps[T]
    number: int
    waits_for: "Future[Any] | Turn" = Turn.OLDER
    results: list[T] = field(default_factory=list)
    """Its one result, when it is there."""

    def is_ready(self, *, begun: int, can_begin: bool) -> bool:
        """Whether it can go on, where so many tasks have begun and another one can or not."""
        if self.results:
            return False
        if self.waits_for is Turn.NEXT:
            return begun > self.number or not can_begin
        return self.waits_for is Turn.OLDER or self.waits_for.done()

    def advance(self) -> None:
        """Run until it has to wait, or is done."""
        try:
            self.waits_for = next(self.steps)
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
    begun, following = 0, next(tasks, None)
    try:
        while under_way or following is not None:
            can_begin = following is not None and len(under_way) < depth
            ready = (task for task in under_way if task.is_ready(begun=begun, can_begin=can_begin))
            if under_way and under_way[0].results:
                yield under_way.popleft().results[0]
            elif (task := next(ready, None)) is not None:
                task.advance()
            elif following is not None and can_begin:
                begun += 1
                under_way.append(_Task(following, begun))
                following = next(tasks, None)
                under_way[-1].advance()
            else:
                futures = [
                    task.waits_for for task in under_way if isinstance(task.waits_for, Future) and not task.results
                ]
                wait(futures, _POLL_S, FIRST_COMPLETED)
                poll()
    finally:
        with ExitStack() as stack:  # all of them, also if one raises
            for task in reversed(under_way):
                stack.callback(task.steps.close)
