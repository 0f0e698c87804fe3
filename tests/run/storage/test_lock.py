"""The lock of a run folder: who holds it, when it ends, and what happens where the system has none or it is lost."""

import contextlib
import errno
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from artaug._internal import files
from artaug._internal.processes import ProcessIdentity, _start_time
from artaug._internal.values import from_json
from artaug.errors import StorageError
from artaug.run.storage import lock as module
from artaug.run.storage.lock import LockOwner, RunLock
from support.disks import fill, small_disk

posix = pytest.mark.skipif(sys.platform == "win32", reason="forks, and locks by fcntl")
linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


def hold(folder, forking, connection):
    with RunLock(folder):
        child = os.fork() if forking else None
        if child == 0:
            time.sleep(60)
        connection.send(child)
        time.sleep(60)


@contextlib.contextmanager
def holder(folder, *, forking=False):
    """A process of its own that holds the folder; yields it, and the child that it has forked."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(folder, forking, theirs))
    process.start()
    try:
        yield process, ours.recv()
    finally:
        process.kill()
        process.join()


@pytest.fixture
def no_locks(monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    monkeypatch.setattr(module, "_SETTLING_S", 0.05)


def read(folder):
    return from_json(LockOwner, (folder / "owner.json").read_bytes())


def write(folder, **changes):
    """What a run leaves that was killed: its owner.json, as another process or machine."""
    with RunLock(folder):
        owner = json.loads((folder / "owner.json").read_text(encoding="utf-8"))
    of_process = {name: changes.pop(name) for name in list(changes) if name in owner["process"]}
    owner = {**owner, **changes, "process": {**owner["process"], **of_process}}
    (folder / "owner.json").write_text(json.dumps(owner), encoding="utf-8")


def ended():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_folder_is_free_again_after_the_block_and_after_an_exception(tmp_path):
    with pytest.raises(KeyboardInterrupt), RunLock(tmp_path):
        raise KeyboardInterrupt
    with RunLock(tmp_path) as lock:
        lock.check()
        assert read(tmp_path).process == ProcessIdentity.current()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize("with_locks", [True, False])
def test_the_same_process_is_refused_a_second_time(tmp_path, with_locks, request):
    if not with_locks:
        request.getfixturevalue("no_locks")
    with RunLock(tmp_path) as first:
        for second in (RunLock(tmp_path), first):
            with (
                pytest.raises(
                    StorageError, match=f"in use: this process {os.getpid()} on .* alive.*is closed or deleted"
                ),
                second,
            ):
                pass
        errors = []

        def enter():
            try:
                RunLock(tmp_path).__enter__()
            except StorageError as error:
                errors.append(error)

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        assert len(errors) == 1
        first.check()


@posix
def test_another_process_is_refused_with_who_where_and_since_when_until_it_is_killed(tmp_path):
    with holder(tmp_path) as (process, _):
        owner = read(tmp_path)
        assert owner.process.pid == process.pid
        expected = rf"process {process.pid} on {owner.process.host} .* since {owner.since:%Y-%m-%d %H:%M:%S} UTC.*Wait"
        with pytest.raises(StorageError, match=expected):
            RunLock(tmp_path, take_over=True).__enter__()
        process.kill()
        process.join()
        with RunLock(tmp_path) as lock:
            lock.check()


@posix
def test_an_owner_killed_while_its_forked_child_lives_leaves_the_folder_free(tmp_path):
    with holder(tmp_path, forking=True) as (process, child):
        process.kill()
        process.join()
        os.kill(child, 0)  # it lives
        try:
            with RunLock(tmp_path) as lock:
                lock.check()
        finally:
            os.kill(child, signal.SIGKILL)


@posix
def test_a_forked_child_neither_holds_nor_ends_its_parents_lock(tmp_path):
    with RunLock(tmp_path) as lock:
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(StorageError):
                lock.check()
                code = 2
            lock.__exit__()
            with contextlib.suppress(StorageError):
                RunLock(tmp_path).__enter__()
                code = 3
            os._exit(0 if code == 1 else code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        lock.check()


@linux
def test_a_child_forked_in_another_thread_while_the_lock_is_opened_does_not_hold_it(tmp_path, monkeypatch):
    open_lock, opened, children = module._open_lock, threading.Event(), []  # noqa: SLF001 - the race is within it

    def open_slowly(folder):
        file = open_lock(folder)
        opened.set()
        time.sleep(0.2)
        return file

    def fork():
        opened.wait()
        child = os.fork()
        if child == 0:
            time.sleep(60)
        children.append(child)

    monkeypatch.setattr(module, "_open_lock", open_slowly)
    forking = threading.Thread(target=fork)
    forking.start()
    with RunLock(tmp_path):
        forking.join()
        try:
            for _ in range(200):  # the child lets it go as soon as it runs, which a busy machine may put off
                held = [str(path.readlink()) for path in Path(f"/proc/{children[0]}/fd").iterdir()]
                if str(tmp_path / "lock") not in held:
                    break
                time.sleep(0.05)
            assert str(tmp_path / "lock") not in held
        finally:
            os.kill(children[0], signal.SIGKILL)
            os.waitpid(children[0], 0)


@linux
def test_a_process_is_running_until_it_ends_also_before_its_parent_has_noticed():
    assert ProcessIdentity.current().is_running() is True
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    here = ProcessIdentity.current()
    started = _start_time(child.pid)
    identity = ProcessIdentity(here.host, child.pid, here.boot, here.pid_namespace, started)
    assert identity.is_running() is True
    assert ProcessIdentity(here.host, child.pid, here.boot, here.pid_namespace, "7").is_running() is False
    assert ProcessIdentity(here.host, child.pid, "another", here.pid_namespace, started).is_running() is None
    child.kill()
    while identity.is_running():
        time.sleep(0.01)
    child.stdin.close()
    child.wait()
    assert identity.is_running() is False


@linux
def test_a_process_hidden_from_this_user_counts_as_running(monkeypatch):
    def kill(*_):
        raise PermissionError

    here = ProcessIdentity.current()
    hidden = ProcessIdentity(here.host, ended(), here.boot, here.pid_namespace, "7")
    assert hidden.is_running() is False
    monkeypatch.setattr(os, "kill", kill)
    assert hidden.is_running() is True


def other_boot():
    return {"boot": "an earlier start", "started": "5"}


@linux
@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({"pid": 1, "started": "5"}, "free"),  # the number was given to another process
        ({"pid": "ended"}, "free"),
        (other_boot(), "free"),
        ({"pid": os.getppid(), "started": "its own"}, "in use"),
        ({"host": "elsewhere", **other_boot()}, "may be in use.*Look on elsewhere.*take_over=True"),
        ({"host": "container", "pid_namespace": "pid:[7]"}, "may be in use"),
        ({"boot": "", "started": ""}, "may be in use"),  # a Mac's
        (None, "cannot be read.*take_over=True"),
    ],
)
def test_without_locks_the_owners_file_decides_and_the_file_system_is_named_once(changes, outcome, tmp_path, caplog):
    if changes is None:
        (tmp_path / "owner.json").write_text("{", encoding="utf-8")
    else:
        if changes.get("pid") == "ended":
            changes = {**changes, "pid": ended()}
        if changes.get("started") == "its own":
            changes = {**changes, "started": _start_time(changes["pid"])}
        write(tmp_path, **changes)
    caplog.clear()
    with contextlib.ExitStack() as stack:
        if outcome != "free":
            with pytest.raises(StorageError, match=outcome):
                RunLock(tmp_path).__enter__()
        stack.enter_context(RunLock(tmp_path, take_over=outcome != "free")).check()
        assert read(tmp_path).process.pid == os.getpid()
    warnings = [record.getMessage() for record in caplog.records if "cannot lock files" in record.getMessage()]
    assert len(warnings) == (1 if outcome == "free" else 2)  # once a run


@linux
@pytest.mark.parametrize(
    "changes",
    [{"pid": 1, "started": "5"}, other_boot(), {"host": "c", "pid_namespace": "pid:[7]"}, {"boot": ""}, {}, None],
)
def test_where_the_system_locks_what_a_killed_run_left_is_passed_over_at_once(changes, tmp_path):
    if changes is None:
        (tmp_path / "owner.json").write_text("{", encoding="utf-8")
    else:
        write(tmp_path, **changes)
    start = time.monotonic()
    with RunLock(tmp_path) as lock:
        lock.check()
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("lives", [True, False])
def test_an_owner_on_another_machine_is_watched_where_its_lock_cannot_be_seen(lives, tmp_path):
    write(tmp_path, host="elsewhere", **other_boot(), heartbeat_s=0.2, heartbeat=7, last_alive="2019-01-01T00:00:00Z")
    if not lives:
        with RunLock(tmp_path) as lock:
            lock.check()
        return
    beating = json.loads((tmp_path / "owner.json").read_text(encoding="utf-8"))
    beating["heartbeat"] += 1

    def beat():
        with files.atomic_write(tmp_path / "owner.json", what="", remedy="") as partial:
            partial.write_text(json.dumps(beating), encoding="utf-8")

    timer = threading.Timer(0.1, beat)
    timer.start()
    with pytest.raises(StorageError, match=r"in use: process .* on elsewhere"):
        RunLock(tmp_path).__enter__()
    timer.join()


@posix
@linux
def test_a_living_run_whose_lock_file_was_removed_is_found_by_its_name(tmp_path):
    with holder(tmp_path):
        (tmp_path / "lock").unlink()
        with pytest.raises(StorageError, match="in use: process"):
            RunLock(tmp_path).__enter__()


def test_the_heartbeat_counts_up_and_is_a_sign_for_people(tmp_path):
    with RunLock(tmp_path, heartbeat_s=0.02):
        first = read(tmp_path)
        while (later := read(tmp_path)).heartbeat < 3:
            time.sleep(0.01)
        assert later.last_alive > first.last_alive
        assert (later.since, later.token) == (first.since, first.token)


@pytest.mark.parametrize("change", ["taken over", "removed"])
def test_a_run_that_lost_its_folder_stops_at_the_next_check_and_leaves_the_other_one_alone(change, tmp_path):
    with RunLock(tmp_path, heartbeat_s=0.02) as lock:
        owner = json.loads((tmp_path / "owner.json").read_text(encoding="utf-8"))
        owner.update(token="another", process={**owner["process"], "host": "elsewhere"})
        if change == "removed":
            (tmp_path / "owner.json").unlink()
        else:
            with files.atomic_write(tmp_path / "owner.json", what="", remedy="") as partial:
                partial.write_text(json.dumps(owner), encoding="utf-8")
        while any(thread.name == f"heartbeat of {tmp_path}" for thread in threading.enumerate()):
            time.sleep(0.01)
        with pytest.raises(StorageError, match="elsewhere has taken it over" if change == "taken over" else "removed"):
            lock.check()
    assert (tmp_path / "owner.json").exists() == (change == "taken over")


@pytest.mark.usefixtures("no_locks")
def test_one_of_two_that_write_at_once_without_locks_goes_on(tmp_path, monkeypatch):
    """Both have found the folder free before either has written."""
    outcomes, barrier, check_free = [], threading.Barrier(2), RunLock._check_free  # noqa: SLF001 - the race is between two calls
    monkeypatch.setattr(RunLock, "_check_free", lambda lock: (check_free(lock), barrier.wait()))
    contenders = [RunLock(tmp_path), RunLock(tmp_path)]

    def enter(lock):
        try:
            lock.__enter__()
            outcomes.append("held")
        except StorageError:
            outcomes.append("lost")

    threads = [threading.Thread(target=enter, args=(lock,)) for lock in contenders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held", "lost"]
    for lock in contenders:
        lock.__exit__()


def test_a_disk_that_is_full_at_a_heartbeat_ends_no_run_and_is_said_once(tmp_path, monkeypatch, caplog):
    beats = []

    def full(_, owner):
        beats.append(owner.heartbeat)
        raise StorageError("owner.json could not be written: no space left")

    with RunLock(tmp_path, heartbeat_s=0.01) as lock:
        monkeypatch.setattr(RunLock, "_write", full)
        while len(beats) < 3:
            time.sleep(0.01)
        lock.check()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_clock_that_was_set_back_changes_nothing_but_the_text(tmp_path):
    write(tmp_path, last_alive="2999-01-01T00:00:00Z", since="2999-01-01T00:00:00Z", pid=1, started="5")
    with RunLock(tmp_path) as lock:
        owner = json.loads((tmp_path / "owner.json").read_text(encoding="utf-8"))
        owner.update(last_alive="2999-01-01T00:00:00Z")
        (tmp_path / "owner.json").write_text(json.dumps(owner), encoding="utf-8")
        with pytest.raises(StorageError, match="last alive just now"):
            RunLock(tmp_path).__enter__()
        lock.check()


def test_a_folder_that_is_missing_and_a_lock_that_is_no_file_are_errors(tmp_path):
    with pytest.raises(StorageError, match="needs a folder that exists"):
        RunLock(tmp_path / "missing").__enter__()
    (tmp_path / "lock").mkdir()
    with pytest.raises(StorageError, match=r"cannot be locked.*lock cannot be opened"):
        RunLock(tmp_path).__enter__()


@posix
def test_a_lock_that_is_a_fifo_is_an_error_and_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / "lock")
    with pytest.raises(StorageError, match="no regular file"):
        RunLock(tmp_path).__enter__()


@posix
def test_a_folder_that_is_read_only_is_an_error():
    with tempfile.TemporaryDirectory() as name:
        folder, root = Path(name), os.geteuid() == 0
        folder.chmod(0o555)
        if root:
            os.seteuid(65534)  # root writes anywhere
        try:
            with pytest.raises(StorageError, match=r"Permission denied.*may write to"):
                RunLock(folder).__enter__()
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o755)


def test_a_full_disk_refuses_a_run_and_ends_none(tmp_path):
    with small_disk(tmp_path / "disk", "256k") as disk:
        filling = fill(disk)
        with pytest.raises(StorageError, match=r"No space left.*Make room"):
            RunLock(disk).__enter__()
        filling.unlink()
        with RunLock(disk, heartbeat_s=0.01) as lock:
            filling = fill(disk)
            time.sleep(0.1)
            lock.check()
            before = read(disk).heartbeat
            filling.unlink()
            while read(disk).heartbeat == before:
                time.sleep(0.01)
        assert [path.name for path in disk.iterdir()] == ["lock"]


def test_a_run_ends_also_where_its_name_cannot_be_removed_and_the_next_one_is_let_in(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.EROFS, "Read-only file system")

    lock = RunLock(tmp_path).__enter__()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fail)
        lock.__exit__()
    assert read(tmp_path).process.pid == os.getpid()
    with RunLock(tmp_path) as lock:
        lock.check()


def test_an_owner_that_cannot_be_written_leaves_the_folder_free(tmp_path):
    (tmp_path / "owner.json").mkdir()
    with pytest.raises(StorageError, match="owner of the run folder"):
        RunLock(tmp_path).__enter__()
    (tmp_path / "owner.json").rmdir()
    with RunLock(tmp_path) as lock:
        lock.check()
