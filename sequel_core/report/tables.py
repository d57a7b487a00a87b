"""The tables of a report and the definitions of its metrics, as text for HTML and Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sequel_core.objectives import Score
from sequel_core.report.figures import MAX_TASKS
from sequel_core.report.runs import MODES, SEEDS, Estimate, Group, Run, Study, estimate, section
from sequel_core.runs.formatting import number, scaling
from sequel_core.runs.statistics import PairedTest, compare_pairs, ranks
from sequel_core.stream.arrays import FloatArray

NONE = "-"

MAX_COMPARED = 10
"""Largest number of configurations of which every two are compared: 45 tests of about 50 ms."""


class Table(NamedTuple):
    """A table; the first column names the rows."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Metric(NamedTuple):
    """A metric and its definition; R[i, j] is the score on task j after training on task i, from 0."""

    key: str  # in summary.json
    name: str
    better: str  # higher or lower
    formula: str
    meaning: str


def all_metrics(score: Score) -> list[Metric]:
    """Return all metrics of a score, in the order of the columns."""
    name, title, key, better = (
        score.name,
        score.title,
        score.key,
        "higher" if score.higher_is_better else "lower",
    )
    best, worst, drop = ("max", "min", "Drop") if score.higher_is_better else ("min", "max", "Rise")

    def gain(new: str, old: str) -> str:
        return f"{new} - {old}" if score.higher_is_better else f"{old} - {new}"

    return [
        Metric(
            f"average_{key}",
            f"average {name}",
            better,
            "mean over j of R[T-1, j]",
            f"{title} on each task after training on the last one, averaged over all tasks.",
        ),
        Metric(
            "forgetting",
            "forgetting",
            "lower",
            f"mean over j < T-1 of {gain(f'({best} over i < T-1 of R[i, j])', 'R[T-1, j]')}",
            f"{drop} of each past task from its best {name} before the last task. Negative if tasks are best "
            "at the end of the stream.",
        ),
        Metric(
            "forgetting_with_final",
            "forgetting, final included",
            "lower",
            f"mean over j < T-1 of {gain(f'({best} over i of R[i, j])', 'R[T-1, j]')}",
            f"Forgetting whose {best}imum includes the final {name}, so that it is never negative.",
        ),
        Metric(
            "bwt",
            "backward transfer",
            "higher",
            f"mean over j < T-1 of {gain('R[T-1, j]', 'R[j, j]')}",
            f"Change of the {name} on each task between its training and the end of the stream. Negative "
            "values mean forgetting.",
        ),
        Metric(
            "fwt",
            "forward transfer",
            "higher",
            f"mean over j >= 1 of {gain('R[j-1, j]', 'b[j]')}",
            f"{title} on each task just before its training, compared with the {name} b[j] of the untrained "
            "network. Measured if evaluate_future=true.",
        ),
        Metric(
            f"learning_{key}",
            f"learning {name}",
            better,
            "mean over j of R[j, j]",
            f"{title} on each task right after its training: how well the method learns new tasks.",
        ),
        Metric(
            f"average_incremental_{key}",
            f"average incremental {name}",
            better,
            "mean over i of (mean over j <= i of R[i, j])",
            f"Average {name} on the tasks seen so far, averaged over the stream.",
        ),
        Metric(
            f"average_incremental_{key}_over_samples",
            f"average incremental {name}, over samples",
            better,
            "mean over i of (sum over j <= i of n[j] R[i, j]) / (sum over j <= i of n[j])",
            f"{title} on all samples of the tasks seen so far, averaged over the stream. Task j has n[j] "
            "samples.",
        ),
        Metric(
            f"worst_case_{key}",
            f"worst-case {name}",
            better,
            f"1/T R[T-1, T-1] + (1 - 1/T) mean over j < T-1 of ({worst} over i > j of R[i, j])",
            f"Average of the final {name} on the last task and the worst {name} on each past task after a "
            "later one.",
        ),
        Metric(
            f"masked_average_{key}",
            f"masked average {name}",
            better,
            f"the average {name} with the logits of other tasks masked",
            f"In the class scenario: the {name} if the network were given the task of each sample.",
        ),
        Metric(
            f"validation_average_{key}",
            f"validation average {name}",
            better,
            f"the average {name} on the validation samples",
            "Measured once, at the end of the run, on held-out training samples. Use it to choose settings.",
        ),
        Metric(
            f"test_average_{key}",
            f"test average {name}",
            better,
            f"the average {name} on the test samples",
            f"Measured once, at the end of the run. The {name} matrix is measured on the validation samples.",
        ),
    ]


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

    Average scores that are not in `all_metrics` come from methods with a second prediction rule, such as the
    head of iCaRL; they are added at the end.
    """
    score = study.score
    metrics, suffix = all_metrics(score), f"_average_{score.key}"
    finished = [run for group in study.groups for run in group.finished]
    known = {metric.key for metric in metrics}
    keys = dict.fromkeys(key for run in finished for key in run.result.summary if key.endswith(suffix))
    added = [
        Metric(
            key,
            key.replace("_", " "),
            metrics[0].better,
            f"the average {score.name} with {key.removesuffix(suffix)}",
            f"The {score.name} with another prediction rule of the method.",
        )
        for key in keys
        if key not in known
    ]
    splits = {run.result.summary.get("split") for run in finished}

    def shown(metric: Metric) -> bool:
        equals_average_score = {f"{split}{suffix}" for split in splits} == {metric.key}
        measured = any(math.isfinite(run.result.number(metric.key)) for run in finished)
        return measured and not equals_average_score

    return [metric for metric in (*metrics, *added) if shown(metric)]


def results(study: Study) -> Table:
    """Return the metrics of all groups."""
    metrics = shown_metrics(study)
    rows = []
    for group in study.groups:
        finished, started = len(group.finished), len(group.runs)
        runs = str(finished) if finished == started else f"{finished} of {started}"
        values = [group.estimate(metric.key).text(*scaling(study.score)) for metric in metrics]
        rows.append([group.label, runs, *values])
    caption = "mean over finished runs ± half-width of its 95 % confidence interval (Student's t)"
    caption = f"Percent; {caption}" if study.score.fraction else f"M{caption[1:]}"
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
    """Return the average score in both frameworks and the difference between runs with equal seeds."""
    header = [
        "configuration",
        *MODES.values(),
        "common seeds",
        "JAX - PyTorch, equal seeds",
        f"largest difference in the {study.score.name} matrix",
    ]
    caption = f"Average {study.score.name}"
    caption += " in percent, differences in percentage points" if study.score.fraction else ""
    return Table(caption, header, [_framework_row(*pair, study.score) for pair in pairs(study)])


def _framework_row(pytorch: Group, jax: Group, score: Score) -> list[str]:
    by_seed = {tuple(run.seeds.items()): run.result.matrix for run in jax.finished}
    differences = [
        by_seed[seeds] - run.result.matrix
        for run in pytorch.finished
        if (seeds := tuple(run.seeds.items())) in by_seed
    ]
    largest = [float(np.nanmax(np.abs(difference), initial=0)) for difference in differences]
    return [
        pytorch.method,
        pytorch.estimate(score.of("average_score")).text(*scaling(score)),
        jax.estimate(score.of("average_score")).text(*scaling(score)),
        str(len(differences)),
        estimate([float(difference[-1].mean()) for difference in differences]).text(*scaling(score)),
        number(max(largest, default=math.nan), *scaling(score)),
    ]


def comparisons(study: Study) -> Table:
    """Return the tests of the average score, paired by seed: every two configurations on one stream.

    Streams with more than `MAX_COMPARED` configurations in one framework are left out.
    """
    streams: dict[tuple[str, ...], list[Group]] = {}
    for group in study.groups:
        stream = [f"{key}={value}" for key, value in group.settings.items() if key.startswith("benchmark.")]
        streams.setdefault((group.mode, group.settings["evaluate_on"], *stream), []).append(group)
    key, rows, score = study.score.of("average_score"), list[Sequence[str]](), study.score
    for groups in streams.values():
        if len(groups) <= MAX_COMPARED:
            scores = {
                group.label: {tuple(run.seeds.items()): run.result.number(key) for run in group.finished}
                for group in groups
            }
            rows += [_comparison_row(test, score) for test in compare_pairs(scores)]
    unit = " in percentage points" if score.fraction else ""
    caption = (
        f"Difference of the average {score.name}{unit}, paired by seed, with 95 % intervals. p values are "
        "two-sided; the corrected one is that of the permutation test, with Holm's correction for all "
        "comparisons on one stream in one framework. The effect size is the mean difference divided by the "
        "standard deviation of the differences"
    )
    header = ["first", "second", "seeds", "first - second", "Student", "bootstrap", "effect size"]
    header += ["p, Student", "p, Wilcoxon", "p, permutation", "corrected p", "seeds needed"]
    return Table(caption, header, rows)


def _comparison_row(test: PairedTest, score: Score) -> list[str]:
    scale = scaling(score)
    intervals = [
        " to ".join(number(bound, *scale) for bound in bounds) for bounds in (test.interval, test.bootstrap)
    ]
    p_values = [f"{p:.2g}" for p in (test.student, test.wilcoxon, test.permutation, test.corrected)]
    difference, effect = number(test.difference, *scale), number(test.effect_size)
    seeds = [str(test.num_pairs), str(test.pairs_needed)]
    return [test.first, test.second, seeds[0], difference, *intervals, effect, *p_values, seeds[1]]


def ranking(study: Study) -> Table:
    """Return the mean ranks of the methods over benchmarks, if there are at least two and three methods.

    A method takes part if it has one configuration on each benchmark.
    """
    score, rows, notes = study.score, list[Sequence[str]](), []
    for mode, name in MODES.items():
        cells: dict[str, dict[str, list[Group]]] = {}
        for group in study.groups:
            if group.mode == mode and group.finished:
                method, stream = (section(group.settings, key) for key in ("algo", "benchmark"))
                cells.setdefault(method, {}).setdefault(stream, []).append(group)
        streams = dict.fromkeys(stream for by_stream in cells.values() for stream in by_stream)
        ranked = [m for m, by_stream in cells.items() if all(len(by_stream.get(s, ())) == 1 for s in streams)]
        if len(streams) > 1 and len(ranked) > 2:
            means = [
                [cells[m][s][0].estimate(score.of("average_score")).mean for m in ranked] for s in streams
            ]
            result = ranks(means, score.higher_is_better)
            rows += [[m, name, number(rank)] for m, rank in zip(ranked, result.mean, strict=True)]
            critical = number(result.critical_difference)
            notes.append(f"{name}: critical difference {critical}, Friedman's p = {result.p:.2g}")
    caption = "Mean rank over benchmarks, 1 is best; methods whose ranks differ by more than the critical "
    caption += f"difference are different at the level 5 % (Nemenyi). {'; '.join(notes)}"
    return Table(caption, ["method", "framework", "mean rank"], rows)


def final_scores(study: Study) -> Table:
    """Return the score on each task after training on the last one."""
    score = study.score
    groups = [group for group in study.groups if group.finished]
    num_tasks = max((len(group.finished[0].result.matrix) for group in groups), default=0)
    tasks = selected(num_tasks)
    rows = [[group.label, *(v.text(*scaling(score)) for v in _final(group, tasks))] for group in groups]
    caption = f"{caption_of(score, 'on each task after training on the last one')}{part(tasks, num_tasks)}"
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
    seconds = run.result.number("seconds", "train")
    return run.result.number("steps") / seconds if seconds > 0 else math.nan


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
    rows, score = [], study.score
    keys = [key for key in SEEDS if any(key in run.seeds for run in study.runs)]
    versions = len({run.result.version for run in study.runs}) > 1
    for group in study.groups:
        for run in group.runs:
            seeds = [run.seeds.get(key, "") for key in keys]
            average = number(run.result.metric("average_score"), *scaling(score)) if run.finished else NONE
            tasks = f"{run.trained} of {len(run.result.matrix)}" if run.result.matrix.size else NONE
            version = [run.result.version or ""] if versions else []
            values = [run.name, group.label, *seeds, *version, run.status, tasks, average, run.reason]
            rows.append([value or NONE for value in values])
    version = ["SequeL version"] if versions else []
    average = f"average {score.name}{', %' if score.fraction else ''}"
    header = ["run", "configuration", *keys, *version, "status", "tasks", average, "reason"]
    if not any(run.reason for run in study.runs):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return Table("Means include finished runs only", header, rows)


def matrix_numbers(matrix: FloatArray, score: Score) -> Table:
    """Return a matrix of scores `[T, T]`; if T is large, the entries of selected tasks."""
    tasks = selected(len(matrix))

    def text(value: float) -> str:
        return "" if math.isnan(value) else number(value, *scaling(score))

    rows = [[f"after task {i + 1}", *(text(matrix[i, j]) for j in tasks)] for i in tasks]
    caption = f"{caption_of(score, 'on each task')}{part(tasks, len(matrix))}"
    return Table(caption, ["", *(f"task {j + 1}" for j in tasks)], rows)


def caption_of(score: Score, what: str) -> str:
    """Return a caption that starts with the name of a score and ends with its unit, if it has one.

    Example:
        >>> caption_of(Score("accuracy"), "on each task")
        'Accuracy on each task, percent'
    """
    return f"{score.title} {what}{', percent' if score.fraction else ''}"


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
