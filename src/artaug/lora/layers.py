"""What a layer's low-rank update adds to its output: of a linear layer, and of a convolution by its own stride and edges."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_POINTWISE: Mapping[int, Callable[..., Tensor]] = MappingProxyType(
    {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
)


def weight_shape(module: nn.Module) -> tuple[int, ...] | None:
    """That of a layer's weight, whatever it is stored as, if a LoRA can update it.

    >>> from torch import nn
    >>> from artaug.lora.layers import weight_shape
    >>> weight_shape(nn.Linear(4, 8)), weight_shape(nn.Conv2d(4, 8, 3)), weight_shape(nn.ReLU())
    ((8, 4), (8, 4, 3, 3), None)
    """
    layer = _plain(module)
    if isinstance(layer, _Convolution):
        return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
        return (layer.out_features, layer.in_features)
    return None


def updated(module: nn.Module, inputs: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """The output of a layer whose weight is ``up @ down`` and which has no bias."""
    layer = _plain(module)
    if not isinstance(layer, _Convolution):
        return functional.linear(functional.linear(inputs, down), up)
    groups, axes = layer.groups, len(layer.kernel_size)
    every = down.repeat(groups, *(1 for _ in down.shape[1:]))  # every group of inputs meets the same directions
    reduced = layer._conv_forward(inputs, every, None)  # noqa: SLF001 - the one place that knows all kinds of padding
    return _POINTWISE[axes](reduced, up.reshape(*up.shape, *(1 for _ in range(axes))), groups=groups)


def _plain(module: nn.Module) -> Any:  # noqa: ANN401 - linear layers of any library, known by their attributes
    """The layer itself, where PEFT has wrapped it."""
    wrapper: Any = module
    return wrapper.get_base_layer() if hasattr(module, "get_base_layer") else module
