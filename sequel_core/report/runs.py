"""The runs of a report: found, read, grouped by configuration, and what their seeds say together."""

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
from sequel_core.runs.directory import CONFIG, ERROR, MATRIX, METRICS, SUMMARY
from sequel_core.runs.results import TASK_GIVEN, Result, load_result, read_metrics
from sequel_core.runs.statistics import interval
from sequel_core.runs.versions import WRITER
from sequel_core.stream.arrays import FloatArray

SEEDS = ("seed", "training.seed", "benchmark.seed")
UNRELATED = ("wandb", "logger", "checkpoint", "benchmark.data_dir", WRITER, *DOCUMENTATION)
"""Settings that change nothing in what a run computes."""

OF_A_FRAMEWORK = ("model", "trainer")
"""Settings that one framework alone has, or that each tells in its own words."""

MODES = {"pytorch": "PyTorch", "jax": "JAX"}


class Estimate(NamedTuple):
    """The mean over runs and half of its 95 % confidence interval."""

    mean: float  # nan for no runs
    half: float  # nan for fewer than two
    values: tuple[float, ...]

    def text(self, scale: float = 1.0, digits: int = 2) -> str:
        """Return `46.97 ± 1.20`, the mean alone for one run or for equal ones, `-` for none."""
        if math.isnan(self.mean):
            return "-"
        mean = f"{scale * self.mean:,.{digits}f}"
        alone = min(self.values) == max(self.values)
        return mean if alone else f"{mean} ± {scale * self.half:,.{digits}f}"


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of the finite values with its Student interval."""
    finite = tuple(value for value in values if math.isfinite(value))
    bounds = interval(finite)
    half = math.nan if bounds is None else (bounds[1] - bounds[0]) / 2
    return Estimate(float(np.mean(finite)) if finite else math.nan, half, finite)


class Point(NamedTuple):
    """An accuracy measured at a step, a fraction."""

    step: int
    task: int
    accuracy: float
    within_task: bool


@dataclass(frozen=True, eq=False)
class Run:
    """One run directory.

    Args:
        name: its path, as given or found.
        result: what it holds.
        settings: the flat configuration as text, without seeds and what has no part in the computation.
        seeds: the seeds in the configuration, by key.
        points: what was evaluated, in order; empty unless it was evaluated within its tasks, too.
        reason: why it did not finish, where `error.txt` says so.
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
        """Whether it counts in a mean."""
        return self.status == "finished" and self.result.matrix.size > 0

    @property
    def trained(self) -> int:
        """Number of tasks after which it was evaluated."""
        return int(np.isfinite(self.result.matrix).any(axis=1).sum()) if self.result.matrix.size else 0

    def number(self, *path: str) -> float:
        """Return a number of the summary, `("seconds", "train")`; nan where there is none."""
        value: Any = self.result.summary
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


@dataclass(frozen=True, eq=False)
class Group:
    """Runs of one configuration, which differ in their seeds alone.

    Args:
        method: what tells it from the other groups, the framework aside.
        mode: `pytorch`, `jax` or what the configuration says; may be empty.
        label: both; unique in the study.
        runs: all of them.
    """

    method: str
    mode: str
    label: str
    runs: Sequence[Run]

    @property
    def finished(self) -> list[Run]:
        """The runs that count in its means."""
        return [run for run in self.runs if run.finished]

    @property
    def settings(self) -> Mapping[str, str]:
        """The configuration that its runs share."""
        return self.runs[0].settings

    def estimate(self, *path: str) -> Estimate:
        """Return a number of the summaries over the finished runs."""
        return estimate([run.number(*path) for run in self.finished])

    def matrix(self) -> FloatArray:
        """Return the mean accuracy matrix of the finished runs, `[T, T]`; there must be one."""
        mean: FloatArray = np.mean([run.result.matrix for run in self.finished], axis=0)
        return mean

    def over_stream(self) -> list[Estimate]:
        """Return the average accuracy of the tasks seen after each task, over the finished runs."""
        matrices = [run.result.matrix for run in self.finished]
        return [estimate([r[i, : i + 1].mean() for r in matrices]) for i in range(len(matrices[0]))]


@dataclass(frozen=True, eq=False)
class Study:
    """All that a report is about."""

    groups: Sequence[Group]
    notes: Sequence[str]  # about directories that could not be read

    @property
    def runs(self) -> list[Run]:
        """The runs of all groups."""
        return [run for group in self.groups for run in group.runs]

    def differences(self) -> list[str]:
        """Return the settings in which the groups differ."""
        return _differing([group.settings for group in self.groups])


def read_study(directories: Sequence[str | Path]) -> Study:
    """Read run directories, and all those in folders that hold some.

    A directory that cannot be read becomes a note.

    Args:
        directories: run directories, or folders with run directories at any depth.

    Raises:
        ValueError: no directories, one that is none, or no run that can be read.
    """
    if not directories:
        raise ValueError("directories must be at least one run directory or folder of them, got none")
    for directory in directories:
        if not Path(directory).is_dir():
            raise ValueError(
                "directories must be run directories or folders that hold some, got "
                f"{_printable(directory)}, which is no directory; give what `sequel run` wrote"
            )
    runs: list[Run] = []
    notes: list[str] = []
    seen: set[Path] = set()
    for directory in directories:
        found = list(_find(Path(directory)))
        if not found:
            notes.append(f"{_printable(directory)} holds no run directory")
        for path in found:
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            try:
                runs.append(_read(path, notes))
            except (ValueError, OSError, csv.Error) as error:
                notes.append(_note(path, error))
    if not runs:
        raise ValueError(f"directories must hold at least one run that can be read; {'; '.join(notes)}")
    return Study(_grouped(runs), notes)


