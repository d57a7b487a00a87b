"""A quadratic penalty on leaving the weights of past tasks: the shared part of EWC, MAS and SI.

    L = CE(f(x), y) + strength * 1/2 * sum_i F_i (theta_i - theta*_i)^2

A new method of this type defines only its importances F, often a mean over samples: `mean_gradients`.

Mirror: sequel_lightning/quadratic.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

from sequel_core.hparams import AlgorithmHParams
from sequel_core.stream.task import Batch
from sequel_flax import bundle
from sequel_flax.boundaries import collected, select
from sequel_flax.bundle import Algorithm, Params, State, empty_sum, make_algorithm, train_step
from sequel_flax.trainable import Selection

Model = tuple[TrainState, State]
Objective = Callable[[Params, Model, Batch], jax.Array]
Contribution = Callable[[jax.Array], jax.Array]


class QuadraticState(NamedTuple):
    """What is remembered of past tasks; both trees have the structure of the parameters."""

    anchor: Params  # theta*, where the penalty is least
    importance: Params  # F, all 0 before the end of the first task


def penalty(params: Params, anchor: Params, importance: Params) -> jax.Array:
    """Return 1/2 * sum_i F_i (theta_i - theta*_i)^2 over all parameters, shape ()."""
    terms = jax.tree.map(lambda p, a, f: jnp.sum(f * (p - a) ** 2), params, anchor, importance)
    penalty: jax.Array = 0.5 * jax.tree.reduce(jnp.add, terms)
    return penalty


@partial(jax.jit, static_argnames=("separate", "gamma"))
def consolidate(
    params: Params, state: QuadraticState, importance: Params, separate: bool = False, gamma: float = 1.0
) -> QuadraticState:
    """Return the state after one more task.

    Args:
        params: weights at the end of the task.
        state: of past tasks.
        importance: of the task, taken at `params`.
        separate: whether each task keeps its term (theta - theta*_k)^2; if not, all have the anchor `params`.
        gamma: decay of past importances in [0, 1], if they are not separate.
    """
    if not separate:
        total = jax.tree.map(lambda f, new: gamma * f + new, state.importance, importance)
        return QuadraticState(jax.tree.map(jnp.copy, params), total)
    total = jax.tree.map(jnp.add, state.importance, importance)
    share = jax.tree.map(lambda f, total: f / jnp.where(total > 0, total, 1), state.importance, total)
    anchor = jax.tree.map(
        lambda p, a, share: (p + share * (a - p)).astype(a.dtype), params, state.anchor, share
    )
    return QuadraticState(anchor, total)


def mean_gradients(
    params: Params,
    model: Model,
    batches: Iterable[Batch],
    objective: Objective,
    contribution: Contribution,
    samples: int | None = None,
    per_batch: bool = False,
) -> Params:
    """Return 1/N sum_n contribution(d objective(x_n) / d theta), in evaluation mode.

    Args:
        params: weights at which gradients are taken.
        model: passed to the objective.
        batches: of samples, each sample once.
        objective: returns the value of a batch, shape (). Unless `per_batch`, a batch has one sample.
        contribution: of a gradient array to the sum, elementwise, for example its square.
        samples: N, the first so many samples; None for all.
        per_batch: whether to take one gradient for each batch instead of each sample.
    """
    total = jax.tree.map(empty_sum, params)
    if isinstance(batches, Batch):
        return _mean_in_loop(total, params, model, batches, objective, contribution, samples, per_batch)
    count = 0
    for batch in batches:
        wanted = len(batch.y) if samples is None else min(len(batch.y), samples - count)
        width = wanted if per_batch else 1
        for start in range(0, wanted, width):
            total = _add_gradient(total, params, model, batch, start, width, objective, contribution)
        count += wanted
        if count == samples:
            break
    return _scale(total, 1 / count)


def _mean_in_loop(
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
def _add_gradient(
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
def _scale(tree: Params, factor: float) -> Params:
    return optax.tree_utils.tree_scale(factor, tree)


FILLS = {"anchor": jnp.copy, "importance": empty_sum}
"""Initial values of the trees of `QuadraticState`."""


def init_quadratic(ts: TrainState) -> QuadraticState:
    """Return the state before the first task: no importance."""
    return QuadraticState(jax.tree.map(jnp.copy, ts.params), jax.tree.map(empty_sum, ts.params))


def quadratic(
    hparams: AlgorithmHParams,
    seed: int,
    strength: float,
    importances: Callable[[Params, Model, Any], Params],
    separate: bool = False,
    gamma: float = 1.0,
    samples: int | None = None,
    trainable: Selection = None,
) -> Algorithm:
    """Return an algorithm with a quadratic penalty, whose importances are computed at the end of a task.

    Args:
        hparams: settings.
        seed: of dropout.
        strength: factor of the penalty, >= 0.
        importances: of a task, from the weights at its end and batches of its samples, most often
            `mean_gradients` of these; from `apply_end` they come as one `Batch` of arrays `[n, B, ...]`.
        separate: see `consolidate`.
        gamma: see `consolidate`.
        samples: number of samples that the importances need, the first ones; None for all.
        trainable: which parameters are trained; see `make_algorithm`.
    """

    def objective(ts: TrainState, params: Params, state: State, batch: Batch) -> tuple[jax.Array, Any]:
        loss, outputs = bundle.objective(ts, params, state, batch)
        return loss + strength * penalty(params, *state.memory), outputs

    def end_task(ts: TrainState, state: State, batches: Iterable[Batch]) -> tuple[TrainState, State]:
        importance = importances(ts.params, (ts, state), batches)
        return ts, state._replace(memory=consolidate(ts.params, state.memory, importance, separate, gamma))

    return make_algorithm(
        hparams,
        seed,
        partial(train_step, objective=objective),
        trainable=trainable,
        init_memory=lambda ts, spec: init_quadratic(ts),
        fills=FILLS,
        plan_end=lambda state, batches: collected(batches, samples),
        apply_end=end_task,
        end_task=end_task,
    )
