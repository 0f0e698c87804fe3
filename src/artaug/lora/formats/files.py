"""Safetensors files of LoRAs: read whole or not at all, written whole or not at all."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from artaug._internal.files import atomic_write, load_tensors, save_tensors
from artaug.errors import LoRAError

_PICKLES = (b"PK\x03\x04", b"\x80")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file, and its header.

    Raises:
        LoRAError: if the file is missing, cut short, a pickle, or no safetensors file for another reason.
    """
    try:
        return load_tensors(path)
    except OSError as fault:
        if _is_pickle(path):
            raise LoRAError(
                f"{path} is a pickle, which can run any code when it is opened, so artaug does not open it. "
                "Convert it to safetensors where you trust it."
            ) from None
        raise LoRAError(f"{path} is not a LoRA file: {fault}. Expected a safetensors file.") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Path:
    """Write a file that appears whole or not at all, folders in between included. The same content has the same bytes.

    Raises:
        StorageError: if the system cannot write it; a file that was there before stays.
    """
    with atomic_write(path, what="the LoRA file", remedy="Make room, or choose another place.") as partial:
        save_tensors(tensors, partial, header)
    return path


def _is_pickle(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4).startswith(_PICKLES)
