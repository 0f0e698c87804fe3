"""The lock of a run folder: one run at a time, between processes, machines, and where a file system has no locks."""

import logging
import secrets
import threading
import time
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Self, final

from pydantic import AwareDatetime

from artaug._internal.files import atomic_write, check_regular, lock_file, unlock_file
from artaug._internal.processes import ProcessIdentity, dropped_in_children, keep_in_children
from artaug._internal.values import from_json, to_json, value
from artaug.errors import InvalidValueError, StorageError

_LOG = logging.getLogger(__name__)
_LOCK = "lock"
"""Locked while a run is in the folder. It stays: if it were removed, two processes could hold two files of this name."""
_OWNER = "owner.json"
"""Whose run is in the folder. The end of that run removes it."""
_SETTLING_S = 1.0
"""Without locks, whoever wrote `_OWNER` last has the folder; the others see that after this time."""
_WATCHED_HEARTBEATS = 2.5
"""How long an owner on another machine is watched for a sign of life."""
_AGAIN = "What it has finished is kept; make the same call again to go on from there."


@value
class LockOwner:
    """The run that holds a folder, as ``owner.json`` says it."""

    process: ProcessIdentity
    token: str
    """By chance, one a run: a process may run in a folder again."""
    since: AwareDatetime
    last_alive: AwareDatetime
    """By the owner's clock, for people. Programs look at ``heartbeat``, since clocks differ and are set back."""
    heartbeat: int
    """Counts up while the owner lives, every ``heartbeat_s`` seconds."""
    heartbeat_s: float


