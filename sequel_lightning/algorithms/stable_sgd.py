"""Stable SGD (Mirzadeh et al. 2020, https://arxiv.org/abs/2006.06958).

    L = loss(f(x), y), task t (from 0) with the learning rate max(lr * gamma^(t + 1), min_lr)

Naive finetuning with a large first learning rate, which decays from task to task, dropout, momentum and a
small batch. The minima are flatter, so the weights move less in the next task. The exponent is that of the
official code, whose first task has lr * gamma already; `decay_first=False` starts with lr. The published
RotatedMNIST accuracy (70.8, 20 tasks) needs lr 0.1, gamma 0.55, momentum 0.8, dropout 0.25 and batch 64, as
corrected by the authors; Split CIFAR-100 (59.9) needs lr 0.15, gamma 0.85, dropout 0.1 and batch 10. The
official code resets the optimizer at every epoch, which makes no difference for one epoch per task.

Mirror: sequel_flax/algorithms/stable_sgd.py
"""

from __future__ import annotations

from sequel_core.algorithms.stable_sgd import StableSGDHParams
from sequel_lightning.module import ContinualModule


class StableSGD(ContinualModule):
    """Stable SGD; see `help(StableSGDHParams)` for its settings.

    Example:
        >>> import torch
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import StableSGDHParams
        >>> from sequel_lightning import MLP, StableSGD
        >>> digits = RotatedDigits(num_tasks=2)
        >>> net = MLP(image_shape=digits.image_shape)
        >>> module = StableSGD(net, torch.optim.SGD, StableSGDHParams(lr_decay=0.5), digits.spec)
        >>> module.algorithm_hparams.learning_rate_factor(1, 0.1)
        0.25
    """

    hparams_class = StableSGDHParams
