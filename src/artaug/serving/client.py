"""One chat completion from a server that may be slow, busy or broken: attempts, and the threads that make them.

How a request is sent is not known here: a function sends it and returns the response.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

from artaug._internal.transient import backoff_delay_s
from artaug.serving.backoff import RetryGate, parse_retry_after
from artaug.serving.chat import ChatReply
from artaug.serving.completion import Completion, RequestFailure, excerpt, parse_completion
from artaug.serving.http import HttpResponse
from artaug.serving.usage import Usage, UsageCounter

_LOG = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


SendRequest: TypeAlias = Callable[[Mapping[str, Any]], HttpResponse | RequestFailure]
"""Sends a request once."""


@dataclass(frozen=True)
class RetryingClient:
    """Sends a request again while that may help."""

    send: SendRequest
    gate: RetryGate
    usage: UsageCounter
    max_attempts: int | None
    """None for as many as the deadline allows."""
    retry_deadline_s: float
    """No further attempt starts this many seconds after the first, or after the last success of any request."""
    server: str
    """Its address, for the log."""
    redact: Callable[[str], str]
    """Hides the key in all that leaves this class. A response holds it only where its parts make it up together."""

    def complete(
        self, request: Mapping[str, Any], *, max_attempts: int | None = None, max_attempts_at_500: int | None = None
    ) -> ChatReply | RequestFailure:
        """The reply to a request, or the last failure."""
        outcome = self._complete(request, max_attempts or self.max_attempts, max_attempts_at_500)
        if isinstance(outcome, RequestFailure):
            return replace(outcome, reason=self.redact(outcome.reason))
        return replace(outcome, text=self.redact(outcome.text))

    def _complete(
        self, request: Mapping[str, Any], max_attempts: int | None, max_attempts_at_500: int | None
    ) -> ChatReply | RequestFailure:
        start, delay_s, attempt = time.monotonic(), 0.0, 0
        while True:
            attempt += 1
            self.gate.wait(delay_s=delay_s)
            outcome = self._attempt(request)
            if isinstance(outcome, ChatReply):
                self.gate.succeeded()
                return outcome
            if not outcome.retryable:
                return outcome
            delay_s = backoff_delay_s(attempt) if outcome.retry_after_s is None else outcome.retry_after_s
            now = time.monotonic()
            elapsed_s, waited_s = now - start, now - min(start, self.gate.silent_since_s)
            at_500 = outcome.status == 500 and max_attempts_at_500 is not None and attempt >= max_attempts_at_500
            if attempt == max_attempts or at_500 or waited_s + delay_s > self.retry_deadline_s:
                server = "" if outcome.retry_after_s is None else f", and it asks to wait {outcome.retry_after_s:g} s"
                return replace(
                    outcome,
                    reason=f"{outcome.reason} (tried {attempt} time{'s' * (attempt != 1)} in {elapsed_s:.1f} s{server})",
                )
            if outcome.retry_after_s is not None:
                self.gate.pause(delay_s)  # a wait that the server demands of one request holds for all
            self.usage.add(Usage(retries=1))
            if self.gate.is_news():
                _LOG.warning(
                    "%s has given no reply for %.0f s: %s. It is asked again until %g s are over.",
                    self.server,
                    waited_s,
                    self.redact(outcome.reason),
                    self.retry_deadline_s,
                )

    def _attempt(self, request: Mapping[str, Any]) -> ChatReply | RequestFailure:
        response = self.send(request)
        if isinstance(response, RequestFailure):
            return response
        if not response.is_success:
            reason = f"the server answered {response.status}: {excerpt(response.body)}"
            outcome: Completion | RequestFailure = RequestFailure(reason, status=response.status).judged()
        else:
            outcome = parse_completion(response)
        if isinstance(outcome, RequestFailure):
            wait_s = parse_retry_after(response.headers) if outcome.retryable else None
            return replace(outcome, retry_after_s=wait_s)
        self.usage.add(outcome.usage)
        return outcome.reply


def stream_threads(
    function: Callable[[Item], Result], items: Sequence[Item], *, max_workers: int
) -> Iterator[tuple[int, Result]]:
    """Apply ``function`` to the items in threads: the index of an item and its result, as soon as it is there.

    After an exception no further item is started; it is raised when the results that are there have been given. So it is
    when the caller closes the iterator or is interrupted. Unlike those of ``ThreadPoolExecutor`` the threads are daemons:
    one that waits for a server must not keep an interrupted program alive.
    """
    tasks: queue.SimpleQueue[tuple[int, Item]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Future[Result]]] = queue.SimpleQueue()
    for task in enumerate(items):
        tasks.put(task)

    def worker() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                index, item = tasks.get_nowait()
                future: Future[Result] = Future()
                try:
                    future.set_result(function(item))
                except BaseException as error:  # noqa: BLE001 - raised again by the iterator
                    future.set_exception(error)
                done.put((index, future))

    for index in range(min(max_workers, len(items))):
        threading.Thread(target=worker, name=f"artaug-request-{index}", daemon=True).start()
    failure: BaseException | None = None
    try:
        with contextlib.suppress(queue.Empty):
            for _ in items:
                index, future = done.get(block=failure is None)
                if (error := future.exception()) is None:
                    yield index, future.result()
                elif failure is None:
                    failure = error
                    _clear(tasks)
    finally:
        _clear(tasks)
    if failure is not None:
        raise failure


def _clear(tasks: "queue.SimpleQueue[tuple[int, Item]]") -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            tasks.get_nowait()
