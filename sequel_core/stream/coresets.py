"""Coresets: samples that are set aside before a task starts, `Task.coreset`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sequel_core.stream import plan
from sequel_core.stream.task import Task


def with_coreset(task: Task, per_class: int, seed: int, setting: str = "core_size") -> Task:
    """Return a task whose coreset, equally many samples of each class, is removed from its training samples.

    Args:
        task: the task. The remaining training samples keep their order.
        per_class: number of samples per class in the coreset, which is sorted by class.
        seed: training seed.
        setting: name of the setting that decides the number, for the error.

    Raises:
        ValueError: a class has no samples left for training.
    """
    targets = task.train.targets
    chosen = []
    for label in task.classes:
        rows = np.flatnonzero(targets == label)
        if len(rows) <= per_class:
            raise ValueError(
                f"{setting} must leave samples of every class to train on, got {per_class} per class with "
                f"{len(rows)} of class {label} in task {task.index}; lower {setting} or raise subset"
            )
        order = plan.permutation(seed, "coreset", task.index, label, count=len(rows))
        chosen.append(rows[order[:per_class]])
    core = np.concatenate(chosen)
    rest = np.setdiff1d(np.arange(len(targets)), core)
    return replace(task, train=task.train.pick(rest), coreset=task.train.pick(core))
