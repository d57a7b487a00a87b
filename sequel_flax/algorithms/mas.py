"""Memory aware synapses (Aljundi et al. 2018, https://arxiv.org/abs/1711.09601).

    L = loss(f(x), y) + lambda * sum_i Omega_i (theta_i - theta*_i)^2                                  (eq. 4)
    Omega_i <- Omega_i + 1/N sum_n |d ||f(x_n)||^2 / d theta_i| at theta*, one gradient per sample (eq. 2, 3)

f are the outputs; for classes, the logits of all classes, unmasked. No targets are used. theta* are the
weights at the end of the last task. The official code takes one gradient per batch, of the sum of ||f||^2
over it (`gradients="batch"`). Importances then depend on the batch size, and strengths are not comparable.

Mirror: sequel_lightning/algorithms/mas.py
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState

from sequel_core.algorithms.mas import MASHParams
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.task import Batch
from sequel_flax.bundle import Algorithm, Params, blank_output, network
from sequel_flax.objectives import Objective, output_leaf
from sequel_flax.quadratic import Model, QuadraticState, init_quadratic, mean_gradients, quadratic
from sequel_flax.trainable import Selection


def squared_norm(params: Params, model: Model, batch: Batch) -> jax.Array:
    """Return the sum over a batch of ||f(x)||^2, in evaluation mode, shape ()."""
    outputs = network(model.ts, params, model.state, batch.x, batch.t)
    f = output_leaf(outputs, model.hparams.output)
    norms = (f.reshape(len(f), -1) ** 2).sum(1)
    return jnp.where(batch.t >= 0, norms, 0).sum()  # t is -1 for padding


def sensitivity(params: Params, model: Model, batches: Iterable[Batch], hparams: MASHParams) -> Params:
    """Return the mean absolute gradient of ||f(x)||^2 over a task's samples."""
    return mean_gradients(
        params, model, batches, [squared_norm], jnp.abs, hparams.mas_samples, hparams.gradients == "batch"
    )


def mas(
    hparams: MASHParams, seed: int = 0, trainable: Selection = None, objective: Objective | None = None
) -> Algorithm:
    """Return memory aware synapses as pure functions.

    The order of the calls is that of `help(ewc)`.

    Args:
        hparams: settings; see `help(MASHParams)`.
        seed: of dropout, >= 0.
        trainable: which parameters are trained; None for all. See `make_algorithm`.
        objective: what the network is trained and scored on; None for the one that fits the targets.

    Raises:
        ValueError: in `init`, if the network has no such output; in `end_task`, if there are no batches.

    Example:
        >>> import optax
        >>> from flax.training.train_state import TrainState
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import Batch, MASHParams
        >>> from sequel_flax import MLP, initial_params, mas
        >>> digits, net = RotatedDigits(num_tasks=2, subset=40), MLP(widths=(16,), num_classes=10)
        >>> params = initial_params(net, digits.spec, seed=0)
        >>> ts = TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.1))
        >>> algorithm = mas(MASHParams(mas_lambda=0.1))
        >>> ts, state = algorithm.start_task(ts, algorithm.init(ts, digits.spec), digits.tasks[0])
        >>> ts, state = algorithm.end_task(ts, state, [Batch(*digits.tasks[0].train.take(range(40)))])
        >>> bool((state.memory.importance["head"]["bias"] > 0).all())
        True
    """

    def init_memory(ts: TrainState, spec: StreamSpec) -> QuadraticState:
        blank_output(ts, spec, hparams)  # raises an error if there is none
        return init_quadratic(ts)

    return quadratic(
        hparams,
        seed,
        strength=2 * hparams.mas_lambda,
        importances=partial(sensitivity, hparams=hparams),
        samples=hparams.mas_samples,
        trainable=trainable,
        objective=objective,
        init_memory=init_memory,
    )
