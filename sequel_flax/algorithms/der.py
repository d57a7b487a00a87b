"""Dark experience replay (Buzzega et al. 2020, https://arxiv.org/abs/2004.07211).

    L = CE(f(x), y) + alpha * E_(x', z) ||z - f(x')||^2                                              (eq. 5)

z are the logits that the network gave for x' when it was trained on it, before the step, in training mode and
of all classes, unmasked; (x', z) is a draw from the memory, a reservoir that is read as soon as it holds
anything. `distance="sum"` is the squared norm of the paper; its code, and so its tuned alphas, take the mean
over classes (`"mean"`), a tenth of it for ten classes.

Mirror: sequel_lightning/algorithms/der.py
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from sequel_core.algorithms.der import DERHParams
from sequel_flax.bundle import Algorithm
from sequel_flax.replay import Outputs, mean_cross_entropy, replay, sum_of_first
from sequel_flax.trainable import Selection


def logit_distance(draw: Outputs, hparams: DERHParams) -> jax.Array:
    """Return the mean over a draw of ||z - f(x')||^2, 0 for an empty one, shape ()."""
    squares = (draw.stored - draw.logits) ** 2
    norms = jnp.sum(squares, axis=1) if hparams.distance == "sum" else jnp.mean(squares, axis=1)
    return sum_of_first(norms, draw.count) / jnp.maximum(draw.count, 1)


def replay_loss(batch: Outputs, draws: Sequence[Outputs], hparams: DERHParams) -> jax.Array:
    """Return the cross-entropy of the batch plus alpha times the distance of the draw, shape ()."""
    return mean_cross_entropy(batch) + hparams.alpha * logit_distance(draws[0], hparams)


def der(hparams: DERHParams, seed: int = 0, trainable: Selection = None) -> Algorithm:
    """Return dark experience replay.

    Args:
        hparams: settings.
        seed: of dropout and of the memory.
        trainable: which parameters are trained; see `make_algorithm`.
    """
    loss = partial(replay_loss, hparams=hparams)
    return replay(hparams, seed, loss, keep_logits=True, trainable=trainable)
