"""The orchestrator: runs a learner over the tasks of a benchmark, evaluates, and records."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sequel_core.hparams import CheckpointHParams
from sequel_core.runs import metrics
from sequel_core.runs.callbacks import StreamCallback
from sequel_core.runs.checkpoints import Checkpoints
from sequel_core.runs.learner import DivergenceError, EvaluateEvery, Evaluation, FitMonitor, Learner, Progress
from sequel_core.runs.results import (
    PACKAGE,
    WRITER,
    Result,
    RunDirectory,
    load_result,
    peak_memory_bytes,
    versions,
)
from sequel_core.runs.services import masked
from sequel_core.runs.signals import InterruptedRunError, Signals
from sequel_core.stream import plan
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.pictures import sample_images
from sequel_core.stream.task import Task

if TYPE_CHECKING:
    from sequel_core.runs.console import Display

EvaluateOn = Literal["test", "validation"]
Resume = bool | Literal["auto"]
Shown = bool | Literal["bars"]
"""How much of a run is shown: all of it, nothing, or the bars alone."""


def run(
    learner: Learner,
    benchmark: Benchmark,
    *,
    run_dir: str | Path | None = None,
    evaluate_every: EvaluateEvery = "task",
    evaluate_on: EvaluateOn = "test",
    evaluate_future: bool = False,
    config: Mapping[str, Any] | None = None,
    progress: Shown = True,
    callbacks: Sequence[StreamCallback] = (),
    resume: Resume = False,
    checkpoint: CheckpointHParams | None = None,
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
        progress: True for progress bars on a terminal, a line per task and a table at the end; `"bars"` for
            the bars alone; False to print nothing.
        callbacks: called around the stream and each task, in this order.
        resume: True to go on with the run that `run_dir` holds, from its newest whole checkpoint, or from the
            beginning where there is none; the end is bit-identical to that of a run that never stopped. A
            run that has ended is read back, and the learner gets its final state. `"auto"` for that where
            `run_dir` holds a run with the same settings, and for a new one where it is empty.
        checkpoint: when checkpoints are written; None for after every task, the newest two kept.

    Returns:
        The accuracy matrix `[T, T]` and the summary; the same is in `run_dir`, for `sequel_core.load_result`.

    Raises:
        ValueError: a setting that does not fit the benchmark, or a run directory that cannot be used; nothing
            was trained.
        DivergenceError: the loss is no longer finite; what was recorded until then is kept, with status
            `diverged`.
        InterruptedRunError: SIGINT, SIGTERM or another signal asked for the end; a checkpoint was written.
        OSError: a file could not be written; earlier checkpoints are kept.
    """
    from sequel_core.runs.console import Display  # rich, which is slow to import

    check_run(learner, benchmark, evaluate_every, evaluate_on)
    if resume not in (True, False, "auto"):
        raise ValueError(f"resume must be True, False or 'auto', got {resume!r}")
    described = masked(_describe(learner, benchmark) if config is None else config)
    directory = RunDirectory.open(run_dir, described, resume)
    with directory.locked(), Signals().noted() as signals:
        display = Display(benchmark, learner, progress)
        recorder = _Recorder(learner, benchmark, directory, evaluate_on, display, signals)
        recorder.checkpoints = _Checkpointer(recorder, checkpoint or CheckpointHParams())
        resumed = recorder.checkpoints.restore() if resume else False
        if resume and directory.finished():
            return recorder.result()
        if not resumed:
            directory.rewind_metrics(0)
            described = {**described, WRITER: versions()[PACKAGE]}
            directory.write_config(described)
        _run(recorder, callbacks, evaluate_every, evaluate_future, described, resumed)
    result = recorder.result()
    recorder.display.summarise(result)
    return result


