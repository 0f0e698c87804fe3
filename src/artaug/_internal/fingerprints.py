"""What a model is, in a short text that is the same in every process: its class and a digest of its parameters."""

from itertools import chain

from torch import Tensor, nn

from artaug._internal.digests import digest
from artaug._internal.modules import is_quantized, plain_name, unwrap

_DIGESTED_SIZE = 4096
"""Numbers of a parameter that are digested: all of a small one, evenly spaced ones of a larger one. Reading all of a large
model takes half a minute, and whatever changes a weight, a fine-tuning or a fused LoRA, changes most of its numbers."""


def module_fingerprint(module: nn.Module) -> str:
    """The class of a model and a digest of its parameters and buffers."""
    module = unwrap(module)
    parts: list[str | Tensor] = []
    for path, parameter in chain(module.named_parameters(), module.named_buffers()):
        name = plain_name(path)
        if is_quantized(parameter):  # bitsandbytes changes the layout of its weights when it draws on a CPU
            parts += [name, type(parameter).__name__]
            continue
        parts += [name, str(tuple(parameter.shape))]
        if parameter.device.type == "meta":
            continue
        if not hasattr(parameter, "full_tensor"):
            parts.append(_sampled(parameter))
        elif parameter.numel() <= _DIGESTED_SIZE:  # sharded: gathered, so that every process gets the same digest
            parts.append(parameter.full_tensor())
    return f"{type(module).__name__} {digest(*parts)[:16]}"


def _sampled(parameter: Tensor) -> Tensor:
    step = -(-parameter.numel() // _DIGESTED_SIZE)
    return parameter.detach().reshape(-1)[:: max(step, 1)]
