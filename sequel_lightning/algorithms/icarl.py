"""iCaRL (Rebuffi, Kolesnikov, Sperl & Lampert 2017, https://arxiv.org/abs/1611.07725).

    L = mean_n 1/|S| sum_{c in S} BCE(sigmoid(f_c(x_n)), q_nc)                                  (algorithm 3)
    q_nc = sigmoid(f_old,c(x_n)) for c of past tasks that the current one lacks, else 1[y_n = c]
    y*(x) = argmin_c ||h(x) - mu_c||, mu_c the mean of the exemplars of class c                 (algorithm 1)

S are the classes seen so far. f_old is the network at the end of the last task, in evaluation mode. h is the
last hidden layer; h(x), h of each exemplar and mu_c are scaled to unit length (normalise_features).

A task trains on its samples and on all exemplars. A user-defined loop or loader has to join them
(`training_split`). At the end of the task, the mem_size exemplars are divided among the classes again. If
classes come back in later tasks, they are divided among the classes of each task. The sets of past classes
are shortened, and the exemplars of the new classes are chosen by herding (algorithms 4 and 5).

The nearest mean predicts between tasks. During a task, and for tasks that have not been trained, the last
layer predicts. Its accuracy between tasks is reported as `head`.

The official code corresponds to quota=ceil, outputs=all and flip=True. For CIFAR-100 it has mem_size=2000
and trains ResNet-32 with batches of 128, 70 epochs per task, SGD with momentum 0.9 and weight decay 1e-5.
For each task, the learning rate is 2.0, a fifth of it from epoch 49 on and a 25th of it from epoch 63 on.

The network needs a method `features(x)`, the last hidden layer, and a last layer called `head`.

Mirror: sequel_flax/algorithms/icarl.py
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sequel_core.algorithms.icarl import ICaRLHParams
from sequel_core.stream.task import Batch
from sequel_lightning.exemplars import ExemplarModule
from sequel_lightning.networks import call_network, evaluating, frozen_network
from sequel_lightning.replay import Memory, planned
from sequel_lightning.trees import Params


class ICaRLState(NamedTuple):
    """What iCaRL remembers of past tasks."""

    exemplars: Memory  # one set after the other from the first slot on, each in herding order
    old: Params  # theta_old, weights at the end of the last task
    statistics: Params  # running statistics of batch normalisation then; empty without batch normalisation
    means: Tensor  # mu [num_classes, D], 0 for a class without exemplars
    has_mean: Tensor  # whether a class has exemplars, bool [num_classes]
    learned: Tensor  # index of the last task that has ended, int32 (), -1 before the first


def targets(old: Tensor, y: Tensor, past: Tensor) -> Tensor:
    """Return q `[B, num_classes]` from the old network's logits, the labels and the past classes."""
    label = F.one_hot(y.long(), old.shape[1]).to(old.dtype)
    return torch.where(past, torch.sigmoid(old), label)


def sigmoid_loss(logits: Tensor, target: Tensor, outputs: Tensor) -> Tensor:
    """Return the mean binary cross-entropy over samples and the outputs that count `[num_classes]`."""
    losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return torch.where(outputs, losses, 0).sum(1).mean() / outputs.sum()


def training_loss(module: ICaRL, batch: Batch, hparams: ICaRLHParams) -> tuple[Tensor, Tensor]:
    """Return the training loss of a batch, shape (), and its logits `[B, num_classes]`."""
    seen = module.seen_classes()
    past = seen & ~module.task_classes()
    outputs = seen if hparams.outputs == "seen" else torch.ones_like(seen)
    logits = module.network(batch.x, batch.t)
    old = logits.detach()  # not used if there are no past classes
    if past.any():
        with evaluating(module.old), torch.no_grad():
            old = call_network(module.old, module.normalise(batch.x), module.task_argument(batch.t))
    loss = sigmoid_loss(logits, targets(old, batch.y, past), outputs)
    return loss, module.masked(logits, batch.t)


class ICaRL(ExemplarModule):
    """iCaRL; see `help(ICaRLHParams)` for its settings.

    Raises:
        ValueError: no spec; the network has no method `features` or no last layer `head`; `mem_size` is less
            than the number of classes.

    Example:
        >>> import torch
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import ICaRLHParams
        >>> from sequel_lightning import MLP, ICaRL
        >>> digits = RotatedDigits(num_tasks=2)
        >>> net = MLP(image_shape=digits.image_shape)
        >>> module = ICaRL(net, torch.optim.SGD, ICaRLHParams(mem_size=40), digits.spec)
        >>> int(module.state.has_mean.sum())  # no task has ended yet
        0
    """

    hparams_class = ICaRLHParams
    network_copies = ("old",)
    algorithm_hparams: ICaRLHParams

    def init_memory(self) -> None:
        """Start with no exemplars, and a copy of the network."""
        super().init_memory()
        self.old: Any = copy.deepcopy(self.net).requires_grad_(False)

    @property
    def state(self) -> ICaRLState:
        """What is remembered of past tasks."""
        old = frozen_network(self.old)
        return ICaRLState(self.contents, *old, self.means, self.has_mean, self.learned)

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the training loss of a batch, shape (), and its logits `[B, num_classes]`."""
        planned(self.contents, batch, tuple)  # checks the dtype of the images; needs no plan
        return training_loss(self, self.trained_on(batch), self.algorithm_hparams)

    def end_task(self, batches: Iterable[Batch]) -> None:
        """Divide the exemplars among the classes again, take their means, and keep the network."""
        super().end_task(batches)
        self.old.load_state_dict(self.net.state_dict())
