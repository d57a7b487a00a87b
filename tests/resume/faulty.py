"""A stream that reads each image from a file on access, and a callback that causes a fault."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sequel_benchmarks import from_datasets
from sequel_core.runs.callbacks import StreamCallback
from sequel_core.runs.learner import Learner
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.task import Task

SAMPLES, CLASSES = 30, 5


class Files:
    """A data set of one `.npy` file per image."""

    def __init__(self, folder: Path) -> None:
        self.targets = [k % CLASSES for k in range(SAMPLES)]
        self._folder = folder

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, k: int) -> tuple[np.ndarray, int]:
        if not 0 <= k < SAMPLES:
            raise IndexError(k)
        return np.load(self._folder / f"{k}.npy"), self.targets[k]


def write_files(folder: Path) -> None:
    """Write the images of three tasks."""
    rng = np.random.default_rng(0)
    for task in range(3):
        task_folder = folder / str(task)
        task_folder.mkdir(parents=True)
        for k in range(SAMPLES):
            np.save(task_folder / f"{k}.npy", rng.integers(0, 256, (6, 6, 1), np.uint8))


def of_files(folder: str) -> Benchmark:
    """Return the stream of what `write_files` wrote."""
    sets: Any = [Files(Path(folder) / str(task)) for task in range(3)]
    return from_datasets([(data, data) for data in sets], num_classes=CLASSES, scenario="domain")


class After(StreamCallback):
    """Calls a function once, after the first task."""

    harm: Callable[[], None] | None = None  # of the class: a configuration makes the callback

    def on_task_end(self, learner: Learner, task: Task, matrix: FloatArray) -> None:
        """Do the harm."""
        harm, After.harm = After.harm, None
        if harm is not None:
            harm()
