"""The figures of a report, with their titles, descriptions and numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from sequel_core.objectives import Score
from sequel_core.report.figures import Bar, Curve, Row, bars, curve_text, curves, heat_map
from sequel_core.report.runs import MODES, Estimate, Group, Run, Study
from sequel_core.report.tables import Table, caption_of, matrix_numbers, part, selected
from sequel_core.runs.formatting import number, scaling, score_text
from sequel_core.stream.arrays import FloatArray

MAX_CONFIGURATIONS = 16
"""Number of configurations in the figures; a larger study shows those with the best average score."""

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
    sign, average = -1 if study.score.higher_is_better else 1, study.score.of("average_score")

    def cost(group: Group) -> float:
        return float(np.nan_to_num(sign * group.estimate(average).mean, nan=math.inf))

    best = sorted(groups, key=cost)[:MAX_CONFIGURATIONS]
    return [group for group in groups if group in best]


def bar_chart(
    study: Study,
    key: Sequence[str],
    title: str,
    label: str,
    scale: float = 1.0,
    digits: int | None = 2,
    lowest: float = -math.inf,
) -> list[Picture]:
    """Draw a number of the summaries as bars, the two frameworks of a method under one heading.

    Args:
        study: the runs.
        key: path of the number in the summary, as in `Result.number`.
        title: title of the picture.
        label: label of the axis.
        scale: factor for the numbers.
        digits: number of decimals; None for four significant digits.
        lowest: smallest possible value, at which the axis ends.

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
        bars_by_method.setdefault(group.method, []).append(_bar(value, series, scale, digits))
    rows = [Row(method, its_bars) for method, its_bars in bars_by_method.items()]
    text = ", ".join(f"{group.label}: {value.text(scale, digits)}" for group, value in estimates.items())
    table = Table(
        f"{title}: mean, half-width of its 95 % confidence interval, and single runs",
        ["configuration", "mean", "half-width", "runs"],
        [[group.label, *_numbers(value, scale, digits)] for group, value in estimates.items()],
    )
    description = f"Bar chart; {label}. {text}"
    return [Picture("_".join(key), title, description, lambda width: bars(rows, width, label, lowest), table)]


def _bar(value: Estimate, series: str, scale: float, digits: int | None) -> Bar:
    values = [scale * single for single in value.values]
    style = int(series == MODES["jax"])
    mean, half, text = scale * value.mean, scale * value.half, value.text(scale, digits)
    return Bar(series, style, mean, half, values, text, digits)


def _numbers(value: Estimate, scale: float, digits: int | None) -> list[str]:
    singles = ", ".join(number(single, scale, digits) for single in value.values)
    return [number(value.mean, scale, digits), number(value.half, scale, digits), singles]


def over_stream(study: Study) -> list[Picture]:
    """Draw the average score on the tasks seen so far, of the groups that were evaluated after each task."""
    groups = [group for group in drawn(study) if group.evaluated_along]
    if not groups:
        return []
    estimates = [group.over_stream() for group in groups]
    score = study.score
    lines = _stream_lines(groups, estimates, scaling(score)[0])
    title = f"Average {score.name} on the tasks seen so far"
    steps = selected(max(map(len, estimates)))
    table = Table(
        title + (", percent" if score.fraction else ""),
        ["configuration", *(f"after task {i + 1}" for i in steps)],
        [
            [group.label, *(values[i].text(*scaling(score)) if i < len(values) else "-" for i in steps)]
            for group, values in zip(groups, estimates, strict=True)
        ],
    )
    if any(len(group.finished) > 1 for group in groups):
        title += ", 95 % confidence intervals"
    return [
        Picture(
            score.of("average_score_over_stream"),
            title,
            f"Line chart over the number of tasks trained. {_ends(lines, score)}",
            lambda width: curves(lines, width, "tasks trained", f"average {_axis(score)}", score),
            table,
        )
    ]


def _stream_lines(
    groups: Sequence[Group], estimates: Sequence[Sequence[Estimate]], scale: float
) -> list[Curve]:
    """Return a curve for each group; a method has one colour, and JAX is dashed if both frameworks occur."""
    methods = list(dict.fromkeys(group.method for group in groups))
    both = len({group.mode for group in groups}) > 1
    return [
        Curve(
            group.label,
            x=list(range(1, len(values) + 1)),
            y=[scale * value.mean for value in values],
            half=[scale * value.half for value in values],
            style=methods.index(group.method),
            dashed=both and group.mode == "jax",
        )
        for group, values in zip(groups, estimates, strict=True)
    ]


def _ends(lines: Sequence[Curve], score: Score) -> str:
    return ", ".join(f"{line.label} ends at {curve_text(line.y[-1], score)}" for line in lines)


