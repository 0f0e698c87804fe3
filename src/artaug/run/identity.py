"""What an object is, in words that are the same in every process: by it a run is recognized when it is called again."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from enum import Enum
from functools import partial, singledispatch
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, NoneType
from typing import Any, NamedTuple

import torch
from torch import nn

from artaug._internal.digests import digest
from artaug.errors import InvalidValueError
from artaug.training.fingerprints import module_fingerprint

_SECRET_NAME = re.compile(r"(^|_)(key|token|auth|authorization)$|secret|passw|credential", re.IGNORECASE)
_SECRET = re.compile(r"\b(hf_|sk-|ghp_|Bearer )\S{8,}")
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_LONG = 300
"""Characters of a value that is written out; of a longer one the digest is."""
_DEPTH = 8


def identity_of(value: object, name: str) -> dict[str, str]:
    """Everything about an object that may decide what it returns, by dotted names under ``name``.

    An object may say it itself by an attribute ``identity``, a string or a mapping of names to values. Of a dataclass the
    fields that its repr shows count, of any other object the attributes without a leading underscore. Models count by
    class and weights, functions by name and code. Whatever is called a key, a token or a secret is left out.

    Raises:
        InvalidValueError: for an object that nothing distinguishes but its address in memory.

    >>> import artaug as aa
    >>> from artaug.run.identity import identity_of
    >>> identity_of(aa.ConcatFuser(), "fuser")["fuser"]
    'artaug.ConcatFuser'
    """
    items: dict[str, str] = {}
    _describe(value, name, items, _DEPTH)
    return items


def _describe(value: object, name: str, items: dict[str, str], depth: int) -> None:
    if depth == 0 or _SECRET_NAME.search(name.rpartition(".")[2]):
        return
    stated = None if isinstance(value, type) else getattr(value, "identity", None)
    if isinstance(stated, Mapping):
        description = _Description(_class_name(value), stated)
    elif isinstance(stated, str) and stated:
        description = _Description(f"{_class_name(value)}: {stated}")
    else:
        description = _split(value)
        if _ADDRESS.search(description.text):
            raise InvalidValueError(
                f"{name}: this {_class_name(value)} cannot be distinguished from another one: its repr has nothing but its "
                "address in memory. Give its class an attribute identity='...' with all that its results depend on."
            )
    if description.text:
        items[name] = _shorten(description.text)
    for part, item in description.parts.items():
        _describe(item, f"{name}.{part}", items, depth - 1)


class _Description(NamedTuple):
    text: str = ""
    """Of the value itself."""
    parts: Mapping[str, Any] = {}
    """By name."""


@singledispatch
def _split(value: Any) -> _Description:  # noqa: ANN401 - of any type
    """Describe a value and name its parts; one function for each kind of value."""
    if dataclasses.is_dataclass(value):
        shown = {item.name: getattr(value, item.name) for item in dataclasses.fields(value) if item.repr}
        return _Description(_class_name(value), shown)
    attributes = getattr(value, "__dict__", None)
    if attributes is None:
        return _Description(repr(value))
    public = {name: item for name, item in sorted(attributes.items()) if not name.startswith("_")}
    return _Description(_class_name(value), public)


@_split.register(int | float | complex | bytes | NoneType | PurePath | torch.dtype | torch.device)
def _(value: object) -> _Description:
    return _Description(repr(value))


@_split.register(str | Enum | type)
def _(value: object) -> _Description:
    return _Description(str(value))


@_split.register
def _(value: nn.Module) -> _Description:
    return _Description(module_fingerprint(value))


@_split.register
def _(value: torch.Tensor) -> _Description:
    return _Description(f"tensor {digest(value)[:16]}")


@_split.register(partial)
def _(value: partial[Any]) -> _Description:
    return _Description("functools.partial", {"func": value.func, "args": value.args, **value.keywords})


@_split.register(FunctionType | BuiltinFunctionType)
def _(value: Any) -> _Description:  # noqa: ANN401 - two types
    code = getattr(value, "__code__", None)
    return _Description(f"{value.__module__}.{value.__qualname__}" + (f" {_code_digest(code)}" if code else ""))


@_split.register
def _(value: MethodType) -> _Description:
    return _Description(parts={"function": value.__func__, "self": value.__self__})


@_split.register(Mapping)
def _(value: Mapping[Any, Any]) -> _Description:
    return _Description(parts={str(key): item for key, item in value.items()})


@_split.register(AbstractSet)
def _(value: AbstractSet[Any]) -> _Description:
    return _Description(repr(sorted(map(repr, value))))


@_split.register(Sequence)
def _(value: Sequence[Any]) -> _Description:
    if all(isinstance(item, bool | int | float | str | NoneType) for item in value):
        return _Description(repr(list(value)))
    return _Description(parts={str(index): item for index, item in enumerate(value)})


def _code_digest(code: CodeType) -> str:
    constants = [_code_digest(item) if isinstance(item, CodeType) else repr(item) for item in code.co_consts]
    return digest(code.co_code, *constants, *code.co_names)[:16]


def _class_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _shorten(text: str) -> str:
    hidden = _SECRET.sub("***", text)
    return hidden if len(hidden) <= _LONG else f"{len(text)} characters, sha256 {digest(text)[:16]}"
