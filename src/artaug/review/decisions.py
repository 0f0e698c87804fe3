"""What a person decided about pairs, on disk: a line a decision, never rewritten, so a kill at any time loses none."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from artaug.errors import StorageError
from artaug.pairs import ImagePair, pair_digest


def read_decisions(path: Path) -> dict[str, bool]:
    """The last word on each pair, by its digest, the latest decision last.

    A last line without an end was being written when its writer was killed; nobody was told that it was safe, and it is
    left out.

    Raises:
        StorageError: for a line that is no decision, naming it.
    """
    if not path.exists():
        return {}
    decided: dict[str, bool] = {}
    *lines, _torn = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        digest, keep = _decision(line, number, path)
        decided.pop(digest, None)
        if keep is not None:
            decided[digest] = keep
    return decided


def append_decision(path: Path, pair: ImagePair, keep: bool | None) -> None:
    """Write one decision, or take one back (None), and have it on the disk before returning.

    Raises:
        OSError: if the disk does not take it; then the file is as it was, but perhaps for a torn last line.
    """
    line = {
        "pair": pair_digest(pair),
        "keep": keep,
        "prompt": pair.prompt,
        "seed": pair.seed,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        _drop_torn_end(file)
        file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _decision(line: bytes, number: int, path: Path) -> tuple[str, bool | None]:
    try:
        read = json.loads(line)
        digest, keep = read["pair"], read["keep"]
    except (ValueError, TypeError, KeyError):
        digest = keep = None
    if not isinstance(digest, str) or not (keep is None or isinstance(keep, bool)):
        raise StorageError(
            f"{str(path)!r}, line {number} is no decision: {line!r:.120}. Expected JSON with pair (a digest) and keep (true, "
            "false or null). Mend or remove that line; the others stay good."
        )
    return digest, keep


def _drop_torn_end(file: BinaryIO) -> None:
    """Drop a last line that its writer did not finish."""
    size = file.seek(0, os.SEEK_END)
    if not size:
        return
    file.seek(-1, os.SEEK_END)
    if file.read() != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
