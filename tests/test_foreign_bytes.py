"""Bytes of other people: whatever they are, a reader returns or raises our own error, in time and memory of their length."""

import time
import tracemalloc
from itertools import islice

import pytest

from support.foreign import CORPUS, READERS, Reader

FOUND = [pytest.param(path, id=f"{path.parent.name}/{path.stem}") for path in sorted(CORPUS.glob("*/*.bin"))]


@pytest.mark.parametrize("name", READERS)
def test_spoiled_bytes_are_read_or_refused(name):
    for data in (*READERS[name].seeds, b"", *islice(READERS[name].mutants(seed=0), 60)):
        READERS[name].check(data)


@pytest.mark.parametrize("path", FOUND)
def test_what_was_found_once_is_read_or_refused(path):
    READERS[path.parent.name].check(path.read_bytes())


def cpu_seconds(reader, data):
    times = []
    for _ in range(3):
        started = time.process_time()
        reader.check(data)
        times.append(time.process_time() - started)
    return min(times)


def peak_bytes(reader, data):
    tracemalloc.start()
    try:
        reader.check(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def repeated(reader, count):
    """A seed with many units in its middle, and the units alone."""
    seed = max(reader.seeds, key=len)
    return seed[: len(seed) // 2] + reader.unit * count + seed[len(seed) // 2 :], reader.unit * count


@pytest.mark.parametrize("name", READERS)
def test_time_and_memory_grow_with_the_length_and_no_faster(name):
    reader = READERS[name]
    for small, large in zip(repeated(reader, 500), repeated(reader, 4_000), strict=True):  # 8 times; a square is 64
        assert cpu_seconds(reader, large) < 24 * cpu_seconds(reader, small) + 0.2
        assert peak_bytes(reader, large) < 16 * peak_bytes(reader, small) + 1_000_000


def test_the_guard_against_growth_can_fail():
    squares = Reader(lambda data: [data.count(b"b") for _ in range(len(data) // 8)], (b"",), b"a" * 8)
    assert cpu_seconds(squares, squares.unit * 8_000) > 24 * cpu_seconds(squares, squares.unit * 1_000)


def test_the_guard_against_other_errors_can_fail():
    with pytest.raises(ZeroDivisionError):
        Reader(lambda data: 1 // len(data), (b"",), b"a").check(b"")
