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

from sequel_core.algorithms.mcsgd import ConnectionPlan, MCSGDHParams, connection_plan
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.task import Batch
from sequel_flax import bundle
from sequel_flax.augmentation import without_draws
from sequel_flax.boundaries import StartPlan, repeated, select
from sequel_flax.bundle import Algorithm, Params, State, StepOutputs, apply_start, masked, network
from sequel_flax.replay import Memory, ReplayBatch, draws, mean_cross_entropy, read, replay, sum_of_first
from sequel_flax.trainable import Selection

Lines = Sequence[tuple[Params, Sequence[ReplayBatch]]]  # where each begins, and the samples that it is for


class MCSGDState(NamedTuple):
    """What MC-SGD keeps."""

    memory: Memory  # samples of all tasks
    w_bar: Params  # the solution at the end of the last task
    w_hat: Params  # where ordinary training ended then
    moving: Any  # online: the solution on its way, and its velocity; () offline
    learned: jax.Array  # index of the last task that has ended, -1 before the first, int32 ()


def interpolate(start: Params, end: Params, place: float) -> Params:
    """Return the point of a line at a place from 0 (start) to 1 (end)."""
    return jax.tree.map(lambda a, b: (1 - place) * a + place * b, start, end)


def momentum_step(moving: Any, gradient: Params, hparams: MCSGDHParams) -> tuple[Params, Params]:
    """Return the weights and their velocity after a step of SGD."""
    velocity = jax.tree.map(lambda v, g: hparams.lmc_momentum * v + g, moving[1], gradient)
    return jax.tree.map(lambda w, v: w - hparams.lmc_lr * v, moving[0], velocity), velocity


@jax.jit
def _add_point(total: Params, ts: TrainState, state: State, point: Any, samples: ReplayBatch) -> Params:
    """Return `total` plus, times a factor, the gradient of the summed cross-entropy at a point of a line."""
    start, end, place, factor = point

    def loss(params: Params) -> jax.Array:
        logits = masked(state.stream, network(ts, params, state, samples.x), samples.t)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, samples.y)
        return sum_of_first(losses, samples.count)

    gradient = jax.grad(loss)(interpolate(start, end, place))
    return jax.tree.map(lambda a, g: a + factor.astype(a.dtype) * g, total, gradient)


def mcsgd(hparams: MCSGDHParams, seed: int = 0, trainable: Selection = None) -> Algorithm:
    """Return MC-SGD.

    Args:
        hparams: settings.
        seed: of dropout, of the memory and of the order in which w_bar sees it.
        trainable: which parameters are trained; see `make_algorithm`.
    """
    online = hparams.lmc_policy == "online"
    make = partial(replay, hparams, seed, lambda own, _: mean_cross_entropy(own), int(online), True)
    base = make()

    def init_memory(ts: TrainState, spec: StreamSpec) -> MCSGDState:
        bundle.check_no_batch_stats(
            ts, "mcsgd", "the weights between two solutions have no running statistics"
        )
        w_bar, w_hat, w = (jax.tree.map(jnp.copy, ts.params) for _ in range(3))
        moving = (w, jax.tree.map(jnp.zeros_like, w)) if online else ()
        memory = base.init(ts, spec).memory
        return MCSGDState(memory, w_bar, w_hat, moving, jnp.asarray(-1, jnp.int32))

    def start(ts: TrainState, state: State, plan: StartPlan) -> tuple[TrainState, State]:
        kept = state.memory
        if hparams.lmc_start == "w_hat":
            ts = ts.replace(params=select(kept.learned >= 0, kept.w_hat, ts.params))
        if online:
            w = interpolate(kept.w_bar, ts.params, hparams.lmc_init_position)
            kept = kept._replace(moving=(w, jax.tree.map(jnp.zeros_like, w)))
        return apply_start(ts, state._replace(memory=kept), plan, hparams)

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

    def train_step(ts: TrainState, state: State, batch: Batch) -> tuple[TrainState, State, StepOutputs]:
        kept, moving = state.memory, state.memory.moving
        own, *past = draws(kept.memory, batch)
        alone = without_draws(batch)
        after, plain, outputs = base.train_step(ts, state._replace(memory=kept.memory), alone)
        if online:
            lines = [(kept.w_bar, past), (after.params, [own])]
            go = partial(step, ts=after, state=state, lines=lines)
            moving = jax.lax.cond(kept.learned >= 0, go, lambda still: still, moving)
        return after, state._replace(memory=kept._replace(memory=plain.memory, moving=moving)), outputs

    def plan_end(state: State, batches: Iterable[Batch]) -> ConnectionPlan:
        tasks, first = np.asarray(state.memory.memory.t), int(state.memory.learned) < 0
        past = np.full_like(tasks, -1) if online or first else tasks  # nothing to look for
        return connection_plan(hparams, past, int(state.stream.task), seed)

    def end(ts: TrainState, state: State, plan: ConnectionPlan) -> tuple[TrainState, State]:
        kept, w_hat = state.memory, jax.tree.map(jnp.copy, ts.params)
        slots = jnp.where(plan.slots < 0, len(kept.memory.t), plan.slots)  # padding is "none", too

        def inner_step(k: Any, moving: Any) -> Any:
            past, now = ([read(kept.memory, pair[kind]) for pair in slots[k]] for kind in (0, 1))
            return step(moving, ts, state, [(kept.w_bar, past), (w_hat, now)])

        w = interpolate(kept.w_bar, w_hat, hparams.lmc_init_position)
        start = kept.moving if online else (w, jax.tree.map(jnp.zeros_like, w))
        w, _ = repeated(plan.count, inner_step, start)
        w_bar, params = (select(kept.learned >= 0, w, w_hat) for _ in range(2))
        memory = kept._replace(w_bar=w_bar, w_hat=w_hat, learned=jnp.copy(state.stream.task))
        return ts.replace(params=params), state._replace(memory=memory)

    def alternatives(ts: TrainState, state: State, x: jax.Array, t: jax.Array) -> StepOutputs:
        ended = state.memory.learned == state.stream.task
        w_hat = jax.tree.map(lambda a, b: jnp.where(ended, a, b), state.memory.w_hat, ts.params)
        return {"w_hat": base.predict(ts.replace(params=w_hat), state, x, t)}

    fills: dict[str, Any] = {"w_bar": jnp.copy, "w_hat": jnp.copy}
    if online:
        fills["moving"] = (jnp.copy, jnp.zeros_like)
    return make(
        trainable=trainable,
        train_step=train_step,
        init_memory=init_memory,
        fills=fills,
        apply_start=start,
        plan_end=plan_end,
        apply_end=end,
        alternatives=alternatives,
    )
