"""Getting one reply out of a server that may be slow, busy, broken or gone: what is tried again, when, and how often.

It does not know how a request is sent: whoever sends it says what came back.
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
from artaug.critics.dialogue import Reply
from artaug.critics.server.backoff import WORTH_ANOTHER_TRY, Gate, asked_wait, wait_before
from artaug.critics.server.usage import Meter, Usage

_LONGEST_EXCERPT = 200

Thing = TypeVar("Thing")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Answered:
    """What a server sent back."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Fault:
    """Why there is no reply."""

    reason: str
    again: bool = False
    """Whether the same request may succeed later."""
    wait_s: float | None = None
    """How long the server asks to wait; None if it does not say."""
    status: int | None = None
    """The status code, where an answer came."""


Send: TypeAlias = Callable[[Mapping[str, Any]], Answered | Fault]
"""Sends a request, once."""


@dataclass(frozen=True)
class RetryingClient:
    """Asks again where that may help, within measure."""

    send: Send
    gate: Gate
    meter: Meter
    tries: int
    """Requests a question, at most."""
    patience_s: float
    """No further request is made for a question after so many seconds."""

    def reply(self, request: Mapping[str, Any]) -> Reply | Fault:
        """Get a reply to a request, or the last fault."""
        begun, wait, attempt = time.monotonic(), 0.0, 0
        while True:
            attempt += 1
            self.gate.pass_through(after=wait)
            outcome = self._once(request)
            if isinstance(outcome, Reply) or not outcome.again:
                return outcome
            wait = wait_before(attempt) if outcome.wait_s is None else outcome.wait_s
            passed = time.monotonic() - begun
            if attempt == self.tries or passed + wait > self.patience_s:
                asked = "" if outcome.wait_s is None else f", and it asks to wait {outcome.wait_s:g} s"
                return replace(outcome, reason=f"{outcome.reason} (tried {attempt} times in {passed:.1f} s{asked})")
            if outcome.wait_s is not None:
                self.gate.pause(wait)
            self.meter.add(Usage(retries=1))

    def _once(self, request: Mapping[str, Any]) -> Reply | Fault:
        answer = self.send(request)
        if isinstance(answer, Fault):
            return answer
        if answer.status != 200:
            return Fault(
                f"the server answered {answer.status}: {_excerpt(answer.body)}",
                again=answer.status in WORTH_ANOTHER_TRY,
                wait_s=asked_wait(answer.headers) if answer.status in WORTH_ANOTHER_TRY else None,
                status=answer.status,
            )
        return _understood(answer, self.meter)


def map_threads(work: Callable[[Thing], Made], things: Sequence[Thing], *, at_once: int) -> list[Made]:
    """Do work on many things in threads, and give what came of it in their order; the first exception is raised.

    The threads are daemons: one that waits for a server must not keep an interrupted program from ending.
    """
    todo: queue.SimpleQueue[tuple[Thing, Future[Made]]] = queue.SimpleQueue()
    made: list[Future[Made]] = [Future() for _ in things]
    for pair in zip(things, made, strict=True):
        todo.put(pair)

    def worker() -> None:
        while not todo.empty():
            with contextlib.suppress(queue.Empty):
                thing, result = todo.get_nowait()
                try:
                    result.set_result(work(thing))
                except BaseException as fault:  # noqa: BLE001 - raised where the result is asked for
                    result.set_exception(fault)

    for number in range(min(at_once, len(things))):
        threading.Thread(target=worker, name=f"artaug-critic-{number}", daemon=True).start()
    return [result.result() for result in made]


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Counts(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Completion(BaseModel):
    choices: list[_Choice]
    usage: _Counts | None = None


def _understood(answer: Answered, meter: Meter) -> Reply | Fault:
    kind = answer.headers.get("content-type", "of no type")
    try:
        said = json.loads(answer.body)
    except (ValueError, RecursionError):
        is_json = "json" in kind  # then it was meant to be whole
        return Fault(f"the server's answer, {kind}, is no JSON: {_excerpt(answer.body)}", again=is_json, status=200)
    try:
        completion = _Completion.model_validate(said)
    except ValidationError as report:
        fault = report.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "the whole"
        return Fault(f"the server's answer is no chat completion ({where}: {fault['msg']}): {_excerpt(answer.body)}")
    counts = completion.usage or _Counts()
    meter.add(
        Usage(
            replies=1,
            input_tokens=counts.prompt_tokens,
            output_tokens=counts.completion_tokens,
            uncounted=int(completion.usage is None),
        )
    )
    if not completion.choices:
        return Fault("the server's chat completion has no choices")
    choice = completion.choices[0]
    if choice.message.content is None:
        return Fault(f"the model refused: {choice.message.refusal or choice.finish_reason or 'it gave no reason'}")
    cut = ("the reply was cut at the limit of tokens",) if choice.finish_reason == "length" else ()
    return Reply(choice.message.content, cut)


def _excerpt(body: bytes) -> str:
    text = " ".join(body[: 4 * _LONGEST_EXCERPT].decode("utf-8", errors="replace").split())
    return repr(shorten(text, _LONGEST_EXCERPT))
