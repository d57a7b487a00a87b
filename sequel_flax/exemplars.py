"""Exemplars: samples of each class, chosen by herding, and classification by the nearest of their means.

    y*(x) = argmin_c ||h(x) - mu_c||, mu_c the mean of h over the exemplars of class c

h is the network's last hidden layer; h(x), h of each exemplar and mu_c are scaled to unit length if
normalise_features is true. At the end of a task the memory is divided among the classes again
(`sequel_core.stream.exemplars.renewed_exemplars`). iCaRL uses these functions.

Mirror: sequel_lightning/exemplars.py
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState

from sequel_core.hparams import ExemplarHParams
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.exemplars import EMBEDDED, class_means, renewed_exemplars
from sequel_core.stream.task import Batch, Samples
from sequel_flax.boundaries import is_traced, jit_per_network, on_host
from sequel_flax.bundle import Params, State, feature_width, masked, network
from sequel_flax.replay import Memory, empty_memory


def init_exemplars(
    ts: TrainState, spec: StreamSpec, hparams: ExemplarHParams
) -> tuple[Memory, jax.Array, jax.Array]:
    """Return an empty memory of exemplars, means of classes 0 `[num_classes, D]`, and that none has a mean.

    Raises:
        ValueError: the network has no `features` or `head`, or `mem_size` is less than the number of classes.
    """
    memory = empty_memory(spec, hparams.slots(int(spec.mask.sum())))
    shape = spec.num_classes, feature_width(ts, spec, hparams.name)
    return memory, jnp.zeros(shape, jax.tree.leaves(ts.params)[0].dtype), jnp.zeros(shape[0], bool)


def embed(ts: TrainState, params: Params, state: State, x: jax.Array, normalise: bool) -> jax.Array:
    """Return h of images `[B, D]` in evaluation mode; scaled to unit length, unless it is 0, to normalise."""
    features: jax.Array = network(ts, params, state, x, method="features")
    if not normalise:
        return features
    norm = jnp.linalg.norm(features, axis=1, keepdims=True)
    scaled: jax.Array = features / jnp.where(norm > 0, norm, 1)
    return scaled


def nearest_mean(features: jax.Array, means: jax.Array, has_mean: jax.Array) -> jax.Array:
    """Return -||h - mu||^2 `[B, num_classes]`; for a class without a mean, the least number of the dtype."""
    squares = (features**2).sum(1, keepdims=True) + (means**2).sum(1)[None]
    distance = squares - 2 * features @ means.T
    return jnp.where(has_mean[None], -distance, jnp.finfo(features.dtype).min)


def renew(
    ts: TrainState, params: Params, state: State, batches: Batch, hparams: ExemplarHParams
) -> tuple[Memory, jax.Array, jax.Array]:
    """Return the exemplars after a task, the means of classes, and which classes have a mean.

    The network has the weights at the end of the task, and the exemplars of past tasks. `batches` are those
    of the task, with each sample once.
    """
    memory = state.memory

    def embed_batch(blocks: jax.Array) -> jax.Array:
        """Return h of images `[n, B, H, W, C]`, a block at a time, shape `[n, B, D]`."""
        if is_traced((ts, blocks)):
            embedded: jax.Array = jax.lax.map(
                lambda x: embed(ts, params, state, x, hparams.normalise_features), blocks
            )
            return embedded
        return jnp.stack([_embed(ts, params, state, x, hparams.normalise_features) for x in blocks])

    def choose(mask: Any, task: Any, stored: Any, new: Any, features: Any) -> Any:
        samples = (Samples(*row) for row in zip(*new, strict=True))
        pairs = zip(samples, features, strict=True)
        before = Samples(*(a[stored[2] >= 0] for a in stored))
        return tuple(renewed_exemplars(hparams, mask, int(task), before, pairs))

    stored, new = tuple(memory.exemplars[:3]), tuple(jnp.asarray(a) for a in batches[:3])
    stream = state.stream
    x, y, t = on_host(choose, stored, stream.classes, stream.task, stored, new, embed_batch(new[0]))
    exemplars = memory.exemplars._replace(x=x, y=y, t=t)
    slots, rows = len(exemplars.y), -(-len(exemplars.y) // EMBEDDED)
    order = np.minimum(np.arange(rows * -(-slots // rows)), slots - 1).reshape(rows, -1)
    views = (exemplars.x, exemplars.x[:, :, ::-1]) if hparams.flip else (exemplars.x,)
    embedded = [(f := embed_batch(view[order])).reshape(-1, f.shape[-1])[:slots] for view in views]
    count = partial(class_means, num_classes=len(memory.means), normalise=hparams.normalise_features)
    means, has_mean = on_host(count, (memory.means, memory.has_mean), embedded, exemplars.y, exemplars.t)
    return exemplars, means, has_mean


_embed = jit_per_network(embed, static_argnames="normalise")


def predict(ts: TrainState, state: State, x: jax.Array, t: jax.Array, hparams: ExemplarHParams) -> jax.Array:
    """Return the nearest-mean scores, or the logits of the head for a task without means.

    The head also predicts during a task, because the means belong to the weights at its end.
    """
    memory, mask = state.memory, state.stream.mask
    head = masked(state.stream, network(ts, ts.params, state, x, t), t)
    features = embed(ts, ts.params, state, x, hparams.normalise_features)
    near = masked(state.stream, nearest_mean(features, memory.means, memory.has_mean), t)
    known = (memory.has_mean[None] if mask is None else memory.has_mean[None] & mask[t]).any(1, keepdims=True)
    ready = known & (memory.learned >= 0) & (memory.learned == state.stream.task)
    scores: jax.Array = jnp.where(ready, near, head)
    return scores
