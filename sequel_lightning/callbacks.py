"""Callbacks of Lightning over a stream of tasks: which start anew with each, and where checkpoints go."""

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
from sequel_lightning.lifecycle import SPOILING

STATELESS = (Callback, Checkpoint, LambdaCallback)

REFUSED: dict[type[Callback], str] = {
    BatchSizeFinder: "changes the batch size, which is the plan's; set training.batch_size",
    OnExceptionCheckpoint: "would let the next task start from its file; use sequel_core.run(resume=True)",
    **SPOILING,
}
"""Callbacks that spoil what a method keeps, and what to do instead."""


def starts_anew(callback: Callback) -> bool:
    """Whether every task gets a copy of its own: of Lightning's ready callbacks and subclasses of these.

    They keep what belongs to one fit: the best score, the time, averaged weights. A user's own callback is
    the same object in every task, as it would be with several Trainers, so that what it gathers is there
    afterwards; so is one that is a StreamCallback, which is told of the tasks.
    """
    ready = (
        cls
        for cls in type(callback).__mro__
        if issubclass(cls, Callback) and cls.__module__.startswith("pytorch_lightning.")
    )
    return not isinstance(callback, StreamCallback) and any(cls not in STATELESS for cls in ready)


def check_callbacks(callbacks: Sequence[Any], training: TrainingHParams) -> None:
    """Refuse what cannot be used with a Trainer for each task.

    Raises:
        ValueError: no callback, one that cannot be copied, or one that would spoil what a method keeps.
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
        for callback_class, reason in REFUSED.items():
            if isinstance(callback, callback_class):
                raise ValueError(f"callbacks: {name} {reason}")
        if isinstance(callback, StochasticWeightAveraging) and 1 in epochs:
            raise ValueError(
                f"callbacks: {name} averages the weights at the start of each epoch, so that a task of one "
                f"epoch would end with the weights it started with; set epochs_per_task >= 2, got {given}"
            )
        if starts_anew(callback):
            try:
                copy.deepcopy(callback)
            except Exception as error:  # whatever an open file or a connection raises
                raise ValueError(
                    f"callbacks: {name} must be copyable, as every task gets its own, but copying fails with "
                    f"{type(error).__name__}: {error}; let it open files or connections in its setup()"
                ) from error


def check_monitors(callbacks: Sequence[Callback], task: Task) -> None:
    """Raise ValueError where a callback looks at validation scores, and the task has no such samples."""
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str) and monitor.startswith("val/") and not len(task.validation):
            raise ValueError(
                f"{type(callback).__name__} monitors {monitor}, and task {task.index} has no validation "
                "samples; make the benchmark with validation=0.1, for example"
            )


def callbacks_of_task(callbacks: Sequence[Callback], first: bool) -> list[Callback]:
    """Return the callbacks for a task's Trainer; a model's summary is for the first task only."""
    used = [cb for cb in callbacks if first or not isinstance(cb, ModelSummary)]
    return [copy.deepcopy(cb) if starts_anew(cb) else cb for cb in used]


def separate_checkpoints(trainer: pl.Trainer, task: Task) -> None:
    """Let the checkpoints of a task go into a directory of its own below the one asked for."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and starts_anew(callback):
            directory = checkpoint_directory(callback, trainer)
            callback.dirpath = os.path.join(directory, f"task_{task.index}")
