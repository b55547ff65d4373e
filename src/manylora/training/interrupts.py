"""Ctrl-C, SIGTERM and SIGHUP: a training step is finished and saved first; all else ends at once.

The second Ctrl-C ends a training step as well. The process that runs the command then exits with
128 + the signal's number, as a shell expects it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal ended the run. Not an Exception: no library on the way may take it for an error."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message or f"stopped by {name_of(number)}")
        self.number = number
        self.code = 128 + number


def name_of(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class Interrupts:
    """Handles the signals while entered, in the main thread; a signal that is ignored stays so."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._in_step = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within, the first signal is only noted in `received`; on leaving, it is raised."""
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False
        if self.received is not None:
            raise Interrupted(self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._in_step or self.received is not None:
            raise Interrupted(number)
        self.received = number
        again = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
        with suppress(OSError):  # not print: this may have come in the middle of one
            os.write(2, f"\n{name_of(number)}: the step is finished and saved{again}\n".encode())
