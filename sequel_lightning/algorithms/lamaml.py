"""La-MAML, look-ahead meta-learning (Gupta, Yadav & Paull 2020, https://arxiv.org/abs/2007.13904).

Each batch is glanced at several times. A glance looks ahead on the batch alone, in K inner steps from theta,
and asks how good the weights on the way are for the batch and a draw from the memory together:

    theta'_k = theta'_{k-1} - relu(alpha) * grad CE(part k of the batch; theta'_{k-1})           (algorithm 2)
    M = 1/K sum_k CE(batch and draw; theta'_k)                                                         (eq. 2)
    alpha <- alpha - eta dM/dalpha; then theta <- theta - relu(alpha) * dM/dtheta                      (eq. 7)

alpha holds a rate of every weight, eta is `lr_alpha`. With `second_order=False` the inner gradients are
constants. `sync_update` moves theta by the optimizer instead, which has no part otherwise; with
`learn_lr=False` alpha stays (C-MAML). The batch is written to the memory in its first glance only.
RotatedMNIST (77.42, 20 tasks of 1,000 samples, MLP 100-100, memory 200, batch and draw of 10, 5 glances, eta
0.3, alpha 0.15 at first, an inner step per sample) is first-order, and its code means to clamp inner
gradients but does not (`inner_clip`).

Mirror: sequel_flax/algorithms/lamaml.py
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from sequel_core.algorithms.lamaml import LaMAMLHParams, MetaPlan, MetaPlanner
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.task import Batch
from sequel_lightning.augmentation import cropped
from sequel_lightning.gradients import check_functional_call
from sequel_lightning.networks import check_no_batch_stats
from sequel_lightning.replay import (
    Memory,
    Outputs,
    ReplayBatch,
    ReplayModule,
    drawn,
    mean_cross_entropy,
    planned,
)
from sequel_lightning.trees import ParameterTree, Params, restricted


class LaMAMLState(NamedTuple):
    """What La-MAML keeps."""

    memory: Memory  # samples of the stream
    rates: Params  # alpha, in the structure of the parameters


def with_draw(batch: Batch, draw: ReplayBatch) -> ReplayBatch:
    """Return the batch and, after it, a draw from the memory."""
    x, y, t = (torch.cat(pair) for pair in zip(batch[:3], draw[:3], strict=True))
    return ReplayBatch(x, y, t, None, len(batch.y) + draw.count)


def inner_sgd_step(params: Params, rates: Params, gradient: Params) -> Params:
    """Return theta - relu(alpha) * gradient."""
    return {k: p - F.relu(rates[k]) * gradient[k] for k, p in params.items()}


def clip_by_value(gradient: Params, bound: float | None) -> Params:
    """Return the gradient with all values in [-bound, bound]."""
    return gradient if bound is None else {k: g.clamp(-bound, bound) for k, g in gradient.items()}


def clip_by_norm(gradient: Params, norm: float | None) -> Params:
    """Return the gradient, scaled down to a norm where it is longer."""
    if norm is None:
        return gradient
    length = torch.stack([g.norm() for g in gradient.values()]).norm()
    factor = (norm / (length + 1e-6)).clamp(max=1)
    return {k: factor * g for k, g in gradient.items()}


class LaMAML(ReplayModule):
    """La-MAML; it takes its steps itself, and a batch counts as one step of the Trainer."""

    hparams_class = LaMAMLHParams
    algorithm_hparams: LaMAMLHParams
    clipping_setting = "grad_clip_norm"
    moving_trees = ("rates",)

    def check_net(self, net: nn.Module) -> None:
        """Raise ValueError if the network has batch normalisation."""
        check_no_batch_stats(net, "lamaml", "its inner steps see too few samples for batch statistics")

    def init_memory(self) -> None:
        """Start with an empty memory, and every rate at `alpha_init`."""
        super().init_memory()
        fresh = partial(torch.full_like, fill_value=self.algorithm_hparams.alpha_init)
        self.rates = ParameterTree(self.params(), fresh)
        self._checked = False  # whether functional_call follows the network; tried with the first batch

    def make_planner(self, spec: StreamSpec) -> MetaPlanner:
        """Return the planner."""
        return MetaPlanner(self.algorithm_hparams, spec, self.seed)

    @property
    def state(self) -> LaMAMLState:
        """The memory and the rates."""
        return LaMAMLState(self.held, self.rates.get())

    def meta_loss(self, batch: Batch, draw: ReplayBatch, rates: Params) -> Tensor:
        """Return M, shape ()."""
        hparams, meta, losses = self.algorithm_hparams, with_draw(batch, draw), []
        fast = self.params()
        parts = hparams.check_parts(len(batch.y))
        for x, y, t in zip(*(a.chunk(parts) for a in batch[:3]), strict=True):
            loss = self.sample_loss(fast, ReplayBatch(x, y, t, None, len(y)))
            found = torch.autograd.grad(
                loss, list(fast.values()), create_graph=hparams.second_order, materialize_grads=True
            )
            gradient = clip_by_value(dict(zip(fast, found, strict=True)), hparams.inner_clip)
            fast = inner_sgd_step(fast, rates, gradient)
            losses.append(self.sample_loss(fast, meta))
        return torch.stack(losses).mean()

    def sample_loss(self, params: Params, samples: ReplayBatch) -> Tensor:
        """Return the mean cross-entropy of samples at the weights given, shape ()."""
        logits = functional_call(self.net, params, (self.normalise(samples.x),))
        own = self.masked(logits, samples.t)
        return mean_cross_entropy(Outputs(logits, own, samples.y, None, samples.count))

    def objective(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Take all glances at a batch; return M of the first, and the batch's logits before it."""
        if not self._checked:
            check_functional_call(self, batch.x)
            self._checked = True
        hparams, batch = self.algorithm_hparams, self.planned(batch)
        (_, reads, orders, _), seen_x = planned(self.held, batch, MetaPlan), cropped(batch).x
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        with torch.no_grad():
            logits = self.network(seen_x)
        seen = Outputs(logits, self.masked(logits, batch.t), batch.y, None, len(batch.y))
        params = self.params()
        losses = []
        for glance, order in enumerate(torch.from_numpy(orders).to(batch.y.device, torch.int64)):
            rates = {k: a.clone().requires_grad_() for k, a in restricted(self.rates.get(), params).items()}
            ordered = Batch(*(a[order] for a in (seen_x, batch.y, batch.t)))
            loss = self.meta_loss(ordered, drawn(self.held, batch, reads[glance], glance), rates)
            losses.append(loss.detach())
            weights = [*params.values(), *rates.values()]
            found = iter(torch.autograd.grad(loss, weights, materialize_grads=True))
            slope, rates_slope = (
                clip_by_norm({k: next(found) for k in params}, hparams.grad_clip_norm) for _ in range(2)
            )
            with torch.no_grad():
                if hparams.learn_lr:
                    rates = {k: a - hparams.lr_alpha * rates_slope[k] for k, a in rates.items()}
                    self.rates.set(rates if self.lifecycle.fitting else {})
                for k, after in inner_sgd_step(params, rates, slope).items():
                    if hparams.sync_update:
                        params[k].grad = slope[k]
                    else:
                        params[k].copy_(after)
            if glance == 0:
                self.remember(batch, seen)
            if glance < hparams.glances - 1:
                optimizer.optimizer.step()  # Lightning counts its own as a step each
        optimizer.step()
        return losses[0], seen.masked