def _run(
    recorder: _Recorder,
    callbacks: Sequence[StreamCallback],
    evaluate_every: EvaluateEvery,
    evaluate_future: bool,
    config: Mapping[str, Any],
    resumed: bool,
) -> None:
    """Go through the stream, from where the recorder is."""
    learner, benchmark, checkpoints = recorder.learner, recorder.benchmark, recorder.checkpoints
    everything = range(len(benchmark))
    with recorder.display, recorder.finishing():
        learner.start_stream(config, resumed)
        for callback in callbacks:
            callback.on_stream_start(learner, benchmark)
        if not resumed and learner.logs:
            for task in benchmark.tasks:
                learner.log_image(f"samples/task_{task.index}", sample_images(task.train))
        if not resumed and evaluate_future:
            recorder.baseline = recorder.evaluate(everything, after=None)
        for task in learner.hparams.training_tasks(benchmark, learner.training.seed):
            if recorder.has_done(task.index, "evaluate"):
                continue
            seen = everything if evaluate_future else everything[: task.index + 1]
            recorder.display.start(task, learner.training.epochs(task.index))
            for callback in callbacks:
                callback.on_task_start(learner, task)
            if not recorder.has_done(task.index, "train"):
                monitor = FitMonitor(
                    on_progress=partial(recorder.progress, task),
                    on_evaluate=partial(recorder.evaluate_during_task, seen, task.index),
                    evaluate_every=evaluate_every,
                    on_checkpoint=checkpoints.within,
                    checkpoint_every=checkpoints.every_n_steps,
                    checkpoint_due=checkpoints.checkpoint_due,
                )
                with recorder.timed("train"):
                    learner.fit_task(task, monitor)
                recorder.done = (task.index, "train")
            recorder.evaluate(seen, after=task.index)
            recorder.done = (task.index, "evaluate")
            recorder.display.finish(task, recorder.matrix[task.index])
            for callback in callbacks:
                callback.on_task_end(learner, task, recorder.matrix.copy())
            checkpoints.save()
            recorder.signals.check()
        recorder.final_evaluation()
        for callback in callbacks:
            callback.on_stream_end(learner, recorder.matrix.copy())
        learner.end_stream()


def training_numbers(progress: Progress, samples_per_second: float) -> dict[str, float]:
    """Return what the loggers get of a learner's report, by tag."""
    scores = {"loss": progress.loss}
    for name in ("accuracy", "learning_rate"):
        if not math.isnan(value := getattr(progress, name)):
            scores[name] = value
    scores["samples_per_second"] = samples_per_second
    return {**{f"train/{name}": value for name, value in scores.items()}, **progress.extra}


