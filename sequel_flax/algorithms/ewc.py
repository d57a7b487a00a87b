"""Elastic weight consolidation (Kirkpatrick et al. 2017, https://arxiv.org/abs/1612.00796).

    L = CE(f(x), y) + lambda/2 * sum_k sum_i F_{k,i} (theta_i - theta*_{k,i})^2                      (eq. 3)
    F_{k,i} = 1/N sum_n (d log p(y_n | x_n) / d theta_i)^2 at theta*_k, one gradient per sample, y_n the label

The sum over past tasks k collapses exactly, but for a constant, into one anchor: importance = sum_k F_k and
anchor = sum_k F_k theta*_k / sum_k F_k, kept as theta* + share (anchor - theta*), so that a weight that never
moved has exactly no penalty (Adam would turn a rounding error into a step). The online variant (Schwarz et
al. 2018, https://arxiv.org/abs/1805.06370) decays the importance by gamma and anchors at the latest theta*.

Mirror: sequel_lightning/algorithms/ewc.py
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState

from sequel_core.hparams import EWCHParams
from sequel_core.task import Batch, StreamSpec
from sequel_flax.bundle import (
    Algorithm,
    Params,
    State,
    cross_entropy,
    forward,
    init_stream,
    predict,
    quadratic_penalty,
    start_task,
    train_step,
    tree_add,
    tree_scale,
    tree_zeros_like,
)

Model = tuple[TrainState, State]


class EWCState(NamedTuple):
    """What EWC remembers of past tasks; both trees have the structure of the parameters."""

    anchor: Params  # theta*, where the penalty is least
    importance: Params  # F, sum over past tasks of the diagonal Fisher, >= 0; all 0 before the first


def penalty(params: Params, state: EWCState) -> jax.Array:
    """Return 1/2 * sum_i F_i (theta_i - theta*_i)^2, shape ()."""
    return quadratic_penalty(params, state.anchor, state.importance)


@partial(jax.jit, static_argnames="hparams")
def consolidate(params: Params, state: EWCState, fisher: Params, hparams: EWCHParams) -> EWCState:
    """Return the state with one more task in it: its Fisher `fisher`, taken at `params`."""
    if hparams.accumulation == "online":
        importance = jax.tree.map(lambda f, new: hparams.gamma * f + new, state.importance, fisher)
        return EWCState(jax.tree.map(jnp.copy, params), importance)
    importance = jax.tree.map(jnp.add, state.importance, fisher)
    share = jax.tree.map(lambda f, total: f / jnp.where(total > 0, total, 1), state.importance, importance)
    anchor = jax.tree.map(lambda p, a, share: p + share * (a - p), params, state.anchor, share)
    return EWCState(anchor, importance)


def squared_gradients(params: Params, model: Model, batch: Batch) -> Params:
    """Return the sum over the batch's samples of the squared gradient of log p(y | x), in evaluation mode."""
    total = tree_zeros_like(params)
    for n in range(len(batch.y)):
        total = _add_squared_gradient(total, params, model, batch, n)
    return total


@partial(jax.jit, donate_argnums=0)  # dispatched sample by sample: on a CPU ten times as fast as vmap(grad)
def _add_squared_gradient(total: Params, params: Params, model: Model, batch: Batch, n: int) -> Params:
    ts, state = model
    x, y, t = (jax.lax.dynamic_slice_in_dim(a, n, 1) for a in (batch.x, batch.y, batch.t))

    def negative_log_likelihood(params: Params) -> jax.Array:
        return cross_entropy(forward(ts, params, state, x, t, train=False), y)

    return jax.tree.map(lambda f, g: f + g**2, total, jax.grad(negative_log_likelihood)(params))


def diagonal_fisher(params: Params, model: Model, batches: Iterable[Batch], samples: int | None) -> Params:
    """Return the mean squared per-sample gradient over the first `samples` samples (None for all)."""
    total, count = tree_zeros_like(params), 0
    for batch in batches:
        wanted = len(batch.y) if samples is None else min(len(batch.y), samples - count)
        new = squared_gradients(params, model, Batch(batch.x[:wanted], batch.y[:wanted], batch.t[:wanted]))
        total = tree_add(total, new)
        count += wanted
        if count == samples:
            break
    return tree_scale(1 / count, total)


def ewc(hparams: EWCHParams, seed: int = 0) -> Algorithm:
    """Return elastic weight consolidation.

    Args:
        hparams: settings; the published RotatedMNIST number (48.5, MC-SGD paper) comes from another variant,
            with a min-max normalised Fisher.
        seed: of dropout.
    """

    def init(ts: TrainState, spec: StreamSpec) -> State:
        memory = EWCState(jax.tree.map(jnp.copy, ts.params), jax.tree.map(jnp.zeros_like, ts.params))
        return State(init_stream(ts, spec, hparams, seed), memory)

    def end_task(ts: TrainState, state: State, batches: Iterable[Batch]) -> tuple[TrainState, State]:
        fisher = diagonal_fisher(ts.params, (ts, state), batches, hparams.fisher_samples)
        return ts, state._replace(memory=consolidate(ts.params, state.memory, fisher, hparams))

    return Algorithm(
        init=init,
        start_task=partial(start_task, hparams=hparams),
        train_step=partial(train_step, penalty=lambda p, memory: hparams.ewc_lambda * penalty(p, memory)),
        end_task=end_task,
        predict=predict,
        hparams=hparams,
    )
