"""The body of a Ray actor: one part of a run, built where it runs, and calls of it that come back as replies."""

import os
import pickle
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from artaug._internal.memory import is_out_of_memory, release_memory
from artaug.errors import PartError
from artaug.identity import identity_of
from artaug.scale.payloads import Payload, loads

Work: TypeAlias = Callable[["Replica", Callable[[object], None]], Any]
"""What a worker does: a function of the replica, which has the part, and of a function that reports events to the caller."""


@dataclass(frozen=True)
class BuiltPart:
    """What a replica has built."""

    identity: dict[str, str]
    """``identity_of(part, "")``."""
    facts: dict[str, Any]
    """What the seam's properties say."""
    load_s: float
    process: int


@dataclass(frozen=True)
class Reply:
    """The result of a call, or what it raised: errors come back as data, so that Ray does not make the call again."""

    result: Any = None
    error: BaseException | None = None

    def value(self) -> Any:  # noqa: ANN401 - of the call
        """The result.

        Raises:
            BaseException: what the call raised.
        """
        if self.error is not None:
            raise self.error
        return self.result

    @classmethod
    def of_error(cls, error: BaseException) -> "Reply":
        """A reply with an error that can be pickled: the one that was raised, or its text in one of ours."""
        text = "".join(traceback.format_exception(error))
        try:
            pickle.loads(pickle.dumps(error))  # noqa: S301 - made in the same line
        except Exception:  # noqa: BLE001 - whatever pickle says, the text is sent
            error = PartError(f"{type(error).__name__}: {error}")
        error.add_note(f"On a worker:\n{text}")
        return cls(error=error)


class Replica:
    """One copy of a part, in a process of its own."""

    def __init__(self, factory: Payload, facts: Payload, *, threads: int) -> None:
        torch.set_num_threads(threads)
        start_s = time.perf_counter()
        self.variants: dict[str, Any] = {}
        """Of the part, by what tells them apart: a synthesizer with a LoRA."""
        try:
            self.part: Any = loads(factory)()
            read: Callable[[Any], dict[str, Any]] = loads(facts)
            self._reply = Reply(
                BuiltPart(identity_of(self.part, ""), read(self.part), time.perf_counter() - start_s, os.getpid())
            )
        except Exception as error:  # noqa: BLE001 - raised by the one who asks for the description
            self._reply = Reply.of_error(error)

    def describe(self) -> Reply:
        """What was built, or why it was not."""
        return self._reply

    def call(self, work: Payload) -> Reply:
        """Do one thing."""
        return self._do(work, _ignore)

    def stream(self, work: Payload) -> Iterator[object]:
        """Do one thing and yield what it reports, and then its reply."""
        reports: queue.SimpleQueue[object] = queue.SimpleQueue()
        threading.Thread(target=lambda: reports.put(self._do(work, reports.put)), daemon=True).start()
        while True:
            report = reports.get()
            yield report
            if isinstance(report, Reply):
                return

    def _do(self, work: Payload, report: Callable[[object], None]) -> Reply:
        try:
            function: Work = loads(work)
            return Reply(function(self, report))
        except Exception as error:  # noqa: BLE001 - raised by the one who called
            if is_out_of_memory(error):
                error.__traceback__ = None  # its frames hold the tensors
                release_memory()
            return Reply.of_error(error)


def _ignore(report: object) -> None:
    pass
