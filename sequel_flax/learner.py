"""FlaxLearner: trains an algorithm on the tasks of a stream in compiled steps."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import clu.metrics
import jax
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from numpy.typing import NDArray

from sequel_core.hparams import AlgorithmHParams, OptimizerHParams, TrainingHParams
from sequel_core.objectives import ObjectiveHParams
from sequel_core.runs.learner import (
    DivergenceError,
    Evaluation,
    FitMonitor,
    Mode,
    Progress,
    check_same_settings,
)
from sequel_core.runs.loggers import Loggers
from sequel_core.stream import plan
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.planner import check_position
from sequel_core.stream.task import AnySplit, Batch, Samples, Task
from sequel_flax.backbones import initial_variables
from sequel_flax.boundaries import SecondPhase, release_programs
from sequel_flax.bundle import Algorithm, BatchStatsTrainState, State, collections
from sequel_flax.checkpoints import Saver, restored
from sequel_flax.evaluation import Evaluator
from sequel_flax.evaluation import as_batch as as_batch
from sequel_flax.foreign import adapted
from sequel_flax.hooks import Hook, Hooks
from sequel_flax.objectives import build_objective
from sequel_flax.optimizers import build_optimizer, clip_by_global_norm, get_learning_rate
from sequel_flax.replay import Memory, stored_samples
from sequel_flax.sharding import (
    JaxProcesses,
    check_batch_size,
    device_mesh,
    of_main_process,
    one_copy,
    replicated,
)
from sequel_flax.steps import (
    NEVER,
    CompiledSteps,
    RunningMetrics,
    merge_on_host,
    rows,
    strong_types,
    train_metrics,
)
from sequel_flax.writers import MetricWriter, close_writer, resume_writer, write_table

if TYPE_CHECKING:
    from flax import nnx  # slow to import


def initial_train_state(
    algorithm: Algorithm,
    model: Any,
    tx: optax.GradientTransformation | OptimizerHParams,
    spec: StreamSpec,
    training: TrainingHParams,
    init: plan.Init = "torch",
) -> TrainState:
    """Return the train state before the first task.

    Args:
        algorithm: The algorithm. Only its trained parameters are given to the optimizer.
        model: A network with the interface of `adapted`.
        tx: The optimizer, or the settings of a built-in one.
        spec: The specification of the benchmark.
        training: The seed, the dtype and gradient clipping are used.
        init: The distribution of the initial weights of a built-in network.

    Returns:
        A TrainState; a `BatchStatsTrainState` if the network has variables besides its parameters.

    Raises:
        ValueError: The network or the optimizer does not fit the settings.

    Example:
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core.algorithms.naive import NaiveHParams
        >>> from sequel_flax import MLP, naive
        >>> spec = RotatedDigits(num_tasks=2, subset=20).spec
        >>> algorithm, training = naive(NaiveHParams()), TrainingHParams(grad_clip=1.0)
        >>> ts = initial_train_state(algorithm, MLP(widths=(8,)), optax.sgd(0.1), spec, training)
        >>> ts.params["head"]["kernel"].shape
        (8, 10)
    """
    tx = complete_optimizer(algorithm, model, tx, training)
    variables = initial_variables(model, spec, training.seed, training.dtype, init)
    train_state: Any = TrainState if [*variables] == ["params"] else BatchStatsTrainState
    ts = algorithm.prepare(train_state.create(apply_fn=model.apply, tx=tx, **variables), spec)
    strong: TrainState = strong_types(ts)
    return strong


def complete_optimizer(
    algorithm: Algorithm,
    model: Any,
    tx: optax.GradientTransformation | OptimizerHParams,
    training: TrainingHParams,
) -> optax.GradientTransformation:
    """Return the optimizer of a train state: with clipping, and for the trained parameters only.

    Args:
        algorithm: The algorithm.
        model: The network.
        tx: The optimizer, or the settings of a built-in one.
        training: The settings of gradient clipping are used.

    Example:
        >>> from sequel_core.algorithms.naive import NaiveHParams
        >>> from sequel_flax import naive
        >>> clipped, sgd = TrainingHParams(grad_clip=1.0), OptimizerHParams(lr=0.5)
        >>> tx = complete_optimizer(naive(NaiveHParams()), None, sgd, clipped)
        >>> updates, _ = tx.update({"w": jax.numpy.full(1, 8.0)}, tx.init({"w": jax.numpy.zeros(1)}))
        >>> round(float(updates["w"][0]), 3)
        -0.5
    """
    if isinstance(tx, OptimizerHParams):
        tx = build_optimizer(tx)
    if training.grad_clip is not None:
        by_value = training.grad_clip_algorithm == "value"
        tx = optax.chain((optax.clip if by_value else clip_by_global_norm)(training.grad_clip), tx)
    if algorithm.trained.trainable is not None:
        tx = optax.masked(tx, lambda params: algorithm.trained.mask_of(params, model))
    return tx


class TaskPosition(NamedTuple):
    """The position of the learner within a task.

    Args:
        task: The index of the task.
        done: The number of steps of the task that are done.
        running: The metrics of the steps since the last report.

    Example:
        >>> TaskPosition(task=0, done=5, running=None).done
        5
    """

    task: int
    done: int
    running: RunningMetrics


class TaskSchedule(NamedTuple):
    """The steps of one task.

    Args:
        task: The index of the task.
        split: The samples to train on.
        epochs: The number of epochs.
        steps_per_epoch: The number of steps per epoch.
        first: The number of steps of the stream before the task.
        learning_rate: The learning rate; nan if it cannot be read from the optimizer.
        intervals: A call takes no step past a multiple of one of these numbers of steps.
        score: The name of the score among the metrics of the training batches.
        before: The number of epochs and of steps of the task before these, in a second phase.

    Example:
        >>> schedule = TaskSchedule(1, None, 2, steps_per_epoch=5, first=10, learning_rate=0.1, intervals=())
        >>> schedule.steps
        10
    """

    task: int
    split: AnySplit
    epochs: int
    steps_per_epoch: int
    first: int
    learning_rate: float
    intervals: tuple[int, ...]
    score: str = "accuracy"
    before: tuple[int, int] = (0, 0)

    @property
    def steps(self) -> int:
        """The number of steps of the task."""
        return self.epochs * self.steps_per_epoch

    def read(self, running: RunningMetrics) -> dict[str, float]:
        """Return metrics from the device; this waits for their steps.

        Raises:
            DivergenceError: The loss of one of the steps was not finite.
        """
        running = jax.device_get(running)  # NumPy computes them: JAX would dispatch each operation alone
        if running.first_bad_step != NEVER:
            epoch, step = divmod(int(running.first_bad_step) - self.first, self.steps_per_epoch)
            raise DivergenceError(self.task, self.before[0] + epoch, step)
        return {name: float(value) for name, value in running.metrics.compute().items()}

    def progress(self, values: dict[str, float], epoch: int, done: int) -> Progress:
        """Return a report of the metrics since the last one; `values` is the result of `read`."""
        epochs_before, steps_before = self.before
        return Progress(
            step=self.first + done,
            epoch=epochs_before + epoch,
            task_step=steps_before + done,
            task_steps=steps_before + self.steps,
            loss=values.pop("loss", math.nan),
            score=values.pop(self.score, math.nan),
            learning_rate=self.learning_rate,
            extra=values,
        )


def planned(algorithm: Algorithm, spec: StreamSpec, state: State, batch: Batch) -> Batch:
    """Return a batch with the plan of the step after a state; no planner is advanced.

    Args:
        algorithm: The algorithm.
        spec: The specification of the benchmark.
        state: The state of the algorithm.
        batch: A batch without a plan.

    Example:
        >>> from sequel_core.algorithms.naive import NaiveHParams
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_flax import State, naive
        >>> spec, batch = RotatedDigits(num_tasks=2, subset=20).spec, Batch(None, np.zeros(1), np.zeros(1))
        >>> planned(naive(NaiveHParams()), spec, State(None, ()), batch).plan
        ()
    """
    return batch._replace(plan=algorithm.planner(spec, state).next(batch.y, batch.t))


class FlaxLearner(JaxProcesses):
    """Trains an algorithm on the tasks of a stream; `sequel_core.run` calls it.

    Args:
        algorithm: For example `ewc(EWCHParams())`.
        model: A linen or an NNX module, called with inputs `[B, ...]`; `sequel_flax.adapted` describes how it
            receives its mode.
        tx: The optimizer, or the settings of a built-in one. `lr_decay` needs one made with
            `optax.inject_hyperparams`.
        spec: The specification of the benchmark, `benchmark.spec`.
        training: Batch size, epochs, clipping, seed and dtype; None for the defaults.
        metrics: A `clu.metrics.Collection` class, called with `loss`, `logits` (what the network returns) and
            `labels` (the targets); None for the loss and the score. The metrics with these names, for
            example `loss` and `accuracy`, are shown as progress.
        writers: Objects with the methods of clu's MetricWriter; only the first of several processes writes.
        hooks: Called in this order before and after the stream, tasks, epochs, steps and evaluations.
        steps_per_call: The maximum number of steps in one compiled call, >= 1; 1 dispatches each step. None
            chooses 1 for a network with convolutions on a CPU, where XLA runs them slowly in loops, and 50
            otherwise.
        init: The distribution of the initial weights of a built-in network; see `initial_variables`.
        devices: The number of devices that share each batch, >= 1; or a `jax.sharding.Mesh` with the axis
            `data`, and perhaps `runs`, over which `run_together` divides runs. It must divide the batch size.
            With several processes of `jax.distributed`, these are the devices of all processes.

    Raises:
        ValueError: The model, the optimizer or the devices do not fit the settings, `steps_per_call` is below
            1, or a hook is not a `Hook`. With several processes of `jax.distributed`, there are hooks, or the
            settings differ.

    Example:
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core.algorithms.naive import NaiveHParams
        >>> from sequel_flax import MLP, naive
        >>> benchmark = RotatedDigits(num_tasks=2, subset=20)
        >>> training = TrainingHParams(batch_size=10)
        >>> model = MLP(widths=(8,))
        >>> learner = FlaxLearner(naive(NaiveHParams()), model, optax.sgd(0.1), benchmark.spec, training)
        >>> learner.fit_task(benchmark.tasks[0], FitMonitor(print, lambda: None))  # doctest: +ELLIPSIS
        Progress(step=2, epoch=0, task_step=2, task_steps=2, loss=...)
        >>> learner.evaluate(benchmark.tasks[0], "test").total > 0
        True
    """

    mode: Mode = "jax"

    def __init__(
        self,
        algorithm: Algorithm,
        model: nn.Module | nnx.Module,
        tx: optax.GradientTransformation | OptimizerHParams,
        spec: StreamSpec,
        training: TrainingHParams | None = None,
        *,
        metrics: type[clu.metrics.Collection] | None = None,
        writers: Sequence[MetricWriter] = (),
        hooks: Sequence[Hook] = (),
        steps_per_call: int | None = None,
        init: plan.Init = "torch",
        devices: int | Mesh = 1,
    ) -> None:
        self.training = training or TrainingHParams()
        if hooks and jax.process_count() > 1:
            raise ValueError(
                f"hooks need one process, got {len(hooks)} with {jax.process_count()} processes of "
                "jax.distributed; leave them out"
            )
        self.mesh = device_mesh(devices)
        self.num_devices = 1 if self.mesh is None else int(self.mesh.size)
        check_batch_size(self.mesh, self.training.batch_size)
        self.optimizer, self.metrics, self.steps_per_call = tx, metrics, steps_per_call
        self.implementation: Callable[[AlgorithmHParams], Algorithm] | None = None  # made the algorithm
        self.objective = algorithm.objective or build_objective(ObjectiveHParams(), spec)
        self.score = self.objective.score
        of_steps: Any = metrics or train_metrics(self.objective), steps_per_call, self.mesh
        self.steps = CompiledSteps(algorithm, *of_steps)
        if algorithm.second_phase is not None:
            step: Any = algorithm.second_phase.step
            self._phase_steps = CompiledSteps(algorithm._replace(train_step=step), *of_steps)
        self.writers = Loggers(writers if self.main_process else ())
        self.hooks = Hooks(hooks, self.writers)
        self.shows_progress = self.hooks.show_progress
        self.algorithm = algorithm
        self.hparams = algorithm.hparams
        self.spec = spec
        self.hparams.check(spec, self.training)
        self.model = adapted(model, spec.x)
        ts: Any = initial_train_state(algorithm, self.model, tx, spec, self.training, init)
        self.ts: Any
        self.state: State
        states = ts, strong_types(algorithm.init(ts, spec))
        settings = {"algo": asdict(self.hparams), "training": asdict(self.training)}
        check_same_settings(self.gather, {**settings, "model": repr(self.model)})
        self.ts, self.state = replicated(of_main_process(states), self.mesh)
        self.planner = algorithm.planner(spec, self.state)
        self._position: TaskPosition | None = None  # None between tasks
        self._saver = Saver()
        self.evaluator = Evaluator(algorithm, spec, self.training.eval_batch_size, self.mesh)

    @property
    def step(self) -> int:
        """The number of optimizer steps since the start of the stream."""
        return int(self.ts.step)

    # -- training

    def fit_task(self, task: Task, monitor: FitMonitor) -> None:
        """Train on one task, then consolidate it; see `sequel_core.runs.learner.Learner`.

        Raises:
            DivergenceError: The loss is not finite.
            ValueError: Planner and state have different positions: one was assigned without the other.
        """
        training = self.training
        check_position(self.planner, self.state.position)
        split = self.algorithm.training_split(self.state, task.train)
        size, drop_last = training.batch_size, training.drop_last
        plan.check_batch_size(task.index, len(split), size, drop_last)
        epochs, steps_per_epoch = (
            training.epochs(task.index),
            plan.steps_per_epoch(len(split), size, drop_last),
        )
        info = {"task": task.index, "task_steps": epochs * steps_per_epoch}
        self._call("before_task", info)
        if self._position is None:
            self._start_task(task, info["task_steps"])
            self._position = TaskPosition(task.index, 0, self.steps.no_metrics)
        first, rate = self.step - self._position.done, get_learning_rate(self.ts.opt_state)
        learning_rate = math.nan if rate is None else float(rate)
        intervals = (training.log_every_n_steps, *monitor.intervals)
        schedule = TaskSchedule(
            task.index, split, epochs, steps_per_epoch, first, learning_rate, intervals, self.score.key
        )
        for epoch in range(self._position.done // steps_per_epoch, epochs):
            self._fit_epoch(schedule, epoch, self._position, monitor)
        if self.algorithm.second_phase is not None:
            self._fit_second_phase(self.algorithm.second_phase, schedule, self._position, monitor)
        samples = plan.consolidation_batches(training.seed, task, training.batch_size)
        self._end_task(as_batch(chunk) for chunk in samples)
        self._position = None
        self._call("after_task", info)

    def _start_task(self, task: Task, num_steps: int) -> None:
        self._change(self.algorithm.start_task, task, num_steps)

    def _end_task(self, batches: Iterator[Batch]) -> None:
        self._change(self.algorithm.end_task, map(jax.device_put, batches))

    def _change(self, function: Callable[..., Any], *args: Any) -> None:
        """Set the states to `function(ts, state, *args)`, computed by the first device of each process."""
        states = (self.ts, self.state) if self.mesh is None else one_copy((self.ts, self.state))
        changed = strong_types(function(*states, *args))
        self.ts, self.state = replicated(of_main_process(changed), self.mesh)

    def _fit_epoch(
        self, schedule: TaskSchedule, epoch: int, position: TaskPosition, monitor: FitMonitor
    ) -> None:
        """Train from a position to the end of an epoch."""
        _, done, running = position
        info, of_epoch = {"task": schedule.task, "epoch": epoch}, self.steps.no_metrics
        self._call("before_epoch", info)
        for batches, steps in self._calls(schedule, epoch, done):
            running = self._take(schedule, info, running, batches, steps, done)
            done += steps
            epoch_end = done == (epoch + 1) * schedule.steps_per_epoch
            if epoch_end or done % self.training.log_every_n_steps == 0:
                values = schedule.read(running)
                if self.hooks:
                    of_epoch = merge_on_host(of_epoch, running)
                running = self.steps.no_metrics
                monitor.on_progress(schedule.progress(values, epoch, done))
            if epoch_end and self.hooks:
                self._call("after_epoch", {**schedule.read(of_epoch), **info})
            self._position = TaskPosition(schedule.task, done, running)
            monitor.after_step(done, schedule.steps, epoch_end)

    def _fit_second_phase(
        self, phase: SecondPhase, schedule: TaskSchedule, position: TaskPosition, monitor: FitMonitor
    ) -> None:
        """Train in the second phase of a task, from a position to its end; hooks are not called."""
        before, done, running = schedule.steps, position.done - schedule.steps, position.running
        if done == 0:
            self._change(phase.start)
        steps = phase.steps(self.state)
        left = len(steps.slots)
        count = done + left
        second = schedule._replace(
            epochs=phase.epochs,
            steps_per_epoch=count // phase.epochs,
            first=schedule.first + before,
            before=(schedule.epochs, before),
        )
        for part, size in self._phase_calls(second, steps, done):
            carry = (self.ts, self.state, running)
            self.ts, self.state, running = self._phase_steps(carry, part, size)
            done += size
            epoch_end = done % second.steps_per_epoch == 0
            if epoch_end or (before + done) % self.training.log_every_n_steps == 0:
                values, running = second.read(running), self.steps.no_metrics
                rate = float(steps.learning_rate[left - (count - done) - 1])
                report = second.progress(values, (done - 1) // second.steps_per_epoch, done)
                monitor.on_progress(report._replace(learning_rate=rate))
            self._position = TaskPosition(schedule.task, before + done, running)
            monitor.after_step(before + done, before + count, epoch_end)

    def _phase_calls(self, schedule: TaskSchedule, steps: Any, done: int) -> Iterator[tuple[Any, int]]:
        """Yield the steps of each compiled call of a second phase, and their number; see `_calls`."""
        start, count = 0, len(steps.slots)
        while start < count:
            most = self._phase_steps.choose(self.ts, self.state, rows(steps, start))
            size = min(most, count - start, schedule.steps_per_epoch - done % schedule.steps_per_epoch)
            size = min(size, *(n - (schedule.before[1] + done) % n for n in schedule.intervals))
            yield self._phase_steps.arranged(rows(steps, slice(start, start + size))), size
            start, done = start + size, done + size

    def _take(
        self,
        schedule: TaskSchedule,
        info: Mapping[str, Any],
        running: RunningMetrics,
        batches: Batch,
        steps: int,
        done: int,
    ) -> RunningMetrics:
        """Take steps in one compiled call; return the running metrics."""
        hooks = self.hooks.due(schedule.first + done + 1)
        if not hooks:
            return self._train(running, batches, steps)
        batch = batches if self.steps.steps_per_call == 1 else rows(batches, 0)
        self._call("before_step", info, batch, hooks)
        alone = self._train(self.steps.no_metrics, batches, steps)
        self._call("after_step", {**schedule.read(alone), **info}, batch, hooks)
        return merge_on_host(running, alone)

    def _train(self, running: RunningMetrics, batches: Batch, steps: int) -> RunningMetrics:
        self.ts, self.state, running = self.steps((self.ts, self.state, running), batches, steps)
        return running

    def _calls(self, schedule: TaskSchedule, epoch: int, done: int) -> Iterator[tuple[Batch, int]]:
        """Yield the batches of each compiled call of an epoch, and their number.

        No call goes past a multiple of an interval. A step for which a hook is due has its own call.
        """
        training, start = self.training, done % schedule.steps_per_epoch
        for samples in plan.training_batches(
            training.seed,
            schedule.task,
            epoch,
            schedule.split,
            training.batch_size,
            training.drop_last,
            start,
        ):
            chunk = as_batch(samples)
            most = self.steps.steps_per_call or self.steps.choose(
                self.ts, self.state, planned(self.algorithm, self.spec, self.state, rows(chunk, 0))
            )
            k, count = 0, len(chunk.t)
            while k < count:
                steps = min(most, count - k, *(n - done % n for n in schedule.intervals))
                steps = self.hooks.steps_until_due(schedule.first + done + 1, steps)
                part = rows(chunk, slice(k, k + steps))
                part = part._replace(plan=self.planner.next(part.y, part.t))
                yield self.steps.arranged(part), steps
                k, done = k + steps, done + steps

    def _call(
        self,
        name: str,
        metrics: Mapping[str, Any],
        batch: Batch | None = None,
        hooks: Sequence[Hook] | None = None,
    ) -> None:
        """Call a method of the given hooks, by default of all."""
        self.hooks.call(name, self.ts, self.state, batch, metrics, hooks)

    # -- evaluation

    def evaluate(self, task: Task, split: str) -> Evaluation:
        """Measure the score and the loss on a split of a task; see `sequel_core.runs.learner.Learner`."""
        info = {"task": task.index, "split": split}
        self._call("before_evaluation", info)
        result = self.evaluator(self.ts, self.state, task.split(split))
        key = self.score.key
        scores = {key: result.score, "loss": result.loss}
        if not math.isnan(result.masked_score):
            scores[f"masked_{key}"] = result.masked_score
        others = {f"{name}_{key}": score for name, score in result.alternatives.items()}
        self._call("after_evaluation", {**info, **scores, **others})
        return result

    # -- reports

    @property
    def logs(self) -> bool:
        """Whether there are writers."""
        return len(self.writers) > 0

    def start_stream(self, config: Mapping[str, Any], resumed: bool = False) -> None:
        """Write the configuration of the run; see `sequel_core.runs.learner.Learner`."""
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
        """Write an image `[H, W, 3]` with every writer, at the current step."""
        self.writers.each(lambda writer: writer.write_images(self.step, {name: image[None]}))

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Write a table with every writer, at the current step; as Markdown if a writer has no tables."""
        self.writers.each(lambda writer: write_table(writer, self.step, name, columns, rows))

    # -- state

    def memory_samples(self) -> Samples:
        """Return copies of the samples in the memory of a replay method, inputs `[n, ...]`.

        Raises:
            ValueError: The algorithm has no memory of samples.
        """
        parts = (self.state.memory, *self.state.memory)
        memory = next((part for part in parts if isinstance(part, Memory)), None)
        if memory is None:
            raise ValueError(f"{self.hparams.name} keeps no samples; methods with a memory do")
        return stored_samples(memory)

    def memory_bytes(self) -> int:
        """Return the size in bytes of everything that the algorithm keeps of past tasks."""
        return int(sum(leaf.nbytes for leaf in jax.tree.leaves(self.state.memory)))

    def save(self, directory: Path) -> Callable[[], None]:
        """Write everything that later steps depend on; see `sequel_core.runs.learner.Learner`."""
        return self._saver.save(directory, self._tree())

    def restore(self, directory: Path) -> None:
        """Read what `save` wrote; see `sequel_core.runs.learner.Learner`."""
        tree = restored(directory, self._tree())
        self.ts, self.state = replicated((tree["ts"], tree["state"]), self.mesh)
        self.planner = self.algorithm.planner(self.spec, self.state)
        task, done = map(int, tree["position"])
        self._position = None if task < 0 else TaskPosition(task, done, tree["tally"])

    def _tree(self) -> dict[str, Any]:
        """Return everything that later steps depend on; with several devices, as NumPy arrays."""
        task, done, running = self._position or (-1, 0, self.steps.no_metrics)
        tree = {"ts": self.ts, "state": self.state, "position": np.array([task, done]), "tally": running}
        return tree if self.mesh is None else jax.device_get(tree)

    def weights(self) -> dict[str, FloatArray]:
        """Return parameters and running statistics in the canonical layout, which is that of Flax."""
        trees = jax.device_get((self.ts.params, collections(self.ts).get("batch_stats", {})))
        leaves = {path: leaf for tree in trees for path, leaf in flatten_dict(tree, sep="/").items()}
        return {path: np.asarray(leaf) for path, leaf in sorted(leaves.items())}

    def describe(self) -> dict[str, Any]:
        """Return the text of the model and the number of parameters."""
        leaves = jax.tree.leaves(self.ts.params)
        return {"model": repr(self.model), "parameters": int(sum(leaf.size for leaf in leaves))}

    def threads(self) -> int:
        """Return the number of threads that XLA uses on a CPU."""
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def close(self, failed: bool = False) -> None:
        """Wait for checkpoints, close the writers and hooks, and free compiled programs."""
        self._saver.close()
        self.writers.each(lambda writer: close_writer(writer, failed))
        self.hooks.close()
        release_programs()
