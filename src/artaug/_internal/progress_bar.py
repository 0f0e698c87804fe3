"""The one progress bar of the package: a bar in terminals and notebooks, and elsewhere, as in a log, a line now and then."""

import sys
import time
from typing import Self

from tqdm.auto import tqdm

from artaug._internal.text import duration

_LINE_EVERY_S, _MINUTE_S = 30.0, 60
_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit}{postfix}"
_IN_NOTEBOOK = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
"""Where widgets are missing, tqdm takes a notebook for a file, and so does this."""


class ProgressBar:
    """How far something is, how fast it goes, and how long it will take.

    Its speed is that of what it saw: what was done before it was made is in neither the speed nor the time left.
    """

    def __init__(
        self,
        name: str,
        *,
        total: int,
        unit: str,
        done: int = 0,
        show: bool = True,
        in_logs: bool = True,
        shows_time_left: bool = True,
    ) -> None:
        """Show it.

        Args:
            name: what goes on.
            total: how many there will be.
            unit: of what, in the singular.
            done: how many there are already.
            show: False for a bar that shows nothing.
            in_logs: whether it writes lines where bars cannot be drawn.
            shows_time_left: False for a bar whose work is interrupted by other work.
        """
        self.is_live = is_live = _IN_NOTEBOOK or sys.stderr.isatty()
        self.name, self.unit, self.total, self.done, self.note = name, unit, total, done, ""
        self._shows_time_left = shows_time_left
        self._count, self._seconds = 0, 0.0
        self._last_advance = time.perf_counter()
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=name,
            unit=f"{unit}s",
            bar_format=_FORMAT,
            miniters=0,
            dynamic_ncols=True,
            disable=not (show and is_live),
        )
        self._writes_lines = show and not is_live and in_logs
        self._last_line: float | None = None
        self._last_line_done = done
        if done < total:
            self._write_line()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def advance(self, count: int = 1, *, seconds: float | None = None) -> None:
        """Count what was done, in so many seconds; by default in those since the last call."""
        now = time.perf_counter()
        self._count += count
        self._seconds += now - self._last_advance if seconds is None else seconds
        self._last_advance = now
        self.move_to(self.done + count)

    def move_to(self, done: int) -> None:
        """Show that so many are done, at a speed of which nothing is known."""
        step, self.done = done - self.done, done
        self._bar.set_postfix_str(self._remarks(), refresh=False)
        if self._bar.total == self.total:
            self._bar.update(step)
        else:
            self._bar.reset(total=self.total)  # the one way to give a notebook's widget another end
            self._bar.n = done
            self._bar.refresh()
        if self._last_line is None or time.perf_counter() - self._last_line >= _LINE_EVERY_S:
            self._write_line()

    def reset_timer(self) -> None:
        """Exclude the time since the last call from the speed."""
        self._last_advance = time.perf_counter()

    def refresh(self) -> None:
        """Draw it now: nothing will move it for a while."""
        self._bar.refresh()

    def close(self) -> None:
        """Leave it as it is; again is allowed."""
        self._bar.close()
        if self._last_line is None or self._last_line_done != self.done:
            self._write_line()
        self._writes_lines = False

    def _remarks(self) -> str:
        parts = []
        if self._count and self._seconds:
            parts.append(speed(self._count, self._seconds, self.unit))
            if self._shows_time_left and self.done < self.total:
                parts.append(f"{time_left((self.total - self.done) * self._seconds / self._count)} left")
        return ", ".join([*parts, *([self.note] if self.note else [])])

    def _write_line(self) -> None:
        if not self._writes_lines:
            return
        share = f" ({self.done / self.total:.0%})" if self.total else ""
        parts = [f"{self.name.strip()}: {self.done}/{self.total} {self.unit}s{share}"]
        sys.stderr.write(", ".join([*parts, *filter(None, [self._remarks()])]) + "\n")
        sys.stderr.flush()
        self._last_line, self._last_line_done = time.perf_counter(), self.done


def speed(count: int, seconds: float, unit: str) -> str:
    """Say how fast something goes, by the second or, where it is slow, each.

    >>> from artaug._internal.progress_bar import speed
    >>> speed(31, 10, "picture"), speed(2, 34, "picture"), speed(12345, 1, "answer")
    ('3.1 pictures/s', '17 s/picture', '12,345 answers/s')
    """
    if count >= seconds:
        return f"{_three_digits(count / seconds)} {unit}s/s"
    return f"{_three_digits(seconds / count)} s/{unit}"


def time_left(seconds: float) -> str:
    """Say an estimated time, without the tenths that `duration` has.

    >>> from artaug._internal.progress_bar import time_left
    >>> time_left(43.6), time_left(65)
    ('44 s', '1 min 05 s')
    """
    return duration(seconds) if round(seconds) >= _MINUTE_S else f"{seconds:.0f} s"


def _three_digits(number: float) -> str:
    return f"{number:.3g}" if number < 999.5 else f"{number:,.0f}"  # .3g says 1e+03 from there on
