"""DER++, dark experience replay with labels (Buzzega et al. 2020, https://arxiv.org/abs/2004.07211).

    L = CE(f(x), y) + alpha * E_(x', z) ||z - f(x')||^2 + beta * E_(x'', y'') CE(f(x''), y'')        (eq. 6)

Dark experience replay, and the labels of a second draw from the same memory, independent of the first. Both
draws go through the network in one pass (the official code: one each), the batch in another.

Mirror: sequel_lightning/algorithms/derpp.py
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax

from sequel_core.algorithms.derpp import DERppHParams
from sequel_flax.algorithms.der import logit_distance
from sequel_flax.bundle import Algorithm
from sequel_flax.replay import Outputs, mean_cross_entropy, replay
from sequel_flax.trainable import Selection


def replay_loss(batch: Outputs, draws: Sequence[Outputs], hparams: DERppHParams) -> jax.Array:
    """Return DER's loss with the first draw plus beta times the cross-entropy of the second, shape ()."""
    dark = mean_cross_entropy(batch) + hparams.alpha * logit_distance(draws[0], hparams)
    return dark + hparams.beta * mean_cross_entropy(draws[1])


def derpp(hparams: DERppHParams, seed: int = 0, trainable: Selection = None) -> Algorithm:
    """Return DER++.

    Args:
        hparams: settings.
        seed: of dropout and of the memory.
        trainable: which parameters are trained; see `make_algorithm`.
    """
    loss = partial(replay_loss, hparams=hparams)
    return replay(hparams, seed, loss, num_draws=2, keep_logits=True, trainable=trainable)
