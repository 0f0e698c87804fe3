"""Where the parts of a pipeline are: those with nothing to do rest on the CPU, and what is swapped cannot learn."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from artaug.errors import ModelError
from artaug.training.quantized import is_quantized

_ENCODERS = ("text_encoder", "vae")
_IN_PLACE = {"layerwise_casting", "peft_autocast_disable"}
"""Hooks of diffusers that leave a part where it is."""


def encoders_of(pipeline: Any) -> list[nn.Module]:  # noqa: ANN401 - any diffusers pipeline
    """A pipeline's VAE and text encoders, as far as it has them."""
    return [
        part for name, part in pipeline.components.items() if name.startswith(_ENCODERS) and isinstance(part, nn.Module)
    ]


@contextmanager
def resting(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Keep parts on the CPU for a ``with`` block, and put them back where they were.

    Left alone are parts that are on the CPU, and those that are `tied`.
    """
    loose: list[Any] = [part for part in parts if not (_waits(part) or tied(part))]
    moved = [(part, torch.device(part.device)) for part in loose]
    try:
        for part, _ in moved:
            part.to("cpu")
        if moved and torch.cuda.is_available():
            torch.cuda.empty_cache()
        yield
    finally:
        for part, device in moved:
            part.to(device)


def tied(part: nn.Module) -> bool:
    """Whether somebody else decides where a part is.

    So it is with parts that diffusers or accelerate move by hooks of their own (offload), quantized ones, which their
    libraries tie to their device, and those sharded over several.
    """
    hooked = any(hasattr(one, "_hf_hook") or _moves(one) for one in part.modules())
    return hooked or quantized(part) or any(hasattr(one, "device_mesh") for one in part.parameters())


def quantized(part: nn.Module) -> bool:
    """Whether a part is stored by a quantizing library."""
    return getattr(part, "hf_quantizer", None) is not None or any(is_quantized(one) for one in part.parameters())


def check_learnable(denoiser: nn.Module) -> None:
    """Refuse a denoiser whose weights diffusers' group offload swaps for every call.

    Raises:
        ModelError: if it does; a backward pass would not find them.
    """
    registries = [registry for one in denoiser.modules() if (registry := getattr(one, "_diffusers_hook", None))]
    groups = [one.hooks["group_offloading"].group for one in registries if "group_offloading" in one.hooks]
    if any(one.offload_to_disk_path or one.onload_device.type != one.offload_device.type for one in groups):
        raise ModelError(
            f"{type(denoiser).__name__} draws under enable_group_offload, which takes weights away before a backward pass "
            "needs them. Load it again without, and to save memory train with gradient_checkpointing=True on weights "
            "stored in fp8 (enable_layerwise_casting) or under enable_model_cpu_offload."
        )


def _moves(module: nn.Module) -> bool:
    registry: Any = getattr(module, "_diffusers_hook", None)
    return registry is not None and bool(set(registry.hooks) - _IN_PLACE)


def _waits(part: nn.Module) -> bool:
    return any(one.device.type in {"cpu", "meta"} for one in part.parameters())