def _axis(score: Score) -> str:
    return f"{score.name} (%)" if score.fraction else score.name


def matrices(study: Study) -> list[tuple[Group, list[Picture]]]:
    """Draw the mean matrix of each group, and the score on each task over time."""
    groups, score = [], study.score
    for place, group in enumerate(drawn(study), 1):
        matrix, name = group.matrix(), f"{place:02}_{_slug(group.label)}"
        runs = f"mean of {len(group.finished)} runs" if len(group.finished) > 1 else "one run"
        pictures = [_matrix(f"matrix_{name}", f"{score.title} matrix, {runs}", matrix, score)]
        if group.evaluated_along:
            title = f"{score.title} on each task over time, {runs}"
            pictures.append(_tasks(f"tasks_{name}", title, group.finished, score))
        groups.append((group, pictures))
    return groups


def partial(study: Study) -> list[tuple[Group, Run, list[Picture]]]:
    """Draw the matrix of each run that did not finish, up to the last evaluation."""
    unfinished = [(group, run) for group in study.groups for run in group.runs if not run.finished]
    shown = []
    for place, (group, run) in enumerate(unfinished, 1):
        name = f"partial_{place:02}_{_slug(group.label)}"
        title = f"{study.score.title} matrix, {run.trained} of {len(run.result.matrix)} tasks"
        has_picture = run.trained > 0 and place <= MAX_CONFIGURATIONS
        matrix = run.result.matrix
        shown.append((group, run, [_matrix(name, title, matrix, study.score)] if has_picture else []))
    return shown


def _matrix(name: str, title: str, matrix: FloatArray, score: Score) -> Picture:
    size = len(matrix)
    row = max(i for i in range(size) if np.isfinite(matrix[i]).any())
    mean = score_text(float(np.nanmean(matrix[row])), score)
    text = f"Heat map of {score.name}, {size} by {size}; mean after task {row + 1}: {mean}"
    table = matrix_numbers(matrix, score)
    return Picture(name, title, text, lambda width: heat_map(matrix, width, score=score), table)


def _tasks(name: str, title: str, runs: Sequence[Run], score: Score) -> Picture:
    """Draw a line for each task.

    The lines are over steps if all runs were evaluated within tasks, otherwise over the tasks trained.
    """
    num_tasks = len(runs[0].result.matrix)
    tasks = selected(num_tasks)
    scores = _within_tasks(runs, tasks)
    if scores:
        x_label, table = "training steps", _steps_table(scores, score)
        boundaries = sorted({point.step for point in runs[0].points if not point.within_task})
    else:
        x_label, table, boundaries = "tasks trained", None, []
        matrix = np.mean([run.result.matrix for run in runs], axis=0)
        scores = {
            j: {i + 1: float(value) for i, value in enumerate(matrix[:, j]) if np.isfinite(value)}
            for j in tasks
        }
    scale, _ = scaling(score)
    lines = [
        Curve(f"task {j + 1}", list(by_x), [scale * value for value in by_x.values()], None, style)
        for style, (j, by_x) in enumerate(scores.items())
        if by_x
    ]

    def draw(width: float) -> Figure:
        limits = (-2, 102) if score.fraction else None
        return curves(lines, width, x_label, _axis(score), score, limits=limits, boundaries=boundaries)

    title, description = title + part(tasks, num_tasks), f"Line chart over {x_label}. {_ends(lines, score)}"
    return Picture(name, title, description, draw, table)


def _within_tasks(runs: Sequence[Run], tasks: Sequence[int]) -> dict[int, dict[int, float]]:
    """Return the mean score by task and step, at the steps with an evaluation in all runs."""
    by_run = [{(point.task, point.step): point.score for point in run.points} for run in runs]
    common = sorted(set.intersection(*(set(scores) for scores in by_run)))
    if not common:
        return {}
    mean: dict[int, dict[int, float]] = {j: {} for j in tasks}
    for task, step in common:
        if task in mean:
            mean[task][step] = float(np.mean([scores[task, step] for scores in by_run]))
    return mean


def _steps_table(scores: dict[int, dict[int, float]], score: Score) -> Table:
    steps = sorted({step for by_step in scores.values() for step in by_step})
    shown = steps[:: -(-len(steps) // MAX_ROWS)]
    columns = scores.values()
    rows = [
        [str(step), *(number(column[step], *scaling(score)) if step in column else "" for column in columns)]
        for step in shown
    ]
    selection = "" if len(shown) == len(steps) else f"; {len(shown)} of {len(steps)} evaluations"
    header = ["step", *(f"task {j + 1}" for j in scores)]
    return Table(caption_of(score, "on each task") + selection, header, rows)


def _slug(text: str) -> str:
    """Return a text as part of a file name."""
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")[:60]
