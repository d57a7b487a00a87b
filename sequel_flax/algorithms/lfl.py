"""Less-forgetting learning (Jung et al. 2016, https://arxiv.org/abs/1607.00122).

    L = loss(f(x), y) + lambda_e/2 * mean_n ||h(x_n; theta) - h(x_n; theta_old)||^2        (eq. 3, lambda_c 1)

h is the last hidden layer, theta_old are the weights at the end of the last task, and x are samples of the
current task. The old network runs in evaluation mode. With `freeze_head`, the last layer does not change
after the first task: it gets no gradient and no weight decay, and gradient clipping does not count it.

The network needs a method `features(x)`, the last hidden layer, and a last layer called `head`. With `layer`,
h is the output of the layer of that name; `freeze_head` still needs `head`.

Mirror: sequel_lightning/algorithms/lfl.py
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState

from sequel_core.algorithms.lfl import LFLHParams
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.task import Batch
from sequel_flax.bundle import (
    Algorithm,
    Model,
    Params,
    State,
    Stats,
    StepOutputs,
    check_head,
    check_layer,
    features,
    frozen_network,
    loss_of_outputs,
    make_algorithm,
    objective_of,
    outputs_and_features,
    train_step,
    with_head_of,
    without_head_gradient,
)
from sequel_flax.objectives import Objective
from sequel_flax.trainable import Selection


class LFLState(NamedTuple):
    """What LFL remembers of past tasks."""

    anchor: Params  # theta_old, weights at the end of the last task
    statistics: Params  # running statistics of batch normalisation then; empty without batch normalisation
    learned: jax.Array  # 1 after the end of the first task, 0 before, shape ()


def feature_distance(features: jax.Array, old: jax.Array) -> jax.Array:
    """Return 1/2 * mean_n ||h(x_n) - h_old(x_n)||^2 of features `[B, ...]`, shape ()."""
    squares = (features - old) ** 2
    return 0.5 * squares.reshape(len(squares), -1).sum(1).mean()


def head_is_frozen(state: LFLState, hparams: LFLHParams) -> jax.Array:
    """Return whether the last layer stays as it is, shape ()."""
    return (state.learned > 0) & hparams.freeze_head


def old_features(ts: TrainState, state: State, batch: Batch, layer: str | None) -> Any:
    """Return h of the old network, in evaluation mode."""
    old = state.memory
    return features(ts, old.anchor, state, batch.x, batch.t, layer=layer, stats=old.statistics)


def training_loss(
    params: Params, model: Model, batch: Batch, hparams: LFLHParams
) -> tuple[jax.Array, tuple[Any, Stats]]:
    """Return the training loss of a batch, shape (), and what the network returned for it."""
    ts, state = model.ts, model.state
    params = without_head_gradient(params, head_is_frozen(state.memory, hparams))
    (outputs, h), stats = outputs_and_features(ts, params, state, batch.x, batch.t, layer=hparams.layer)
    loss, outputs = loss_of_outputs(model, batch, outputs)
    distance = feature_distance(h, old_features(ts, state, batch, hparams.layer))
    loss = loss + state.memory.learned * hparams.lfl_lambda * distance
    return loss, (outputs, stats)


def lfl(
    hparams: LFLHParams, seed: int = 0, trainable: Selection = None, objective: Objective | None = None
) -> Algorithm:
    """Return less-forgetting learning as pure functions.

    Args:
        hparams: settings; see `help(LFLHParams)`.
        seed: of dropout, >= 0.
        trainable: which parameters are trained; None for all. See `make_algorithm`.
        objective: what the network is trained and scored on; None for the one that fits the targets.

    Raises:
        ValueError: in `init`, if the network has no method `features`, no layer `layer`, or no last layer
            `head`, or if the objective does not take what `head` returns.

    Example:
        >>> import optax
        >>> from flax.training.train_state import TrainState
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import Batch, LFLHParams
        >>> from sequel_flax import MLP, initial_params, lfl
        >>> digits = RotatedDigits(num_tasks=2, subset=40)
        >>> net = MLP(widths=(16,), num_classes=10)
        >>> params = initial_params(net, digits.spec, seed=0)
        >>> ts = TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.1))
        >>> algorithm = lfl(LFLHParams(lfl_lambda=0.01))
        >>> state = algorithm.init(ts, digits.spec)
        >>> for task in digits.tasks:
        ...     batch = Batch(*task.train.take(range(40)))
        ...     ts, state = algorithm.start_task(ts, state, task)
        ...     ts, state, outputs = algorithm.train_step(ts, state, batch)
        ...     ts, state = algorithm.end_task(ts, state, [batch])
        >>> algorithm.predict(ts, state, batch.x, batch.t).shape
        (40, 10)
    """

    def init_memory(ts: TrainState, spec: StreamSpec) -> LFLState:
        check_layer(ts, spec, hparams)
        if hparams.layer is None:
            check_head(ts, spec, objective, "lfl")
        return LFLState(*frozen_network(ts), jnp.zeros((), jax.tree.leaves(ts.params)[0].dtype))

    def loss(ts: TrainState, params: Params, state: State, batch: Batch) -> tuple[jax.Array, Any]:
        return training_loss(params, Model(ts, state, objective_of(objective, state.stream)), batch, hparams)

    def step(ts: TrainState, state: State, batch: Batch) -> tuple[TrainState, State, StepOutputs]:
        after, state, outputs = train_step(ts, state, batch, loss)
        return with_head_of(ts, after, head_is_frozen(state.memory, hparams)), state, outputs

    def end(ts: TrainState, state: State, plan: Any) -> tuple[TrainState, State]:
        return ts, state._replace(memory=LFLState(*frozen_network(ts), jnp.ones_like(state.memory.learned)))

    return make_algorithm(
        hparams,
        seed,
        step,
        trainable=trainable,
        objective=objective,
        init_memory=init_memory,
        fills={"anchor": jnp.copy},
        apply_end=end,
    )
