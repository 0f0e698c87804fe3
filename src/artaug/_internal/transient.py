"""Which exceptions are expected to pass by themselves, so that the same call may succeed later, and when to try it again."""

import errno
import random
from dataclasses import dataclass

from artaug._internal.annotations import checked

DEADLINE_S = 600.0
"""How long a server may stay away before a run ends in order: a restart, or the loading of a large model, takes minutes."""
_FIRST_DELAY_S, _MAX_DELAY_S = 0.5, 30.0

RETRYABLE_STATUS = frozenset({408, 409, 425, 429, *range(500, 600)}) - {501, 505, 511}
"""HTTP status codes after which the same request may succeed: 409 is a lock, 425 and 429 are too early and too often, 529
is sent by overloaded hosts and 520 to 527 by a proxy of theirs. 501, 505 and 511 say the same at any time."""

_NETWORK_ERRNO = frozenset(
    {errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTUNREACH, errno.ETIMEDOUT, errno.ECONNREFUSED}
)
_STATUS_FIELDS = ("status_code", "status", "code")  # openai, httpx, requests; aiohttp; urllib, google


@checked
@dataclass(frozen=True)
class TransientErrors:
    """Which exceptions are transient: a timeout, a lost connection, a busy server. All others are bugs.

    An exception is transient if its class, or a base class of it, has one of the ``names``, or if it states an HTTP status
    among the ``statuses``, itself or in its ``response``. The defaults cover the standard library, requests, httpx,
    aiohttp, urllib3 and the clients of OpenAI and Anthropic. Running out of memory is never transient.

    >>> from artaug.critics import TransientErrors
    >>> TransientErrors().matches(ConnectionResetError()), TransientErrors().matches(KeyError("boxes"))
    (True, False)
    >>> TransientErrors(names=("ModelLoadingError", *TransientErrors().names)).matches(TimeoutError())
    True
    """

    names: tuple[str, ...] = (
        "TimeoutError",  # also urllib3's
        "ConnectionError",  # also requests'
        "gaierror",
        "IncompleteRead",  # http.client
        "SSLEOFError",
        "Timeout",  # requests
        "ChunkedEncodingError",
        "TimeoutException",  # httpx
        "NetworkError",
        "RemoteProtocolError",
        "MaxRetryError",  # urllib3
        "NewConnectionError",
        "ProtocolError",
        "ClientConnectionError",  # aiohttp
        "ClientPayloadError",
        "APIConnectionError",  # openai, anthropic
    )
    """Names of exception classes. Names, so that a client need not be installed to be listed."""
    statuses: frozenset[int] = RETRYABLE_STATUS
    """HTTP status codes."""

    def matches(self, error: BaseException | None) -> bool:
        """Whether an exception is transient, or only wraps one that is (``urllib.error.URLError``)."""
        if not isinstance(error, Exception):
            return False
        if any(base.__name__ in self.names for base in type(error).__mro__):
            return True
        if isinstance(error, OSError) and error.errno in _NETWORK_ERRNO:
            return True
        owners = (error, getattr(error, "response", None))
        stated = [getattr(owner, name, None) for owner in owners for name in _STATUS_FIELDS]
        if any(isinstance(status, int) and status in self.statuses for status in stated):
            return True
        reason = getattr(error, "reason", None)
        return isinstance(reason, Exception) and reason is not error and self.matches(reason)


def backoff_delay_s(attempt: int) -> float:
    """Seconds to wait after attempt ``attempt``, counted from 1: exponential with jitter, at most 30.

    ``min(0.5 * 2 ** (attempt - 1), 30)`` times a random factor in [0.5, 1].
    """
    longest = min(_FIRST_DELAY_S * 2.0 ** (attempt - 1), _MAX_DELAY_S)
    return longest * random.uniform(0.5, 1)
