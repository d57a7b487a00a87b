"""Learning without forgetting (Li & Hoiem 2016, https://arxiv.org/abs/1606.09282), and LwF.MC.

    L = loss(f(x), y) - lwf_lambda * mean_n sum_c q_nc log p_nc                                    (eq. 2, 3)
    p = softmax(f(x) / T), q = softmax(f_old(x) / T), over the classes of past tasks

f_old is the network at the end of the last task, in evaluation mode, and x are samples of the current task.
In the task scenario each past task has a softmax of its own, and their losses are added. With
`distillation="distance"` the second term is lwf_lambda * mean_n ||f(x_n) - f_old(x_n)||^2, for any objective.

`distillation="sigmoid"` is LwF.MC (Rebuffi et al. 2017, https://arxiv.org/abs/1611.07725): iCaRL's loss
without exemplars, the mean binary cross-entropy over the classes seen. The targets are sigmoid(f_old(x)) for
past classes and labels for those of the task.

The paper records f_old(x) once, before the task. The numbers are the same as those of the previous network,
which is kept instead. Augmentation makes a difference: `old_outputs="recorded"` takes the samples as they
are, `"recomputed"` the augmented ones. The paper's warm-up, which first trains new outputs, is left out.

Mirror: sequel_lightning/algorithms/lwf.py
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState

from sequel_core.algorithms.lwf import LwFHParams
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.task import Batch
from sequel_flax.algorithms.icarl import sigmoid_loss, targets
from sequel_flax.bundle import (
    Algorithm,
    Model,
    Params,
    State,
    Stats,
    StepOutputs,
    blank_output,
    frozen_network,
    loss_of_outputs,
    make_algorithm,
    mask_logits,
    masked,
    network,
    objective_of,
    seen_classes,
    task_classes,
    train_step,
    training_forward,
)
from sequel_flax.foreign import takes_task
from sequel_flax.objectives import Objective, check_classification, output_leaf
from sequel_flax.trainable import Selection


class LwFState(NamedTuple):
    """What LwF remembers of past tasks."""

    old: Params  # theta_old, weights at the end of the last task
    statistics: Params  # running statistics of batch normalisation then; empty without batch normalisation
    learned: jax.Array  # 1 after the end of the first task, 0 before, shape ()


def softmax_distillation(
    logits: jax.Array, old: jax.Array, heads: jax.Array, temperature: float
) -> jax.Array:
    """Return the sum over heads of -mean_n sum_c q_nc log p_nc, shape ().

    `logits` and `old` are `[B, num_classes]`, `heads` the classes of each softmax, bool `[K, num_classes]`. A
    head without classes counts 0. The gradient is exactly 0 for equal logits.
    """
    classes = heads[:, None]
    log_p, log_q = (
        jax.nn.log_softmax(mask_logits(z[None] / temperature, classes), -1) for z in (logits, old)
    )
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    terms = p - q - q * log_p  # p - q has the sum 0; with it, the gradient of each term is 0 for p = q
    return jnp.where(classes, terms, 0).sum() / len(logits)


def output_distance(outputs: jax.Array, old: jax.Array) -> jax.Array:
    """Return mean_n ||f(x_n) - f_old(x_n)||^2 of outputs `[B, ...]`, shape ()."""
    squares = (outputs - old) ** 2
    return squares.reshape(len(squares), -1).sum(1).mean()


def past_heads(classes: jax.Array, task: jax.Array, separate: bool) -> jax.Array:
    """Return the classes that have a softmax together, bool `[K, num_classes]`.

    These are the classes of each past task if `separate`, else the classes of all past tasks together.
    `classes` are those of each task, bool `[T, num_classes]`, `task` is the index of the current task.
    """
    past = classes & (jnp.arange(len(classes))[:, None] < task)
    return past if separate else past.any(0, keepdims=True)


def old_outputs(ts: TrainState, state: State, x: Any, t: jax.Array) -> Any:
    """Return the outputs of the old network, in evaluation mode."""
    old = state.memory
    return network(ts, old.old, state, x, t, stats=old.statistics)


def training_loss(
    params: Params, model: Model, batch: Batch, x_old: Any, hparams: LwFHParams
) -> tuple[jax.Array, tuple[Any, Stats]]:
    """Return the training loss of a batch, shape (), and what the network returned for it.

    `x_old` are the inputs of the old network.
    """
    ts, state = model.ts, model.state
    outputs, stats = training_forward(ts, params, state, batch.x, batch.t)
    distillation = hparams.resolved(model.objective.classification)
    if distillation == "sigmoid":
        seen, logits = seen_classes(state.stream), output_leaf(outputs)
        past = seen & ~task_classes(state.stream)
        old = output_leaf(old_outputs(ts, state, x_old, batch.t))
        loss = sigmoid_loss(logits, targets(old, batch.y, past), seen)
        return loss, (masked(state.stream, outputs, batch.t), stats)
    loss, shown = loss_of_outputs(model, batch, outputs)
    old = output_leaf(old_outputs(ts, state, x_old, batch.t), hparams.output)
    new = output_leaf(outputs, hparams.output)
    if distillation == "softmax":
        heads = past_heads(state.stream.classes, state.stream.task, state.stream.mask is not None)
        penalty = softmax_distillation(new, old, heads, hparams.temperature)
    else:
        penalty = output_distance(new, old)
    loss = loss + state.memory.learned * hparams.lwf_lambda * penalty
    return loss, (shown, stats)


def lwf(
    hparams: LwFHParams, seed: int = 0, trainable: Selection = None, objective: Objective | None = None
) -> Algorithm:
    """Return learning without forgetting as pure functions.

    Args:
        hparams: settings; see `help(LwFHParams)`.
        seed: of dropout, >= 0.
        trainable: which parameters are trained; None for all. See `make_algorithm`.
        objective: what the network is trained and scored on; None for the one that fits the targets.

    Raises:
        ValueError: at once or in `init`, for softmax or sigmoid outputs without class labels; in `init`, if
            the network takes the task, or does not return the array `output`.

    Example:
        >>> import optax
        >>> from flax.training.train_state import TrainState
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import Batch, LwFHParams
        >>> from sequel_flax import MLP, initial_params, lwf
        >>> digits = RotatedDigits(num_tasks=2, subset=40)
        >>> net = MLP(widths=(16,), num_classes=10)
        >>> params = initial_params(net, digits.spec, seed=0)
        >>> ts = TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.1))
        >>> algorithm = lwf(LwFHParams(lwf_lambda=0.5))
        >>> state = algorithm.init(ts, digits.spec)
        >>> for task in digits.tasks:
        ...     batch = Batch(*task.train.take(range(40)))
        ...     ts, state = algorithm.start_task(ts, state, task)
        ...     ts, state, outputs = algorithm.train_step(ts, state, batch)
        ...     ts, state = algorithm.end_task(ts, state, [batch])
        >>> algorithm.predict(ts, state, batch.x, batch.t).shape
        (40, 10)
    """

    def check(objective: Objective) -> None:
        if hparams.resolved(objective.classification) != "distance":
            check_classification(objective, f"distillation={hparams.distillation} of lwf")

    def init_memory(ts: TrainState, spec: StreamSpec) -> LwFState:
        if hparams.knows_task(spec) and takes_task(getattr(ts, "whole", ts).apply_fn, spec.x):
            raise ValueError(
                "lwf has one pass for the outputs of all tasks, so it cannot train a network that takes "
                "the task, got one with __call__(x, t); use a network without t, or another method, such as "
                "ewc"
            )
        blank_output(ts, spec, hparams)
        return LwFState(*frozen_network(ts), jnp.zeros((), jax.tree.leaves(ts.params)[0].dtype))

    def step(ts: TrainState, state: State, batch: Batch) -> tuple[TrainState, State, StepOutputs]:
        original = batch.x

        def loss(ts: TrainState, params: Params, state: State, batch: Batch) -> tuple[jax.Array, Any]:
            model = Model(ts, state, objective_of(objective, state.stream))
            x_old = original if hparams.old_outputs == "recorded" else batch.x
            return training_loss(params, model, batch, x_old, hparams)

        return train_step(ts, state, batch, loss)

    def end(ts: TrainState, state: State, plan: Any) -> tuple[TrainState, State]:
        return ts, state._replace(memory=LwFState(*frozen_network(ts), jnp.ones_like(state.memory.learned)))

    return make_algorithm(
        hparams,
        seed,
        step,
        trainable=trainable,
        objective=objective,
        check=check,
        init_memory=init_memory,
        fills={"old": jnp.copy},
        apply_end=end,
    )
