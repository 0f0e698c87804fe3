"""Value types: frozen, validated once when they are made, and the same after a round trip through JSON.

A value that exists is valid, so that no code that receives one checks it again.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, fields, is_dataclass
from functools import lru_cache, wraps
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails

from artaug._internal.annotations import kind_of, misfit_error
from artaug._internal.arguments import argument_error, unknown_argument
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
    artaug.InvalidValueError: Dose(millilitres='a lot'): expected a number, received a str.
    """
    validated: Any = dataclass(frozen=True, config=ConfigDict(extra="forbid", arbitrary_types_allowed=False))(cls)
    pydantic_init: Callable[..., None] = validated.__init__
    names = [attribute.name for attribute in fields(validated)]

    @wraps(pydantic_init)
    def init(self: T, *args: object, **kwargs: object) -> None:
        try:
            pydantic_init(self, *args, **kwargs)
        except ValidationError as report:
            passed = {**dict(zip(names, args, strict=False)), **kwargs}
            raise _as_artaug_error(report, cls, passed) from None
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
        raise _as_artaug_error(report, cls) from None
    return instance


_adapter: Callable[[Any], TypeAdapter[Any]] = lru_cache(maxsize=64)(TypeAdapter)
"""Made once a type: it compiles the type's schema, which takes longer than reading a value."""


def _check_encodable(cls: str, name: str, attribute: object) -> None:
    """Refuse lone surrogates, which some models' replies hold: no file can be written with them."""
    if isinstance(attribute, str) and any("\ud800" <= character <= "\udfff" for character in attribute):
        raise InvalidValueError(
            f"{cls}: {name}: holds half a character; received {shorten(repr(attribute), _LONGEST_QUOTE)}"
        )


def _as_artaug_error(
    report: ValidationError,
    cls: Any,  # noqa: ANN401 - a type
    passed: Mapping[str, object] | None = None,
) -> ArtAugError:
    """Turn pydantic's report into one artaug error: that of the class's own rule if there is one, else one for each argument.

    Args:
        report: what pydantic says.
        cls: the type of the value.
        passed: the constructor's arguments by name; None for a value that was read from JSON.
    """
    errors = report.errors(include_url=False)
    for error in errors:
        cause = error.get("ctx", {}).get("error")
        if isinstance(cause, ArtAugError):
            return cause
    owner = getattr(cls, "__name__", report.title)
    names = [attribute.name for attribute in fields(cls)] if is_dataclass(cls) else []
    first = {_argument_name(error, names): error for error in reversed(errors)}  # of a union, one for each member
    missing = [name for name, error in first.items() if error["type"] == "missing"][::-1]
    others = [(name, error) for name, error in first.items() if name not in missing][::-1]
    faults = [
        InvalidValueError(f"{owner}() lacks {' and '.join(missing)}: expected {owner}({', '.join(names)}).")
    ] * bool(missing)
    faults += [_argument_fault(owner, name, error, cls, names=names, passed=passed) for name, error in others]
    advice = getattr(cls, "_advice", "")
    if len(faults) == 1:
        return InvalidValueError(f"{faults[0]}{advice}")
    lines = "".join(f"\n- {fault}" for fault in faults)
    return InvalidValueError(f"{owner}: {len(faults)} things are wrong:{lines}{advice}")


def _argument_name(error: ErrorDetails, names: Sequence[str]) -> str:
    """The argument that an error is about; one that was passed by position is called by its place in ``names``."""
    if not error["loc"]:
        return ""
    first = error["loc"][0]
    return names[first] if isinstance(first, int) and first < len(names) else str(first)


def _argument_fault(
    owner: str,
    name: str,
    error: ErrorDetails,
    cls: Any,  # noqa: ANN401 - a type
    *,
    names: Sequence[str],
    passed: Mapping[str, object] | None,
) -> InvalidValueError:
    """The error of one argument, worded by its annotation, or else by what pydantic says of it."""
    if error["type"].startswith("unexpected"):
        return unknown_argument(owner, name, error["input"], names=names)
    if passed is not None and name in passed:
        hint = next((attribute.type for attribute in fields(cls) if attribute.name == name), object)
        kind = kind_of(hint, vars(sys.modules[cls.__module__]))
        misfit = kind(passed[name]) if kind is not None else None
        if misfit is not None:
            return misfit_error(owner, name, misfit)
    path = name + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"][1:])
    expected = error["msg"].partition(", unable")[0].removeprefix("Input should be ").replace("valid string", "text")
    expected = re.sub(r"^a valid ", "a ", expected)
    expected = re.sub(r"^(?=greater|less)", "a number ", expected)
    return argument_error(owner, path or "value", error["input"], expected=expected)
