"""Stable SGD (Mirzadeh et al. 2020, https://arxiv.org/abs/2006.06958).

    L = CE(f(x), y), task t (from 0) with the learning rate max(lr * gamma^(t + 1), min_lr)

Naive finetuning with a large first learning rate that decays from task to task, dropout, momentum and a small
batch: flat minima, from which the next task moves less. The exponent is the official code's, whose first task
has lr * gamma already; `decay_first=False` starts with lr. The published RotatedMNIST number (70.8, 20 tasks)
needs lr 0.1, gamma 0.55, momentum 0.8, dropout 0.25 and batch 64, as the authors corrected them; Split
CIFAR-100 (59.9) lr 0.15, gamma 0.85, dropout 0.1 and batch 10. The official optimizer starts afresh with
every epoch: the same for one epoch per task.

Mirror: sequel_lightning/algorithms/stable_sgd.py
"""

from __future__ import annotations

from sequel_core.algorithms.stable_sgd import StableSGDHParams
from sequel_flax.algorithms.naive import naive
from sequel_flax.bundle import Algorithm
from sequel_flax.trainable import Selection


def stable_sgd(hparams: StableSGDHParams, seed: int = 0, trainable: Selection = None) -> Algorithm:
    """Return stable SGD.

    Args:
        hparams: settings.
        seed: of dropout.
        trainable: which parameters are trained; see `make_algorithm`.
    """
    return naive(hparams, seed, trainable)
