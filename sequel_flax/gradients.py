"""Sums of gradients of single samples, at weights that are given."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

from sequel_core.stream.task import Batch
from sequel_flax.boundaries import select
from sequel_flax.bundle import Params, State

Model = tuple[TrainState, State]
Objective = Callable[[Params, Model, Batch], jax.Array]
Contribution = Callable[[jax.Array], jax.Array]


def mean_in_loop(
    total: Params,
    params: Params,
    model: Model,
    batches: Batch,
    objective: Objective,
    contribution: Contribution,
    samples: int | None,
    per_batch: bool,
) -> Params:
    """Do what `mean_gradients` does with the arrays `[n, B, ...]` of `collected`, while tracing."""
    x, y, t = (jnp.asarray(a) for a in batches[:3])
    if samples is not None:
        t = jnp.where(jnp.cumsum(t.ravel() >= 0).reshape(t.shape) <= samples, t, -1)
    if not per_batch:
        x, y, t = (a.reshape(-1, 1, *a.shape[2:]) for a in (x, y, t))
    counts = jnp.any(t >= 0, axis=1)

    def add(k: Any, total: Params) -> Params:
        gradient = jax.grad(objective)(params, model, Batch(x[k], y[k], t[k]))
        new = _summed(total, gradient, contribution)
        return select(counts[k], new, total)

    last = jnp.max(jnp.where(counts, jnp.arange(len(counts)), -1))
    total = jax.lax.fori_loop(0, last + 1, add, total)
    return jax.tree.map(lambda f: f / jnp.sum(t >= 0).astype(f.dtype), total)


def _summed(total: Params, gradient: Params, contribution: Contribution) -> Params:
    """Return the sum after one more gradient, in the dtype of the sum."""
    return jax.tree.map(lambda f, g: f + contribution(g.astype(f.dtype)), total, gradient)


@partial(jax.jit, static_argnames=("width", "objective", "contribution"), donate_argnums=0)
def add_gradient(
    total: Params,
    params: Params,
    model: Model,
    batch: Batch,
    start: int,
    width: int,
    objective: Objective,
    contribution: Contribution,
) -> Params:
    """Add the gradient of one sample: on a CPU, separate calls are ten times as fast as vmap(grad)."""
    part = Batch(*(jax.lax.dynamic_slice_in_dim(a, start, width) for a in batch[:3]))
    gradient = jax.grad(objective)(params, model, part)
    return _summed(total, gradient, contribution)


@partial(jax.jit, donate_argnums=0)
def scale(tree: Params, factor: float) -> Params:
    """Return the tree times a factor, in the same memory."""
    return optax.tree_utils.tree_scale(factor, tree)
