"""Copy and transform files in one pass: read in chunks while threads hash and write. And an output that appears atomically."""

import errno
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from io import FileIO
from pathlib import Path
from typing import Protocol, Self

from artaug._internal.files import flush, sync_folder
from artaug.errors import StorageError
from artaug.lora.baking.report import BakedFile

if sys.platform != "win32":
    import fcntl

_CHUNK_BYTES = 4 << 20
_BUFFERS = 4


class Transform(Protocol):
    """A function of the bytes of a range, called chunk by chunk and in place."""

    @property
    def unit(self) -> int:
        """All chunks but the last are a multiple of this many bytes."""

    def __call__(self, chunk: memoryview) -> None:
        """Transform the next chunk."""


@dataclass(frozen=True)
class ByteRange:
    """Consecutive bytes of a file that are copied, or transformed together."""

    size: int
    transform: Transform | None = None
    """None for bytes that are copied."""

    @property
    def chunk_size(self) -> int:
        """Bytes to read at a time: about 4 MiB, in whole units."""
        unit = self.transform.unit if self.transform else 1
        return max(_CHUNK_BYTES // unit, 1) * unit


@dataclass(frozen=True)
class _PendingChunk:
    """A chunk that is hashed and written at this moment, and its buffer."""

    futures: tuple[Future[None], Future[None]]
    buffer: bytearray


class StreamWriter:
    """Writes files from files. One thread hashes the chunks, one writes them, and one flushes finished files to the disk."""

    def __init__(self, *, on_bytes: Callable[[int], object]) -> None:
        self._on_bytes = on_bytes
        self._hasher = ThreadPoolExecutor(1, "artaug-hash")
        self._writer = ThreadPoolExecutor(1, "artaug-write")
        self._syncer = ThreadPoolExecutor(1, "artaug-sync")
        self._free_buffers = deque(bytearray(_CHUNK_BYTES) for _ in range(_BUFFERS))
        self._pending: deque[_PendingChunk] = deque()
        self._syncs: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._hasher.shutdown()
        self._writer.shutdown()
        self._syncer.shutdown()

    def reserve(self, target: Path, size: int) -> None:
        """Create the file and allocate its bytes: a full disk is noticed before the work is done."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            if size and hasattr(os, "posix_fallocate"):
                try:
                    os.posix_fallocate(file.fileno(), 0, size)
                except OSError as error:
                    if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:  # of file systems that cannot
                        raise

    def copy(self, source: Path, target: Path, ranges: Sequence[ByteRange]) -> BakedFile:
        """Write a reserved file from ``source``; the ranges are all its bytes from first to last."""
        digest = sha256()
        with source.open("rb", buffering=0) as reader, target.open("r+b", buffering=0) as writer, self._drained():
            for byte_range in ranges:
                for start in range(0, byte_range.size, byte_range.chunk_size):
                    buffer = self._take_buffer(byte_range.chunk_size)
                    chunk = memoryview(buffer)[: min(byte_range.chunk_size, byte_range.size - start)]
                    _read(reader, chunk)
                    if byte_range.transform is not None:
                        byte_range.transform(chunk)
                    futures = self._hasher.submit(digest.update, chunk), self._writer.submit(_write, writer, chunk)
                    self._pending.append(_PendingChunk(futures, buffer))
                    self._on_bytes(len(chunk))
            while self._pending:
                self._finish_oldest()
            # the thread gets a descriptor of its own, because this one is closed at the end of the block
            self._syncs.append(self._syncer.submit(_sync_and_close, os.dup(writer.fileno())))
        return BakedFile(size=sum(byte_range.size for byte_range in ranges), sha256=digest.hexdigest())

    @contextmanager
    def _drained(self) -> Iterator[None]:
        """Make sure that no thread writes after the block, also if it ends in an exception."""
        try:
            yield
        finally:
            wait([future for chunk in self._pending for future in chunk.futures if not future.cancel()])
            self._free_buffers.extend(chunk.buffer for chunk in self._pending)
            self._pending.clear()

    def wait_synced(self) -> None:
        """Wait until all files are on the disk."""
        for future in self._syncs:
            future.result()

    def _take_buffer(self, size: int) -> bytearray:
        """A buffer that is no longer in use, of at least ``size`` bytes."""
        if not self._free_buffers:
            self._finish_oldest()
        buffer = self._free_buffers.popleft()
        return buffer if len(buffer) >= size else bytearray(size)

    def _finish_oldest(self) -> None:
        oldest = self._pending[0]
        for future in oldest.futures:
            future.result()  # after an interruption here, `_drained` still waits for the chunk
        self._pending.popleft()
        self._free_buffers.append(oldest.buffer)


@contextmanager
def atomic_output(out: Path, *, folder: bool) -> Iterator[Path]:
    """Yield a path to write to. At the end of the block its content appears as ``out``; after an exception it is removed.

    The path is the folder ``out`` with ``.partial`` appended, or a file in that folder. What a killed run has left there
    is removed first. A run that is still active is an error.

    Raises:
        StorageError: if ``out`` exists, or another process is writing it.
    """
    if os.path.lexists(out):
        raise StorageError(f"{str(out)!r} exists already, and is left as it is. Choose another place, or remove it.")
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial):
        output = partial if folder else partial / out.name
        try:
            _clear(partial)
            yield output
            output.replace(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if not folder:
            partial.rmdir()
        sync_folder(out.parent)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the folder for this process. The system releases the lock when the process ends, also if it is killed.

    On Windows no lock is needed: a file that another process has open cannot be removed there.
    """
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the other process may have moved the folder to its final place before this one got the lock
            acquired = folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat())
        except BlockingIOError:
            acquired = False
        except OSError:  # a file system without locks
            acquired = True
        if not acquired:
            raise StorageError(f"another process is writing to {str(folder)!r}. Wait for it, or choose another place.")
        yield
    finally:
        os.close(descriptor)


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _write(file: FileIO, chunk: memoryview) -> None:
    written = 0
    while written < len(chunk):
        written += file.write(chunk[written:]) or 0


def _read(file: FileIO, chunk: memoryview) -> None:
    filled = 0
    while filled < len(chunk):
        count = file.readinto(chunk[filled:])
        if not count:
            raise StorageError(f"{file.name!r} became shorter while it was read. Is another program writing it?")
        filled += count


def _sync_and_close(descriptor: int) -> None:
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)
