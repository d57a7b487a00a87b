"""Signals that end a run: the run stops at its next step and writes a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, ClassVar

NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU")
"""Ctrl-C, `kill`, and the signals that SLURM sends before a job's time is over (its option `--signal`)."""


class InterruptedRunError(Exception):
    """A signal ended the run; its last checkpoint has what was reached.

    Args:
        number: of the signal.
        remedy: how to go on, if that is known.
    """

    def __init__(self, number: int, remedy: str = "") -> None:
        name = signal.Signals(number).name
        super().__init__(f"ended by {name}; {remedy}" if remedy else f"ended by {name}")
        self.number = number

    @property
    def exit_code(self) -> int:
        """The exit code that a shell reports for this signal: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number


class Signals:
    """Records the last signal received; a second Ctrl-C raises KeyboardInterrupt at once.

    Args:
        ignored: whether signals are ignored, in a process that ends when the main process of its run does.
    """

    _active: ClassVar[Signals | None] = None  # of the main thread

    def __init__(self, ignored: bool = False) -> None:
        self.received: int | None = None
        self._ignored = ignored

    def check(self) -> None:
        """Raise InterruptedRunError if a signal was received."""
        if self.received is not None:
            raise InterruptedRunError(self.received)

    @contextmanager
    def recorded(self) -> Iterator[Signals]:
        """Record signals while active.

        Only the main thread has handlers. In another thread, this yields what the main thread records, if it
        does.
        """
        if threading.current_thread() is not threading.main_thread():
            yield Signals._active or self
            return
        previous: dict[int, Any] = {}
        outer, Signals._active = Signals._active, self
        for name in NAMES:
            number = getattr(signal, name, None)  # Windows lacks some
            if number is not None:
                previous[number] = signal.signal(number, self._record)
        try:
            yield self
        finally:
            Signals._active = outer
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self._ignored:
            return
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
