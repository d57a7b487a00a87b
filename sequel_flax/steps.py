"""Compiled training steps, one or several per call, and the metrics that they accumulate on the device."""

from __future__ import annotations

from functools import cache, partial
from typing import Any, NamedTuple

import clu.metrics
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState
from jax.sharding import Mesh

from sequel_core.stream.task import Batch
from sequel_flax.bundle import Algorithm, AnyStep, State, StepOutputs
from sequel_flax.objectives import Objective
from sequel_flax.placement import keeps_on_host
from sequel_flax.sharding import copies, replicated, sharded

NEVER = np.iinfo(np.int32).max
STEPS_PER_LOOP = 50

TrainMetrics = clu.metrics.Collection.create(
    accuracy=clu.metrics.Accuracy, loss=clu.metrics.Average.from_output("loss")
)
"""Metrics of the training batches of class labels."""


@cache  # because JAX keeps every class of metrics
def train_metrics(objective: Objective) -> type[clu.metrics.Collection]:
    """Return the metrics of the training batches: the mean loss, and the score if it has values per sample.

    Args:
        objective: What the network is trained on.

    Example:
        >>> from sequel_flax import squared_error
        >>> sorted(train_metrics(squared_error()).empty().compute())
        ['loss', 'squared_error']
    """
    loss = clu.metrics.Average.from_output("loss")
    values, weight_of = objective.values, objective.score_weight
    if values is None:
        only_loss: type[clu.metrics.Collection] = clu.metrics.Collection.create(loss=loss)
        return only_loss
    score_values = values

    class ScoreMetric(clu.metrics.Average):  # type: ignore[misc]
        @classmethod
        def empty(cls) -> Any:
            count = jnp.int32 if weight_of is None else jnp.float32
            return cls(total=jnp.zeros((), jnp.float32), count=jnp.zeros((), count))

        @classmethod
        def from_model_output(cls, *, logits: Any, labels: Any, counts: Any = None, **_: Any) -> Any:
            scores = score_values(logits, labels)
            weights: Any = jnp.ones_like(scores)
            if weight_of is not None:
                weights = weight_of(Batch(None, labels, None)).astype(scores.dtype)
            if counts is not None:  # of each sample [B], false for padding
                weights = weights * counts.reshape(-1, *[1] * (weights.ndim - 1))
            return cls(total=(weights * scores).sum(), count=weights.sum())

    created: type[clu.metrics.Collection] = clu.metrics.Collection.create(
        **{objective.score.key: flax.struct.dataclass(ScoreMetric), "loss": loss}
    )
    return created


class RunningMetrics(NamedTuple):
    """Metrics that are accumulated on the device between two reports.

    Args:
        metrics: The metrics of the training batches.
        first_bad_step: The first step whose loss was not finite, int32 (); `NEVER` if there is none.

    Example:
        >>> int(RunningMetrics(TrainMetrics.empty(), np.int32(7)).first_bad_step)
        7
    """

    metrics: clu.metrics.Collection
    first_bad_step: jax.Array


Carry = tuple[TrainState, State, RunningMetrics]


