"""Synaptic intelligence (Zenke, Poole & Ganguli 2017, https://arxiv.org/abs/1703.04200).

    L = loss(f(x), y) + c * sum_i Omega_i (theta_i - theta*_i)^2                                     (eq. 4)
    omega_i = sum over the steps of a task of -g_i (theta_i after - theta_i before)                  (eq. 3)
    Omega_i <- Omega_i + omega_i / ((theta_i - theta*_i)^2 + xi) at its end; then theta* <- theta    (eq. 5)

g is the gradient of the loss alone, before clipping; with `path_gradient=total`, also that of the penalty.
The step is the optimizer's real step, with momentum, weight decay and clipping. theta* are the weights at the
start of the task; for the first task, the initial weights. The official code keeps Omega >= 0 (`clamp`). Its
Permuted MNIST accuracies (10 tasks, MLP 2000-2000, Adam 1e-3 that is not reset between tasks, batch 256, 20
epochs) have c = 0.1 and xi = 0.1. Its Split MNIST accuracies have c = 1, xi = 0.001 and reset the optimizer
for each task.

Mirror: sequel_lightning/algorithms/si.py
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState

from sequel_core.algorithms.si import SIHParams
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.task import Batch
from sequel_flax.boundaries import StartPlan
from sequel_flax.bundle import (
    Algorithm,
    Params,
    State,
    StepOutputs,
    advance,
    apply_start,
    empty_sum,
    make_algorithm,
    trained_on,
    training_loss,
)
from sequel_flax.objectives import Objective
from sequel_flax.quadratic import FILLS, init_quadratic, penalty
from sequel_flax.trainable import Selection


class SIState(NamedTuple):
    """What SI remembers; all trees have the structure of the parameters."""

    anchor: Params  # theta*, weights at the start of the current task
    importance: Params  # Omega, all 0 before the end of the first task
    path: Params  # omega, the path integral of the current task


def accumulate_path_integral(path: Params, gradient: Params, before: Params, after: Params) -> Params:
    """Return omega after one more step: omega - g (after - before)."""

    def add(w: jax.Array, g: jax.Array, b: jax.Array, a: jax.Array) -> jax.Array:
        return w - g.astype(w.dtype) * (a.astype(w.dtype) - b.astype(w.dtype))

    return jax.tree.map(add, path, gradient, before, after)


@partial(jax.jit, static_argnames="hparams")
def consolidate(params: Params, state: SIState, hparams: SIHParams) -> SIState:
    """Return the state at the end of a task: Omega with the importances of the task, and omega 0."""

    def add(total: jax.Array, path: jax.Array, p: jax.Array, anchor: jax.Array) -> jax.Array:
        distance = p.astype(total.dtype) - anchor.astype(total.dtype)
        total = total + path / (distance**2 + hparams.xi)
        return jnp.maximum(total, 0) if hparams.clamp else total

    importance = jax.tree.map(add, state.importance, state.path, params, state.anchor)
    return SIState(jax.tree.map(jnp.copy, params), importance, jax.tree.map(jnp.zeros_like, state.path))


def si(
    hparams: SIHParams, seed: int = 0, trainable: Selection = None, objective: Objective | None = None
) -> Algorithm:
    """Return synaptic intelligence as pure functions.

    The order of the calls is that of `help(ewc)`. Every step adds to the path integral, so take all steps
    of a task by `train_step`.

    Args:
        hparams: settings; see `help(SIHParams)`.
        seed: of dropout, >= 0.
        trainable: which parameters are trained; None for all. See `make_algorithm`.
        objective: what the network is trained and scored on; None for the one that fits the targets.

    Raises:
        ValueError: in `train_step`, if the samples belong to a task that has not begun.

    Example:
        >>> import optax
        >>> from flax.training.train_state import TrainState
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import Batch, SIHParams
        >>> from sequel_flax import MLP, initial_params, si
        >>> digits, net = RotatedDigits(num_tasks=2, subset=40), MLP(widths=(16,), num_classes=10)
        >>> params = initial_params(net, digits.spec, seed=0)
        >>> ts = TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.1))
        >>> algorithm = si(SIHParams(si_lambda=0.5))
        >>> ts, state = algorithm.start_task(ts, algorithm.init(ts, digits.spec), digits.tasks[0])
        >>> batch = Batch(*digits.tasks[0].train.take(range(40)))
        >>> ts, state, outputs = algorithm.train_step(ts, state, batch)
        >>> state.memory.path["head"]["bias"].shape
        (10,)
    """
    strength = 2 * hparams.si_lambda

    def init_memory(ts: TrainState, spec: StreamSpec) -> SIState:
        return SIState(*init_quadratic(ts), path=jax.tree.map(empty_sum, ts.params))

    def start(ts: TrainState, state: State, plan: StartPlan) -> tuple[TrainState, State]:
        ts, state = apply_start(ts, state, plan, hparams)
        return ts, state._replace(memory=state.memory._replace(anchor=jax.tree.map(jnp.copy, ts.params)))

    def train_step(ts: TrainState, state: State, batch: Batch) -> tuple[TrainState, State, StepOutputs]:
        memory, batch = state.memory, trained_on(state, batch)

        def loss_fn(params: Params) -> tuple[jax.Array, Any]:
            return training_loss(ts, params, state, batch, objective)

        (loss, (logits, stats)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(ts.params)
        value, penalty_gradient = jax.value_and_grad(penalty)(ts.params, memory.anchor, memory.importance)
        total = jax.tree.map(lambda g, s: g + strength * s, gradient, penalty_gradient)
        after = advance(ts, total, stats)
        counted = total if hparams.path_gradient == "total" else gradient
        path = accumulate_path_integral(memory.path, counted, ts.params, after.params)
        outputs = {"loss": loss + strength * value, "logits": logits, "labels": batch.y}
        return after, state._replace(memory=memory._replace(path=path)), outputs

    def end(ts: TrainState, state: State, plan: Any) -> tuple[TrainState, State]:
        return ts, state._replace(memory=consolidate(ts.params, state.memory, hparams))

    return make_algorithm(
        hparams,
        seed,
        train_step,
        trainable=trainable,
        objective=objective,
        init_memory=init_memory,
        fills={**FILLS, "path": empty_sum},
        apply_start=start,
        apply_end=end,
    )
