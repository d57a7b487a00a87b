"""The state of a run besides its learner: position in the stream, scores and seconds."""

from __future__ import annotations

import math
import reprlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np

from sequel_core.objectives import ACCURACY, Score
from sequel_core.stream.arrays import FloatArray


class Position(NamedTuple):
    """How far a run is in its stream."""

    task: int  # index of the last task of which a part is done; -1 before the first
    part: Literal["train", "evaluate"]  # its last part that is done; evaluation comes after training

    def includes(self, task: int, part: Literal["train", "evaluate"]) -> bool:
        """Whether this part of a task is done."""
        return task < self.task or (task == self.task and part in ("train", self.part))


class Stopwatch:
    """Measures the seconds that a run spends, in total and in each part; a resumed run adds to them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._start = time.perf_counter()

    def total(self) -> float:
        """Return the seconds spent on the run; the time between an interruption and a resume is excluded."""
        return time.perf_counter() - self._start

    def add(self, seconds: Mapping[str, float], total: float) -> None:
        """Add the seconds of an earlier part of the run."""
        self.seconds.update(seconds)
        self._start -= total

    @contextmanager
    def measure(self, part: Literal["train", "evaluate", "checkpoint"]) -> Iterator[None]:
        """Add the seconds spent inside to a part; training excludes its evaluations and checkpoints."""
        start, inner = time.perf_counter(), self._not_training()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[part] += spent - (self._not_training() - inner if part == "train" else 0)

    def _not_training(self) -> float:
        return self.seconds["evaluate"] + self.seconds["checkpoint"]


class RunState:
    """What a checkpoint stores of a run besides the learner.

    Args:
        num_tasks: T, number of tasks in the stream.
    """

    def __init__(self, num_tasks: int) -> None:
        self.position = Position(-1, "evaluate")
        self.matrix: FloatArray = np.full((num_tasks, num_tasks), np.nan)  # scores [T, T]
        self.baseline: FloatArray | None = None  # scores [T] of the untrained network
        self.extra: dict[str, Any] = {}  # further entries of the summary
        self.stopwatch = Stopwatch()

    def to_dict(self) -> dict[str, Any]:
        """Return the state as plain values and arrays that later changes do not affect."""
        return {
            "done": list(self.position),
            "matrix": self.matrix.copy(),
            "baseline": self.baseline,
            "extra": dict(self.extra),
            "seconds": dict(self.stopwatch.seconds),
            "total_seconds": self.stopwatch.total(),
        }

    def load(self, values: Mapping[str, Any]) -> None:
        """Set the state from values that `check_state` has accepted."""
        task, part = values["done"]
        self.position = Position(task, part)
        self.matrix = np.array(values["matrix"], np.float64)  # None becomes nan
        self.baseline = None if values["baseline"] is None else np.array(values["baseline"], np.float64)
        self.extra = dict(values["extra"])
        self.stopwatch.add(values["seconds"], values["total_seconds"])


def check_state(values: Mapping[str, Any], num_tasks: int, score: Score = ACCURACY) -> None:
    """Check values that were read from a checkpoint.

    Args:
        values: of `RunState.to_dict`, with the size of `metrics.jsonl` and the versions.
        num_tasks: T, number of tasks in the stream.
        score: what the run measures.

    Raises:
        ValueError: a value is missing, or has another type, shape or range; the error names it.
    """
    numbers = "fractions" if score.fraction else "numbers"

    def are_scores(value: Any, *shape: int) -> bool:
        """Whether nested lists have this shape and hold scores or None."""
        if not shape:
            return value is None or (_is_number(value) and (not score.fraction or 0 <= value <= 1))
        length, *rest = shape
        return isinstance(value, list) and len(value) == length and all(are_scores(v, *rest) for v in value)

    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "done": (
            lambda v: _is_position(v, num_tasks),
            f"a task from -1 to {num_tasks - 1} and train or evaluate",
        ),
        "matrix": (lambda v: are_scores(v, num_tasks, num_tasks), f"{num_tasks} x {num_tasks} {numbers}"),
        "baseline": (lambda v: v is None or are_scores(v, num_tasks), f"{num_tasks} {numbers} or null"),
        "extra": (_are_numbers, "numbers by name"),
        "seconds": (lambda v: _are_numbers(v) and None not in v.values(), "numbers by name"),
        "total_seconds": (_is_number, "a number"),
        "metrics_bytes": (lambda v: type(v) is int and v >= 0, "a whole number >= 0"),
        "versions": (lambda v: isinstance(v, dict), "versions by name"),
    }
    for name, (holds, rule) in rules.items():
        if name not in values or not holds(values[name]):
            got = reprlib.repr(values[name]) if name in values else "none"
            raise ValueError(f"{name} must be {rule}, got {got}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _are_numbers(values: Any) -> bool:
    return isinstance(values, dict) and all(v is None or _is_number(v) for v in values.values())


def _is_position(value: Any, num_tasks: int) -> bool:
    task, part = value if isinstance(value, list) and len(value) == 2 else (None, None)
    return type(task) is int and -1 <= task < num_tasks and part in ("train", "evaluate")
