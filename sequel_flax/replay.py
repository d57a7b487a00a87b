"""Replay of samples from a memory: the shared part of A-GEM, ER, DER and DER++.

    L = loss(batch, draws), with draws from the memory before the step; then the batch is written to it

The plan of a batch says to which slots it is written and which slots the step reads (`Batch.plan`, from
`sequel_core.stream.memory`). A new replay method defines only its loss.

Mirror: sequel_lightning/replay.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

from sequel_core.hparams import MemoryHParams
from sequel_core.stream.augmentation import method_plan
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.memory import MemoryPlanner, StepPlan
from sequel_core.stream.planner import Planner
from sequel_core.stream.task import Batch, Samples
from sequel_flax.augmentation import cropped, cropped_draw
from sequel_flax.bundle import (
    Algorithm,
    Params,
    State,
    Stats,
    StepOutputs,
    advance,
    batch_stats,
    check_augmented,
    check_logits,
    make_algorithm,
    masked,
    training_forward,
)
from sequel_flax.trainable import Selection


class Memory(NamedTuple):
    """Copies of samples; M slots."""

    x: jax.Array  # images [M, H, W, C], in the dtype that they come in
    y: jax.Array  # labels, int32 [M]
    t: jax.Array  # task indices, int32 [M]; -1 for an empty slot
    logits: jax.Array | None  # [M, num_classes], as the network gave them when it was trained on the sample


class ReplayBatch(NamedTuple):
    """Samples of a step: its batch, or a draw from the memory."""

    x: jax.Array  # images [N, H, W, C]
    y: jax.Array  # labels [N]
    t: jax.Array  # task indices [N]
    stored: Any  # logits that the memory holds [N, num_classes]; None where it holds none
    count: Any  # number of samples that count; the samples after them are padding


class Outputs(NamedTuple):
    """The outputs of the network for samples."""

    logits: jax.Array  # of all classes [N, num_classes]
    masked: jax.Array  # the same, masked to the task of each sample in the task scenario
    y: jax.Array  # labels [N]
    stored: Any  # logits that the memory holds [N, num_classes]; None where it holds none
    count: Any  # number of samples that count, the first ones


Loss = Callable[[Outputs, Sequence[Outputs]], jax.Array]


def empty_memory(spec: StreamSpec, slots: int, dtype: jnp.dtype | None) -> Memory:
    """Return a memory of empty slots; `dtype` is that of the logits, None for a memory without logits."""
    slots = max(slots, 1)  # no array of a state is empty: orbax does not store such arrays
    return Memory(
        x=jnp.zeros((slots, *spec.image_shape), spec.x.dtype),
        y=jnp.zeros(slots, jnp.int32),
        t=jnp.full(slots, -1, jnp.int32),
        logits=None if dtype is None else jnp.zeros((slots, spec.num_classes), dtype),
    )


def read(memory: Memory, slots: jax.Array) -> ReplayBatch:
    """Return the samples in these slots `[N]`; a slot beyond the last one is padding and does not count."""
    x, y, t, stored = jax.tree.map(lambda a: a.at[slots].get(mode="clip"), memory)
    return ReplayBatch(x, y, jnp.maximum(t, 0), stored, jnp.sum(slots < len(memory.y)))


def write(memory: Memory, slots: jax.Array, batch: Batch, logits: jax.Array) -> Memory:
    """Return the memory with the batch in these slots `[B]`, without samples for slots beyond the last."""
    new = Memory(batch.x, batch.y, batch.t, None if memory.logits is None else logits)
    stored: Memory = jax.tree.map(lambda a, b: a.at[slots].set(b.astype(a.dtype), mode="drop"), memory, new)
    return stored


def stored_samples(memory: Memory) -> Samples:
    """Return copies of the samples that the memory holds, in the order of slots, images `[n, H, W, C]`."""
    x, y, t = (np.asarray(a) for a in jax.device_get(memory[:3]))
    filled_slots = t >= 0
    return Samples(x[filled_slots], y[filled_slots].astype(np.int64), t[filled_slots].astype(np.int64))


def mean_cross_entropy(*outputs: Outputs) -> jax.Array:
    """Return the mean cross-entropy of all samples that count, 0 without any, shape ()."""
    losses = [optax.softmax_cross_entropy_with_integer_labels(s.masked, s.y) for s in outputs]
    total = sum_of_first(losses[0], outputs[0].count)
    for values, s in zip(losses[1:], outputs[1:], strict=True):
        total = total + sum_of_first(values, s.count)
    return total / jnp.maximum(sum(s.count for s in outputs), 1)


def sum_of_first(values: jax.Array, count: Any) -> jax.Array:
    """Return the sum of the first `count` of the values `[N]`, shape ()."""
    return jnp.sum(jnp.where(jnp.arange(len(values)) < count, values, 0))


def forward(
    ts: TrainState, params: Params, state: State, samples: Sequence[ReplayBatch], together: bool
) -> tuple[list[Outputs], Stats]:
    """Return the outputs of the network for samples in training mode, which updates running statistics.

    With `together`, all samples go through the network in one pass; otherwise the first batch has a pass, and
    the others together have another.
    """
    logits: list[jax.Array] = []
    stats = batch_stats(ts)
    for k, part in enumerate([samples] if together else [samples[:1], samples[1:]]):
        sizes = [len(s.y) for s in part]
        if sum(sizes):  # there is no pass for an empty draw
            images = jnp.concatenate([s.x for s in part])
            full = all(isinstance(s.count, int) for s in part)  # a batch, not a draw
            counts = None if full else jnp.concatenate([jnp.arange(len(s.y)) < s.count for s in part])
            out, stats = training_forward(ts, params, state, images, stats=stats, draw=k, counts=counts)
            check_logits(out, (sum(sizes),), state.stream.mask)
            logits += jnp.split(out, np.cumsum(sizes)[:-1])
        else:
            logits += [logits[0][:0] for _ in part]
    outputs = [
        Outputs(out, masked(state.stream, out, s.t), s.y, s.stored, s.count)
        for out, s in zip(logits, samples, strict=True)
    ]
    return outputs, stats


def planned(memory: Memory, batch: Batch, plan_type: type[Any] = StepPlan) -> Any:
    """Return the plan of a batch.

    Raises:
        ValueError: the batch has no plan, or its images have another dtype than the memory.
    """
    plan = method_plan(batch)
    if not isinstance(plan, plan_type):
        raise ValueError(
            "the batch has no plan, which says what to write to the memory and what to read; make one "
            "planner with algorithm.planner(spec, state) and give Batch(x, y, t, planner.next(y, t))"
        )
    if batch.x.dtype != memory.x.dtype:
        raise ValueError(
            f"the memory holds {memory.x.dtype} images, the batch has {batch.x.dtype}; "
            f"give a spec with LeafSpec(..., '{batch.x.dtype}')"
        )
    return plan


def draws(memory: Memory, batch: Batch) -> list[ReplayBatch]:
    """Return the batch, then each draw of its plan from the memory, augmented; see `planned`."""
    reads = planned(memory, batch).reads
    current = ReplayBatch(cropped(batch).x, batch.y, batch.t, None, len(batch.y))
    return [current, *(drawn(memory, batch, reads[k], k) for k in range(len(reads)))]


def drawn(memory: Memory, batch: Batch, slots: jax.Array, k: Any) -> ReplayBatch:
    """Return draw k of a batch's plan, the samples in these slots `[R]`, augmented."""
    samples = read(memory, slots)
    return samples._replace(x=cropped_draw(samples.x, batch, k))


