"""Averaged gradient episodic memory (Chaudhry et al. 2019, https://arxiv.org/abs/1812.00420).

    g <- g - (g . g_ref / g_ref . g_ref) g_ref  if g . g_ref < 0, else g                             (eq. 11)

g is the gradient of the loss of the batch. g_ref is that of a draw from samples of past tasks; in
the first task there are none, and g stays as it is. The projection comes before clipping and the optimizer.
The memory of the official code is a ring, which is written during a task and read from the next task on. Its
sizes are 25 (MNIST) or 13 (CIFAR) samples for each class and task, and draws of 256. RotatedMNIST (55.3,
MC-SGD paper) has one sample for each class and task, and draws all of them.

Mirror: sequel_lightning/algorithms/agem.py
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

from sequel_core.algorithms.agem import AGEMHParams
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
from sequel_flax.replay import Outputs, draws, forward, mean_loss, one_pass, replay, written
from sequel_flax.trainable import Selection


def project(gradient: Params, reference: Params) -> Params:
    """Return the gradient without its component against the reference; 0 as a reference changes nothing."""
    along, norm = dot(gradient, reference), dot(reference, reference)
    factor = jnp.where(along < 0, along / jnp.where(norm > 0, norm, 1), 0)
    return jax.tree.map(lambda g, r: g - factor * r, gradient, reference)


def dot(a: Params, b: Params) -> jax.Array:
    """Return the inner product over all parameters, shape ()."""
    product: jax.Array = optax.tree_utils.tree_vdot(a, b)
    return product


def batch_loss(batch: Outputs, draws: Sequence[Outputs]) -> jax.Array:
    """Return the mean loss of the batch alone, shape ()."""
    return mean_loss(batch)


def agem(
    hparams: AGEMHParams, seed: int = 0, trainable: Selection = None, objective: Objective | None = None
) -> Algorithm:
    """Return A-GEM as pure functions.

    The calls are those of `help(er)`.

    Args:
        hparams: settings; see `help(AGEMHParams)`.
        seed: of dropout and of the memory, >= 0.
        trainable: which parameters are trained; None for all. See `make_algorithm`.
        objective: what the network is trained and scored on; None for the one that fits the targets.

    Raises:
        ValueError: in `init`, if the classes and tasks do not divide `mem_size`; in `train_step`, if a batch
            has no plan.

    Example:
        >>> import jax, optax
        >>> from flax.training.train_state import TrainState
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import Batch, AGEMHParams
        >>> from sequel_flax import MLP, agem, initial_params
        >>> digits, net = RotatedDigits(num_tasks=2, subset=40), MLP(widths=(16,), num_classes=10)
        >>> params = initial_params(net, digits.spec, seed=0)
        >>> ts = TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.1))
        >>> algorithm = agem(AGEMHParams(mem_size=40, mem_batch_size=20))
        >>> state = algorithm.init(ts, digits.spec)
        >>> planner, (x, y, t) = algorithm.planner(digits.spec, state), digits.tasks[0].train.take(range(40))
        >>> ts, state = algorithm.start_task(ts, state, digits.tasks[0])
        >>> batch = Batch(x, y, t, planner.next(y, t))
        >>> ts, state, outputs = jax.jit(algorithm.train_step)(ts, state, batch)
        >>> outputs["logits"].shape
        (40, 10)
    """

    def train_step(ts: TrainState, state: State, batch: Batch) -> tuple[TrainState, State, StepOutputs]:
        check_augmented(state, batch)
        current, past = draws(state.memory, batch)
        model = Model(ts, state, objective_of(objective, state.stream))

        def loss_fn(params: Params) -> tuple[jax.Array, tuple[Outputs, Stats]]:
            (outputs,), stats = forward(params, model, [current], together=True)
            return batch_loss(outputs, []), (outputs, stats)

        def reference_fn(params: Params, stats: Stats) -> tuple[jax.Array, Stats]:
            (outputs,), stats = one_pass(params, model, [past], stats, 1)
            return mean_loss(outputs), stats

        (loss, (outputs, stats)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(ts.params)
        if len(past.t):
            reference, stats = jax.grad(reference_fn, has_aux=True)(ts.params, stats)
            gradient = project(gradient, reference)
        return written(model, batch, loss, outputs, advance(ts, gradient, stats))

    selection = {"trainable": trainable, "objective": objective}
    return replay(hparams, seed, batch_loss, past_only=True, train_step=train_step, **selection)
