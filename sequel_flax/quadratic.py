"""A quadratic penalty on leaving the weights of past tasks: the shared part of EWC, MAS and SI.

    L = loss(f(x), y) + strength * 1/2 * sum_i F_i (theta_i - theta*_i)^2

A new method of this type defines only its importances F, often a mean over samples: `mean_gradients`.

Mirror: sequel_lightning/quadratic.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState

from sequel_core.hparams import AlgorithmHParams
from sequel_core.stream.task import Batch
from sequel_flax import bundle
from sequel_flax.boundaries import collected
from sequel_flax.bundle import Algorithm, Params, State, empty_sum, make_algorithm, objective_of, train_step
from sequel_flax.bundle import Model as Model  # part of this module, too
from sequel_flax.gradients import Contribution, Loss, add_gradient, mean_in_loop, scale
from sequel_flax.objectives import Objective
from sequel_flax.trainable import Selection


class QuadraticState(NamedTuple):
    """What is remembered of past tasks; both trees have the structure of the parameters."""

    anchor: Params  # theta*, where the penalty is least
    importance: Params  # F, all 0 before the end of the first task


def penalty(params: Params, anchor: Params, importance: Params) -> jax.Array:
    """Return 1/2 * sum_i F_i (theta_i - theta*_i)^2 over all parameters, shape ()."""
    terms = jax.tree.map(lambda p, a, f: jnp.sum(f * (p - a) ** 2), params, anchor, importance)
    penalty: jax.Array = 0.5 * jax.tree.reduce(jnp.add, terms)
    return penalty


@partial(jax.jit, static_argnames="separate")
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
    losses: Sequence[Loss],
    contribution: Contribution,
    samples: int | None = None,
    per_batch: bool = False,
) -> Params:
    """Return 1/N sum_n sum_k contribution(d loss_k(x_n) / d theta), in evaluation mode.

    Args:
        params: weights at which gradients are taken.
        model: passed to the losses.
        batches: of samples, each sample once.
        losses: each returns the value of a batch, shape (). Unless `per_batch`, a batch has one sample.
        contribution: of a gradient array to the sum, elementwise, for example its square.
        samples: N, the first so many samples; None for all.
        per_batch: whether to take one gradient for each batch instead of each sample.
    """
    total = jax.tree.map(empty_sum, params)
    if isinstance(batches, Batch):
        return mean_in_loop(total, params, model, batches, tuple(losses), contribution, samples, per_batch)
    count = 0
    for batch in batches:
        wanted = len(batch.t) if samples is None else min(len(batch.t), samples - count)
        width = wanted if per_batch else 1
        for start in range(0, wanted, width):
            total = add_gradient(total, params, model, batch, start, width, tuple(losses), contribution)
        count += wanted
        if count == samples:
            break
    return scale(total, 1 / count)


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
    objective: Objective | None = None,
    samples_of: Callable[[State, Iterable[Batch]], Iterable[Batch]] = lambda state, batches: batches,
    **parts: Any,
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
        objective: what the network is trained on; see `make_algorithm`.
        samples_of: returns the batches that `plan_end` collects, from the state and the task's batches.
        parts: further arguments of `make_algorithm`.
    """

    def training_loss(ts: TrainState, params: Params, state: State, batch: Batch) -> tuple[jax.Array, Any]:
        loss, outputs = bundle.training_loss(ts, params, state, batch, objective)
        return loss + strength * penalty(params, *state.memory), outputs

    def apply_end(ts: TrainState, state: State, batches: Any) -> tuple[TrainState, State]:
        model = Model(ts, state, objective_of(objective, state.stream), hparams)
        importance = importances(ts.params, model, batches)
        memory = consolidate(ts.params, state.memory, importance, separate, gamma)
        return ts, state._replace(memory=memory)

    return make_algorithm(
        hparams,
        seed,
        partial(train_step, training_loss=training_loss),
        trainable=trainable,
        objective=objective,
        fills=FILLS,
        plan_end=lambda state, batches: collected(samples_of(state, batches), samples),
        apply_end=apply_end,
        end_task=apply_end,
        **{"init_memory": lambda ts, spec: init_quadratic(ts), **parts},
    )
