"""Exemplars: samples of each class, chosen by herding, and classification by the nearest of their means.

    y*(x) = argmin_c ||h(x) - mu_c||, mu_c the mean of h over the exemplars of class c

h is the network's last hidden layer; h(x), that of each exemplar, and mu_c have unit length. At the end of a
task the room is shared out anew (`sequel_core.exemplars.renewed_exemplars`). iCaRL is built on it.

Mirror: sequel_lightning/exemplars.py
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState

from sequel_core.exemplars import exemplar_means, renewed_exemplars
from sequel_core.hparams import ICaRLHParams
from sequel_core.task import Batch, FloatArray, Samples, StreamSpec
from sequel_flax.bundle import Params, State, feature_width, network
from sequel_flax.replay import Memory, empty_memory, stored_samples


def init_exemplars(
    ts: TrainState, spec: StreamSpec, hparams: ICaRLHParams
) -> tuple[Memory, jax.Array, jax.Array]:
    """Return room for the exemplars, and the means of classes `[num_classes, D]`, of which there are none.

    Raises:
        ValueError: a network without `features` or `head`, or less room than classes.
    """
    memory = empty_memory(spec, hparams.slots(int(spec.mask.sum())), None)
    shape = spec.num_classes, feature_width(ts, spec, hparams.name)
    return memory, jnp.zeros(shape, jax.tree.leaves(ts.params)[0].dtype), jnp.zeros(shape[0], bool)


def embed(ts: TrainState, params: Params, state: State, x: jax.Array) -> jax.Array:
    """Return h of images `[B, D]`, of unit length where it is not 0, in evaluation mode."""
    features = network(ts, params, state, x, method="features")
    norm = jnp.linalg.norm(features, axis=1, keepdims=True)
    return features / jnp.where(norm > 0, norm, 1)


def nearest_mean(features: jax.Array, means: jax.Array, has_mean: jax.Array) -> jax.Array:
    """Return -||h - mu||^2 `[B, num_classes]`, the least number of the dtype for a class without a mean."""
    squares = jnp.sum(features**2, axis=1, keepdims=True) + jnp.sum(means**2, axis=1)[None]
    distance = squares - 2 * features @ means.T
    return jnp.where(has_mean[None], -distance, jnp.finfo(features.dtype).min)


def renew(
    ts: TrainState, params: Params, state: State, batches: Iterable[Batch], hparams: ICaRLHParams
) -> tuple[Memory, jax.Array, jax.Array]:
    """Return the exemplars at the end of a task, the means of classes, and which classes have one.

    Args: the network with its weights at the end of the task, what was kept before, batches of the task's
    samples, each sample once, and the settings.
    """
    kept = state.memory

    def look(x: jax.Array) -> FloatArray:
        return np.asarray(_embed(ts, params, state, x))

    samples = renewed_exemplars(
        hparams,
        mask=np.asarray(kept.classes),
        task=int(state.stream.task),
        held=stored_samples(kept.exemplars),
        found=((Samples(*map(np.asarray, batch[:3])), look(batch.x)) for batch in batches),
    )
    means, has_mean = exemplar_means(look, samples, len(kept.means), hparams.flip)
    x, y, t = samples
    memory = Memory(jnp.array(x), jnp.array(y, jnp.int32), jnp.array(t, jnp.int32), None)
    return memory, jnp.array(means, kept.means.dtype), jnp.array(has_mean)


_embed = jax.jit(embed)
