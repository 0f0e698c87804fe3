"""When to retry a request: ``Retry-After``, and a pause for all threads."""

import email.utils
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

_NEWS_AFTER_S = 5.0
_LONGEST_SLEEP_S = 3600.0  # at a time: a wait of a thousand years is more than the system's clock takes


class RequestCancelled(Exception):  # noqa: N818  # control flow between threads; no caller sees it
    """A request was not sent because its batch has ended."""


@dataclass(eq=False)
class RetryGate:
    """Every request of a batch passes it, so that all threads wait when the server asks one of them to."""

    silent_since_s: float = field(default_factory=time.monotonic)
    """When a request last succeeded, by `time.monotonic`; at first, when the batch began. All requests share it, so that
    a server that is down costs its batch one deadline and not one for each request."""
    _open_at: float = 0.0
    _is_reported: bool = False
    _closed: threading.Event = field(default_factory=threading.Event)

    def pause(self, seconds: float) -> None:
        """Let no request pass for ``seconds`` from now."""
        self._open_at = max(self._open_at, time.monotonic() + seconds)

    def succeeded(self) -> None:
        """Note that the server has just answered."""
        self.silent_since_s, self._is_reported = time.monotonic(), False

    def is_news(self) -> bool:
        """Whether the server has been silent for so long that a person should hear of it: once, until it answers again."""
        if self._is_reported or time.monotonic() - self.silent_since_s < _NEWS_AFTER_S:
            return False
        self._is_reported = True
        return True

    def close(self) -> None:
        """Cancel the requests that wait, and all later ones."""
        self._closed.set()

    @property
    def is_closed(self) -> bool:
        """Whether all requests are cancelled."""
        return self._closed.is_set()

    def wait(self, *, delay_s: float = 0.0) -> None:
        """Wait for ``delay_s`` seconds and until the gate is open.

        Raises:
            RequestCancelled: if the gate is closed, or gets closed meanwhile.
        """
        due = time.monotonic() + delay_s
        while (remaining := max(due, self._open_at) - time.monotonic()) > 0 or self._closed.is_set():
            if self._closed.wait(min(max(remaining, 0), _LONGEST_SLEEP_S)):
                raise RequestCancelled


def parse_retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait (``retry-after-ms``, ``retry-after`` in seconds or as a date), or None.

    >>> from artaug.serving.backoff import parse_retry_after
    >>> parse_retry_after({"retry-after": "2"}), parse_retry_after({"retry-after": "soon"})
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
        return max(date.timestamp() - time.time(), 0.0)
    except (KeyError, ValueError, OverflowError, OSError):  # the last two for a year that the clock does not have
        return None
