"""Which process this is, whether another one still runs, and what forked children do not keep."""

import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from artaug._internal.values import value


@value
class ProcessIdentity:
    """A process, also after its number has been given to another one, and whatever the clock is set to."""

    host: str
    pid: int
    boot: str
    """The kernel's name for the time since it was started; empty where it has none (Windows, Macs)."""
    pid_namespace: str
    """Where ``pid`` counts: containers of one machine have a number 1 each. Empty where there are none."""
    started: str
    """When the process was started, in the kernel's ticks since its own start; empty where they cannot be read."""

    @classmethod
    def current(cls) -> "ProcessIdentity":
        """The process that calls this."""
        pid, boot, namespace = os.getpid(), "", ""
        with suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        with suppress(OSError):
            namespace = str(Path("/proc/self/ns/pid").readlink())
        return cls(platform.node(), pid, boot, namespace, _start_time(pid))

    def is_on_machine_of(self, other: "ProcessIdentity") -> bool:
        """Whether one machine ran both; containers have names of their own there, and its kernel may have been restarted."""
        return self.host == other.host or (bool(self.boot) and self.boot == other.boot)

    def is_running(self) -> bool | None:
        """Whether this process still runs; None if that cannot be found out from here."""
        here = ProcessIdentity.current()
        if not self.started or (self.boot, self.pid_namespace) != (here.boot, here.pid_namespace):
            return None
        try:
            return _start_time(self.pid) == self.started
        except PermissionError:
            return True


def _start_time(pid: int) -> str:
    """When a process was started; empty if it has ended, or where the system has no ``/proc``.

    Raises:
        PermissionError: if it runs, and belongs to a user whose processes are hidden.
    """
    try:
        # after the name, which may hold anything: the state is field 3, the start is field 22 (man proc_pid_stat)
        state, *rest = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except (OSError, ValueError):
        if Path("/proc/self/stat").exists():
            with suppress(ProcessLookupError):
                os.kill(pid, 0)
        return ""
    return "" if state in "ZX" else rest[18]  # it has ended, and its parent does not know yet


class Inherited(Protocol):
    """What a process holds and its forked children must not."""

    def drop_in_child(self) -> None:
        """Let go of it in a forked child, where only the thread that forked goes on."""


_HELD: list[Inherited] = []
_FORK_LOCK = threading.RLock()


@contextmanager
def dropped_in_children(held: Inherited) -> Iterator[None]:
    """Take hold of something in this block, during which no thread forks; children forked later drop it at once.

    It is called off by `keep_in_children`, and by an exception in the block.
    """
    with _FORK_LOCK:
        _HELD.append(held)
        try:
            yield
        except BaseException:
            _HELD.remove(held)
            raise


def keep_in_children(held: Inherited) -> None:
    """Forget what has been let go of."""
    with _FORK_LOCK, suppress(ValueError):
        _HELD.remove(held)


def _drop_in_child() -> None:
    _FORK_LOCK.release()
    for held in reversed(_HELD):  # handlers of signals are put back in the order of their blocks
        held.drop_in_child()
    _HELD.clear()


if hasattr(os, "register_at_fork"):  # POSIX
    os.register_at_fork(before=_FORK_LOCK.acquire, after_in_parent=_FORK_LOCK.release, after_in_child=_drop_in_child)
