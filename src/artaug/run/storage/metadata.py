"""The ``metadata.jsonl`` of a run's folder: its pairs for people, and for ``datasets.load_dataset("imagefolder", ...)``."""

import json
from collections.abc import Iterator
from itertools import chain
from typing import Any

from artaug._internal.files import atomic_write
from artaug.pair_folders import metadata_row
from artaug.pairs import Kept, Skipped
from artaug.run.storage.attempts import read_attempts
from artaug.run.storage.store import RunFolder

METADATA = "metadata.jsonl"


def write_metadata(folder: RunFolder) -> None:
    """Write a line for each pair that the run has so far, kept or dropped; no file if there is none.

    Raises:
        StorageError: if it cannot be written, or something of the run is damaged.
    """
    rows = _rows(folder)
    first = next(rows, None)
    if first is None:
        return
    what, remedy = "the list of a run's pairs", "Nothing else is touched: run the same call to go on."
    with (
        atomic_write(folder.path / METADATA, what=what, remedy=remedy) as partial,
        partial.open("w", encoding="utf-8", newline="\n") as file,
    ):
        for row in chain([first], rows):
            file.write(f"{json.dumps(row, ensure_ascii=False)}\n")


def _rows(folder: RunFolder) -> Iterator[dict[str, Any]]:
    for number in folder.begun_rounds():
        for _, attempt in read_attempts(folder.round(number)):
            if not isinstance(attempt, Skipped):
                kept, reason = isinstance(attempt, Kept), attempt.verdict.reason
                yield {**metadata_row(attempt.pair, folder.path), "round": number, "kept": kept, "reason": reason}
