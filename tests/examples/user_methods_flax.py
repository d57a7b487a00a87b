"""A user-defined regulariser and a user-defined replay method in Flax."""

from collections.abc import Iterable, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from sequel_core.stream.task import Batch
from sequel_flax import Algorithm
from sequel_flax.bundle import Params
from sequel_flax.quadratic import Model, quadratic
from sequel_flax.replay import Outputs, mean_cross_entropy, replay, sum_of_first
from tests.examples.user_methods import ConfidentHParams, MagnitudeHParams


def magnitudes(params: Params, model: Model, batches: Iterable[Batch]) -> Params:
    """Return the importances of a task: the squares of the weights at the end of the task."""
    return jax.tree.map(jnp.square, params)


def magnitude(hparams: MagnitudeHParams, seed: int = 0) -> Algorithm:
    return quadratic(hparams, seed, hparams.strength, magnitudes)


def replay_loss(batch: Outputs, draws: Sequence[Outputs], hparams: ConfidentHParams) -> jax.Array:
    """Return the cross-entropy of batch and draw plus the weighted mean entropy of the draw, shape ()."""
    (draw,) = draws
    entropies = -jnp.sum(jax.nn.softmax(draw.logits) * jax.nn.log_softmax(draw.logits), axis=1)
    entropy = sum_of_first(entropies, draw.count) / jnp.maximum(draw.count, 1)
    return mean_cross_entropy(batch, draw) + hparams.weight * entropy


def confident(hparams: ConfidentHParams, seed: int = 0) -> Algorithm:
    return replay(hparams, seed, partial(replay_loss, hparams=hparams))
