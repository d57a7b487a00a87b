"""FlaxLearner: one jitted step, dispatched one by one or looped over within one call."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import clu.metrics
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict
from numpy.typing import NDArray

from sequel_core.hparams import TrainingHParams
from sequel_core.runs.learner import DivergenceError, Evaluation, FitMonitor, Mode, Progress
from sequel_core.runs.loggers import Loggers
from sequel_core.stream import plan
from sequel_core.stream.arrays import FloatArray, IntArray
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.planner import check_position
from sequel_core.stream.task import AnySplit, Batch, Samples, Task
from sequel_flax.backbones import initial_variables
from sequel_flax.bundle import (
    Algorithm,
    BatchStatsTrainState,
    State,
    batch_stats,
    get_learning_rate,
)
from sequel_flax.checkpoints import Saver, restored
from sequel_flax.evaluation import Evaluator
from sequel_flax.evaluation import as_batch as as_batch
from sequel_flax.foreign import adapted
from sequel_flax.hooks import EveryWriter, Hook
from sequel_flax.optimizers import clip_by_global_norm
from sequel_flax.replay import Memory, stored_samples
from sequel_flax.writers import MetricWriter, close_writer, resume_writer, write_table

NEVER = np.iinfo(np.int32).max
LOOPED_STEPS = 50


TrainMetrics = clu.metrics.Collection.create(
    accuracy=clu.metrics.Accuracy, loss=clu.metrics.Average.from_output("loss")
)
"""Default metrics of the training batches."""


class RunningMetrics(NamedTuple):
    """What is summed on the device between two reports."""

    metrics: clu.metrics.Collection
    first_bad_step: jax.Array  # the first step whose loss was not finite, int32 (); NEVER without one


class TaskPosition(NamedTuple):
    """Where in a task the learner is."""

    task: int
    done: int  # steps of the task
    running: RunningMetrics


class FlaxLearner:
    """Runs an algorithm bundle over tasks.

    Args:
        algorithm: for example `ewc(EWCHParams())`.
        model: a linen or an NNX module, called with images `[B, H, W, C]`; `sequel_flax.foreign.adapted` says
            how it is told that it trains.
        tx: optimizer; `lr_decay` needs one made with `optax.inject_hyperparams`.
        spec: of the benchmark (`benchmark.spec`).
        training: batch size, epochs, clipping, seed, dtype.
        metrics: a `clu.metrics.Collection` class, fed with `loss`, `logits` and `labels`; those named
            accuracy and loss are shown as progress.
        writers: objects with the methods of clu's MetricWriter.
        hooks: called in this order before and after the stream, tasks, epochs, steps and evaluations.
        steps_per_call: at most so many steps in one compiled call; 1 dispatches each step alone. None chooses
            1 for a network with convolutions on a CPU, where XLA runs them slowly within a loop, else 50.

    Raises:
        ValueError: a setting that the model or the optimizer cannot follow, or a hook that is none.
    """

    mode: Mode = "jax"

    def __init__(
        self,
        algorithm: Algorithm,
        model: nn.Module | nnx.Module,
        tx: optax.GradientTransformation,
        spec: StreamSpec,
        training: TrainingHParams | None = None,
        *,
        metrics: type[clu.metrics.Collection] = TrainMetrics,
        writers: Sequence[MetricWriter] = (),
        hooks: Sequence[Hook] = (),
        steps_per_call: int | None = None,
    ) -> None:
        if steps_per_call is not None and steps_per_call < 1:
            raise ValueError(f"steps_per_call must be >= 1, got {steps_per_call}")
        for hook in hooks:
            if not isinstance(hook, Hook):
                raise ValueError(
                    "hooks must be objects of subclasses of sequel_flax.hooks.Hook, got a "
                    f"{type(hook).__name__}"
                )
        self.algorithm = algorithm
        self.hparams = algorithm.hparams
        self.training = training or TrainingHParams()
        self.spec = spec
        self.hparams.check(spec, self.training)
        self.model = adapted(model)
        self.writers = Loggers(writers)
        self.hooks = tuple(hooks)
        self.shows_progress = any(hook.shows_progress for hook in hooks)
        self._step_hooks = [hook for hook in hooks if hook.watches_steps]
        self._writer: Any = EveryWriter(self.writers)
        self.steps_per_call = steps_per_call
        self.metrics = metrics
        if self.training.grad_clip is not None:
            tx = optax.chain(clip_by_global_norm(self.training.grad_clip), tx)
        if algorithm.trained.trainable is not None:
            tx = optax.masked(tx, lambda params: algorithm.trained.mask_of(params, self.model))
        variables = initial_variables(self.model, spec, self.training.seed, self.training.dtype)
        kind: Any = BatchStatsTrainState if "batch_stats" in variables else TrainState
        ts = algorithm.prepare(kind.create(apply_fn=self.model.apply, tx=tx, **variables), spec)
        self.ts = strong_types(ts)
        self.state = strong_types(algorithm.init(self.ts, spec))
        self.planner = algorithm.planner(spec, self.state)
        self._empty = jax.device_get(
            RunningMetrics(strong_types(metrics.empty()), jnp.asarray(NEVER, jnp.int32))
        )
        self._within: TaskPosition | None = None  # None between tasks
        self._saver = Saver()
        self._step = jax.jit(self._traced_step, donate_argnums=(0, 1, 2))
        self._loop = jax.jit(self._traced_loop, donate_argnums=(0, 1, 2))
        self._evaluator = Evaluator(algorithm, spec, self.training.eval_batch_size)

    @property
    def step(self) -> int:
        """Optimizer steps since the start of the stream."""
        return int(self.ts.step)

    # -- what is compiled; the state is an argument, only what never changes is read from self

    def _traced_step(
        self, ts: TrainState, state: State, running: RunningMetrics, batch: Batch
    ) -> tuple[TrainState, State, RunningMetrics]:
        step = ts.step
        ts, state, outputs = self.algorithm.train_step(ts, state, batch)
        merged = running.metrics.merge(self.metrics.single_from_model_output(**outputs))
        metrics = jax.tree.map(lambda old, new: new.astype(old.dtype), running.metrics, merged)
        bad = jnp.where(jnp.isfinite(outputs["loss"]), NEVER, step)
        return (
            ts,
            state,
            RunningMetrics(metrics, jnp.minimum(running.first_bad_step, bad.astype(jnp.int32))),
        )

    def _traced_loop(
        self, ts: TrainState, state: State, running: RunningMetrics, batches: Batch, steps: int
    ) -> tuple[TrainState, State, RunningMetrics]:
        """Take the first `steps` of the batches; that number may change without compiling again."""

        def body(
            k: int, carry: tuple[TrainState, State, RunningMetrics]
        ) -> tuple[TrainState, State, RunningMetrics]:
            return self._traced_step(*carry, jax.tree.map(lambda a: a[k], batches))

        end: tuple[TrainState, State, RunningMetrics] = jax.lax.fori_loop(
            0, steps, body, (ts, state, running)
        )
        return end

    # -- the Learner protocol

    def fit_task(self, task: Task, monitor: FitMonitor) -> None:
        """Train on one task, then consolidate it; see `sequel_core.runs.learner.Learner`.

        Raises:
            ValueError: planner and state have different positions: one was assigned without the other.
        """
        training, size = self.training, self.training.batch_size
        check_position(self.planner, self.state.position)
        split = self.algorithm.training_split(self.state, task.train)
        plan.check_batch_size(task.index, len(split), size)
        epochs, steps_per_epoch = training.epochs(task.index), len(split) // size
        task_steps = epochs * steps_per_epoch
        self._call("before_task", {"task": task.index, "task_steps": task_steps})
        if self._within is None:
            ts, state = self.algorithm.start_task(self.ts, self.state, task)
            self.ts, self.state = strong_types(ts), strong_types(state)
            self._within = TaskPosition(task.index, 0, self._empty)
        _, done, running = self._within
        first, learning_rate = self.step - done, self._learning_rate()
        intervals = (training.log_every_n_steps, *monitor.intervals)
        for epoch in range(done // steps_per_epoch, epochs):
            order = plan.epoch_batches(training.seed, task.index, epoch, len(split), size)
            where, whole = {"task": task.index, "epoch": epoch}, self._empty
            self._call("before_epoch", where)
            for batches, steps in self._calls(split, order[done % steps_per_epoch :], first, done, intervals):
                if self._step_hooks and (hooks := self._due(first + done + 1)):
                    batch = batches if self.steps_per_call == 1 else rows(batches, 0)
                    self._call("before_step", where, batch, hooks)
                    alone = self._take(self._empty, batches, steps)
                    values = self._read(alone, task, first, steps_per_epoch)
                    self._call("after_step", {**values, **where}, batch, hooks)
                    running = together(running, alone)
                else:
                    running = self._take(running, batches, steps)
                done += steps
                epoch_end = done == (epoch + 1) * steps_per_epoch
                if epoch_end or done % training.log_every_n_steps == 0:
                    values = self._read(running, task, first, steps_per_epoch)
                    whole, running = (
                        together(whole, running) if self.hooks else whole,
                        self._empty,
                    )
                    loss, accuracy = values.pop("loss", math.nan), values.pop("accuracy", math.nan)
                    monitor.on_progress(
                        Progress(
                            step=first + done,
                            epoch=epoch,
                            task_step=done,
                            task_steps=task_steps,
                            loss=loss,
                            accuracy=accuracy,
                            learning_rate=learning_rate,
                            extra=values,
                        )
                    )
                if epoch_end and self.hooks:
                    values = self._read(whole, task, first, steps_per_epoch)
                    self._call("after_epoch", {**values, **where})
                self._within = TaskPosition(task.index, done, running)
                monitor.after_step(done, task_steps, epoch_end)
        samples = plan.consolidation_batches(training.seed, task, size)
        kept = (jax.device_put(as_batch(chunk)) for chunk in samples)
        ts, state = self.algorithm.end_task(self.ts, self.state, kept)
        self.ts, self.state = strong_types(ts), strong_types(state)
        self._within = None
        self._call("after_task", {"task": task.index, "task_steps": task_steps})

    def evaluate(self, task: Task, split: str) -> Evaluation:
        """Count correct predictions on a split of a task; see `sequel_core.runs.learner.Learner`."""
        where = {"task": task.index, "split": split}
        self._call("before_evaluation", where)
        found = self._evaluator(self.ts, self.state, task.split(split))
        others = {f"{name}_accuracy": hits / found.total for name, hits in found.alternatives.items()}
        self._call(
            "after_evaluation",
            {
                **where,
                "accuracy": found.accuracy,
                "loss": found.loss,
                "masked_accuracy": found.masked_accuracy,
                **others,
            },
        )
        return found

    @property
    def logs(self) -> bool:
        """Whether there are writers."""
        return len(self.writers) > 0

    def start_stream(self, config: Mapping[str, Any], resumed: bool = False) -> None:
        """Write the run's configuration with every writer; see `sequel_core.runs.learner.Learner`."""
        if resumed:
            self.writers.each(lambda writer: resume_writer(writer, self.step))
        else:
            self.writers.each(lambda writer: writer.write_hparams(config))
        self._call("before_stream", {})

    def end_stream(self) -> None:
        """Flush the writers."""
        self._call("after_stream", {})
        self.writers.each(lambda writer: writer.flush())

    def log(self, metrics: Mapping[str, float]) -> None:
        """Write numbers with every writer, at the current step."""
        step = self.step  # read from the device once
        self.writers.each(lambda writer: writer.write_scalars(step, metrics))

    def log_image(self, name: str, image: NDArray[np.uint8]) -> None:
        """Write a picture `[H, W, 3]` with every writer, at the current step."""
        self.writers.each(lambda writer: writer.write_images(self.step, {name: image[None]}))

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Write a table with every writer, as Markdown where it has no tables, at the current step."""
        self.writers.each(lambda writer: write_table(writer, self.step, name, columns, rows))

    def memory_samples(self) -> Samples:
        """Return copies of the samples that a replay method holds, images `[n, H, W, C]`.

        Raises:
            ValueError: the algorithm keeps no samples.
        """
        kept = self.state.memory
        found = [part for part in (kept, *kept) if isinstance(part, Memory)]
        if not found:
            raise ValueError(f"{self.hparams.name} keeps no samples; methods with a memory do")
        return stored_samples(found[0])

    def memory_bytes(self) -> int:
        """Return the bytes of all that the algorithm keeps of past tasks."""
        return int(sum(leaf.nbytes for leaf in jax.tree.leaves(self.state.memory)))

    def save(self, directory: Path) -> Callable[[], None]:
        """Write the train state, the algorithm's state, ...; see `sequel_core.runs.learner.Learner`."""
        return self._saver.save(directory, self._tree())

    def restore(self, directory: Path) -> None:
        """Read back what `save` wrote; see `sequel_core.runs.learner.Learner`."""
        tree = restored(directory, self._tree())
        self.ts, self.state = tree["ts"], tree["state"]
        self.planner = self.algorithm.planner(self.spec, self.state)
        task, done = map(int, tree["position"])
        self._within = None if task < 0 else TaskPosition(task, done, tree["tally"])

    def _tree(self) -> dict[str, Any]:
        """Return all that the coming steps depend on."""
        task, done, running = (-1, 0, self._empty) if self._within is None else self._within
        return {
            "ts": self.ts,
            "state": self.state,
            "position": np.array([task, done]),
            "tally": running,
        }

    def weights(self) -> dict[str, FloatArray]:
        """Return weights and running statistics in the canonical layout, which is Flax's own."""
        trees = jax.device_get((self.ts.params, batch_stats(self.ts)))
        leaves = {path: leaf for tree in trees for path, leaf in flatten_dict(tree, sep="/").items()}
        return {path: np.asarray(leaf) for path, leaf in sorted(leaves.items())}

    def describe(self) -> dict[str, Any]:
        """Return the model and the parameter table's totals as plain values."""
        leaves = jax.tree.leaves(self.ts.params)
        return {"model": repr(self.model), "parameters": int(sum(leaf.size for leaf in leaves))}

    def threads(self) -> int:
        """Return the number of cores that XLA's thread pool takes on a CPU."""
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def close(self, failed: bool = False) -> None:
        """Flush and close the writers, and end the background's work on checkpoints."""
        self._saver.close()
        self.writers.each(lambda writer: close_writer(writer, failed))
        for hook in self.hooks:
            hook.close()

    # -- parts of the above

    def _call(
        self,
        name: str,
        metrics: Mapping[str, Any],
        batch: Batch | None = None,
        hooks: Sequence[Hook] | None = None,
    ) -> None:
        """Call a method of hooks, of all unless told which."""
        for hook in self.hooks if hooks is None else hooks:
            getattr(hook, name)(self.ts, self.state, batch, metrics, self._writer)

    def _due(self, step: int) -> list[Hook]:
        """Return the hooks that are called around a step; `step` is its number in the stream, from 1."""
        return [hook for hook in self._step_hooks if hook.due(step)]

    def _take(self, running: RunningMetrics, batches: Batch, steps: int) -> RunningMetrics:
        """Take steps in one compiled call."""
        if self.steps_per_call == 1:
            self.ts, self.state, running = self._step(self.ts, self.state, running, batches)
        else:
            self.ts, self.state, running = self._loop(self.ts, self.state, running, batches, steps)
        return running

    def _read(
        self, running: RunningMetrics, task: Task, first: int, steps_per_epoch: int
    ) -> dict[str, float]:
        """Return the metrics of a tally; wait for the steps that it counts."""
        running = jax.device_get(running)  # NumPy computes them: JAX would dispatch every operation alone
        if running.first_bad_step != NEVER:
            raise DivergenceError(task.index, *divmod(int(running.first_bad_step) - first, steps_per_epoch))
        return {name: float(value) for name, value in running.metrics.compute().items()}

    def _learning_rate(self) -> float:
        rate = get_learning_rate(self.ts.opt_state)
        return math.nan if rate is None else float(rate)

    def _calls(
        self, split: AnySplit, order: IntArray, first: int, done: int, intervals: Sequence[int]
    ) -> Iterator[tuple[Batch, int]]:
        """Yield what each compiled call takes, and its steps.

        None goes past a multiple of an interval, and a step that a hook asks for is alone in its call.
        """
        for samples in plan.take_in_chunks(split, order):
            chunk = as_batch(samples)
            if self.steps_per_call is None:
                one = rows(chunk, 0)
                planned = one._replace(plan=self.algorithm.planner(self.spec, self.state).next(one.y, one.t))
                self.steps_per_call = self._choose_steps_per_call(planned)
            k, count = 0, len(chunk.y)
            while k < count:
                steps = min(self.steps_per_call, count - k, *(n - done % n for n in intervals))
                if self._step_hooks:
                    due = (n for n in range(steps) if self._due(first + done + n + 1))
                    steps = max(next(due, steps), 1)  # up to the step that is due, or that one alone
                part = rows(chunk, slice(k, k + steps))
                part = part._replace(plan=self.planner.next(part.y, part.t))
                if self.steps_per_call == 1:
                    yield rows(part, 0), 1
                else:
                    yield jax.tree.map(partial(filled, count=self.steps_per_call), part), steps
                k, done = k + steps, done + steps

    def _choose_steps_per_call(self, batch: Batch) -> int:
        if jax.default_backend() != "cpu":
            return LOOPED_STEPS
        traced = jax.make_jaxpr(self.algorithm.train_step)(self.ts, self.state, batch)
        return 1 if "conv_general_dilated" in str(traced) else LOOPED_STEPS


def rows(batch: Batch, which: int | slice) -> Batch:
    """Return these rows of every array of a batch."""
    part: Batch = jax.tree.map(lambda a: a[which], batch)
    return part


def filled(rows: np.ndarray, count: int) -> np.ndarray:
    """Return the rows `[n, ...]` with zeros after them, `[count, ...]`; the rows themselves if n is count."""
    if len(rows) == count:
        return rows
    return np.concatenate([rows, np.zeros((count - len(rows), *rows.shape[1:]), rows.dtype)])


def together(running: RunningMetrics, more: RunningMetrics) -> RunningMetrics:
    """Return what two tallies count together, on the host, in the dtypes of the first."""
    (metrics, bad), (others, worse) = jax.device_get((running, more))
    merged = jax.tree.map(lambda old, new: np.asarray(new, old.dtype), metrics, metrics.merge(others))
    return RunningMetrics(merged, np.minimum(bad, worse))


def strong_types(tree: Any) -> Any:
    """Return the tree with every leaf an array of a definite type, so that the step is compiled once."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.asarray(leaf).dtype), tree)
