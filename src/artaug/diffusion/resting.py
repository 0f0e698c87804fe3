"""Parts of a pipeline that have nothing to do for a while give their accelerator's memory back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_ENCODERS = ("text_encoder", "vae")


@contextmanager
def resting(pipeline: Any) -> Iterator[None]:  # noqa: ANN401 - any diffusers pipeline
    """Keep a pipeline's VAE and text encoders on the CPU for a ``with`` block, and put them back where they were.

    Left alone are parts that are on the CPU, parts that diffusers or accelerate moves by hooks of their own (offload),
    and quantised parts, which their libraries tie to their device.
    """
    parts = {name: part for name, part in pipeline.components.items() if name.startswith(_ENCODERS)}
    moved = {name: part.device for name, part in parts.items() if _movable(part)}
    try:
        for name in moved:
            parts[name].to("cpu")
        if moved and torch.cuda.is_available():
            torch.cuda.empty_cache()
        yield
    finally:
        for name, device in moved.items():
            parts[name].to(device)


def _movable(part: object) -> bool:
    if not isinstance(part, nn.Module) or any(one.device.type in {"cpu", "meta"} for one in part.parameters()):
        return False
    hooked = any(hasattr(one, "_hf_hook") or hasattr(one, "_diffusers_hook") for one in part.modules())
    return not hooked and getattr(part, "hf_quantizer", None) is None