def check_run(
    learner: Learner, benchmark: Benchmark, evaluate_every: EvaluateEvery, evaluate_on: EvaluateOn
) -> None:
    """Refuse what `run` cannot do with a learner on a stream.

    Raises:
        ValueError: a setting that does not fit.
    """
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
        signals: Signals,
    ) -> None:
        self.learner, self.benchmark, self.directory, self.split = learner, benchmark, directory, split
        self.display, self.signals = display, signals
        self.checkpoints: _Checkpointer
        self.done: tuple[int, str] = (-1, "evaluate")  # the last task of which so much is done
        self.matrix: FloatArray = np.full((len(benchmark), len(benchmark)), np.nan)
        self.baseline: FloatArray | None = None
        self.extra: dict[str, Any] = {}
        self.seconds: dict[str, float] = defaultdict(float)
        self.began = time.perf_counter()
        self.last = (self.began, 0)

    def has_done(self, task: int, part: Literal["train", "evaluate"]) -> bool:
        """Whether this part of a task, its training or also the evaluation after it, is over."""
        index, done = self.done
        return task < index or (task == index and part in ("train", done))

    def state(self) -> dict[str, Any]:
        """Return what `load` needs, as plain values."""
        return {
            "done": list(self.done),
            "matrix": self.matrix.copy(),  # it is written in the background, while the run goes on
            "baseline": self.baseline,
            "extra": dict(self.extra),
            "seconds": dict(self.seconds),
            "total_seconds": time.perf_counter() - self.began,
            "metrics_bytes": self.directory.metrics_bytes(),
            "versions": versions(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state; the learner is restored before."""
        index, done = state["done"]
        self.done = (int(index), str(done))
        self.matrix = np.array(state["matrix"], np.float64)  # None becomes nan
        self.baseline = None if state["baseline"] is None else np.array(state["baseline"], np.float64)
        self.extra = dict(state["extra"])
        self.seconds.update(state["seconds"])
        self.began -= state["total_seconds"]
        self.last = (time.perf_counter(), self.learner.step)
        self.directory.rewind_metrics(state["metrics_bytes"])
        self.directory.write_matrix(self.matrix)

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Add the time spent to `kind`, less that of evaluations and checkpoints within training."""
        start, inside = time.perf_counter(), self._inner_seconds()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[kind] += spent - (self._inner_seconds() - inside if kind == "train" else 0)

    def _inner_seconds(self) -> float:
        return self.seconds["evaluate"] + self.seconds["checkpoint"]

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
        self.learner.log(training_numbers(progress, rate))
        self.display.update(task, progress)

    def evaluate(self, tasks: range, after: int | None, within: bool = False) -> FloatArray:
        """Evaluate tasks, record the numbers and return the accuracies, `[T]`, nan for the other tasks.

        Args:
            tasks: indices.
            after: the task just trained on, or being trained on; None before the first.
            within: whether its training still goes on.
        """
        with self.timed("evaluate"):
            found = {}
            for j in tasks:
                found[j] = self.learner.evaluate(self.benchmark.tasks[j], self.split)
                if not within and self.signals.received is not None:
                    self.checkpoints.stop()
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
        scores = {f"accuracy/task_{j}": evaluation.accuracy for j, evaluation in found.items()}
        scores["average_accuracy"] = float(np.nanmean(row))
        if after is not None and not within:
            self.matrix[after] = row
            self.directory.write_matrix(self.matrix)
            seen = self.matrix[: after + 1, : after + 1]
            if not math.isnan(forgotten := metrics.forgetting(seen)):
                scores["forgetting"] = forgotten
        named = {f"{self.split}/{name}": value for name, value in scores.items()}
        self.learner.log({**named, "memory_bytes": self.learner.memory_bytes()})
        if self.learner.logs and after is not None and not within:
            self._log_matrix()
        self.last = (time.perf_counter(), self.learner.step)
        return row

    def _log_matrix(self) -> None:
        """Send the accuracies so far to the loggers, as a picture and as a table."""
        name, tasks = f"{self.split}/accuracy_matrix", range(len(self.benchmark))
        draw = import_module("sequel_core.report.figures").matrix_picture
        self.learner.log_image(name, draw(self.matrix, f"{self.benchmark.name}: {self.split} accuracy"))
        rows = [[i, *(None if math.isnan(v) else v for v in self.matrix[i].tolist())] for i in tasks]
        self.learner.log_table(f"{name}_table", ["after_task", *(f"task_{j}" for j in tasks)], rows)

    def evaluate_during_task(self, tasks: range, after: int) -> None:
        """Evaluate tasks while the training on task `after` goes on."""
        self.display.evaluated(after, self.evaluate(tasks, after, within=True))

    def final_evaluation(self) -> None:
        """Evaluate the split that the matrix is not measured on, where every task has one."""
        other: EvaluateOn = "validation" if self.split == "test" else "test"
        if all(len(task.split(other)) for task in self.benchmark.tasks):
            with self.timed("evaluate"):
                found = []
                for task in self.benchmark.tasks:
                    found.append(self.learner.evaluate(task, other))
                    self.signals.check()
            last = len(self.benchmark) - 1
            for j, evaluation in enumerate(found):
                self._record(
                    evaluation, {"after_task": last, "within_task": False, "task": j, "split": other}
                )
            average = self.extra[f"{other}_average_accuracy"] = float(np.mean([e.accuracy for e in found]))
            self.learner.log({f"{other}/average_accuracy": average})

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
        failed = True
        try:
            yield
            self.checkpoints.close()
            self.directory.write_weights(self.learner.weights())
            self._end("finished")
            failed = False
        except BaseException as error:
            ended = isinstance(error, KeyboardInterrupt | InterruptedRunError)
            if isinstance(error, DivergenceError):
                self.extra["diverged_at"] = error.where
            status = "diverged" if "diverged_at" in self.extra else "interrupted" if ended else "failed"
            with suppress(OSError):  # a full disk is what may have ended the run
                self.checkpoints.close()
            with suppress(OSError):
                self._end(status)
            raise
        finally:
            self.learner.close(failed)

    def _end(self, status: str) -> None:
        self.directory.write_matrix(self.matrix)
        self.directory.write_summary({"status": status, **self.summary()})

    def summary(self) -> dict[str, Any]:
        """Return what `summary.json` holds beside the status."""
        total = time.perf_counter() - self.began
        spent = {kind: self.seconds[kind] for kind in ("train", "evaluate", "checkpoint")}
        samples = [len(task.split(self.split)) for task in self.benchmark.tasks]
        found = metrics.summarise(self.matrix, self.baseline, samples)
        return {
            "mode": self.learner.mode,
            "scenario": self.benchmark.scenario,
            "task_given": self.learner.hparams.knows_task(self.benchmark.spec),
            "split": self.split,
            "samples": samples,
            **found,
            f"{self.split}_average_accuracy": found["average_accuracy"],
            **self.extra,
            "steps": self.learner.step,
            "seconds": {**spent, "other": total - sum(spent.values()), "total": total},
            "memory_bytes": self.learner.memory_bytes(),
            "checkpoint_bytes": self.checkpoints.bytes(),
            "peak_memory_bytes": peak_memory_bytes(),
            "threads": self.learner.threads(),
            "versions": versions(),
        }

    def result(self) -> Result:
        """Return the run's result, read from its directory as any reader would."""
        return load_result(self.directory.path)


class _Checkpointer:
    """Writes a run's checkpoints when due, and when a signal asks for the end."""

    def __init__(self, recorder: _Recorder, settings: CheckpointHParams) -> None:
        self._recorder = recorder
        self._wanted = settings.keep > 0
        self._files = Checkpoints(recorder.directory.path, max(1, settings.keep))
        self._minutes = settings.every_minutes
        self._saved_at = time.monotonic()
        self.every_n_steps = settings.every_n_steps

    def checkpoint_due(self) -> bool:
        """Whether one is due, whatever the step."""
        late = self._minutes is not None and time.monotonic() - self._saved_at >= 60 * self._minutes
        return late or self._recorder.signals.received is not None

    def save(self) -> None:
        """Write one.

        Raises:
            OSError: this one, or the one before, could not be written.
        """
        if self._wanted:
            recorder = self._recorder
            began = time.perf_counter()
            self._files.save(recorder.learner.save, recorder.state())
            recorder.seconds["checkpoint"] += time.perf_counter() - began
        self._saved_at = time.monotonic()

    def within(self) -> None:
        """Write one in the middle of a task; raise InterruptedRunError where a signal asked for it."""
        self.save()
        self._recorder.signals.check()

    def stop(self) -> None:
        """Write one between the training on a task and the end of its evaluation, and end the run.

        Raises:
            InterruptedRunError: always.
        """
        if self._recorder.done[1] == "train":
            self.save()
        self._recorder.signals.check()

    def restore(self) -> bool:
        """Bring learner and recorder to the newest whole checkpoint; False where there is none."""
        found = self._files.newest()
        if found is not None:
            found.check(len(self._recorder.benchmark))
            try:
                self._recorder.learner.restore(found.path)
                self._recorder.load(found.run)
            except Exception as error:  # what a file leads to that another program wrote
                other = found.other_version()
                if isinstance(error, ValueError) and str(found.path) in str(error):
                    if not other:
                        raise
                    raise ValueError(f"{error}{other}") from error
                what = type(error).__name__ + (f": {error}" if isinstance(error, KeyError) else "")
                raise ValueError(
                    f"checkpoint {found.path} cannot be used, though it is whole ({what}); "
                    f"remove it to go on from the one before{other}"
                ) from error
            if not self._recorder.directory.finished():
                found.warn_of_versions()
        self._files.clear(None if found is None else found.path)
        return found is not None

    def close(self) -> None:
        """Wait for what is being written."""
        self._files.close()

    def bytes(self) -> int:
        """Return the disk space that the checkpoints take."""
        return self._files.bytes()
