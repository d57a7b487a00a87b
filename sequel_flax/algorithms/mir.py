"""Maximally interfered retrieval (Aljundi et al. 2019, https://arxiv.org/abs/1908.04742).

    L = mean loss over B_n and B_M together, B_n the batch                                       (algorithm 1)
    B_M = the mem_batch_size candidates with the largest s(x) = l(x; theta_v) - l(x; theta)
    theta_v = theta - lr * gradient of the mean loss of B_n

The candidates are a draw from the memory. Their losses and the virtual step to theta_v are computed in
evaluation mode, and lr is the learning rate of the optimizer, or virtual_lr. Of candidates with equal s(x),
the first in the memory are replayed. They keep the order of the draw, so MIR is ER if all are replayed.

The official code adds the two mean losses (`loss="sum"`), scores in training mode, and does not replay
samples of the current task.

Mirror: sequel_lightning/algorithms/mir.py
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState

from sequel_core.algorithms.mir import MIRHParams
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.task import Batch
from sequel_core.stream.trees import tree_map
from sequel_flax.bundle import Algorithm, Model, Params, for_objective, network
from sequel_flax.objectives import Objective, losses_of
from sequel_flax.objectives import mean_loss as mean_of_batch
from sequel_flax.optimizers import get_learning_rates
from sequel_flax.replay import Memory, Outputs, ReplayBatch, empty_memory, mean_loss, replay
from sequel_flax.trainable import Selection


def replay_loss(batch: Outputs, draws: Sequence[Outputs], hparams: MIRHParams) -> jax.Array:
    """Return the mean loss of the batch and the replayed samples together, or the sum of both, shape ()."""
    return mean_loss(batch, *draws) if hparams.loss == "mean" else mean_loss(batch) + mean_loss(*draws)


def interference(
    params: Params, model: Model, batch: ReplayBatch, candidates: ReplayBatch, rate: Any
) -> jax.Array:
    """Return how much a step on the batch raises the loss of each candidate, `[C]`."""
    samples, past = Batch(*batch[:3]), Batch(*candidates[:3])

    def called(params: Params, samples: Batch) -> Any:
        def call(x: Any) -> Any:
            return network(model.ts, params, model.state, x, samples.t)

        return for_objective(model, samples, call(samples.x), call)

    gradient = jax.grad(lambda p: mean_of_batch(model.objective, called(p, samples), samples))(params)
    virtual = jax.tree.map(lambda p, g: p - rate * g, params, gradient)
    before = losses_of(model.objective, called(params, past), past)
    after = losses_of(model.objective, called(virtual, past), past)
    return after - before


def most_interfered(candidates: ReplayBatch, scores: jax.Array, count: int) -> ReplayBatch:
    """Return the candidates with the largest scores `[C]`, in their order; of equal ones, the first."""
    counts = jnp.arange(len(scores)) < candidates.count
    best = jnp.argsort(jnp.where(counts, -scores, jnp.inf), stable=True)[:count]
    kept = jnp.sort(best)
    x, y, t = (tree_map(itemgetter(kept), tree) for tree in candidates[:3])
    return ReplayBatch(x, y, t, None, jnp.minimum(candidates.count, count))


def mir(
    hparams: MIRHParams, seed: int = 0, trainable: Selection = None, objective: Objective | None = None
) -> Algorithm:
    """Return maximally interfered retrieval as pure functions.

    The calls are those of `help(er)`.

    Args:
        hparams: settings; see `help(MIRHParams)`.
        seed: of dropout and of the memory, >= 0.
        trainable: which parameters are trained; None for all. See `make_algorithm`.
        objective: what the network is trained and scored on; None for the one that fits the targets.

    Raises:
        ValueError: in `init`, without virtual_lr, if the learning rate of the optimizer cannot be read; in
            `init` and `train_step`, for the reasons given in `help(er)`.

    Example:
        >>> import jax, optax
        >>> from flax.training.train_state import TrainState
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import Batch, MIRHParams
        >>> from sequel_flax import MLP, initial_params, mir
        >>> digits, net = RotatedDigits(num_tasks=2, subset=40), MLP(widths=(16,), num_classes=10)
        >>> params = initial_params(net, digits.spec, seed=0)
        >>> ts = TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.1))
        >>> algorithm = mir(MIRHParams(mem_size=50, num_candidates=20, virtual_lr=0.1))
        >>> state = algorithm.init(ts, digits.spec)
        >>> planner, (x, y, t) = algorithm.planner(digits.spec, state), digits.tasks[0].train.take(range(40))
        >>> ts, state = algorithm.start_task(ts, state, digits.tasks[0])
        >>> for _ in range(2):
        ...     batch = Batch(x, y, t, planner.next(y, t))
        ...     ts, state, outputs = jax.jit(algorithm.train_step)(ts, state, batch)
        >>> batch.plan.reads.shape
        (1, 20)
    """

    def init_memory(ts: TrainState, spec: StreamSpec) -> Memory:
        if hparams.virtual_lr is None and not get_learning_rates(ts.opt_state):
            raise ValueError(
                "virtual_lr=None needs an optimizer whose learning rate can be read; build it with "
                "optax.inject_hyperparams(optax.sgd)(learning_rate=0.1), or set virtual_lr"
            )
        return empty_memory(spec, hparams.slots(spec.num_tasks), None, hparams)

    def chosen(params: Params, model: Model, samples: list[ReplayBatch]) -> list[ReplayBatch]:
        batch, candidates = samples
        if not len(candidates.t):
            return samples
        given = hparams.virtual_lr
        rate = get_learning_rates(model.ts.opt_state)[0] if given is None else given
        scores = interference(params, model, batch, candidates, rate)
        return [batch, most_interfered(candidates, scores, hparams.mem_batch_size)]

    return replay(
        hparams,
        seed,
        partial(replay_loss, hparams=hparams),
        together=hparams.loss == "mean",
        choose=chosen,
        trainable=trainable,
        objective=objective,
        init_memory=init_memory,
    )
