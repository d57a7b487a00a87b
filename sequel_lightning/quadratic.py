"""A quadratic pull towards the weights of past tasks: what EWC, MAS and SI share.

    L = CE(f(x), y) + strength * 1/2 * sum_i F_i (theta_i - theta*_i)^2

A new method of this kind needs only its importances F, most often a mean over samples: `mean_gradients`.

Mirror: sequel_flax/quadratic.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torchmetrics import MetricCollection

from sequel_core.hparams import AlgorithmHParams
from sequel_core.task import Batch, StreamSpec
from sequel_lightning.module import ContinualModule, OptimizerFactory, Params, StateTree

GRADIENTS = 1 << 24
"""Numbers in the gradients of single samples that are held at a time."""

Model = ContinualModule
Objective = Callable[[Params, Model, Batch], Tensor]
Contribution = Callable[[Tensor], Tensor]


class QuadraticState(NamedTuple):
    """What is remembered of past tasks; both trees have the structure of the parameters."""

    anchor: Params  # theta*, where the penalty is least
    importance: Params  # F, all 0 before the end of the first task


class QuadraticPenalty(torch.autograd.Function):
    """1/2 * sum_i F_i (theta_i - theta*_i)^2, its gradient F (theta - theta*) written out.

    That takes half of autograd's time.

    Arguments of `apply`: the number n of parameters, then n parameters, n anchors and n importances.
    """

    @staticmethod
    def forward(ctx: Any, n: int, *tensors: Tensor) -> Tensor:
        """Return the penalty, shape ()."""
        distance = torch._foreach_sub(tensors[:n], tensors[n : 2 * n])
        ctx.gradient = torch._foreach_mul(tensors[2 * n :], distance)
        terms = [torch.dot(g.flatten(), d.flatten()) for g, d in zip(ctx.gradient, distance, strict=True)]
        return 0.5 * torch.stack(terms).sum()

    @staticmethod
    def backward(ctx: Any, *factors: Tensor) -> Any:
        """Return the gradient of the parameters; anchors and importances get none."""
        gradient = torch._foreach_mul(ctx.gradient, factors[0])
        return None, *gradient, *[None] * (2 * len(gradient))


def penalty(params: Params, anchor: Params, importance: Params) -> Tensor:
    """Return 1/2 * sum_i F_i (theta_i - theta*_i)^2 over all parameters, shape ()."""
    names = params.keys()
    penalty: Tensor = QuadraticPenalty.apply(  # type: ignore[no-untyped-call]
        len(params), *params.values(), *(anchor[k] for k in names), *(importance[k] for k in names)
    )
    return penalty


def consolidate(
    params: Params, state: QuadraticState, importance: Params, separate: bool = False, gamma: float = 1.0
) -> QuadraticState:
    """Return the state with one more task in it, whose importances were taken at `params`.

    Args:
        params: weights at the end of the task.
        state: of the tasks before.
        importance: of the task.
        separate: keep every task's own term (theta - theta*_k)^2; else the past is anchored at `params` too.
        gamma: decay of past importances, where they are not separate.
    """
    if not separate:
        return QuadraticState(params, {k: gamma * f + importance[k] for k, f in state.importance.items()})
    total = {k: f + importance[k] for k, f in state.importance.items()}
    share = {k: f / torch.where(total[k] > 0, total[k], 1) for k, f in state.importance.items()}
    anchor = {k: p + share[k] * (state.anchor[k] - p) for k, p in params.items()}
    return QuadraticState(anchor, total)


def mean_gradients(
    params: Params,
    model: Model,
    batches: Iterable[Batch],
    objective: Objective,
    contribution: Contribution,
    samples: int | None = None,
    per_batch: bool = False,
) -> Params:
    """Return 1/N sum_n contribution(d objective(x_n) / d theta), in evaluation mode.

    Args:
        params: weights at which gradients are taken.
        model: what the objective needs beside them.
        batches: of samples, each sample once.
        objective: of a batch, shape (); given batches of one sample, unless `per_batch`.
        contribution: of a gradient array to the sum, elementwise: its square, its absolute value, ...
        samples: N, the first so many; None for all.
        per_batch: one gradient for each whole batch instead.
    """

    def of_one(params: Params, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        return objective(params, model, Batch(x[None], y[None], t[None]))

    total, count = {k: torch.zeros_like(p) for k, p in params.items()}, 0
    width = max(1, GRADIENTS // sum(p.numel() for p in params.values()))
    for batch in batches:
        wanted = len(batch.y) if samples is None else min(len(batch.y), samples - count)
        part = Batch(*(a[:wanted] for a in batch[:3]))
        if per_batch:
            gradient = grad(objective)(params, model, part)
            total = {k: f + contribution(gradient[k]) for k, f in total.items()}
        else:
            for piece in zip(*(a.split(width) for a in part[:3]), strict=True):
                gradient = vmap(grad(of_one), in_dims=(None, 0, 0, 0))(params, *piece)
                total = {k: f + contribution(gradient[k]).sum(0) for k, f in total.items()}
        count += wanted
        if count == samples:
            break
    return {k: f / count for k, f in total.items()}


class QuadraticModule(ContinualModule):
    """A quadratic penalty on importances that are taken at the end of a task; subclasses say which."""

    has_penalty = True
    strength = 1.0  # factor of the penalty
    separate = False  # see `consolidate`
    gamma = 1.0  # see `consolidate`

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerFactory,
        hparams: AlgorithmHParams,
        spec: StreamSpec | None = None,
        metrics: MetricCollection | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(net, optimizer, hparams, spec, metrics, seed)
        self.anchor = StateTree(self.frozen_params())
        self.importance = StateTree({k: torch.zeros_like(p) for k, p in self.frozen_params().items()})

    def importances(self, params: Params, batches: Iterable[Batch]) -> Params:
        """Return the importances of a task, from the weights at its end and batches of its samples."""
        raise TypeError(f"{type(self).__name__} has to override importances(params, batches)")

    @property
    def state(self) -> QuadraticState:
        """What is remembered of past tasks."""
        return QuadraticState(self.anchor.get(), self.importance.get())

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return cross-entropy plus the penalty, shape ()."""
        added = self.added(self.strength * penalty(self.params(), *self.state))
        return super().loss(logits, batch) + added

    def end_task(self, batches: Iterable[Batch]) -> None:
        """Add the task's importances and move the anchor."""
        params = self.frozen_params()
        found = self.importances(params, batches)
        state = consolidate(params, self.state, found, self.separate, self.gamma)
        self.anchor.set(state.anchor)
        self.importance.set(state.importance)
