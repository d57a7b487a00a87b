"""The tables of a report and the definitions of its metrics, as text for HTML and Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sequel_core.report.figures import MAX_TASKS
from sequel_core.report.runs import MODES, SEEDS, Estimate, Group, Run, Study, estimate
from sequel_core.stream.arrays import FloatArray

NONE = "-"


class Table(NamedTuple):
    """A table; the first column names the rows."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Metric(NamedTuple):
    """A metric and its definition; R[i, j] is the accuracy on task j after training on task i of T."""

    key: str  # in summary.json
    name: str
    better: str  # higher or lower
    formula: str
    meaning: str


METRICS = (
    Metric(
        "average_accuracy",
        "average accuracy",
        "higher",
        "mean over j of R[T, j]",
        "Accuracy on each task after training on the last one, averaged over all tasks.",
    ),
    Metric(
        "forgetting",
        "forgetting",
        "lower",
        "mean over j < T of (max over i < T of R[i, j]) - R[T, j]",
        "Drop of each past task from its best accuracy before the last task. Negative if tasks are best at "
        "the end of the stream.",
    ),
    Metric(
        "forgetting_with_final",
        "forgetting, final included",
        "lower",
        "mean over j < T of (max over i of R[i, j]) - R[T, j]",
        "Forgetting whose maximum includes the final accuracy, so that it is never negative.",
    ),
    Metric(
        "bwt",
        "backward transfer",
        "higher",
        "mean over j < T of R[T, j] - R[j, j]",
        "Change of the accuracy on each task between its training and the end of the stream. Negative values "
        "mean forgetting.",
    ),
    Metric(
        "fwt",
        "forward transfer",
        "higher",
        "mean over j > 1 of R[j - 1, j] - b[j]",
        "Accuracy on each task just before its training, minus the accuracy b[j] of the untrained network. "
        "Measured if evaluate_future=true.",
    ),
    Metric(
        "learning_accuracy",
        "learning accuracy",
        "higher",
        "mean over j of R[j, j]",
        "Accuracy on each task right after its training: how well the method learns new tasks.",
    ),
    Metric(
        "average_incremental_accuracy",
        "average incremental accuracy",
        "higher",
        "mean over i of (mean over j <= i of R[i, j])",
        "Average accuracy on the tasks seen so far, averaged over the stream.",
    ),
    Metric(
        "average_incremental_accuracy_over_samples",
        "average incremental accuracy, over samples",
        "higher",
        "mean over i of (sum over j <= i of n[j] R[i, j]) / (sum over j <= i of n[j])",
        "Accuracy on all samples of the tasks seen so far, averaged over the stream. Task j has n[j] "
        "samples.",
    ),
    Metric(
        "worst_case_accuracy",
        "worst-case accuracy",
        "higher",
        "1/T R[T, T] + (1 - 1/T) mean over j < T of (min over i > j of R[i, j])",
        "Average of the final accuracy on the last task and the lowest accuracy on each past task after a "
        "later one.",
    ),
    Metric(
        "masked_average_accuracy",
        "masked average accuracy",
        "higher",
        "the average accuracy with the logits of other tasks masked",
        "In the class scenario: the accuracy if the network were given the task of each sample.",
    ),
    Metric(
        "validation_average_accuracy",
        "validation average accuracy",
        "higher",
        "the average accuracy on the validation samples",
        "Measured once, at the end of the run, on held-out training samples. Use it to choose settings.",
    ),
    Metric(
        "test_average_accuracy",
        "test average accuracy",
        "higher",
        "the average accuracy on the test samples",
        "Measured once, at the end of the run. The accuracy matrix is measured on the validation samples.",
    ),
)
"""All metrics, in the order of the columns. A report shows those that a finished run has."""

OTHER = "_average_accuracy"

COSTS = {
    "training steps": "Training batches over all tasks.",
    "seconds": "Wall-clock time of the whole run.",
    "training": "Seconds spent on training, including the work of the method at the end of each task.",
    "evaluation": "Seconds spent on evaluation.",
    "other": "The remaining seconds: building, compiling and writing files.",
    "training steps per second": "Training steps divided by the seconds spent on training.",
    "memory of the method, MiB": "What the method keeps: samples, anchors, importances, old networks.",
    "peak memory of the process, MiB": "Largest memory use of the process, including libraries and data.",
    "threads": "CPU threads that the framework uses.",
}
"""The columns of the table of costs and their definitions."""


