"""Gradient episodic memory (Lopez-Paz & Ranzato 2017, https://arxiv.org/abs/1706.08840).

    g~ = g + sum_k v_k g_k  if g . g_k < 0 for a past task k, else g                          (eqs. 8 to 11)
    v = argmin_{v >= 0} 1/2 v^T A v + b^T v, plus margin;  A_jk = g_j . g_k, b_k = g . g_k

g is the gradient of the loss of the batch, and g_k that of a draw from the samples of past task k. The
projection comes before clipping and the optimizer. The minimum is found with an active set, as in the method
of Lawson and Hanson for nonnegative least squares.

The official code has `margin_rule="bound"`, v >= margin instead of an added margin, and `ridge=0.001`. Its
memory is a ring of the latest 256 samples of each task, and each g_k is of all of them. It writes a batch to
the memory before the step; here it is written after the step, which makes no difference to past tasks.

Mirror: sequel_lightning/algorithms/gem.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState
from jax.flatten_util import ravel_pytree

from sequel_core.algorithms.gem import GEMHParams
from sequel_core.stream.augmentation import method_plan
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.memory import MemoryPlanner
from sequel_core.stream.planner import Planner
from sequel_core.stream.task import Batch
from sequel_flax.bundle import (
    Algorithm,
    Model,
    Params,
    State,
    Stats,
    StepOutputs,
    advance,
    check_augmented,
    objective_of,
)
from sequel_flax.objectives import Objective
from sequel_flax.replay import Outputs, drawn, draws, forward, mean_loss, one_pass, replay, written
from sequel_flax.trainable import Selection


def project(gradient: jax.Array, references: jax.Array, hparams: GEMHParams) -> jax.Array:
    """Return g~ `[P]` for g `[P]` and the gradients of past tasks `[T, P]`; 0 for a task without samples."""
    gram, products = references @ references.T, references @ gradient
    weights = task_weights(gram, products, hparams)
    return jnp.where(weights.any(), gradient + weights @ references, gradient)


def task_weights(gram: jax.Array, products: jax.Array, hparams: GEMHParams) -> jax.Array:
    """Return v `[T]`, 0 if no product is negative.

    `gram` are the products of the gradients of past tasks `[T, T]`, `products` those with g `[T]`.
    """
    margin = jnp.where(jnp.diag(gram) > 0, hparams.margin, 0)
    gram = gram + hparams.ridge * jnp.eye(len(gram), dtype=gram.dtype)
    shift = margin if hparams.margin_rule == "bound" else jnp.zeros_like(margin)
    weights = margin + solve_dual(gram, products + gram @ shift)
    return jnp.where((products < 0).any(), weights, 0)


def solve_dual(gram: jax.Array, linear: jax.Array) -> jax.Array:
    """Return the v >= 0 that minimises 1/2 v^T A v + b^T v, `[T]`.

    `gram` is A, positive semidefinite `[T, T]`, `linear` is b `[T]`, in the range of A.
    """
    length = jnp.sqrt(jnp.diag(gram))
    inverse = jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0)
    eps = len(linear) * float(jnp.finfo(linear.dtype).eps)
    a = gram * inverse[:, None] * inverse[None] + eps * jnp.eye(len(linear), dtype=linear.dtype)
    b = linear * inverse
    tolerance = 10 * eps * jnp.abs(b).max()

    def body(carry: Any) -> Any:
        v, active, _, n = carry
        return *active_set_step(a, b, v, active, tolerance), n + 1

    start = jnp.zeros_like(b), jnp.zeros(len(b), bool), jnp.asarray(True), 0
    v = jax.lax.while_loop(lambda carry: carry[2] & (carry[3] < 5 * len(b)), body, start)[0]
    return v * inverse


def active_set_step(
    a: jax.Array, b: jax.Array, v: jax.Array, active: jax.Array, tolerance: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return v, the active set, bool `[T]`, and whether v may not be the minimum yet, after a step.

    v is feasible, and positive in the active set alone. It moves to the minimum over the active set, or until
    one of its numbers is 0, which leaves the set. At that minimum, the number with the steepest descent
    enters the set; of equal ones, the first.
    """
    size = len(b)
    both = active[:, None] & active[None]
    target = -jnp.linalg.solve(jnp.where(both, a, jnp.eye(size, dtype=b.dtype)), jnp.where(active, b, 0))
    blocked = active & (target <= 0)
    ratio = jnp.where(blocked, v / jnp.where(v > target, v - target, 1), jnp.inf)
    share = jnp.minimum(ratio.min(), 1)  # of the way to the target, until the first v_k is 0
    v = jnp.where(ratio > share, (1 - share) * v + share * target, 0)
    descent = jnp.where(active, -jnp.inf, -(a @ v + b))
    steepest = (jnp.arange(size) == descent.argmax()) & (descent.max() > tolerance)
    stopped = blocked.any()
    active = jnp.where(stopped, active & (v > 0), active | steepest)
    return v, active, jnp.where(stopped, share > 0, steepest.any())


