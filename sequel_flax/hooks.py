"""Hooks: what is called before and after the stream, a task, an epoch, a step and an evaluation.

    class Norms(Hook):
        def after_step(self, ts, state, batch, metrics, writer):
            writer.write_scalars(int(ts.step), {"norm": float(optax.global_norm(ts.params))})

    learner = make_learner(hparams, model, tx, benchmark, hooks=[Norms(every=100)])

In a loop of one's own the same hooks are called by hand:

    if hook.due(step):  # steps done with this one, from 1
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
from sequel_flax.bundle import Algorithm, State
from sequel_flax.evaluation import Evaluator
from sequel_flax.writers import MetricWriter

Metrics = Mapping[str, Any]


class Hook:
    """Looks on while a learner trains; override what is of use. It changes nothing and returns nothing.

    Every method gets the same five arguments:

    - `ts`, `state`: the train state and the algorithm's, as they are then. The next step reuses their memory,
      so what is to be kept has to be copied: `jax.device_get(ts.params)`. A reference alone raises JAX's
      "Array has been deleted" when it is read later.
    - `batch`: of the step, arrays on the host, in `before_step` and `after_step`; else None.
    - `metrics`: where it happens and what was measured, see each method.
    - `writer`: writes with every writer of the learner; it has the methods of clu's MetricWriter. A step to
      write at is `int(ts.step)`.

    An error in a hook ends the run as any other does.

    Args:
        every: `before_step` and `after_step` are called at every so many steps, counted from the start of the
            stream; 100 means the steps number 100, 200, ... Steps that no hook asks for run at full speed.

    Raises:
        ValueError: `every` is not a whole number >= 1.
    """

    every: int = 1
    shows_progress: bool = False  # True takes the place of the progress bars of `sequel_core.run`

    def __init__(self, every: int = 1) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every must be a number of steps >= 1, got {every!r}")
        self.every = every

    def due(self, step: int) -> bool:
        """Whether the step hooks are called around a step; `step` is its number in the stream, from 1."""
        return step % self.every == 0

    def before_stream(
        self, ts: TrainState, state: State, batch: Batch | None, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """Before anything else; `metrics` is empty."""

    def before_task(
        self, ts: TrainState, state: State, batch: Batch | None, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """Before the algorithm starts a task: `task`, its index, and `task_steps`, how many it will have."""

    def before_epoch(
        self, ts: TrainState, state: State, batch: Batch | None, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """Before an epoch: `task`, and `epoch` within it, from 0."""

    def before_step(
        self, ts: TrainState, state: State, batch: Batch, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """Before a step that is due, with the weights before it: `task`, `epoch`."""

    def after_step(
        self, ts: TrainState, state: State, batch: Batch, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """After a step that is due: `task`, `epoch` and the learner's metrics of this one step.

        By default these are `loss` and `accuracy`, of the batch, with the weights before the step.
        """

    def after_epoch(
        self, ts: TrainState, state: State, batch: Batch | None, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """After an epoch: `task`, `epoch` and the learner's metrics over all its steps."""

    def after_task(
        self, ts: TrainState, state: State, batch: Batch | None, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """After the algorithm's end-of-task work: `task`, `task_steps`."""

    def after_stream(
        self, ts: TrainState, state: State, batch: Batch | None, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """After the last task and its evaluation, not where the run was broken off; `metrics` is empty."""

    def before_evaluation(
        self, ts: TrainState, state: State, batch: Batch | None, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """Before the evaluation of a task: `task`, the one evaluated, and `split`, its name."""

    def after_evaluation(
        self, ts: TrainState, state: State, batch: Batch | None, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """After it: the same, `accuracy`, `loss`, `masked_accuracy`, `<name>_accuracy` of alternatives."""

    def close(self) -> None:
        """However the run has ended: let go of what is held open."""

    @property
    def watches_steps(self) -> bool:
        """Whether it overrides one of the step hooks."""
        return any(
            getattr(getattr(self, name), "__func__", None) is not getattr(Hook, name)
            for name in ("before_step", "after_step")
        )


class ProgressBar(Hook):
    """A bar for each task on a terminal, with the loss and accuracy of the latest step; elsewhere nothing.

    Args:
        every: the bar moves every so many steps.
        file: to write to; None for standard error.
    """

    shows_progress = True

    def __init__(self, every: int = 10, file: TextIO | None = None) -> None:
        super().__init__(every)
        self._file = file
        self._bar: Any = None
        self._first = 0

    def due(self, step: int) -> bool:
        """Never where nothing is shown, as each look at a step waits for it."""
        return self._bar is not None and not self._bar.disable and super().due(step)

    def before_task(
        self, ts: TrainState, state: State, batch: Batch | None, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """Start the task's bar; without `task_steps` it has no end."""
        self.close()
        title, total = f"task {metrics['task']}", metrics.get("task_steps")
        self._bar, self._first = tqdm(desc=title, total=total, file=self._file, disable=None), int(ts.step)

    def after_step(
        self, ts: TrainState, state: State, batch: Batch, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """Move the bar."""
        shown = {name: metrics[name] for name in ("loss", "accuracy") if name in metrics}
        self._bar.set_postfix({name: f"{value:.4f}" for name, value in shown.items()}, refresh=False)
        self._bar.update(int(ts.step) - self._first - self._bar.n)

    def after_task(
        self, ts: TrainState, state: State, batch: Batch | None, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """Fill the bar."""
        if self._bar is not None:
            self._bar.update(int(ts.step) - self._first - self._bar.n)
        self.close()

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class ProfilerTrace(Hook):
    """Records some steps with JAX's profiler, for TensorBoard, XProf or Perfetto.

    Args:
        directory: where the profile goes, below `plugins/profile/`.
        first: number of the first step recorded, from 1; the very first step compiles.
        steps: how many are recorded; fewer where the run ends before.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(self, directory: str | Path, first: int = 10, steps: int = 5) -> None:
        for name, value in (("first", first), ("steps", steps)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a number of steps >= 1, got {value!r}")
        self.directory = os.fspath(directory)
        self.first, self.last = first, first + steps - 1
        self._running = False

    def due(self, step: int) -> bool:
        """At the first and the last step that is recorded; those between stay as fast as they are."""
        return step in (self.first, self.last)

    def before_step(
        self, ts: TrainState, state: State, batch: Batch, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """Start before the first step that is recorded, when all earlier ones are done."""
        if int(ts.step) + 1 == self.first:
            jax.block_until_ready(ts)
            jax.profiler.start_trace(self.directory)
            self._running = True

    def after_step(
        self, ts: TrainState, state: State, batch: Batch, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """Stop after the last one, when it is done."""
        if int(ts.step) == self.last:
            jax.block_until_ready(ts)
            self.close()

    def after_stream(
        self, ts: TrainState, state: State, batch: Batch | None, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """Stop where the stream had fewer steps."""
        self.close()

    def close(self) -> None:
        """Stop, and write what was recorded."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


class PeriodicEvaluation(Hook):
    """Evaluates tasks every so many steps and writes `periodic/<split>/accuracy/task_<j>` and `.../loss/...`.

    A run by `sequel_core.run` or from a configuration has `evaluate_every` for its own evaluations.

    Args:
        algorithm: for its `predict`; with a learner, the one that it was made with.
        benchmark: whose tasks are evaluated.
        tasks: their indices; None for all.
        split: `test`, `validation` or `train`.
        every: number of steps between evaluations.
        batch_size: at most so many samples at once.

    Raises:
        ValueError: no such task or split, or one without samples.
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
        everything = range(len(benchmark))
        indices = list(everything) if tasks is None else list(tasks)
        if not indices or not set(indices) <= set(everything):
            raise ValueError(f"tasks must be indices from 0 to {everything[-1]}, got {indices}")
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
        """Evaluate and write."""
        scores: dict[str, float] = {}
        for j, samples in self._samples.items():
            found = self._evaluate(ts, state, samples)
            scores[f"{self._prefix}/accuracy/task_{j}"] = found.accuracy
            scores[f"{self._prefix}/loss/task_{j}"] = found.loss
        writer.write_scalars(int(ts.step), scores)


class ImageGrid(Hook):
    """Writes up to 25 images of the batch, before augmentation, as one picture every so many steps.

    Args:
        every: number of steps between pictures.
        name: of the picture.
    """

    def __init__(self, every: int = 100, name: str = "batch") -> None:
        super().__init__(every)
        self.name = name

    def after_step(
        self, ts: TrainState, state: State, batch: Batch, metrics: Metrics, writer: MetricWriter
    ) -> None:
        """Write the picture."""
        writer.write_images(int(ts.step), {self.name: image_grid(np.asarray(batch.x[:COUNT]))[None]})


class EveryWriter:
    """Stands for all writers of a learner: what is called on it is called on each that still works.

    It has the methods of MetricWriter, whatever these are, which is why none is written out here.

    Args:
        writers: of the learner.
    """

    def __init__(self, writers: Loggers) -> None:
        self._writers = writers

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_") or not hasattr(MetricWriter, name):
            raise AttributeError(f"a metric writer has no {name}")

        def tell(*args: Any, **kwargs: Any) -> None:
            self._writers.each(lambda writer: getattr(writer, name)(*args, **kwargs))

        return tell
