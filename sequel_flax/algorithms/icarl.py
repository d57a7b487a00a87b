"""iCaRL (Rebuffi, Kolesnikov, Sperl & Lampert 2017, https://arxiv.org/abs/1611.07725).

    L = mean_n 1/|S| sum_{c in S} BCE(sigmoid(f_c(x_n)), q_nc)                                  (algorithm 3)
    q_nc = sigmoid(f_old,c(x_n)) for c of past tasks that the current one lacks, else 1[y_n = c]
    y*(x) = argmin_c ||h(x) - mu_c||, mu_c the mean of the exemplars of class c                 (algorithm 1)

S are the classes seen so far, f_old is the network at the end of the last task, in evaluation mode, and h the
last hidden layer; h(x), that of each exemplar, and mu_c have unit length. A task trains on its samples and on
all exemplars; a loop or loader of one's own joins them itself (`training_split`). At its end the mem_size
exemplars are shared out anew among the classes, or classes of each task where they come back: past sets are
cut, the task's are chosen by herding (algorithms 4 and 5). Within a task, and of tasks to come, the last
layer predicts; otherwise its accuracy is reported beside, as `head`.

The official code has quota=ceil, outputs=all and flip=True. For CIFAR-100 it keeps mem_size=2000 and trains
ResNet-32 with batches of 128, 70 epochs a task, SGD with momentum 0.9, weight decay 1e-5 and a learning rate
of 2.0, a fifth of it from epoch 49 and a 25th from epoch 63 on, anew for each task.

The network needs `features(x)`, the last hidden layer, and a last layer called `head`.

Mirror: sequel_lightning/algorithms/icarl.py
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

from sequel_core.algorithms.icarl import ICaRLHParams
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.exemplars import joined_with_samples
from sequel_core.stream.task import Batch
from sequel_flax import bundle
from sequel_flax.boundaries import collected
from sequel_flax.bundle import (
    Algorithm,
    Params,
    State,
    StepOutputs,
    advance,
    frozen_network,
    make_algorithm,
    masked,
    network,
    trained_on,
    training_forward,
)
from sequel_flax.exemplars import embed, init_exemplars, nearest_mean, renew
from sequel_flax.replay import Memory, planned, stored_samples
from sequel_flax.trainable import Selection


class ICaRLState(NamedTuple):
    """What iCaRL remembers of past tasks."""

    exemplars: Memory  # set after set from the first slot on, each in herding order
    old: Params  # theta_old, weights at the end of the last task
    statistics: Params  # running statistics of batch normalisation then; empty without
    means: jax.Array  # mu [num_classes, D], 0 for a class without exemplars
    has_mean: jax.Array  # whether a class has exemplars, bool [num_classes]
    learned: jax.Array  # index of the last task that has ended, int32 (), -1 before the first
    classes: jax.Array  # of each task, bool [T, num_classes]


def seen_and_past(classes: jax.Array, task: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the classes seen up to a task, and those of them that it lacks, bool `[num_classes]` each."""
    seen = jnp.any(classes & (jnp.arange(len(classes))[:, None] <= task), axis=0)
    return seen, seen & ~classes[task]


def targets(old: jax.Array, y: jax.Array, past: jax.Array) -> jax.Array:
    """Return q `[B, num_classes]` from the old network's logits, the labels and the past classes."""
    label = jax.nn.one_hot(y, old.shape[1], dtype=old.dtype)
    return jnp.where(past[None], jax.nn.sigmoid(old), label)


def sigmoid_loss(logits: jax.Array, target: jax.Array, outputs: jax.Array) -> jax.Array:
    """Return the mean binary cross-entropy over samples and the outputs that count `[num_classes]`."""
    losses = optax.sigmoid_binary_cross_entropy(logits, target)
    return jnp.mean(jnp.sum(jnp.where(outputs[None], losses, 0), axis=1)) / jnp.sum(outputs)


def icarl(hparams: ICaRLHParams, seed: int = 0, trainable: Selection = None) -> Algorithm:
    """Return iCaRL.

    Args:
        hparams: settings.
        seed: of dropout.
        trainable: which parameters are trained; see `make_algorithm`.

    Raises:
        ValueError: in `init`, a network without `features` or `head`, or fewer exemplars than classes.
    """

    def init_memory(ts: TrainState, spec: StreamSpec) -> ICaRLState:
        exemplars, means, has_mean = init_exemplars(ts, spec, hparams)
        learned = jnp.asarray(-1, jnp.int32)
        return ICaRLState(exemplars, *frozen_network(ts), means, has_mean, learned, jnp.array(spec.mask))

    def train_step(ts: TrainState, state: State, batch: Batch) -> tuple[TrainState, State, StepOutputs]:
        planned(state.memory.exemplars, batch, tuple)  # any plan will do; refuses images of another dtype
        seen, past = seen_and_past(state.memory.classes, state.stream.task)
        outputs = seen if hparams.outputs == "seen" else jnp.ones_like(seen)
        batch = trained_on(state, batch)
        old = network(ts, state.memory.old, state, batch.x, stats=state.memory.statistics)
        target = targets(old, batch.y, past)

        def loss_fn(params: Params) -> tuple[jax.Array, Any]:
            logits, stats = training_forward(ts, params, state, batch.x)
            return sigmoid_loss(logits, target, outputs), (masked(state.stream, logits, batch.t), stats)

        (loss, (logits, stats)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(ts.params)
        return advance(ts, gradient, stats), state, {"loss": loss, "logits": logits, "labels": batch.y}

    def end(ts: TrainState, state: State, plan: Batch) -> tuple[TrainState, State]:
        exemplars, means, has_mean = renew(ts, ts.params, state, plan, hparams)
        learned = jnp.copy(state.stream.task)
        memory = ICaRLState(exemplars, *frozen_network(ts), means, has_mean, learned, state.memory.classes)
        return ts, state._replace(memory=memory)

    def predict(ts: TrainState, state: State, x: jax.Array, t: jax.Array) -> jax.Array:
        own = state.memory
        near = nearest_mean(embed(ts, ts.params, state, x), own.means, own.has_mean)
        mask = state.stream.mask
        known = jnp.any(own.has_mean[None] if mask is None else own.has_mean[None] & mask[t], axis=1)
        ready = known & (own.learned >= 0) & (own.learned == state.stream.task)
        head = network(ts, ts.params, state, x)
        return masked(state.stream, jnp.where(ready[:, None], near, head), t)

    return make_algorithm(
        hparams,
        seed,
        train_step,
        trainable=trainable,
        init_memory=init_memory,
        fills={"old": jnp.copy},
        plan_end=lambda state, batches: collected(batches),
        apply_end=end,
        predict=predict,
        training_split=lambda state, split: joined_with_samples(
            split, stored_samples(state.memory.exemplars)
        ),
        alternatives=lambda ts, state, x, t: {"head": bundle.predict(ts, state, x, t)},
    )
