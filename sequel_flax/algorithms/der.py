"""Dark experience replay (Buzzega et al. 2020, https://arxiv.org/abs/2004.07211).

    L = loss(f(x), y) + alpha * E_(x', z) ||z - f(x')||^2                                            (eq. 5)

(x', z) is a draw from the memory. z are the outputs for x' at the step at which it was a training sample:
before the update, in training mode. For classes they are the logits of all classes, unmasked. The memory is a
reservoir, which is read as soon as it has a sample. `distance="sum"` is the squared norm of the paper. The
official code, and so its tuned alphas, has the mean over classes (`distance="mean"`), a tenth of it for ten
classes.

Mirror: sequel_lightning/algorithms/der.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from sequel_core.algorithms.der import DERHParams
from sequel_flax.bundle import Algorithm
from sequel_flax.objectives import Objective, output_leaf
from sequel_flax.replay import Outputs, mean_loss, replay, sum_of_first
from sequel_flax.trainable import Selection


def output_distance(draw: Outputs, hparams: DERHParams) -> jax.Array:
    """Return the mean over a draw of ||z - f(x')||^2, 0 for an empty one, shape ()."""
    squares = (draw.stored - output_leaf(draw.outputs, hparams.output)) ** 2
    squares = squares.reshape(len(squares), math.prod(squares.shape[1:]))
    norms = jnp.sum(squares, axis=1) if hparams.distance == "sum" else jnp.mean(squares, axis=1)
    return sum_of_first(norms, draw.count) / jnp.maximum(draw.count, 1)


def replay_loss(batch: Outputs, draws: Sequence[Outputs], hparams: DERHParams) -> jax.Array:
    """Return the mean loss of the batch plus alpha times the distance of the draw, shape ()."""
    return mean_loss(batch) + hparams.alpha * output_distance(draws[0], hparams)


def der(
    hparams: DERHParams, seed: int = 0, trainable: Selection = None, objective: Objective | None = None
) -> Algorithm:
    """Return dark experience replay as pure functions.

    The calls are those of `help(er)`; the memory also holds outputs.

    Args:
        hparams: settings; see `help(DERHParams)`.
        seed: of dropout and of the memory, >= 0.
        trainable: which parameters are trained; None for all. See `make_algorithm`.
        objective: what the network is trained and scored on; None for the one that fits the targets.

    Raises:
        ValueError: in `init`, also if the network has no such output; otherwise as for `er`.

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
        >>> algorithm.init(ts, digits.spec).memory.outputs.shape
        (50, 10)
    """
    return replay(
        hparams,
        seed,
        partial(replay_loss, hparams=hparams),
        keep_outputs=True,
        trainable=trainable,
        objective=objective,
    )