def batch_loss(batch: Outputs, draws: Sequence[Outputs]) -> jax.Array:
    """Return the mean loss of the batch alone, shape ()."""
    return mean_loss(batch)


def _past_gradients(params: Params, model: Model, batch: Batch, stats: Stats) -> tuple[jax.Array, Stats]:
    """Return the gradients of the past tasks `[T, P]`, 0 for the others, and the running statistics."""
    memory, reads = model.state.memory, method_plan(batch).reads

    def add(k: Any, carry: Any) -> Any:
        rows, stats = carry
        draw = drawn(memory, batch, reads[k], k)

        def loss_fn(params: Params) -> tuple[jax.Array, Stats]:
            (outputs,), after = one_pass(params, model, [draw], stats, k + 1)
            return mean_loss(outputs), after

        gradient, stats = jax.grad(loss_fn, has_aux=True)(params)
        return rows.at[k].set(ravel_pytree(gradient)[0]), stats

    flat, _ = ravel_pytree(params)
    start = jnp.zeros((len(reads), len(flat)), flat.dtype), stats
    gradients: tuple[jax.Array, Stats] = jax.lax.fori_loop(0, model.state.stream.task, add, start)
    return gradients


def gem(
    hparams: GEMHParams, seed: int = 0, trainable: Selection = None, objective: Objective | None = None
) -> Algorithm:
    """Return GEM as pure functions.

    The calls are those of `help(er)`. The plan of a step has a draw for each task of the stream.

    Args:
        hparams: settings; see `help(GEMHParams)`.
        seed: of dropout and of the memory, >= 0.
        trainable: which parameters are trained; None for all. See `make_algorithm`.
        objective: what the network is trained and scored on; None for the one that fits the targets.

    Raises:
        ValueError: in `init`, if the tasks do not divide `mem_size`; in `train_step`, if a batch has no plan.

    Example:
        >>> import jax, optax
        >>> from flax.training.train_state import TrainState
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import Batch, GEMHParams
        >>> from sequel_flax import MLP, gem, initial_params
        >>> digits, net = RotatedDigits(num_tasks=2, subset=40), MLP(widths=(16,), num_classes=10)
        >>> params = initial_params(net, digits.spec, seed=0)
        >>> ts = TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.1))
        >>> algorithm = gem(GEMHParams(mem_size=80))
        >>> state = algorithm.init(ts, digits.spec)
        >>> planner, (x, y, t) = algorithm.planner(digits.spec, state), digits.tasks[0].train.take(range(40))
        >>> ts, state = algorithm.start_task(ts, state, digits.tasks[0])
        >>> batch = Batch(x, y, t, planner.next(y, t))
        >>> ts, state, outputs = jax.jit(algorithm.train_step)(ts, state, batch)
        >>> batch.plan.reads.shape
        (2, 40)
    """

    def train_step(ts: TrainState, state: State, batch: Batch) -> tuple[TrainState, State, StepOutputs]:
        check_augmented(state, batch)
        current = draws(state.memory, batch)[0]
        model = Model(ts, state, objective_of(objective, state.stream))

        def loss_fn(params: Params) -> tuple[jax.Array, tuple[Outputs, Stats]]:
            (outputs,), stats = forward(params, model, [current], together=True)
            return batch_loss(outputs, []), (outputs, stats)

        (loss, (outputs, stats)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(ts.params)
        if method_plan(batch).reads.shape[1]:
            references, stats = _past_gradients(ts.params, model, batch, stats)
            flat, tree_of = ravel_pytree(gradient)
            gradient = tree_of(project(flat, references, hparams))
        return written(model, batch, loss, outputs, advance(ts, gradient, stats))

    def make_planner(spec: StreamSpec) -> Planner:
        return MemoryPlanner(hparams, spec, seed, per_task=True)

    planned: dict[str, Any] = {"train_step": train_step, "make_planner": make_planner}
    return replay(hparams, seed, batch_loss, trainable=trainable, objective=objective, **planned)
