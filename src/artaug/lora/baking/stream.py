"""One pass over a file: read in pieces and changed where it must be, while threads beside hash and write.

And the folder it all goes to, which takes its name only when it is whole.
"""

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

from artaug._internal.files import sync_folder
from artaug.errors import StorageError
from artaug.lora.baking.report import BakedFile

if sys.platform != "win32":
    import fcntl

_PIECE = 4 << 20
_BUFFERS = 4


class Change(Protocol):
    """What is done to a stretch of bytes, piece by piece and in place."""

    @property
    def unit(self) -> int:
        """All pieces but the last are a multiple of this many bytes."""

    def __call__(self, piece: memoryview) -> None:
        """Change the next piece."""


@dataclass(frozen=True)
class Stretch:
    """Bytes of a file that go the same way."""

    size: int
    change: Change | None = None
    """None for bytes that stay as they are."""

    @property
    def piece(self) -> int:
        """How many bytes to take at a time."""
        unit = self.change.unit if self.change else 1
        return max(_PIECE // unit, 1) * unit


class Scribe:
    """Writes files from files: of what is ready, one thread hashes, one writes, and one brings whole files to disk."""

    def __init__(self, *, on_bytes: Callable[[int], object]) -> None:
        self._on_bytes = on_bytes
        self._hasher = ThreadPoolExecutor(1, "artaug-hash")
        self._writer = ThreadPoolExecutor(1, "artaug-write")
        self._syncer = ThreadPoolExecutor(1, "artaug-sync")
        self._buffers = deque(bytearray(_PIECE) for _ in range(_BUFFERS))
        self._in_use: deque[tuple[tuple[Future[None], Future[None]], bytearray]] = deque()
        self._synced: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._hasher.shutdown()
        self._writer.shutdown()
        self._syncer.shutdown()

    def reserve(self, target: Path, size: int) -> None:
        """Make the file and take its room now: a full disk is noticed before the work is done."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)

    def copy(self, source: Path, target: Path, stretches: Sequence[Stretch]) -> BakedFile:
        """Write a reserved file from ``source``; the stretches are all its bytes from first to last."""
        digest = sha256()
        with source.open("rb", buffering=0) as read, target.open("r+b", buffering=0) as written, self._emptied():
            for stretch in stretches:
                for start in range(0, stretch.size, stretch.piece):
                    held = self._free(stretch.piece)
                    piece = memoryview(held)[: min(stretch.piece, stretch.size - start)]
                    _read(read, piece)
                    if stretch.change is not None:
                        stretch.change(piece)
                    kept = self._hasher.submit(digest.update, piece), self._writer.submit(_write, written, piece)
                    self._in_use.append((kept, held))
                    self._on_bytes(len(piece))
            while self._in_use:
                self._release()
            self._synced.append(self._syncer.submit(_sync, os.dup(written.fileno())))
        return BakedFile(size=sum(stretch.size for stretch in stretches), sha256=digest.hexdigest())

    @contextmanager
    def _emptied(self) -> Iterator[None]:
        """Let nothing be written any more once the block is left, whatever happened in it."""
        try:
            yield
        finally:
            wait([one for kept, _ in self._in_use for one in kept if not one.cancel()])
            self._buffers.extend(held for _, held in self._in_use)
            self._in_use.clear()

    def finish(self) -> None:
        """Wait until the disk holds everything."""
        for one in self._synced:
            one.result()

    def _free(self, size: int) -> bytearray:
        """A buffer that has been written, of at least that size."""
        if not self._buffers:
            self._release()
        held = self._buffers.popleft()
        return held if len(held) >= size else bytearray(size)

    def _release(self) -> None:
        kept, held = self._in_use[0]
        for one in kept:
            one.result()  # an interruption here leaves the piece among those that `_emptied` waits for
        self._in_use.popleft()
        self._buffers.append(held)


@contextmanager
def staged(out: Path, *, folder: bool) -> Iterator[Path]:
    """A place to write to, whose content appears as ``out`` at the end of the block, or not at all.

    It is in a folder called ``out`` with ``.partial`` behind, or is that folder. What a killed run has left there is
    cleared away first; a run that is still alive is left alone.

    Raises:
        StorageError: if ``out`` exists, or another process is writing it.
    """
    if os.path.lexists(out):
        raise StorageError(f"{str(out)!r} exists already, and is left as it is. Choose another place, or remove it.")
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    with _alone(partial):
        place = partial if folder else partial / out.name
        try:
            _clear(partial)
            yield place
            place.replace(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if not folder:
            partial.rmdir()
        sync_folder(out.parent)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; the system lets go of it when the process ends, however it ends.

    On Windows nothing has to be held: a file that another process has open cannot be cleared away there.
    """
    if sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = folder.exists() and os.path.samestat(os.fstat(handle), folder.stat())
        except BlockingIOError:
            mine = False
        if not mine:  # taken, or gone to its final place in between
            raise StorageError(f"another process is writing to {str(folder)!r}. Wait for it, or choose another place.")
        yield
    finally:
        os.close(handle)


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _write(file: FileIO, piece: memoryview) -> None:
    at = 0
    while at < len(piece):
        at += file.write(piece[at:]) or 0


def _read(file: FileIO, piece: memoryview) -> None:
    at = 0
    while at < len(piece):
        count = file.readinto(piece[at:])
        if not count:
            raise StorageError(f"{file.name!r} has become shorter while it was read. Is another program writing it?")
        at += count


def _sync(handle: int) -> None:
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
