"""Streams of tables, made from random numbers: class labels, several labels, and values as targets."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, Literal

import numpy as np

from sequel_core.stream.benchmark import Benchmark

Targets = Literal["classes", "labels", "values"]
FEATURES, OUTPUTS = 12, 4


@cache
def table(targets: Targets, train: int = 210, test: int = 40) -> Benchmark:
    """Return three tasks of 12 features, in which other features decide.

    Args:
        targets: `classes`, one of four; `labels`, four that are present or absent; `values`, four numbers.
        train: training samples per task.
        test: test samples per task.
    """
    rng = np.random.default_rng(12)
    weights = rng.normal(size=(FEATURES, OUTPUTS))

    def part(count: int, task: int) -> tuple[Any, Any]:
        x = rng.normal(size=(count, FEATURES)).astype(np.float32)
        hidden = np.roll(x, 2 * task, axis=1) @ weights / np.sqrt(FEATURES)
        hidden += 0.1 * rng.normal(size=hidden.shape)
        y = {"classes": hidden.argmax(1), "labels": hidden > 0.3, "values": hidden.astype(np.float32)}
        return x, y[targets]

    tasks = [(part(train, task), part(test, task)) for task in range(3)]
    from_arrays: Any = import_module("sequel_benchmarks").from_arrays
    stream: Benchmark = from_arrays(tasks, name=f"table of {targets}", scenario="domain")
    return stream
