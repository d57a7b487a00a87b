"""Evaluation of an algorithm on samples, for the learner and for user-defined loops."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

from sequel_core.runs.learner import Evaluation
from sequel_core.stream import plan
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.task import AnySplit, Batch, Samples
from sequel_flax.bundle import Algorithm, State, mask_logits


class Evaluator:
    """Evaluates an algorithm on samples; it compiles once for each batch size.

    Args:
        algorithm: The algorithm; its `predict` and `alternatives` are used.
        spec: The specification of the benchmark, `benchmark.spec`.
        batch_size: Maximum number of samples per batch, >= 1.

    Example:
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

    def __init__(self, algorithm: Algorithm, spec: StreamSpec, batch_size: int = 1000) -> None:
        self._algorithm = algorithm
        self._spec = spec
        self._batch_size = batch_size
        self._count = jax.jit(self._traced_count)

    def __call__(self, ts: TrainState, state: State, samples: AnySplit) -> Evaluation:
        """Evaluate on samples.

        Args:
            ts: The train state.
            state: The state of the algorithm.
            samples: The samples, such as `task.test`.

        Returns:
            The accuracies and the mean cross-entropy.
        """
        size = self._batch_size
        while size // 2 >= len(samples):  # few shapes to compile, and at most half of a batch is padding
            size //= 2
        counts = [
            self._count(ts, state, as_batch(chunk), valid)
            for chunk, valid in plan.evaluation_batches(samples, size)
        ]
        correct, masked_correct, loss, others = jax.tree.map(
            lambda *parts: float(np.sum(parts, dtype=np.float64)), *jax.device_get(counts)
        )
        total = len(samples)
        alternatives = {name: hits / total for name, hits in others.items()}
        return Evaluation(correct / total, total, loss / total, masked_correct / total, alternatives)

    def _traced_count(self, ts: TrainState, state: State, batch: Batch, valid: jax.Array) -> tuple[Any, ...]:
        logits = self._algorithm.predict(ts, state, batch.x, batch.t)
        others = self._algorithm.alternatives(ts, state, batch.x, batch.t)
        other_hits = {name: ((o.argmax(-1) == batch.y) & valid).sum() for name, o in others.items()}
        hits = (logits.argmax(-1) == batch.y) & valid
        masked = mask_logits(logits, jnp.asarray(self._spec.mask)[batch.t])
        masked_hits = (masked.argmax(-1) == batch.y) & valid
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.y)
        return hits.sum(), masked_hits.sum(), jnp.where(valid, losses, 0).sum(), other_hits


def as_batch(samples: Samples) -> Batch:
    """Return samples as a batch with int32 labels and task indices, also if JAX uses 64 bits.

    Args:
        samples: Inputs, labels and task indices.

    Returns:
        A batch without a plan.

    Example:
        >>> as_batch(Samples(np.zeros((1, 2)), np.zeros(1, np.int64), np.zeros(1, np.int64))).y.dtype
        dtype('int32')
    """
    return Batch(samples.x, samples.y.astype(np.int32), samples.t.astype(np.int32))
