"""Less-forgetting learning (Jung et al. 2016, https://arxiv.org/abs/1607.00122).

    L = loss(f(x), y) + lambda_e/2 * mean_n ||h(x_n; theta) - h(x_n; theta_old)||^2        (eq. 3, lambda_c 1)

h is the last hidden layer, theta_old are the weights at the end of the last task, and x are samples of the
current task. The old network runs in evaluation mode. With `freeze_head`, the last layer does not change
after the first task: it gets no gradient and no weight decay, and gradient clipping does not count it.

The network needs a method `features(x)`, the last hidden layer, and a last layer called `head`. With `layer`,
h is the output of the layer of that name; `freeze_head` still needs `head`.

Mirror: sequel_flax/algorithms/lfl.py
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sequel_core.algorithms.lfl import LFLHParams
from sequel_core.stream.task import Batch
from sequel_lightning.module import ContinualModule
from sequel_lightning.networks import (
    check_head,
    check_layers,
    evaluating,
    features_of,
    frozen_network,
    outputs_and_features,
)
from sequel_lightning.trees import Params


class LFLState(NamedTuple):
    """What LFL remembers of past tasks."""

    anchor: Params  # theta_old, weights at the end of the last task
    statistics: Params  # running statistics of batch normalisation then; empty without batch normalisation
    learned: Tensor  # 1 after the end of the first task, 0 before, shape ()


def feature_distance(features: Tensor, old: Tensor) -> Tensor:
    """Return 1/2 * mean_n ||h(x_n) - h_old(x_n)||^2 of features `[B, ...]`, shape ()."""
    squares = (features - old) ** 2
    return 0.5 * squares.reshape(len(squares), -1).sum(1).mean()


def head_is_frozen(state: LFLState, hparams: LFLHParams) -> Tensor:
    """Return whether the last layer stays as it is, shape ()."""
    return (state.learned > 0) & hparams.freeze_head


@torch.no_grad()
def old_features(module: LFL, batch: Batch, layer: str | None) -> Any:
    """Return h of the old network, in evaluation mode."""
    with evaluating(module.old):
        return features_of(module.old, module.normalise(batch.x), module.task_argument(batch.t), layer)


def training_loss(module: LFL, batch: Batch, hparams: LFLHParams) -> tuple[Tensor, Any]:
    """Return the training loss of a batch, shape (), and what the network returned for it."""
    x, t = module.normalise(batch.x), module.task_argument(batch.t)
    outputs, h = module.pass_through(partial(outputs_and_features, module.net, layer=hparams.layer), x, t)
    outputs = module.masked(outputs, batch.t)
    loss = module.loss(outputs, batch)
    if module.learned > 0:
        distance = feature_distance(h, old_features(module, batch, hparams.layer))
        loss = loss + module.added(hparams.lfl_lambda * distance)
    return loss, outputs


class LFL(ContinualModule):
    """Less-forgetting learning; see `help(LFLHParams)` for its settings.

    Raises:
        ValueError: the network has no method `features`, no layer `layer`, or no last layer `head`, or the
            objective does not take what `head` returns.

    Example:
        >>> import torch
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import LFLHParams
        >>> from sequel_lightning import MLP, LFL
        >>> digits = RotatedDigits(num_tasks=2)
        >>> net = MLP(image_shape=digits.image_shape)
        >>> module = LFL(net, torch.optim.SGD, LFLHParams(lfl_lambda=0.5), digits.spec)
        >>> module(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """

    hparams_class = LFLHParams
    has_penalty = True
    network_copies = ("old",)
    algorithm_hparams: LFLHParams
    net: Any
    learned: Tensor

    def check_net(self, net: nn.Module) -> None:
        """Raise ValueError if the network lacks the layers that the settings name."""
        check_layers(net, self.algorithm_hparams)

    def init_memory(self) -> None:
        """Start with a copy of the network; no task has been learned."""
        super().init_memory()
        if self.algorithm_hparams.layer is None:
            check_head(self.net, self.spec, self.objective, "lfl")
        self.old: Any = copy.deepcopy(self.net).requires_grad_(False)
        like = next(self.net.parameters())
        self.register_buffer("learned", torch.zeros((), dtype=like.dtype, device=like.device))

    @property
    def state(self) -> LFLState:
        """What is remembered of past tasks."""
        return LFLState(*frozen_network(self.old), self.learned)

    def training_loss(self, batch: Batch) -> tuple[Tensor, Any]:
        """Return the training loss of a batch, shape (), and what the network returned for it."""
        return training_loss(self, self.trained_on(batch), self.algorithm_hparams)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Remove the gradient of a frozen last layer, so that clipping and the optimizer skip it."""
        if head_is_frozen(self.state, self.algorithm_hparams):
            self.net.head.zero_grad()

    def end_task(self, batches: Iterable[Batch]) -> None:
        """Keep a copy of the network."""
        self.old.load_state_dict(self.net.state_dict())
        self.learned.fill_(1)
