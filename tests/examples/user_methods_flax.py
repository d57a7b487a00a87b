"""User-defined methods in Flax: a regulariser, a replay method, and one that is neither."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState

from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.task import Batch
from sequel_flax import Algorithm, objectives
from sequel_flax.bundle import (
    Model,
    Params,
    State,
    Stats,
    StepOutputs,
    for_objective,
    frozen_network,
    make_algorithm,
    network,
    objective_of,
    train_step,
    training_forward,
)
from sequel_flax.quadratic import quadratic
from sequel_flax.replay import Outputs, mean_loss, replay, sum_of_first
from sequel_flax.trainable import Selection
from tests.examples.user_methods import ConfidentHParams, ImitateHParams, MagnitudeHParams


def magnitudes(params: Params, model: Model, batches: Iterable[Batch]) -> Params:
    """Return the importances of a task: the squares of the weights at the end of the task."""
    return jax.tree.map(jnp.square, params)


def magnitude(hparams: MagnitudeHParams, seed: int = 0) -> Algorithm:
    return quadratic(hparams, seed, hparams.strength, magnitudes)


def replay_loss(batch: Outputs, draws: Sequence[Outputs], hparams: ConfidentHParams) -> jax.Array:
    """Return the mean loss of batch and draw plus the weighted mean entropy of the draw, shape ()."""
    (draw,) = draws
    entropies = -jnp.sum(jax.nn.softmax(draw.outputs) * jax.nn.log_softmax(draw.outputs), axis=1)
    entropy = sum_of_first(entropies, draw.count) / jnp.maximum(draw.count, 1)
    return mean_loss(batch, draw) + hparams.weight * entropy


def confident(hparams: ConfidentHParams, seed: int = 0) -> Algorithm:
    return replay(hparams, seed, partial(replay_loss, hparams=hparams))


class ImitateState(NamedTuple):
    """What the method remembers of past tasks."""

    anchor: Params  # weights at the end of the last task
    statistics: Stats  # running statistics of batch normalisation then; empty without batch normalisation
    learned: jax.Array  # 1 after the end of the first task, 0 before, shape ()


def logit_distance(logits: jax.Array, old: jax.Array) -> jax.Array:
    """Return the mean squared distance of logits `[B, num_classes]`, shape ()."""
    return ((logits - old) ** 2).sum(1).mean()


def training_loss(ts: TrainState, params: Params, state: State, batch: Batch, hparams: ImitateHParams) -> Any:
    """Return the loss of a batch, shape (), and its logits `[B, num_classes]`."""
    anchor, statistics, learned = state.memory
    logits, stats = training_forward(ts, params, state, batch.x)
    model = Model(ts, state, objective_of(None, state.stream))
    net = for_objective(model, batch, logits)
    old = network(ts, anchor, state, batch.x, stats=statistics)
    penalty = learned * hparams.strength * logit_distance(logits, old)
    return objectives.mean_loss(model.objective, net, batch) + penalty, (net(batch.x), stats)


def imitate(hparams: ImitateHParams, seed: int = 0, trainable: Selection = None) -> Algorithm:
    def init_memory(ts: TrainState, spec: StreamSpec) -> ImitateState:
        return ImitateState(*frozen_network(ts), jnp.zeros((), jax.tree.leaves(ts.params)[0].dtype))

    def step(ts: TrainState, state: State, batch: Batch) -> tuple[TrainState, State, StepOutputs]:
        return train_step(ts, state, batch, partial(training_loss, hparams=hparams))

    def end(ts: TrainState, state: State, plan: Any) -> tuple[TrainState, State]:
        memory = ImitateState(*frozen_network(ts), jnp.ones_like(state.memory.learned))
        return ts, state._replace(memory=memory)

    return make_algorithm(
        hparams,
        seed,
        step,
        trainable=trainable,
        init_memory=init_memory,
        fills={"anchor": jnp.copy},
        apply_end=end,
    )
