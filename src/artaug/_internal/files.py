"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from artaug.errors import StorageError


@contextmanager
def atomic_write(path: Path, *, what: str, remedy: str, durable: bool = False) -> Iterator[Path]:
    """Lend the path to write to in a ``with`` block, whose end makes it ``path``; folders in between are made.

    Args:
        path: where the file is to be. What was there before stays until the new one is whole.
        what: the file is, for the error's text.
        remedy: what to do about the error, as a sentence.
        durable: have the disk hold it, not only the operating system, before it takes its name.

    Raises:
        StorageError: if the system cannot write it (no room, no permission, a file in the way); nothing half is left.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        if durable:
            _sync(partial)
        partial.replace(path)
        if durable:
            _sync(path.parent)
    except OSError as fault:
        raise StorageError(f"{what} {path} could not be written: {fault}. {remedy}") from fault
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, header: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, with an `OSError` where the system refuses: safetensors has one of its own.

    Raises:
        OSError: if it cannot be written.
    """
    try:
        save_file(
            {name: one.contiguous() for name, one in tensors.items()}, path, None if header is None else dict(header)
        )
    except SafetensorError as fault:
        raise OSError(str(fault)) from None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
