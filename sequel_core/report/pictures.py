"""The figures of a report: which there are, what each shows, and the numbers behind it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from sequel_core.report.figures import Bar, Curve, Row, bars, curves, heat_map
from sequel_core.report.runs import MODES, Estimate, Group, Run, Study
from sequel_core.report.tables import Table, matrix_numbers, selected
from sequel_core.stream.arrays import FloatArray

MOST = 16
"""Configurations that are drawn; of more, those with the highest average accuracy."""

ROWS = 40


class Picture(NamedTuple):
    """A figure that can be drawn at any width."""

    name: str  # of a file, unique in the report
    title: str
    description: str  # for those who cannot see it
    draw: Callable[[float], Figure]  # of the width in inches
    numbers: Table | None


def drawn(study: Study) -> list[Group]:
    """Return the groups that are drawn: with finished runs, and not too many."""
    done = [group for group in study.groups if group.finished]
    if len(done) <= MOST:
        return done
    accuracy = {group: np.nan_to_num(group.estimate("average_accuracy").mean, nan=-1.0) for group in done}
    best = sorted(done, key=lambda group: -accuracy[group])[:MOST]
    return [group for group in done if group in best]


def bar_chart(study: Study, key: Sequence[str], title: str, label: str, scale: float = 1.0) -> list[Picture]:
    """Return a bar for every drawn group, the frameworks beside each other; none where no run has the number.

    Args:
        study: the runs.
        key: path of the number in the summaries.
        title: of the picture.
        label: of the axis.
        scale: what the numbers are multiplied by.
    """
    found = {group: group.estimate(*key) for group in drawn(study)}
    found = {group: value for group, value in found.items() if value.values}
    if not found:
        return []
    several = len({group.mode for group in found}) > 1
    rows: dict[str, list[Bar]] = {}
    for group, value in found.items():
        series = MODES.get(group.mode, group.mode) if several else ""
        rows.setdefault(group.method, []).append(_bar(value, series, scale))
    text = ", ".join(f"{group.label}: {value.text(scale)}" for group, value in found.items())
    table = Table(
        f"{title}: the mean, half of its 95 % confidence interval, and each run",
        ["configuration", "mean", "half interval", "runs"],
        [[group.label, *_numbers(value, scale)] for group, value in found.items()],
    )
    listed = [Row(method, given) for method, given in rows.items()]
    name = "_".join(key)
    return [Picture(name, title, f"Bars. {label}. {text}", lambda width: bars(listed, width, label), table)]


def _bar(value: Estimate, series: str, scale: float) -> Bar:
    kind = int(series == MODES["jax"])
    values = [scale * each for each in value.values]
    return Bar(series, kind, scale * value.mean, scale * value.half, values, value.text(scale))


def _numbers(value: Estimate, scale: float) -> list[str]:
    half = "-" if math.isnan(value.half) else f"{scale * value.half:,.2f}"
    return [f"{scale * value.mean:,.2f}", half, ", ".join(f"{scale * each:,.2f}" for each in value.values)]


def over_stream(study: Study) -> list[Picture]:
    """Return the average accuracy of the tasks seen, over the stream; none where no stream has two tasks."""
    groups = [group for group in drawn(study) if len(group.matrix()) > 1]
    if not groups:
        return []
    methods = list(dict.fromkeys(group.method for group in groups))
    found = [group.over_stream() for group in groups]
    several = len({group.mode for group in groups}) > 1
    lines = []
    for group, values in zip(groups, found, strict=True):
        x = list(range(1, len(values) + 1))
        y, half = [100 * value.mean for value in values], [100 * value.half for value in values]
        dashed = several and group.mode == "jax"
        lines.append(Curve(group.label, x, y, half, methods.index(group.method), dashed))
    steps = selected(max(map(len, found)))
    table = Table(
        "Average accuracy of the tasks seen so far, percent",
        ["configuration", *(f"after task {i + 1}" for i in steps)],
        [
            [group.label, *(values[i].text(100) if i < len(values) else "-" for i in steps)]
            for group, values in zip(groups, found, strict=True)
        ],
    )
    ends = ", ".join(f"{line.label} ends at {line.y[-1]:.2f} %" for line in lines)
    banded = any(len(group.finished) > 1 for group in groups)
    return [
        Picture(
            "average_accuracy_over_stream",
            "Average accuracy of the tasks seen so far" + (", 95 % confidence intervals" if banded else ""),
            f"Lines over the tasks trained. {ends}",
            lambda width: curves(lines, width, "tasks trained", "average accuracy (%)"),
            table,
        )
    ]


def matrices(study: Study) -> list[tuple[Group, list[Picture]]]:
    """Return for every drawn group its mean accuracy matrix and the accuracy of each task over time."""
    found = []
    for number, group in enumerate(drawn(study), 1):
        matrix, name = group.matrix(), f"{number:02}_{_slug(group.label)}"
        runs = f"mean of {len(group.finished)} runs" if len(group.finished) > 1 else "one run"
        pictures = [_matrix(f"matrix_{name}", f"Accuracy matrix, {runs}", matrix)]
        if len(matrix) > 1:
            title = f"Accuracy of each task over time, {runs}"
            pictures.append(_tasks(f"tasks_{name}", title, group.finished))
        found.append((group, pictures))
    return found


def partial(study: Study) -> list[tuple[Group, Run, list[Picture]]]:
    """Return the runs that did not finish, each with the matrix as far as it got."""
    ended = [(group, run) for group in study.groups for run in group.runs if not run.finished]
    found = []
    for number, (group, run) in enumerate(ended, 1):
        name = f"partial_{number:02}_{_slug(group.label)}"
        title = f"Accuracy matrix, {run.trained} of {len(run.result.matrix)} tasks"
        there = run.trained > 0 and number <= MOST
        found.append((group, run, [_matrix(name, title, run.result.matrix)] if there else []))
    return found


def _matrix(name: str, title: str, matrix: FloatArray) -> Picture:
    size = len(matrix)
    row = max(i for i in range(size) if np.isfinite(matrix[i]).any())
    mean = 100 * np.nanmean(matrix[row])
    text = f"Heat map of {size} by {size} accuracies; mean after task {row + 1}: {mean:.2f} %"
    return Picture(name, title, text, lambda width: heat_map(matrix, width), matrix_numbers(matrix))


def _tasks(name: str, title: str, runs: Sequence[Run]) -> Picture:
    """Return a line for each task: over steps where all runs were evaluated within tasks, else over tasks."""
    size = len(runs[0].result.matrix)
    tasks = selected(size)
    by_run = [{(point.task, point.step): point.accuracy for point in run.points} for run in runs]
    common = sorted(set.intersection(*(set(found) for found in by_run)))
    numbers = None
    boundaries: list[int] = []
    values: dict[int, dict[int, float]] = {j: {} for j in tasks}
    if common:
        x_label = "training steps"
        boundaries = sorted({point.step for point in runs[0].points if not point.within_task})
        for task, step in common:
            if task in values:
                values[task][step] = float(np.mean([found[task, step] for found in by_run]))
        numbers = _steps_table(values)
    else:
        x_label = "tasks trained"
        matrix = np.mean([run.result.matrix for run in runs], axis=0)
        for j in tasks:
            values[j] = {i + 1: float(matrix[i, j]) for i in range(size) if np.isfinite(matrix[i, j])}
    lines = [
        Curve(f"task {j + 1}", list(found), [100 * value for value in found.values()], None, kind)
        for kind, (j, found) in enumerate(values.items())
        if found
    ]
    if len(tasks) < size:
        title = f"{title}; {len(tasks)} of {size} tasks"
    ends = ", ".join(f"{line.label} ends at {line.y[-1]:.2f} %" for line in lines)

    def draw(width: float) -> Figure:
        return curves(lines, width, x_label, "accuracy (%)", limits=(-2, 102), boundaries=boundaries)

    return Picture(name, title, f"A line for each task over {x_label}. {ends}", draw, numbers)


def _steps_table(values: dict[int, dict[int, float]]) -> Table:
    steps = sorted({step for found in values.values() for step in found})
    shown = steps[:: -(-len(steps) // ROWS)]
    rows = [
        [str(step), *(f"{100 * found[step]:.2f}" if step in found else "" for found in values.values())]
        for step in shown
    ]
    part = "" if len(shown) == len(steps) else f"; {len(shown)} of {len(steps)} evaluations"
    return Table(f"Accuracy on each task, percent{part}", ["step", *(f"task {j + 1}" for j in values)], rows)


def _slug(text: str) -> str:
    """Return a name as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")[:60]
