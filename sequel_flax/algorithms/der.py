"""Dark experience replay (Buzzega et al. 2020, https://arxiv.org/abs/2004.07211).

    L = CE(f(x), y) + alpha * E_(x', z) ||z - f(x')||^2                                              (eq. 5)

(x', z) is a draw from the memory. z are the logits of x' at the step at which it was a training sample:
before the update, in training mode, of all classes and unmasked. The memory is a reservoir, which is read as
soon as it has a sample. `distance="sum"` is the squared norm of the paper. The official code, and so its
tuned alphas, has the mean over classes (`distance="mean"`), a tenth of it for ten classes.

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
    """Return dark experience replay as pure functions.

    The calls are those of `help(er)`; the memory also holds logits.

    Args:
        hparams: settings; see `help(DERHParams)`.
        seed: of dropout and of the memory, >= 0.
        trainable: which parameters are trained; None for all. See `make_algorithm`.

    Raises:
        ValueError: as for `er`.

    Example:
        >>> import optax
        >>> from flax.training.train_state import TrainState
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import DERHParams
        >>> from sequel_flax import MLP, der, initial_params
        >>> digits, net = RotatedDigits(num_tasks=2, subset=40), MLP(widths=(16,), num_classes=10)
        >>> params = initial_params(net, digits.spec, seed=0)
        >>> ts = TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.1))
        >>> algorithm = der(DERHParams(mem_size=50, alpha=0.5))
        >>> algorithm.init(ts, digits.spec).memory.logits.shape
        (50, 10)
    """
    loss = partial(replay_loss, hparams=hparams)
    return replay(hparams, seed, loss, keep_logits=True, trainable=trainable)
