"""Safetensors files of LoRAs: read whole or not at all, written whole or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from artaug._internal.files import atomic_write, save_tensors
from artaug.errors import LoRAError

_PICKLES = (b"PK\x03\x04", b"\x80")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file, and its header.

    Raises:
        LoRAError: if the file is missing, cut short, a pickle, or no safetensors file for another reason.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as fault:
        if _is_pickle(path):
            raise LoRAError(
                f"{path} is a pickle, which can run any code when it is opened, so artaug does not open it. "
                "Convert it to safetensors where you trust it."
            ) from None
        raise LoRAError(f"{path} is not a LoRA file: {fault}. Expected a safetensors file.") from None
    return tensors, header


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Path:
    """Write a file that appears whole or not at all, folders in between included. The same content has the same bytes.

    Raises:
        StorageError: if the system cannot write it; a file that was there before stays.
    """
    with atomic_write(path, what="the LoRA file", remedy="Make room, or choose another place.") as partial:
        save_tensors(tensors, partial, header)
        _sort_header(partial)
    return path


def _is_pickle(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4).startswith(_PICKLES)


def _sort_header(path: Path) -> None:
    """Put the strings of a header in order, in place: safetensors writes them in another one every time."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))
