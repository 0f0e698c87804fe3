"""Files on disk: written atomically, safetensors files with their headers, and the digest of a file."""

import errno
import hashlib
import itertools
import json
import os
import platform
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from artaug._internal.decoding import decode_json
from artaug.errors import StorageError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_SCRATCH = ".artaug-partial"
"""The folder of unfinished files, beside the files that they will become: one for a folder, however many files it has."""
_LOCK = ".lock"
_MACHINE = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
"""The names of this machine's scratch folders begin with it: file systems of clusters may show a lock to one machine only."""
_ABANDONED_AFTER_S = 24 * 3600
"""Without a change, for scratch folders whose locks say nothing."""
_MAX_ATTEMPTS = 100
_SYNC_THREADS = 8
_NOT_OF_FOLDERS = {errno.EACCES, errno.EBADF, errno.EINVAL, errno.EISDIR, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}
"""What a file system says that flushes files and no folders."""
_METADATA = "__metadata__"
_LENGTH_BYTES = 8
"""A safetensors file begins with the length of its JSON header, as a little-endian integer of 64 bits."""
_LONGEST_HEADER = 100_000_000
"""Bytes, the limit of the safetensors library."""


@contextmanager
def atomic_write(path: Path, *, what: str, remedy: str) -> Iterator[Path]:
    """Yield a temporary path to write to; at the end of the ``with`` block that file replaces ``path`` atomically.

    The temporary file is in a folder of its own beside ``path``, on the same file system (folders above are made if they
    are missing), so several processes can write the same path at once: the last one to finish wins. File and folder are
    flushed to the disk, so after a power failure ``path`` holds either the old content or the new one. What killed
    processes have left beside ``path``, hidden files of other libraries included, is removed first.

    Args:
        path: where the file is to be. Its old content stays until the new one is complete.
        what: name of the file, for the error's text.
        remedy: what to do about the error, as a sentence.

    Raises:
        StorageError: if the system cannot write it (no room, no permission, a file in the way). The temporary file is
            removed.
    """
    with atomic_writes(path.parent, what=f"{what} {path}", remedy=remedy) as place:
        yield place(path)


@contextmanager
def atomic_writes(folder: Path, *, what: str, remedy: str) -> Iterator[Callable[[Path], Path]]:
    """As `atomic_write`, for many files at once: at the end of the block all are flushed, and then placed.

    Yields a function from where a file of the folder, or of folders in it, is to be to the temporary path to write it to;
    threads may call it. An exception in the block places none. The system places them one by one, after all are on the
    disk, so a power failure may leave some: each is whole.

    Args:
        folder: which the files are to be in.
        what: name of what is written, for the error's text.
        remedy: what to do about the error, as a sentence.

    Raises:
        StorageError: if the system cannot write one of them.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder)
        with _scratch_folder(folder / _SCRATCH) as scratch:
            placed: list[tuple[Path, Path]] = []
            numbers = itertools.count()

            def place(path: Path) -> Path:
                temporary = scratch / f"{next(numbers)}{path.suffix}"
                placed.append((temporary, path))
                return temporary

            yield place
            _finish([temporary for temporary, _ in placed], mode_of=scratch / _LOCK)
            for temporary, path in placed:
                path.parent.mkdir(exist_ok=True)
                temporary.replace(path)
        for changed in {folder, *(path.parent for _, path in placed)}:
            sync_folder(changed)
    except StorageError:  # of the block
        raise
    except OSError as error:
        raise StorageError(f"{what} could not be written: {error}. {remedy}") from error


def _finish(temporaries: Sequence[Path], *, mode_of: Path) -> None:
    """Flush files to the disk. safetensors makes files that only their owner can read; ``mode_of`` has a new file's mode."""
    for temporary in temporaries:
        shutil.copymode(mode_of, temporary)
    _sync_files(temporaries)


def _sync_files(paths: Sequence[Path]) -> None:
    if len(paths) == 1:  # a program that ends starts no more threads
        sync_file(paths[0])
        return
    with ThreadPoolExecutor(_SYNC_THREADS) as pool:  # a file system flushes several together in about the time of one
        list(pool.map(sync_file, paths))


