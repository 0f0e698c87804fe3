"""Threads for calls that wait for something else than this process: a server, an actor of a cluster."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Self, TypeVar

T = TypeVar("T")


class Lane:
    """Runs calls in a few threads, in the order in which they were submitted.

    Unlike those of ``ThreadPoolExecutor``, the threads do not keep a process alive that is told to stop: what they wait for
    may take minutes.

    >>> from artaug._internal.lanes import Lane
    >>> with Lane(2, name="sums") as lane:
    ...     lane.submit(lambda: 1 + 1).result()
    2
    """

    def __init__(self, threads: int, *, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = threads
        for number in range(threads):
            threading.Thread(target=self._work, name=f"artaug-{name}-{number}", daemon=True).start()

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Run a function in one of the threads, when it is its turn."""
        future: Future[T] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = function()
            except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
                future.set_exception(error)
            else:
                future.set_result(result)

        self._calls.put(call)
        return future

    def close(self) -> None:
        """Let the threads end after what they were given; nobody waits for them."""
        for _ in range(self._threads):
            self._calls.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call  # else the result of the last call stays in memory until the next one comes
