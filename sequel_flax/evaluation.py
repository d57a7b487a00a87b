"""Evaluation of an algorithm on samples, for the learner and for user-defined loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState
from jax.sharding import Mesh
from numpy.typing import NDArray

from sequel_core.objectives import ObjectiveHParams
from sequel_core.runs.learner import Evaluation
from sequel_core.stream import plan
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.task import AnySplit, Batch, Samples
from sequel_flax.bundle import Algorithm, State, with_masked_logits
from sequel_flax.objectives import Objective, build_objective, losses_of, metric_outputs
from sequel_flax.sharding import DATA, copies, sharded


class Evaluator:
    """Evaluates an algorithm on samples; the test and validation splits of a stream share one compilation.

    Args:
        algorithm: The algorithm; its `predict` and `alternatives` are used.
        spec: The specification of the benchmark, `benchmark.spec`.
        batch_size: Maximum number of samples per batch, >= 1; it is rounded up to a multiple of the devices.
        mesh: The devices that share each batch; None for one device.

    Example:
        >>> import optax
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core.algorithms.naive import NaiveHParams
        >>> from sequel_flax import MLP, initial_params, naive
        >>> benchmark, algorithm, model = RotatedDigits(num_tasks=2, subset=20), naive(NaiveHParams()), MLP()
        >>> params = initial_params(model, benchmark.spec, seed=0)
        >>> ts = TrainState.create(apply_fn=model.apply, params=params, tx=optax.sgd(0.1))
        >>> state = algorithm.init(ts, benchmark.spec)
        >>> evaluate = Evaluator(algorithm, benchmark.spec)
        >>> 0 <= evaluate(ts, state, benchmark.tasks[0].test).score <= 1
        True
    """

    def __init__(
        self, algorithm: Algorithm, spec: StreamSpec, batch_size: int = 1000, mesh: Mesh | None = None
    ) -> None:
        self._algorithm = algorithm
        self._mesh = mesh
        self._spec = spec
        self._batch_size = batch_size
        self.objective = algorithm.objective or build_objective(ObjectiveHParams(), spec)
        self._measure = jax.jit(self._traced_measure, out_shardings=copies(mesh))

    def __call__(self, ts: TrainState, state: State, samples: AnySplit) -> Evaluation:
        """Evaluate on samples.

        Args:
            ts: The train state.
            state: The state of the algorithm.
            samples: The samples, such as `task.test`.

        Returns:
            The score and the mean loss.
        """
        totals = Totals(self.objective)
        for batch, valid in self.batches(samples):
            sums, outputs = self._measure(ts, state, sharded(batch, self._mesh), valid)
            totals.add(sums, outputs, batch.y, valid)
        return totals.evaluation(len(samples))

    def batches(self, samples: AnySplit) -> Iterator[tuple[Batch, NDArray[np.bool_]]]:
        """Yield batches of equal size, and which of their samples are valid, bool `[B]`.

        Args:
            samples: The samples, such as `task.test`.
        """
        for chunk, valid in plan.evaluation_batches(samples, self.batch_size(samples)):
            yield as_batch(chunk), valid

    def batch_size(self, samples: AnySplit) -> int:
        """Return the number of samples of each of `batches`."""
        size = self._batch_size
        while size // 2 >= max(len(samples), self._spec.max_evaluated):
            size //= 2
        return size if self._mesh is None else -(-size // self._mesh.shape[DATA]) * self._mesh.shape[DATA]

    def _traced_measure(
        self, ts: TrainState, state: State, batch: Batch, valid: jax.Array
    ) -> tuple[dict[str, Any], Any]:
        return self.measure(self._algorithm, ts, state, batch, valid)

    def measure(
        self, algorithm: Algorithm, ts: TrainState, state: State, batch: Batch, valid: jax.Array
    ) -> tuple[dict[str, Any], Any]:
        """Return sums over the valid samples, each with the sum of weights, and the outputs for a metric.

        Args:
            algorithm: The algorithm.
            ts: The train state.
            state: The state of the algorithm.
            batch: The batch.
            valid: The samples that count, bool `[B]`.
        """
        objective, predict = self.objective, algorithm.predict
        outputs = predict(ts, state, batch.x, batch.t)
        others = algorithm.alternatives(ts, state, batch.x, batch.t)

        def net(x: Any) -> Any:
            return outputs if x is batch.x else predict(ts, state, x, batch.t)

        def total(values: Any, weight: Callable[[Batch], jax.Array] | None) -> tuple[Any, Any]:
            weights = valid if weight is None else jnp.where(valid, weight(batch), 0)
            return jnp.where(valid, values, 0).sum(), weights.sum()

        losses = losses_of(objective, net, batch)
        sums = {"loss": total(losses, objective.weight), "alternatives": {}}
        values, weight = objective.values, objective.score_weight
        if values is None:
            return {**sums, "score": sums["loss"]}, outputs if objective.metric else ()

        def scores(outputs: Any) -> tuple[Any, Any]:
            products = values(outputs, batch.y)
            return total(products if weight is None else products * weight(batch), weight)

        sums["score"] = scores(outputs)
        sums["alternatives"] = {name: scores(o) for name, o in others.items()}
        if objective.classification:
            sums["masked"] = scores(with_masked_logits(outputs, state.stream.classes[batch.t]))
        return sums, ()


class Totals:
    """Adds up what `Evaluator.measure` returns for the batches of a split.

    Args:
        objective: What the network is scored on.

    Example:
        >>> from sequel_flax import cross_entropy
        >>> totals = Totals(cross_entropy())
        >>> totals.add({"loss": (3.0, 2), "score": (1.0, 2), "alternatives": {}}, (), np.zeros(2), np.ones(2))
        >>> totals.evaluation(2).loss
        1.5
    """

    def __init__(self, objective: Objective) -> None:
        self._metric = None if objective.metric is None else objective.metric()
        self._measured: list[dict[str, Any]] = []

    def add(self, sums: dict[str, Any], outputs: Any, y: Any, valid: NDArray[np.bool_]) -> None:
        """Add a batch; the first two arguments are the result of `Evaluator.measure`."""
        self._measured.append(sums)
        if self._metric is not None:
            outputs, y = _first(int(valid.sum()), (outputs, y))
            self._metric = self._metric.merge(
                type(self._metric).from_model_output(logits=metric_outputs(outputs), labels=y)
            )

    def evaluation(self, total: int) -> Evaluation:
        """Return the score and the mean loss of `total` samples."""
        measured = jax.device_get(self._measured)
        sums = jax.tree.map(lambda *parts: float(np.sum(parts, dtype=np.float64)), *measured)
        loss = _quotient(*sums["loss"])
        score = _quotient(*sums["score"]) if self._metric is None else float(self._metric.compute())
        masked_score = _quotient(*sums["masked"]) if "masked" in sums else math.nan
        alternatives = {name: _quotient(*parts) for name, parts in sums["alternatives"].items()}
        return Evaluation(score, total, loss, masked_score, alternatives)


def _first(count: int, tree: Any) -> Any:
    return jax.tree.map(lambda a: a[:count], tree)


def _quotient(total: float, weight: float) -> float:
    return total / weight if weight else 0.0


def as_batch(samples: Samples) -> Batch:
    """Return samples as a batch with int32 labels and task indices, also if JAX uses 64 bits.

    Args:
        samples: Inputs, targets and task indices.

    Returns:
        A batch without a plan.

    Example:
        >>> as_batch(Samples(np.zeros((1, 2)), np.zeros(1, np.int64), np.zeros(1, np.int64))).y.dtype
        dtype('int32')
    """
    labelled = isinstance(samples.y, np.ndarray) and samples.y.ndim == samples.t.ndim
    y = samples.y.astype(np.int32) if labelled and samples.y.dtype.kind in "iu" else samples.y
    return Batch(samples.x, y, samples.t.astype(np.int32))
