"""Callbacks of Lightning over a stream of tasks: which are copied for each, and where checkpoints go."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    Callback,
    Checkpoint,
    LambdaCallback,
    ModelCheckpoint,
    ModelSummary,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)

from sequel_core.hparams import TrainingHParams
from sequel_core.runs.callbacks import StreamCallback
from sequel_core.stream.task import Task
from sequel_lightning._compat import checkpoint_directory
from sequel_lightning.lifecycle import DAMAGING

STATELESS = (Callback, Checkpoint, LambdaCallback)

UNSUPPORTED: dict[type[Callback], str] = {
    BatchSizeFinder: "changes the batch size, which is the plan's; set training.batch_size",
    OnExceptionCheckpoint: "would let the next task start from its file; use sequel_core.run(resume=True)",
    **DAMAGING,
}
"""Callbacks that cannot be used with a Trainer for each task, and what to do instead."""


def is_copied(callback: Callback) -> bool:
    """Return whether each task gets a copy of a callback: of Lightning's own and their subclasses.

    Their state belongs to one fit: the best score, the time, averaged weights. A user-defined callback is the
    same object in every task, so that it keeps what it has collected. So is a StreamCallback, whose methods
    are called for each task.
    """
    ready = (
        cls
        for cls in type(callback).__mro__
        if issubclass(cls, Callback) and cls.__module__.startswith("pytorch_lightning.")
    )
    return not isinstance(callback, StreamCallback) and any(cls not in STATELESS for cls in ready)


def check_callbacks(callbacks: Sequence[Any], training: TrainingHParams) -> None:
    """Check that callbacks can be used with a Trainer for each task.

    Raises:
        ValueError: an object is no callback, cannot be copied, or would damage what a method keeps.
    """
    given = training.epochs_per_task
    epochs = (given,) if isinstance(given, int) else tuple(given)
    for callback in callbacks:
        name = type(callback).__name__
        if not isinstance(callback, Callback):
            raise ValueError(
                "callbacks must be objects of subclasses of pytorch_lightning.Callback, got a "
                f"{type(callback).__module__}.{name}"
            )
        for callback_class, reason in UNSUPPORTED.items():
            if isinstance(callback, callback_class):
                raise ValueError(f"callbacks: {name} {reason}")
        if isinstance(callback, StochasticWeightAveraging) and 1 in epochs:
            raise ValueError(
                f"callbacks: {name} averages the weights at the start of each epoch, so that a task of one "
                f"epoch would end with the weights it started with; set epochs_per_task >= 2, got {given}"
            )
        if is_copied(callback):
            try:
                copy.deepcopy(callback)
            except Exception as error:  # whatever an open file or a connection raises
                raise ValueError(
                    f"callbacks: {name} must be copyable, as every task gets its own, but copying fails with "
                    f"{type(error).__name__}: {error}; let it open files or connections in its setup()"
                ) from error


def check_monitors(callbacks: Sequence[Callback], task: Task) -> None:
    """Raise ValueError if a callback monitors validation scores, and the task has no validation samples."""
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str) and monitor.startswith("val/") and not len(task.validation):
            raise ValueError(
                f"{type(callback).__name__} monitors {monitor}, and task {task.index} has no validation "
                "samples; make the benchmark with validation=0.1, for example"
            )


def callbacks_of_task(callbacks: Sequence[Callback], first: bool) -> list[Callback]:
    """Return the callbacks for a task's Trainer; ModelSummary is used for the first task only."""
    used = [cb for cb in callbacks if first or not isinstance(cb, ModelSummary)]
    return [copy.deepcopy(cb) if is_copied(cb) else cb for cb in used]


def separate_checkpoints(trainer: pl.Trainer, task: Task) -> None:
    """Set the directory of a task's checkpoints to `task_<index>` below the requested one."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and is_copied(callback):
            directory = checkpoint_directory(callback, trainer)
            callback.dirpath = os.path.join(directory, f"task_{task.index}")
