"""The check of what was passed against the annotations of what is public: once at the door, in the grammar of `arguments`.

`checked` decorates a function, or a class, of which it checks the constructor and the public methods. `Seam` is the base of
what users subclass: their methods are checked too, without their doing anything. A value that pydantic reads is checked by
pydantic, and `artaug._internal.values` words its report by what is here.

What an annotation cannot say, a range or a rule between two arguments, stays with the function or ``__post_init__``.
"""

import inspect
import os
import types
from abc import ABC
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import InitVar
from enum import Enum
from functools import wraps
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, ForwardRef, Literal, NamedTuple, TypeAlias, TypeVar, Union, get_args, get_origin

import numpy as np

from artaug._internal.arguments import ADVICE_BY_NAME, Faults, advice_for, argument_error, type_name, unknown_argument
from artaug.errors import InvalidValueError, PromptError

T = TypeVar("T")


class Misfit(NamedTuple):
    """Where a value does not fit its annotation."""

    place: str
    """Within the argument: ``"[2]"`` of a list, ``"['a']"`` of a dict, empty for the argument itself."""
    value: object
    expected: str
    classes: tuple[type, ...] = ()
    """Of which an instance is expected, for the advice."""


Kind: TypeAlias = Callable[[object], Misfit | None]
"""What an annotation allows: None for a value that fits."""

_PLAIN: Mapping[object, tuple[str, Callable[[object], bool]]] = {
    # As pydantic and PEP 484's tower: numpy's numbers are numbers, an int is a float, and True is no number.
    int: ("a whole number", lambda value: isinstance(value, Integral) and not isinstance(value, bool)),
    float: ("a number", lambda value: isinstance(value, Real) and not isinstance(value, bool)),
    bool: ("True or False", lambda value: isinstance(value, bool | np.bool_)),
    str: ("a text", lambda value: isinstance(value, str)),
    bytes: ("bytes", lambda value: isinstance(value, bytes)),
    Path: ("a path", lambda value: isinstance(value, str | os.PathLike)),  # a class with such a field makes it a Path
    os.PathLike: ("a path", lambda value: isinstance(value, os.PathLike)),
    None: ("None", lambda value: value is None),
    types.NoneType: ("None", lambda value: value is None),
}
_NESTED: Mapping[object, tuple[str, type]] = {
    Sequence: ("a list", Sequence),
    list: ("a list", list),
    Iterable: ("a list", Iterable),
    Collection: ("a list", Collection),
    Mapping: ("a dict", Mapping),
    dict: ("a dict", Mapping),
    AbstractSet: ("a set", AbstractSet),
    frozenset: ("a frozenset", AbstractSet),
    set: ("a set", AbstractSet),
}


