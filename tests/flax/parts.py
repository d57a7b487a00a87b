"""What the Flax plug-in's tests share: short streams, a user's own module, and a loop with no learner."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict

from sequel_benchmarks import RotatedDigits, SplitDigits
from sequel_core import plan
from sequel_core.hparams import AlgorithmHParams, TrainingHParams
from sequel_core.learner import FitMonitor
from sequel_core.task import Batch, Benchmark, FloatArray, Scenario, Task
from sequel_flax import ALGORITHMS, Algorithm, FlaxLearner, State

BATCH, STEPS = 8, 5
SILENT = FitMonitor(lambda progress: None, lambda: None)


class Net(nn.Module):
    """A user's own module: tanh, no names given, nothing of ours."""

    width: int = 12
    outputs: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.tanh(nn.Dense(self.width)(x.reshape((x.shape[0], -1))))
        return nn.Dense(self.outputs)(x)


@cache
def rotated(num_tasks: int = 3, validation: float = 0.0) -> Benchmark:
    """Rotated digits, five steps a task."""
    return RotatedDigits(num_tasks=num_tasks, subset=BATCH * STEPS + 3, validation=validation)


@cache
def divided(scenario: Scenario) -> Benchmark:
    """Five pairs of digits, five steps a task."""
    return SplitDigits(num_tasks=5, scenario=scenario, subset=BATCH * STEPS + 3)


def settings(**changes: Any) -> TrainingHParams:
    return TrainingHParams(**{"batch_size": BATCH, **changes})


def sgd(learning_rate: Any = 0.1, momentum: float | None = 0.9) -> optax.GradientTransformation:
    return optax.inject_hyperparams(optax.sgd)(learning_rate=learning_rate, momentum=momentum)


def learner(
    hparams: AlgorithmHParams,
    benchmark: Benchmark | None = None,
    training: TrainingHParams | None = None,
    *,
    model: nn.Module | None = None,
    tx: optax.GradientTransformation | None = None,
    seed: int = 0,
    **options: Any,
) -> FlaxLearner:
    """Return a learner with a user's own module and optimizer; `seed` is that of dropout."""
    return FlaxLearner(
        ALGORITHMS[hparams.name](hparams, seed=seed),
        model or Net(),
        tx or sgd(),
        (benchmark or rotated()).spec,
        training or settings(),
        **options,
    )


def batches(task: Task, training: TrainingHParams) -> Iterable[Batch]:
    for epoch in range(training.epochs(task.index)):
        for rows in plan.epoch_batches(
            training.seed, task.index, epoch, len(task.train), training.batch_size
        ):
            yield Batch(*task.train.take(rows))


def user_loop(
    algorithm: Algorithm,
    benchmark: Benchmark,
    training: TrainingHParams,
    tx: optax.GradientTransformation,
    **jit: Any,
) -> tuple[TrainState, State, list[float]]:
    """Run a bundle in a plain loop and return the loss of every step too."""
    model = Net()
    image = np.zeros((1, *benchmark.image_shape), training.dtype)
    params = model.init(jax.random.key(training.seed), image)["params"]
    params = jax.tree.map(lambda p: p.astype(training.dtype), params)
    ts = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    state = algorithm.init(ts, benchmark.spec)
    step = jax.jit(algorithm.train_step, **jit)
    losses = []
    for task in benchmark.tasks:
        ts, state = algorithm.start_task(ts, state, task)
        for batch in batches(task, training):
            ts, state, outputs = step(ts, state, batch)
            losses.append(float(outputs["loss"]))
        order = plan.consolidation_batches(training.seed, task, training.batch_size)
        ts, state = algorithm.end_task(ts, state, (Batch(*samples) for samples in order))
    return ts, state, losses


def flat(params: Any) -> dict[str, FloatArray]:
    return {k: np.asarray(v) for k, v in flatten_dict(jax.device_get(params), sep="/").items()}


def same(a: Mapping[str, FloatArray], b: Mapping[str, FloatArray]) -> bool:
    """Whether two sets of weights are equal bit for bit."""
    assert a.keys() == b.keys()
    return all(np.array_equal(a[k], b[k]) for k in a)
