"""Memory aware synapses (Aljundi et al. 2018, https://arxiv.org/abs/1711.09601).

    L = CE(f(x), y) + lambda * sum_i Omega_i (theta_i - theta*_i)^2                                  (eq. 4)
    Omega_i <- Omega_i + 1/N sum_n |d ||f(x_n)||^2 / d theta_i| at theta*, one gradient per sample (eq. 2, 3)

f are the logits of all classes, unmasked; labels are not used. theta* are the weights at the end of the last
task. The official code takes one gradient for each batch, of the sum of its ||f||^2 (`gradients="batch"`);
then the batch size matters, and strengths are not comparable.

Mirror: sequel_lightning/algorithms/mas.py
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp

from sequel_core.algorithms.mas import MASHParams
from sequel_core.stream.task import Batch
from sequel_flax.bundle import Algorithm, Params, network
from sequel_flax.quadratic import Model, mean_gradients, quadratic
from sequel_flax.trainable import Selection


def squared_norm(params: Params, model: Model, batch: Batch) -> jax.Array:
    """Return the sum over a batch of ||f(x)||^2, in evaluation mode, shape ()."""
    ts, state = model
    norms = jnp.sum(network(ts, params, state, batch.x) ** 2, axis=1)
    return jnp.sum(jnp.where(batch.t >= 0, norms, 0))


def sensitivity(params: Params, model: Model, batches: Iterable[Batch], hparams: MASHParams) -> Params:
    """Return the mean absolute gradient of ||f(x)||^2 over a task's samples."""
    return mean_gradients(
        params, model, batches, squared_norm, jnp.abs, hparams.mas_samples, hparams.gradients == "batch"
    )


def mas(hparams: MASHParams, seed: int = 0, trainable: Selection = None) -> Algorithm:
    """Return memory aware synapses.

    Args:
        hparams: settings.
        seed: of dropout.
        trainable: which parameters are trained; see `make_algorithm`.
    """
    return quadratic(
        hparams,
        seed,
        strength=2 * hparams.mas_lambda,
        importances=partial(sensitivity, hparams=hparams),
        samples=hparams.mas_samples,
        trainable=trainable,
    )
