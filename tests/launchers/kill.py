"""Callbacks for tests/launchers/test_launchers.py: a signal ends one run of a sweep, once."""

import os
import signal
from pathlib import Path

from sequel_core import StreamCallback
from sequel_core.runs.learner import Learner
from sequel_core.stream.task import Task


class SignalOnce(StreamCallback):
    """Sends a signal to its own process when the second task of run 3 starts for the first time.

    Args:
        directory: of the run; its name is the number of the run.
        name: of the signal.
    """

    def __init__(self, directory: str, name: str) -> None:
        self.run, self.signal = Path(directory), signal.Signals[name]

    def on_task_start(self, learner: Learner, task: Task) -> None:
        sent = self.run.parent / "sent"
        if self.run.name == "3" and task.index == 1 and not sent.exists():
            sent.touch()
            os.kill(os.getpid(), self.signal)
