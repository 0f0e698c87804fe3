"""Modules by the names they have without wrappers (compiled, sharded, checkpointed, parallel), and code that is compiled."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

WRAPPED_NAMES = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Where `torch.compile`, FSDP and activation checkpointing keep the module that they wrap."""
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
"""These keep it as ``module``, a name that other modules may have for a layer of their own."""


@dataclass(frozen=True, eq=False)
class NamedModule:
    """A submodule, without the wrappers around it."""

    name: str
    """Its path without wrappers: what files and messages call it."""
    path: str
    """Its path as it is, for ``get_submodule``."""
    module: nn.Module


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside all its wrappers.

    >>> import torch
    >>> from artaug._internal.modules import unwrap
    >>> unwrap(torch.nn.DataParallel(torch.nn.ReLU()))
    ReLU()
    """
    while (wrapped := _wrapped(module)) is not None:
        _, module = wrapped
    return module


def named_modules(module: nn.Module) -> dict[str, NamedModule]:
    """Like ``module.named_modules()``, by names without wrappers."""
    return {item.name: item for item in _walk("", "", module, set())}


def plain_name(path: str) -> str:
    """A path of a layer without the names that wrappers of torch put into it.

    >>> from artaug._internal.modules import plain_name
    >>> plain_name("_orig_mod.blocks.0._checkpoint_wrapped_module.to_q")
    'blocks.0.to_q'
    """
    return ".".join(part for part in path.split(".") if part not in WRAPPED_NAMES)


def uncompiled() -> AbstractContextManager[None]:
    """A ``with`` block in which compiled modules run as they are written.

    Compiled code does not run hooks that were registered after its first call (pytorch#117758). The compiler is not
    loaded for this: if it never was, nothing is compiled.
    """
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


Function = TypeVar("Function", bound=Callable[..., object])


def outside_graphs(function: Function) -> Function:
    """The same function, which compiled code calls without tracing it: it depends on more than its tensors."""
    if "torch._dynamo" not in sys.modules:
        return function
    excluded: Function = torch.compiler.disable(function)
    return excluded


def _walk(name: str, path: str, module: nn.Module, visited: set[nn.Module]) -> Iterator[NamedModule]:
    while (wrapped := _wrapped(module)) is not None:
        child_name, module = wrapped
        path = _joined(path, child_name)
    if module in visited:  # shared: as in torch, it has the first of its names
        return
    visited.add(module)
    yield NamedModule(name, path, module)
    for child_name, child in module.named_children():
        yield from _walk(_joined(name, child_name), _joined(path, child_name), child, visited)


def _wrapped(module: nn.Module) -> tuple[str, nn.Module] | None:
    """The module that another wraps and its name there, or None if that is no wrapper."""
    children = list(module.named_children())
    if len(children) != 1:
        return None
    name, _ = children[0]
    is_wrapper = name in WRAPPED_NAMES or (name == "module" and isinstance(module, _PARALLEL))
    return children[0] if is_wrapper else None


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def is_quantized(weight: object) -> bool:
    """Whether a weight is of a class that is not torch's, so a quantization library's."""
    return isinstance(weight, Tensor) and type(weight).__module__.partition(".")[0] != "torch"


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Set ``requires_grad`` of a module's parameters to False for a ``with`` block, then restore it for each of them."""
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    module.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