@contextmanager
def atomic_output(out: Path) -> Iterator[Path]:
    """Yield a path to make a file or a folder at; at the end of the block it is flushed, and appears as ``out``.

    As `atomic_write`, for what must not exist yet, one process at a time. After an exception nothing is left.

    Args:
        out: where it is to be. Folders above it are made if they are missing.

    Raises:
        StorageError: if there is something at ``out``, or another process is writing it.
        OSError: if the system cannot write it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(out.parent)
    # one name for one output: the second process to make the folder fails
    with _scratch_folder(out.parent / _SCRATCH, hashlib.sha256(out.name.encode()).hexdigest()[:16]) as scratch:
        _check_absent(out)
        output = scratch / out.name
        yield output
        inside = list(output.rglob("*"))
        _sync_files([path for path in (output, *inside) if path.is_file()])
        for folder in filter(Path.is_dir, (output, *inside)):
            sync_folder(folder)
        _check_absent(out)
        output.rename(out)
    sync_folder(out.parent)


def _check_absent(out: Path) -> None:
    if os.path.lexists(out):
        raise StorageError(f"{str(out)!r} exists already, and is left as it is. Choose another place, or remove it.")


def check_writable(folder: Path, *, what: str) -> None:
    """Refuse a folder in which no file can be made, or that cannot be made itself. Nothing is left there.

    Args:
        folder: it need not exist.
        what: its name, for the error's text.

    Raises:
        StorageError: if the system says so.
    """
    try:
        with tempfile.TemporaryFile(dir=_existing_folder(folder)):
            pass
    except OSError as error:
        raise StorageError(
            f"{what} {folder} cannot be written to: {error}. Give it a folder of yours, with room in it."
        ) from error


def free_bytes(folder: Path) -> int | None:
    """How much room there is on the disk of a folder, which need not exist; None if the disk does not say."""
    try:
        usage = shutil.disk_usage(_existing_folder(folder))
    except OSError:
        return None
    # object stores and synced drives give any number
    return usage.free if 0 <= usage.free <= usage.total and usage.total else None


def check_disk_space(folder: Path, needed_bytes: int, *, what: str) -> None:
    """Refuse at the door what does not fit on the disk. A disk that does not say how much is free is not judged.

    Args:
        folder: where it is to be written. It need not exist.
        needed_bytes: how much it takes.
        what: its name, for the error's text.

    Raises:
        StorageError: if less is free.
    """
    free = free_bytes(folder)
    if free is not None and free < needed_bytes:
        needed, room = (f"{size / 2**30:.2f} GiB" for size in (needed_bytes, free))
        raise StorageError(
            f"{what} takes {needed}, and {room} are free there ({folder}). Make room, or choose another disk."
        )


def _existing_folder(folder: Path) -> Path:
    """The folder, or the nearest above it that exists.

    Raises:
        OSError: if that cannot be found out.
    """
    whole = folder.absolute()
    return next(path for path in (whole, *whole.parents) if path.exists())


def remove_abandoned(folder: Path) -> None:
    """Remove what killed processes have left in a folder while they were in `atomic_write`.

    It touches nothing that a process still writes: that holds a lock, which the system releases when the process ends.
    Where locks say nothing (another machine's, or a file system without them), what has not changed for a day is removed.
    """
    scratches = folder / _SCRATCH
    for scratch in _list_scratches(scratches):
        with suppress(OSError), (scratch / _LOCK).open("r+b") as lock:
            if _is_abandoned(scratch, lock):
                _empty(scratch, lock)
        with suppress(OSError):  # also if it is empty since its process was killed before it had the lock
            scratch.rmdir()
    with suppress(OSError):
        scratches.rmdir()


def _list_scratches(scratches: Path) -> list[Path]:
    """The folders in ``scratches``. A link may lead to anything, so none is followed."""
    with suppress(OSError):  # there is no such folder, or no more
        return [] if scratches.is_symlink() else [path for path in scratches.iterdir() if not path.is_symlink()]
    return []


def _is_abandoned(scratch: Path, lock: BinaryIO) -> bool:
    """Whether no process writes in the folder any more; if so, this process holds its lock, where there are locks."""
    changed = [path.stat().st_mtime for path in scratch.iterdir()]
    if not changed:  # its process has removed what was in it, the lock too, since this one opened that
        return False
    idle_s = time.time() - max(changed)
    if idle_s < _ABANDONED_AFTER_S and not scratch.name.startswith(_MACHINE):
        return False
    try:
        lock_file(lock)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        return idle_s >= _ABANDONED_AFTER_S
    return True


@contextmanager
def _scratch_folder(scratches: Path, name: str | None = None) -> Iterator[Path]:
    """A new, locked folder in the folder ``scratches``. Both are removed at the end of the block.

    Args:
        scratches: the folder of all.
        name: for what one process at a time may do; None for a random one.
    """
    scratch, lock = _new_scratch(scratches, name)
    try:
        yield scratch
    finally:
        with suppress(OSError), lock:
            _empty(scratch, lock)
        for folder in (scratch, scratches):  # after the lock is closed: NFS keeps an open file under another name
            with suppress(OSError):
                folder.rmdir()


def _new_scratch(scratches: Path, name: str | None) -> tuple[Path, BinaryIO]:
    """Make a folder with a locked file in it; again if another process has meanwhile removed it as abandoned."""
    scratch = scratches
    for _ in range(_MAX_ATTEMPTS):
        scratch = scratches / f"{_MACHINE}-{name or secrets.token_hex(8)}"
        with suppress(FileExistsError):  # Path.mkdir(exist_ok=True) raises it where the folder goes in between
            scratches.mkdir()
        try:
            scratch.mkdir()
            lock = (scratch / _LOCK).open("xb")
        except (FileExistsError, FileNotFoundError):
            continue
        try:
            lock_file(lock)
        except (BlockingIOError, PermissionError):
            lock.close()
            continue
        except OSError:  # a file system without locks
            return scratch, lock
        if (scratch / _LOCK).exists():
            return scratch, lock
        lock.close()
    if scratch.exists():
        raise StorageError(
            f"another process is writing the same output: its unfinished files are in {str(scratch)!r}. Wait for it, or "
            "choose another place. If no process is, remove that folder."
        )
    raise FileNotFoundError(f"another program keeps removing {scratches}")


def _empty(scratch: Path, lock: BinaryIO) -> None:
    """Empty a folder whose lock this process holds. The lock goes last: without it, nothing removes the rest."""
    for path in scratch.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()
    if sys.platform == "win32":  # where an open file cannot be removed
        lock.close()
    (scratch / _LOCK).unlink()


def lock_file(file: BinaryIO) -> None:
    """Lock a file for this process until it is closed, also by the end of the process.

    Raises:
        BlockingIOError: if it is locked; on Windows PermissionError.
        OSError: if the file system has no locks.
    """
    if sys.platform == "win32":
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def unlock_file(file: BinaryIO) -> None:
    """Release the lock of a file and close it, also if a child that was forked at this moment has the file open too."""
    with suppress(OSError), file:
        if sys.platform != "win32":
            fcntl.flock(file, fcntl.LOCK_UN)


def sync_file(path: Path) -> None:
    """Flush the content of a file to the disk."""
    with path.open("r+b") as file:  # Windows flushes only what is open for writing
        flush(file.fileno())


def flush(descriptor: int) -> None:
    """Flush an open file to the disk itself: on a Mac fsync leaves the bytes in the disk's own cache."""
    if sys.platform == "darwin":
        with suppress(OSError):  # a file system that cannot, such as a network's
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def sync_folder(path: Path) -> None:
    """Flush the entries of a folder to the disk, so that a new name survives a power failure.

    Windows, and file systems of networks and of other systems, do not do that for a program; what is in the folder is
    as whole there, and only later on the disk.

    Raises:
        OSError: if the disk failed, or is full.
    """
    if sys.platform == "win32":
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            flush(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NOT_OF_FOLDERS:
            raise


def check_regular(path: Path) -> None:
    """Refuse to open what is no regular file: reading a FIFO waits for a writer that may never come.

    Raises:
        OSError: if there is nothing at ``path``, or something else than a file (or a link to one).
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is no regular file")


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
        check_regular(path)
        with path.open("rb") as file:
            file_size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if not 2 <= length <= min(file_size - _LENGTH_BYTES, _LONGEST_HEADER):
                raise ValueError("it is cut short, or no safetensors file")
            tensors = decode_json(file.read(length))
        if not isinstance(tensors, dict):
            raise ValueError("its header is no JSON object")  # noqa: TRY004 - of the file, not of an argument
        metadata = tensors.pop(_METADATA, None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its metadata are not texts by name")
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
    check_regular(path)
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
