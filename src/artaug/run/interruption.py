"""Stopping a run in order: the first Ctrl-C or SIGTERM waits for a safe point, the second stops at once."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn, Self, final

from artaug._internal.processes import dropped_in_children, keep_in_children

_LOG = logging.getLogger(__name__)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STDERR = 2

Handler = Callable[[int, FrameType | None], Any] | int
"""What `signal.getsignal` gives of a handler that can be put back: a function, ``SIG_DFL`` or ``SIG_IGN``."""


@final
class GracefulStop:
    """While this block runs, a SIGINT or SIGTERM only asks for a stop, which `raise_if_requested` makes at a safe point.

    The first signal writes one line to standard error and sets a flag; nothing is interrupted. The second one, of either
    kind, stops at once. Handlers that were there before are called too, at each signal; what such a handler raises at the
    first one is raised at the safe point. ``signal.default_int_handler`` is not called: it is what waits. Signals that are
    ignored (``nohup``), and those that a C library handles, are left alone. At the end of the block all are as they were.

    Where SIGTERM would have ended the process (``SIG_DFL``), it does so at the end of the block, so that whoever sent it
    sees that it was obeyed. So this is the outermost block: whatever is to be put away is put away inside.

    Python handles signals in the main thread; in another thread this does nothing. A forked child has the handlers of
    before, or its parent could not stop it with SIGTERM.

    >>> from artaug.run.interruption import GracefulStop
    >>> with GracefulStop() as stop:
    ...     for chunk in range(3):
    ...         stop.raise_if_requested("The chunks before are kept; make the same call again to go on.")
    >>> stop.requested is None
    True
    """

    def __init__(self) -> None:
        self._requested: signal.Signals | None = None
        self._previous: dict[signal.Signals, Handler] = {}
        self._raised: BaseException | None = None  # by a handler that was there before
        self._nested = False
        self._ended = False

    @property
    def requested(self) -> signal.Signals | None:
        """The signal that asks for a stop, if one has come."""
        return self._requested

    def raise_if_requested(self, kept: str) -> None:
        """Stop here, if a signal has asked for it: the exception runs through the ``with`` blocks around.

        Args:
            kept: what is kept, and how to go on, as sentences; they are the end of the exception's text.

        Raises:
            KeyboardInterrupt: if a signal has come; where a handler that was there before raised something else
                (``SystemExit``), that.
        """
        if self._requested is None:
            return
        stop = self._raised or KeyboardInterrupt(f"stopped by {self._requested.name}. {kept}")
        if stop is self._raised:
            stop.add_note(f"Stopped by {self._requested.name}. {kept}")
        raise stop

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        with dropped_in_children(self):
            for number in _SIGNALS:  # SIGINT first: from then on nothing interrupts this
                previous = signal.getsignal(number)
                if previous is None or previous == signal.SIG_IGN:
                    continue
                self._nested |= isinstance(getattr(previous, "__self__", None), GracefulStop)
                self._previous[number] = previous
                signal.signal(number, self._handle)
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        keep_in_children(self)
        self._end()
        number = self._requested
        if number is None:
            return
        if self._previous[number] == signal.SIG_DFL:
            if error is None or isinstance(error, KeyboardInterrupt):
                _write(f"artaug: {error or 'the run is complete.'}")
            else:
                _LOG.error("The run failed when it was to stop.", exc_info=error)
            _end_by(number)
        elif error is None and not self._nested:
            self.raise_if_requested("The run is complete.")

    def drop_in_child(self) -> None:
        """Put the handlers of before back in a forked child."""
        self._requested = None
        self._end()

    def _end(self) -> None:
        """Put back what was there before, but for a signal that somebody else has handled since, inside the block."""
        for number, previous in reversed(self._previous.items()):  # SIGINT last: from then on it may interrupt this
            if signal.getsignal(number) == self._handle:
                signal.signal(number, previous)
        self._ended = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # It runs between two instructions of any function, also of print and logging, so it uses neither.
        name, previous = signal.Signals(number), self._previous[signal.Signals(number)]
        if self._ended:  # called by a handler that somebody has put on top inside the block
            if not callable(previous):
                _end_by(name)
            previous(number, frame)
            return
        again = self._requested is not None
        if not again:
            self._requested = name
            if not self._nested:  # the outer one says it
                _write(
                    f"\nartaug: {name.name}: stopping in order; what is under way is finished or dropped whole. "
                    "A second signal stops at once."
                )
        elif previous == signal.SIG_DFL:
            _end_by(name)
        if callable(previous) and previous is not signal.default_int_handler:
            try:
                previous(number, frame)
            except BaseException as error:
                if again:
                    raise
                self._raised = error
        if again:
            raise KeyboardInterrupt(f"stopped at once by a second signal, {name.name}")


def _end_by(number: signal.Signals) -> NoReturn:
    """End this process as the signal ends one that has no handler.

    Raises:
        SystemExit: in a container's first process, which no signal ends by default.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, RuntimeError, AttributeError):  # closed, being written, or none
            stream.flush()
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
    raise SystemExit(128 + number)


def _write(line: str) -> None:
    if sys.__stderr__ is None:  # the number of a closed one may be another file's now
        return
    with suppress(OSError):
        os.write(_STDERR, f"{line}\n".encode(errors="replace"))
