"""Mode connectivity SGD (Mirzadeh et al. 2021, https://arxiv.org/abs/2010.04495).

Ordinary training on a task ends in w_hat. The solution w_bar is where the loss stays low on straight lines,
to the last solution for samples of past tasks, and to w_hat for samples of the current one:

    w_bar = argmin_w sum_a L_past(w_bar' + a (w - w_bar')) + L_now(w_hat + a (w - w_hat)),  a = 0, 1/n, ..., 1

found by SGD from w_bar' + p (w_hat - w_bar') on few samples. Between tasks the network holds w_bar, and w_hat
is reported beside it; within a task it holds w_hat on its way. Quirks of the official code are options:
`lmc_gradient`, `lmc_loss`, `lmc_steps` and `lmc_start`. RotatedMNIST (82.3, 20 tasks, MLP 256-256): the
original library comes to it with lmc_gradient=prefix and lmc_steps=epoch; the equation itself goes past it.

Mirror: sequel_lightning/algorithms/mcsgd.py
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

from sequel_core.hparams import MCSGDHParams
from sequel_core.memory import connection_batches
from sequel_core.task import Batch, StreamSpec, Task
from sequel_flax.augmentation import without_draws
from sequel_flax.bundle import (
    Algorithm,
    Outputs,
    Params,
    State,
    masked,
    network,
    refuse_batch_stats,
    start_task,
)
from sequel_flax.replay import Memory, Recalled, draws, mean_cross_entropy, recall, replay, sum_of_first

Lines = Sequence[tuple[Params, Sequence[Recalled]]]  # where each begins, and the samples that it is for


class MCSGDState(NamedTuple):
    """What MC-SGD keeps."""

    memory: Memory  # samples of all tasks
    w_bar: Params  # the solution at the end of the last task
    w_hat: Params  # where ordinary training ended then
    moving: Any  # online: the solution on its way, and its velocity; () offline
    learned: jax.Array  # index of the last task that has ended, -1 before the first, int32 ()


def between(start: Params, end: Params, place: float) -> Params:
    """Return the point of a line at a place from 0 (start) to 1 (end)."""
    return jax.tree.map(lambda a, b: (1 - place) * a + place * b, start, end)


def momentum_step(moving: Any, gradient: Params, hparams: MCSGDHParams) -> tuple[Params, Params]:
    """Return the weights and their velocity after a step of SGD."""
    velocity = jax.tree.map(lambda v, g: hparams.lmc_momentum * v + g, moving[1], gradient)
    return jax.tree.map(lambda w, v: w - hparams.lmc_lr * v, moving[0], velocity), velocity


@jax.jit
def _add_point(total: Params, ts: TrainState, state: State, point: Any, samples: Recalled) -> Params:
    """Return `total` plus, times a factor, the gradient of the summed cross-entropy at a point of a line."""
    start, end, place, factor = point

    def loss(params: Params) -> jax.Array:
        logits = masked(state.stream, network(ts, params, state, samples.x), samples.t)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, samples.y)
        return sum_of_first(losses, samples.count)

    gradient = jax.grad(loss)(between(start, end, place))
    return jax.tree.map(lambda a, g: a + factor.astype(a.dtype) * g, total, gradient)


def mcsgd(hparams: MCSGDHParams, seed: int = 0) -> Algorithm:
    """Return MC-SGD.

    Args:
        hparams: settings.
        seed: of dropout, of the memory and of the order in which w_bar sees it.
    """
    online = hparams.lmc_policy == "online"
    bundle = replay(hparams, seed, lambda own, _: mean_cross_entropy(own), int(online), past_only=True)

    def init(ts: TrainState, spec: StreamSpec) -> State:
        refuse_batch_stats(ts, "mcsgd", "the weights between two solutions have no running statistics")
        w_bar, w_hat, w = (jax.tree.map(jnp.copy, ts.params) for _ in range(3))
        moving = (w, jax.tree.map(jnp.zeros_like, w)) if online else ()
        state = bundle.init(ts, spec)
        learned = jnp.asarray(-1, jnp.int32)
        return state._replace(memory=MCSGDState(state.memory, w_bar, w_hat, moving, learned))

    def start(ts: TrainState, state: State, task: Task) -> tuple[TrainState, State]:
        kept = state.memory
        if kept.learned >= 0 and hparams.lmc_start == "w_hat":
            ts = ts.replace(params=jax.tree.map(jnp.copy, kept.w_hat))
        if online:
            w = between(kept.w_bar, ts.params, hparams.lmc_init_position)
            kept = kept._replace(moving=(w, jax.tree.map(jnp.zeros_like, w)))
        return start_task(ts, state._replace(memory=kept), task, hparams)

    def step(moving: Any, ts: TrainState, state: State, lines: Lines) -> tuple[Params, Params]:
        """Return w and its velocity after a step on the lines that begin at each of the weights given."""
        gradient = jax.tree.map(jnp.zeros_like, moving[0])
        for begin, samples in lines:
            count = jnp.maximum(sum(s.count for s in samples), 1)
            for place, factor in hparams.points():
                for chunk in samples:
                    point = (begin, moving[0], place, factor / count)
                    gradient = _add_point(gradient, ts, state, point, chunk)
        return momentum_step(moving, gradient, hparams)

    def train_step(ts: TrainState, state: State, batch: Batch) -> tuple[TrainState, State, Outputs]:
        kept, moving = state.memory, state.memory.moving
        own, *past = draws(kept.memory, batch)
        alone = without_draws(batch)
        after, plain, outputs = bundle.train_step(ts, state._replace(memory=kept.memory), alone)
        if online:
            lines = [(kept.w_bar, past), (after.params, [own])]
            go = partial(step, ts=after, state=state, lines=lines)
            moving = jax.lax.cond(kept.learned >= 0, go, lambda still: still, moving)
        return after, state._replace(memory=kept._replace(memory=plain.memory, moving=moving)), outputs

    def end_task(ts: TrainState, state: State, batches: Iterable[Batch]) -> tuple[TrainState, State]:
        kept, task = state.memory, int(state.stream.task)
        w = w_hat = jax.tree.map(jnp.copy, ts.params)
        if kept.learned >= 0 and online:
            w, _ = kept.moving
        elif kept.learned >= 0:
            w = between(kept.w_bar, w_hat, hparams.lmc_init_position)
            moving = (w, jax.tree.map(jnp.zeros_like, w))
            for pairs in connection_batches(hparams, np.asarray(kept.memory.t), task, seed):
                past, now = (
                    [recall(kept.memory, jnp.asarray(pair[kind])) for pair in pairs] for kind in (0, 1)
                )
                moving = step(moving, ts, state, [(kept.w_bar, past), (w_hat, now)])
            w, _ = moving
        w_bar, params = (jax.tree.map(jnp.copy, w) for _ in range(2))
        memory = kept._replace(w_bar=w_bar, w_hat=w_hat, learned=jnp.asarray(task, jnp.int32))
        return ts.replace(params=params), state._replace(memory=memory)

    def alternatives(ts: TrainState, state: State, x: jax.Array, t: jax.Array) -> Outputs:
        ended = state.memory.learned == state.stream.task
        w_hat = jax.tree.map(lambda a, b: jnp.where(ended, a, b), state.memory.w_hat, ts.params)
        return {"w_hat": bundle.predict(ts.replace(params=w_hat), state, x, t)}

    return bundle._replace(
        init=init, start_task=start, train_step=train_step, end_task=end_task, alternatives=alternatives
    )
