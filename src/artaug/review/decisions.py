"""The file of decisions: one JSON line for each decision, only ever appended, so that a kill loses none."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from artaug._internal.decoding import decode_json
from artaug._internal.files import check_regular, flush
from artaug.errors import StorageError
from artaug.pairs import ImagePair, pair_digest


def read_decisions(path: Path) -> dict[str, bool]:
    """The last decision on each pair, by the pair's digest, ordered by the time of that decision.

    A last line without a line break was being written when the program was killed. It is ignored: the page had not
    confirmed it.

    Raises:
        StorageError: for a line that is not a decision, with its number; if the file cannot be read.
    """
    if not path.exists():
        return {}
    decisions: dict[str, bool] = {}
    try:
        check_regular(path)
        *lines, _incomplete = path.read_bytes().split(b"\n")
    except OSError as error:
        raise StorageError(f"the decisions in {str(path)!r} cannot be read: {error}. Expected a file.") from error
    for number, line in enumerate(lines, start=1):
        digest, keep = _parse_decision(line, number, path)
        decisions.pop(digest, None)  # so that the pair moves to the end of the dict
        if keep is not None:
            decisions[digest] = keep
    return decisions


def append_decision(path: Path, pair: ImagePair, keep: bool | None) -> None:
    """Append a decision, or the withdrawal of one (None), and flush it to the disk.

    Raises:
        OSError: if it cannot be written; then the file is unchanged, except perhaps for an incomplete last line.
    """
    decision = {
        "pair": pair_digest(pair),
        "keep": keep,
        "prompt": pair.prompt,
        "seed": pair.seed,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        _truncate_incomplete_line(file)
        file.write(json.dumps(decision, ensure_ascii=False).encode() + b"\n")
        file.flush()
        flush(file.fileno())


def _parse_decision(line: bytes, number: int, path: Path) -> tuple[str, bool | None]:
    try:
        decision = decode_json(line)
        digest, keep = decision["pair"], decision["keep"]
    except (ValueError, TypeError, KeyError):
        digest = keep = None
    if not isinstance(digest, str) or not (keep is None or isinstance(keep, bool)):
        raise StorageError(
            f"{str(path)!r}, line {number} is not a decision: {line!r:.120}. Expected JSON with pair (a digest) and keep "
            "(true, false or null). Correct or remove that line; the other lines are valid without it."
        )
    return digest, keep


def _truncate_incomplete_line(file: BinaryIO) -> None:
    """Remove a last line without a line break."""
    size = file.seek(0, os.SEEK_END)
    if not size:
        return
    file.seek(-1, os.SEEK_END)
    if file.read() != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
