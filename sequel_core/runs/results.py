"""Results of a run, read from its directory."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequel_core.objectives import ACCURACY, Score
from sequel_core.runs.directory import CONFIG, METRICS, SUMMARY, WEIGHTS, read_file, read_matrix
from sequel_core.runs.files import read_json
from sequel_core.runs.metrics import summarise
from sequel_core.runs.versions import version_written_by
from sequel_core.stream.arrays import FloatArray

SCORE = "score"
"""The key in `summary.json`, and in `config.yaml` unless it is the accuracy, that says what is measured."""

TASK_GIVEN = "task given"
"""How tables mark a run whose predictions were given the task of each sample; see `Result.task_given`."""


def with_score(settings: Mapping[str, Any], score: Score) -> dict[str, Any]:
    """Return the settings of a run as `config.yaml` has them: with its score, unless that is the accuracy."""
    return {**settings, **({} if score == ACCURACY else {SCORE: score._asdict()})}


@dataclass(frozen=True, eq=False)
class Result:
    """The recorded result of a run; `sequel_core.run` and `load_result` return it.

    The metrics are defined in `sequel_core.runs.metrics`. A metric is nan if it is undefined or if it needs a
    score that was not measured. Those named after the accuracy are nan for runs with another score.

    Args:
        run_dir: directory of the run; None if there is none.
        config: settings of the run, plain values by section.
        matrix: scores `[T, T]`; `matrix[i, j]` is the score on task j after training on task i, nan if
            not evaluated.
        summary: contents of `summary.json`: status, metrics, steps, seconds, memory, versions.

    Example:
        >>> import numpy as np
        >>> from sequel_core import Result
        >>> matrix = np.array([[0.9, np.nan], [0.7, 0.8]])
        >>> result = Result(None, {}, matrix, {"average_accuracy": 0.75, "forgetting": 0.2})
        >>> result.average_accuracy
        0.75
        >>> result.fwt
        nan
    """

    run_dir: Path | None
    config: dict[str, Any]
    matrix: FloatArray
    summary: dict[str, Any]

    @property
    def version(self) -> str | None:
        """The version of this package that wrote the run; None for an unfinished run of version 0.1.0."""
        return version_written_by(self.config, self.summary)

    @property
    def score(self) -> Score:
        """What the run measures on each task."""
        return recorded_score(self.config, self.summary)

    def metric(self, name: str) -> float:
        """Return a metric of any score.

        Args:
            name: as in `sequel_core.runs.metrics`, such as `"average_score"`.
        """
        return self.number(self.score.of(name))

    def number(self, *path: str) -> float:
        """Return a number of the summary by its path, such as `"seconds", "train"`; nan if it has none."""
        value: Any = self.summary
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan

    @property
    def average_accuracy(self) -> float:
        """Accuracy after the last task, mean over tasks."""
        return self.number("average_accuracy")

    @property
    def forgetting(self) -> float:
        """Best score before the last task minus the final score, mean over past tasks."""
        return self.number("forgetting")

    @property
    def forgetting_with_final(self) -> float:
        """Best score, including the final one, minus the final score, mean over past tasks."""
        return self.number("forgetting_with_final")

    @property
    def bwt(self) -> float:
        """Backward transfer."""
        return self.number("bwt")

    @property
    def fwt(self) -> float:
        """Forward transfer; nan unless the run had `evaluate_future=True`."""
        return self.number("fwt")

    @property
    def learning_accuracy(self) -> float:
        """Accuracy on each task directly after training on it, mean over tasks."""
        return self.number("learning_accuracy")

    @property
    def average_incremental_accuracy(self) -> float:
        """Accuracy on the tasks seen so far, mean over these tasks, then over the stream."""
        return self.number("average_incremental_accuracy")

    @property
    def average_incremental_accuracy_over_samples(self) -> float:
        """Accuracy on all samples of the tasks seen so far, mean over the stream."""
        return self.number("average_incremental_accuracy_over_samples")

    @property
    def worst_case_accuracy(self) -> float:
        """Lowest accuracy of each past task and the final accuracy of the last one, mean over tasks."""
        return self.number("worst_case_accuracy")

    @property
    def task_given(self) -> bool:
        """Whether predictions used the task of each sample although the scenario does not provide it."""
        return self.summary.get("task_given") is True and self.summary.get("scenario") != "task"


def recorded_score(config: Mapping[str, Any], summary: Mapping[str, Any]) -> Score:
    """Return what a run measures, from its summary, or from its configuration before it has ended.

    It is the accuracy if neither says so, as in runs of versions before 0.3.
    """
    match summary.get(SCORE, config.get(SCORE)):
        case {"name": str(name), "higher_is_better": bool(higher_is_better), "fraction": bool(fraction)}:
            return Score(name, higher_is_better, fraction)
    return ACCURACY


def common_score(scores: Iterable[Score]) -> Score:
    """Return the score of runs that are shown in one table; accuracy if there are none.

    Raises:
        ValueError: the scores differ; the error names them.
    """
    different = list(dict.fromkeys(scores)) or [ACCURACY]
    if len(different) > 1:
        better = {True: "higher", False: "lower"}
        names = " and ".join(f"{s.name} ({better[s.higher_is_better]} is better)" for s in different)
        raise ValueError(f"runs must have one score to be compared, got {names}; compare them separately")
    return different[0]


def load_result(directory: str | Path) -> Result:
    """Read the result of a run from its directory.

    A run that has not ended has no `summary.json`. Its summary is then `{"status": "unfinished"}` and the
    metrics of the matrix. Before the first evaluation the matrix has shape `[0, 0]`.

    Args:
        directory: of the run.

    Returns:
        The configuration, the matrix `[T, T]` and the summary.

    Raises:
        ValueError: the directory holds no run, or a file is damaged; the error names it.

    Example:
        >>> import numpy as np
        >>> from sequel_core import load_result
        >>> from sequel_core.runs.directory import RunDirectory
        >>> directory = RunDirectory.create("runs/result")  # `sequel_core.run` writes these files
        >>> directory.write_config({"mode": "jax"})
        >>> directory.write_matrix(np.array([[0.9, np.nan], [0.7, 0.8]]))
        >>> result = load_result(directory.path)
        >>> result.summary["status"], result.average_accuracy
        ('unfinished', 0.75)
    """
    path = Path(directory)
    if not (path / CONFIG).is_file():
        raise ValueError(f"directory must be a run directory, got {path}, which has no {CONFIG}")
    config = read_file(path / CONFIG)
    summary = read_file(path / SUMMARY) if (path / SUMMARY).is_file() else {}
    score = recorded_score(config, summary)
    matrix = read_matrix(path, score)
    if not summary:
        summary = {"status": "unfinished", **(summarise(matrix, score=score) if matrix.size else {})}
    return Result(path, config, matrix, summary)


def read_metrics(directory: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the records of `metrics.jsonl` in order; nothing if there is no such file.

    If the last line is incomplete, as a killed run leaves it, it is skipped.

    Raises:
        ValueError: a line is damaged; the error gives its number.
    """
    path = Path(directory) / METRICS
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = read_json(line)
            except ValueError as error:
                raise ValueError(f"{path} is damaged in line {number}: {error}") from error
            yield record


def load_weights(directory: str | Path) -> dict[str, NDArray[Any]]:
    """Read the final weights of a run from its directory.

    Args:
        directory: of a run that has finished.

    Returns:
        The weights by name, in the layout that both frameworks share: `layer/kernel` `[in, out]` and
        `layer/bias` `[out]`.

    Raises:
        ValueError: there are no weights, or the file is damaged.

    Example:
        >>> import numpy as np
        >>> from sequel_core import load_weights
        >>> from sequel_core.runs.directory import RunDirectory
        >>> directory = RunDirectory.create("runs/weights")  # `sequel_core.run` writes this file
        >>> directory.write_weights({"head/bias": np.zeros(10)})
        >>> load_weights(directory.path)["head/bias"].shape
        (10,)
    """
    path = Path(directory) / WEIGHTS
    if not path.is_file():
        raise ValueError(f"directory must hold {WEIGHTS}, got {path.parent}; the run has not ended")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
