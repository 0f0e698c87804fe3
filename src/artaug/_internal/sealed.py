"""Safetensors files that notice damage: the header holds a digest of every tensor, and one of the other metadata.

The safetensors format has none: a bit that flips on the disk, or in the memory of a machine without error correction, is
read as another number.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from artaug._internal.decoding import decode_json
from artaug._internal.digests import digest
from artaug._internal.files import check_regular, save_tensors
from artaug.errors import StorageError

_DIGESTS = "digests"
_METADATA = ""
"""The entry of the digest of the metadata; tensors have other names."""


def save_sealed(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with its digests.

    Raises:
        OSError: if it cannot be written.
    """
    digests = {_METADATA: _metadata_digest(metadata), **{name: digest(tensor) for name, tensor in tensors.items()}}
    save_tensors(tensors, path, {**metadata, _DIGESTS: json.dumps(digests, sort_keys=True)})


@dataclass(frozen=True)
class SealedFile:
    """An open file. Its names and metadata are checked already, a tensor is when it is read."""

    names: frozenset[str]
    metadata: Mapping[str, str]
    _read: Callable[[str], Tensor]
    _digests: Mapping[str, str]
    _damage: Callable[[object], StorageError]

    def read(self, name: str) -> Tensor:
        """One of the tensors, mapped to the file.

        Raises:
            StorageError: if it is not what was written.
        """
        try:
            tensor = self._read(name)
        except SafetensorError as error:
            raise self._damage(error) from None
        if digest(tensor) != self._digests[name]:
            raise self._damage(f"the bytes of {name!r} are not those of its digest")
        return tensor


@contextmanager
def open_sealed(path: Path, *, what: str, remedy: str) -> Iterator[SealedFile]:
    """Open what `save_sealed` wrote.

    Args:
        path: the file.
        what: what it should be, with its article, for the error's text.
        remedy: what to do about the error, as a sentence.

    Raises:
        StorageError: if it cannot be read, or its header is not as it was written.
    """

    def damage(reason: object) -> StorageError:
        return StorageError(f"{path} is no {what}, or a damaged one: {reason}. {remedy}")

    with ExitStack() as stack:
        try:
            check_regular(path)
            file = stack.enter_context(safe_open(path, framework="pt"))
            names, metadata = frozenset(file.keys()), dict(file.metadata() or {})
            digests = decode_json(metadata.pop(_DIGESTS, "null"))
        except (OSError, SafetensorError, ValueError) as error:
            raise damage(error) from None
        if not isinstance(digests, dict):
            raise damage("it has no digests, so another program or an earlier version of artaug wrote it")
        if digests.keys() != {_METADATA, *names} or digests[_METADATA] != _metadata_digest(metadata):
            raise damage("its header is not that of its digests")
        yield SealedFile(names, metadata, file.get_tensor, digests, damage)


def _metadata_digest(metadata: Mapping[str, str]) -> str:
    return digest(*(part for name in sorted(metadata) for part in (name, metadata[name])))
