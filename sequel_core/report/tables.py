"""The tables of a report and what its metrics mean; text, for HTML and Markdown alike."""

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
    """A metric and what it means; R[i, j] is the accuracy on task j after training on task i, of T tasks."""

    key: str  # in summary.json
    name: str
    better: str
    formula: str
    meaning: str


METRICS = (
    Metric(
        "average_accuracy",
        "average accuracy",
        "higher",
        "mean over j of R[T, j]",
        "Accuracy on each task after training on the last one, mean over all tasks.",
    ),
    Metric(
        "forgetting",
        "forgetting",
        "lower",
        "mean over j < T of (max over i < T of R[i, j]) - R[T, j]",
        "How far each past task fell from its best accuracy before the last task. Below zero, tasks ended at "
        "their best.",
    ),
    Metric(
        "forgetting_with_final",
        "forgetting, final included",
        "lower",
        "mean over j < T of (max over i of R[i, j]) - R[T, j]",
        "The same with the final accuracy among those that the best is taken from, so that it is never below "
        "zero.",
    ),
    Metric(
        "bwt",
        "backward transfer",
        "higher",
        "mean over j < T of R[T, j] - R[j, j]",
        "What later tasks did to a task since it was trained. Below zero is forgetting.",
    ),
    Metric(
        "fwt",
        "forward transfer",
        "higher",
        "mean over j > 1 of R[j - 1, j] - b[j]",
        "What earlier tasks give to a task not yet trained, beside the untrained network's accuracy b. "
        "Measured with evaluate_future=true.",
    ),
    Metric(
        "learning_accuracy",
        "learning accuracy",
        "higher",
        "mean over j of R[j, j]",
        "Accuracy on each task just after its training: how well the method still learns.",
    ),
    Metric(
        "average_incremental_accuracy",
        "average incremental accuracy",
        "higher",
        "mean over i of (mean over j <= i of R[i, j])",
        "The accuracy on the tasks seen so far, averaged over these tasks and then over the stream.",
    ),
    Metric(
        "average_incremental_accuracy_over_samples",
        "average incremental accuracy, over samples",
        "higher",
        "mean over i of (sum over j <= i of n[j] R[i, j]) / (sum over j <= i of n[j])",
        "The accuracy on all samples of the tasks seen so far, averaged over the stream; task j has n[j] "
        "samples.",
    ),
    Metric(
        "worst_case_accuracy",
        "worst-case accuracy",
        "higher",
        "1/T R[T, T] + (1 - 1/T) mean over j < T of (min over i > j of R[i, j])",
        "Past tasks count with the lowest accuracy that they had after a later task, the last task with its "
        "own.",
    ),
    Metric(
        "masked_average_accuracy",
        "masked average accuracy",
        "higher",
        "the average accuracy with the logits of other tasks masked",
        "In the class scenario: how accurate the network would be if it were told the task of each sample.",
    ),
    Metric(
        "validation_average_accuracy",
        "validation average accuracy",
        "higher",
        "the average accuracy on the validation samples",
        "Measured once at the end, on training samples that were held out; for choosing settings.",
    ),
    Metric(
        "test_average_accuracy",
        "test average accuracy",
        "higher",
        "the average accuracy on the test samples",
        "Measured once at the end where the matrix is measured on validation samples.",
    ),
)
"""In the order of the columns; those with a value in some run are shown."""

OTHER = "_average_accuracy"

COSTS = {
    "training steps": "Batches trained on, all tasks together.",
    "seconds": "Of the whole run, on the clock.",
    "training": "Seconds spent in training, the work of the method at the ends of tasks included.",
    "evaluation": "Seconds spent in evaluation.",
    "other": "Seconds spent in neither: building, compiling, writing.",
    "steps per second of training": "Training steps over seconds of training.",
    "memory of the method, MiB": "What the method keeps: samples, anchors, importances, old networks.",
    "peak of the process, MiB": "The most memory that the process held, libraries and data included.",
    "threads": "Of the framework, on the processor.",
}
"""What the columns of the table of costs mean."""


def shown_metrics(study: Study) -> list[Metric]:
    """Return the metrics that some finished run has, with those that a method adds, such as iCaRL's head."""
    finished = [run for group in study.groups for run in group.finished]
    keys = dict.fromkeys(key for run in finished for key in run.result.summary if key.endswith(OTHER))
    added = [
        Metric(
            key,
            key.replace("_", " "),
            "higher",
            f"the average accuracy with {key.removesuffix(OTHER)}",
            "What the method can predict with beside its own rule.",
        )
        for key in keys
        if key not in {metric.key for metric in METRICS}
    ]

    def has(metric: Metric) -> bool:
        twice = {f"{run.result.summary.get('split')}_average_accuracy" for run in finished}
        return twice != {metric.key} and any(math.isfinite(run.number(metric.key)) for run in finished)

    return [metric for metric in (*METRICS, *added) if has(metric)]


def results(study: Study) -> Table:
    """Return every metric of every group, in percent."""
    metrics = shown_metrics(study)
    rows = []
    for group in study.groups:
        done, started = len(group.finished), len(group.runs)
        runs = str(done) if done == started else f"{done} of {started}"
        values = [group.estimate(metric.key).text(100) for metric in metrics]
        rows.append([group.label, runs, *values])
    caption = "Percent: mean over finished runs ± half of its 95 % confidence interval (Student's t)"
    return Table(caption, ["configuration", "runs", *(metric.name for metric in metrics)], rows)


def pairs(study: Study) -> list[tuple[Group, Group]]:
    """Return the groups that differ in nothing but the framework and have finished runs, PyTorch first."""
    groups = {(group.method, group.mode): group for group in study.groups if group.finished}
    pytorch, jax = MODES
    return [
        (group, groups[method, jax])
        for (method, mode), group in groups.items()
        if mode == pytorch and (method, jax) in groups
    ]


