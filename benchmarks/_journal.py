"""The journal of a long benchmark: a file with one measured row per line, to which several processes may append."""

import json
import os
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from benchmarks import _record as record

Cell = TypeVar("Cell", bound=Hashable)
"""What a row is the measurement of."""


@dataclass(frozen=True)
class Journal(Generic[Cell]):
    """A file with one measured row per line, to which several processes may append."""

    path: Path
    about: Mapping[str, str]
    """The settings of the rows: the first line."""
    cell_of: Callable[[record.Row], Cell | None]
    """The cell that a row measures; None if that has changed since, so that it is measured again."""
    is_complete: Callable[[Cell, record.Row], bool] = lambda *_: True
    """Whether a row has all that is to be measured of its cell."""

    def begin(self) -> None:
        """Start it, or check that its settings are the same.

        Raises:
            SystemExit: if they are not.
        """
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append(self.about)
        elif self._lines()[0] != self.about:
            raise SystemExit(f"{self.path} has other settings. Move it away, or write to another folder (--out).")

    def rows(self) -> list[record.Row]:
        """All rows so far, of all processes, without those of cells that are gone or have changed since."""
        return list(self._by_cell().values())

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """The cells that have no row yet, or none that is complete."""
        rows = self._by_cell()
        return [cell for cell in dict.fromkeys(cells) if cell not in rows or not self.is_complete(cell, rows[cell])]

    def measure(self, cells: Iterable[Cell], to_row: Callable[[Cell, record.Row | None], record.Row]) -> None:
        """Measure the cells that are missing, also of another process by the time of their turn.

        Args:
            cells: in the order to measure them.
            to_row: measures a cell; it gets the row that there is, if that is not complete.
        """
        for cell in self.missing(cells):
            if self.missing([cell]):
                self._append(to_row(cell, self._by_cell().get(cell)))

    def _by_cell(self) -> dict[Cell, record.Row]:
        """The last row of every cell, at the place of its first."""
        found = {self.cell_of(row): row for row in self._lines()[1:]}
        return {cell: row for cell, row in found.items() if cell is not None}

    def _append(self, line: Mapping[str, Any]) -> None:
        # One write of a whole line, so that lines of several processes do not mix.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, (json.dumps(line) + "\n").encode())
        finally:
            os.close(descriptor)

    def _lines(self) -> list[Mapping[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]
