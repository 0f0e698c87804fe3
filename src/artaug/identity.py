"""What an object is, in words that are the same in every process: by it a run is recognized when it is called again."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from enum import Enum
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, MethodWrapperType, ModuleType, NoneType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from PIL.Image import Image
from torch import nn

from artaug._internal.digests import digest
from artaug._internal.fingerprints import module_fingerprint
from artaug._internal.redaction import hide_secrets, is_secret_name
from artaug.errors import InvalidValueError
from artaug.image_files import image_digest
from artaug.lora.lora import LoRA
from artaug.tokens import Tokens

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_LONG = 300
"""Characters of a value that is written out; of a longer one the digest is."""
_DEEPEST = 40
"""Objects within objects, before one is refused."""
_WEIGHTS = nn.Module | torch.Tensor | np.ndarray | LoRA | Tokens | Image
"""Counts also where a field or an attribute is hidden, which it often is for its long repr."""
_REMEDY = (
    "Give the class of one of them an attribute identity='...' with all that its results depend on, or hide what does not "
    "count: a name that begins with _, or a dataclass field with repr=False."
)


@runtime_checkable
class Described(Protocol):
    """An object that stands for another one, which is in another process: it is what that one is, not what it is itself."""

    @property
    def identity_items(self) -> Mapping[str, str]:
        """``identity_of(other, "")`` of the other one."""


def identity_of(value: object, name: str) -> dict[str, str]:
    """Everything about an object that may decide what it returns, by dotted names under ``name``.

    An object may say it itself by an attribute ``identity``, a string or a mapping of names to values. Of a dataclass the
    fields that its repr shows count, of any other object the attributes without a leading underscore and a repr of its
    own. Hidden ones count if they hold weights: models, tensors, arrays, LoRAs, tokens, pictures. Models count by class and
    weights, functions by name, code, defaults, and the values that they enclose. Whatever is called a key, a token or a
    secret is left out.

    Raises:
        InvalidValueError: for an object that nothing distinguishes but its address in memory, or hidden attributes.

    >>> import artaug as aa
    >>> from artaug.identity import identity_of
    >>> identity_of(aa.ConcatFuser(), "fuser")["fuser"]
    'artaug.ConcatFuser'
    """
    items: dict[str, str] = {}
    _describe(value, name, items, {})
    return items


def _describe(value: object, name: str, items: dict[str, str], above: Mapping[int, str]) -> None:
    """Add what a value is to ``items``; ``above`` has the names of the objects that it is in, by id."""
    if id(value) in above:
        items[name] = f"the same as {above[id(value)]}"
        return
    if len(above) == _DEEPEST:
        raise InvalidValueError(f"{name}: nested more than {_DEEPEST} objects deep. {_REMEDY}")
    description: _Description | None
    if isinstance(value, Described):
        items.update({f"{name}{place}": text for place, text in value.identity_items.items()})
        return
    stated = None if isinstance(value, type) else getattr(value, "identity", None)
    if isinstance(stated, Mapping):
        description = _Description(_class_name(value), stated)
    elif isinstance(stated, str) and stated:
        description = _Description(f"{_class_name(value)}: {stated}")
    else:
        description = _split(value)
    if description is None:
        raise InvalidValueError(
            f"{name}: this {_class_name(value)} cannot be distinguished from another one: it shows nothing but its address in "
            f"memory. {_REMEDY}"
        )
    if description.text:
        items[name] = _shorten(description.text)
    for part, item in description.parts.items():
        if not is_secret_name(part, item):
            _describe(item, f"{name}.{part}", items, {**above, id(value): name})


class _Description(NamedTuple):
    text: str = ""
    """Of the value itself."""
    parts: Mapping[str, Any] = {}
    """By name."""


@functools.singledispatch
def _split(value: Any) -> _Description | None:  # noqa: ANN401 - of any type
    """Describe a value and name its parts, one function for each kind of value; None if nothing distinguishes it."""
    if dataclasses.is_dataclass(value):
        whole = hasattr(value, "__pydantic_fields__")  # of which the repr leaves out what is long
        fields = {item.name: (getattr(value, item.name), whole or item.repr) for item in dataclasses.fields(value)}
        return _Description(
            _class_name(value), {name: item for name, (item, shown) in fields.items() if shown or _has_weights(item)}
        )
    attributes = _attributes(value)
    parts = {name: item for name, item in sorted(attributes.items()) if name[0] != "_" or _has_weights(item)}
    if wrapped := attributes.get("__wrapped__"):  # of a decorator, such as functools.cache
        parts["wrapped"] = wrapped
    text = repr(value) if "__repr__" in _defined(type(value)) else ""
    if text and not _ADDRESS.search(text):
        return _Description(f"{_class_name(value)}: {text}", parts)
    stateless = hasattr(value, "__dict__") and not attributes
    return _Description(_class_name(value), parts) if parts or stateless else None


def _attributes(value: object) -> dict[str, Any]:
    """By name, those in slots too."""
    slots = (cls.__dict__.get("__slots__", ()) for cls in type(value).__mro__)
    names = [name for some in slots for name in ([some] if isinstance(some, str) else some)]
    in_slots = {name: getattr(value, name) for name in names if name[:2] != "__" and hasattr(value, name)}
    return in_slots | getattr(value, "__dict__", {})


def _defined(cls: type) -> set[str]:
    """The names that a class and those above it define, but for ``object``."""
    return {name for base in cls.__mro__[:-1] for name in vars(base)}


def _has_weights(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_weights, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_weights, value))
    return isinstance(value, _WEIGHTS)


@_split.register(str | bytes | int | float | complex | NoneType | PurePath | torch.dtype | torch.device)
def _(value: object) -> _Description:
    return _Description(repr(value))


@_split.register(Enum | type)
def _(value: object) -> _Description:
    return _Description(str(value))


@_split.register
def _(value: ModuleType) -> _Description:
    return _Description(f"module {value.__name__}")


@_split.register
def _(value: re.Pattern) -> _Description:  # type: ignore[type-arg]  # singledispatch takes a class
    return _Description(f"re.compile({value.pattern!r}, {value.flags})")  # its repr is cut


@_split.register
def _(value: nn.Module) -> _Description:
    numbers = {name: item for name, item in vars(value).items() if name[0] != "_" and type(item) in {int, float}}
    return _Description(module_fingerprint(value), numbers)


@_split.register
def _(value: torch.Tensor) -> _Description:
    return _Description(f"tensor {digest(value)[:16]}")


@_split.register
def _(value: np.ndarray) -> _Description:
    if value.dtype.hasobject:
        return _Description(f"array {value.shape}", {str(index): item for index, item in enumerate(value.flat)})
    return _Description(f"array {value.dtype} {value.shape} {digest(np.ascontiguousarray(value).tobytes())[:16]}")


@_split.register
def _(value: LoRA) -> _Description:
    return _Description(f"LoRA {value.digest}")


@_split.register
def _(value: Tokens) -> _Description:
    return _Description(f"Tokens {value.digest}")


@_split.register
def _(value: Image) -> _Description:
    return _Description(f"picture {image_digest(value)}")


@_split.register(functools.partial)
def _(value: functools.partial[Any]) -> _Description:
    return _Description("functools.partial", {"func": value.func, "args": value.args, **value.keywords})


@_split.register
def _(value: FunctionType) -> _Description:
    code = value.__code__
    enclosed = dict(zip(code.co_freevars, (_content(cell) for cell in value.__closure__ or ()), strict=True))
    constants = {
        name: value.__globals__[name]
        for name in code.co_names
        if isinstance(value.__globals__.get(name), bool | int | float | str)
    }
    defaults: dict[str, object] = {"defaults": value.__defaults__} if value.__defaults__ else {}
    return _Description(
        f"{value.__module__}.{value.__qualname__} {_code_digest(code)}",
        {**constants, **enclosed, **defaults, **(value.__kwdefaults__ or {})},
    )


@_split.register(BuiltinFunctionType | MethodWrapperType)
def _(value: Any) -> _Description:  # noqa: ANN401 - two types
    owner = value.__self__  # of a bound method its object, of a function its module
    bound = {} if owner is None or isinstance(owner, ModuleType) else {"self": owner}
    return _Description(value.__qualname__ if bound else f"{value.__module__}.{value.__qualname__}", bound)


@_split.register
def _(value: MethodType) -> _Description:
    return _Description(parts={"function": value.__func__, "self": value.__self__})


@_split.register(Mapping)
def _(value: Mapping[Any, Any]) -> _Description:
    if type(value).__module__ == "os":  # the environment, which holds the keys of everything
        return _Description("os.environ")
    return _Description(parts={key if isinstance(key, str) else repr(key): item for key, item in value.items()})


@_split.register(AbstractSet)
def _(value: AbstractSet[Any]) -> _Description | None:
    text = repr(sorted(map(repr, value)))
    return None if _ADDRESS.search(text) else _Description(text)


@_split.register(Sequence)
def _(value: Sequence[Any]) -> _Description:
    if all(isinstance(item, bool | int | float | str | NoneType) for item in value):
        return _Description(repr(list(value)))
    return _Description(parts={str(index): item for index, item in enumerate(value)})


def _content(cell: Any) -> object:  # noqa: ANN401 - types.CellType has no type for it
    try:
        return cell.cell_contents
    except ValueError:  # of a variable that has no value yet
        return None


def _code_digest(code: CodeType) -> str:
    return digest(code.co_code, *map(_constant, code.co_consts), *code.co_names)[:16]


def _constant(constant: object) -> str:
    if isinstance(constant, CodeType):
        return _code_digest(constant)
    # The order of a set differs from process to process.
    return repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)


def _class_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _shorten(text: str) -> str:
    hidden = hide_secrets(text)
    return hidden if len(hidden) <= _LONG else f"{len(hidden)} characters, sha256 {digest(hidden)[:16]}"
