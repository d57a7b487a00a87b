"""Hooks, called before and after the stream, each task, epoch, step and evaluation.

    class Norms(Hook):
        def after_step(self, ts, state, batch, metrics, writer):
            writer.write_scalars(int(ts.step), {"norm": float(optax.global_norm(ts.params))})

    learner = make_learner(hparams, model, tx, benchmark, hooks=[Norms(every=100)])

In your own training loop, call the same hooks:

    if hook.due(step):  # number of the step, from 1
        hook.after_step(ts, state, batch, {"task": task.index, "loss": loss}, writer)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from flax.training.train_state import TrainState
from tqdm import tqdm

from sequel_core.runs.loggers import Loggers
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.pictures import COUNT, image_grid
from sequel_core.stream.task import Batch
from sequel_core.stream.trees import is_image, specs_of
from sequel_flax.bundle import Algorithm, State
from sequel_flax.evaluation import Evaluator
from sequel_flax.writers import MetricWriter

Metrics = Mapping[str, Any]


class Hook:
    """Base class of hooks, which observe training. Override the methods that you need; they return nothing.

    Every method has the same five arguments:

    - `ts`, `state`: The train state and the state of the algorithm at that point. The next step reuses their
      buffers, so copy what you keep: `jax.device_get(ts.params)`. Reading a reference later raises JAX's
      "Array has been deleted".
    - `batch`: The batch of the step as NumPy arrays, in `before_step` and `after_step`; None in the others.
    - `metrics`: The position in the stream and the measured values; see each method.
    - `writer`: Has the methods of clu's MetricWriter and calls them on every writer of the learner. Use
      `int(ts.step)` as the step.

    An exception in a hook ends the run.

    Args:
        every: Number of steps between calls of `before_step` and `after_step`, >= 1: they are called if the
            step's number in the stream is a multiple of it. Other steps run at full speed.

    Raises:
        ValueError: `every` is not an integer >= 1.

    Example:
        >>> class TaskLog(Hook):
        ...     def after_step(self, ts, state, batch, metrics, writer):
        ...         writer.write_scalars(int(ts.step), {"task": metrics["task"]})
        >>> hook = TaskLog(every=100)
        >>> hook.due(200), hook.due(250)
        (True, False)
    """

    every: int = 1
    shows_progress: bool = False  # True replaces the progress bars of `sequel_core.run`

    def __init__(self, every: int = 1) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every must be a number of steps >= 1, got {every!r}")
        self.every = every

    def due(self, step: int) -> bool:
        """Return whether `before_step` and `after_step` are called for a step.

        Args:
            step: The number of the step in the stream, from 1.
        """
        return step % self.every == 0

    def before_stream(
        self, ts: TrainState, state: State, batch: Batch | None, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """Called before everything else; `metrics` is empty."""

    def before_task(
        self, ts: TrainState, state: State, batch: Batch | None, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """Called before `start_task`; `metrics` has the index `task` and the number of steps `task_steps`."""

    def before_epoch(
        self, ts: TrainState, state: State, batch: Batch | None, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """Called before an epoch; `metrics` has `task` and the epoch's index in the task, `epoch`."""

    def before_step(
        self, ts: TrainState, state: State, batch: Batch, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """Called before a due step, with the weights before the step; `metrics` has `task` and `epoch`."""

    def after_step(
        self, ts: TrainState, state: State, batch: Batch, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """Called after a due step; `metrics` has `task`, `epoch` and the learner's metrics of this step.

        By default the metrics are `loss` and the score, for example `accuracy`, on the batch, with the
        weights before the step.
        """

    def after_epoch(
        self, ts: TrainState, state: State, batch: Batch | None, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """Called after an epoch; `metrics` has `task`, `epoch` and the learner's metrics of all its steps."""

    def after_task(
        self, ts: TrainState, state: State, batch: Batch | None, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """Called after `end_task`; `metrics` has `task` and `task_steps`."""

    def after_stream(
        self, ts: TrainState, state: State, batch: Batch | None, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """Called after the last task and its evaluation, unless the run failed; `metrics` is empty."""

    def before_evaluation(
        self, ts: TrainState, state: State, batch: Batch | None, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """Called before an evaluation; `metrics` has the evaluated `task` and the name of the `split`."""

    def after_evaluation(
        self, ts: TrainState, state: State, batch: Batch | None, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """Called after an evaluation.

        In addition to `task` and `split`, `metrics` has `loss` and the score: for class labels `accuracy`,
        `masked_accuracy`, and `<name>_accuracy` for each alternative prediction of the algorithm.
        """

    def close(self) -> None:
        """Called at the end of every run, also of a failed one; release resources here."""

    @property
    def watches_steps(self) -> bool:
        """Whether the class overrides `before_step` or `after_step`."""
        return any(
            getattr(getattr(self, name), "__func__", None) is not getattr(Hook, name)
            for name in ("before_step", "after_step")
        )


class ProgressBar(Hook):
    """Shows a progress bar for each task, with the metrics of the latest step.

    Nothing is shown if the output is not a terminal.

    Args:
        every: Number of steps between updates, >= 1.
        file: The output; None for standard error.

    Raises:
        ValueError: `every` is not an integer >= 1.

    Example:
        >>> ProgressBar(every=10).due(10)  # no task has started
        False
    """

    shows_progress = True

    def __init__(self, every: int = 10, file: TextIO | None = None) -> None:
        super().__init__(every)
        self._file = file
        self._bar: Any = None
        self._first = 0

    def due(self, step: int) -> bool:
        """Return False if no bar is shown, because a hook at a step waits for its results."""
        return self._bar is not None and not self._bar.disable and super().due(step)

    def before_task(
        self, ts: TrainState, state: State, batch: Batch | None, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """Start the bar of the task; it has no total without `task_steps`."""
        self.close()
        title, total = f"task {metrics['task']}", metrics.get("task_steps")
        self._bar, self._first = tqdm(desc=title, total=total, file=self._file, disable=None), int(ts.step)

    def after_step(
        self, ts: TrainState, state: State, batch: Batch, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """Update the bar."""
        shown = {name: value for name, value in metrics.items() if isinstance(value, float)}
        self._bar.set_postfix({name: f"{value:.4f}" for name, value in shown.items()}, refresh=False)
        self._bar.update(int(ts.step) - self._first - self._bar.n)

    def after_task(
        self, ts: TrainState, state: State, batch: Batch | None, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """Complete the bar."""
        if self._bar is not None:
            self._bar.update(int(ts.step) - self._first - self._bar.n)
        self.close()

    def close(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class ProfilerTrace(Hook):
    """Records steps with JAX's profiler, for TensorBoard, XProf or Perfetto.

    Args:
        directory: The profile is written to `plugins/profile/` in this directory.
        first: Number of the first recorded step, >= 1. Step 1 includes compilation.
        steps: Number of recorded steps, >= 1; fewer if the run ends earlier.

    Raises:
        ValueError: `first` or `steps` is not an integer >= 1.

    Example:
        >>> hook = ProfilerTrace("profile", first=10, steps=5)
        >>> [step for step in range(20) if hook.due(step)]
        [10, 14]
    """

    def __init__(self, directory: str | Path, first: int = 10, steps: int = 5) -> None:
        for name, value in (("first", first), ("steps", steps)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a number of steps >= 1, got {value!r}")
        self.directory = os.fspath(directory)
        self.first, self.last = first, first + steps - 1
        self._running = False

    def due(self, step: int) -> bool:
        """Return whether the step is the first or the last recorded one; those between run at full speed."""
        return step in (self.first, self.last)

    def before_step(
        self, ts: TrainState, state: State, batch: Batch, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """Wait for the earlier steps and start the profiler before the first recorded step."""
        if int(ts.step) + 1 == self.first:
            jax.block_until_ready(ts)
            jax.profiler.start_trace(self.directory)
            self._running = True

    def after_step(
        self, ts: TrainState, state: State, batch: Batch, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """Wait for the last recorded step and stop the profiler."""
        if int(ts.step) == self.last:
            jax.block_until_ready(ts)
            self.close()

    def after_stream(
        self, ts: TrainState, state: State, batch: Batch | None, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """Stop the profiler if the stream had fewer steps."""
        self.close()

    def close(self) -> None:
        """Stop the profiler and write the profile."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


class PeriodicEvaluation(Hook):
    """Evaluates tasks at regular steps.

    It writes `periodic/<split>/loss/task_<j>` and, under the name of the score, for example
    `periodic/<split>/accuracy/task_<j>`. The evaluations in a run's results do not need this hook; see
    `evaluate_every` of `sequel_core.run`.

    Args:
        algorithm: Its `predict` is used. With a learner, pass the learner's algorithm.
        benchmark: The benchmark whose tasks are evaluated.
        tasks: Indices of tasks; None for all.
        split: `test`, `validation` or `train`.
        every: Number of steps between evaluations, >= 1.
        batch_size: Maximum number of samples per batch, >= 1.

    Raises:
        ValueError: A task or the split does not exist, or the split has no samples.

    Example:
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core.algorithms.naive import NaiveHParams
        >>> from sequel_flax import naive
        >>> benchmark = RotatedDigits(num_tasks=2, subset=20)
        >>> hook = PeriodicEvaluation(naive(NaiveHParams()), benchmark, tasks=[0], every=50)
        >>> hook.due(50)
        True
    """

    def __init__(
        self,
        algorithm: Algorithm,
        benchmark: Benchmark,
        tasks: Sequence[int] | None = None,
        split: str = "test",
        every: int = 100,
        batch_size: int = 1000,
    ) -> None:
        super().__init__(every)
        all_tasks = range(len(benchmark))
        indices = list(all_tasks) if tasks is None else list(tasks)
        if not indices or not set(indices) <= set(all_tasks):
            raise ValueError(f"tasks must be indices from 0 to {all_tasks[-1]}, got {indices}")
        if split not in ("test", "validation", "train"):
            raise ValueError(f"split must be test, validation or train, got {split!r}")
        self._samples = {j: benchmark.tasks[j].split(split) for j in indices}
        empty = [j for j, samples in self._samples.items() if not len(samples)]
        if empty:
            raise ValueError(f"split must have samples, got {split!r} with none in task {empty[0]}")
        self._prefix = f"periodic/{split}"
        self._evaluate = Evaluator(algorithm, benchmark.spec, batch_size)

    def after_step(
        self, ts: TrainState, state: State, batch: Batch, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """Evaluate the tasks and write their scores and losses."""
        scores: dict[str, float] = {}
        for j, samples in self._samples.items():
            evaluation = self._evaluate(ts, state, samples)
            scores[f"{self._prefix}/{self._evaluate.objective.score.key}/task_{j}"] = evaluation.score
            scores[f"{self._prefix}/loss/task_{j}"] = evaluation.loss
        writer.write_scalars(int(ts.step), scores)


class ImageGrid(Hook):
    """Writes a grid of up to 25 images of the batch, before augmentation. It ignores other inputs.

    Args:
        every: Number of steps between grids, >= 1.
        name: Name of the written image.

    Raises:
        ValueError: `every` is not an integer >= 1.

    Example:
        >>> ImageGrid(every=100, name="inputs").due(300)
        True
    """

    def __init__(self, every: int = 100, name: str = "batch") -> None:
        super().__init__(every)
        self.name = name

    def after_step(
        self, ts: TrainState, state: State, batch: Batch, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """Write the grid."""
        if not is_image(specs_of(batch.x)):
            return
        writer.write_images(int(ts.step), {self.name: image_grid(np.asarray(batch.x[:COUNT]))[None]})


class EveryWriter:
    """Calls every method of MetricWriter on all writers of a learner that have not failed.

    Args:
        writers: The writers of the learner.

    Raises:
        AttributeError: On access to a name that is not a method of MetricWriter.

    Example:
        >>> from sequel_flax.writers import ConsoleWriter
        >>> writer = EveryWriter(Loggers([ConsoleWriter()]))
        >>> writer.write_scalars(1, {"train/loss": 0.5})
    """

    def __init__(self, writers: Loggers) -> None:
        self._writers = writers

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_") or not hasattr(MetricWriter, name):
            raise AttributeError(f"a metric writer has no {name}")

        def call(*args: Any, **kwargs: Any) -> None:
            self._writers.each(lambda writer: getattr(writer, name)(*args, **kwargs))

        return call


class Hooks:
    """The hooks of a learner.

    Args:
        hooks: Called in this order.
        writers: The writers of the learner.

    Raises:
        ValueError: An object is not a `Hook`.

    Example:
        >>> hooks = Hooks([ImageGrid(every=100)], Loggers([]))
        >>> hooks.steps_until_due(step=95, most=50)
        5
    """

    def __init__(self, hooks: Sequence[Hook], writers: Loggers) -> None:
        for hook in hooks:
            if not isinstance(hook, Hook):
                raise ValueError(
                    "hooks must be objects of subclasses of sequel_flax.hooks.Hook, got a "
                    f"{type(hook).__name__}"
                )
        self._hooks = tuple(hooks)
        self._writer: Any = EveryWriter(writers)
        self.of_steps = [hook for hook in hooks if hook.watches_steps]
        self.show_progress = any(hook.shows_progress for hook in hooks)

    def __len__(self) -> int:
        return len(self._hooks)

    def call(
        self,
        name: str,
        ts: TrainState,
        state: State,
        batch: Batch | None,
        metrics: Metrics,
        hooks: Sequence[Hook] | None = None,
    ) -> None:
        """Call a method of some hooks.

        Args:
            name: The name of the method.
            ts: Passed to the hooks, as the three that follow.
            state: The state of the algorithm.
            batch: The batch of a step, or None.
            metrics: See the method.
            hooks: The hooks to call; None for all.
        """
        for hook in self._hooks if hooks is None else hooks:
            getattr(hook, name)(ts, state, batch, metrics, self._writer)

    def due(self, step: int) -> list[Hook]:
        """Return the hooks that are called before and after a step; the first step of the stream is 1."""
        return [hook for hook in self.of_steps if hook.due(step)]

    def steps_until_due(self, step: int, most: int) -> int:
        """Return how many steps one call may take, from this one on: a step with a hook has its own call."""
        if not self.of_steps:
            return most
        return max(next((n for n in range(most) if self.due(step + n)), most), 1)

    def close(self) -> None:
        """Close all hooks."""
        for hook in self._hooks:
            hook.close()