def shown_metrics(study: Study) -> list[Metric]:
    """Return the metrics that a finished run has.

    Average accuracies that are not in `METRICS` come from methods with a second prediction rule, such as the
    head of iCaRL; they are added at the end.
    """
    finished = [run for group in study.groups for run in group.finished]
    known = {metric.key for metric in METRICS}
    keys = dict.fromkeys(key for run in finished for key in run.result.summary if key.endswith(OTHER))
    added = [
        Metric(
            key,
            key.replace("_", " "),
            "higher",
            f"the average accuracy with {key.removesuffix(OTHER)}",
            "The accuracy with another prediction rule of the method.",
        )
        for key in keys
        if key not in known
    ]
    splits = {run.result.summary.get("split") for run in finished}

    def shown(metric: Metric) -> bool:
        equals_average_accuracy = {f"{split}{OTHER}" for split in splits} == {metric.key}
        measured = any(math.isfinite(run.number(metric.key)) for run in finished)
        return measured and not equals_average_accuracy

    return [metric for metric in (*METRICS, *added) if shown(metric)]


def results(study: Study) -> Table:
    """Return the metrics of all groups, in percent."""
    metrics = shown_metrics(study)
    rows = []
    for group in study.groups:
        finished, started = len(group.finished), len(group.runs)
        runs = str(finished) if finished == started else f"{finished} of {started}"
        values = [group.estimate(metric.key).text(100) for metric in metrics]
        rows.append([group.label, runs, *values])
    caption = "Percent; mean over finished runs ± half-width of its 95 % confidence interval (Student's t)"
    return Table(caption, ["configuration", "runs", *(metric.name for metric in metrics)], rows)


def pairs(study: Study) -> list[tuple[Group, Group]]:
    """Return the groups with finished runs in both frameworks, as pairs of PyTorch and JAX."""
    groups = {(group.method, group.mode): group for group in study.groups if group.finished}
    pytorch, jax = MODES
    return [
        (group, groups[method, jax])
        for (method, mode), group in groups.items()
        if mode == pytorch and (method, jax) in groups
    ]


def frameworks(study: Study) -> Table:
    """Return the average accuracy in both frameworks and the difference between runs with equal seeds."""
    header = [
        "configuration",
        *MODES.values(),
        "common seeds",
        "JAX - PyTorch, equal seeds",
        "largest difference in the accuracy matrix",
    ]
    caption = "Average accuracy in percent, differences in percentage points"
    return Table(caption, header, [_framework_row(*pair) for pair in pairs(study)])


def _framework_row(pytorch: Group, jax: Group) -> list[str]:
    by_seed = {tuple(run.seeds.items()): run.result.matrix for run in jax.finished}
    differences = [
        by_seed[seeds] - run.result.matrix
        for run in pytorch.finished
        if (seeds := tuple(run.seeds.items())) in by_seed
    ]
    largest = [float(np.nanmax(np.abs(difference), initial=0)) for difference in differences]
    return [
        pytorch.method,
        pytorch.estimate("average_accuracy").text(100),
        jax.estimate("average_accuracy").text(100),
        str(len(differences)),
        estimate([float(difference[-1].mean()) for difference in differences]).text(100),
        f"{100 * max(largest):.2f}" if largest else NONE,
    ]


def final_accuracies(study: Study) -> Table:
    """Return the accuracy on each task after training on the last one, in percent."""
    groups = [group for group in study.groups if group.finished]
    num_tasks = max((len(group.finished[0].result.matrix) for group in groups), default=0)
    tasks = selected(num_tasks)
    rows = [[group.label, *(value.text(100) for value in _final(group, tasks))] for group in groups]
    caption = f"Accuracy on each task after training on the last one, percent{part(tasks, num_tasks)}"
    return Table(caption, ["configuration", *(f"task {j + 1}" for j in tasks)], rows)


def _final(group: Group, tasks: Sequence[int]) -> list[Estimate]:
    last = [run.result.matrix[-1] for run in group.finished]
    return [estimate([row[j] for row in last if j < len(row)]) for j in tasks]


