"""A callback of Lightning that kills its process, as a machine does that fails."""

import os
import signal
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback


class KillProcess(Callback):
    """Kills one of the processes of a run after a step of its second task.

    Args:
        rank: of the process.
        step: of the task, from 0.
        mark: a file that is made just before.
    """

    def __init__(self, rank: int, step: int, mark: str) -> None:
        self._rank, self._step, self._mark = rank, step, Path(mark)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Kill the process if it is the one, at the step."""
        if (trainer.global_rank, int(pl_module.task_index), batch_idx) == (self._rank, 1, self._step):
            self._mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
