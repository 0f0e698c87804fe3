"""What an encoding depends on beside the prompt's tokens: a pipeline's text encoders as they are at this moment.

A model does not say when it was changed. So whatever could change what it returns is looked at: its modules and their
plain attributes (a scale of PEFT, a config), its hooks and what they read, its tensors, and the settings by which torch rounds. Of tensors,
torch counts most changes, but none made through ``.data``, as PEFT merges a LoRA and as a word is put into an embedding;
and a weight's address says nothing, since offloading moves it. So the values themselves are read: all of a small tensor,
a few of every row of a large one.
"""

import dataclasses
import functools
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from inspect import isroutine
from itertools import chain
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from accelerate.hooks import CpuOffload
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import output_capturing

from artaug._internal.digests import digest
from artaug._internal.offloading import device_of

_PLAIN = (bool, int, float, str, bytes, type, Enum, torch.dtype, torch.device, type(None))
_CONFIGS = (PreTrainedConfig, GenerationConfig)
_NOT_LOOKED_AT = frozenset(vars(nn.Module())) - {"training"} | {
    "_hf_hook",
    "_old_forward",
    "forward",
    "_output_capturing_hooks_installed",
}
"""What torch, accelerate and transformers keep in every module, and what is looked at by itself: parts, hooks, ``forward``."""
_LIBRARIES = frozenset({"torch", "transformers", "diffusers", "accelerate", "peft"})
"""Functions of these have no state in global variables."""
_READ_WHOLE = 2**12
"""Tensors of so many numbers are read in full."""
_READ_PER_ROW = 4
"""Of a larger tensor, so many numbers of every row: a word put into an embedding changes one row."""


def encoder_state(pipeline: Any) -> Hashable | None:  # noqa: ANN401 - any diffusers pipeline
    """What decides how the pipeline encodes given tokens, equal to an earlier state only if that has not changed.

    None if that cannot be known: a compiler's code, or a hook with an object of its own, may do anything, and what
    quantized, sharded or streamed weights hold cannot be read cheaply. Weights that ``enable_model_cpu_offload`` or a placement moves
    are the same before and after.
    """
    if torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks:  # noqa: SLF001 - no public list
        return None
    encoders = _EncoderFacts({id(pipeline)})
    # Not `pipeline.components`, which reads signatures, nor its device, for which it walks through all its modules.
    for name, part in vars(pipeline).items():
        if isroutine(getattr(type(pipeline), name, None)):
            encoders.facts.append((name, encoders.function(part)))
        elif name.startswith("text_encoder"):
            encoders.add_encoder(name, part)
        elif isinstance(part, nn.Module):
            encoders.facts.append((name, _computing_device(part)))  # encodings are returned where the pipeline computes
    if not encoders.is_known:
        return None
    return type(pipeline).encode_prompt, _rounding(), tuple(encoders.facts), _contents(encoders.tensors)


