"""The layers that a LoRA can update, linear ones and convolutions, and what an update adds to their output."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONV_FUNCTIONS: Mapping[int, Callable[..., Tensor]] = MappingProxyType(
    {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
)


def weight_shape(module: nn.Module) -> tuple[int, ...] | None:
    """The shape of a layer's dense weight, however it is stored; None if a LoRA cannot update the module.

    >>> from torch import nn
    >>> from artaug.lora.layers import weight_shape
    >>> weight_shape(nn.Linear(4, 8)), weight_shape(nn.Conv2d(4, 8, 3)), weight_shape(nn.ReLU())
    ((8, 4), (8, 4, 3, 3), None)
    """
    layer = _base_layer(module)
    if isinstance(layer, _Convolution):
        return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
        return (layer.out_features, layer.in_features)
    return None


def low_rank_forward(module: nn.Module, inputs: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """The output of a layer like ``module`` whose weight is ``up @ down`` and which has no bias.

    A convolution becomes two: ``down`` with the layer's kernel, stride and padding gives ``rank`` channels for each group,
    and ``up`` with a kernel of 1 mixes them to the outputs.
    """
    layer = _base_layer(module)
    if not isinstance(layer, _Convolution):
        return functional.linear(functional.linear(inputs, down), up)
    groups, kernel_axes = layer.groups, len(layer.kernel_size)
    # all groups share the rows of `down`, each applied to its own inputs: (groups * rank, inputs / groups, kernel...)
    repeated = down.repeat(groups, *(1 for _ in down.shape[1:]))
    hidden = layer._conv_forward(inputs, repeated, None)  # noqa: SLF001 - the only function with all padding modes
    return _CONV_FUNCTIONS[kernel_axes](hidden, up.reshape(*up.shape, *(1 for _ in range(kernel_axes))), groups=groups)


def _base_layer(module: nn.Module) -> Any:  # noqa: ANN401 - linear layers of any library, known by their attributes
    """The layer that PEFT may have wrapped."""
    wrapper: Any = module
    return wrapper.get_base_layer() if hasattr(module, "get_base_layer") else module