def beside(study: Study) -> Table:
    """Return both frameworks' average accuracy, and how far runs of one seed lie apart, in percent."""
    rows = []
    for one, other in pairs(study):
        by_seed = {tuple(run.seeds.items()): run.result.matrix for run in other.finished}
        same = [
            (run.result.matrix, by_seed[seeds])
            for run in one.finished
            if (seeds := tuple(run.seeds.items())) in by_seed
        ]
        means = [float(b[-1].mean() - a[-1].mean()) for a, b in same]
        largest = [float(np.nanmax(np.abs(a - b), initial=0)) for a, b in same]
        rows.append(
            [
                one.method,
                one.estimate("average_accuracy").text(100),
                other.estimate("average_accuracy").text(100),
                str(len(same)),
                estimate(means).text(100),
                f"{100 * max(largest):.2f}" if largest else NONE,
            ]
        )
    header = [
        "configuration",
        *MODES.values(),
        "seeds in common",
        "JAX - PyTorch, seed by seed",
        "largest difference of an entry of the matrix",
    ]
    return Table("Average accuracy in percent, and percentage points between the frameworks", header, rows)


def final_accuracies(study: Study) -> Table:
    """Return the accuracy of each task after the last one, in percent."""
    done = [group for group in study.groups if group.finished]
    tasks = picked(max((len(group.finished[0].result.matrix) for group in done), default=0))
    rows = [[group.label, *(value.text(100) for value in _final(group, tasks))] for group in done]
    caption = "Accuracy on each task after the last one, percent" + _of(tasks, done)
    return Table(caption, ["configuration", *(f"task {j + 1}" for j in tasks)], rows)


def _final(group: Group, tasks: Sequence[int]) -> list[Estimate]:
    last = [run.result.matrix[-1] for run in group.finished]
    return [estimate([row[j] for row in last if j < len(row)]) for j in tasks]


def _of(tasks: Sequence[int], groups: Sequence[Group]) -> str:
    total = max((len(group.finished[0].result.matrix) for group in groups), default=0)
    return "" if len(tasks) == total else f"; {len(tasks)} of {total} tasks"


def costs(study: Study) -> Table:
    """Return time and memory of every group with finished runs."""
    rows = []
    for group in study.groups:
        if group.finished:
            rates = [_rate(run) for run in group.finished]
            kinds = ("total", "train", "evaluate", "other")
            rows.append(
                [
                    group.label,
                    group.estimate("steps").text(1, 0),
                    *(group.estimate("seconds", kind).text(1, 1) for kind in kinds),
                    estimate(rates).text(1, 0 if max(rates) >= 100 else 1),
                    group.estimate("memory_bytes").text(1 / 2**20),
                    group.estimate("peak_memory_bytes").text(1 / 2**20, 0),
                    group.estimate("threads").text(1, 0),
                ]
            )
    caption = "Means over finished runs, and half of the 95 % confidence interval"
    return Table(caption, ["configuration", *COSTS], rows)


def _rate(run: Run) -> float:
    seconds = run.number("seconds", "train")
    return run.number("steps") / seconds if seconds > 0 else math.nan


def configuration(study: Study) -> Table:
    """Return the settings in which groups differ."""
    keys = study.differences()
    rows = [[key, *(group.settings.get(key, NONE) for group in study.groups)] for key in keys]
    caption = "Settings that are not the same in all configurations; seeds aside"
    return Table(caption, ["setting", *(group.label for group in study.groups)], rows)


def shared(study: Study) -> Table:
    """Return the settings that all groups have in common."""
    differ = study.differences()
    rows = [[key, value] for key, value in study.groups[0].settings.items() if key not in differ]
    return Table("Settings that all configurations share", ["setting", "value"], rows)


def every_run(study: Study) -> Table:
    """Return every run with its status."""
    rows = []
    keys = [key for key in SEEDS if any(key in run.seeds for run in study.runs)]
    several = len({run.result.version for run in study.runs}) > 1
    for group in study.groups:
        for run in group.runs:
            seeds = [run.seeds.get(key, "") for key in keys]
            accuracy = estimate([run.number("average_accuracy")]).text(100) if run.finished else NONE
            tasks = f"{run.trained} of {len(run.result.matrix)}" if run.result.matrix.size else NONE
            wrote = [run.result.version or ""] if several else []
            values = [run.name, group.label, *seeds, *wrote, run.status, tasks, accuracy, run.reason]
            rows.append([value or NONE for value in values])
    wrote = ["written by"] if several else []
    header = ["run", "configuration", *keys, *wrote, "status", "tasks", "average accuracy, %", "why it ended"]
    if not any(run.reason for run in study.runs):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return Table("Only finished runs count in means", header, rows)


def matrix_numbers(matrix: FloatArray) -> Table:
    """Return an accuracy matrix in percent; of a large one some tasks, evenly spaced."""
    tasks = picked(len(matrix))

    def text(value: float) -> str:
        return "" if math.isnan(value) else f"{100 * value:.2f}"

    rows = [[f"after task {i + 1}", *(text(matrix[i, j]) for j in tasks)] for i in tasks]
    part = "" if len(tasks) == len(matrix) else f"; {len(tasks)} of {len(matrix)} tasks"
    return Table(f"Accuracy on each task, percent{part}", ["", *(f"task {j + 1}" for j in tasks)], rows)


def picked(tasks: int) -> list[int]:
    """Return all tasks; of more than `MAX_TASKS` half as many, evenly spaced, with the first and the last."""
    if tasks <= MAX_TASKS:
        return list(range(tasks))
    return [round(float(j)) for j in np.linspace(0, tasks - 1, MAX_TASKS // 2)]
