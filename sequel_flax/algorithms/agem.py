"""Averaged gradient episodic memory (Chaudhry et al. 2019, https://arxiv.org/abs/1812.00420).

    g <- g - (g . g_ref / g_ref . g_ref) g_ref  if g . g_ref < 0, else g                             (eq. 11)

g is the gradient of the batch's cross-entropy and g_ref that of a draw from the samples of past tasks;
without any, in the first task, g stays as it is. The projection comes before clipping and the optimizer. The
ring of the official code is written while a task is trained on and read from the next one on; its sizes are
25 (MNIST) or 13 (CIFAR) samples of each class and task, 256 a draw. RotatedMNIST (55.3, MC-SGD paper) has one
sample of each class and task, all of which are drawn.

Mirror: sequel_lightning/algorithms/agem.py
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

from sequel_core.algorithms.agem import AGEMHParams
from sequel_core.stream.augmentation import method_plan
from sequel_core.stream.task import Batch
from sequel_flax.bundle import (
    Algorithm,
    Params,
    State,
    Stats,
    StepOutputs,
    advance,
    check_augmented,
    masked,
    training_forward,
)
from sequel_flax.replay import Outputs, draws, forward, mean_cross_entropy, replay, write
from sequel_flax.trainable import Selection


def project(gradient: Params, reference: Params) -> Params:
    """Return the gradient without its part against the reference; a zero reference changes nothing."""
    along, norm = dot(gradient, reference), dot(reference, reference)
    factor = jnp.where(along < 0, along / jnp.where(norm > 0, norm, 1), 0)
    return jax.tree.map(lambda g, r: g - factor * r, gradient, reference)


def dot(a: Params, b: Params) -> jax.Array:
    """Return the inner product over all parameters, shape ()."""
    product: jax.Array = optax.tree_utils.tree_vdot(a, b)
    return product


def batch_loss(batch: Outputs, draws: Sequence[Outputs]) -> jax.Array:
    """Return the cross-entropy of the batch alone, shape ()."""
    return mean_cross_entropy(batch)


def agem(hparams: AGEMHParams, seed: int = 0, trainable: Selection = None) -> Algorithm:
    """Return A-GEM.

    Args:
        hparams: settings.
        seed: of dropout and of the memory.
        trainable: which parameters are trained; see `make_algorithm`.
    """

    def train_step(ts: TrainState, state: State, batch: Batch) -> tuple[TrainState, State, StepOutputs]:
        check_augmented(state, batch)
        own, past = draws(state.memory, batch)

        def loss_fn(params: Params) -> tuple[jax.Array, tuple[Outputs, Stats]]:
            (seen,), stats = forward(ts, params, state, [own], together=True)
            return batch_loss(seen, []), (seen, stats)

        def reference_fn(params: Params, stats: Stats) -> tuple[jax.Array, Stats]:
            counts = jnp.arange(len(past.y)) < past.count
            logits, stats = training_forward(ts, params, state, past.x, stats=stats, draw=1, counts=counts)
            own = masked(state.stream, logits, past.t)
            return mean_cross_entropy(Outputs(logits, own, past.y, None, past.count)), stats

        (loss, (seen, stats)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(ts.params)
        if len(past.y):
            reference, stats = jax.grad(reference_fn, has_aux=True)(ts.params, stats)
            gradient = project(gradient, reference)
        memory = write(state.memory, method_plan(batch).write, batch, seen.logits)
        outputs = {"loss": loss, "logits": seen.masked, "labels": batch.y}
        return advance(ts, gradient, stats), state._replace(memory=memory), outputs

    return replay(hparams, seed, batch_loss, past_only=True, trainable=trainable, train_step=train_step)
