"""Run directories with given contents, in the format of `sequel run`."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from sequel_core.runs.directory import RunDirectory
from sequel_core.runs.metrics import summarise

NAN = float("nan")
ONE = [[0.9, NAN], [0.5, 0.8]]  # average accuracy 65 %, forgetting 40 points
TWO = [[0.7, NAN], [0.6, 0.9]]  # 75 %, 10 points


def write_run(
    path: Path,
    matrix: ArrayLike | None = ONE,
    *,
    algo: str = "naive",
    mode: str = "pytorch",
    seed: int = 0,
    status: str | None = "finished",
    settings: Mapping[str, Any] | None = None,
    evaluations: Iterable[tuple[int, int, float, bool]] = (),
    summary: Mapping[str, Any] | None = None,
) -> Path:
    """Write a run directory; if the status is None, it has no summary, like a killed run.

    Args:
        path: the directory.
        matrix: accuracy matrix, fractions; None for a run without evaluations.
        algo: name of the algorithm.
        mode: the framework.
        seed: seed of the training.
        status: status in the summary.
        settings: sections that change the configuration.
        evaluations: (step, task, accuracy, within_task) of each evaluation.
        summary: values that change the summary.
    """
    directory = RunDirectory.create(path)
    config: dict[str, Any] = {
        "mode": mode,
        "algo": {"name": algo},
        "benchmark": {"name": "rotateddigits", "seed": 0, "data_dir": None},
        "optimizer": {"type": "sgd", "lr": 0.01},
        "training": {"batch_size": 10, "seed": seed},
        "evaluate_on": "test",
    }
    for key, value in (settings or {}).items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, Mapping) else value
    directory.write_config(config)
    directory.append_metrics({"kind": "train", "task": 0, "step": 1, "loss": 2.3})
    for step, task, accuracy, within in evaluations:
        directory.append_metrics(
            {
                "kind": "evaluation", "step": step, "after_task": task, "within_task": within, "task": task,
                "split": "test", "accuracy": accuracy, "loss": 0.0,
            }
        )  # fmt: skip
    if matrix is not None:
        directory.write_matrix(np.asarray(matrix))
    if status is not None:
        directory.write_summary(
            {
                "status": status,
                "mode": mode,
                "split": "test",
                **(summarise(matrix) if matrix is not None else {}),
                "steps": 200,
                "seconds": {"train": 4.0, "evaluate": 1.0, "other": 0.5, "total": 5.5},
                "memory_bytes": 3 * 2**20,
                "peak_memory_bytes": 400 * 2**20,
                "threads": 1,
                **(summary or {}),
            }
        )
    return path


def decay(tasks: int, rate: float = 0.1) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return a matrix in which each later task multiplies the accuracies by a constant factor."""
    after, task = np.indices((tasks, tasks))
    return np.where(after >= task, 0.9 * np.exp(-rate * (after - task)), NAN)
