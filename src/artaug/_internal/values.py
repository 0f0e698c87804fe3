"""What a value is in artaug: frozen, checked once when it is made, and the same after a trip through JSON.

A value that exists is legal, so nobody who receives one checks it again.
"""

from collections.abc import Callable, Sequence
from dataclasses import field, fields
from functools import wraps
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from artaug._internal.text import shorten
from artaug.errors import ArtAugError, InvalidValueError

T = TypeVar("T")

_LONGEST_QUOTE = 120
"""Characters of a value that an error quotes."""


@dataclass_transform(frozen_default=True, field_specifiers=(Field, field))
def value(cls: type[T]) -> type[T]:
    """Make a class a frozen, validated pydantic dataclass whose errors are artaug's own.

    Unknown arguments are refused; numbers are coerced to plain Python numbers (numpy scalars too), so reprs and
    JSON stay clean. A rule of the class itself goes into ``__post_init__`` and raises an `ArtAugError`, which the
    caller then sees as it is, not wrapped into pydantic's report.

    >>> from artaug._internal.values import value
    >>> @value
    ... class Dose:
    ...     millilitres: float
    >>> Dose("a lot")
    Traceback (most recent call last):
    artaug.InvalidValueError: Dose: millilitres: Input should be a valid number, unable to parse string as \
a number; received 'a lot'
    """
    made: Any = dataclass(frozen=True, config=ConfigDict(extra="forbid", arbitrary_types_allowed=False))(cls)
    validate: Callable[..., None] = made.__init__
    names = [one.name for one in fields(made)]

    @wraps(validate)
    def checked(self: T, *args: object, **kwargs: object) -> None:
        try:
            validate(self, *args, **kwargs)
        except ValidationError as report:
            raise _in_our_words(report, names) from None
        for name in names:
            _check_writable(made.__name__, name, getattr(self, name))

    made.__init__ = checked
    finished: type[T] = made
    return finished


def to_json(thing: object) -> str:
    """Write a value as one line of JSON.

    >>> import artaug as aa
    >>> from artaug._internal.values import to_json
    >>> to_json(aa.Box(0, 0, 0.5, 1))
    '{"left":0.0,"top":0.0,"right":0.5,"bottom":1.0}'
    """
    return TypeAdapter(type(thing)).dump_json(thing).decode()


def from_json(kind: type[T], text: str | bytes) -> T:
    """Read a value of type ``kind`` from JSON.

    Raises:
        InvalidValueError: the text is no JSON, or not that of a ``kind`` (a `GeometryError` for an illegal box, ...).

    >>> import artaug as aa
    >>> from artaug._internal.values import from_json
    >>> from_json(aa.Box, '{"left": 0, "top": 0, "right": 0.5, "bottom": 1}')
    Box(left=0.0, top=0.0, right=0.5, bottom=1.0)
    """
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as report:
        raise _in_our_words(report) from None


def _check_writable(kind: str, name: str, thing: object) -> None:
    """Refuse halves of surrogate pairs, which some models' replies hold and no file can."""
    if isinstance(thing, str) and any("\ud800" <= letter <= "\udfff" for letter in thing):
        raise InvalidValueError(
            f"{kind}: {name}: holds half a character; received {shorten(repr(thing), _LONGEST_QUOTE)}"
        )


def _in_our_words(report: ValidationError, names: Sequence[str] = ()) -> ArtAugError:
    """Turn pydantic's report into one artaug error: the rule's own where there is one, else a line per field.

    Arguments that came by position are called by their place in ``names``.
    """
    faults = report.errors(include_url=False)
    for fault in faults:
        cause = fault.get("ctx", {}).get("error")
        if isinstance(cause, ArtAugError):
            return cause
    lines = [
        f"{_path(fault['loc'], names)}: {fault['msg']}; received {shorten(repr(fault['input']), _LONGEST_QUOTE)}"
        for fault in faults
    ]
    return InvalidValueError(f"{report.title}: " + "; ".join(lines))


def _path(parts: Sequence[int | str], names: Sequence[str]) -> str:
    first, *rest = parts or ("value",)
    named = names[first] if isinstance(first, int) and first < len(names) else first
    return ".".join(str(part) for part in (named, *rest))
