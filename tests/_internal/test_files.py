"""Atomic files under failure, power loss and competition; safetensors headers; digests of files."""

import errno
import multiprocessing
import os
import signal
import stat
import sys
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from artaug._internal import files
from artaug._internal.files import (
    _LOCK,
    _MACHINE,
    SafetensorsHeader,
    _is_abandoned,
    atomic_output,
    atomic_write,
    check_disk_space,
    file_sha256,
    load_tensors,
    remove_abandoned,
    save_tensors,
)
from artaug.errors import StorageError
from support.disks import fill, read_only, small_disk

ROW = {"before": torch.zeros(64, 256), "after": torch.ones(64, 256)}


def write(path, text, *, error=None):
    with atomic_write(path, what="the note", remedy="Make room.") as partial:
        partial.write_text(text, encoding="utf-8")
        if error is not None:
            raise error


def test_a_file_is_written_with_the_folders_above_it(tmp_path):
    path = tmp_path / "a" / "b" / "note.txt"
    write(path, "first")
    write(path, "second")
    assert path.read_text(encoding="utf-8") == "second"
    assert list(path.parent.iterdir()) == [path]


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "note.txt"
    write(path, "first")
    with atomic_write(path, what="the note", remedy="Make room.") as partial:
        partial.write_text("sec", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "first"
        assert path.parent in partial.parents  # on the same file system, so that it can replace the old one


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt()])
def test_an_exception_in_the_block_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "note.txt"
    write(path, "first")
    with pytest.raises(type(error)):
        write(path, "sec", error=error)
    assert path.read_text(encoding="utf-8") == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_system_error_names_the_file_and_the_remedy(tmp_path):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(StorageError, match=r"the note .*note\.txt could not be written: .* Make room\."):
        write(tmp_path / "file" / "note.txt", "text")


def test_file_and_folder_are_flushed_to_the_disk_around_the_replacement(tmp_path, monkeypatch):
    """Without the first flush a power failure can leave an empty file under the name, without the second no name."""
    events = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor):
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        size = os.fstat(descriptor).st_size if kind == "file" else None
        events.append((kind, size))
        fsync(descriptor)

    def noted_replace(source, target, **options):
        events.append(("replace", None))
        replace(source, target, **options)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write(tmp_path / "note.txt", "four")

    folder = [] if sys.platform == "win32" else [("folder", None)]
    assert events == [("file", 4), ("replace", None), *folder]


def killed_while_writing(folder):
    with atomic_write(folder / "killed.txt", what="the note", remedy="Make room.") as partial:
        (partial.parent / ".tmpAbC123").write_bytes(b"as safetensors does, which renames its own file")
        partial.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(sys.platform == "win32", reason="forks and kills")
@pytest.mark.parametrize("kills", [1, 5])
def test_the_next_write_in_a_folder_removes_all_that_killed_ones_left_there(tmp_path, kills):
    for _ in range(kills):
        process = multiprocessing.get_context("fork").Process(target=killed_while_writing, args=(tmp_path,))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 3  # the last one: half, hidden and its lock

    write(tmp_path / "another.txt", "whole")

    assert [path.name for path in tmp_path.iterdir()] == ["another.txt"]


def test_the_write_of_another_process_is_not_taken_for_abandoned(tmp_path):
    with atomic_write(tmp_path / "long.txt", what="the note", remedy="Make room.") as partial:
        partial.write_text("long", encoding="utf-8")
        write(tmp_path / "short.txt", "short")
        remove_abandoned(tmp_path)
        assert partial.read_text(encoding="utf-8") == "long"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.txt", "short.txt"]


def abandoned(folder, machine):
    scratch = folder / ".artaug-partial" / f"{machine}-0123"
    scratch.mkdir(parents=True)
    for name in (".lock", "half.txt"):
        (scratch / name).touch()
    return scratch


def make_old(scratch):
    for path in scratch.iterdir():
        os.utime(path, (0, 0))


def test_what_another_machine_left_is_removed_after_a_day(tmp_path):
    """A cluster's file system may keep locks apart, so a free lock proves nothing of another machine."""
    scratch = abandoned(tmp_path, "another")
    remove_abandoned(tmp_path)
    assert (scratch / "half.txt").exists()
    make_old(scratch)
    remove_abandoned(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="no file is removed there that is open")
def test_a_write_that_ends_while_another_process_looks_at_it_is_none_that_was_abandoned(tmp_path):
    scratch = abandoned(tmp_path, _MACHINE)
    with (scratch / _LOCK).open("r+b") as lock:
        for path in scratch.iterdir():
            path.unlink()
        assert not _is_abandoned(scratch, lock)


