"""An algorithm as a bundle of pure functions over Flax's TrainState, after optax's GradientTransformation.

    ts, state = algorithm.start_task(ts, algorithm.init(ts, spec), task)
    for batch in ...:
        ts, state, outputs = train_step(ts, state, batch)  # train_step = jax.jit(algorithm.train_step)
    ts, state = algorithm.end_task(ts, state, batches)

State is always an argument, never a closure: a compiled step that closes over the anchor of task 1 keeps it
for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

from sequel_core.hparams import AlgorithmHParams
from sequel_core.memory import NoPlanner, Planner
from sequel_core.task import AnySplit, Batch, StreamSpec, Task

Params = Any
Outputs = dict[str, jax.Array]


class StreamState(NamedTuple):
    """What every algorithm keeps of the stream."""

    task: jax.Array  # index of the current task, int32 (), -1 before the first
    mask: jax.Array | None  # bool [T, num_classes]; None where logits are not masked
    scale: jax.Array  # of uint8 images, [1, 1, 1, C], in the dtype of the weights
    shift: jax.Array  # of uint8 images, [1, 1, 1, C]
    dropout_key: jax.Array  # folded with ts.step at every step
    learning_rate: jax.Array  # of the first task; nan where the optimizer does not tell


class State(NamedTuple):
    """The state of an algorithm: the stream's part and its own; its shapes never change."""

    stream: StreamState
    memory: Any  # the algorithm's own, for example QuadraticState; () where there is none


class Algorithm(NamedTuple):
    """A continual-learning algorithm as pure functions."""

    init: Callable[[TrainState, StreamSpec], State]
    start_task: Callable[[TrainState, State, Task], tuple[TrainState, State]]
    train_step: Callable[[TrainState, State, Batch], tuple[TrainState, State, Outputs]]  # jit- and scan-able
    end_task: Callable[[TrainState, State, Iterable[Batch]], tuple[TrainState, State]]
    predict: Callable[[TrainState, State, jax.Array, jax.Array], jax.Array]  # x, t -> logits [B, num_classes]
    hparams: AlgorithmHParams
    planner: Callable[[StreamSpec], Planner] = lambda spec: NoPlanner()  # fills `Batch.plan`, on the host
    prepare: Callable[[TrainState, StreamSpec], TrainState] = lambda ts, spec: ts  # adds own parameters
    training_split: Callable[[State, AnySplit], AnySplit] = lambda state, split: split  # to train on
    alternatives: Callable[[TrainState, State, jax.Array, jax.Array], Outputs] = lambda *_: {}  # as `predict`


def init_stream(ts: TrainState, spec: StreamSpec, hparams: AlgorithmHParams, seed: int = 0) -> StreamState:
    """Return the stream's state before the first task.

    Args:
        ts: with the initial weights and a fresh optimizer state.
        spec: of the benchmark.
        hparams: of the algorithm.
        seed: of dropout.

    Raises:
        ValueError: `lr_decay` is not 1 and the optimizer's learning rate cannot be set.
    """
    learning_rate = get_learning_rate(ts.opt_state)
    if learning_rate is None and hparams.lr_decay != 1.0:
        raise ValueError(
            f"lr_decay={hparams.lr_decay} needs an optimizer whose learning rate can be set; build it with "
            "optax.inject_hyperparams(optax.sgd)(learning_rate=0.1) and no schedule, or use lr_decay=1"
        )
    dtype = jax.tree.leaves(ts.params)[0].dtype
    return StreamState(
        task=jnp.asarray(-1, jnp.int32),
        mask=jnp.asarray(spec.mask) if spec.masks_logits else None,
        scale=jnp.asarray(spec.normalisation.scale, dtype).reshape(1, 1, 1, -1),
        shift=jnp.asarray(spec.normalisation.shift, dtype).reshape(1, 1, 1, -1),
        dropout_key=jax.random.PRNGKey(seed),
        learning_rate=jnp.asarray(jnp.nan, dtype) if learning_rate is None else jnp.array(learning_rate),
    )


def start_task(
    ts: TrainState, state: State, task: Task, hparams: AlgorithmHParams
) -> tuple[TrainState, State]:
    """Begin a task: a fresh optimizer where `reset_optimizer` says so, and the decayed learning rate."""
    first = int(state.stream.task) < 0
    opt_state = ts.tx.init(ts.params) if hparams.reset_optimizer and not first else ts.opt_state
    if hparams.lr_decay != 1.0:
        base = state.stream.learning_rate
        factor = hparams.learning_rate_factor(task.index, float(base))
        opt_state = optax.tree_utils.tree_set(opt_state, learning_rate=jnp.asarray(base * factor, base.dtype))
    stream = state.stream._replace(task=jnp.asarray(task.index, jnp.int32))
    return ts.replace(opt_state=opt_state), state._replace(stream=stream)


