"""The tests that need a GPU, as rows of a benchmark: they run in a process of their own, which sends each outcome."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import pytest

from benchmarks._schedule import Row

_MESSAGE = 1500


def rows(selection: Sequence[str]) -> Iterator[Row]:
    """Run tests; a row for each as it ends. What pytest prints goes to standard error.

    Args:
        selection: arguments of pytest: files, tests, ``-m``, ``-k``.

    Raises:
        RuntimeError: if pytest found no test, or ended before it ran them.
    """
    command = [sys.executable, "-m", "benchmarks._gpu_tests", *selection]
    failed = False
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603 - our own
        for line in process.stdout or ():
            row = json.loads(line)
            failed |= row["outcome"] == "failed"
            yield row
    # Code 1 is that of a failed test, and of a Python that could not even begin.
    expected = pytest.ExitCode.TESTS_FAILED if failed else pytest.ExitCode.OK
    if process.returncode != expected:
        raise RuntimeError(f"pytest ended with code {process.returncode}; its own words are above. It got {selection}.")


class _Reporter:
    """Writes the outcome of each test."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: Any) -> None:  # noqa: ANN401 - pytest's own class is private
        """A test's call, or what before or after it was not passed."""
        if report.when == "call" or report.outcome != "passed":
            message = str(report.longrepr)[-_MESSAGE:] if report.failed else ""
            row = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration, "message": message}
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as results:
        os.dup2(2, 1)  # the rest of the output is for people
        code = pytest.main([*sys.argv[1:], "-p", "no:cacheprovider"], plugins=[_Reporter(results)])
    sys.exit(code)
