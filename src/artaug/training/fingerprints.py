"""What a model is, in a short text that is the same in every process: its class and a digest of its small parameters."""

from torch import Tensor, nn

from artaug._internal.digests import digest
from artaug._internal.modules import plain_name, unwrap
from artaug.training.quantized import is_quantized

_DIGESTED_SIZE = 4096
"""Parameters of at most so many numbers identify a model's weights."""


def module_fingerprint(module: nn.Module) -> str:
    """The class of a model and a digest of its small parameters, which every fine-tuning changes, too."""
    module = unwrap(module)
    parts: list[str | Tensor] = []
    for path, parameter in module.named_parameters():
        name = plain_name(path)
        if is_quantized(parameter):  # bitsandbytes changes the layout of its weights when it draws on a CPU
            parts += [name, type(parameter).__name__]
            continue
        parts += [name, str(tuple(parameter.shape))]
        if parameter.numel() <= _DIGESTED_SIZE and parameter.device.type != "meta":
            # Gathered if it is sharded, so that every process gets the same digest.
            parts.append(parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter)
    return f"{type(module).__name__} {digest(*parts)[:16]}"
