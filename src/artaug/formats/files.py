"""Safetensors files of LoRAs: read whole or not at all, written whole or not at all."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from artaug.errors import LoRAError


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file, and its header.

    Raises:
        LoRAError: if the file is missing, cut short, or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as fault:
        raise LoRAError(f"{path} is not a LoRA file: {fault}. Expected a safetensors file.") from None
    return tensors, header


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Path:
    """Write a file that appears whole or not at all, folders in between included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        save_file({key: one.contiguous() for key, one in tensors.items()}, partial, metadata=dict(header))
        return partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
