"""Quantized bases: how their layers have to be set to learn, what they are stored in, and whether gradients pass them.

No quantizing library is imported: their layers are told by what torch itself shows of their weights.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from artaug.errors import ModelError

_ROWS = 16
_TRUE = (0.5, 1.5)
"""How much of a change a gradient may tell: right ones tell 1, up to what int8 activations round off."""


def is_quantized(weight: object) -> bool:
    """Whether a weight is of a class that torch does not have, so a quantizing library's."""
    return isinstance(weight, Tensor) and type(weight).__module__.partition(".")[0] != "torch"


def storage_tensors(weight: Tensor) -> Iterator[Tensor]:
    """The plain tensors a weight is stored in: itself, or codes and scales."""
    run_fingerprint: Any = weight
    if hasattr(weight, "__tensor_flatten__") and is_quantized(weight):  # torchao, quanto
        for name in run_fingerprint.__tensor_flatten__()[0]:
            yield from storage_tensors(getattr(weight, name))
        return
    yield weight
    state = getattr(weight, "quant_state", None)  # bitsandbytes: 4 bits, and 8
    scales = [getattr(weight, "SCB", None), getattr(state, "absmax", None)]
    scales += [getattr(getattr(state, "state2", None), "absmax", None)]
    yield from (one for one in scales if one is not None)


def prepare_for_training(module: nn.Module) -> None:
    """Have layers that draw by a shortcut without gradient take the way that has one.

    On a CPU bitsandbytes packs a 4-bit layer anew when it first draws in evaluation mode, and nothing learns through a
    packed one. Such layers have no dropout, so nothing else follows from their mode.

    Raises:
        ModelError: if a layer is packed already: what bitsandbytes unpacks are other weights.
    """
    for name, layer in module.named_modules():
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if state is None:
            continue
        if getattr(state, "packing_format_for_cpu", False):
            raise ModelError(
                f"bitsandbytes packed {name!r} for drawing on this CPU, and no gradient passes a packed layer. Load the "
                f"model again and call .train() of its {type(layer).__name__} layers before it draws, or use a GPU."
            )
        layer.train()


def check_gradients(module: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Refuse quantized layers through which no gradient passes, or a wrong one; one layer of each kind is tried.

    A linear layer answers a change of its input as its gradient says, whatever its weights. Kernels that round
    activations often do not: rounding has no gradient.

    Raises:
        ModelError: naming a layer and how much of a change its gradient tells.
    """
    weights: dict[str, Any] = {name: getattr(layer, "weight", None) for name, layer in layers.items()}
    kinds = {type(one): name for name, one in weights.items() if is_quantized(one) and one.device.type != "meta"}
    plain = (one.dtype for one in module.parameters() if one.is_floating_point() and not is_quantized(one))
    dtype = next(plain, torch.get_default_dtype())
    for kind, name in kinds.items():
        weight = weights[name]
        told = _told(layers[name], weight.device, weight.dtype if weight.is_floating_point() else dtype)
        if not _TRUE[0] <= told <= _TRUE[1]:
            raise ModelError(
                f"the layer {name!r} of {type(module).__name__} is quantized as {kind.__name__}, and its gradient tells "
                f"{told:.0%} of how its output follows its input. Expected about 100%: nothing could be learned below "
                "it. Quantize weights alone and leave activations as they are (torchao's Int8WeightOnlyConfig or "
                "Float8WeightOnlyConfig, bitsandbytes), or store plain weights in fp8 (enable_layerwise_casting)."
            )


def check_dequantizable(layers: Mapping[str, nn.Module], device: torch.device) -> None:
    """Refuse layers whose weights PEFT cannot read and give back as they were, as DoRA has to.

    Raises:
        ModelError: naming a layer, and what its weight is stored as.
    """
    for name, layer in layers.items():
        weight: Any = layer.weight
        stored = None
        if weight.device.type == "meta" != device.type:
            stored = "is not in memory between calls (enable_sequential_cpu_offload)"
        elif hasattr(weight, "full_tensor"):
            stored = "is spread over processes (sharded)"
        elif type(weight).__name__ == "Int8Params":  # bitsandbytes loses its scales when PEFT unpacks one
            stored = "is stored as bitsandbytes' int8"
        elif not is_quantized(weight) and weight.itemsize == 1 and weight.is_floating_point():
            stored = f"is stored as {weight.dtype}"
        if stored is not None:
            raise ModelError(
                f"DoRA begins with the lengths of the rows of each weight, and that of {name!r} {stored}, where they cannot "
                "be had. Load the model in bfloat16, in nf4 or by torchao, or train a PlainLoRA or a LoKr."
            )


@torch.enable_grad()
def _told(layer: nn.Module, device: torch.device, dtype: torch.dtype) -> float:
    """What share of a change of the output the gradient foretells; 0 where there is none."""
    generator = torch.Generator().manual_seed(0)
    width: Any = layer.in_features
    start, step = (torch.randn(_ROWS, width, generator=generator).to(device, dtype) for _ in range(2))
    output = layer(start.requires_grad_())
    if not output.requires_grad:
        return 0.0
    change = (layer(start.detach() + step).float() - output.float()).detach()
    try:
        (gradient,) = torch.autograd.grad((output.float() * change).sum(), start)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # as kernels say that they have no way back
        return 0.0
    return float((gradient.float() * step.float()).sum() / change.square().sum())
