"""Manners towards a server: how often to ask again, how long to wait before, and when everybody waits."""

import email.utils
import math
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

WORTH_ANOTHER_TRY = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Status codes after which the same request may succeed. 409 is a lock, 529 is what overloaded hosts send."""

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0


class Interrupted(Exception):  # noqa: N818  # no error: the run was told to stop
    """Waiting was cut short because the run is over."""


@dataclass(eq=False)
class Gate:
    """Where the threads of a critic wait: what a server asks of one, all of them heed."""

    _opens: float = 0.0
    _closed_for_good: threading.Event = field(default_factory=threading.Event)

    def pause(self, seconds: float) -> None:
        """Let nobody through for so long."""
        self._opens = max(self._opens, time.monotonic() + seconds)

    def close(self) -> None:
        """Send away all who wait or come."""
        self._closed_for_good.set()

    def pass_through(self, *, after: float = 0.0) -> None:
        """Wait ``after`` seconds, and until the gate is open.

        Raises:
            Interrupted: if the gate was closed for good.
        """
        due = time.monotonic() + after
        while (left := max(due, self._opens) - time.monotonic()) > 0 or self._closed_for_good.is_set():
            if self._closed_for_good.wait(max(left, 0)):
                raise Interrupted


def wait_before(attempt: int) -> float:
    """How many seconds to wait before an attempt, counted from 1: about twice as long each time, by chance."""
    longest = min(_FIRST_WAIT_S * 2.0 ** (attempt - 1), _LONGEST_WAIT_S)
    return longest * random.uniform(0.5, 1)


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """How many seconds a server asks to wait (``retry-after-ms``, ``retry-after`` in seconds or as a date), or None.

    >>> from artaug.critics.server.backoff import asked_wait
    >>> asked_wait({"retry-after": "2"}), asked_wait({"retry-after": "soon"})
    (2.0, None)
    """
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * unit
        except (KeyError, ValueError):
            continue
        if math.isfinite(seconds):
            return max(seconds, 0.0)
    try:
        date = email.utils.parsedate_to_datetime(headers["retry-after"])
    except (KeyError, ValueError):
        return None
    return max(date.timestamp() - time.time(), 0.0)
