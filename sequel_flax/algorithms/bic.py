"""Bias correction, BiC (Wu et al. 2019, https://arxiv.org/abs/1905.13260).

    L = lambda L_d + (1 - lambda) CE,  lambda = n_old / (n_old + n_new)                           (equation 1)
    L_d = CE(softmax(z_old / T), softmax(z / T)) over the classes of past tasks, T = temperature  (equation 2)
    f_c(x) = beta z_c + gamma for the classes that are new in the task, else z_c                  (equation 4)

z are the outputs of the network, and z_old the corrected outputs f of the network after the last task. n_old
and n_new are the numbers of classes of past tasks and of the current one.

A task trains on its samples and on the exemplars of past tasks. A user-defined loop or loader has to join
them (`training_split`). Then the second phase fits beta and gamma to held-out samples of all classes seen, by
the cross-entropy of f (equation 5); the network is fixed. There is no second phase after the first task. f
predicts between tasks, and z during a task. The accuracy of z between tasks is reported as `head`.

The memory is divided among the classes again in each task. If classes come back in later tasks, it is divided
among the classes of each task, and only classes that are new in a task are corrected. The held-out samples of
a task are set aside before it starts: `hparams.training_tasks(benchmark, seed)`.

It differs from the official code in these points:

- The exemplars are a random choice. The official code chooses them by herding.
- The learning rate of the second phase is constant, and gamma has no penalty of its own.

Mirror: sequel_lightning/algorithms/bic.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

from sequel_core.algorithms.bic import BiCHParams
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.exemplars import joined_with_samples, renewed_samples
from sequel_core.stream.images import Augmentation
from sequel_core.stream.phase import PhaseSteps, phase_steps
from sequel_core.stream.task import AnySplit, Batch, Samples, Task
from sequel_flax import bundle
from sequel_flax.boundaries import SecondPhase, StartPlan, given
from sequel_flax.bundle import Algorithm, Model, Params, State, Stats, StepOutputs, make_algorithm
from sequel_flax.objectives import Objective, check_classification
from sequel_flax.replay import Memory, empty_memory, stored_samples
from sequel_flax.second_phase import phase_samples, sgd_step
from sequel_flax.trainable import Selection


class BiCState(NamedTuple):
    """What BiC remembers of past tasks."""

    exemplars: Memory  # samples of past tasks that are trained on, one set after the other
    held_out: Memory  # samples of all tasks so far that the second phase reads
    old: Params  # weights at the end of the last task
    statistics: Params  # running statistics of batch normalisation then; empty without batch normalisation
    correction: Params  # beta and gamma, (); 1 and 0 before the second phase of the task
    block: jax.Array  # classes that are corrected, bool [num_classes]
    old_correction: Params  # beta and gamma of the last task, ()
    old_block: jax.Array  # classes that the last task corrects, bool [num_classes]
    velocity: Params  # v of the second phase, of beta and gamma
    phase_step: jax.Array  # steps of the second phase of the current task that were taken, int32 ()


def corrected(logits: jax.Array, correction: Params, block: jax.Array) -> jax.Array:
    """Return f: logits `[B, num_classes]`, those of the block `[num_classes]` times beta plus gamma."""
    return jnp.where(block[None], correction["beta"] * logits + correction["gamma"], logits)


def distillation(logits: jax.Array, old: jax.Array, past: jax.Array, temperature: float) -> jax.Array:
    """Return L_d of logits and corrected logits of the old network `[B, num_classes]`, shape ()."""
    ours, theirs = (bundle.mask_logits(z, past[None]) / temperature for z in (logits, old))
    target = jax.nn.softmax(theirs, axis=1)
    return -(target * jax.nn.log_softmax(ours, axis=1)).sum(1).mean()


def correction_loss(
    correction: Params, logits: jax.Array, y: jax.Array, block: jax.Array, masked: Callable[..., jax.Array]
) -> jax.Array:
    """Return the cross-entropy of corrected and masked logits `[B, num_classes]` of each sample, `[B]`."""
    f = masked(corrected(logits, correction, block))
    losses: jax.Array = optax.softmax_cross_entropy_with_integer_labels(f, y)
    return losses


def training_loss(
    ts: TrainState, params: Params, state: State, batch: Batch, hparams: BiCHParams, objective: Any
) -> tuple[jax.Array, tuple[jax.Array, Stats]]:
    """Return the training loss of a batch, shape (), and its logits `[B, num_classes]`."""
    memory, stream = state.memory, state.stream
    before = (jnp.arange(len(stream.classes)) < stream.task)[:, None] & stream.classes
    past, sets = before.any(0), before.sum()
    weight = sets / (sets + bundle.task_classes(stream).sum())
    logits, stats = bundle.training_forward(ts, params, state, batch.x, batch.t)
    old = bundle.network(ts, memory.old, state, batch.x, batch.t, stats=memory.statistics)
    old = corrected(old, memory.old_correction, memory.old_block)
    model = Model(ts, state, bundle.objective_of(objective, stream))
    loss, shown = bundle.loss_of_outputs(model, batch, logits)
    weight = weight.astype(loss.dtype)
    distance = distillation(logits, jax.lax.stop_gradient(old), past, hparams.temperature)
    return weight * distance + (1 - weight) * loss, (shown, stats)


def identity(like: jax.Array) -> Params:
    """Return beta = 1 and gamma = 0."""
    return {"beta": jnp.ones((), like.dtype), "gamma": jnp.zeros((), like.dtype)}


def renewed(memory: Memory, quota: Any, mask: Any, task: int, new: Iterable[Samples]) -> tuple[Any, ...]:
    """Return inputs, labels and tasks of the slots of a memory that is divided among the classes again."""
    return tuple(renewed_samples(quota, np.asarray(mask), task, stored_samples(memory), new))


def bic(
    hparams: BiCHParams, seed: int = 0, trainable: Selection = None, objective: Objective | None = None
) -> Algorithm:
    """Return BiC as pure functions.

    A task trains on its samples and on the exemplars: `algorithm.training_split(state, task.train)`.

    Args:
        hparams: settings; see `help(BiCHParams)`.
        seed: of dropout and of the second phase, >= 0.
        trainable: which parameters are trained; None for all. See `make_algorithm`.
        objective: what the network is trained and scored on; None for the one that fits the targets.

    Raises:
        ValueError: in `init`, if `mem_size` is too small; in `start_task`, if the task has no held-out
            samples; at once or in `init`, if targets are not class labels.

    Example:
        >>> import optax
        >>> from sequel_benchmarks import SplitDigits
        >>> from sequel_core import Batch, BiCHParams
        >>> from sequel_flax import MLP, bic, initial_params
        >>> digits, net = SplitDigits(num_tasks=5, scenario="class"), MLP(widths=(16,), num_classes=10)
        >>> params = initial_params(net, digits.spec, seed=0)
        >>> ts = TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.1))
        >>> hparams = BiCHParams(mem_size=40, phase_epochs=5)
        >>> algorithm = bic(hparams)
        >>> state = algorithm.init(ts, digits.spec)
        >>> for task in list(hparams.training_tasks(digits))[:2]:
        ...     ts, state = algorithm.start_task(ts, state, task)
        ...     batch = Batch(*algorithm.training_split(state, task.train).take(np.arange(40)))
        ...     ts, state, outputs = algorithm.train_step(ts, state, batch)
        ...     ts, state = algorithm.end_task(ts, state, [Batch(*task.train.take(np.arange(40)))])
        >>> float(state.memory.correction["beta"]) != 1
        True
    """

    def init_memory(ts: TrainState, spec: StreamSpec) -> BiCState:
        sets = int(spec.mask.sum())
        exemplars, held_out = (
            empty_memory(spec, part.slots(sets)) for part in (hparams.exemplars(sets), hparams.held_out(sets))
        )
        none = jnp.zeros(spec.num_classes, bool)
        old, statistics = bundle.frozen_network(ts)
        first, last, velocity = (identity(jax.tree.leaves(ts.params)[0]) for _ in range(3))
        velocity["beta"] = jnp.zeros_like(velocity["beta"])
        step = jnp.asarray(0, jnp.int32)
        return BiCState(
            exemplars, held_out, old, statistics, first, none, last, jnp.copy(none), velocity, step
        )

    def plan_start(state: State, task: Task) -> StartPlan:
        mask = np.asarray(state.stream.classes)
        quota, new = hparams.held_out(int(mask.sum())), hparams.held_out_samples(task)
        samples = renewed(state.memory.held_out, quota, mask, task.index, [new])
        return bundle.plan_start(state, task)._replace(samples=samples)

    def apply_start(ts: TrainState, state: State, plan: StartPlan) -> tuple[TrainState, State]:
        ts, state = bundle.apply_start(ts, state, plan, hparams)
        memory, stream = state.memory, state.stream
        before = (jnp.arange(len(stream.classes)) < stream.task)[:, None] & stream.classes
        return ts, state._replace(
            memory=memory._replace(
                held_out=stored(memory.held_out, plan.samples),
                correction=identity(memory.correction["beta"]),
                block=bundle.task_classes(stream) & ~before.any(0),
            )
        )

    def stored(memory: Memory, samples: Any) -> Memory:
        x, y, t = (jnp.asarray(new, old.dtype) for old, new in zip(memory[:3], samples, strict=True))
        return Memory(x, y, t, None)

    def plan_end(state: State, batches: Iterable[Batch]) -> Any:
        mask = np.asarray(state.stream.classes)
        new = (Samples(*map(np.asarray, batch[:3])) for batch in given(batches))
        quota, task = hparams.exemplars(int(mask.sum())), int(state.stream.task)
        return renewed(state.memory.exemplars, quota, mask, task, new)

    def apply_end(ts: TrainState, state: State, plan: Any) -> tuple[TrainState, State]:
        old, statistics = bundle.frozen_network(ts)
        memory = state.memory
        correction, block = jax.tree.map(jnp.copy, (memory.correction, memory.block))
        memory = memory._replace(
            exemplars=stored(memory.exemplars, plan),
            old=old,
            statistics=statistics,
            old_correction=correction,
            old_block=block,
        )
        return ts, state._replace(memory=memory)

    def steps(state: State) -> PhaseSteps:
        task, tasks = int(state.stream.task), np.asarray(state.memory.held_out.t)
        used = tasks if task > 0 else np.full_like(tasks, -1)
        return phase_steps(hparams, Augmentation(), used, task, seed, int(state.memory.phase_step))

    def start_phase(ts: TrainState, state: State) -> tuple[TrainState, State]:
        velocity = jax.tree.map(jnp.zeros_like, state.memory.velocity)
        return ts, state._replace(memory=state.memory._replace(velocity=velocity))

    def take_phase_step(
        ts: TrainState, state: State, step: PhaseSteps
    ) -> tuple[TrainState, State, StepOutputs]:
        memory = state.memory
        samples = phase_samples(memory.held_out, step, state.stream.scale.dtype)
        counts = jnp.arange(len(samples.t)) < samples.count
        logits = bundle.network(ts, ts.params, state, samples.x, samples.t)

        def masked(f: jax.Array) -> jax.Array:
            result: jax.Array = bundle.masked(state.stream, f, samples.t)
            return result

        def mean_loss(correction: Params) -> jax.Array:
            losses = correction_loss(correction, logits, samples.y, memory.block, masked)
            mean: jax.Array = jnp.where(counts, losses, 0).sum() / samples.count
            return mean

        loss, gradient = jax.value_and_grad(mean_loss)(memory.correction)
        shown = masked(corrected(logits, memory.correction, memory.block))
        correction, velocity = sgd_step(
            memory.correction, memory.velocity, gradient, step.learning_rate, hparams
        )
        memory = memory._replace(correction=correction, velocity=velocity, phase_step=memory.phase_step + 1)
        outputs = {"loss": loss, "logits": shown, "labels": samples.y, "counts": counts}
        return ts.replace(step=ts.step + 1), state._replace(memory=memory), outputs

    def predict(ts: TrainState, state: State, x: Any, t: jax.Array) -> jax.Array:
        logits = bundle.network(ts, ts.params, state, x, t)
        f = corrected(logits, state.memory.correction, state.memory.block)
        result: jax.Array = bundle.masked(state.stream, f, t)
        return result

    def training_split(state: State, split: AnySplit) -> AnySplit:
        return joined_with_samples(split, stored_samples(state.memory.exemplars))

    loss = partial(training_loss, hparams=hparams, objective=objective)
    return make_algorithm(
        hparams,
        seed,
        partial(bundle.train_step, training_loss=loss),
        trainable=trainable,
        objective=objective,
        check=partial(check_classification, method="bic"),
        init_memory=init_memory,
        fills={"old": jnp.copy},
        plan_start=plan_start,
        apply_start=apply_start,
        plan_end=plan_end,
        apply_end=apply_end,
        predict=predict,
        training_split=training_split,
        alternatives=lambda ts, state, x, t: {"head": bundle.predict(ts, state, x, t, objective)},
        second_phase=SecondPhase(steps, start_phase, take_phase_step, hparams.phase_epochs),
    )
