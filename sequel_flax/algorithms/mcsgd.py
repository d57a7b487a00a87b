"""Mode connectivity SGD (Mirzadeh et al. 2021, https://arxiv.org/abs/2010.04495).

Ordinary training on a task ends at the weights w_hat. A search then finds the solution w_bar, whose loss is
low on two straight lines: from the last solution w_bar' for samples of past tasks, and from w_hat for
samples of the current task:

    w_bar = argmin_w sum_a L_past(w_bar' + a (w - w_bar')) + L_now(w_hat + a (w - w_hat)),  a = 0, 1/n, ..., 1

The search is SGD with momentum on a few samples. It starts at w_bar' + p (w_hat - w_bar'). Between tasks the
network has the weights w_bar; the accuracy of w_hat is reported, too. During a task the network is trained
towards w_hat. Quirks of the official code are options: `lmc_gradient`, `lmc_loss`, `lmc_steps`, `lmc_start`.
The original library reaches its RotatedMNIST accuracy (82.3, 20 tasks, MLP 256-256) with lmc_gradient=prefix
and lmc_steps=epoch. The equation as it is written reaches more.

Mirror: sequel_lightning/algorithms/mcsgd.py
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState

from sequel_core.algorithms.mcsgd import ConnectionPlan, MCSGDHParams, connection_plan
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.task import Batch
from sequel_flax import bundle
from sequel_flax.augmentation import without_draws
from sequel_flax.boundaries import StartPlan, jit_per_network, repeated, select
from sequel_flax.bundle import (
    Algorithm,
    Model,
    Params,
    State,
    StepOutputs,
    apply_start,
    for_objective,
    network,
    objective_of,
)
from sequel_flax.objectives import Objective, losses_of
from sequel_flax.replay import (
    Memory,
    ReplayBatch,
    draws,
    empty_memory,
    mean_loss,
    read,
    replay,
    sum_of_first,
    total_weight,
)
from sequel_flax.trainable import Selection

Moving = tuple[Params, Params]  # weights w on their way to w_bar, and their velocity
Lines = Sequence[tuple[Params, Sequence[ReplayBatch]]]  # start of each line, and the samples of its loss


class MCSGDState(NamedTuple):
    """What MC-SGD keeps."""

    memory: Memory  # samples of all tasks
    w_bar: Params  # the solution at the end of the last task
    w_hat: Params  # where ordinary training ended then
    moving: Any  # online: Moving of the current task; offline: ()
    learned: jax.Array  # index of the last task that has ended, -1 before the first, int32 ()


def interpolate(start: Params, end: Params, place: float) -> Params:
    """Return the point of a line at a place from 0 (start) to 1 (end)."""
    return jax.tree.map(lambda b, a: (1 - place) * a + place * b, end, start)


def at_rest(w: Params) -> Moving:
    """Return weights with velocity 0."""
    return w, jax.tree.map(jnp.zeros_like, w)


def momentum_step(moving: Moving, gradient: Params, hparams: MCSGDHParams) -> Moving:
    """Return the weights and their velocity after a step of SGD."""
    velocity = jax.tree.map(lambda v, g: hparams.lmc_momentum * v + g, moving[1], gradient)
    return jax.tree.map(lambda w, v: w - hparams.lmc_lr * v, moving[0], velocity), velocity


def connection_step(moving: Moving, model: Model, lines: Lines, hparams: MCSGDHParams) -> Moving:
    """Return the weights and their velocity after a step on the losses along lines that end at them."""
    gradient = jax.tree.map(jnp.zeros_like, moving[0])
    for start, samples in lines:
        count = total_weight(model.objective, samples)
        for place, factor in hparams.points():
            for chunk in samples:
                gradient = add_gradient(gradient, model, start, moving[0], place, factor / count, chunk)
    return momentum_step(moving, gradient, hparams)


@jit_per_network
def add_gradient(
    total: Params, model: Model, start: Params, end: Params, place: float, factor: Any, samples: ReplayBatch
) -> Params:
    """Return `total` plus `factor` times the gradient of the summed loss at a point of a line."""
    batch = Batch(*samples[:3])

    def summed_loss(params: Params) -> jax.Array:
        def call(x: Any) -> Any:
            return network(model.ts, params, model.state, x, batch.t)

        net = for_objective(model, batch, call(batch.x), call)
        return sum_of_first(losses_of(model.objective, net, batch), samples.count)

    gradient = jax.grad(summed_loss)(interpolate(start, end, place))
    return jax.tree.map(lambda a, g: a + factor.astype(a.dtype) * g, total, gradient)


def plan_connection(state: MCSGDState, task: int, hparams: MCSGDHParams, seed: int) -> ConnectionPlan:
    """Return the slots of the memory that the search for w_bar reads; none online or after the first task."""
    tasks, search = np.asarray(state.memory.t), hparams.lmc_policy == "offline" and state.learned >= 0
    return connection_plan(hparams, tasks if search else np.full_like(tasks, -1), task, seed)


def begin(params: Params, state: MCSGDState, hparams: MCSGDHParams) -> tuple[Params, MCSGDState]:
    """Return the weights that a task starts with, and the state, online with w_bar on its way."""
    if hparams.lmc_start == "w_hat":
        params = select(state.learned >= 0, state.w_hat, params)
    if hparams.lmc_policy == "online":
        state = state._replace(moving=at_rest(interpolate(state.w_bar, params, hparams.lmc_init_position)))
    return params, state


def finish(
    params: Params,
    model: Model,
    state: MCSGDState,
    plan: ConnectionPlan,
    task: jax.Array,
    hparams: MCSGDHParams,
) -> MCSGDState:
    """Return the state at the end of a task, from the weights at its end."""
    moving = state.moving
    if hparams.lmc_policy == "offline":
        moving = at_rest(interpolate(state.w_bar, params, hparams.lmc_init_position))
        slots = jnp.where(plan.slots < 0, len(state.memory.t), plan.slots)  # padding means "no sample", too

        def inner_step(k: Any, moving: Moving) -> Moving:
            past, now = ([read(state.memory, pair[part]) for pair in slots[k]] for part in (0, 1))
            return connection_step(moving, model, [(state.w_bar, past), (params, now)], hparams)

        moving = repeated(plan.count, inner_step, moving)
    w_bar = select(state.learned >= 0, moving[0], params)
    return state._replace(w_bar=w_bar, w_hat=jax.tree.map(jnp.copy, params), learned=jnp.copy(task))


def mcsgd(
    hparams: MCSGDHParams, seed: int = 0, trainable: Selection = None, objective: Objective | None = None
) -> Algorithm:
    """Return mode connectivity SGD as pure functions.

    Args:
        hparams: settings; see `help(MCSGDHParams)`.
        seed: of dropout, of the memory and of the order in which the search reads it, >= 0.
        trainable: which parameters are trained; None for all. See `make_algorithm`.
        objective: what the network is trained and scored on; None for the one that fits the targets.

    Raises:
        ValueError: in `init`, if the network has batch normalisation or the memory does not fit the stream;
            in `train_step`, if the batch has no plan.

    Example:
        >>> import optax
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import Batch, MCSGDHParams
        >>> from sequel_flax import MLP, initial_params, mcsgd
        >>> digits, net = RotatedDigits(num_tasks=2, subset=40), MLP(widths=(16,), num_classes=10)
        >>> params = initial_params(net, digits.spec, seed=0)
        >>> ts = TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.1))
        >>> algorithm = mcsgd(MCSGDHParams(mem_size=40, lmc_line_samples=3))
        >>> state = algorithm.init(ts, digits.spec)
        >>> planner = algorithm.planner(digits.spec, state)
        >>> for task in digits.tasks:
        ...     ts, state = algorithm.start_task(ts, state, task)
        ...     batch = Batch(*task.train.take(range(40)))
        ...     batch = batch._replace(plan=planner.next(batch.y, batch.t))
        ...     ts, state, outputs = algorithm.train_step(ts, state, batch)
        ...     ts, state = algorithm.end_task(ts, state, [batch])
        >>> sorted(algorithm.alternatives(ts, state, batch.x, batch.t))
        ['w_hat']
    """
    online = hparams.lmc_policy == "online"
    make = partial(replay, seed=seed, loss=lambda batch, _: mean_loss(batch), num_draws=int(online))
    inner = replace(hparams, mem_device="auto")  # its step is a part of this one
    base = make(inner, past_only=True, objective=objective)

    def init_memory(ts: TrainState, spec: StreamSpec) -> MCSGDState:
        bundle.check_no_batch_stats(
            ts, "mcsgd", "the weights between two solutions have no running statistics"
        )
        w_bar, w_hat, w = (jax.tree.map(jnp.copy, ts.params) for _ in range(3))
        moving, learned = at_rest(w) if online else (), jnp.asarray(-1, jnp.int32)
        memory = empty_memory(spec, hparams.slots(spec.num_tasks), hparams=hparams)
        return MCSGDState(memory, w_bar, w_hat, moving, learned)

    def start(ts: TrainState, state: State, plan: StartPlan) -> tuple[TrainState, State]:
        params, memory = begin(ts.params, state.memory, hparams)
        return apply_start(ts.replace(params=params), state._replace(memory=memory), plan, hparams)

    def train_step(ts: TrainState, state: State, batch: Batch) -> tuple[TrainState, State, StepOutputs]:
        memory = state.memory
        current, *past = draws(memory.memory, batch)
        plain = state._replace(memory=memory.memory)
        after, plain, outputs = base.train_step(ts, plain, without_draws(batch))
        if online:
            lines = [(memory.w_bar, past), (after.params, [current])]
            model = Model(after, state, objective_of(objective, state.stream))
            step = partial(connection_step, model=model, lines=lines, hparams=hparams)
            moving = jax.lax.cond(memory.learned >= 0, step, lambda moving: moving, memory.moving)
            memory = memory._replace(moving=moving)
        return after, state._replace(memory=memory._replace(memory=plain.memory)), outputs

    def plan_end(state: State, batches: Iterable[Batch]) -> ConnectionPlan:
        return plan_connection(state.memory, int(state.stream.task), hparams, seed)

    def end(ts: TrainState, state: State, plan: ConnectionPlan) -> tuple[TrainState, State]:
        model = Model(ts, state, objective_of(objective, state.stream))
        memory = finish(ts.params, model, state.memory, plan, state.stream.task, hparams)
        params = jax.tree.map(jnp.copy, memory.w_bar)
        return ts.replace(params=params), state._replace(memory=memory)

    def alternatives(ts: TrainState, state: State, x: jax.Array, t: jax.Array) -> StepOutputs:
        w_hat = select(state.memory.learned == state.stream.task, state.memory.w_hat, ts.params)
        return {"w_hat": base.predict(ts.replace(params=w_hat), state, x, t)}

    return make(
        hparams,
        past_only=True,
        trainable=trainable,
        objective=objective,
        train_step=train_step,
        init_memory=init_memory,
        fills={"w_bar": jnp.copy, "w_hat": jnp.copy, "moving": (jnp.copy, jnp.zeros_like) if online else ()},
        apply_start=start,
        plan_end=plan_end,
        apply_end=end,
        alternatives=alternatives,
    )
