"""Value types: frozen, validated once when they are made, and the same after a round trip through JSON.

A value that exists is valid, so that no code that receives one checks it again.
"""

from collections.abc import Callable, Sequence
from dataclasses import field, fields
from functools import lru_cache, wraps
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
    JSON show no numpy types. The text of an error ends with the class's ``_advice``, if it has one. A rule of the class
    itself goes into ``__post_init__`` and raises an `ArtAugError`, which reaches the caller as it is, not wrapped in
    pydantic's report.

    >>> from artaug._internal.values import value
    >>> @value
    ... class Dose:
    ...     millilitres: float
    >>> Dose("a lot")
    Traceback (most recent call last):
    artaug.InvalidValueError: Dose: millilitres: Input should be a valid number, unable to parse string as \
a number; received 'a lot'
    """
    validated: Any = dataclass(frozen=True, config=ConfigDict(extra="forbid", arbitrary_types_allowed=False))(cls)
    pydantic_init: Callable[..., None] = validated.__init__
    advice: str = getattr(cls, "_advice", "")
    names = [attribute.name for attribute in fields(validated)]

    @wraps(pydantic_init)
    def init(self: T, *args: object, **kwargs: object) -> None:
        try:
            pydantic_init(self, *args, **kwargs)
        except ValidationError as report:
            raise _as_artaug_error(report, names, advice=advice) from None
        for name in names:
            _check_encodable(validated.__name__, name, getattr(self, name))

    validated.__init__ = init
    result: type[T] = validated
    return result


def to_json(instance: object) -> str:
    """Write a value as one line of JSON.

    >>> import artaug as aa
    >>> from artaug._internal.values import to_json
    >>> to_json(aa.Box(0, 0, 0.5, 1))
    '{"left":0.0,"top":0.0,"right":0.5,"bottom":1.0}'
    """
    return _adapter(type(instance)).dump_json(instance).decode()


def from_json(cls: type[T], text: str | bytes) -> T:
    """Read a value of type ``cls`` from JSON.

    Raises:
        InvalidValueError: if the text is not JSON, or not that of a ``cls`` (a `GeometryError` for an illegal box, ...).

    >>> import artaug as aa
    >>> from artaug._internal.values import from_json
    >>> from_json(aa.Box, '{"left": 0, "top": 0, "right": 0.5, "bottom": 1}')
    Box(left=0.0, top=0.0, right=0.5, bottom=1.0)
    """
    try:
        instance: T = _adapter(cls).validate_json(text)
    except ValidationError as report:
        raise _as_artaug_error(report) from None
    return instance


_adapter: Callable[[Any], TypeAdapter[Any]] = lru_cache(maxsize=64)(TypeAdapter)
"""Made once a type: it compiles the type's schema, which takes longer than reading a value."""


def _check_encodable(cls: str, name: str, attribute: object) -> None:
    """Refuse lone surrogates, which some models' replies hold: no file can be written with them."""
    if isinstance(attribute, str) and any("\ud800" <= character <= "\udfff" for character in attribute):
        raise InvalidValueError(
            f"{cls}: {name}: holds half a character; received {shorten(repr(attribute), _LONGEST_QUOTE)}"
        )


def _as_artaug_error(report: ValidationError, names: Sequence[str] = (), *, advice: str = "") -> ArtAugError:
    """Turn pydantic's report into one artaug error: that of the class's own rule if there is one, else a line per field.

    Arguments that were passed by position are called by their place in ``names``.
    """
    errors = report.errors(include_url=False)
    for error in errors:
        cause = error.get("ctx", {}).get("error")
        if isinstance(cause, ArtAugError):
            return cause
    lines = [
        f"{_field_path(error['loc'], names)}: {error['msg']}; received {shorten(repr(error['input']), _LONGEST_QUOTE)}"
        for error in errors
    ]
    return InvalidValueError(f"{report.title}: " + "; ".join(lines) + advice)


def _field_path(location: Sequence[int | str], names: Sequence[str]) -> str:
    first, *rest = location or ("value",)
    field_name = names[first] if isinstance(first, int) and first < len(names) else first
    return ".".join(str(part) for part in (field_name, *rest))
