"""Files on disk: written atomically, safetensors files with their headers, and the digest of a file."""

import hashlib
import json
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from artaug.errors import StorageError

_METADATA = "__metadata__"
_LENGTH_BYTES = 8
"""A safetensors file begins with the length of its JSON header, as a little-endian integer of 64 bits."""
_LONGEST_HEADER = 100_000_000
"""Bytes, the limit of the safetensors library."""


@contextmanager
def atomic_write(path: Path, *, what: str, remedy: str) -> Iterator[Path]:
    """Yield a temporary path to write to; at the end of the ``with`` block that file replaces ``path`` atomically.

    The temporary file is in the folder of ``path`` (made if it is missing) and its name is unique, so several processes
    can write the same path at once: the last one to finish wins. File and folder are flushed to the disk, so after a
    power failure ``path`` holds either the old content or the new one.

    Args:
        path: where the file is to be. Its old content stays until the new one is complete.
        what: name of the file, for the error's text.
        remedy: what to do about the error, as a sentence.

    Raises:
        StorageError: if the system cannot write it (no room, no permission, a file in the way). The temporary file is
            removed.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync_file(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise StorageError(f"{what} {path} could not be written: {error}. {remedy}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Flush the content of a file to the disk."""
    with path.open("r+b") as file:  # Windows flushes only what is open for writing
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush the entries of a folder to the disk, so that a new name survives a power failure; not on Windows."""
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a safetensors file says about its tensors, as it stands in the file: `tensors` is not validated."""

    tensors: Mapping[str, Any]
    """By name, in the order of the file: ``{"dtype": ..., "shape": ..., "data_offsets": [start, end]}``."""
    metadata: Mapping[str, str]
    data_start: int
    """Where the data begin, in bytes; the offsets count from there."""
    file_size: int
    """In bytes."""

    @classmethod
    def read(cls, path: Path) -> "SafetensorsHeader":
        """Read the header of a file.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is no safetensors file, or ends before its header does.
        """
        with path.open("rb") as file:
            file_size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if not 2 <= length <= min(file_size - _LENGTH_BYTES, _LONGEST_HEADER):
                raise ValueError("it is cut short, or no safetensors file")
            tensors = json.loads(file.read(length))
        if not isinstance(tensors, dict):
            raise ValueError("its header is no JSON object")  # noqa: TRY004 - of the file, not of an argument
        metadata = tensors.pop(_METADATA, {})
        return cls(tensors, metadata, _LENGTH_BYTES + length, file_size)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file. The same tensors and metadata give the same bytes.

    Raises:
        OSError: if it cannot be written.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, path, None if metadata is None else dict(metadata))
    except SafetensorError as error:
        raise OSError(str(error)) from None
    if metadata is not None and len(metadata) > 1:
        _sort_metadata(path)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors of a safetensors file, and its metadata.

    Raises:
        OSError: if it cannot be read, or is no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise OSError(str(error)) from None


def _sort_metadata(path: Path) -> None:
    """Sort the metadata in place: the library keeps them in a hash map, so their order differs from file to file."""
    header = SafetensorsHeader.read(path)
    ordered = {_METADATA: dict(sorted(header.metadata.items())), **header.tensors}
    text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
    with path.open("r+b") as file:
        file.seek(_LENGTH_BYTES)
        file.write(text.ljust(header.data_start - _LENGTH_BYTES))
