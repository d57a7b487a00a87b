"""The orchestrator: trains a learner on the tasks of a benchmark, evaluates it and records the results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from sequel_core.hparams import CheckpointHParams
from sequel_core.runs.callbacks import StreamCallback
from sequel_core.runs.checkpoints import Checkpointer
from sequel_core.runs.directory import ReadDirectory, RunDirectory
from sequel_core.runs.learner import (
    DivergenceError,
    EvaluateEvery,
    EvaluateOn,
    FitMonitor,
    Learner,
    Progress,
    check_same_settings,
)
from sequel_core.runs.process import event_errors_left_to_the_caller
from sequel_core.runs.recording import Recorder
from sequel_core.runs.results import Result, load_result, with_score
from sequel_core.runs.services import masked
from sequel_core.runs.signals import InterruptedRunError, Signals
from sequel_core.runs.state import Position, RunState
from sequel_core.runs.versions import PACKAGE, WRITER, loaded_versions
from sequel_core.stream import plan
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.pictures import sample_images
from sequel_core.stream.task import Task
from sequel_core.stream.trees import shapes_text

if TYPE_CHECKING:
    from sequel_core.runs.console import Display

Resume = bool | Literal["auto"]
Shown = bool | Literal["bars"]
"""What is shown of a run: True for everything, False for nothing, or only the progress bars."""


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
    """Train a learner on every task in turn, evaluate it and record the results in a run directory.

    Args:
        learner: a model with an algorithm; `make_learner` of either plug-in makes it.
        benchmark: the stream that the learner was made for.
        run_dir: an empty or new directory; None for a new one under `runs/`.
        evaluate_every: `"task"` to evaluate after each task; `"epoch"` or a number of steps >= 1 to evaluate
            also during training; `"end"` to evaluate after the last task only. The matrix holds the scores
            after each task; with `"end"` the other rows are nan, and so are forgetting and other metrics
            that need them.
        evaluate_on: split that the matrix is measured on, `"test"` or `"validation"`. If all tasks
            have the other split too, it is evaluated once, at the end.
        evaluate_future: evaluate all tasks instead of those seen so far, and also the untrained network.
            Forward transfer needs both.
        config: recorded as the run's configuration; None to record the settings of the learner and the
            benchmark.
        progress: True for a line at the start, progress bars on a terminal, a line per task and a final
            table; `"bars"` for the bars only; False to print nothing.
        callbacks: called around the stream and each task, in this order.
        resume: True to resume the run in `run_dir` from its newest complete checkpoint, or from the start if
            there is none. The result is bit-identical to that of an uninterrupted run. A finished run is only
            read, and the learner gets its final state. `"auto"` resumes if `run_dir` holds a run with the
            same settings, and starts a new run if it is empty.
        checkpoint: when checkpoints are written; None for after every task, of which the newest two are kept.

    Returns:
        The matrix of scores `[T, T]` and the summary; `load_result(run_dir)` returns the same.

    Raises:
        ValueError: an argument does not fit the benchmark, or the run directory cannot be used; nothing was
            trained.
        DivergenceError: the loss is no longer finite; the results so far are kept, with status `diverged`.
        InterruptedRunError: SIGINT, SIGTERM or another signal was received; a checkpoint was written.
        OSError: a file could not be written; earlier checkpoints are kept.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import EWCHParams, TrainingHParams, run
        >>> from sequel_lightning import MLP, make_learner
        >>> benchmark = RotatedDigits(num_tasks=2, subset=50)
        >>> net = MLP((16,), benchmark.num_classes, image_shape=benchmark.image_shape)
        >>> sgd = partial(torch.optim.SGD, lr=0.1)
        >>> learner = make_learner(EWCHParams(ewc_lambda=10), net, sgd, benchmark)
        >>> result = run(learner, benchmark, run_dir="runs/ewc", progress=False)
        >>> result.matrix.shape, 0 < result.average_accuracy <= 1
        ((2, 2), True)
    """
    check_run(learner, benchmark, evaluate_every, evaluate_on, evaluate_future)
    if resume not in (True, False, "auto"):
        raise ValueError(f"resume must be True, False or 'auto', got {resume!r}")
    described = _describe(learner, benchmark)
    options = _Options(
        None if run_dir is None else Path(run_dir),
        described,
        recorded_settings(learner, benchmark, described if config is None else config),
        resume,
        evaluate_every,
        evaluate_on,
        evaluate_future,
        progress,
        checkpoint or CheckpointHParams(),
    )
    return learner.launch(partial(_run, learner, benchmark, options, callbacks))


class _Options(NamedTuple):
    """Arguments of `run`."""

    run_dir: Path | None
    described: dict[str, Any]  # the learner and the benchmark
    settings: dict[str, Any]  # as recorded
    resume: Resume
    evaluate_every: EvaluateEvery
    evaluate_on: EvaluateOn
    evaluate_future: bool
    progress: Shown
    checkpoint: CheckpointHParams

    def compared(self) -> dict[str, Any]:
        """Return what must be the same in every process."""
        names = "evaluate_every", "evaluate_on", "evaluate_future"
        named = {name: getattr(self, name) for name in names}
        return {**self.described, **named, "checkpoint": asdict(self.checkpoint)}


def _run(
    learner: Learner, benchmark: Benchmark, options: _Options, callbacks: Sequence[StreamCallback]
) -> Result:
    """Do the run in one of its processes; only the main process records it."""
    from sequel_core.runs.console import Display  # rich, which is slow to import

    check_same_settings(learner.gather, options.compared())
    main, settings = learner.main_process, options.settings
    resume: Resume = learner.agree(options.resume)
    recorded = RunDirectory.open(options.run_dir, settings, resume) if main else None
    path = learner.agree(None if recorded is None else recorded.path.absolute())
    directory = ReadDirectory(path) if recorded is None else recorded
    display = Display(benchmark, learner, options.progress if main else False)
    with (
        directory.locked(),
        Signals(ignored=not main).recorded() as signals,
        event_errors_left_to_the_caller(),
    ):
        state = RunState(len(benchmark))
        checkpoints = Checkpointer(learner, directory, state, signals, options.checkpoint)
        resumed = bool(resume) and checkpoints.restore()
        if resume and learner.agree(directory.finished()):
            return learner.agree(load_result(directory.path) if main else None)
        if not resumed:
            directory.rewind_metrics(0)
            settings = {**settings, WRITER: loaded_versions()[PACKAGE]}
            directory.write_config(settings)
        display.announce(directory.path, resumed)
        stream = _Stream(
            learner, benchmark, directory, options.evaluate_on, state, checkpoints, signals, display
        )
        stream.run(settings, resumed, options.evaluate_every, options.evaluate_future, callbacks)
    result = learner.agree(load_result(directory.path) if main else None)
    display.summarise(result)
    return result


def check_run(
    learner: Learner,
    benchmark: Benchmark,
    evaluate_every: EvaluateEvery,
    evaluate_on: EvaluateOn,
    evaluate_future: bool,
) -> None:
    """Check the arguments of `run`.

    Raises:
        ValueError: the learner was made for another stream, or an argument does not fit the benchmark.
    """
    spec, made_for = benchmark.spec, learner.spec
    if (spec.x, spec.y, spec.num_classes) != (made_for.x, made_for.y, made_for.num_classes):
        raise ValueError(
            f"the learner was made for {made_for.num_classes} outputs and inputs {shapes_text(made_for.x)}, "
            f"benchmark {benchmark.name} has {spec.num_classes} and {shapes_text(spec.x)}; "
            "make it with this benchmark"
        )
    named = ("end", "task", "epoch")
    if evaluate_every not in named and not (type(evaluate_every) is int and evaluate_every > 0):
        raise ValueError(
            f"evaluate_every must be end, task, epoch or a number of steps >= 1, got {evaluate_every!r}"
        )
    if evaluate_every == "end" and evaluate_future:
        raise ValueError(
            "evaluate_future needs an evaluation after every task, got evaluate_every=end; use "
            "evaluate_every=task"
        )
    if evaluate_on not in get_args(EvaluateOn):
        raise ValueError(f"evaluate_on must be test or validation, got {evaluate_on!r}")
    for task in learner.hparams.training_tasks(benchmark, learner.training.seed):
        training = learner.training
        plan.check_batch_size(task.index, len(task.train), training.batch_size, training.drop_last)
        training.epochs(task.index)
    for task in benchmark.tasks:
        if evaluate_on == "validation" and not len(task.validation):
            raise ValueError(
                f"evaluate_on=validation needs validation samples, task {task.index} has none; "
                "set benchmark.validation=0.1"
            )


def recorded_settings(
    learner: Learner, benchmark: Benchmark, config: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the configuration that `run` records for the same arguments."""
    return with_score(masked(_describe(learner, benchmark) if config is None else config), learner.score)


