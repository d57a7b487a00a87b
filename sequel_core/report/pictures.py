"""The figures of a report, with their titles, descriptions and numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from sequel_core.report.figures import Bar, Curve, Row, bars, curves, heat_map
from sequel_core.report.runs import MODES, Estimate, Group, Run, Study
from sequel_core.report.tables import Table, matrix_numbers, part, selected
from sequel_core.stream.arrays import FloatArray

MAX_CONFIGURATIONS = 16
"""Number of configurations in the figures; a larger study shows those with the highest average accuracy."""

MAX_ROWS = 40
"""Number of rows in the table of evaluations within tasks; more are sampled evenly."""


class Picture(NamedTuple):
    """A figure that can be drawn at any width."""

    name: str  # file name without extension, unique in the report
    title: str
    description: str  # for screen readers
    draw: Callable[[float], Figure]  # from the width in inches
    numbers: Table | None


def drawn(study: Study) -> list[Group]:
    """Return the groups in the figures: the best `MAX_CONFIGURATIONS` of those with finished runs."""
    groups = [group for group in study.groups if group.finished]
    accuracy = {group: np.nan_to_num(group.estimate("average_accuracy").mean, nan=-1.0) for group in groups}
    best = sorted(groups, key=lambda group: -accuracy[group])[:MAX_CONFIGURATIONS]
    return [group for group in groups if group in best]


def bar_chart(study: Study, key: Sequence[str], title: str, label: str, scale: float = 1.0) -> list[Picture]:
    """Draw a number of the summaries as bars, the two frameworks of a method under one heading.

    Args:
        study: the runs.
        key: path of the number in `summary.json`.
        title: title of the picture.
        label: label of the axis.
        scale: factor for the numbers.

    Returns:
        One picture; none if no run has the number.
    """
    estimates = {group: group.estimate(*key) for group in drawn(study)}
    estimates = {group: value for group, value in estimates.items() if value.values}
    if not estimates:
        return []
    both = len({group.mode for group in estimates}) > 1
    bars_by_method: dict[str, list[Bar]] = {}
    for group, value in estimates.items():
        series = MODES.get(group.mode, group.mode) if both else ""
        bars_by_method.setdefault(group.method, []).append(_bar(value, series, scale))
    rows = [Row(method, its_bars) for method, its_bars in bars_by_method.items()]
    text = ", ".join(f"{group.label}: {value.text(scale)}" for group, value in estimates.items())
    table = Table(
        f"{title}: mean, half-width of its 95 % confidence interval, and single runs",
        ["configuration", "mean", "half-width", "runs"],
        [[group.label, *_numbers(value, scale)] for group, value in estimates.items()],
    )
    description = f"Bar chart; {label}. {text}"
    return [Picture("_".join(key), title, description, lambda width: bars(rows, width, label), table)]


def _bar(value: Estimate, series: str, scale: float) -> Bar:
    values = [scale * single for single in value.values]
    style = int(series == MODES["jax"])
    return Bar(series, style, scale * value.mean, scale * value.half, values, value.text(scale))


def _numbers(value: Estimate, scale: float) -> list[str]:
    half = "-" if math.isnan(value.half) else f"{scale * value.half:,.2f}"
    singles = ", ".join(f"{scale * single:,.2f}" for single in value.values)
    return [f"{scale * value.mean:,.2f}", half, singles]


def over_stream(study: Study) -> list[Picture]:
    """Draw the average accuracy on the tasks seen so far; no picture if all streams have one task."""
    groups = [group for group in drawn(study) if len(group.matrix()) > 1]
    if not groups:
        return []
    estimates = [group.over_stream() for group in groups]
    lines = _stream_lines(groups, estimates)
    steps = selected(max(map(len, estimates)))
    table = Table(
        "Average accuracy on the tasks seen so far, percent",
        ["configuration", *(f"after task {i + 1}" for i in steps)],
        [
            [group.label, *(values[i].text(100) if i < len(values) else "-" for i in steps)]
            for group, values in zip(groups, estimates, strict=True)
        ],
    )
    title = "Average accuracy on the tasks seen so far"
    if any(len(group.finished) > 1 for group in groups):
        title += ", 95 % confidence intervals"
    return [
        Picture(
            "average_accuracy_over_stream",
            title,
            f"Line chart over the number of tasks trained. {_ends(lines)}",
            lambda width: curves(lines, width, "tasks trained", "average accuracy (%)"),
            table,
        )
    ]


def _stream_lines(groups: Sequence[Group], estimates: Sequence[Sequence[Estimate]]) -> list[Curve]:
    """Return a curve for each group; a method has one colour, and JAX is dashed if both frameworks occur."""
    methods = list(dict.fromkeys(group.method for group in groups))
    both = len({group.mode for group in groups}) > 1
    return [
        Curve(
            group.label,
            x=list(range(1, len(values) + 1)),
            y=[100 * value.mean for value in values],
            half=[100 * value.half for value in values],
            style=methods.index(group.method),
            dashed=both and group.mode == "jax",
        )
        for group, values in zip(groups, estimates, strict=True)
    ]


def _ends(lines: Sequence[Curve]) -> str:
    return ", ".join(f"{line.label} ends at {line.y[-1]:.2f} %" for line in lines)


def matrices(study: Study) -> list[tuple[Group, list[Picture]]]:
    """Draw the mean accuracy matrix of each group, and the accuracy on each task over time."""
    groups = []
    for number, group in enumerate(drawn(study), 1):
        matrix, name = group.matrix(), f"{number:02}_{_slug(group.label)}"
        runs = f"mean of {len(group.finished)} runs" if len(group.finished) > 1 else "one run"
        pictures = [_matrix(f"matrix_{name}", f"Accuracy matrix, {runs}", matrix)]
        if len(matrix) > 1:
            title = f"Accuracy on each task over time, {runs}"
            pictures.append(_tasks(f"tasks_{name}", title, group.finished))
        groups.append((group, pictures))
    return groups


def partial(study: Study) -> list[tuple[Group, Run, list[Picture]]]:
    """Draw the accuracy matrix of each run that did not finish, up to the last evaluation."""
    unfinished = [(group, run) for group in study.groups for run in group.runs if not run.finished]
    shown = []
    for number, (group, run) in enumerate(unfinished, 1):
        name = f"partial_{number:02}_{_slug(group.label)}"
        title = f"Accuracy matrix, {run.trained} of {len(run.result.matrix)} tasks"
        has_picture = run.trained > 0 and number <= MAX_CONFIGURATIONS
        shown.append((group, run, [_matrix(name, title, run.result.matrix)] if has_picture else []))
    return shown


def _matrix(name: str, title: str, matrix: FloatArray) -> Picture:
    size = len(matrix)
    row = max(i for i in range(size) if np.isfinite(matrix[i]).any())
    mean = 100 * np.nanmean(matrix[row])
    text = f"Heat map of {size} by {size} accuracies; mean after task {row + 1}: {mean:.2f} %"
    return Picture(name, title, text, lambda width: heat_map(matrix, width), matrix_numbers(matrix))


def _tasks(name: str, title: str, runs: Sequence[Run]) -> Picture:
    """Draw a line for each task.

    The lines are over steps if all runs were evaluated within tasks, otherwise over the tasks trained.
    """
    num_tasks = len(runs[0].result.matrix)
    tasks = selected(num_tasks)
    accuracies = _within_tasks(runs, tasks)
    if accuracies:
        x_label, table = "training steps", _steps_table(accuracies)
        boundaries = sorted({point.step for point in runs[0].points if not point.within_task})
    else:
        x_label, table, boundaries = "tasks trained", None, []
        matrix = np.mean([run.result.matrix for run in runs], axis=0)
        accuracies = {
            j: {i + 1: float(value) for i, value in enumerate(matrix[:, j]) if np.isfinite(value)}
            for j in tasks
        }
    lines = [
        Curve(f"task {j + 1}", list(by_x), [100 * value for value in by_x.values()], None, style)
        for style, (j, by_x) in enumerate(accuracies.items())
        if by_x
    ]

    def draw(width: float) -> Figure:
        return curves(lines, width, x_label, "accuracy (%)", limits=(-2, 102), boundaries=boundaries)

    title, description = title + part(tasks, num_tasks), f"Line chart over {x_label}. {_ends(lines)}"
    return Picture(name, title, description, draw, table)


def _within_tasks(runs: Sequence[Run], tasks: Sequence[int]) -> dict[int, dict[int, float]]:
    """Return the mean accuracy by task and step, at the steps with an evaluation in all runs."""
    by_run = [{(point.task, point.step): point.accuracy for point in run.points} for run in runs]
    common = sorted(set.intersection(*(set(accuracies) for accuracies in by_run)))
    if not common:
        return {}
    mean: dict[int, dict[int, float]] = {j: {} for j in tasks}
    for task, step in common:
        if task in mean:
            mean[task][step] = float(np.mean([accuracies[task, step] for accuracies in by_run]))
    return mean


def _steps_table(accuracies: dict[int, dict[int, float]]) -> Table:
    steps = sorted({step for by_step in accuracies.values() for step in by_step})
    shown = steps[:: -(-len(steps) // MAX_ROWS)]
    columns = accuracies.values()
    rows = [
        [str(step), *(f"{100 * column[step]:.2f}" if step in column else "" for column in columns)]
        for step in shown
    ]
    selection = "" if len(shown) == len(steps) else f"; {len(shown)} of {len(steps)} evaluations"
    header = ["step", *(f"task {j + 1}" for j in accuracies)]
    return Table(f"Accuracy on each task, percent{selection}", header, rows)


def _slug(text: str) -> str:
    """Return a text as part of a file name."""
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")[:60]
