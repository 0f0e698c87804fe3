"""What a reader of a published file does with a row that it cannot read: leave its prompt out, and name it."""

import warnings
from collections.abc import Sequence
from pathlib import Path

from artaug.errors import PromptError

_NAMED = 5


def check_skipped(path: Path, skipped: Sequence[str], *, read: int, stacklevel: int) -> None:
    """Warn of the rows that were left out, or refuse a file of which no more than half could be read.

    Args:
        path: the file.
        skipped: why a row, or a prompt with all its rows, was left out, one text each.
        read: how many were read.
        stacklevel: of the warning, so that it names the line that called the reader.

    Raises:
        PromptError: if as many were left out as were read: then it is a file of another format.
    """
    if not skipped:
        return
    others = f", and {len(skipped) - _NAMED} more" if len(skipped) > _NAMED else ""
    reasons = "; ".join(reason.rstrip(".") for reason in skipped[:_NAMED]) + others
    if len(skipped) >= read:
        raise PromptError(f"{path.name!r}, {reasons}.")
    warnings.warn(
        f"{path.name!r}: {len(skipped)} of {len(skipped) + read} prompts are left out, which cannot be read: {reasons}. "
        "Correct them, or the scores are those of the others.",
        stacklevel=stacklevel + 1,
    )
