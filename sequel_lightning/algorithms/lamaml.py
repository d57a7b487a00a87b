"""La-MAML, look-ahead meta-learning (Gupta, Yadav & Paull 2020, https://arxiv.org/abs/2007.13904).

Each batch gets several updates, called glances. A glance first takes K inner steps from theta on the batch
alone. It then updates theta and the learning rates alpha by the gradient of the loss on the batch and a draw
from the memory, averaged over the inner steps:

    theta'_k = theta'_{k-1} - relu(alpha) * grad loss(part k of the batch; theta'_{k-1})         (algorithm 2)
    M = 1/K sum_k loss(batch and draw; theta'_k)                                                       (eq. 2)
    alpha <- alpha - eta dM/dalpha; then theta <- theta - relu(alpha) * dM/dtheta                      (eq. 7)

alpha has one learning rate for each weight; eta is `lr_alpha`. Variants:

- `second_order=False`: the inner gradients are constants.
- `sync_update`: the optimizer moves theta. Otherwise the optimizer is not used.
- `learn_lr=False`: alpha does not change (C-MAML).

The batch is written to the memory in its first glance only. The published RotatedMNIST accuracy (77.42, 20
tasks of 1,000 samples, MLP 100-100, memory 200, batch and draw of 10, 5 glances, eta 0.3, alpha 0.15 at
first, one inner step per sample) is first-order. Its code computes clipped inner gradients but does not use
them (`inner_clip`).

Mirror: sequel_flax/algorithms/lamaml.py
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sequel_core.algorithms.lamaml import LaMAMLHParams, MetaPlan, MetaPlanner
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.task import Batch
from sequel_lightning.augmentation import cropped
from sequel_lightning.batches import joined, pieces, rows
from sequel_lightning.gradients import check_functional_call, clip_by_norm, functional_network, gradients
from sequel_lightning.networks import check_no_batch_stats
from sequel_lightning.quadratic import Model
from sequel_lightning.replay import (
    Memory,
    ReplayBatch,
    ReplayModule,
    drawn,
    mean_loss,
    one_pass,
    planned,
)
from sequel_lightning.trees import ParameterTree, Params, restricted, tree_map


class LaMAMLState(NamedTuple):
    """What La-MAML keeps."""

    memory: Memory  # samples of the stream
    rates: Params  # alpha, in the structure of the parameters


def with_draw(batch: Batch, draw: ReplayBatch) -> ReplayBatch:
    """Return the batch and, after it, a draw from the memory."""
    x, y, t, _ = joined([batch, draw])
    return ReplayBatch(x, y, t, None, len(batch.t) + draw.count)


def inner_sgd_step(params: Params, rates: Params, gradient: Params) -> Params:
    """Return theta - relu(alpha) * gradient."""
    return tree_map(lambda p, a, g: p - F.relu(a) * g, params, rates, gradient)


def clip_by_value(gradient: Params, bound: float | None) -> Params:
    """Return the gradient with all values in [-bound, bound]; unchanged if `bound` is None."""
    return gradient if bound is None else tree_map(lambda g: g.clamp(-bound, bound), gradient)


def sample_loss(params: Params, model: Model, samples: ReplayBatch) -> Tensor:
    """Return the mean loss of samples at the weights given, in training mode, shape ()."""

    def network(x: Any, t: Tensor) -> Any:
        return functional_network(model.net, params, model.normalise(x), model.task_argument(t))

    (outputs,) = one_pass(model, [samples], network)
    return mean_loss(outputs)


def meta_loss(
    params: Params, rates: Params, model: Model, batch: Batch, draw: ReplayBatch, hparams: LaMAMLHParams
) -> Tensor:
    """Return M, shape ().

    Args:
        params: theta, where the inner steps start.
        rates: alpha.
        model: the network; in Flax with the number of the first pass.
        batch: in the order in which the inner steps read it.
        draw: from the memory.
        hparams: settings.
    """
    fast, losses, meta = params, [], with_draw(batch, draw)
    count = hparams.check_parts(len(batch.t))
    for part in pieces(batch, len(batch.t) // count):
        current = ReplayBatch(*part[:3], None, len(part.t))
        (gradient,) = gradients(sample_loss(fast, model, current), fast, create_graph=hparams.second_order)
        fast = inner_sgd_step(fast, rates, clip_by_value(gradient, hparams.inner_clip))
        losses.append(sample_loss(fast, model, meta))
    return torch.stack(losses).mean()


def rates_step(rates: Params, gradient: Params, hparams: LaMAMLHParams) -> Params:
    """Return alpha after a step of gradient descent; unchanged for C-MAML."""
    if not hparams.learn_lr:
        return rates
    gradient = clip_by_norm(gradient, hparams.grad_clip_norm)
    return tree_map(lambda a, g: a - hparams.lr_alpha * g, rates, gradient)


def glance(
    params: Params, rates: Params, model: Model, batch: Batch, draw: ReplayBatch, hparams: LaMAMLHParams
) -> tuple[Tensor, Params, Params]:
    """Return M, its clipped gradient by theta, and alpha after its step; see `meta_loss`."""
    rates = tree_map(lambda a: a.clone().requires_grad_(), rates)
    loss = meta_loss(params, rates, model, batch, draw, hparams)
    gradient, rates_gradient = gradients(loss, params, rates)
    with torch.no_grad():
        rates = rates_step(rates, rates_gradient, hparams)
        return loss.detach(), clip_by_norm(gradient, hparams.grad_clip_norm), rates


class LaMAML(ReplayModule):
    """La-MAML; see `help(LaMAMLHParams)` for its settings.

    It takes its steps itself, and a batch counts as one step of the Trainer.

    Example:
        >>> import torch
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import LaMAMLHParams
        >>> from sequel_lightning import MLP, LaMAML
        >>> digits = RotatedDigits(num_tasks=2)
        >>> net = MLP(image_shape=digits.image_shape)
        >>> module = LaMAML(net, torch.optim.SGD, LaMAMLHParams(mem_size=20, alpha_init=0.1), digits.spec)
        >>> round(float(module.state.rates["head.bias"].mean()), 3)
        0.1
    """

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
        """Return the planner: each glance has a draw from the memory and an order of the batch."""
        return MetaPlanner(self.algorithm_hparams, spec, self.seed)

    @property
    def state(self) -> LaMAMLState:
        """The memory and the rates."""
        return LaMAMLState(self.contents, self.rates.get())

    def training_loss(self, batch: Batch) -> tuple[Tensor, Any]:
        """Take all glances at a batch; return M of the first, and the batch's outputs before it."""
        if not self._checked:
            check_functional_call(self, batch.x, batch.t)
            self._checked = True
        hparams, batch = self.algorithm_hparams, self.planned(batch)
        (_, reads, orders, _), x = planned(self.contents, batch, MetaPlan), cropped(batch).x
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        with torch.no_grad():
            outputs = self.network(x, batch.t)
        params, losses = self.params(), []
        for k, order in enumerate(torch.from_numpy(orders).to(batch.t.device, torch.int64)):
            ordered = rows(batch._replace(x=x), order)
            draw, rates = drawn(self.contents, batch, reads[k], k), restricted(self.rates.get(), params)
            loss, gradient, rates = glance(params, rates, self, ordered, draw, hparams)
            losses.append(loss)
            with torch.no_grad():
                if hparams.learn_lr and self.lifecycle.fitting:
                    self.rates.set(rates)
                for name, after in inner_sgd_step(params, rates, gradient).items():
                    if hparams.sync_update:
                        params[name].grad = gradient[name]
                    else:
                        params[name].copy_(after)
            if k == 0:
                self.write_batch(batch, outputs)
            if k < hparams.glances - 1:
                optimizer.optimizer.step()  # Lightning would count `optimizer.step` as a step
        optimizer.step()
        return losses[0], self.masked(outputs, batch.t)
