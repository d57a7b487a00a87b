"""Experience replay (Chaudhry et al. 2019, https://arxiv.org/abs/1902.10486).

    L = mean CE over B_n and B_M together, B_n the batch and B_M a draw from the memory          (algorithm 1)

The memory is read from the first task on, in one pass of the network with the batch, and the batch is then
written to it. The reservoir holds each sample of the stream with probability M/n exactly; the ring
holds the latest samples of each class (of each task, where tasks share classes). The published numbers have
batches of 10 and 10; RotatedMNIST (69.2, MC-SGD paper) has one sample per class and task, `mem_size=200`.

Mirror: sequel_lightning/algorithms/er.py
"""

from __future__ import annotations

from collections.abc import Sequence

import jax

from sequel_core.algorithms.er import ERHParams
from sequel_flax.bundle import Algorithm
from sequel_flax.replay import Outputs, mean_cross_entropy, replay
from sequel_flax.trainable import Selection


def replay_loss(batch: Outputs, draws: Sequence[Outputs]) -> jax.Array:
    """Return the mean cross-entropy of the batch and the draw together, shape ()."""
    return mean_cross_entropy(batch, *draws)


def er(hparams: ERHParams, seed: int = 0, trainable: Selection = None) -> Algorithm:
    """Return experience replay.

    Args:
        hparams: settings.
        seed: of dropout and of the memory.
        trainable: which parameters are trained; see `make_algorithm`.
    """
    return replay(hparams, seed, replay_loss, together=True, trainable=trainable)
