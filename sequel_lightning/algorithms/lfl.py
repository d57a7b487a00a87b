"""Less-forgetting learning (Jung et al. 2016, https://arxiv.org/abs/1607.00122).

    L = CE(f(x), y) + lambda_e/2 * mean_n ||h(x_n; theta) - h(x_n; theta_old)||^2          (eq. 3, lambda_c 1)

h is the last hidden layer, theta_old are the weights at the end of the last task, and x are samples of the
current task. The old network is in evaluation mode. The last layer, which decides on the features, stays as
the first task left it (`freeze_head`): no gradient, no weight decay, no part in the norm that clipping sees.

The network needs `features(x)`, the last hidden layer, and a last layer called `head`.

Mirror: sequel_flax/algorithms/lfl.py
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sequel_core.algorithms.lfl import LFLHParams
from sequel_core.stream.task import Batch
from sequel_lightning.module import ContinualModule
from sequel_lightning.networks import apply_head, check_features, evaluating, frozen_network
from sequel_lightning.trees import Params


class LFLState(NamedTuple):
    """What LFL remembers of past tasks."""

    anchor: Params  # theta_old, weights at the end of the last task
    statistics: Params  # running statistics of batch normalisation then; empty without
    learned: Tensor  # 1 once a task has ended, before that 0, shape ()


def feature_distance(features: Tensor, old: Tensor) -> Tensor:
    """Return 1/2 * mean_n ||h(x_n) - h_old(x_n)||^2 of features `[B, D]`, shape ()."""
    return 0.5 * (features - old).square().sum(1).mean()


class LFL(ContinualModule):
    """Less-forgetting learning.

    Raises:
        ValueError: a network without `features` or `head`.
    """

    hparams_class = LFLHParams
    has_penalty = True
    algorithm_hparams: LFLHParams
    net: Any
    learned: Tensor

    def check_net(self, net: nn.Module) -> None:
        """Raise ValueError if the network lacks `features` or `head`."""
        check_features(net, "lfl")

    def init_memory(self) -> None:
        """Start with a copy of the network; no task has been learned."""
        super().init_memory()
        self.old: Any = copy.deepcopy(self.net).requires_grad_(False)
        like = next(self.net.parameters())
        self.register_buffer("learned", torch.zeros((), dtype=like.dtype, device=like.device))

    @property
    def state(self) -> LFLState:
        """What is remembered of past tasks."""
        return LFLState(*frozen_network(self.old), self.learned)

    def objective(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return cross-entropy plus lambda_e times the distance of features, and the logits."""
        batch = self.trained_on(batch)
        x = self.normalise(batch.x)
        features = self.net.features(x)
        logits = self.masked(apply_head(self.net, features), batch.t)
        loss = self.loss(logits, batch)
        if self.learned > 0:
            with evaluating(self.old), torch.no_grad():
                old = self.old.features(x)
            loss = loss + self.added(self.algorithm_hparams.lfl_lambda * feature_distance(features, old))
        return loss, logits

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Take the gradient from the last layer, which clipping and the optimizer then pass over."""
        if self.algorithm_hparams.freeze_head and self.learned > 0:
            for p in self.net.head.parameters():
                p.grad = None

    def end_task(self, batches: Iterable[Batch]) -> None:
        """Keep the network."""
        self.old.load_state_dict(self.net.state_dict())
        self.learned.fill_(1)
