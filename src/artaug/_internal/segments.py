"""JSON files that are written once and notice damage: beside the content stands its SHA-256.

The layout is fixed, so that reading checks the bytes themselves and parses them once::

    {"sha256":"<64 digits>","content":<JSON>}
"""

from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from artaug._internal.files import atomic_write, check_regular
from artaug._internal.values import from_json, to_json
from artaug.errors import InvalidValueError, StorageError

T = TypeVar("T")

_HEAD, _MIDDLE, _TAIL = b'{"sha256":"', b'","content":', b"}\n"
_DIGITS = 64
_CONTENT_START = len(_HEAD) + _DIGITS + len(_MIDDLE)


def write_segment(path: Path, content: object, *, what: str, remedy: str) -> None:
    """Write a value to a file that appears whole or not at all, and is there after a power failure.

    Args:
        path: where; folders in between are made.
        content: a value type.
        what: name of the file, for the error's text.
        remedy: what to do about the error, as a sentence.

    Raises:
        StorageError: if it cannot be written.
    """
    with atomic_write(path, what=what, remedy=remedy) as temporary:
        temporary.write_bytes(_seal(to_json(content).encode()))


def write_provisional(path: Path, content: object, *, what: str, remedy: str) -> None:
    """Write a value that can be made again, many times faster than `write_segment`: it is not flushed to the disk.

    The file survives the end of the process; after a power failure it may be empty, which reading notices. The folder has
    to be there, and this process its only writer.

    Raises:
        StorageError: if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}")
    try:
        temporary.write_bytes(_seal(to_json(content).encode()))
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"{what} {path} could not be written: {error}. {remedy}") from error


def _seal(text: bytes) -> bytes:
    return b"".join((_HEAD, sha256(text).hexdigest().encode(), _MIDDLE, text, _TAIL))


def _unseal(whole: bytes) -> bytes:
    text = whole[_CONTENT_START : -len(_TAIL)]
    if whole != _seal(text):
        raise InvalidValueError("its bytes are not those of its digest")
    return text


def read_segment(path: Path, of: type[T], *, what: str, remedy: str) -> T:
    """Read what `write_segment` wrote.

    Args:
        path: the file.
        of: the type of its content.
        what: what it should be, with its article, for the error's text.
        remedy: what to do about the error, as a sentence.

    Raises:
        FileNotFoundError: if there is no such file.
        StorageError: if it cannot be read, or is not as it was written.
    """
    try:
        check_regular(path)
        return from_json(of, _unseal(path.read_bytes()))
    except FileNotFoundError:
        raise
    except (OSError, InvalidValueError) as error:
        raise StorageError(f"{path} is no {what}, or a damaged one: {error}. {remedy}") from None