@dataclass(eq=False)
class _EncoderFacts:
    """What there is to know of some encoders, and whether that is all."""

    known_ids: set[int]
    """Of the objects that are looked at by themselves."""
    facts: list[Hashable] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    is_known: bool = True
    _configs: dict[int, Hashable] = field(default_factory=dict)
    """By identity: most modules of a model share one."""

    def add_encoder(self, name: str, encoder: object) -> None:
        if not isinstance(encoder, nn.Module):
            self.is_known = self.is_known and encoder is None
            return
        self.facts.append((name, _computing_device(encoder)))
        modules = list(encoder.modules())
        self.known_ids.update(map(id, modules))
        for module in modules:
            self._add_module(module)
            if not self.is_known:
                return

    def _add_module(self, module: nn.Module) -> None:
        attributes = vars(module)
        for hook in chain(attributes["_forward_hooks"].values(), attributes["_forward_pre_hooks"].values()):
            # Those of transformers, which come with the first call, only collect hidden states.
            if getattr(hook, "__module__", None) != output_capturing.__name__:
                self.facts.append(self.function(hook))
        self.facts.append(self._forward(module))
        plain = tuple((name, self._value(value)) for name, value in attributes.items() if name not in _NOT_LOOKED_AT)
        self.facts.append((type(module), type(module).forward, tuple(attributes["_modules"]), plain))
        for name, tensor in chain(attributes["_parameters"].items(), attributes["_buffers"].items()):
            self.facts.append(name)
            if tensor is not None:
                self._add_tensor(tensor)

    def _add_tensor(self, tensor: Tensor) -> None:
        is_plain = type(tensor) in {nn.Parameter, nn.Buffer, Tensor} and type(tensor.data) is Tensor
        if not is_plain or tensor.is_meta or tensor.layout is not torch.strided or tensor.is_inference():
            self.is_known = False  # torch does not count the changes of a tensor made in inference mode
            return
        is_parameter = isinstance(tensor, nn.Parameter)  # buffers become other objects when a model is moved
        identity = (id(tensor), tensor._version) if is_parameter else None  # noqa: SLF001 - there is no other counter
        self.facts.append((identity, tuple(tensor.shape), tensor.dtype))
        self.tensors.append(tensor.detach())

    def _value(self, value: object) -> Hashable:
        """A copy of an attribute, if it is made of nothing but numbers, text and functions of modules."""
        if isinstance(value, _PLAIN) or _is_plain_function(value):
            return value
        if id(value) in self._configs or isinstance(value, _CONFIGS) or dataclasses.is_dataclass(value):
            return self._config(value)
        if isinstance(value, list | tuple | set | frozenset):
            return (type(value), tuple(map(self._value, value)))
        if isinstance(value, Mapping):
            return tuple((self._value(name), self._value(item)) for name, item in value.items())
        if isinstance(value, Tensor):
            self._add_tensor(value)
            return Tensor
        self.is_known = False
        return None

    def _forward(self, module: nn.Module) -> Hashable:
        """What an instance has in place of its class's ``forward``: accelerate's move of its weights, or a patch."""
        attributes = vars(module)
        forward, hook = attributes.get("forward"), attributes.get("_hf_hook")
        if type(hook) is CpuOffload and isinstance(forward, functools.partial):
            is_accelerate = forward.func.__module__ == CpuOffload.__module__
            forward = attributes["_old_forward"] if is_accelerate else forward
        elif hook is not None:  # streams weights
            self.is_known = False
        # Accelerate leaves the class's own behind when it takes its hook off.
        is_own = forward is None or getattr(forward, "__func__", None) is type(module).forward
        return None if is_own else self.function(forward)

    def function(self, function: object) -> Hashable:
        """A hook or a patched method: its code, and what that reads of closures, defaults, globals and its object."""
        if isinstance(function, functools.partial):
            return self.function(function.func), self._read((*function.args, function.keywords))
        if isinstance(function, MethodType):
            owner = function.__self__
            state = None if id(owner) in self.known_ids else self._read(getattr(owner, "__dict__", owner))
            return self.function(function.__func__), type(owner), state
        if not isinstance(function, FunctionType) or id(function) in self.known_ids:
            self.is_known = self.is_known and id(function) in self.known_ids
            return None
        self.known_ids.add(id(function))
        is_ours = (function.__module__ or "").partition(".")[0] not in _LIBRARIES
        names = {name for name in _names(function.__code__) if is_ours and name in function.__globals__}
        read = [function.__globals__[name] for name in sorted(names)]
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        return function.__code__, self._read([cells, function.__defaults__, function.__kwdefaults__, read])

    def _read(self, value: object) -> Hashable:
        """What a function reads, without whole numbers, and how many there are: a hook may count its calls."""
        if value is None or type(value) is int or id(value) in self.known_ids:
            return None
        if isinstance(value, list | tuple | set | frozenset):
            return tuple(item for item in map(self._read, value) if item is not None)
        if isinstance(value, Mapping):
            items = ((self._value(name), self._read(item)) for name, item in value.items())
            return tuple(item for item in items if item[1] is not None)
        if isinstance(value, FunctionType | MethodType | functools.partial):
            return self.function(value)
        return value.__name__ if isinstance(value, ModuleType) else self._value(value)

    def _config(self, config: object) -> Hashable:
        if id(config) not in self._configs:
            self._configs[id(config)] = None  # in case it holds itself
            self._configs[id(config)] = (type(config), self._value(vars(config)))
        return self._configs[id(config)]


def _is_plain_function(value: object) -> bool:
    """Whether a value is a function that has no state of its own."""
    if isinstance(value, FunctionType):
        return value.__closure__ is None
    return isinstance(value, BuiltinFunctionType) and not isinstance(value.__self__, Tensor)


def _names(code: CodeType) -> set[str]:
    """The names that code looks up, with those of the functions defined in it."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


def _computing_device(module: nn.Module) -> Hashable:
    """Where a module computes. Under model offload its weights rest on the CPU, and the hook brings them there."""
    hook: Any = vars(module).get("_hf_hook")
    return str(hook.execution_device) if type(hook) is CpuOffload else device_of(module)


def _rounding() -> Hashable:
    """The settings of torch that decide how an encoder's results are rounded."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        [(kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)],
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.mkldnn.enabled,
        _matmul_precision(),
        (cudnn.enabled, cudnn.deterministic, cudnn.benchmark),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
    )


def _matmul_precision() -> Hashable:
    backends: Any = torch.backends
    if not hasattr(backends, "fp32_precision"):  # before torch 2.9
        return torch.get_float32_matmul_precision(), backends.cuda.matmul.allow_tf32
    parts = (backends, backends.cuda.matmul, backends.cudnn, backends.mkldnn.matmul)
    return tuple(part.fp32_precision for part in parts)


def _contents(tensors: list[Tensor]) -> str:
    """A digest of tensors, or of a few numbers of every row of them; one copy to the CPU for each data type."""
    samples: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        samples.setdefault((tensor.device, tensor.dtype), []).append(_sampled(tensor))
    return digest(*(torch.cat(parts) for parts in samples.values()))


def _sampled(tensor: Tensor) -> Tensor:
    if tensor.numel() <= _READ_WHOLE:
        return tensor.reshape(-1)
    step = max(1, tensor.shape[-1] // _READ_PER_ROW)
    return tensor[..., ::step].reshape(-1)
