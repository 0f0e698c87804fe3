"""What a critic behind a server has used so far, as numbers to add up and to price."""

import threading
from dataclasses import dataclass, field, replace
from typing import Self

from artaug.errors import InvalidValueError


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What was asked of a server, and what it counted. Usages add up.

    >>> from artaug.critics import Usage
    >>> morning = Usage(replies=2, input_tokens=3000, output_tokens=400)
    >>> (morning + Usage(replies=1, input_tokens=1000)).cost(input_per_million=0.5, output_per_million=5)
    0.004
    """

    replies: int = 0
    """Requests that brought a reply."""
    retries: int = 0
    """Requests that were made again."""
    faults: int = 0
    """Questions that got no reply in the end."""
    input_tokens: int = 0
    """Tokens read, pictures included, as the server counts them."""
    output_tokens: int = 0
    """Tokens written."""
    uncounted: int = 0
    """Replies whose tokens the server did not count: with any, the tokens and the cost are lower bounds."""

    def __add__(self, other: Self) -> Self:
        return replace(self, **{name: number + getattr(other, name) for name, number in vars(self).items()})

    def cost(self, *, input_per_million: float, output_per_million: float) -> float:
        """The price of the tokens, in the currency of the prices, each for a million tokens.

        Raises:
            InvalidValueError: for a negative price.
        """
        if min(input_per_million, output_per_million) < 0:
            raise InvalidValueError(
                f"prices of {input_per_million} and {output_per_million} a million tokens: need numbers from 0 up."
            )
        return (self.input_tokens * input_per_million + self.output_tokens * output_per_million) / 1e6


@dataclass(eq=False)
class Meter:
    """Adds up what many threads use."""

    _total: Usage = Usage()
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def total(self) -> Usage:
        """All that was used until now."""
        return self._total

    def add(self, more: Usage) -> None:
        """Count some more."""
        with self._lock:
            self._total += more
