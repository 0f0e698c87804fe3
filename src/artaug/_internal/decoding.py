"""JSON of other people: whatever is wrong with it is a ``ValueError``."""

import json
from typing import Any


def decode_json(text: str | bytes) -> Any:  # noqa: ANN401 - JSON
    """Decode JSON, as ``json.loads`` does.

    Raises:
        ValueError: if it is not JSON, or nested deeper than Python can follow: ``json.loads`` raises ``RecursionError``
            for that, which no caller would think of.

    >>> from artaug._internal.decoding import decode_json
    >>> decode_json("[1, 2]")
    [1, 2]
    >>> decode_json("[" * 100_000)
    Traceback (most recent call last):
    ValueError: it is nested too deeply
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