def _describe(learner: Learner, benchmark: Benchmark) -> dict[str, Any]:
    return {
        "mode": learner.mode,
        "algo": {"name": learner.hparams.name, **asdict(learner.hparams)},
        "benchmark": {"name": benchmark.name, **benchmark.settings},
        "training": asdict(learner.training),
        **learner.describe(),
    }


class _Stream:
    """Trains and evaluates a learner over the stream, from the position in the state to the end."""

    def __init__(
        self,
        learner: Learner,
        benchmark: Benchmark,
        directory: RunDirectory,
        split: EvaluateOn,
        state: RunState,
        checkpoints: Checkpointer,
        signals: Signals,
        display: Display,
    ) -> None:
        self._learner, self._benchmark, self._directory, self._split = learner, benchmark, directory, split
        self._state, self._checkpoints, self._signals, self._display = state, checkpoints, signals, display
        self._recorder = Recorder(learner, benchmark, directory, split, state)

    def run(
        self,
        config: Mapping[str, Any],
        resumed: bool,
        evaluate_every: EvaluateEvery,
        evaluate_future: bool,
        callbacks: Sequence[StreamCallback],
    ) -> None:
        """Run the stream; the arguments are those of `sequel_core.run`."""
        learner, benchmark = self._learner, self._benchmark
        everything = range(len(benchmark))
        with self._display, self._finishing():
            learner.start_stream(config, resumed)
            for callback in callbacks:
                callback.on_stream_start(learner, benchmark)
            if not resumed:
                self._log_samples()
                if evaluate_future:
                    self._state.baseline = self._evaluate(everything, after=None)
            for task in learner.hparams.training_tasks(benchmark, learner.training.seed):
                if not self._state.position.includes(task.index, "evaluate"):
                    seen = everything if evaluate_future else everything[: task.index + 1]
                    self._run_task(task, seen, evaluate_every, callbacks)
            self._evaluate_other_split()
            for callback in callbacks:
                callback.on_stream_end(learner, self._state.matrix.copy())
            learner.end_stream()

    def _run_task(
        self, task: Task, seen: range, evaluate_every: EvaluateEvery, callbacks: Sequence[StreamCallback]
    ) -> None:
        """Train on a task, evaluate the tasks seen, and write a checkpoint."""
        state, learner = self._state, self._learner
        self._display.start(task, learner.training.epochs(task.index))
        for callback in callbacks:
            callback.on_task_start(learner, task)
        if not state.position.includes(task.index, "train"):
            monitor = FitMonitor(
                on_progress=partial(self._on_progress, task),
                on_evaluate=partial(self._evaluate_within_task, seen, task.index),
                evaluate_every=evaluate_every,
                on_checkpoint=self._checkpoints.save_within_task,
                checkpoint_every=self._checkpoints.every_n_steps,
                checkpoint_due=self._checkpoints.due,
            )
            with state.stopwatch.measure("train"):
                learner.fit_task(task, monitor)
            state.position = Position(task.index, "train")
        if evaluate_every != "end" or task.index == len(self._benchmark) - 1:
            self._evaluate(seen, after=task.index)
        state.position = Position(task.index, "evaluate")
        self._display.finish(task, state.matrix[task.index])
        for callback in callbacks:
            callback.on_task_end(learner, task, state.matrix.copy())
        self._checkpoints.save()
        self._signals.check()

    def _on_progress(self, task: Task, progress: Progress) -> None:
        self._recorder.progress(task, progress)
        self._display.update(task, progress)

    def _evaluate(self, tasks: range, after: int | None, within_task: bool = False) -> FloatArray:
        """Evaluate tasks and record the results.

        Args:
            tasks: indices.
            after: index of the task trained on last; None before the first.
            within_task: whether the training on that task is still in progress.

        Returns:
            The scores `[T]`; nan for the other tasks.
        """
        evaluations = {}
        with self._state.stopwatch.measure("evaluate"):
            for j in tasks:
                evaluations[j] = self._learner.evaluate(self._benchmark.tasks[j], self._split)
                if not within_task:
                    self._checkpoints.end_if_signalled()
        return self._recorder.evaluations(evaluations, after, within_task)

    def _evaluate_within_task(self, tasks: range, after: int) -> None:
        self._display.evaluated(after, self._evaluate(tasks, after, within_task=True))

    def _evaluate_other_split(self) -> None:
        """Evaluate the split that the matrix is not measured on, if every task has samples in it."""
        split: EvaluateOn = "validation" if self._split == "test" else "test"
        if all(len(task.split(split)) for task in self._benchmark.tasks):
            evaluations = []
            with self._state.stopwatch.measure("evaluate"):
                for task in self._benchmark.tasks:
                    evaluations.append(self._learner.evaluate(task, split))
                    self._signals.check()
            self._recorder.other_split(evaluations, split)

    def _log_samples(self) -> None:
        """Send training images of each task to the loggers, if the samples are images."""
        if self._learner.logs:
            for task in self._benchmark.tasks:
                images = sample_images(task.train)
                if images is not None:
                    self._learner.log_image(f"samples/task_{task.index}", images)

    @contextmanager
    def _finishing(self) -> Iterator[None]:
        """Write the summary and close the learner, whether the run finishes or an error ends it."""
        failed = True
        try:
            yield
            self._checkpoints.close()
            self._directory.write_weights(self._learner.weights())
            self._recorder.summary("finished", self._checkpoints.bytes())
            failed = False
        except BaseException as error:
            if isinstance(error, DivergenceError):
                self._state.extra["diverged_at"] = error.position
            with suppress(OSError):  # the disk may be full
                self._checkpoints.close()
            with suppress(OSError):
                self._recorder.summary(_status(error), self._checkpoints.bytes())
            raise
        finally:
            self._learner.close(failed)


def _status(error: BaseException) -> str:
    if isinstance(error, DivergenceError):
        return "diverged"
    return "interrupted" if isinstance(error, KeyboardInterrupt | InterruptedRunError) else "failed"