@pytest.mark.skipif(sys.platform == "win32", reason="locks by fcntl")
def test_without_locks_files_are_written_and_what_was_left_is_removed_after_a_day(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    scratch = abandoned(tmp_path, _MACHINE)
    write(tmp_path / "note.txt", "whole")
    assert (scratch / "half.txt").exists()
    make_old(scratch)
    write(tmp_path / "note.txt", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
@pytest.mark.parametrize("link", [".artaug-partial", ".artaug-partial/linked"])
def test_no_link_is_followed_to_files_of_others(tmp_path, link):
    kept = abandoned(tmp_path / "others", _MACHINE)
    make_old(kept)
    link = tmp_path / "foreign" / link
    link.parent.mkdir(parents=True)
    link.symlink_to(kept.parent if link.name == ".artaug-partial" else kept)
    remove_abandoned(tmp_path / "foreign")
    assert (kept / "half.txt").exists()


def test_a_folder_that_another_process_removes_in_between_is_made_again(tmp_path, monkeypatch):
    """``Path.mkdir(exist_ok=True)`` asks ``is_dir`` after it failed, and ``iterdir`` comes after ``is_dir``."""
    mkdir, iterdir, calls = os.mkdir, Path.iterdir, []

    def contested_mkdir(path, *options):
        calls.append(path)
        if len(calls) % 2 and Path(path).name == ".artaug-partial" and len(calls) < 6:
            raise FileExistsError(path)
        mkdir(path, *options)

    def late_iterdir(path):
        if path.name == ".artaug-partial":
            raise FileNotFoundError(path)
        return iterdir(path)

    (tmp_path / ".artaug-partial").mkdir()
    monkeypatch.setattr(Path, "iterdir", late_iterdir)
    remove_abandoned(tmp_path)
    monkeypatch.setattr(os, "mkdir", contested_mkdir)
    write(tmp_path / "note.txt", "whole")
    assert (tmp_path / "note.txt").read_text(encoding="utf-8") == "whole"
    assert calls


@pytest.mark.skipif(sys.platform == "win32", reason="there modes are no permissions")
def test_a_file_can_be_read_by_whom_any_new_file_can(tmp_path):
    (tmp_path / "plain").touch()
    with atomic_write(tmp_path / "row.safetensors", what="the row", remedy="Make room.") as partial:
        save_tensors(ROW, partial)  # safetensors itself gives 0600, whatever the umask
    assert (tmp_path / "row.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def write_rows(folder, count, queue, barrier):
    errors = []
    for number in range(count):
        barrier.wait()
        try:
            with atomic_write(folder / f"{number}.safetensors", what="the row", remedy="Make room.") as partial:
                save_tensors(ROW, partial)
        except StorageError as error:
            errors.append(str(error))
    queue.put(errors)


def test_two_processes_can_write_the_same_files_at_once(tmp_path):
    context = multiprocessing.get_context("fork" if sys.platform != "win32" else "spawn")
    queue, barrier = context.Queue(), context.Barrier(2)
    writers = [context.Process(target=write_rows, args=(tmp_path, 100, queue, barrier)) for _ in range(2)]
    for writer in writers:
        writer.start()
    errors = queue.get(timeout=60) + queue.get(timeout=60)
    for writer in writers:
        writer.join()
    assert errors == []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{number}.safetensors" for number in range(100))
    for path in tmp_path.iterdir():
        assert torch.equal(load_tensors(path)[0]["after"], ROW["after"])


def test_tensors_and_metadata_survive_a_file(tmp_path):
    path = tmp_path / "row.safetensors"
    metadata = {"zebra": "ä\n\x7f\x01", "antelope": '"'}
    save_tensors({"strided": torch.arange(6.0).reshape(2, 3).T}, path, metadata)
    tensors, read = load_tensors(path)
    assert torch.equal(tensors["strided"], torch.arange(6.0).reshape(2, 3).T)
    assert read == metadata


def test_the_same_tensors_and_metadata_give_the_same_bytes(tmp_path):
    metadata = {str(number): str(number) for number in range(20)}
    for name in ("one", "other"):
        save_tensors(ROW, tmp_path / name, metadata)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_what_cannot_be_written_or_read_is_a_system_error(tmp_path):
    with pytest.raises(OSError, match="missing"):
        save_tensors(ROW, tmp_path / "missing" / "row.safetensors")
    (tmp_path / "noise").write_bytes(b"noise" * 10)
    with pytest.raises(OSError, match="header"):
        load_tensors(tmp_path / "noise")
    with pytest.raises(FileNotFoundError):
        load_tensors(tmp_path / "missing")


def test_a_header_is_what_the_library_reads(tmp_path):
    path = tmp_path / "row.safetensors"
    save_file(ROW, path, {"made": "here"})
    header = SafetensorsHeader.read(path)
    with safe_open(path, framework="pt") as file:
        assert set(header.tensors) == set(file.keys())
        assert header.metadata == file.metadata()
    assert header.file_size == path.stat().st_size
    assert header.tensors["before"]["shape"] == [64, 256]
    start, end = header.tensors["after"]["data_offsets"]
    data = path.read_bytes()[header.data_start + start : header.data_start + end]
    assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.float32), ROW["after"].flatten())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x02\0\0",
        (50).to_bytes(8, "little") + b"{}",
        (1).to_bytes(8, "little") + b"{",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{{",
    ],
    ids=["empty", "short", "cut", "too small", "a list", "no JSON"],
)
def test_a_file_without_a_header_is_refused(tmp_path, content):
    path = tmp_path / "broken"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"."):
        SafetensorsHeader.read(path)