def replay(
    hparams: MemoryHParams,
    seed: int,
    loss: Loss,
    num_draws: int = 1,
    past_only: bool = False,
    together: bool = False,
    keep_logits: bool = False,
    trainable: Selection = None,
    **parts: Any,
) -> Algorithm:
    """Return the algorithm that trains on `loss(batch, draws)`.

    Args:
        hparams: settings of the method and of its memory.
        seed: of dropout and of the memory, >= 0.
        loss: of the outputs for the batch and for each draw, shape ().
        num_draws: independent draws of a step, >= 0.
        past_only: whether draws are from past tasks only.
        together: whether the batch and the draws have one pass; see `forward`.
        keep_logits: whether the memory holds the logits of its samples.
        trainable: which parameters are trained; see `make_algorithm`.
        parts: arguments of `make_algorithm` that replace those of this function.
    """

    def init_memory(ts: TrainState, spec: StreamSpec) -> Memory:
        dtype = jax.tree.leaves(ts.params)[0].dtype if keep_logits else None
        return empty_memory(spec, hparams.slots(spec.num_tasks), dtype)

    def train_step(ts: TrainState, state: State, batch: Batch) -> tuple[TrainState, State, StepOutputs]:
        check_augmented(state, batch)
        samples = draws(state.memory, batch)

        def loss_fn(params: Params) -> tuple[jax.Array, tuple[Outputs, Stats]]:
            (current, *others), stats = forward(ts, params, state, samples, together)
            return loss(current, others), (current, stats)

        (value, (current, stats)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(ts.params)
        memory = write(state.memory, method_plan(batch).write, batch, current.logits)
        outputs = {"loss": value, "logits": current.masked, "labels": batch.y}
        return advance(ts, gradient, stats), state._replace(memory=memory), outputs

    def make_planner(spec: StreamSpec) -> Planner:
        return MemoryPlanner(hparams, spec, seed, num_draws, past_only)

    usual: dict[str, Any] = {"init_memory": init_memory, "make_planner": make_planner}
    step = parts.pop("train_step", train_step)
    return make_algorithm(hparams, seed, step, trainable=trainable, **{**usual, **parts})
