"""Elastic weight consolidation (Kirkpatrick et al. 2017, https://arxiv.org/abs/1612.00796).

    L = CE(f(x), y) + lambda/2 * sum_k sum_i F_{k,i} (theta_i - theta*_{k,i})^2                      (eq. 3)
    F_{k,i} = 1/N sum_n (d log p(y_n | x_n) / d theta_i)^2 at theta*_k, one gradient per sample, y_n the label

Up to a constant, the sum over past tasks k equals one term with importance = sum_k F_k and
anchor = sum_k F_k theta*_k / sum_k F_k. The anchor is computed as theta* + share (anchor - theta*), so the
penalty of a weight that never changed is exactly 0 (Adam would turn a rounding error into a step). The online
variant (Schwarz et al. 2018, https://arxiv.org/abs/1805.06370) decays the importance by gamma and has its
anchor at the latest theta*. The published RotatedMNIST accuracy (48.5, MC-SGD paper) comes from another
variant, with a min-max normalised Fisher.

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
    """Return elastic weight consolidation as pure functions.

    Call `init` first. Then, for each task, call `start_task`, `train_step` for each batch, and `end_task`,
    which computes the importances.

    Args:
        hparams: settings; see `help(EWCHParams)`.
        seed: of dropout, >= 0.
        trainable: which parameters are trained; None for all. See `make_algorithm`.

    Raises:
        ValueError: in `start_task`, `train_step` and `end_task`, if they are called in another order; in
            `end_task`, if there are no batches.

    Example:
        >>> import optax
        >>> from flax.training.train_state import TrainState
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import Batch, EWCHParams
        >>> from sequel_flax import MLP, ewc, initial_params
        >>> digits, net = RotatedDigits(num_tasks=2, subset=40), MLP(widths=(16,), num_classes=10)
        >>> params = initial_params(net, digits.spec, seed=0)
        >>> ts = TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.1))
        >>> algorithm = ewc(EWCHParams(ewc_lambda=10.0))
        >>> state = algorithm.init(ts, digits.spec)
        >>> for task in digits.tasks:
        ...     batch = Batch(*task.train.take(range(40)))
        ...     ts, state = algorithm.start_task(ts, state, task)
        ...     ts, state, outputs = algorithm.train_step(ts, state, batch)  # may be compiled by jax.jit
        ...     ts, state = algorithm.end_task(ts, state, [batch])  # all batches of the task
        >>> algorithm.predict(ts, state, batch.x, batch.t).shape
        (40, 10)
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
