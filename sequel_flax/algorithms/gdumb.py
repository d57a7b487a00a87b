"""GDumb (Prabhu, Torr & Dokania 2020, https://www.robots.ox.ac.uk/~tvg/publications/2020/gdumb.pdf).

    theta = theta_0, trained on the memory alone at the end of each task                        (algorithm 2)

Nothing is learned from the stream itself. Its samples only go through the memory, which keeps equally many
of each class seen (`memory=greedy`, algorithm 1). The weights of a task are those at the end of its second
phase, which starts from the initial weights theta_0. During a task the network keeps the weights of the task
before, and the reported loss is that of these weights.

The second phase is SGD with momentum, a clipped gradient and a learning rate with warm restarts, see
`help(GDumbHParams)`. The defaults are those of the official code for MNIST: 128 epochs, batches of 16,
learning rates from 0.05 to 0.0005, momentum 0.9, weight decay 1e-6 and gradients of at most norm 10. For
CIFAR it has 256 epochs.

It differs from the official code in these points:

- Cutmix is left out.
- The memory goes through the stream. The official code takes the first samples of each class of the data.
- The accuracy is that of the last epoch. The official code reports the best test accuracy of all epochs.
- Weights have full precision. The official code trains in float16.

Mirror: sequel_lightning/algorithms/gdumb.py
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState

from sequel_core.algorithms.gdumb import GDumbHParams
from sequel_core.stream.augmentation import method_plan
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.phase import PhaseSteps, phase_steps
from sequel_core.stream.task import Batch
from sequel_flax import bundle
from sequel_flax.boundaries import SecondPhase
from sequel_flax.bundle import Algorithm, Model, Params, State, Stats, StepOutputs, objective_of
from sequel_flax.objectives import Objective
from sequel_flax.replay import Memory, Outputs, empty_memory, forward, mean_loss, planned, replay, write
from sequel_flax.second_phase import phase_samples, sgd_step
from sequel_flax.trainable import Selection


class GDumbState(NamedTuple):
    """What GDumb keeps."""

    memory: Memory  # samples of all tasks
    initial: Params  # theta_0, the initial weights
    statistics: Params  # initial running statistics of batch normalisation; empty without batch normalisation
    velocity: Params  # v of the second phase
    phase_step: jax.Array  # steps of the second phase of the current task that were taken, int32 ()


def gdumb(
    hparams: GDumbHParams, seed: int = 0, trainable: Selection = None, objective: Objective | None = None
) -> Algorithm:
    """Return GDumb as pure functions.

    `end_task` trains the network, unless the steps of `algorithm.second_phase` were taken before. Each batch
    needs a plan, which says what to write to the memory: `Batch(x, y, t, planner.next(y, t))`.

    Args:
        hparams: settings; see `help(GDumbHParams)`.
        seed: of dropout, of the memory and of the second phase, >= 0.
        trainable: which parameters are trained; None for all. See `make_algorithm`.
        objective: what the network is trained and scored on; None for the one that fits the targets.

    Raises:
        ValueError: in `init`, if the memory does not fit the stream; in `train_step`, if a batch has no plan.

    Example:
        >>> import optax
        >>> from sequel_benchmarks import SplitDigits
        >>> from sequel_core import Batch, GDumbHParams
        >>> from sequel_flax import MLP, gdumb, initial_params
        >>> digits, net = SplitDigits(num_tasks=5, scenario="class"), MLP(widths=(16,), num_classes=10)
        >>> params = initial_params(net, digits.spec, seed=0)
        >>> ts = TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.1))
        >>> algorithm = gdumb(GDumbHParams(mem_size=40, phase_epochs=2))
        >>> state = algorithm.init(ts, digits.spec)
        >>> planner = algorithm.planner(digits.spec, state)
        >>> for task in digits.tasks[:2]:
        ...     x, y, t = task.train.take(range(40))
        ...     ts, state = algorithm.start_task(ts, state, task)
        ...     ts, state, outputs = algorithm.train_step(ts, state, Batch(x, y, t, planner.next(y, t)))
        ...     ts, state = algorithm.end_task(ts, state, [Batch(x, y, t)])
        >>> int(ts.step)  # a batch and 2 x 3 steps of the second phase for each task
        14
    """

    def init_memory(ts: TrainState, spec: StreamSpec) -> GDumbState:
        memory = empty_memory(spec, hparams.slots(spec.num_tasks), None, hparams)
        initial, statistics = bundle.frozen_network(ts)
        velocity = jax.tree.map(jnp.zeros_like, initial)
        return GDumbState(memory, initial, statistics, velocity, jnp.asarray(0, jnp.int32))

    def step(ts: TrainState, state: State, batch: Batch) -> tuple[TrainState, State, StepOutputs]:
        bundle.check_augmented(state, batch)
        planned(state.memory.memory, batch)
        model = Model(ts, state, objective_of(objective, state.stream))
        outputs = bundle.network(ts, ts.params, state, batch.x, batch.t)
        loss, shown = bundle.loss_of_outputs(model, batch, outputs)
        memory = write(state.memory.memory, method_plan(batch).write, batch, None)
        state = state._replace(memory=state.memory._replace(memory=memory))
        return ts.replace(step=ts.step + 1), state, {"loss": loss, "logits": shown, "labels": batch.y}

    def steps(state: State) -> PhaseSteps:
        tasks, task = np.asarray(state.memory.memory.t), int(state.stream.task)
        augmentation = bundle.augmentation_of(state.stream)
        return phase_steps(hparams, augmentation, tasks, task, seed, int(state.memory.phase_step))

    def start(ts: TrainState, state: State) -> tuple[TrainState, State]:
        initial, statistics = jax.tree.map(jnp.copy, (state.memory.initial, state.memory.statistics))
        velocity = jax.tree.map(jnp.zeros_like, initial)
        state = state._replace(memory=state.memory._replace(velocity=velocity))
        return bundle.with_network(ts, initial, statistics), state

    def phase_step(ts: TrainState, state: State, step: PhaseSteps) -> tuple[TrainState, State, StepOutputs]:
        memory = state.memory
        samples = phase_samples(memory.memory, step, state.stream.scale.dtype)
        model = Model(ts, state, objective_of(objective, state.stream))

        def loss_fn(params: Params) -> tuple[jax.Array, tuple[Outputs, Stats]]:
            (outputs,), stats = forward(params, model, [samples], together=True)
            return mean_loss(outputs), (outputs, stats)

        (loss, (outputs, stats)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(ts.params)
        params, velocity = sgd_step(ts.params, memory.velocity, gradient, step.learning_rate, hparams)
        after = bundle.with_network(ts, params, stats).replace(step=ts.step + 1)
        memory = memory._replace(velocity=velocity, phase_step=memory.phase_step + 1)
        counts = jnp.arange(len(samples.t)) < samples.count
        shown = {"loss": loss, "logits": outputs.masked, "labels": samples.y, "counts": counts}
        return after, state._replace(memory=memory), shown

    return replay(
        hparams,
        seed,
        lambda batch, draws: mean_loss(batch),
        num_draws=0,
        trainable=trainable,
        objective=objective,
        init_memory=init_memory,
        train_step=step,
        fills={"initial": jnp.copy, "velocity": jnp.zeros_like},
        second_phase=SecondPhase(
            steps,
            start,
            phase_step,
            hparams.phase_epochs,
        ),
    )
