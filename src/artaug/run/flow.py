"""Tasks beside each other in one thread: each goes on when what it waits for is there, and their results come in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum
from heapq import heappop, heappush
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeAlias, TypeVar

from artaug._internal.lanes import Lane

T = TypeVar("T")


class GiveWay(Enum):
    """What a task may let go first where it has nothing to wait for."""

    OLDER = "the tasks before it, as far as they can go on"
    NEXT = "the beginning of the task after it, if there is one and room for it"


Steps: TypeAlias = Generator["Future[Any] | GiveWay", None, T]
"""A task: a generator that yields a future wherever it has to wait for it, and returns its result."""

_POLL_S = 0.1
"""How long a run waits before it looks whether it is to stop."""


def chunks_under_way(*, drawing: int, asking: int, writes_behind: bool) -> int:
    """How many chunks are under way at most: at each place that computes one, and one that it goes on with at once.

    Args:
        drawing: calls that the synthesizer takes at the same time, 0 if it computes in this process.
        asking: those of the critic, likewise.
        writes_behind: whether the last pictures of a chunk are written while the next one is drawn.
    """
    return 1 + writes_behind + 2 * drawing + asking


@dataclass(order=True)
class _Task(Generic[T]):
    number: int
    steps: Steps[T] = field(compare=False)
    results: list[T] = field(default_factory=list, compare=False)
    """Its one result, when it is there."""


@dataclass
class _Waiting(Generic[T]):
    """Tasks that are under way, by what they wait for."""

    ready: list[_Task[T]] = field(default_factory=list)
    """Nothing: a heap, the oldest first."""
    arrived: "SimpleQueue[_Task[T]]" = field(default_factory=SimpleQueue)
    """A future that is done by now; whichever thread ends it puts its task here."""
    newest: _Task[T] | None = None
    """The last one that has begun, if it waits for the beginning of the task after it."""

    def begin(self, task: _Task[T]) -> None:
        """Run a task from its beginning, for which the newest one before it may have waited."""
        if self.newest is not None:
            heappush(self.ready, self.newest)
            self.newest = None
        self.advance(task, is_newest=True)

    def advance(self, task: _Task[T], *, is_newest: bool) -> None:
        """Run a task until it has to wait, or is done."""
        try:
            waits_for = next(task.steps)
        except StopIteration as end:
            task.results.append(end.value)
            return
        if isinstance(waits_for, Future):
            waits_for.add_done_callback(lambda _: self.arrived.put(task))
        elif waits_for is GiveWay.NEXT and is_newest:
            self.newest = task
        else:
            heappush(self.ready, task)

    def pop_ready(self, *, can_begin: bool) -> _Task[T] | None:
        """The oldest task that can go on, where another one can begin or not."""
        while not self.arrived.empty():
            heappush(self.ready, self.arrived.get())
        if self.ready:
            return heappop(self.ready)
        newest = None if can_begin else self.newest
        if newest is not None:
            self.newest = None
        return newest

    def wait(self) -> None:
        """Wait for a future, for a moment."""
        try:
            heappush(self.ready, self.arrived.get(timeout=_POLL_S))
        except Empty:
            return


def awaited(lane: Lane | None, function: Callable[..., T], *args: object) -> Steps[T]:
    """The result of a call, which a lane makes if there is one: ``yield from`` it in a task."""
    if lane is None:
        return function(*args)
    future = lane.submit(lambda: function(*args))
    try:
        yield future
        return future.result()
    finally:
        future.cancel()


def run_in_order(tasks: Iterator[Steps[T]], *, depth: int, poll: Callable[[], None]) -> Iterator[T]:
    """Run tasks beside each other and yield their results in the order of the tasks.

    Of the tasks that can go on, the oldest one does; a new one begins when none can. What a task does itself, it does in
    the caller's thread: nothing of it needs a lock.

    Args:
        tasks: taken one at a time, as there is room.
        depth: tasks that are under way or wait for one before them, at most.
        poll: called when all wait, and every 0.1 s while they do; raises to stop.

    Whatever ends this, all tasks under way are closed, the oldest first: each can finish in a ``finally`` what must not be lost.
    """
    under_way: deque[_Task[T]] = deque()
    waiting: _Waiting[T] = _Waiting()
    begun, following = 0, next(tasks, None)
    try:
        while under_way or following is not None:
            can_begin = following is not None and len(under_way) < depth
            if under_way and under_way[0].results:
                yield under_way.popleft().results[0]
            elif (task := waiting.pop_ready(can_begin=can_begin)) is not None:
                waiting.advance(task, is_newest=task.number == begun)
            elif following is not None and can_begin:
                begun += 1
                under_way.append(_Task(begun, following))
                following = next(tasks, None)
                waiting.begin(under_way[-1])
            else:
                poll()
                waiting.wait()
    finally:
        with ExitStack() as stack:  # all of them, also if one raises
            for task in reversed(under_way):
                stack.callback(task.steps.close)
