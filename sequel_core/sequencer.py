"""The orchestrator: runs a learner over the tasks of a benchmark, evaluates, and records."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sequel_core import metrics, plan
from sequel_core.console import Display
from sequel_core.learner import DivergenceError, EvaluateEvery, Evaluation, FitMonitor, Learner, Progress
from sequel_core.results import Result, RunDirectory, load_result, peak_memory_bytes, versions
from sequel_core.task import Benchmark, FloatArray, Task

EvaluateOn = Literal["test", "validation"]


def run(
    learner: Learner,
    benchmark: Benchmark,
    *,
    run_dir: str | Path | None = None,
    evaluate_every: EvaluateEvery = "task",
    evaluate_on: EvaluateOn = "test",
    evaluate_future: bool = False,
    config: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> Result:
    """Train on every task in turn, evaluate, and record in a run directory.

    Args:
        learner: with an algorithm, in one of the frameworks.
        benchmark: the stream that the learner was made for.
        run_dir: an empty or new directory; None for a new one under `runs/`.
        evaluate_every: after each task; with `"epoch"` or a number of steps also within it. The accuracy
            matrix always holds what was measured after each task.
        evaluate_on: the split that the matrix is measured on, `test` or `validation`; the other one, where
            the benchmark has it, is measured once, at the end.
        evaluate_future: evaluate all tasks, also those to come and, before training, the untrained network:
            what forward transfer needs. Otherwise only the tasks seen so far.
        config: what to record as the run's configuration; None for what the learner and the benchmark tell of
            themselves.
        progress: False to print nothing; None to show progress bars on a terminal only.

    Returns:
        The accuracy matrix `[T, T]` and the summary; the same is in `run_dir`, for `sequel_core.load_result`.

    Raises:
        ValueError: a setting that does not fit the benchmark, or a run directory that cannot be used; nothing
            was trained.
        DivergenceError: the loss is no longer finite; what was recorded until then is kept, with status
            `diverged`.
    """
    _check(learner, benchmark, evaluate_every, evaluate_on)
    recorder = _Recorder(
        learner, benchmark, RunDirectory.create(run_dir), evaluate_on, Display(benchmark, progress)
    )
    described = _describe(learner, benchmark) if config is None else config
    recorder.directory.write_config(described)
    everything = range(len(benchmark))
    with recorder.display, recorder.finishing():
        learner.log_hparams(described)
        if evaluate_future:
            recorder.baseline = recorder.evaluate(everything, after=None)
        for task in learner.hparams.training_tasks(benchmark, learner.training.seed):
            seen = everything if evaluate_future else everything[: task.index + 1]
            monitor = FitMonitor(
                on_progress=partial(recorder.progress, task),
                on_evaluate=partial(recorder.evaluate_within, seen, task.index),
                evaluate_every=evaluate_every,
            )
            recorder.display.start(task, learner.training.epochs(task.index))
            with recorder.timed("train"):
                learner.fit_task(task, monitor)
            recorder.matrix[task.index] = recorder.evaluate(seen, after=task.index)
            recorder.directory.write_matrix(recorder.matrix)
            recorder.display.finish(task, recorder.matrix[task.index])
        recorder.final_evaluation()
    result = recorder.result()
    recorder.display.summarise(result)
    return result


def _check(
    learner: Learner, benchmark: Benchmark, evaluate_every: EvaluateEvery, evaluate_on: EvaluateOn
) -> None:
    spec, made_for = benchmark.spec, learner.spec
    if (spec.image_shape, spec.num_classes) != (made_for.image_shape, made_for.num_classes):
        raise ValueError(
            f"the learner was made for {made_for.num_classes} classes and images {made_for.image_shape}, "
            f"benchmark {benchmark.name} has {spec.num_classes} and {spec.image_shape}; "
            "make it with this benchmark"
        )
    if evaluate_every not in ("task", "epoch") and not (type(evaluate_every) is int and evaluate_every > 0):
        raise ValueError(
            f"evaluate_every must be task, epoch or a number of steps >= 1, got {evaluate_every!r}"
        )
    if evaluate_on not in ("test", "validation"):
        raise ValueError(f"evaluate_on must be test or validation, got {evaluate_on!r}")
    for task in learner.hparams.training_tasks(benchmark, learner.training.seed):
        plan.check_batch_size(task.index, len(task.train), learner.training.batch_size)
        learner.training.epochs(task.index)
    for task in benchmark.tasks:
        if evaluate_on == "validation" and not len(task.validation):
            raise ValueError(
                f"evaluate_on=validation needs validation samples, task {task.index} has none; "
                "set benchmark.validation=0.1"
            )


def _describe(learner: Learner, benchmark: Benchmark) -> dict[str, Any]:
    return {
        "mode": learner.mode,
        "algo": {"name": learner.hparams.name, **asdict(learner.hparams)},
        "benchmark": {"name": benchmark.name, **benchmark.settings},
        "training": asdict(learner.training),
        **learner.describe(),
    }


class _Recorder:
    """Evaluates and writes down what a run measures."""

    def __init__(
        self,
        learner: Learner,
        benchmark: Benchmark,
        directory: RunDirectory,
        split: EvaluateOn,
        display: Display,
    ) -> None:
        self.learner, self.benchmark, self.directory, self.split = learner, benchmark, directory, split
        self.display = display
        self.matrix: FloatArray = np.full((len(benchmark), len(benchmark)), np.nan)
        self.baseline: FloatArray | None = None
        self.extra: dict[str, Any] = {}
        self.seconds: dict[str, float] = defaultdict(float)
        self.began = time.perf_counter()
        self.last = (self.began, 0)

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Add the time spent to `kind`, and take it away from `train` where an evaluation lies within it."""
        start, inside = time.perf_counter(), self.seconds["evaluate"]
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[kind] += spent - (self.seconds["evaluate"] - inside if kind == "train" else 0)

    def progress(self, task: Task, progress: Progress) -> None:
        """Record loss and accuracy of the training batches."""
        now, (before, step) = time.perf_counter(), self.last
        self.last = (now, progress.step)
        rate = (progress.step - step) * self.learner.training.batch_size / max(now - before, 1e-9)
        record = progress._asdict()
        extra = record.pop("extra")
        self.directory.append_metrics(
            {"kind": "train", "task": task.index, **record, "samples_per_second": rate, **extra}
        )
        self.display.update(progress)

    def evaluate(self, tasks: range, after: int | None, within: bool = False) -> FloatArray:
        """Evaluate tasks, record the numbers and return the accuracies, `[T]`, nan for the other tasks.

        Args:
            tasks: indices.
            after: the task just trained on, or being trained on; None before the first.
            within: whether its training still goes on.
        """
        with self.timed("evaluate"):
            found = {j: self.learner.evaluate(self.benchmark.tasks[j], self.split) for j in tasks}
        row = np.full(len(self.benchmark), np.nan)
        for j, evaluation in found.items():
            row[j] = evaluation.accuracy
            self._record(
                evaluation, {"after_task": after, "within_task": within, "task": j, "split": self.split}
            )
        if self.benchmark.scenario == "class":
            masked = [evaluation.masked_accuracy for evaluation in found.values()]
            self.extra["masked_average_accuracy"] = float(np.mean(masked))
        for name in next(iter(found.values())).alternatives:
            others = [evaluation.alternatives[name] / evaluation.total for evaluation in found.values()]
            self.extra[f"{name}_average_accuracy"] = float(np.mean(others))
        scores = {f"{self.split}/accuracy/task_{j}": e.accuracy for j, e in found.items()}
        self.learner.log({**scores, f"{self.split}/average_accuracy": float(np.nanmean(row))})
        self.last = (time.perf_counter(), self.learner.step)
        return row

    def evaluate_within(self, tasks: range, after: int) -> None:
        """Evaluate tasks while the training on task `after` goes on."""
        self.evaluate(tasks, after, within=True)

    def final_evaluation(self) -> None:
        """Evaluate the split that the matrix is not measured on, where every task has one."""
        other: EvaluateOn = "validation" if self.split == "test" else "test"
        if all(len(task.split(other)) for task in self.benchmark.tasks):
            with self.timed("evaluate"):
                found = [self.learner.evaluate(task, other) for task in self.benchmark.tasks]
            last = len(self.benchmark) - 1
            for j, evaluation in enumerate(found):
                self._record(
                    evaluation, {"after_task": last, "within_task": False, "task": j, "split": other}
                )
            self.extra[f"{other}_average_accuracy"] = float(np.mean([e.accuracy for e in found]))

    def _record(self, evaluation: Evaluation, where: Mapping[str, Any]) -> None:
        values = {"accuracy": evaluation.accuracy, "loss": evaluation.loss}
        if self.benchmark.scenario == "class":
            values["masked_accuracy"] = evaluation.masked_accuracy
        others = evaluation.alternatives.items()
        values |= {f"{name}_accuracy": correct / evaluation.total for name, correct in others}
        self.directory.append_metrics({"kind": "evaluation", "step": self.learner.step, **where, **values})

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Write the summary however the run ends."""
        try:
            yield
            self.extra["status"] = "finished"
            self.directory.write_weights(self.learner.weights())
        except BaseException as error:
            self.extra["status"] = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            if isinstance(error, DivergenceError):
                self.extra.update(status="diverged", diverged_at=error.where)
            raise
        finally:
            self.directory.write_matrix(self.matrix)
            self.directory.write_summary(self.summary())
            self.learner.close()

    def summary(self) -> dict[str, Any]:
        """Return everything that `summary.json` holds."""
        total = time.perf_counter() - self.began
        train, evaluate = self.seconds["train"], self.seconds["evaluate"]
        found = metrics.summarise(self.matrix, self.baseline)
        extra = dict(self.extra)
        return {
            "status": extra.pop("status"),
            "mode": self.learner.mode,
            "split": self.split,
            **found,
            f"{self.split}_average_accuracy": found["average_accuracy"],
            **extra,
            "steps": self.learner.step,
            "seconds": {
                "train": train,
                "evaluate": evaluate,
                "other": total - train - evaluate,
                "total": total,
            },
            "memory_bytes": self.learner.memory_bytes(),
            "peak_memory_bytes": peak_memory_bytes(),
            "threads": self.learner.threads(),
            "versions": versions(),
        }

    def result(self) -> Result:
        """Return the run's result, read from its directory as any reader would."""
        return load_result(self.directory.path)
