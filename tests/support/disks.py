"""Disks to fill and to write-protect: small ones of their own, where mounting is allowed."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A file system of its own at ``place``, made and unmounted; the test is skipped where that is not allowed."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here; the limit on file sizes is tested instead")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def fill(disk: Path) -> Path:
    """Write a file until the disk is full."""
    path = disk / "filling"
    try:
        with path.open("wb", buffering=0) as file:
            while True:
                file.write(b"0" * 4096)
    except OSError:
        return path


@contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """A `small_disk` that cannot be written to."""
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
