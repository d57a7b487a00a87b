"""Naive finetuning: trains on one task after the other without any protection. The usual lower bound.

    L = loss(f(x), y)

Mirror: sequel_lightning/algorithms/naive.py
"""

from __future__ import annotations

from functools import partial

from sequel_core.hparams import AlgorithmHParams
from sequel_flax.bundle import Algorithm, make_algorithm, train_step, training_loss
from sequel_flax.objectives import Objective
from sequel_flax.trainable import Selection


def naive(
    hparams: AlgorithmHParams, seed: int = 0, trainable: Selection = None, objective: Objective | None = None
) -> Algorithm:
    """Return naive finetuning as pure functions.

    The order of the calls is that of `help(ewc)`.

    Args:
        hparams: settings; see `help(NaiveHParams)`.
        seed: of dropout, >= 0.
        trainable: which parameters are trained; None for all. See `make_algorithm`.
        objective: what the network is trained and scored on; None for the one that fits the targets.

    Raises:
        ValueError: in `init`, if `lr_decay` is not 1 and the learning rate of the optimizer cannot be set.

    Example:
        >>> import optax
        >>> from flax.training.train_state import TrainState
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import Batch, NaiveHParams
        >>> from sequel_flax import MLP, initial_params, naive
        >>> digits, net = RotatedDigits(num_tasks=2, subset=40), MLP(widths=(16,), num_classes=10)
        >>> params = initial_params(net, digits.spec, seed=0)
        >>> ts = TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.1))
        >>> algorithm = naive(NaiveHParams())
        >>> ts, state = algorithm.start_task(ts, algorithm.init(ts, digits.spec), digits.tasks[0])
        >>> batch = Batch(*digits.tasks[0].train.take(range(40)))
        >>> ts, state, outputs = algorithm.train_step(ts, state, batch)
        >>> sorted(outputs)
        ['labels', 'logits', 'loss']
    """
    return make_algorithm(
        hparams,
        seed,
        partial(train_step, training_loss=partial(training_loss, objective=objective)),
        trainable=trainable,
        objective=objective,
    )
