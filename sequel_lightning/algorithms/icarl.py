"""iCaRL (Rebuffi, Kolesnikov, Sperl & Lampert 2017, https://arxiv.org/abs/1611.07725).

    L = mean_n 1/|S| sum_{c in S} BCE(sigmoid(f_c(x_n)), q_nc)                                  (algorithm 3)
    q_nc = sigmoid(f_old,c(x_n)) for c of past tasks that the current one lacks, else 1[y_n = c]
    y*(x) = argmin_c ||h(x) - mu_c||, mu_c the mean of the exemplars of class c                 (algorithm 1)

S are the classes seen so far, f_old is the network at the end of the last task, in evaluation mode, and h the
last hidden layer; h(x), that of each exemplar, and mu_c have unit length. A task trains on its samples and on
all exemplars; a loop or loader of one's own joins them itself (`training_split`). At its end the mem_size
exemplars are shared out anew among the classes, or classes of each task where they come back: past sets are
cut, the task's are chosen by herding (algorithms 4 and 5). Within a task, and of tasks to come, the last
layer predicts; otherwise its accuracy is reported beside, as `head`.

The official code has quota=ceil, outputs=all and flip=True. For CIFAR-100 it keeps mem_size=2000 and trains
ResNet-32 with batches of 128, 70 epochs a task, SGD with momentum 0.9, weight decay 1e-5 and a learning rate
of 2.0, a fifth of it from epoch 49 and a 25th from epoch 63 on, anew for each task.

The network needs `features(x)`, the last hidden layer, and a last layer called `head`.

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
from sequel_lightning.networks import evaluating, frozen_network
from sequel_lightning.replay import Memory, planned
from sequel_lightning.trees import Params


class ICaRLState(NamedTuple):
    """What iCaRL remembers of past tasks."""

    exemplars: Memory  # set after set from the first slot on, each in herding order
    old: Params  # theta_old, weights at the end of the last task
    statistics: Params  # running statistics of batch normalisation then; empty without
    means: Tensor  # mu [num_classes, D], 0 for a class without exemplars
    has_mean: Tensor  # whether a class has exemplars, bool [num_classes]
    learned: Tensor  # index of the last task that has ended, int32 (), -1 before the first
    classes: Tensor  # of each task, bool [T, num_classes]


def seen_and_past(classes: Tensor, task: int) -> tuple[Tensor, Tensor]:
    """Return the classes seen up to a task, and those of them that it lacks, bool `[num_classes]` each."""
    seen = classes[: task + 1].any(0)
    return seen, seen & ~classes[task]


def targets(old: Tensor, y: Tensor, past: Tensor) -> Tensor:
    """Return q `[B, num_classes]` from the old network's logits, the labels and the past classes."""
    label = F.one_hot(y.long(), old.shape[1]).to(old.dtype)
    return torch.where(past, old.sigmoid(), label)


def sigmoid_loss(logits: Tensor, target: Tensor, outputs: Tensor) -> Tensor:
    """Return the mean binary cross-entropy over samples and the outputs that count `[num_classes]`."""
    losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return losses.where(outputs, 0).sum(1).mean() / outputs.sum()


class ICaRL(ExemplarModule):
    """iCaRL.

    Raises:
        ValueError: without a spec, a network without `features` or `head`, or fewer exemplars than classes.
    """

    hparams_class = ICaRLHParams
    algorithm_hparams: ICaRLHParams

    def init_memory(self) -> None:
        """Start with no exemplars, and a copy of the network."""
        super().init_memory()
        self.old: Any = copy.deepcopy(self.net).requires_grad_(False)

    @property
    def state(self) -> ICaRLState:
        """What is remembered of past tasks."""
        old = frozen_network(self.old)
        return ICaRLState(self.held, *old, self.means, self.has_mean, self.learned, self.classes)

    def objective(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the binary cross-entropy with labels and the old network's outputs, and the logits."""
        planned(self.held, batch, tuple)  # any plan will do; refuses images of another dtype
        batch = self.trained_on(batch)
        task = self.lifecycle.current_index()
        seen, past = seen_and_past(self.classes, task)
        outputs = seen if self.algorithm_hparams.outputs == "seen" else torch.ones_like(seen)
        logits = self.network(batch.x)
        old = logits.detach()
        if past.any():
            with evaluating(self.old), torch.no_grad():
                old = self.old(self.normalise(batch.x))
        return sigmoid_loss(logits, targets(old, batch.y, past), outputs), self.masked(logits, batch.t)

    def end_task(self, batches: Iterable[Batch]) -> None:
        """Share out the exemplars anew, take their means, and keep the network."""
        super().end_task(batches)
        self.old.load_state_dict(self.net.state_dict())
