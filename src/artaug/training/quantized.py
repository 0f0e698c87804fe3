"""Quantized base models: preparing their layers for training, their storage, and whether gradients pass through them.

No quantization library is imported: their layers are recognized by what torch itself shows of their weights.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from artaug._internal.modules import is_quantized, named_modules
from artaug.errors import ModelError

_PROBE_ROWS = 16
_TRUE_GRADIENT = (0.5, 1.5)
"""Range of `_predicted_change` for a true gradient: 1, up to the rounding of int8 activations."""


def storage_tensors(weight: Tensor) -> Iterator[Tensor]:
    """The plain tensors a weight is stored in: itself, or codes and scales."""
    subclass: Any = weight
    if hasattr(weight, "__tensor_flatten__") and is_quantized(weight):  # torchao, quanto
        for name in subclass.__tensor_flatten__()[0]:
            yield from storage_tensors(getattr(weight, name))
        return
    yield weight
    state = getattr(weight, "quant_state", None)  # bitsandbytes: 4 bits, and 8
    scales = [getattr(weight, "SCB", None), getattr(state, "absmax", None)]
    scales += [getattr(getattr(state, "state2", None), "absmax", None)]
    yield from (scale for scale in scales if scale is not None)


def prepare_for_training(module: nn.Module) -> None:
    """Put layers that have a fast path without gradient in evaluation mode into training mode.

    On a CPU bitsandbytes repacks a 4-bit layer when it first computes in evaluation mode, and no gradient passes a packed
    one. Such layers have no dropout, so their mode has no other effect.

    Raises:
        ModelError: if a layer is packed already: bitsandbytes does not unpack the same weights.
    """
    for name, item in named_modules(module).items():
        layer = item.module
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
    """Refuse quantized layers through which no gradient passes, or a wrong one; one layer of each type is tried.

    The output of a linear layer changes with its input exactly as its gradient predicts, whatever its weights. That of
    kernels that round activations often does not: rounding has no gradient.

    Raises:
        ModelError: naming a layer and how much of a change its gradient predicts.
    """
    weights: dict[str, Any] = {name: getattr(layer, "weight", None) for name, layer in layers.items()}
    examples = {
        type(weight): name for name, weight in weights.items() if is_quantized(weight) and weight.device.type != "meta"
    }
    plain = (p.dtype for p in module.parameters() if p.is_floating_point() and not is_quantized(p))
    dtype = next(plain, torch.get_default_dtype())
    for weight_type, name in examples.items():
        weight = weights[name]
        predicted = _predicted_change(
            layers[name], weight.device, weight.dtype if weight.is_floating_point() else dtype
        )
        if not _TRUE_GRADIENT[0] <= predicted <= _TRUE_GRADIENT[1]:
            raise ModelError(
                f"the layer {name!r} of {type(module).__name__} is quantized as {weight_type.__name__}, and its gradient "
                f"predicts {predicted:.0%} of how its output follows its input. Expected about 100%: nothing could be "
                "learned below it. Quantize weights alone and leave activations as they are (torchao's "
                "Int8WeightOnlyConfig or Float8WeightOnlyConfig, bitsandbytes), or store plain weights in fp8 "
                "(enable_layerwise_casting)."
            )


def check_dequantizable(layers: Mapping[str, nn.Module], device: torch.device) -> None:
    """Refuse layers whose weights PEFT cannot dequantize, as DoRA has to.

    Raises:
        ModelError: naming a layer, and what its weight is stored as.
    """
    for name, layer in layers.items():
        weight: Any = layer.weight
        problem = None
        if weight.device.type == "meta" != device.type:
            problem = "is not in memory between calls (enable_sequential_cpu_offload)"
        elif hasattr(weight, "full_tensor"):
            problem = "is sharded over processes"
        elif type(weight).__name__ == "Int8Params":  # bitsandbytes loses its scales when PEFT unpacks one
            problem = "is stored as bitsandbytes' int8"
        elif not is_quantized(weight) and weight.itemsize == 1 and weight.is_floating_point():
            problem = f"is stored as {weight.dtype}"
        if problem is not None:
            raise ModelError(
                f"DoRA starts from the norms of the rows of each weight, and that of {name!r} {problem}, where they cannot "
                "be computed. Load the model in bfloat16, in nf4 or by torchao, or train a PlainLoRA or a LoKr."
            )


@torch.enable_grad()
def _predicted_change(layer: nn.Module, device: torch.device, dtype: torch.dtype) -> float:
    """Share of a change of a layer's output that its gradient predicts: 1 for a linear layer, 0 without a gradient.

    For inputs ``x``, a step ``h`` and ``c = f(x + h) - f(x)`` it is ``<J^T c, h> / <c, c>``: with ``c = J h`` that is 1.
    """
    generator = torch.Generator().manual_seed(0)
    width: Any = layer.in_features
    inputs, step = (torch.randn(_PROBE_ROWS, width, generator=generator).to(device, dtype) for _ in range(2))
    output = layer(inputs.requires_grad_())
    if not output.requires_grad:
        return 0.0
    change = (layer(inputs.detach() + step).float() - output.float()).detach()
    try:
        (gradient,) = torch.autograd.grad((output.float() * change).sum(), inputs)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # raised by kernels without a backward pass
        return 0.0
    return float((gradient.float() * step.float()).sum() / change.square().sum())
