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

Mirror: sequel_flax/algorithms/ewc.py
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.stream import plan
from sequel_core.stream.task import Batch
from sequel_lightning.gradients import Loss, call_with
from sequel_lightning.objectives import Objective, map_outputs
from sequel_lightning.quadratic import Model, QuadraticModule, mean_gradients
from sequel_lightning.trees import Params, sum_dtype


def outputs_at(params: Params, model: Model, x: Any, t: Tensor) -> Any:
    """Return what the network returns at the weights given, in evaluation mode, masked to the tasks."""
    return call_with(model, {f"net.{k}": p for k, p in params.items()}, x, t)


def negative_log_likelihood(params: Params, model: Model, batch: Batch) -> Tensor:
    """Return the sum over a batch of -log p(y | x), in evaluation mode, shape ()."""
    nll: Any = model.objective.nll
    likelihood: Tensor = nll(lambda x: outputs_at(params, model, x, batch.t), batch)
    return likelihood.sum()


def sampled_likelihood(params: Params, model: Model, batch: Batch) -> Tensor:
    """Return the same for targets that are drawn from the model by uniform numbers, `batch.y`, shape ()."""
    objective: Any = model.objective
    outputs = outputs_at(params, model, batch.x, batch.t)
    y = objective.sample(map_outputs(Tensor.detach, outputs), batch.y)
    likelihood: Tensor = objective.nll(lambda x: outputs, batch._replace(y=y))
    return likelihood.sum()


def outcome_likelihood(params: Params, model: Model, batch: Batch, k: int) -> Tensor:
    """Return sqrt(w) * -log p(y | x) for outcome k, with target y and weight w, shape ()."""
    objective: Any = model.objective
    outputs = outputs_at(params, model, batch.x, batch.t)
    targets, weights = objective.outcomes(map_outputs(Tensor.detach, outputs))
    likelihood: Tensor = objective.nll(lambda x: outputs, batch._replace(y=targets[k]))
    weight: Tensor = weights[k].sqrt()
    return (weight * likelihood).sum()


def batch_likelihood(params: Params, model: Model, batch: Batch) -> Tensor:
    """Return sqrt(B) times the mean of -log p(y | x) over a batch of B samples, shape ()."""
    return negative_log_likelihood(params, model, batch) / math.sqrt(len(batch.t))


def weighted_likelihood(params: Params, model: Model, batch: Batch) -> Tensor:
    """Return sqrt(p(y | x)) * -log p(y | x), summed over a batch, shape (); p has no gradient."""
    nll: Any = model.objective.nll
    likelihood: Tensor = nll(lambda x: outputs_at(params, model, x, batch.t), batch)
    return ((-likelihood.detach() / 2).exp() * likelihood).sum()


def with_uniforms(batches: Iterable[Batch], model: Model, seed: int, task: int) -> Iterator[Batch]:
    """Yield the batches of a task with uniform numbers in place of y, of its shape."""
    start, dtype = 0, sum_dtype(next(model.net.parameters()).dtype)
    for batch in batches:
        shape = batch.y.shape if isinstance(batch.y, Tensor) else batch.t.shape
        u = plan.uniform(seed, "fisher", task, count=math.prod(shape), start=start)
        start += u.size
        yield batch._replace(y=torch.from_numpy(u.reshape(shape)).to(batch.t.device, dtype))


def num_outcomes(params: Params, model: Model, batch: Batch) -> int:
    """Return the number K of outcomes of the objective for the network's outputs."""
    outcomes: Any = model.objective.outcomes
    with torch.no_grad():
        _, weights = outcomes(outputs_at(params, model, batch.x, batch.t))
    return len(weights)


def diagonal_fisher(
    params: Params, model: Model, batches: Iterable[Batch], hparams: EWCHParams, seed: int, task: int
) -> Params:
    """Return the diagonal Fisher information of a task, over its first `fisher_samples` samples."""
    losses: list[Loss] = [negative_log_likelihood]
    if hparams.fisher == "sampled":
        batches, losses = with_uniforms(batches, model, seed, task), [sampled_likelihood]
    elif hparams.fisher == "exact":
        batches = iter(batches)
        first = next(batches)
        batches = chain([first], batches)
        losses = [partial(outcome_likelihood, k=k) for k in range(num_outcomes(params, model, first))]
    elif hparams.fisher == "batch":
        losses = [batch_likelihood]
    elif hparams.fisher == "weighted":
        losses = [weighted_likelihood]
    one, per_batch = hparams.fisher == "mean", hparams.fisher in ("batch", "mean")
    contribution = torch.positive if one else torch.square
    total = mean_gradients(params, model, batches, losses, contribution, hparams.fisher_samples, per_batch)
    return {k: g.square() for k, g in total.items()} if one else total


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


class EWC(QuadraticModule):
    """Elastic weight consolidation; see `help(EWCHParams)` for its settings.

    Each `Trainer.fit` trains on one task. When it ends, the Fisher information of the task is estimated, and
    the anchor moves. The published RotatedMNIST number (48.5, MC-SGD paper) comes from another variant, with
    a min-max normalised Fisher.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from pytorch_lightning import Trainer
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import EWCHParams
        >>> from sequel_lightning import EWC, MLP, TaskDataModule
        >>> digits = RotatedDigits(num_tasks=2, subset=100)
        >>> net = MLP((16,), num_classes=10, image_shape=digits.image_shape)
        >>> module = EWC(net, partial(torch.optim.SGD, lr=0.1), EWCHParams(ewc_lambda=10.0), digits.spec)
        >>> silent = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        >>> for task in digits.tasks:
        ...     trainer = Trainer(max_epochs=1, accelerator="cpu", enable_progress_bar=False, **silent)
        ...     trainer.fit(module, datamodule=TaskDataModule(task, batch_size=10))
        >>> int(module.task_index), int(module.phase)  # task 1 is consolidated
        (1, 2)
        >>> bool(module.state.importance["head.weight"].min() >= 0)
        True
    """

    hparams_class = EWCHParams
    algorithm_hparams: EWCHParams
    objective_elsewhere = "the Fisher information"

    def check_objective(self, objective: Objective) -> None:
        """Raise ValueError if the objective lacks what the Fisher estimate needs."""
        super().check_objective(objective)
        check_likelihood(objective, self.algorithm_hparams)

    def init_memory(self) -> None:
        """Start with zero importances."""
        super().init_memory()
        hparams = self.algorithm_hparams
        online = hparams.accumulation == "online"
        self.strength = hparams.ewc_lambda
        self.separate = not online
        self.gamma = hparams.gamma if online else 1.0

    def importances(self, params: Params, batches: Iterable[Batch]) -> Params:
        """Return the diagonal Fisher of a task."""
        hparams, task = self.algorithm_hparams, int(self.task_index)
        return diagonal_fisher(params, self, batches, hparams, self.seed, task)
