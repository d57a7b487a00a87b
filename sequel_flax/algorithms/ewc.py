"""Elastic weight consolidation (Kirkpatrick et al. 2017, https://arxiv.org/abs/1612.00796).

    L = loss(f(x), y) + lambda/2 * sum_k sum_i F_{k,i} (theta_i - theta*_{k,i})^2                    (eq. 3)
    F_{k,i} = 1/N sum_n (d log p(y_n | x_n) / d theta_i)^2 at theta*_k, one gradient per sample, y_n the label

-log p is the `nll` of the objective, without label smoothing and class weights. The setting `fisher` has
other estimates of F; see `help(EWCHParams)`.

Up to a constant, the sum over past tasks k equals one term with importance = sum_k F_k and
anchor = sum_k F_k theta*_k / sum_k F_k. The anchor is computed as theta* + share (anchor - theta*), so the
penalty of a weight that never changed is exactly 0 (Adam would turn a rounding error into a step). The online
variant (Schwarz et al. 2018, https://arxiv.org/abs/1805.06370) decays the importance by gamma and has its
anchor at the latest theta*. The published RotatedMNIST accuracy (48.5, MC-SGD paper) comes from another
variant, with a min-max normalised Fisher.

Mirror: sequel_lightning/algorithms/ewc.py
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.stream import plan
from sequel_core.stream.task import Batch
from sequel_flax.bundle import Algorithm, Params, State, for_objective, network, objective_of
from sequel_flax.objectives import Objective
from sequel_flax.quadratic import Model, mean_gradients, quadratic
from sequel_flax.trainable import Selection


def outputs_at(params: Params, model: Model, x: Any, t: jax.Array) -> Any:
    """Return what the network returns at the weights given, in evaluation mode, masked to the tasks."""
    outputs = network(model.ts, params, model.state, x, t)
    return for_objective(model, Batch(x, None, t), outputs)(x)


def negative_log_likelihood(params: Params, model: Model, batch: Batch) -> jax.Array:
    """Return the sum over a batch of -log p(y | x), in evaluation mode, shape ()."""
    nll: Any = model.objective.nll
    likelihood: jax.Array = nll(lambda x: outputs_at(params, model, x, batch.t), batch)
    return jnp.where(batch.t >= 0, likelihood, 0).sum()  # t is -1 for padding


def sampled_likelihood(params: Params, model: Model, batch: Batch) -> jax.Array:
    """Return the same for targets that are drawn from the model by uniform numbers, `batch.y`, shape ()."""
    objective: Any = model.objective
    outputs = outputs_at(params, model, batch.x, batch.t)
    y = objective.sample(jax.lax.stop_gradient(outputs), batch.y)
    likelihood: jax.Array = objective.nll(lambda x: outputs, batch._replace(y=y))
    return likelihood.sum()


def outcome_likelihood(params: Params, model: Model, batch: Batch, k: Any) -> jax.Array:
    """Return sqrt(w) * -log p(y | x) for outcome k, with target y and weight w, shape ()."""
    objective: Any = model.objective
    outputs = outputs_at(params, model, batch.x, batch.t)
    targets, weights = objective.outcomes(jax.lax.stop_gradient(outputs))
    likelihood: jax.Array = objective.nll(lambda x: outputs, batch._replace(y=targets[k]))
    return (jnp.sqrt(weights[k]) * likelihood).sum()


def batch_likelihood(params: Params, model: Model, batch: Batch) -> jax.Array:
    """Return sqrt(B) times the mean of -log p(y | x) over a batch of B samples, shape ()."""
    return negative_log_likelihood(params, model, batch) / jnp.sqrt(jnp.sum(batch.t >= 0))


def weighted_likelihood(params: Params, model: Model, batch: Batch) -> jax.Array:
    """Return sqrt(p(y | x)) * -log p(y | x), summed over a batch, shape (); p has no gradient."""
    nll: Any = model.objective.nll
    likelihood: jax.Array = nll(lambda x: outputs_at(params, model, x, batch.t), batch)
    return (jnp.exp(-jax.lax.stop_gradient(likelihood) / 2) * likelihood).sum()


def with_uniforms(batches: Iterable[Batch], model: Model, seed: int, task: int) -> Iterator[Batch]:
    """Yield the batches of a task with uniform numbers in place of y, of its shape."""
    start, dtype = 0, jnp.promote_types(model.state.stream.scale.dtype, jnp.float32)
    for batch in batches:
        shape = np.shape(batch.t if isinstance(batch.y, Mapping) else batch.y)
        u = plan.uniform(seed, "fisher", int(task), count=math.prod(shape), start=start)
        start += u.size
        yield batch._replace(y=u.reshape(shape).astype(dtype))


def num_outcomes(params: Params, model: Model, batch: Batch) -> int:
    """Return the number K of outcomes of the objective for the network's outputs."""
    outcomes: Any = model.objective.outcomes
    _, weights = jax.eval_shape(lambda: outcomes(outputs_at(params, model, batch.x, batch.t)))
    return len(weights)