def kind_of(hint: Any, names: Mapping[str, object] = types.MappingProxyType({})) -> Kind | None:  # noqa: ANN401, C901, PLR0911, PLR0912 - one branch for each form of annotation
    """Read an annotation; None for one that allows anything, or that only a type checker can read.

    Args:
        hint: the annotation.
        names: what names in a quoted annotation stand for: the globals of its module.

    >>> from artaug._internal.annotations import kind_of
    >>> kind_of(list[int])([1, "2"])
    Misfit(place='[1]', value='2', expected='a whole number', classes=())
    """
    if isinstance(hint, str | ForwardRef):
        text = hint if isinstance(hint, str) else hint.__forward_arg__
        try:
            return kind_of(eval(text, dict(names)), names)  # noqa: S307 - an annotation of the program's own source
        except NameError:  # imported for type checkers alone
            return None
    if isinstance(hint, InitVar):
        return kind_of(hint.type, names)
    if isinstance(hint, TypeVar):
        return kind_of(hint.__bound__, names) if hint.__bound__ else None
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return kind_of(arguments[0], names)
    if (plain := _PLAIN.get(origin or hint)) is not None:
        words, fits = plain
        return lambda value: None if fits(value) else Misfit("", value, words)
    if origin is Literal:
        words = f"one of {', '.join(map(repr, arguments))}" if len(arguments) > 1 else repr(arguments[0])
        return lambda value: (
            None if isinstance(value, str | int | None) and value in arguments else Misfit("", value, words)
        )
    if origin in {Union, types.UnionType}:
        return _any_of([kind_of(argument, names) for argument in arguments])
    if origin is tuple or hint is tuple:
        return _tuple_of(arguments, names)
    if origin in _NESTED or hint in _NESTED:
        return _nested(origin or hint, arguments, names)
    if origin is Callable or hint is Callable:
        return _function_of(arguments)
    if origin is type:
        base = arguments[0] if isinstance(arguments[0], type) else object
        words = f"{type_name(base)}, or a class of yours that is one"
        return lambda value: None if isinstance(value, type) and issubclass(value, base) else Misfit("", value, words)
    if array := getattr(hint, "array_type", None):  # of jaxtyping, whose shapes are checked where the tensors are used
        return kind_of(array, names)
    of = origin or hint
    if not isinstance(of, type) or of in {object, Any} or (getattr(of, "_is_protocol", False) and not _is_runtime(of)):
        return None
    members = f": {', '.join(f'{of.__name__}.{one.name}' for one in of)}" if issubclass(of, Enum) else ""
    words = f"an instance of {type_name(of)}{members}"
    return lambda value: None if isinstance(value, of) else Misfit("", value, words, (of,))


def _function_of(arguments: Sequence[Any]) -> Kind:
    """A function; a class of ours only where one is asked for that makes an object of nothing, as a class does."""
    takes, makes = arguments or (..., None)
    if takes == [] and isinstance(makes, type) and makes is not types.NoneType:
        words = f"a function without arguments that makes an object of {type_name(makes)}"
        return lambda value: None if callable(value) else Misfit("", value, words)
    return lambda value: None if callable(value) and not _is_ours(value) else Misfit("", value, "a function")


def _is_ours(value: object) -> bool:
    """Whether it is a class of artaug: where a function is asked for that takes something, an object of it was meant."""
    return isinstance(value, type) and value.__module__.partition(".")[0] == "artaug"


def _is_runtime(protocol: type) -> bool:
    return getattr(protocol, "_is_runtime_protocol", False)


def _any_of(kinds: Sequence[Kind | None]) -> Kind | None:
    known = [kind for kind in kinds if kind is not None]
    if len(known) < len(kinds):
        return None

    def misfit(value: object) -> Misfit | None:
        found = []
        for kind in known:
            one = kind(value)
            if one is None:
                return None
            found.append(one)
        inner = [one for one in found if one.place]
        if len(inner) == 1:  # the right container, with something wrong in it
            return inner[0]
        words = dict.fromkeys(one.expected for one in found if not one.place)
        if "a path" in words:
            words.pop("a text", None)
        return Misfit(
            "", value, " or ".join(words), tuple(cls for one in found if not one.place for cls in one.classes)
        )

    return misfit


def _nested(origin: Any, arguments: Sequence[Any], names: Mapping[str, object]) -> Kind:  # noqa: ANN401
    """A container, and each of its items where looking at them costs nothing: those of a list may be pictures in files."""
    words, of = _NESTED[origin]
    items = [kind_of(argument, names) for argument in arguments]
    expected = f"{words} of {plural_of(arguments)}" if arguments and any(items) else words

    def misfit(value: object) -> Misfit | None:
        if not isinstance(value, of) or isinstance(value, str | bytes):
            return Misfit("", value, expected)
        if isinstance(value, dict) and len(items) == 2:
            for key, item in value.items():
                if items[0] and (one := items[0](key)):
                    return one._replace(place=f" key {key!r:.60}")
                if items[1] and (one := items[1](item)):
                    return one._replace(place=f"[{key!r}]{one.place}")
        elif isinstance(value, list | tuple | set | frozenset | np.ndarray) and items and (kind := items[0]):
            for index, item in enumerate(value):
                if one := kind(item):
                    return one._replace(place=f"[{index}]{one.place}")
        return None

    return misfit


