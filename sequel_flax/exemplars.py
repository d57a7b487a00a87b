"""Exemplars: samples of each class, chosen by herding, and classification by the nearest of their means.

    y*(x) = argmin_c ||h(x) - mu_c||, mu_c the mean of h over the exemplars of class c

h is the network's last hidden layer; h(x), that of each exemplar, and mu_c have unit length. At the end of a
task the room is shared out anew (`sequel_core.stream.exemplars.renewed_exemplars`). iCaRL is built on it.

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
from sequel_flax.boundaries import is_traced, on_host
from sequel_flax.bundle import Params, State, feature_width, network
from sequel_flax.replay import Memory, empty_memory


def init_exemplars(
    ts: TrainState, spec: StreamSpec, hparams: ExemplarHParams
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
    ts: TrainState, params: Params, state: State, batches: Batch, hparams: ExemplarHParams
) -> tuple[Memory, jax.Array, jax.Array]:
    """Return the exemplars at the end of a task, the means of classes, and which classes have one.

    Args: the network with its weights at the end of the task, what was kept before, batches of the task's
    samples, each sample once, and the settings.
    """
    kept = state.memory

    def embed_batch(blocks: jax.Array) -> jax.Array:
        """Return h of images `[n, B, H, W, C]`, a block at a time, shape `[n, B, D]`."""
        if is_traced((ts, blocks)):
            found: jax.Array = jax.lax.map(lambda x: embed(ts, params, state, x), blocks)
            return found
        return jnp.stack([_embed(ts, params, state, x) for x in blocks])

    def choose(mask: Any, task: Any, held: Any, found: Any, features: Any) -> Any:
        samples = (Samples(*row) for row in zip(*found, strict=True))
        pairs = zip(samples, features, strict=True)
        before = Samples(*(a[held[2] >= 0] for a in held))
        return tuple(renewed_exemplars(hparams, mask, int(task), before, pairs))

    held, found = tuple(kept.exemplars[:3]), tuple(jnp.asarray(a) for a in batches[:3])
    x, y, t = on_host(choose, held, kept.classes, state.stream.task, held, found, embed_batch(found[0]))
    memory = kept.exemplars._replace(x=x, y=y, t=t)
    slots, rows = len(memory.y), -(-len(memory.y) // EMBEDDED)
    order = np.minimum(np.arange(rows * -(-slots // rows)), slots - 1).reshape(rows, -1)
    views = (memory.x, memory.x[:, :, ::-1]) if hparams.flip else (memory.x,)
    seen = [(f := embed_batch(view[order])).reshape(-1, f.shape[-1])[:slots] for view in views]
    count = partial(class_means, num_classes=len(kept.means))
    means, has_mean = on_host(count, (kept.means, kept.has_mean), seen, memory.y, memory.t)
    return memory, means, has_mean


_embed = jax.jit(embed)