def costs(study: Study) -> Table:
    """Return the time and memory of all groups with finished runs."""
    rows = []
    for group in study.groups:
        if group.finished:
            rates = [_rate(run) for run in group.finished]
            phases = ("total", "train", "evaluate", "other")
            rows.append(
                [
                    group.label,
                    group.estimate("steps").text(1, 0),
                    *(group.estimate("seconds", phase).text(1, 1) for phase in phases),
                    estimate(rates).text(1, 0 if max(rates) >= 100 else 1),
                    group.estimate("memory_bytes").text(1 / 2**20),
                    group.estimate("peak_memory_bytes").text(1 / 2**20, 0),
                    group.estimate("threads").text(1, 0),
                ]
            )
    caption = "Mean over finished runs ± half-width of its 95 % confidence interval"
    return Table(caption, ["configuration", *COSTS], rows)


def _rate(run: Run) -> float:
    seconds = run.number("seconds", "train")
    return run.number("steps") / seconds if seconds > 0 else math.nan


def configuration(study: Study) -> Table:
    """Return the settings in which groups differ."""
    keys = study.differences()
    rows = [[key, *(group.settings.get(key, NONE) for group in study.groups)] for key in keys]
    header = ["setting", *(group.label for group in study.groups)]
    return Table("Settings that differ between the configurations", header, rows)


def shared(study: Study) -> Table:
    """Return the settings that all groups have in common."""
    differ = study.differences()
    rows = [[key, value] for key, value in study.groups[0].settings.items() if key not in differ]
    return Table("Settings that all configurations share", ["setting", "value"], rows)


def every_run(study: Study) -> Table:
    """Return all runs with their status."""
    rows = []
    keys = [key for key in SEEDS if any(key in run.seeds for run in study.runs)]
    versions = len({run.result.version for run in study.runs}) > 1
    for group in study.groups:
        for run in group.runs:
            seeds = [run.seeds.get(key, "") for key in keys]
            accuracy = estimate([run.number("average_accuracy")]).text(100) if run.finished else NONE
            tasks = f"{run.trained} of {len(run.result.matrix)}" if run.result.matrix.size else NONE
            version = [run.result.version or ""] if versions else []
            values = [run.name, group.label, *seeds, *version, run.status, tasks, accuracy, run.reason]
            rows.append([value or NONE for value in values])
    version = ["SequeL version"] if versions else []
    header = ["run", "configuration", *keys, *version, "status", "tasks", "average accuracy, %", "reason"]
    if not any(run.reason for run in study.runs):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return Table("Means include finished runs only", header, rows)


def matrix_numbers(matrix: FloatArray) -> Table:
    """Return an accuracy matrix `[T, T]` in percent; if T is large, the entries of selected tasks."""
    tasks = selected(len(matrix))

    def text(value: float) -> str:
        return "" if math.isnan(value) else f"{100 * value:.2f}"

    rows = [[f"after task {i + 1}", *(text(matrix[i, j]) for j in tasks)] for i in tasks]
    caption = f"Accuracy on each task, percent{part(tasks, len(matrix))}"
    return Table(caption, ["", *(f"task {j + 1}" for j in tasks)], rows)


def part(tasks: Sequence[int], num_tasks: int) -> str:
    """Return the end of a caption that says how many tasks are shown; empty for all.

    Example:
        >>> part(selected(100), 100)
        '; 10 of 100 tasks'
    """
    return "" if len(tasks) == num_tasks else f"; {len(tasks)} of {num_tasks} tasks"


def selected(num_tasks: int) -> list[int]:
    """Return the indices of the tasks to show.

    Args:
        num_tasks: number of tasks T, >= 0.

    Returns:
        All tasks if T <= `MAX_TASKS`; otherwise `MAX_TASKS // 2`, evenly spaced from the first to the last.

    Example:
        >>> selected(3), selected(100)
        ([0, 1, 2], [0, 11, 22, 33, 44, 55, 66, 77, 88, 99])
    """
    if num_tasks <= MAX_TASKS:
        return list(range(num_tasks))
    return [round(float(j)) for j in np.linspace(0, num_tasks - 1, MAX_TASKS // 2)]