def _tuple_of(arguments: Sequence[Any], names: Mapping[str, object]) -> Kind:
    """A tuple, or a list in its place."""
    if not arguments or arguments[-1] is Ellipsis:
        return _nested(Sequence, arguments[:1], names)
    kinds = [kind_of(argument, names) for argument in arguments]
    count = ("no", "one", "two", "three", "four")[len(kinds)] if len(kinds) < 5 else str(len(kinds))
    expected = f"{count} {plural_of(dict.fromkeys(arguments))}"

    def misfit(value: object) -> Misfit | None:
        if not isinstance(value, tuple | list) or len(value) != len(kinds):
            return Misfit("", value, expected)
        for index, (kind, item) in enumerate(zip(kinds, value, strict=True)):
            if kind and (one := kind(item)):
                return one._replace(place=f"[{index}]{one.place}")
        return None

    return misfit


_PLURALS = {str: "texts", int: "whole numbers", float: "numbers", bool: "True or False"}


def plural_of(hints: Iterable[Any]) -> str:
    """What the items of a container are, in words."""
    return " and ".join(_plural(hint) for hint in hints if hint is not Ellipsis)


def _plural(hint: Any) -> str:  # noqa: ANN401 - an annotation
    if hint in _PLURALS:
        return _PLURALS[hint]
    if get_origin(hint) in {Union, types.UnionType}:
        return " or ".join(_plural(argument) for argument in get_args(hint))
    return type_name(hint) if isinstance(hint, type) and hint is not Any else "values"


class Door:
    """The parameters of a function, which are read from its annotations when it is first called."""

    identity = "door"
    """What is passed does not count in what a function is, see `artaug.identity`."""

    def __init__(self, function: Callable[..., Any], *, owner: str, like: "Door | None" = None) -> None:
        """Args: the function; what an error calls it; the door of the method that it overrides, if it does."""
        self._function, self._owner, self._like = function, owner, like
        self._kinds: dict[str, Kind | None] | None = None
        self.positional: list[str] = []
        self._named_only: list[str] = []
        module = function.__module__ or ""  # None of a class that `exec` made
        self._is_open = like is not None and module.partition(".")[0] != "artaug"  # a user's, for Python

    def __reduce__(self) -> tuple[Any, ...]:
        return _door, (self._function, self._owner, self._like)

    def kinds(self) -> dict[str, Kind | None]:
        """What each parameter allows. A parameter of an override without an annotation allows what the overridden one does."""
        if self._kinds is None:
            names = getattr(self._function, "__globals__", {})
            parameters = inspect.signature(self._function).parameters.values()
            above = self._like.kinds() if self._like else {}
            above_positional = self._like.positional if self._like else []
            kinds: dict[str, Kind | None] = {}
            for index, one in enumerate(parameters):
                if one.kind in {one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD}:
                    self.positional.append(one.name)
                elif one.kind is one.KEYWORD_ONLY:
                    self._named_only.append(one.name)
                else:
                    self._is_open = True
                if one.annotation is not one.empty:
                    kinds[one.name] = kind_of(one.annotation, names)
                elif one.name in above or one.kind is one.KEYWORD_ONLY:
                    kinds[one.name] = above.get(one.name)
                else:
                    kinds[one.name] = above.get(above_positional[index]) if index < len(above_positional) else None
            self._kinds = kinds
        return self._kinds

    def check(self, arguments: Sequence[object], named: Mapping[str, object]) -> None:
        """Refuse arguments that do not fit, and those that there are not; which ones are missing is for Python to check.

        Raises:
            InvalidValueError: that lists all that do not fit.
        """
        kinds = self.kinds() if self._kinds is None else self._kinds
        if not self._is_open and (len(arguments) > len(self.positional) or not named.keys() <= kinds.keys()):
            self._refuse_unknown(arguments, named)
        misfits = []
        for name, value in zip(self.positional, arguments, strict=False):
            if (kind := kinds[name]) is not None and (misfit := kind(value)) is not None:
                misfits.append((name, misfit))
        for name, value in named.items():
            if (kind := kinds.get(name)) is not None and (misfit := kind(value)) is not None:
                misfits.append((name, misfit))
        if misfits:
            owner = type(arguments[0]).__name__ if self._owner.endswith("__init__") else self._owner
            faults = Faults(owner)
            for name, misfit in misfits:
                with faults.collected():
                    raise misfit_error(owner, name, misfit)
            faults.raise_any()

    def _refuse_unknown(self, arguments: Sequence[object], named: Mapping[str, object]) -> None:
        """Refuse names that are no parameters, and arguments without a name where only names are taken."""
        bound = 1 if self.positional[:1] in (["self"], ["cls"]) else 0
        owner = type(arguments[0]).__name__ if self._owner.endswith("__init__") else self._owner
        names = [*self.positional[bound:], *self._named_only]
        received, taken = len(arguments) - bound, len(self.positional) - bound
        faults = Faults(owner)
        for name, value in named.items():
            if name not in names:
                with faults.collected():
                    raise unknown_argument(owner, name, value, names=names)
        if received > taken:
            written = ", ".join(f"{name}=..." for name in names[:received])
            with faults.collected():
                raise InvalidValueError(
                    f"{owner} received {received} argument{'s' * (received > 1)} without a name and takes {taken or 'none'}. "
                    f"Write {owner}({written})."
                )
        faults.raise_any()


