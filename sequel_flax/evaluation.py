"""Counting what an algorithm predicts right, for the learner and for a loop of one's own."""

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
    """Counts what an algorithm predicts right, compiled once for each size of batch.

        evaluate = Evaluator(algorithm, benchmark.spec)
        evaluate(ts, state, benchmark.tasks[0].test).accuracy

    Args:
        algorithm: for its `predict`.
        spec: of the benchmark.
        batch_size: at most so many samples at once.
    """

    def __init__(self, algorithm: Algorithm, spec: StreamSpec, batch_size: int = 1000) -> None:
        self._algorithm = algorithm
        self._spec = spec
        self._batch_size = batch_size
        self._count = jax.jit(self._traced_count)

    def __call__(self, ts: TrainState, state: State, samples: AnySplit) -> Evaluation:
        """Count correct predictions on samples."""
        size = self._batch_size
        while size // 2 >= len(samples):  # few shapes to compile for, and never half of a batch filled up
            size //= 2
        counts = [
            self._count(ts, state, as_batch(chunk), valid)
            for chunk, valid in plan.evaluation_batches(samples, size)
        ]
        correct, masked_correct, loss, others = jax.tree.map(
            lambda *parts: float(np.sum(parts, dtype=np.float64)), *jax.device_get(counts)
        )
        alternatives = {name: int(hits) for name, hits in others.items()}
        return Evaluation(int(correct), len(samples), loss / len(samples), int(masked_correct), alternatives)

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
    """Return samples as the step takes them: 32-bit labels and task ids, with or without 64-bit JAX."""
    return Batch(samples.x, samples.y.astype(np.int32), samples.t.astype(np.int32))
