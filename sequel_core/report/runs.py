"""The runs of a report, grouped by configuration, with means and intervals over seeds."""

from __future__ import annotations

import csv
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sequel_core.experiment.aliases import SECTIONS, flatten
from sequel_core.experiment.schema import DOCUMENTATION
from sequel_core.experiment.target import TARGET
from sequel_core.objectives import Score
from sequel_core.runs.directory import CONFIG, ERROR, METRICS, SUMMARY
from sequel_core.runs.formatting import number
from sequel_core.runs.results import TASK_GIVEN, Result, common_score, load_result, read_metrics
from sequel_core.runs.statistics import interval
from sequel_core.runs.versions import WRITER
from sequel_core.stream.arrays import FloatArray

SEEDS = ("seed", "training.seed", "benchmark.seed")
UNRELATED = ("wandb", "logger", "checkpoint", "benchmark.data_dir", WRITER, *DOCUMENTATION)
"""Settings that do not change the numbers of a run."""

FRAMEWORK_SETTINGS = ("model", "trainer", "jax")
"""Settings that only one framework has, or that the frameworks write differently."""

MODES = {"pytorch": "PyTorch", "jax": "JAX"}


class Estimate(NamedTuple):
    """A mean over runs with its 95 % confidence interval.

    Args:
        mean: nan without values.
        half: half-width of the interval; nan with fewer than two values.
        values: one number per run.
    """

    mean: float
    half: float
    values: tuple[float, ...]

    def text(self, scale: float = 1.0, digits: int | None = 2) -> str:
        """Return the mean and the half-width of its interval.

        Args:
            scale: factor for both numbers, for example 100 for percent.
            digits: number of decimals, >= 0; None for four significant digits.

        Returns:
            Text such as `46.97 ± 1.20`; the mean alone if all values are equal; `-` without values.

        Example:
            >>> estimate([0.65, 0.75]).text(scale=100), estimate([0.65]).text(), estimate([]).text()
            ('70.00 ± 63.53', '0.65', '-')
        """
        mean = number(self.mean, scale, digits)
        equal = not self.values or min(self.values) == max(self.values)
        return mean if equal else f"{mean} ± {number(self.half, scale, digits)}"


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of the finite values and its 95 % confidence interval (Student's t).

    Args:
        values: one number per run; nan and infinity are ignored.

    Returns:
        The mean, the half-width of its interval, and the finite values.

    Example:
        >>> estimate([1.0, 3.0, float("nan")]).mean
        2.0
    """
    finite = tuple(value for value in values if math.isfinite(value))
    bounds = interval(finite)
    half = math.nan if bounds is None else (bounds[1] - bounds[0]) / 2
    return Estimate(float(np.mean(finite)) if finite else math.nan, half, finite)


class Point(NamedTuple):
    """The score on a task at a training step."""

    step: int
    task: int
    score: float
    within_task: bool


@dataclass(frozen=True, eq=False)
class Run:
    """One run directory.

    Args:
        name: path of the directory.
        result: contents of the directory.
        settings: flat configuration as text, without seeds and `UNRELATED` settings.
        seeds: seeds of the configuration, by key.
        points: evaluations in their order; empty if the run was evaluated at the end of tasks only.
        reason: last line of `error.txt`; empty without that file.
    """

    name: str
    result: Result
    settings: Mapping[str, str]
    seeds: Mapping[str, str]
    points: Sequence[Point]
    reason: str

    @property
    def status(self) -> str:
        """`finished`, `interrupted`, `failed`, `diverged` or `unfinished`."""
        return str(self.result.summary.get("status", "unfinished"))

    @property
    def finished(self) -> bool:
        """Whether means include the run."""
        return self.status == "finished" and self.result.matrix.size > 0

    @property
    def trained(self) -> int:
        """Number of tasks trained before the last evaluation."""
        evaluated = np.isfinite(self.result.matrix).any(axis=-1)
        return int(np.flatnonzero(evaluated).max(initial=-1)) + 1


@dataclass(frozen=True, eq=False)
class Group:
    """Runs of one configuration, which differ in their seeds only.

    Args:
        method: name of the configuration without the framework.
        mode: `pytorch`, `jax` or another text of the configuration; may be empty.
        label: name of the configuration, unique in the study.
        runs: all runs, finished or not.
    """

    method: str
    mode: str
    label: str
    runs: Sequence[Run]

    @property
    def finished(self) -> list[Run]:
        """The runs that means include."""
        return [run for run in self.runs if run.finished]

    @property
    def settings(self) -> Mapping[str, str]:
        """The configuration of the runs."""
        return self.runs[0].settings

    def estimate(self, *path: str) -> Estimate:
        """Return the mean of a number of the summary over the finished runs."""
        return estimate([run.result.number(*path) for run in self.finished])

    def matrix(self) -> FloatArray:
        """Return the mean matrix `[T, T]` of the finished runs, of which there must be one."""
        mean: FloatArray = np.mean([run.result.matrix for run in self.finished], axis=0)
        return mean

    @property
    def evaluated_along(self) -> bool:
        """Whether the finished runs were evaluated after each of several tasks."""
        return len(self.matrix()) > 1 and bool(np.isfinite(np.diagonal(self.matrix())).all())

    def over_stream(self) -> list[Estimate]:
        """Return the average score on the tasks seen so far, after each task, over the finished runs."""
        matrices = [run.result.matrix for run in self.finished]
        return [estimate([r[i, : i + 1].mean() for r in matrices]) for i in range(len(matrices[0]))]


@dataclass(frozen=True, eq=False)
class Study:
    """All runs of a report.

    Args:
        groups: the runs by configuration.
        notes: messages about directories that could not be read.
    """

    groups: Sequence[Group]
    notes: Sequence[str]

    @property
    def score(self) -> Score:
        """The score of all runs.

        Raises:
            ValueError: the runs have different scores.
        """
        return common_score(run.result.score for run in self.runs)

    @property
    def runs(self) -> list[Run]:
        """The runs of all groups."""
        return [run for group in self.groups for run in group.runs]

    def differences(self) -> list[str]:
        """Return the keys of the settings in which the groups differ."""
        return _differing([group.settings for group in self.groups])


def read_study(directories: Sequence[str | Path]) -> Study:
    """Read run directories and group them by configuration.

    A directory that cannot be read adds a note instead of a run.

    Args:
        directories: run directories, or folders that contain some at any depth.

    Returns:
        The runs by configuration, and the notes.

    Raises:
        ValueError: there are no directories, one does not exist, or no run can be read.

    Example:
        >>> import numpy as np
        >>> from sequel_core.runs.directory import RunDirectory
        >>> directory = RunDirectory.create("runs/one")  # `sequel_core.run` writes these files
        >>> directory.write_config({"algo": {"name": "ewc"}, "mode": "jax"})
        >>> directory.write_matrix(np.array([[0.9, np.nan], [0.7, 0.8]]))
        >>> directory.write_summary({"status": "finished", "average_accuracy": 0.75})
        >>> [group] = read_study(["runs"]).groups
        >>> group.label, group.estimate("average_accuracy").mean
        ('ewc', 0.75)
    """
    if not directories:
        raise ValueError("directories must be at least one run directory or folder of them, got none")
    for directory in directories:
        if not Path(directory).is_dir():
            raise ValueError(
                "directories must be run directories or folders that contain some, got "
                f"{_printable(directory)}, which is not a directory; use a directory that `sequel run` wrote"
            )
    notes: list[str] = []
    paths: dict[Path, Path] = {}  # by resolved path, so that each run is read once
    for directory in directories:
        below = list(_run_directories(Path(directory)))
        if not below:
            notes.append(f"{_printable(directory)} contains no run directory")
        for path in below:
            paths.setdefault(path.resolve(), path)
    runs: list[Run] = []
    for path in paths.values():
        try:
            runs.append(_read(path, notes))
        except (ValueError, OSError, csv.Error) as error:
            notes.append(_note(path, error))
    if not runs:
        raise ValueError(f"directories must contain at least one readable run; {'; '.join(notes)}")
    return Study(_grouped(runs), notes)


def _run_directories(directory: Path) -> Iterator[Path]:
    """Yield the run directories below a directory, without those inside of another one."""
    for folder, below, files in os.walk(directory):
        if CONFIG in files or ERROR in files:
            yield Path(folder)
            below.clear()
        below[:] = sorted((name for name in below if not name.startswith(".")), key=lambda n: (len(n), n))


def _read(path: Path, notes: list[str]) -> Run:
    """Read a run; if only its `metrics.jsonl` is damaged, add a note."""
    error = path / ERROR
    lines = error.read_text(encoding="utf-8", errors="replace").split("\n") if error.is_file() else []
    reason = next((_printable(line) for line in reversed(lines) if line.strip()), "")
    if reason and not (path / CONFIG).is_file():
        raise ValueError(f"{path} contains no run; it failed before training: {reason}")
    if not any((path / name).is_file() for name in (METRICS, SUMMARY)) and not any(path.glob("*_matrix.csv")):
        raise ValueError(f"{path} contains a {CONFIG} but no records of a run")
    result = load_result(path)
    split = result.summary.get("split") or result.config.get("evaluate_on", "test")
    try:
        points = _points(path, split, result.score.key)
    except ValueError as damage:
        points = []
        notes.append(f"{_note(path, damage)}; scores within tasks are not shown")
    flat = {_printable(key): _setting(value) for key, value in flatten(result.config).items()}
    flat.setdefault("mode", _setting(result.summary.get("mode", "")))
    flat.setdefault("evaluate_on", _setting(split))
    settings = {key: value for key, value in flat.items() if key not in SEEDS and not _within(key, UNRELATED)}
    seeds = {key: flat[key] for key in SEEDS if key in flat}
    return Run(_printable(path), result, settings, seeds, points, reason)


def _points(path: Path, split: str, key: str) -> list[Point]:
    """Return the evaluations on a split; none if the run was evaluated at the end of tasks only."""
    evaluations = [record for record in read_metrics(path) if record.get("kind") == "evaluation"]
    if not any(record.get("within_task") for record in evaluations):
        return []
    measured = [record for record in evaluations if record.get("split") == split]
    return [
        Point(record["step"], record["task"], record[key], record["within_task"])
        for record in measured
        if all(isinstance(record.get(name), int | float) for name in ("step", "task", key, "within_task"))
    ]


def _note(path: Path, error: Exception) -> str:
    text = _printable(error)
    return text if _printable(path) in text else f"{_printable(path)}: {text}"


def _within(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _setting(value: Any) -> str:
    """Return a value as one line of text; 1 and 1.0 give the same text."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return _printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def _printable(text: object) -> str:
    """Replace the characters that cannot be printed: control characters, line ends, undecodable bytes."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(text))


def _grouped(runs: Sequence[Run]) -> list[Group]:
    """Group runs by their settings and number of tasks.

    A run without evaluations has no known number of tasks. It joins a group with equal settings.
    """
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in sorted(runs, key=lambda run: not run.result.matrix.size):
        settings = json.dumps(run.settings, sort_keys=True)
        num_tasks = len(run.result.matrix) or next((n for other, n in groups if other == settings), 0)
        groups.setdefault((settings, num_tasks), []).append(run)
    named = _named(list(groups.values()))
    order = [group.method for group in named]
    return sorted(named, key=lambda group: (order.index(group.method), group.mode != "pytorch"))


def _named(groups: Sequence[Sequence[Run]]) -> list[Group]:
    """Give each group of runs a unique label: its settings, or the directory of its first run."""
    settings = [members[0].settings for members in groups]
    both = len({flat["mode"] for flat in settings}) > 1
    named = []
    for method, flat, members in zip(_methods(settings), settings, groups, strict=True):
        mode = flat["mode"]
        label = f"{method}, {MODES.get(mode, mode)}" if both else method
        named.append(Group(method, mode, label, members))
    labels = Counter(group.label for group in named)
    for k, group in enumerate(named):
        if not group.method or labels[group.label] > 1:
            named[k] = group = replace(group, method=group.runs[0].name, label=group.runs[0].name)
        if any(run.result.task_given for run in group.runs):
            method, label = (f"{name}, {TASK_GIVEN}" for name in (group.method, group.label))
            named[k] = replace(group, method=method, label=label)
    return named


def _methods(configurations: Sequence[Mapping[str, str]]) -> list[str]:
    """Return a name for each configuration without its framework, such as `ewc, ewc_lambda=10`.

    It consists of the algorithm, the other sections that differ between configurations, and the settings that
    differ between configurations with equal sections.
    """
    sections = [tuple(section(settings, name) for name in SECTIONS) for settings in configurations]
    shown = [k for k in range(len(SECTIONS)) if k == 0 or len({names[k] for names in sections}) > 1]
    methods = []
    for settings, names in zip(configurations, sections, strict=True):
        siblings = [other for other, theirs in zip(configurations, sections, strict=True) if theirs == names]
        parts = [names[k] for k in shown if names[k]] + _different_settings(settings, siblings)
        methods.append(_cut(", ".join(parts), 120))
    return methods


def _different_settings(settings: Mapping[str, str], siblings: Sequence[Mapping[str, str]]) -> list[str]:
    """Return texts such as `lr=0.1` for the settings that differ from those of the siblings.

    Settings of a framework are compared with siblings of the same framework only.
    """
    same_mode = [other for other in siblings if other["mode"] == settings["mode"]]
    keys = [key for key in _differing(siblings) if key != "mode" and not _within(key, FRAMEWORK_SETTINGS)]
    keys += [key for key in _differing(same_mode) if _within(key, FRAMEWORK_SETTINGS)]
    short_names = Counter(key.rpartition(".")[2] for key in keys)
    parts = []
    for key in keys:
        short, value = key.rpartition(".")[2], settings.get(key)
        name = short if short_names[short] == 1 else key
        parts.append(f"{name} not set" if value is None else f"{name}={_cut(value, 40)}")
    return parts


def _cut(text: str, length: int) -> str:
    """Cut a text that is longer than `length`, and end it with an ellipsis."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def section(settings: Mapping[str, str], name: str) -> str:
    """Return the choice of a section.

    Args:
        settings: flat configuration, as in `Run.settings`.
        name: name of the section, such as `algo`.

    Returns:
        The name of the choice, or the path of user-defined code; empty if the section is missing.

    Example:
        >>> section({"algo.name": "ewc", "mode": "jax"}, "algo")
        'ewc'
    """
    keys = (f"{name}.{SECTIONS.get(name)}", f"{name}.{TARGET}", name)
    return next((settings[key] for key in keys if key in settings), "")


def _differing(configurations: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the keys of the settings that are not equal in all configurations."""
    keys = dict.fromkeys(key for settings in configurations for key in settings)
    return [key for key in keys if len({settings.get(key) for settings in configurations}) > 1]