def _door(function: Callable[..., Any], owner: str, like: Door | None) -> Door:
    return Door(function, owner=owner, like=like)


def misfit_error(owner: str, name: str, misfit: Misfit) -> InvalidValueError:
    """The error for an argument that does not fit its annotation."""
    advice = ADVICE_BY_NAME.get(name) or advice_for(misfit.classes, misfit.value, expected=misfit.expected)
    error = argument_error(owner, f"{name}{misfit.place}", misfit.value, expected=misfit.expected, advice=advice)
    return PromptError(str(error)) if name in {"prompt", "prompts"} else error


def checked(target: T) -> T:
    """Check what is passed to a function, or to the constructor and the public methods of a class, against the annotations.

    >>> from artaug._internal.annotations import checked
    >>> @checked
    ... def repeat(word: str, *, times: int) -> str:
    ...     return word * times
    >>> repeat("ab", times="2")
    Traceback (most recent call last):
    artaug.InvalidValueError: repeat(times='2'): expected a whole number, received a str.
    """
    if isinstance(target, type):
        for name, member in list(vars(target).items()):
            if not name.startswith("_") or name == "__init__":
                _check_member(target, name, member)
        return target
    function: Any = target
    result: T = _wrapped(function, owner=function.__qualname__)
    return result


class Seam(ABC):  # noqa: B024 - each seam has its abstract method
    """Base of the classes that users subclass. What is passed to a method of theirs is checked as the seam's own is."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name, member in list(vars(cls).items()):
            overridden = next((vars(base)[name] for base in cls.__mro__[1:] if name in vars(base)), None)
            if not name.startswith("_") and (Seam in cls.__bases__ or overridden is not None):
                _check_member(cls, name, member, like=getattr(overridden, "__door__", None))


def _check_member(cls: type, name: str, member: object, *, like: Door | None = None) -> None:
    """Wrap a method of a class, if it is one; a property, a class or a constant stays as it is."""
    owner = f"{cls.__name__}.{name}"
    if isinstance(member, classmethod | staticmethod):
        inner: Any = member.__func__
        if inspect.isfunction(inner) and not hasattr(inner, "__door__"):
            setattr(cls, name, type(member)(_wrapped(inner, owner=owner)))
    elif inspect.isfunction(member) and not hasattr(member, "__door__"):
        setattr(cls, name, _wrapped(member, owner=owner, like=like))


def _wrapped(function: Any, *, owner: str, like: Door | None = None) -> Any:  # noqa: ANN401 - of any signature
    door = Door(function, owner=owner, like=like)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        door.check(args, kwargs)
        return function(*args, **kwargs)

    call.__door__ = door  # type: ignore[attr-defined]
    return call
