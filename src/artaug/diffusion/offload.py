"""Placement of a pipeline's parts: moving idle ones to the CPU for a while, and which ones must not be moved."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from artaug._internal.modules import is_quantized
from artaug._internal.offloading import bring, is_brought, is_sharded, offload_hooks, take_off
from artaug.errors import ModelError

_ENCODERS = ("text_encoder", "vae")


def encoders_of(pipeline: Any) -> list[nn.Module]:  # noqa: ANN401 - any diffusers pipeline
    """The VAE and the text encoders that a pipeline has."""
    return [
        part for name, part in pipeline.components.items() if name.startswith(_ENCODERS) and isinstance(part, nn.Module)
    ]


@contextmanager
def on_cpu(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Keep parts on the CPU for a ``with`` block, then move each back to its device.

    Parts that are on the CPU already (or on the meta device) and those that are pinned (`is_pinned`) are left alone.
    """
    movable: list[Any] = [part for part in parts if not (_is_off_device(part) or is_pinned(part))]
    # Those that a run's placement brought to the device are in host memory, too: nothing is copied then.
    moves = [(part, torch.device(part.device), bring if is_brought(part) else _move) for part in movable]
    try:
        for part in movable:
            take_off(part)
        yield
    finally:
        for part, device, move in moves:
            move(part, device)


def is_pinned(part: nn.Module) -> bool:
    """Whether a part must not be moved.

    So it is with parts that hooks of diffusers or accelerate move (offload), with quantized ones, which their libraries
    bind to a device, and with those sharded over several.
    """
    return offload_hooks(part) or has_quantized_weights(part) or is_sharded(part)


def has_quantized_weights(part: nn.Module) -> bool:
    """Whether a part is stored by a quantizing library."""
    return getattr(part, "hf_quantizer", None) is not None or any(map(is_quantized, part.parameters()))


def check_trainable(denoiser: nn.Module) -> None:
    """Refuse a denoiser whose weights are moved for every call by the group offload of diffusers.

    Raises:
        ModelError: if they are: a backward pass would not find them.
    """
    registries = [
        registry for module in denoiser.modules() if (registry := getattr(module, "_diffusers_hook", None)) is not None
    ]
    groups = [reg.hooks["group_offloading"].group for reg in registries if "group_offloading" in reg.hooks]
    if any(group.offload_to_disk_path or group.onload_device.type != group.offload_device.type for group in groups):
        raise ModelError(
            f"{type(denoiser).__name__} draws under enable_group_offload, which takes weights away before a backward pass "
            "needs them. Load it again without, and to save memory train with gradient_checkpointing=True on weights "
            "stored in fp8 (enable_layerwise_casting) or under enable_model_cpu_offload."
        )


def _move(part: nn.Module, device: torch.device) -> None:
    part.to(device)


def _is_off_device(part: nn.Module) -> bool:
    return any(parameter.device.type in {"cpu", "meta"} for parameter in part.parameters())