def _find(directory: Path) -> Iterator[Path]:
    """Yield what looks like a run directory, not what lies within one."""
    for folder, below, files in os.walk(directory):
        if CONFIG in files or ERROR in files:
            yield Path(folder)
            below.clear()
        below[:] = sorted((name for name in below if not name.startswith(".")), key=lambda n: (len(n), n))


def _read(path: Path, notes: list[str]) -> Run:
    """Read a run; what is wrong with its `metrics.jsonl` alone becomes a note."""
    error = path / ERROR
    lines = error.read_text(encoding="utf-8", errors="replace").split("\n") if error.is_file() else []
    reason = next((_printable(line) for line in reversed(lines) if line.strip()), "")
    if reason and not (path / CONFIG).is_file():
        raise ValueError(f"{path} holds no run, it failed before it began: {reason}")
    if not any((path / name).is_file() for name in (METRICS, MATRIX, SUMMARY)):
        raise ValueError(f"{path} holds a {CONFIG} and nothing that a run recorded")
    result = load_result(path)
    split = result.summary.get("split") or result.config.get("evaluate_on", "test")
    try:
        points = _points(path, split)
    except ValueError as damage:
        points = []
        notes.append(f"{_note(path, damage)}; its accuracies within tasks are not shown")
    flat = {_printable(key): _setting(value) for key, value in flatten(result.config).items()}
    flat.setdefault("mode", _setting(result.summary.get("mode", "")))
    flat.setdefault("evaluate_on", _setting(split))
    settings = {key: value for key, value in flat.items() if key not in SEEDS and not _within(key, UNRELATED)}
    seeds = {key: flat[key] for key in SEEDS if key in flat}
    return Run(_printable(path), result, settings, seeds, points, reason)


def _points(path: Path, split: str) -> list[Point]:
    evaluations = [record for record in read_metrics(path) if record.get("kind") == "evaluation"]
    if not any(record.get("within_task") for record in evaluations):
        return []
    measured = [record for record in evaluations if record.get("split") == split]
    return [
        Point(record["step"], record["task"], record["accuracy"], record["within_task"])
        for record in measured
        if all(isinstance(record.get(key), int | float) for key in Point._fields)
    ]


def _note(path: Path, error: Exception) -> str:
    text = _printable(error)
    return text if _printable(path) in text else f"{_printable(path)}: {text}"


def _within(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _setting(value: Any) -> str:
    """Return a value as YAML has it, in one line; 1 and 1.0 are the same."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return _printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def _printable(text: object) -> str:
    """Replace the characters that cannot be printed: control characters, line ends, undecodable bytes."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(text))


def _grouped(runs: Sequence[Run]) -> list[Group]:
    """Group runs by their settings and number of tasks, which one that was never evaluated does not tell."""
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in sorted(runs, key=lambda run: not run.result.matrix.size):
        same = json.dumps(run.settings, sort_keys=True)
        size = len(run.result.matrix) or next((tasks for other, tasks in groups if other == same), 0)
        groups.setdefault((same, size), []).append(run)
    settings = [members[0].settings for members in groups.values()]
    several = len({each["mode"] for each in settings}) > 1
    found = []
    for method, each, members in zip(_methods(settings), settings, groups.values(), strict=True):
        mode = MODES.get(each["mode"], each["mode"])
        found.append(Group(method, each["mode"], f"{method}, {mode}" if several else method, members))
    taken = Counter(group.label for group in found)
    for k, group in enumerate(found):
        if not group.method or taken[group.label] > 1:
            found[k] = group = replace(group, method=group.runs[0].name, label=group.runs[0].name)
        if any(run.result.task_given for run in group.runs):
            method, label = (f"{name}, {TASK_GIVEN}" for name in (group.method, group.label))
            found[k] = replace(group, method=method, label=label)
    order = [group.method for group in found]
    return sorted(found, key=lambda group: (order.index(group.method), group.mode != "pytorch"))


def _methods(configurations: Sequence[Mapping[str, str]]) -> list[str]:
    """Return what tells each configuration from the others, the framework aside: `ewc, ewc_lambda=10`."""
    names = [tuple(section(settings, name) for name in SECTIONS) for settings in configurations]
    named = [k for k in range(len(SECTIONS)) if k == 0 or len({each[k] for each in names}) > 1]
    methods = []
    for settings, own in zip(configurations, names, strict=True):
        siblings = [other for other, theirs in zip(configurations, names, strict=True) if theirs == own]
        keys = [key for key in _differing(siblings) if key != "mode" and not _within(key, OF_A_FRAMEWORK)]
        alike = [other for other in siblings if other["mode"] == settings["mode"]]
        keys += [key for key in _differing(alike) if _within(key, OF_A_FRAMEWORK)]
        last = Counter(key.rpartition(".")[2] for key in keys)
        parts = [own[k] for k in named if own[k]]
        for key in keys:
            short = key.rpartition(".")[2]
            name, value = short if last[short] == 1 else key, settings.get(key)
            if value is not None and len(value) > 40:
                value = f"{value[:39]}…"
            parts.append(f"{name} not set" if value is None else f"{name}={value}")
        told = ", ".join(parts)
        methods.append(told if len(told) <= 120 else f"{told[:119]}…")
    return methods


def section(settings: Mapping[str, str], name: str) -> str:
    """Return what a section says: a name, or that of the user's own code; empty for none."""
    keys = (f"{name}.{SECTIONS.get(name)}", f"{name}.{TARGET}", name)
    return next((settings[key] for key in keys if key in settings), "")


def _differing(configurations: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the settings that are not the same in all."""
    keys = dict.fromkeys(key for settings in configurations for key in settings)
    return [key for key in keys if len({settings.get(key) for settings in configurations}) > 1]