def forward(
    ts: TrainState, params: Params, state: State, x: jax.Array, t: jax.Array, *, train: bool
) -> jax.Array:
    """Return the logits `[B, num_classes]`, masked to the task of each sample where the scenario says so.

    Args:
        ts: for the model and the step, which dropout depends on.
        params: weights, apart from `ts` so that they can be differentiated.
        state: of the algorithm.
        x: images `[B, H, W, C]`; uint8 is normalised, anything else is taken as it is.
        t: task index of each sample `[B]`.
        train: whether dropout is active.
    """
    return masked(state.stream, network(ts, params, state, x, train=train), t)


def network(
    ts: TrainState,
    params: Params,
    state: State,
    x: jax.Array,
    *,
    train: bool,
    draw: int | jax.Array = 0,
    method: str | None = None,
) -> jax.Array:
    """Return what the network says of images, unmasked; see `forward`.

    Args:
        ts: for the model and the step, which dropout depends on.
        params: weights.
        state: of the algorithm.
        x: images `[B, H, W, C]`.
        train: whether dropout is active.
        draw: number of the pass within the step; each drops its own units.
        method: of the module; None for logits `[B, num_classes]`, `features` for the last hidden layer.
    """
    key = jax.random.fold_in(state.stream.dropout_key, ts.step)
    first = isinstance(draw, int) and draw == 0
    rngs = {"dropout": key if first else jax.random.fold_in(key, draw)} if train else None
    out: jax.Array = ts.apply_fn(
        {"params": params}, normalise(state.stream, x), train=train, rngs=rngs, method=method
    )
    return out


def masked(stream: StreamState, logits: jax.Array, t: jax.Array) -> jax.Array:
    """Return the logits `[B, num_classes]`, masked to the tasks `[B]` where the scenario says so."""
    return logits if stream.mask is None else mask_logits(logits, stream.mask[t])


def normalise(stream: StreamState, x: jax.Array) -> jax.Array:
    """Return images in the dtype of the weights; uint8 as `(x / 255 - mean) / std`."""
    if x.dtype == jnp.uint8:
        return x.astype(stream.scale.dtype) * stream.scale + stream.shift
    return x.astype(stream.scale.dtype)


def mask_logits(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the logits `[B, num_classes]` with the least number of their dtype where the mask is False."""
    return jnp.where(mask, logits, jnp.finfo(logits.dtype).min)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the mean cross-entropy of logits `[B, num_classes]` and labels `[B]`, shape ()."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def train_step(
    ts: TrainState, state: State, batch: Batch, penalty: Callable[[Params, Any], jax.Array] | None = None
) -> tuple[TrainState, State, Outputs]:
    """Take one optimizer step on the mean cross-entropy, plus `penalty(params, state.memory)` if given."""

    def loss_fn(params: Params) -> tuple[jax.Array, jax.Array]:
        logits = forward(ts, params, state, batch.x, batch.t, train=True)
        loss = cross_entropy(logits, batch.y)
        return (loss if penalty is None else loss + penalty(params, state.memory)), logits

    (loss, logits), gradient = jax.value_and_grad(loss_fn, has_aux=True)(ts.params)
    return ts.apply_gradients(grads=gradient), state, {"loss": loss, "logits": logits, "labels": batch.y}


def predict(ts: TrainState, state: State, x: jax.Array, t: jax.Array) -> jax.Array:
    """Return the network's logits `[B, num_classes]` in evaluation mode."""
    return forward(ts, ts.params, state, x, t, train=False)


def end_task(ts: TrainState, state: State, batches: Iterable[Batch]) -> tuple[TrainState, State]:
    """Do nothing: the end of a task for algorithms that keep nothing of it."""
    return ts, state


def feature_width(ts: TrainState, spec: StreamSpec, name: str) -> int:
    """Return the units of the last hidden layer, which a method of that name asks the network for.

    Raises:
        ValueError: the network has no method `features(x, train)`, or no last layer called `head`.
    """
    image = jnp.zeros((1, *spec.image_shape), jax.tree.leaves(ts.params)[0].dtype)
    call = partial(ts.apply_fn, {"params": ts.params})
    try:
        features = jax.eval_shape(partial(call, train=False, method="features"), image)
        if "head" in ts.params:
            jax.eval_shape(partial(call, method=apply_head), features)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"{name} needs a network with a method features(x, train), the last hidden layer, which setup's "
            f"head turns into logits; got one without: {error}"
        ) from error
    if "head" not in ts.params:
        raise ValueError(f"{name} needs a last layer called head, got the layers {', '.join(ts.params)}")
    return int(features.shape[-1])


def apply_head(module: nn.Module, features: jax.Array) -> jax.Array:
    """Return the logits `[B, num_classes]` that a network's last layer makes of features `[B, D]`."""
    logits: jax.Array = module.head(features)
    return logits


def get_learning_rate(opt_state: optax.OptState) -> jax.Array | None:
    """Return the rate that `optax.inject_hyperparams` keeps; None without it, or with a schedule."""
    found = optax.tree_utils.tree_get_all_with_path(opt_state, "learning_rate")
    return found[0][1] if len(found) == 1 and isinstance(found[0][1], jax.Array) else None