def test_the_digest_of_a_file_is_that_of_its_bytes(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    assert file_sha256(path) == sha256(b"content").hexdigest()


def test_a_full_disk_leaves_the_old_file_and_nothing_else_and_can_be_gone_on_with(tmp_path):
    with small_disk(tmp_path / "disk", "256k") as disk:
        write(disk / "note.txt", "first")
        filling = fill(disk)
        with pytest.raises(StorageError, match=r"note\.txt could not be written: .*No space left.* Make room\."):
            write(disk / "note.txt", "x" * 100_000)
        assert (disk / "note.txt").read_text(encoding="utf-8") == "first"
        assert {path.name for path in disk.iterdir()} == {"note.txt", "filling"}
        filling.unlink()
        write(disk / "note.txt", "x" * 100_000)
        assert (disk / "note.txt").stat().st_size == 100_000


def test_a_disk_that_is_read_only_is_an_error_that_leaves_the_old_file(tmp_path):
    with small_disk(tmp_path / "disk", "256k") as disk:
        write(disk / "note.txt", "first")
        with read_only(disk):
            with pytest.raises(StorageError, match=r"Read-only file system.* Make room\."):
                write(disk / "note.txt", "second")
            with pytest.raises(StorageError, match=r"the run folder .* cannot be written to: .*Read-only"):
                files.check_writable(disk / "runs" / "first", what="the run folder")
        assert [path.name for path in disk.iterdir()] == ["note.txt"]


def test_what_does_not_fit_on_the_disk_is_refused_at_the_door(tmp_path):
    folder = tmp_path / "disk" / "runs" / "first"
    with small_disk(tmp_path / "disk", "1m"):
        check_disk_space(folder, 2**19, what="The run")
        with pytest.raises(
            StorageError, match=r"The run takes 3\.00 GiB, and 0\.00 GiB are free there .*runs/first.*Make"
        ):
            check_disk_space(folder, 3 * 2**30, what="The run")
        fill(tmp_path / "disk")
        with pytest.raises(StorageError, match="Make room"):
            check_disk_space(folder, 1, what="The run")
    assert not (tmp_path / "disk" / "runs").exists()


@pytest.mark.parametrize(
    ("total", "free"), [(0, 0), (0, 2**63), (100, 200), (100, -1)], ids=["nothing", "of nothing", "more", "less"]
)
def test_a_disk_that_does_not_say_how_much_is_free_is_not_judged(total, free, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=total, free=free))
    check_disk_space(tmp_path, 2**40, what="The run")


def test_a_disk_that_cannot_be_asked_is_not_judged(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("shutil.disk_usage", fail)
    check_disk_space(tmp_path, 2**40, what="The run")


@pytest.mark.skipif(sys.platform == "win32", reason="it flushes no folders")
def test_a_new_folder_appears_when_all_that_it_holds_is_on_the_disk(tmp_path, monkeypatch):
    flushed, rename, fsync = set(), os.rename, os.fsync

    def noted_rename(source, target, **options):
        inside = {Path(source), *Path(source).rglob("*")}
        assert {path.stat().st_ino for path in inside} == flushed
        rename(source, target, **options)

    def noted_fsync(descriptor):
        flushed.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "rename", noted_rename)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    with atomic_output(tmp_path / "above" / "out") as output:
        (output / "sub").mkdir(parents=True)
        (output / "sub" / "file").write_text("whole")
        (output / "other").write_text("whole, too")

    assert {path.name for path in (tmp_path / "above").rglob("*")} == {"out", "sub", "file", "other"}
    assert tmp_path.joinpath("above").stat().st_ino in flushed


def killed_while_making(folder):
    with atomic_output(folder / "out") as output:
        (output / "sub").mkdir(parents=True)
        (output / "sub" / "file").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(sys.platform == "win32", reason="forks and kills")
def test_the_next_write_in_a_folder_removes_folders_that_killed_processes_left_there(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=killed_while_making, args=(tmp_path,))
    process.start()
    process.join()
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2  # the half and its lock

    with atomic_output(tmp_path / "out") as output:
        output.write_text("whole")

    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


def test_one_process_at_a_time_makes_an_output_and_others_beside_it_are_free(tmp_path):
    with atomic_output(tmp_path / "out") as output:
        with (
            pytest.raises(StorageError, match="another process is writing the same output"),
            atomic_output(tmp_path / "out"),
        ):
            pytest.fail("two processes write one output")
        with atomic_output(tmp_path / "other") as other:
            other.write_text("other")
        output.write_text("first")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"out": "first", "other": "other"}


def test_what_appears_in_the_place_of_an_output_meanwhile_stays(tmp_path):
    def make_both():
        with atomic_output(tmp_path / "out") as output:
            output.write_text("ours")
            (tmp_path / "out").write_text("theirs")

    with pytest.raises(StorageError, match="exists already"):
        make_both()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"out": "theirs"}
