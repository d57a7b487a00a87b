"""Elastic weight consolidation (Kirkpatrick et al. 2017, https://arxiv.org/abs/1612.00796).

    L = CE(f(x), y) + lambda/2 * sum_k sum_i F_{k,i} (theta_i - theta*_{k,i})^2                      (eq. 3)
    F_{k,i} = 1/N sum_n (d log p(y_n | x_n) / d theta_i)^2 at theta*_k, one gradient per sample, y_n the label

The sum over past tasks k collapses exactly, but for a constant, into one anchor: importance = sum_k F_k and
anchor = sum_k F_k theta*_k / sum_k F_k, kept as theta* + share (anchor - theta*), so that a weight that never
moved has exactly no penalty (Adam would turn a rounding error into a step). The online variant (Schwarz et
al. 2018, https://arxiv.org/abs/1805.06370) decays the importance by gamma and anchors at the latest theta*.

Mirror: sequel_flax/algorithms/ewc.py
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torchmetrics import MetricCollection

from sequel_core.hparams import EWCHParams
from sequel_core.task import Batch, StreamSpec
from sequel_lightning.module import ContinualModule, OptimizerFactory, Params, StateTree, quadratic_penalty


class EWCState(NamedTuple):
    """What EWC remembers of past tasks; both trees have the structure of the parameters."""

    anchor: Params  # theta*, where the penalty is least
    importance: Params  # F, sum over past tasks of the diagonal Fisher, >= 0; all 0 before the first


def penalty(params: Params, state: EWCState) -> Tensor:
    """Return 1/2 * sum_i F_i (theta_i - theta*_i)^2, shape ()."""
    return quadratic_penalty(params, state.anchor, state.importance)


def consolidate(params: Params, state: EWCState, fisher: Params, hparams: EWCHParams) -> EWCState:
    """Return the state with one more task in it: its Fisher `fisher`, taken at `params`."""
    if hparams.accumulation == "online":
        importance = {k: hparams.gamma * f + fisher[k] for k, f in state.importance.items()}
        return EWCState(params, importance)
    importance = {k: f + fisher[k] for k, f in state.importance.items()}
    share = {k: f / torch.where(importance[k] > 0, importance[k], 1) for k, f in state.importance.items()}
    anchor = {k: p + share[k] * (state.anchor[k] - p) for k, p in params.items()}
    return EWCState(anchor, importance)


def squared_gradients(params: Params, model: ContinualModule, batch: Batch) -> Params:
    """Return the sum over the batch's samples of the squared gradient of log p(y | x), in evaluation mode."""

    def negative_log_likelihood(params: Params, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        weights = {f"net.{k}": p for k, p in params.items()}
        return F.cross_entropy(functional_call(model, weights, (x[None], t[None])), y[None])

    per_sample = vmap(grad(negative_log_likelihood), in_dims=(None, 0, 0, 0))(
        params, batch.x, batch.y, batch.t
    )
    return {k: (g**2).sum(0) for k, g in per_sample.items()}


def diagonal_fisher(
    params: Params, model: ContinualModule, batches: Iterable[Batch], samples: int | None
) -> Params:
    """Return the mean squared per-sample gradient over the first `samples` samples (None for all)."""
    total, count = {k: torch.zeros_like(p) for k, p in params.items()}, 0
    for batch in batches:
        wanted = len(batch.y) if samples is None else min(len(batch.y), samples - count)
        new = squared_gradients(params, model, Batch(batch.x[:wanted], batch.y[:wanted], batch.t[:wanted]))
        total = {k: f + new[k] for k, f in total.items()}
        count += wanted
        if count == samples:
            break
    return {k: f / count for k, f in total.items()}


class EWC(ContinualModule):
    """Elastic weight consolidation.

    The published RotatedMNIST number (48.5, MC-SGD paper) comes from another variant, with a min-max
    normalised Fisher.
    """

    hparams_class = EWCHParams
    algorithm_hparams: EWCHParams

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerFactory,
        hparams: EWCHParams,
        spec: StreamSpec | None = None,
        metrics: MetricCollection | None = None,
    ) -> None:
        super().__init__(net, optimizer, hparams, spec, metrics)
        self.anchor = StateTree(self.frozen_params())
        self.importance = StateTree({k: torch.zeros_like(p) for k, p in self.frozen_params().items()})

    @property
    def state(self) -> EWCState:
        """What is remembered of past tasks."""
        return EWCState(self.anchor.get(), self.importance.get())

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return cross-entropy plus lambda times the penalty, shape ()."""
        return super().loss(logits, batch) + self.algorithm_hparams.ewc_lambda * penalty(
            self.params(), self.state
        )

    def end_task(self, batches: Iterable[Batch]) -> None:
        """Add the task's Fisher to the importance and move the anchor."""
        params = self.frozen_params()
        fisher = diagonal_fisher(params, self, batches, self.algorithm_hparams.fisher_samples)
        state = consolidate(params, self.state, fisher, self.algorithm_hparams)
        self.anchor.set(state.anchor)
        self.importance.set(state.importance)
