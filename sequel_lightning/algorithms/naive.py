"""Naive finetuning: trains on one task after the other without any protection. The usual lower bound.

    L = loss(f(x), y)

Mirror: sequel_flax/algorithms/naive.py
"""

from __future__ import annotations

from sequel_core.algorithms.naive import NaiveHParams
from sequel_lightning.module import ContinualModule


class Naive(ContinualModule):
    """Naive finetuning; see `help(NaiveHParams)` for its settings.

    Example:
        >>> import torch
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import NaiveHParams
        >>> from sequel_lightning import MLP, Naive
        >>> digits = RotatedDigits(num_tasks=2)
        >>> net = MLP(image_shape=digits.image_shape)
        >>> module = Naive(net, torch.optim.SGD, NaiveHParams(), digits.spec)
        >>> module(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """

    hparams_class = NaiveHParams
