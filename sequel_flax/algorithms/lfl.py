"""Less-forgetting learning (Jung et al. 2016, https://arxiv.org/abs/1607.00122).

    L = CE(f(x), y) + lambda_e/2 * mean_n ||h(x_n; theta) - h(x_n; theta_old)||^2          (eq. 3, lambda_c 1)

h is the last hidden layer, theta_old are the weights at the end of the last task, and x are samples of the
current task. The old network is in evaluation mode. The last layer, which decides on the features, stays as
the first task left it (`freeze_head`): no gradient, no weight decay, no part in the norm that clipping sees.

The network needs `features(x)`, the last hidden layer, and a last layer called `head`.

Mirror: sequel_lightning/algorithms/lfl.py
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState

from sequel_core.algorithms.lfl import LFLHParams
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.task import Batch
from sequel_flax.bundle import (
    Algorithm,
    Params,
    State,
    StepOutputs,
    advance,
    cross_entropy,
    feature_width,
    frozen_network,
    head_logits,
    make_algorithm,
    masked,
    network,
    trained_on,
    training_forward,
)
from sequel_flax.trainable import Selection


class LFLState(NamedTuple):
    """What LFL remembers of past tasks."""

    anchor: Params  # theta_old, weights at the end of the last task
    statistics: Params  # running statistics of batch normalisation then; empty without
    learned: jax.Array  # 1 once a task has ended, before that 0, shape ()


def feature_distance(features: jax.Array, old: jax.Array) -> jax.Array:
    """Return 1/2 * mean_n ||h(x_n) - h_old(x_n)||^2 of features `[B, D]`, shape ()."""
    return 0.5 * jnp.mean(jnp.sum((features - old) ** 2, axis=1))


def lfl(hparams: LFLHParams, seed: int = 0, trainable: Selection = None) -> Algorithm:
    """Return less-forgetting learning.

    Args:
        hparams: settings.
        seed: of dropout.
        trainable: which parameters are trained; see `make_algorithm`.

    Raises:
        ValueError: in `init`, for a network without `features` or `head`.
    """

    def init_memory(ts: TrainState, spec: StreamSpec) -> LFLState:
        feature_width(ts, spec, "lfl")
        dtype = jax.tree.leaves(ts.params)[0].dtype
        return LFLState(*frozen_network(ts), jnp.zeros((), dtype))

    def train_step(ts: TrainState, state: State, batch: Batch) -> tuple[TrainState, State, StepOutputs]:
        anchor, statistics, learned = state.memory
        batch = trained_on(state, batch)
        old = network(ts, anchor, state, batch.x, method="features", stats=statistics)

        def loss_fn(params: Params) -> tuple[jax.Array, Any]:
            features, stats = training_forward(ts, params, state, batch.x, method="features")
            logits = masked(state.stream, head_logits(ts, params, stats, features), batch.t)
            pull = learned * hparams.lfl_lambda * feature_distance(features, old)
            return cross_entropy(logits, batch.y) + pull, (logits, stats)

        (loss, (logits, stats)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(ts.params)
        if hparams.freeze_head:
            gradient = {**gradient, "head": jax.tree.map(lambda g: (1 - learned) * g, gradient["head"])}
        after = advance(ts, gradient, stats)
        if hparams.freeze_head:
            keep = partial(jnp.where, learned > 0)
            after = after.replace(
                params={**after.params, "head": jax.tree.map(keep, ts.params["head"], after.params["head"])}
            )
        return after, state, {"loss": loss, "logits": logits, "labels": batch.y}

    def end(ts: TrainState, state: State, plan: Any) -> tuple[TrainState, State]:
        return ts, state._replace(memory=LFLState(*frozen_network(ts), jnp.ones_like(state.memory.learned)))

    return make_algorithm(
        hparams,
        seed,
        train_step,
        trainable=trainable,
        init_memory=init_memory,
        fills={"anchor": jnp.copy},
        apply_end=end,
    )
