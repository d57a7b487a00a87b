"""Elastic weight consolidation (Kirkpatrick et al. 2017, https://arxiv.org/abs/1612.00796).

    L = CE(f(x), y) + lambda/2 * sum_k sum_i F_{k,i} (theta_i - theta*_{k,i})^2                      (eq. 3)
    F_{k,i} = 1/N sum_n (d log p(y_n | x_n) / d theta_i)^2 at theta*_k, one gradient per sample, y_n the label

The sum over past tasks k collapses exactly, but for a constant, into one anchor: importance = sum_k F_k and
anchor = sum_k F_k theta*_k / sum_k F_k, kept as theta* + share (anchor - theta*), so that a weight that never
moved has exactly no penalty (Adam would turn a rounding error into a step). The online variant (Schwarz et
al. 2018, https://arxiv.org/abs/1805.06370) decays the importance by gamma and anchors at the latest theta*.

Mirror: sequel_lightning/algorithms/ewc.py
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp

from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.stream.task import Batch
from sequel_flax.bundle import Algorithm, Params, cross_entropy, forward
from sequel_flax.quadratic import Model, mean_gradients, quadratic
from sequel_flax.trainable import Selection


def negative_log_likelihood(params: Params, model: Model, batch: Batch) -> jax.Array:
    """Return -log p(y | x) of a batch of one sample, in evaluation mode, shape ()."""
    ts, state = model
    return cross_entropy(forward(ts, params, state, batch.x, batch.t), batch.y)


def diagonal_fisher(params: Params, model: Model, batches: Iterable[Batch], samples: int | None) -> Params:
    """Return the mean squared per-sample gradient over the first `samples` samples (None for all)."""
    return mean_gradients(params, model, batches, negative_log_likelihood, jnp.square, samples)


def ewc(hparams: EWCHParams, seed: int = 0, trainable: Selection = None) -> Algorithm:
    """Return elastic weight consolidation.

    Args:
        hparams: settings; the published RotatedMNIST number (48.5, MC-SGD paper) comes from another variant,
            with a min-max normalised Fisher.
        seed: of dropout.
        trainable: which parameters are trained; see `make_algorithm`.
    """
    online = hparams.accumulation == "online"
    return quadratic(
        hparams,
        seed,
        strength=hparams.ewc_lambda,
        importances=partial(diagonal_fisher, samples=hparams.fisher_samples),
        separate=not online,
        gamma=hparams.gamma if online else 1.0,
        samples=hparams.fisher_samples,
        trainable=trainable,
    )
