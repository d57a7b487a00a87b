"""iCaRL (Rebuffi, Kolesnikov, Sperl & Lampert 2017, https://arxiv.org/abs/1611.07725).

    L = mean_n 1/|S| sum_{c in S} BCE(sigmoid(f_c(x_n)), q_nc)                                  (algorithm 3)
    q_nc = sigmoid(f_old,c(x_n)) for c of past tasks that the current one lacks, else 1[y_n = c]
    y*(x) = argmin_c ||h(x) - mu_c||, mu_c the mean of the exemplars of class c                 (algorithm 1)

S are the classes seen so far. f_old is the network at the end of the last task, in evaluation mode. h is the
last hidden layer; h(x), h of each exemplar and mu_c are scaled to unit length (normalise_features).

A task trains on its samples and on all exemplars. A user-defined loop or loader has to join them
(`training_split`). At the end of the task, the mem_size exemplars are divided among the classes again. If
classes come back in later tasks, they are divided among the classes of each task. The sets of past classes
are shortened, and the exemplars of the new classes are chosen by herding (algorithms 4 and 5).

The nearest mean predicts between tasks. During a task, and for tasks that have not been trained, the last
layer predicts. Its accuracy between tasks is reported as `head`.

The official code corresponds to quota=ceil, outputs=all and flip=True. For CIFAR-100 it has mem_size=2000
and trains ResNet-32 with batches of 128, 70 epochs per task, SGD with momentum 0.9 and weight decay 1e-5.
For each task, the learning rate is 2.0, a fifth of it from epoch 49 on and a 25th of it from epoch 63 on.

The network needs a method `features(x)`, the last hidden layer, and a last layer called `head`.

Mirror: sequel_lightning/algorithms/icarl.py
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

from sequel_core.algorithms.icarl import ICaRLHParams
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.exemplars import joined_with_samples
from sequel_core.stream.task import AnySplit, Batch
from sequel_flax import bundle
from sequel_flax.boundaries import collected
from sequel_flax.bundle import Algorithm, Params, State, Stats, StepOutputs, make_algorithm
from sequel_flax.exemplars import init_exemplars, predict, renew
from sequel_flax.objectives import Objective, check_classification
from sequel_flax.replay import Memory, stored_samples
from sequel_flax.trainable import Selection


class ICaRLState(NamedTuple):
    """What iCaRL remembers of past tasks."""

    exemplars: Memory  # one set after the other from the first slot on, each in herding order
    old: Params  # theta_old, weights at the end of the last task
    statistics: Params  # running statistics of batch normalisation then; empty without batch normalisation
    means: jax.Array  # mu [num_classes, D], 0 for a class without exemplars
    has_mean: jax.Array  # whether a class has exemplars, bool [num_classes]
    learned: jax.Array  # index of the last task that has ended, int32 (), -1 before the first


def targets(old: jax.Array, y: jax.Array, past: jax.Array) -> jax.Array:
    """Return q `[B, num_classes]` from the old network's logits, the labels and the past classes."""
    label = jax.nn.one_hot(y, old.shape[1], dtype=old.dtype)
    return jnp.where(past[None], jax.nn.sigmoid(old), label)


def sigmoid_loss(logits: jax.Array, target: jax.Array, outputs: jax.Array) -> jax.Array:
    """Return the mean binary cross-entropy over samples and the outputs that count `[num_classes]`."""
    losses = optax.sigmoid_binary_cross_entropy(logits, target)
    return jnp.where(outputs[None], losses, 0).sum(1).mean() / outputs.sum()


def training_loss(
    ts: TrainState, params: Params, state: State, batch: Batch, hparams: ICaRLHParams
) -> tuple[jax.Array, tuple[jax.Array, Stats]]:
    """Return the training loss of a batch, shape (), and its logits `[B, num_classes]`."""
    memory = state.memory
    seen = bundle.seen_classes(state.stream)
    past = seen & ~bundle.task_classes(state.stream)
    outputs = seen if hparams.outputs == "seen" else jnp.ones_like(seen)
    logits, stats = bundle.training_forward(ts, params, state, batch.x, batch.t)
    old = bundle.network(ts, memory.old, state, batch.x, batch.t, stats=memory.statistics)
    loss = sigmoid_loss(logits, targets(old, batch.y, past), outputs)
    return loss, (bundle.masked(state.stream, logits, batch.t), stats)


def icarl(
    hparams: ICaRLHParams, seed: int = 0, trainable: Selection = None, objective: Objective | None = None
) -> Algorithm:
    """Return iCaRL as pure functions.

    A task trains on its samples and on the exemplars: `algorithm.training_split(state, task.train)`.

    Args:
        hparams: settings; see `help(ICaRLHParams)`.
        seed: of dropout, >= 0.
        trainable: which parameters are trained; None for all. See `make_algorithm`.
        objective: what the network is trained and scored on; None for the one that fits the targets.

    Raises:
        ValueError: in `init`, if the network has no method `features` or no last layer `head`, or `mem_size`
            is less than the number of classes; at once or in `init`, if targets are not class labels.

    Example:
        >>> import numpy as np
        >>> import optax
        >>> from sequel_benchmarks import SplitDigits
        >>> from sequel_core import Batch, ICaRLHParams
        >>> from sequel_flax import MLP, icarl, initial_params
        >>> digits, net = SplitDigits(num_tasks=5, scenario="class"), MLP(widths=(16,), num_classes=10)
        >>> params = initial_params(net, digits.spec, seed=0)
        >>> ts = TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.1))
        >>> algorithm = icarl(ICaRLHParams(mem_size=20))
        >>> state = algorithm.init(ts, digits.spec)
        >>> for task in digits.tasks:
        ...     ts, state = algorithm.start_task(ts, state, task)
        ...     batch = Batch(*algorithm.training_split(state, task.train).take(np.arange(40)))
        ...     ts, state, outputs = algorithm.train_step(ts, state, batch)
        ...     ts, state = algorithm.end_task(ts, state, [Batch(*task.train.take(np.arange(40)))])
        >>> algorithm.predict(ts, state, batch.x, batch.t).shape
        (40, 10)
    """

    def init_memory(ts: TrainState, spec: StreamSpec) -> ICaRLState:
        exemplars, means, has_mean = init_exemplars(ts, spec, hparams)
        learned = jnp.asarray(-1, jnp.int32)
        return ICaRLState(exemplars, *bundle.frozen_network(ts), means, has_mean, learned)

    def step(ts: TrainState, state: State, batch: Batch) -> tuple[TrainState, State, StepOutputs]:
        return bundle.train_step(ts, state, batch, partial(training_loss, hparams=hparams))

    def end(ts: TrainState, state: State, plan: Batch) -> tuple[TrainState, State]:
        exemplars, means, has_mean = renew(ts, ts.params, state, plan, hparams)
        learned = jnp.copy(state.stream.task)
        memory = ICaRLState(exemplars, *bundle.frozen_network(ts), means, has_mean, learned)
        return ts, state._replace(memory=memory)

    def training_split(state: State, split: AnySplit) -> AnySplit:
        return joined_with_samples(split, stored_samples(state.memory.exemplars))

    return make_algorithm(
        hparams,
        seed,
        step,
        trainable=trainable,
        objective=objective,
        check=partial(check_classification, method="icarl"),
        init_memory=init_memory,
        fills={"old": jnp.copy},
        plan_end=lambda state, batches: collected(batches),
        apply_end=end,
        predict=partial(predict, hparams=hparams),
        training_split=training_split,
        alternatives=lambda ts, state, x, t: {"head": bundle.predict(ts, state, x, t, objective)},
    )