def diagonal_fisher(
    params: Params, model: Model, batches: Iterable[Batch], hparams: EWCHParams, seed: int, task: int
) -> Params:
    """Return the diagonal Fisher information of a task, over its first `fisher_samples` samples."""
    losses = [negative_log_likelihood]
    if hparams.fisher == "sampled":
        losses = [sampled_likelihood]
        if not isinstance(batches, Batch):  # else `plan_end` has drawn the numbers
            batches = with_uniforms(batches, model, seed, task)
    elif hparams.fisher == "exact":
        losses = [_outcome_likelihoods]
    elif hparams.fisher == "batch":
        losses = [batch_likelihood]
    elif hparams.fisher == "weighted":
        losses = [weighted_likelihood]
    one, per_batch = hparams.fisher == "mean", hparams.fisher in ("batch", "mean")
    contribution = jnp.positive if one else jnp.square
    total = mean_gradients(params, model, batches, losses, contribution, hparams.fisher_samples, per_batch)
    return jax.tree.map(jnp.square, total) if one else total


def _outcome_likelihoods(params: Params, model: Model, batch: Batch) -> jax.Array:
    """Return `outcome_likelihood` of each outcome, `[K]`; the network is called once."""
    outcomes = jnp.arange(num_outcomes(params, model, batch))
    values: jax.Array = jax.vmap(lambda k: outcome_likelihood(params, model, batch, k))(outcomes)
    return values


def check_likelihood(objective: Objective, hparams: EWCHParams) -> None:
    """Raise ValueError if an objective lacks what the Fisher estimate needs."""
    if objective.nll is None:
        raise ValueError(
            "ewc takes the Fisher information from the objective's negative log-likelihood, got nll=None; "
            "give the objective an nll (the loss, if it is one), or use another method, such as mas or si"
        )
    for fisher, field in (("sampled", "sample"), ("exact", "outcomes")):
        if hparams.fisher == fisher and getattr(objective, field) is None:
            raise ValueError(
                f"fisher={fisher} needs an objective with {field}, got {field}=None; use fisher=empirical"
            )


def ewc(
    hparams: EWCHParams, seed: int = 0, trainable: Selection = None, objective: Objective | None = None
) -> Algorithm:
    """Return elastic weight consolidation as pure functions.

    Call `init` first. Then, for each task, call `start_task`, `train_step` for each batch, and `end_task`,
    which computes the importances.

    Args:
        hparams: settings; see `help(EWCHParams)`.
        seed: of dropout, >= 0.
        trainable: which parameters are trained; None for all. See `make_algorithm`.
        objective: what the network is trained and scored on; None for the one that fits the targets.

    Raises:
        ValueError: at once or in `init`, if the objective has no `nll`; in `start_task`, `train_step` and
            `end_task`, if they are called in another order; in `end_task`, if there are no batches.

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

    def importances(params: Params, model: Model, batches: Iterable[Batch]) -> Params:
        return diagonal_fisher(params, model, batches, hparams, seed, model.state.stream.task)

    def samples_of(state: State, batches: Iterable[Batch]) -> Iterable[Batch]:
        if hparams.fisher != "sampled":
            return batches
        model = Model(None, state, objective_of(objective, state.stream))
        return with_uniforms(batches, model, seed, int(state.stream.task))

    return quadratic(
        hparams,
        seed,
        strength=hparams.ewc_lambda,
        importances=importances,
        separate=not online,
        gamma=hparams.gamma if online else 1.0,
        samples=hparams.fisher_samples,
        trainable=trainable,
        objective=objective,
        samples_of=samples_of,
        check=partial(check_likelihood, hparams=hparams),
    )
