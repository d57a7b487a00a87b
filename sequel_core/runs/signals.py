"""Signals that end a run: they are noted, and the run ends at its next step, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU")
"""Ctrl-C, `kill` and, as SLURM is told to by `--signal`, what comes before the end of a job's time."""


class InterruptedRunError(Exception):
    """A signal asked the run to end; what was reached is in its last checkpoint."""

    def __init__(self, number: int) -> None:
        """Say which signal."""
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number

    @property
    def exit_code(self) -> int:
        """As a shell has it for a process that a signal ends: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number


class Signals:
    """Which signal has come; the second Ctrl-C raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def check(self) -> None:
        """Raise InterruptedRunError where a signal has come."""
        if self.received is not None:
            raise InterruptedRunError(self.received)

    @contextmanager
    def noted(self) -> Iterator[Signals]:
        """Note signals instead of dying of them; only in the main thread, where Python handles signals."""
        before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for name in NAMES:
                number = getattr(signal, name, None)  # some are not Windows's
                if number is not None:
                    before[number] = signal.signal(number, self._note)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
