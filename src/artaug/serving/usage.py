"""Token and request counts of a critic whose model runs behind a server."""

import threading
from dataclasses import dataclass, replace
from typing import Self

from artaug._internal.annotations import checked
from artaug.errors import InvalidValueError


@checked
@dataclass(frozen=True, kw_only=True)
class Usage:
    """Requests to a server and the tokens it counted. Usages can be added.

    >>> from artaug.critics import Usage
    >>> morning = Usage(replies=2, input_tokens=3000, output_tokens=400)
    >>> (morning + Usage(replies=1, input_tokens=1000)).cost(input_per_million=0.5, output_per_million=5)
    0.004
    """

    replies: int = 0
    """Requests that got a reply."""
    retries: int = 0
    """Requests that were repeated."""
    failures: int = 0
    """Requests without a reply after all retries."""
    input_tokens: int = 0
    """Input tokens, images included, as the server counts them."""
    output_tokens: int = 0
    """Output tokens."""
    uncounted: int = 0
    """Replies without token counts: if there are any, the tokens and the cost are lower bounds."""

    def __add__(self, other: Self) -> Self:
        return replace(self, **{name: count + getattr(other, name) for name, count in vars(self).items()})

    def cost(self, *, input_per_million: float, output_per_million: float) -> float:
        """The price of the tokens, in the currency of the prices, which are for a million tokens.

        Raises:
            InvalidValueError: for a negative price.
        """
        if min(input_per_million, output_per_million) < 0:
            raise InvalidValueError(
                f"prices of {input_per_million} and {output_per_million} per million tokens: need numbers from 0 up."
            )
        return (self.input_tokens * input_per_million + self.output_tokens * output_per_million) / 1e6


class UsageCounter:
    """Adds up usages from many threads. No dataclass: `dataclasses.asdict` would copy the lock of one."""

    def __init__(self, total: Usage = Usage()) -> None:
        self._total = total
        self._lock = threading.Lock()

    @property
    def total(self) -> Usage:
        """The sum of everything added so far."""
        return self._total

    def add(self, usage: Usage) -> None:
        """Add a usage."""
        with self._lock:
            self._total += usage

    def __reduce__(self) -> tuple[type["UsageCounter"], tuple[Usage]]:
        return UsageCounter, (self._total,)  # a lock cannot be pickled
