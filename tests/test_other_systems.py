"""What Windows, Macs and network disks do otherwise, simulated: no fcntl, no flushing of folders, no flushing of read-only files."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from artaug._internal import files
from artaug.errors import StorageError
from artaug.lora.baking import stream

ROOT = Path(__file__).parents[1]

AS_ON_WINDOWS = """
import importlib, os, pkgutil, sys, types
import fcntl
import artaug

def import_all():
    for module in pkgutil.walk_packages(importlib.import_module("artaug").__path__, "artaug."):
        importlib.import_module(module.name)

import_all()  # with the libraries, which were installed for the system that this is
for name in [name for name in sys.modules if name.split(".")[0] == "artaug"]:
    del sys.modules[name]

def locking(descriptor, mode, count):
    assert mode == 2 and count == 1
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PermissionError(13, "Permission denied")

def fsync(descriptor, write=os.fsync):
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(9, "Bad file descriptor")
    write(descriptor)

def open_file(path, flags, *rest, plainly=os.open, **more):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return plainly(path, flags, *rest, **more)

sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
for absent in ("fcntl", "resource", "grp", "pwd", "termios"):
    sys.modules[absent] = None
os.fsync, os.open = fsync, open_file
for absent in ("mkfifo", "geteuid", "fork", "posix_fallocate", "fchmod", "O_DIRECTORY", "O_NOFOLLOW"):
    delattr(os, absent)
sys.platform = "win32"

import_all()
from pathlib import Path
import torch
import artaug as aa
from PIL import Image
from artaug.lora.lora import LoRA, LowRank
from artaug.review.decisions import append_decision, read_decisions
from artaug.training.state import TrainingState

folder = Path(sys.argv[1])
checkpoints = aa.Checkpoints(folder=folder / "checkpoints", every=1, keep=2)
for step in range(1, 5):
    checkpoints.write(TrainingState(step=step, losses=(0.5,) * step), run_fingerprint={"run": "1"})
assert checkpoints.latest(run_fingerprint={"run": "1"}).step == 4
lora = LoRA({"transformer_blocks.0.attn.to_q": LowRank(torch.ones(1, 4), torch.ones(4, 1))})
lora.save(folder / "lora.safetensors")
lora.save(folder / "lora.safetensors")
pair = aa.ImagePair.unchanged(Image.new("RGB", (8, 8)), prompt="a", seed=0)
append_decision(folder / "decisions.jsonl", pair, True)
assert list(read_decisions(folder / "decisions.jsonl").values()) == [True]
from artaug._internal.files import atomic_output
with atomic_output(folder / "baked.safetensors") as partial:
    partial.write_bytes(b"x")
assert (folder / "baked.safetensors").read_bytes() == b"x"
from artaug.run.storage.lock import RunLock
(folder / "run").mkdir()
with RunLock(folder / "run") as lock:
    lock.check()
    try:
        RunLock(folder / "run").__enter__()
    except aa.errors.StorageError as error:
        assert "in use: this process" in str(error)
    else:
        raise AssertionError
with RunLock(folder / "run"):
    pass
assert not [path for path in folder.rglob("*") if "partial" in path.name]
"""


def test_every_module_imports_and_files_are_written_as_on_windows(tmp_path):
    finished = subprocess.run(
        [sys.executable, "-c", AS_ON_WINDOWS, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("code", [errno.EACCES, errno.EBADF, errno.EINVAL, errno.EISDIR, errno.EOPNOTSUPP, errno.EPERM])
def test_a_disk_that_flushes_no_folders_holds_the_file_all_the_same(code, tmp_path, monkeypatch):
    def fsync(descriptor, flush=os.fsync):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with files.atomic_write(tmp_path / "file", what="the file", remedy="Try again.") as partial:
        partial.write_bytes(b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_a_disk_that_fails_is_an_error(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with (
        pytest.raises(StorageError, match="Input/output error"),
        files.atomic_write(tmp_path / "file", what="the file", remedy="Try again.") as partial,
    ):
        partial.write_bytes(b"whole")
    with pytest.raises(OSError, match="Input/output error"):
        files.sync_folder(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="it has no fcntl")
@pytest.mark.parametrize("full", [True, False])
def test_a_mac_flushes_to_the_disk_itself_where_it_can(full, tmp_path, monkeypatch):
    calls = []

    def fcntl(_, command):
        calls.append(command)
        if not full:
            raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(files.fcntl, "fcntl", fcntl)
    monkeypatch.setattr(files.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(os, "fsync", lambda _: calls.append("fsync"))
    (tmp_path / "file").write_bytes(b"1")
    files.sync_file(tmp_path / "file")
    assert calls == ([51] if full else [51, "fsync"])


@pytest.mark.skipif(sys.platform == "win32", reason="it has no fcntl")
def test_a_bake_needs_no_locks_of_the_file_system(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with files.atomic_output(tmp_path / "out") as folder:
        folder.mkdir()
        (folder / "file").write_bytes(b"1")
    assert (tmp_path / "out" / "file").read_bytes() == b"1"


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="nothing to reserve")
@pytest.mark.parametrize(("code", "passes"), [(errno.EOPNOTSUPP, True), (errno.EINVAL, True), (errno.ENOSPC, False)])
def test_a_disk_that_cannot_reserve_room_is_told_from_a_full_one(code, passes, tmp_path, monkeypatch):
    def fallocate(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    if passes:
        stream.reserve_file(tmp_path / "file", 10)
    else:
        with pytest.raises(OSError, match="No space"):
            stream.reserve_file(tmp_path / "file", 10)
