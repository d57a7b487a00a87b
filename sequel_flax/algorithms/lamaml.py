"""La-MAML, look-ahead meta-learning (Gupta, Yadav & Paull 2020, https://arxiv.org/abs/2007.13904).

Each batch is glanced at several times. A glance looks ahead on the batch alone, in K inner steps from theta,
and asks how good the weights on the way are for the batch and a draw from the memory together:

    theta'_k = theta'_{k-1} - relu(alpha) * grad CE(part k of the batch; theta'_{k-1})           (algorithm 2)
    M = 1/K sum_k CE(batch and draw; theta'_k)                                                         (eq. 2)
    alpha <- alpha - eta dM/dalpha; then theta <- theta - relu(alpha) * dM/dtheta                      (eq. 7)

alpha holds a rate of every weight, eta is `lr_alpha`. With `second_order=False` the inner gradients are
constants. `sync_update` moves theta by the optimizer instead, which has no part otherwise; with
`learn_lr=False` alpha stays (C-MAML). The batch is written to the memory in its first glance only.
RotatedMNIST (77.42, 20 tasks of 1,000 samples, MLP 100-100, memory 200, batch and draw of 10, 5 glances, eta
0.3, alpha 0.15 at first, an inner step per sample) is first-order, and its code means to clamp inner
gradients but does not (`inner_clip`).

Mirror: sequel_lightning/algorithms/lamaml.py
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

from sequel_core.algorithms.lamaml import LaMAMLHParams, MetaPlan, MetaPlanner
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.task import Batch
from sequel_flax.bundle import (
    Algorithm,
    Params,
    State,
    StepOutputs,
    check_no_batch_stats,
    make_algorithm,
    masked,
    trained_on,
    training_forward,
)
from sequel_flax.optimizers import clip_by_global_norm
from sequel_flax.replay import (
    Memory,
    Outputs,
    ReplayBatch,
    drawn,
    empty_memory,
    mean_cross_entropy,
    planned,
    write,
)
from sequel_flax.trainable import Selection


class LaMAMLState(NamedTuple):
    """What La-MAML keeps."""

    memory: Memory  # samples of the stream
    rates: Params  # alpha, in the structure of the parameters


def with_draw(batch: Batch, draw: ReplayBatch) -> ReplayBatch:
    """Return the batch and, after it, a draw from the memory."""
    x, y, t = (jnp.concatenate(pair) for pair in zip(batch[:3], draw[:3], strict=True))
    return ReplayBatch(x, y, t, None, len(batch.y) + draw.count)


def inner_sgd_step(params: Params, rates: Params, gradient: Params) -> Params:
    """Return theta - relu(alpha) * gradient."""
    return jax.tree.map(lambda p, a, g: p - jax.nn.relu(a) * g, params, rates, gradient)


def clip_by_value(gradient: Params, bound: float | None) -> Params:
    """Return the gradient with all values in [-bound, bound]."""
    return gradient if bound is None else jax.tree.map(lambda g: jnp.clip(g, -bound, bound), gradient)


def clip_by_norm(gradient: Params, norm: float | None) -> Params:
    """Return the gradient, scaled down to a norm where it is longer."""
    return gradient if norm is None else clip_by_global_norm(norm).update(gradient, optax.EmptyState())[0]


def lamaml(hparams: LaMAMLHParams, seed: int = 0, trainable: Selection = None) -> Algorithm:
    """Return La-MAML.

    Args:
        hparams: settings.
        seed: of dropout, of the memory and of the order within a glance.
        trainable: which parameters are trained; see `make_algorithm`.
    """
    first_rate = partial(jnp.full_like, fill_value=hparams.alpha_init)

    def init_memory(ts: TrainState, spec: StreamSpec) -> LaMAMLState:
        check_no_batch_stats(ts, "lamaml", "its inner steps see too few samples for batch statistics")
        memory = empty_memory(spec, hparams.slots(spec.num_tasks), None)
        return LaMAMLState(memory, jax.tree.map(first_rate, ts.params))

    def sample_loss(
        params: Params, ts: TrainState, state: State, samples: ReplayBatch, draw: Any
    ) -> jax.Array:
        """Return the mean cross-entropy of the samples that count, shape (); `draw` numbers the pass."""
        logits, _ = training_forward(ts, params, state, samples.x, draw=draw)
        own = masked(state.stream, logits, samples.t)
        return mean_cross_entropy(Outputs(logits, own, samples.y, None, samples.count))

    def meta_loss(
        params: Params,
        rates: Params,
        ts: TrainState,
        state: State,
        batch: Batch,
        draw: ReplayBatch,
        first: Any,
    ) -> jax.Array:
        """Return M, shape (); the passes are numbered from `first`."""
        meta = with_draw(batch, draw)

        def inner(carry: tuple[Params, jax.Array], part: Batch) -> tuple[tuple[Params, jax.Array], jax.Array]:
            fast, k = carry
            own = ReplayBatch(part.x, part.y, part.t, None, len(part.y))
            gradient = jax.grad(sample_loss)(fast, ts, state, own, k)
            if not hparams.second_order:
                gradient = jax.lax.stop_gradient(gradient)
            fast = inner_sgd_step(fast, rates, clip_by_value(gradient, hparams.inner_clip))
            return (fast, k + 2), sample_loss(fast, ts, state, meta, k + 1)

        count = hparams.check_parts(len(batch.y))
        parts = jax.tree.map(lambda a: a.reshape(count, -1, *a.shape[1:]), batch)
        losses = jax.lax.scan(inner, (params, first), parts, unroll=True)[1]  # a loop takes 1.5 times as long
        return jnp.mean(losses)

    def train_step(ts: TrainState, state: State, batch: Batch) -> tuple[TrainState, State, StepOutputs]:
        plan, seen = planned(state.memory.memory, batch, MetaPlan), trained_on(state, batch)
        logits, _ = training_forward(ts, ts.params, state, seen.x)

        def glance_step(carry: Any, glance: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
            (params, rates, opt_state, memory), (order, slots, k) = carry, glance
            ordered, draw = Batch(*(a[order] for a in seen[:3])), drawn(memory, batch, slots, k)
            first = 1 + 2 * len(batch.y) * k  # number of the pass
            loss, (slope, rates_slope) = jax.value_and_grad(meta_loss, argnums=(0, 1))(
                params, rates, ts, state, ordered, draw, first
            )
            if hparams.learn_lr:
                rates_slope = clip_by_norm(rates_slope, hparams.grad_clip_norm)
                rates = jax.tree.map(lambda a, g: a - hparams.lr_alpha * g, rates, rates_slope)
            slope = clip_by_norm(slope, hparams.grad_clip_norm)
            if hparams.sync_update:
                updates, opt_state = ts.tx.update(slope, opt_state, params)
                params = optax.apply_updates(params, updates)
            else:
                params = inner_sgd_step(params, rates, slope)
            memory = write(memory, plan.write, batch, logits)  # every glance writes the same
            return (params, rates, opt_state, memory), loss

        start = (ts.params, state.memory.rates, ts.opt_state, state.memory.memory)
        end, losses = jax.lax.scan(glance_step, start, (plan.order, plan.reads, jnp.arange(hparams.glances)))
        params, rates, opt_state, memory = end
        ts = ts.replace(step=ts.step + 1, params=params, opt_state=opt_state)
        outputs = {"loss": losses[0], "logits": masked(state.stream, logits, batch.t), "labels": batch.y}
        return ts, state._replace(memory=LaMAMLState(memory, rates)), outputs

    return make_algorithm(
        hparams,
        seed,
        train_step,
        trainable=trainable,
        init_memory=init_memory,
        fills={"rates": first_rate},
        make_planner=lambda spec: MetaPlanner(hparams, spec, seed),
    )
