"""Experience replay (Chaudhry et al. 2019, https://arxiv.org/abs/1902.10486).

    L = mean loss over B_n and B_M together, B_n the batch and B_M a draw from the memory        (algorithm 1)

The network sees the batch and the draw in one pass, from the first task on. The batch is then written to the
memory. A reservoir holds each sample of the stream with probability M/n exactly. A ring holds the latest
samples of each class, or of each class of each task if tasks share classes. The published accuracies have
batches and draws of 10; RotatedMNIST (69.2, MC-SGD paper) has one sample per class and task, `mem_size=200`.

Mirror: sequel_lightning/algorithms/er.py
"""

from __future__ import annotations

from collections.abc import Sequence

import jax

from sequel_core.algorithms.er import ERHParams
from sequel_flax.bundle import Algorithm
from sequel_flax.objectives import Objective
from sequel_flax.replay import Outputs, mean_loss, replay
from sequel_flax.trainable import Selection


def replay_loss(batch: Outputs, draws: Sequence[Outputs]) -> jax.Array:
    """Return the mean loss of the batch and the draw together, shape ()."""
    return mean_loss(batch, *draws)


def er(
    hparams: ERHParams, seed: int = 0, trainable: Selection = None, objective: Objective | None = None
) -> Algorithm:
    """Return experience replay as pure functions.

    Each batch needs a plan, which says what to write to the memory and what to read:
    `Batch(x, y, t, planner.next(y, t))`.

    Args:
        hparams: settings; see `help(ERHParams)`.
        seed: of dropout and of the memory, >= 0.
        trainable: which parameters are trained; None for all. See `make_algorithm`.
        objective: what the network is trained and scored on; None for the one that fits the targets.

    Raises:
        ValueError: in `init`, if the memory does not fit the stream; in `train_step`, if a batch has no plan.

    Example:
        >>> import optax
        >>> from flax.training.train_state import TrainState
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import Batch, ERHParams
        >>> from sequel_flax import MLP, er, initial_params
        >>> digits, net = RotatedDigits(num_tasks=2, subset=40), MLP(widths=(16,), num_classes=10)
        >>> params = initial_params(net, digits.spec, seed=0)
        >>> ts = TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.1))
        >>> algorithm = er(ERHParams(mem_size=50, mem_batch_size=10))
        >>> state = algorithm.init(ts, digits.spec)
        >>> planner = algorithm.planner(digits.spec, state)
        >>> for task in digits.tasks:
        ...     x, y, t = task.train.take(range(20))
        ...     ts, state = algorithm.start_task(ts, state, task)
        ...     ts, state, outputs = algorithm.train_step(ts, state, Batch(x, y, t, planner.next(y, t)))
        ...     ts, state = algorithm.end_task(ts, state, [Batch(x, y, t)])
        >>> int((state.memory.t >= 0).sum())  # samples in the memory
        40
    """
    return replay(hparams, seed, replay_loss, together=True, trainable=trainable, objective=objective)
