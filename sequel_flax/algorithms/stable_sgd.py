"""Stable SGD (Mirzadeh et al. 2020, https://arxiv.org/abs/2006.06958).

    L = loss(f(x), y), task t (from 0) with the learning rate max(lr * gamma^(t + 1), min_lr)

Naive finetuning with a large first learning rate, which decays from task to task, dropout, momentum and a
small batch. The minima are flatter, so the weights move less in the next task. The exponent is that of the
official code, whose first task has lr * gamma already; `decay_first=False` starts with lr. The published
RotatedMNIST accuracy (70.8, 20 tasks) needs lr 0.1, gamma 0.55, momentum 0.8, dropout 0.25 and batch 64, as
corrected by the authors; Split CIFAR-100 (59.9) needs lr 0.15, gamma 0.85, dropout 0.1 and batch 10. The
official code resets the optimizer at every epoch, which makes no difference for one epoch per task.

Mirror: sequel_lightning/algorithms/stable_sgd.py
"""

from __future__ import annotations

from sequel_core.algorithms.stable_sgd import StableSGDHParams
from sequel_flax.algorithms.naive import naive
from sequel_flax.bundle import Algorithm
from sequel_flax.objectives import Objective
from sequel_flax.trainable import Selection


def stable_sgd(
    hparams: StableSGDHParams, seed: int = 0, trainable: Selection = None, objective: Objective | None = None
) -> Algorithm:
    """Return stable SGD as pure functions.

    The functions are those of `naive`; each `start_task` sets the learning rate.

    Args:
        hparams: settings; see `help(StableSGDHParams)`.
        seed: of dropout, >= 0.
        trainable: which parameters are trained; None for all. See `make_algorithm`.
        objective: what the network is trained and scored on; None for the one that fits the targets.

    Raises:
        ValueError: in `init`, if `lr_decay` is not 1 and the optimizer has no learning rate that can be set;
            make it with `optax.inject_hyperparams`.

    Example:
        >>> import optax
        >>> from flax.training.train_state import TrainState
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import StableSGDHParams
        >>> from sequel_flax import MLP, initial_params, stable_sgd
        >>> digits, net = RotatedDigits(num_tasks=2, subset=40), MLP(widths=(16,), num_classes=10)
        >>> tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
        >>> params = initial_params(net, digits.spec, seed=0)
        >>> ts = TrainState.create(apply_fn=net.apply, params=params, tx=tx)
        >>> algorithm = stable_sgd(StableSGDHParams(lr_decay=0.8))
        >>> state = algorithm.init(ts, digits.spec)
        >>> ts, state = algorithm.start_task(ts, state, digits.tasks[0])
        >>> round(float(ts.opt_state.hyperparams["learning_rate"]), 3)
        0.08
    """
    return naive(hparams, seed, trainable, objective)