@final
class RunLock:
    """Keeps a run folder for one run: a second one, in this process or another, is refused at once, whatever the first does.

    The system's lock of ``<folder>/lock`` decides, and ends with the process, also where its forked children live on.
    ``<folder>/owner.json`` says whose it is, and every ``heartbeat_s`` seconds that it lives. It decides where the file
    system has no locks, or shows them to one machine only: an owner that has ended is passed over; one of which nothing
    can be found out from here is refused, unless ``take_over``.

    Args:
        folder: it has to exist.
        take_over: take the folder also from a run that may still live on another machine; if it does, its next `check`
            stops it. It never takes the folder from a process that holds the system's lock.
        heartbeat_s: seconds between signs of life.

    Raises:
        StorageError: on entering, if another run holds the folder or its files cannot be written.
    """

    def __init__(self, folder: Path, *, take_over: bool = False, heartbeat_s: float = 30.0) -> None:
        self.folder = folder
        self._take_over = take_over
        self._heartbeat_s = heartbeat_s
        self._file: BinaryIO | None = None
        self._owner: LockOwner | None = None
        self._has_locks = True
        self._ended = threading.Event()
        self._heart = threading.Thread()

    def __enter__(self) -> Self:
        if self._file is not None:
            raise StorageError(_describe_refusal(self.folder, self._owner))
        try:
            with dropped_in_children(self):
                self._file = _open_lock(self.folder)
            self._has_locks = self._lock(self._file)
            self._claim()
            self._ended = threading.Event()
            self._heart = threading.Thread(target=self._beat, name=f"heartbeat of {self.folder}", daemon=True)
            self._heart.start()
        except BaseException:
            self._let_go()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is None:  # a forked child that left the block
            return
        self._ended.set()
        try:
            self._heart.join()
            with suppress(OSError, InvalidValueError):
                if self._is_own(read_owner(self.folder)):
                    (self.folder / _OWNER).unlink()
        finally:
            self._let_go()

    def check(self) -> None:
        """Make sure that the folder is still this run's: call it before something is added to the folder.

        Raises:
            StorageError: if another run has taken it over, if ``owner.json`` was removed, and in a forked child.
        """
        if self._file is None:
            raise StorageError(
                f"The run folder {self.folder} is not locked by this process. A forked child does not keep its parent's "
                "lock; write to the folder in the process that made the call."
            )
        try:
            owner = read_owner(self.folder)
        except (OSError, InvalidValueError) as error:  # replaced at this moment (Windows), or a network out of breath
            _LOG.debug("%s cannot be read: %s", self.folder / _OWNER, error)
            return
        if not self._is_own(owner):
            by = "somebody removed its owner.json" if owner is None else f"{_name(owner)} has taken it over"
            raise StorageError(f"This run has lost its folder {self.folder}: {by}. So it stops here. {_AGAIN}")

    def drop_in_child(self) -> None:
        """Close the lock in a forked child: held open there, it would outlive its owner."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
        self._file = None
        self._owner = None

    def _lock(self, file: BinaryIO) -> bool:
        """Lock the file, or say that its file system has no locks.

        Raises:
            StorageError: if another process has locked it.
        """
        try:
            lock_file(file)
        except (BlockingIOError, PermissionError):
            owner = None
            with suppress(OSError, InvalidValueError):
                owner = read_owner(self.folder)
            if (
                owner is not None and owner.process.is_running() is False
            ):  # the last one's; the new one has yet to write its
                owner = None
            raise StorageError(_describe_refusal(self.folder, owner)) from None
        except OSError as error:
            _LOG.warning(
                "The file system of the run folder %s cannot lock files (%s). Two runs are kept apart by %s alone: do not "
                "start a second one from another machine.",
                *(self.folder, error, _OWNER),
            )
            return False
        return True

    def _claim(self) -> None:
        """Write this run's name where that of no living run stands.

        Raises:
            StorageError: if there is one, or there may be one.
        """
        if not self._take_over:
            self._check_free()
        now = datetime.now(UTC)
        self._write(LockOwner(ProcessIdentity.current(), secrets.token_hex(8), now, now, 0, self._heartbeat_s))
        if not self._has_locks:
            time.sleep(_SETTLING_S)
            self.check()

    def _check_free(self) -> None:
        try:
            owner = read_owner(self.folder)
        except (OSError, InvalidValueError) as error:
            if self._has_locks:  # cut by a full disk, or of another version
                return
            raise StorageError(
                f"{self.folder / _OWNER} cannot be read ({error}), so a run may be in this folder. Its file system has no "
                "locks that would tell. If no run is in it, pass take_over=True."
            ) from error
        lives = owner is not None and self._lives(owner)
        if lives is not False:
            raise StorageError(_describe_refusal(self.folder, owner, certain=lives is True))

    def _lives(self, owner: LockOwner) -> bool | None:
        """Whether a run still lives; None if that cannot be found out."""
        here = ProcessIdentity.current()
        if owner.process == here and self._has_locks:
            return False  # its lock was free: it has ended without a word, as on a disk that was full
        running = owner.process.is_running()
        if running is not None:
            return running
        if self._has_locks:  # of this machine they tell the truth; those of others may not be seen from here
            return False if owner.process.is_on_machine_of(here) else self._shows_life(owner)
        restarted = owner.process.host == here.host and owner.process.boot and here.boot
        return False if restarted and owner.process.boot != here.boot else None

    def _shows_life(self, owner: LockOwner) -> bool:
        """Whether the heartbeat changes while this process looks; no clock is compared with another."""
        wait_s = _WATCHED_HEARTBEATS * owner.heartbeat_s
        _LOG.warning(
            "The run folder %s was last held by %s, which has not said that its run has ended. Waiting for a sign of life from "
            "it, %.0f s at most.",
            *(self.folder, _name(owner), wait_s),
        )
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            time.sleep(min(1.0, owner.heartbeat_s / 4))
            with suppress(OSError, InvalidValueError):
                latest = read_owner(self.folder)
                if latest is None:
                    return False
                if (latest.token, latest.heartbeat) != (owner.token, owner.heartbeat):
                    return True
        return False

    def _beat(self) -> None:
        """Until the end of the block, or until another run has the folder: say that this one lives."""
        owner, warned = self._owner, False
        while owner is not None and not self._ended.wait(self._heartbeat_s):
            with suppress(OSError, InvalidValueError):  # unreadable: written anew
                if not self._is_own(read_owner(self.folder)):
                    return
            owner = replace(owner, heartbeat=owner.heartbeat + 1, last_alive=datetime.now(UTC))
            try:
                self._write(owner)
            except StorageError as error:  # a full disk is the run's to report
                if not warned:
                    _LOG.warning("%s", error)
                warned = True

    def _write(self, owner: LockOwner) -> None:
        self._owner = owner
        with atomic_write(
            self.folder / _OWNER, what="the owner of the run folder", remedy="Make room, or give it a folder of yours."
        ) as partial:
            partial.write_text(to_json(owner), encoding="utf-8")

    def _is_own(self, owner: LockOwner | None) -> bool:
        return owner is not None and self._owner is not None and owner.token == self._owner.token

    def _let_go(self) -> None:
        keep_in_children(self)
        if self._file is not None:
            unlock_file(self._file)
        self._file = None
        self._owner = None


def _open_lock(folder: Path) -> BinaryIO:
    """Open the file that is locked; it is made if it is missing, and never written.

    Raises:
        StorageError: if the folder is missing or read-only, or if no file can have this name.
    """
    path = folder / _LOCK
    try:
        with suppress(FileNotFoundError):
            check_regular(path)  # a FIFO would wait
        return path.open("ab")  # NFS locks only what is open for writing
    except OSError as error:
        raise StorageError(
            f"The run folder {folder} cannot be locked: {path} cannot be opened ({error}). A run needs a folder that exists "
            "and that it may write to."
        ) from error


def read_owner(folder: Path) -> LockOwner | None:
    """The run that holds a folder, None if nobody has written there that one does.

    Raises:
        OSError: if that cannot be read.
        InvalidValueError: if it is not what this version writes.
    """
    path = folder / _OWNER
    try:
        check_regular(path)
        return from_json(LockOwner, path.read_bytes())
    except FileNotFoundError:
        return None


def _describe_refusal(folder: Path, owner: LockOwner | None, *, certain: bool = True) -> str:
    """Why a folder cannot be had, and what to do: for an owner that lives, or that may (``certain`` is false)."""
    if owner is None:
        return (
            f"The run folder {folder} is in use by another process. Wait until it ends, or stop it, and make the same call "
            "again."
        )
    what = describe_owner(owner)
    if owner.process == ProcessIdentity.current():
        return (
            f"The run folder {folder} is in use: {what}. Let that call end, or give this one another folder. An iterator that "
            "was left half way holds its folder until it is closed or deleted."
        )
    if certain:
        return (
            f"The run folder {folder} is in use: {what}. Wait until it ends, or stop it (the first Ctrl-C or SIGTERM stops "
            "it in order), and make the same call again."
        )
    return (
        f"The run folder {folder} may be in use: {what}, and its file system has no locks that would tell whether it still "
        f"runs. Look on {owner.process.host}. If it does not run any more, make the same call again with take_over=True."
    )


def describe_owner(owner: LockOwner) -> str:
    """Which process has a folder, and since when."""
    since = f"{owner.since.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
    return f"{_name(owner)} has held it since {since} and was last alive {_describe_age(owner.last_alive)}"


def _name(owner: LockOwner) -> str:
    here = ProcessIdentity.current()
    who = "this process" if owner.process == here else "process"
    return f"{who} {owner.process.pid} on {owner.process.host}"


def _describe_age(moment: datetime) -> str:
    """How long ago something was, for people: a clock that was set back makes it "just now"."""
    age_s = (datetime.now(UTC) - moment).total_seconds()
    if age_s < 1:
        return "just now"
    if age_s < 120:
        return f"{age_s:.0f} s ago"
    return f"{age_s / 60:.0f} minutes ago" if age_s < 7200 else f"{age_s / 3600:.1f} hours ago"
