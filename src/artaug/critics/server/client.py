"""One chat completion from a server that may be slow, busy or broken: parsing of the response, and retries.

How a request is sent is not known here: a function sends it and returns the response.
"""

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

from pydantic import BaseModel, ValidationError

from artaug._internal.text import shorten
from artaug.critics.dialogue import ChatReply
from artaug.critics.server.backoff import RETRYABLE_STATUS, RetryGate, backoff_delay_s, parse_retry_after
from artaug.critics.server.usage import Usage, UsageCounter

_MAX_EXCERPT_CHARS = 200

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class HttpResponse:
    """The response of a server."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class RequestFailure:
    """Why there is no reply."""

    reason: str
    retryable: bool = False
    """Whether the same request may succeed later."""
    retry_after_s: float | None = None
    """How long the server asks to wait; None if it does not say."""
    status: int | None = None
    """The HTTP status, if there was a response."""


SendRequest: TypeAlias = Callable[[Mapping[str, Any]], HttpResponse | RequestFailure]
"""Sends a request once."""


@dataclass(frozen=True)
class RetryingClient:
    """Sends a request again while that may help."""

    send: SendRequest
    gate: RetryGate
    usage: UsageCounter
    max_attempts: int
    retry_deadline_s: float
    """No further attempt starts this many seconds after the first."""

    def complete(self, request: Mapping[str, Any]) -> ChatReply | RequestFailure:
        """The reply to a request, or the last failure."""
        start, delay_s, attempt = time.monotonic(), 0.0, 0
        while True:
            attempt += 1
            self.gate.wait(delay_s=delay_s)
            outcome = self._attempt(request)
            if isinstance(outcome, ChatReply) or not outcome.retryable:
                return outcome
            delay_s = backoff_delay_s(attempt) if outcome.retry_after_s is None else outcome.retry_after_s
            elapsed_s = time.monotonic() - start
            if attempt == self.max_attempts or elapsed_s + delay_s > self.retry_deadline_s:
                server = "" if outcome.retry_after_s is None else f", and it asks to wait {outcome.retry_after_s:g} s"
                return replace(outcome, reason=f"{outcome.reason} (tried {attempt} times in {elapsed_s:.1f} s{server})")
            if outcome.retry_after_s is not None:
                self.gate.pause(delay_s)  # a wait that the server demands of one request holds for all
            self.usage.add(Usage(retries=1))

    def _attempt(self, request: Mapping[str, Any]) -> ChatReply | RequestFailure:
        response = self.send(request)
        if isinstance(response, RequestFailure):
            return response
        if response.status != 200:
            retryable = response.status in RETRYABLE_STATUS
            return RequestFailure(
                f"the server answered {response.status}: {_excerpt(response.body)}",
                retryable=retryable,
                retry_after_s=parse_retry_after(response.headers) if retryable else None,
                status=response.status,
            )
        return _parse_completion(response, self.usage)


def map_threads(function: Callable[[Item], Result], items: Sequence[Item], *, max_workers: int) -> list[Result]:
    """Apply ``function`` to the items in threads; return the results in order, or raise the first exception.

    Unlike those of ``ThreadPoolExecutor`` the threads are daemons: one that waits for a server must not keep an
    interrupted program alive.
    """
    tasks: queue.SimpleQueue[tuple[Item, Future[Result]]] = queue.SimpleQueue()
    futures: list[Future[Result]] = [Future() for _ in items]
    for task in zip(items, futures, strict=True):
        tasks.put(task)

    def worker() -> None:
        while not tasks.empty():
            with contextlib.suppress(queue.Empty):
                item, future = tasks.get_nowait()
                try:
                    future.set_result(function(item))
                except BaseException as error:  # noqa: BLE001 - raised again by future.result()
                    future.set_exception(error)

    for index in range(min(max_workers, len(items))):
        threading.Thread(target=worker, name=f"artaug-critic-{index}", daemon=True).start()
    return [future.result() for future in futures]


class _CompletionMessage(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _CompletionMessage
    finish_reason: str | None = None


class _TokenCounts(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _ChatCompletion(BaseModel):
    choices: list[_Choice]
    usage: _TokenCounts | None = None


def _parse_completion(response: HttpResponse, usage: UsageCounter) -> ChatReply | RequestFailure:
    content_type = response.headers.get("content-type", "of no type")
    try:
        document = json.loads(response.body)
    except (ValueError, RecursionError):
        truncated = "json" in content_type  # meant to be JSON, so a second attempt may get all of it
        reason = f"the server's answer, {content_type}, is no JSON: {_excerpt(response.body)}"
        return RequestFailure(reason, retryable=truncated, status=200)
    try:
        completion = _ChatCompletion.model_validate(document)
    except ValidationError as report:
        error = report.errors()[0]
        where = ".".join(map(str, error["loc"])) or "the whole"
        return RequestFailure(
            f"the server's answer is no chat completion ({where}: {error['msg']}): {_excerpt(response.body)}"
        )
    counts = completion.usage or _TokenCounts()
    usage.add(
        Usage(
            replies=1,
            input_tokens=counts.prompt_tokens,
            output_tokens=counts.completion_tokens,
            uncounted=int(completion.usage is None),
        )
    )
    if not completion.choices:
        return RequestFailure("the server's chat completion has no choices")
    choice = completion.choices[0]
    if choice.message.content is None:
        reason = choice.message.refusal or choice.finish_reason or "it gave no reason"
        return RequestFailure(f"the model refused: {reason}")
    cut = ("the reply was cut at the limit of tokens",) if choice.finish_reason == "length" else ()
    return ChatReply(choice.message.content, cut)


def _excerpt(body: bytes) -> str:
    text = " ".join(body[: 4 * _MAX_EXCERPT_CHARS].decode("utf-8", errors="replace").split())
    return repr(shorten(text, _MAX_EXCERPT_CHARS))