class CompiledSteps:
    """Takes training steps in compiled calls.

    Args:
        algorithm: The algorithm.
        metrics: The class of the metrics.
        steps_per_call: The maximum number of steps in one call, >= 1. None chooses 1 for a network with
            convolutions on a CPU, where XLA runs them slowly in loops, and 50 otherwise.
        mesh: The devices that share each batch; None for one device.

    Raises:
        ValueError: `steps_per_call` is below 1, or `mem_device=cpu` with more than one step or device.

    Example:
        >>> from sequel_core.algorithms.naive import NaiveHParams
        >>> from sequel_flax import naive
        >>> CompiledSteps(naive(NaiveHParams()), TrainMetrics, steps_per_call=10).steps_per_call
        10
    """

    def __init__(
        self,
        algorithm: Algorithm,
        metrics: type[clu.metrics.Collection],
        steps_per_call: int | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        if steps_per_call is not None and steps_per_call < 1:
            raise ValueError(f"steps_per_call must be >= 1, got {steps_per_call}")
        self._on_host = keeps_on_host(algorithm)
        if self._on_host and steps_per_call not in (None, 1):
            raise ValueError(
                "steps_per_call must be 1 with mem_device=cpu, because each step copies samples between the "
                f"host and the device, got {steps_per_call}; leave it out"
            )
        if self._on_host and mesh is not None:
            raise ValueError(
                "mem_device must be auto with several devices, which each have a copy of the memory, got cpu"
                "; use mem_device=auto or one device"
            )
        self.steps_per_call = 1 if self._on_host else steps_per_call
        self.no_metrics = jax.device_get(
            RunningMetrics(strong_types(metrics.empty()), jnp.asarray(NEVER, jnp.int32))
        )
        self._algorithm = algorithm
        self._mesh = mesh
        self.metrics = metrics
        # `choose` and the step share one trace.
        self._train_step = jax.jit(algorithm.train_step, inline=True)
        carry = (copies(mesh),) * 3
        options: Any = {"donate_argnums": (0, 1, 2), "out_shardings": copies(mesh)}
        self._step = jax.jit(self._traced_step, in_shardings=(*carry, None), **options)
        self._loop = jax.jit(self._traced_loop, in_shardings=(*carry, None, None), **options)
        self._add = jax.jit(partial(_with_step, metrics))

    def choose(self, ts: TrainState, state: State, batch: Batch) -> int:
        """Return the maximum number of steps in one call, chosen for a batch if it was None."""
        if self.steps_per_call is None:
            self.steps_per_call = STEPS_PER_LOOP
            if jax.default_backend() == "cpu":
                traced = self._train_step.trace(ts, state, batch).jaxpr
                self.steps_per_call = 1 if "conv_general_dilated" in str(traced) else STEPS_PER_LOOP
        return self.steps_per_call

    def arranged(self, batches: Batch) -> Batch:
        """Return batches `[n, B, ...]` as one call takes them: padded, or the single batch `[B, ...]`."""
        if self.steps_per_call == 1:
            return rows(batches, 0)
        count: Any = self.steps_per_call
        arranged: Batch = jax.tree.map(partial(padded, count=count), batches)
        return arranged

    def __call__(self, carry: Carry, batches: Batch, steps: int) -> Carry:
        """Take steps in one call.

        Args:
            carry: The train state, the state and the running metrics. Their buffers are donated.
            batches: The result of `arranged`.
            steps: The number of steps.

        Returns:
            The carry after the steps.
        """
        if self._on_host:
            ts, state, running = carry
            ts, state, outputs = self._algorithm.train_step(ts, state, batches)
            return ts, state, self._add(running, outputs, carry[0].step)
        single = self.steps_per_call == 1
        batches = sharded(batches, self._mesh, axis=0 if single else 1)
        ts, state, running = carry
        carry = (ts, state, replicated(running, self._mesh))  # else new metrics compile the step again
        after: Carry = self._step(*carry, batches) if single else self._loop(*carry, batches, steps)
        return after

    def _traced_step(self, *carry_and_batch: Any) -> Carry:
        return one_step(self._train_step, self.metrics, *carry_and_batch)

    def _traced_loop(self, *carry_and_batches: Any) -> Carry:
        return steps_in_loop(self._train_step, self.metrics, *carry_and_batches)


def one_step(
    train_step: AnyStep,
    metrics: type[clu.metrics.Collection],
    ts: TrainState,
    state: State,
    running: RunningMetrics,
    batch: Batch,
) -> Carry:
    """Take one step; a pure function of the last four arguments.

    Args:
        train_step: The step of the algorithm.
        metrics: The class of the metrics.
        ts: The train state.
        state: The state of the algorithm.
        running: The metrics of earlier steps.
        batch: The batch.
    """
    step = ts.step
    ts, state, outputs = train_step(ts, state, batch)
    return ts, state, _with_step(metrics, running, outputs, step)


def steps_in_loop(
    train_step: AnyStep,
    metrics: type[clu.metrics.Collection],
    ts: TrainState,
    state: State,
    running: RunningMetrics,
    batches: Batch,
    steps: int,
) -> Carry:
    """Take the first `steps` of the batches `[n, B, ...]`. Another number does not compile again.

    The other arguments are those of `one_step`.
    """

    def body(k: int, carry: Carry) -> Carry:
        return one_step(train_step, metrics, *carry, rows(batches, k))

    end: Carry = jax.lax.fori_loop(0, steps, body, (ts, state, running))
    return end


def _with_step(
    metrics: type[clu.metrics.Collection], running: RunningMetrics, outputs: StepOutputs, step: Any
) -> RunningMetrics:
    """Return the running metrics with those of a step."""
    merged = running.metrics.merge(metrics.single_from_model_output(**outputs))
    values = jax.tree.map(lambda old, new: new.astype(old.dtype), running.metrics, merged)
    bad_step = jnp.where(jnp.isfinite(outputs["loss"]), NEVER, step).astype(jnp.int32)
    return RunningMetrics(values, jnp.minimum(running.first_bad_step, bad_step))


def rows(batch: Batch, index: int | slice) -> Batch:
    """Return rows of every array of a batch.

    Args:
        batch: Arrays `[n, ...]`.
        index: The index of a row, or a slice.

    Example:
        >>> rows(Batch(np.arange(6).reshape(3, 2), np.arange(3), np.zeros(3, int)), 1).x.tolist()
        [2, 3]
    """
    part: Batch = jax.tree.map(lambda a: a[index], batch)
    return part


def padded(array: np.ndarray, count: int) -> np.ndarray:
    """Return an array with rows of zeros at the end.

    Args:
        array: Rows `[n, ...]`.
        count: The number of rows of the result, >= n.

    Returns:
        An array `[count, ...]`, the given one if n is `count`.

    Example:
        >>> padded(np.array([1, 2]), 3).tolist()
        [1, 2, 0]
    """
    if len(array) == count:
        return array
    return np.concatenate([array, np.zeros((count - len(array), *array.shape[1:]), array.dtype)])


def merge_on_host(running: RunningMetrics, more: RunningMetrics) -> RunningMetrics:
    """Return the metrics of all steps of both, as NumPy arrays with the dtypes of the first.

    Args:
        running: The metrics of some steps.
        more: The metrics of later steps.

    Example:
        >>> none, bad = (RunningMetrics(TrainMetrics.empty(), np.int32(step)) for step in (NEVER, 3))
        >>> int(merge_on_host(none, bad).first_bad_step)
        3
    """
    (metrics, bad_step), (others, other_bad_step) = jax.device_get((running, more))
    merged = jax.tree.map(lambda old, new: np.asarray(new, old.dtype), metrics, metrics.merge(others))
    return RunningMetrics(merged, np.minimum(bad_step, other_bad_step))


def strong_types(tree: Any) -> Any:
    """Return a tree without weakly typed leaves, so that a step that takes it is compiled once.

    Args:
        tree: A tree of numbers and arrays.

    Returns:
        A tree of JAX arrays.

    Example:
        >>> strong_types(1.0).weak_type
        False
    """
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.asarray(leaf).dtype), tree)
