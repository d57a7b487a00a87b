"""Learning without forgetting (Li & Hoiem 2016, https://arxiv.org/abs/1606.09282), and LwF.MC.

    L = loss(f(x), y) - lwf_lambda * mean_n sum_c q_nc log p_nc                                    (eq. 2, 3)
    p = softmax(f(x) / T), q = softmax(f_old(x) / T), over the classes of past tasks

f_old is the network at the end of the last task, in evaluation mode, and x are samples of the current task.
In the task scenario each past task has a softmax of its own, and their losses are added. With
`distillation="distance"` the second term is lwf_lambda * mean_n ||f(x_n) - f_old(x_n)||^2, for any objective.

`distillation="sigmoid"` is LwF.MC (Rebuffi et al. 2017, https://arxiv.org/abs/1611.07725): iCaRL's loss
without exemplars, the mean binary cross-entropy over the classes seen. The targets are sigmoid(f_old(x)) for
past classes and labels for those of the task.

The paper records f_old(x) once, before the task. The numbers are the same as those of the previous network,
which is kept instead. Augmentation makes a difference: `old_outputs="recorded"` takes the samples as they
are, `"recomputed"` the augmented ones. The paper's warm-up, which first trains new outputs, is left out.

Mirror: sequel_flax/algorithms/lwf.py
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sequel_core.algorithms.lwf import LwFHParams
from sequel_core.stream.task import Batch
from sequel_lightning.algorithms.icarl import sigmoid_loss, targets
from sequel_lightning.module import ContinualModule
from sequel_lightning.networks import call_network, evaluating, frozen_network
from sequel_lightning.objectives import Objective, check_classification, output_leaf
from sequel_lightning.preprocessing import mask_logits
from sequel_lightning.trees import Params


class LwFState(NamedTuple):
    """What LwF remembers of past tasks."""

    old: Params  # theta_old, weights at the end of the last task
    statistics: Params  # running statistics of batch normalisation then; empty without batch normalisation
    learned: Tensor  # 1 after the end of the first task, 0 before, shape ()


def softmax_distillation(logits: Tensor, old: Tensor, heads: Tensor, temperature: float) -> Tensor:
    """Return the sum over heads of -mean_n sum_c q_nc log p_nc, shape ().

    `logits` and `old` are `[B, num_classes]`, `heads` the classes of each softmax, bool `[K, num_classes]`. A
    head without classes counts 0. The gradient is exactly 0 for equal logits.
    """
    classes = heads[:, None]
    log_p, log_q = (F.log_softmax(mask_logits(z[None] / temperature, classes), -1) for z in (logits, old))
    p, q = torch.exp(log_p), torch.exp(log_q)
    terms = p - q - q * log_p  # p - q has the sum 0; with it, the gradient of each term is 0 for p = q
    return torch.where(classes, terms, 0).sum() / len(logits)


def output_distance(outputs: Tensor, old: Tensor) -> Tensor:
    """Return mean_n ||f(x_n) - f_old(x_n)||^2 of outputs `[B, ...]`, shape ()."""
    squares = (outputs - old) ** 2
    return squares.reshape(len(squares), -1).sum(1).mean()


def past_heads(classes: Tensor, task: Tensor, separate: bool) -> Tensor:
    """Return the classes that have a softmax together, bool `[K, num_classes]`.

    These are the classes of each past task if `separate`, else the classes of all past tasks together.
    `classes` are those of each task, bool `[T, num_classes]`, `task` is the index of the current task.
    """
    past = classes & (torch.arange(len(classes), device=classes.device)[:, None] < task)
    return past if separate else past.any(0, keepdim=True)


@torch.no_grad()
def old_outputs(module: LwF, x: Any, t: Tensor) -> Any:
    """Return the outputs of the old network, in evaluation mode."""
    with evaluating(module.old):
        return call_network(module.old, module.normalise(x))


def training_loss(module: LwF, batch: Batch, x_old: Any, hparams: LwFHParams) -> tuple[Tensor, Any]:
    """Return the training loss of a batch, shape (), and what the network returned for it.

    `x_old` are the inputs of the old network.
    """
    outputs = module.network(batch.x, batch.t)
    masked = module.masked(outputs, batch.t)
    distillation = hparams.resolved(module.objective.classification)
    if distillation == "sigmoid":
        seen, logits = module.seen_classes(), output_leaf(outputs)
        past = seen & ~module.task_classes()
        old = output_leaf(old_outputs(module, x_old, batch.t)) if past.any() else logits.detach()
        return sigmoid_loss(logits, targets(old, batch.y, past), seen), masked
    loss = module.loss(masked, batch)
    if module.learned > 0:
        old = output_leaf(old_outputs(module, x_old, batch.t), hparams.output)
        new = output_leaf(outputs, hparams.output)
        if distillation == "softmax":
            heads = past_heads(module.classes, module.task_index, module.preprocessing.mask is not None)
            penalty = softmax_distillation(new, old, heads, hparams.temperature)
        else:
            penalty = output_distance(new, old)
        loss = loss + module.added(hparams.lwf_lambda * penalty)
    return loss, masked


class LwF(ContinualModule):
    """Learning without forgetting; see `help(LwFHParams)` for its settings.

    Raises:
        ValueError: softmax or sigmoid outputs without class labels or without a spec; the network takes the
            task, or does not return the array `output`.

    Example:
        >>> import torch
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import LwFHParams
        >>> from sequel_lightning import MLP, LwF
        >>> digits = RotatedDigits(num_tasks=2)
        >>> net = MLP(image_shape=digits.image_shape)
        >>> module = LwF(net, torch.optim.SGD, LwFHParams(lwf_lambda=0.5), digits.spec)
        >>> module(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """

    hparams_class = LwFHParams
    has_penalty = True
    network_copies = ("old",)
    algorithm_hparams: LwFHParams
    net: Any
    learned: Tensor

    def check_objective(self, objective: Objective) -> None:
        """Raise ValueError if the distillation needs class labels and the objective has none."""
        super().check_objective(objective)
        if self.algorithm_hparams.resolved(objective.classification) != "distance":
            check_classification(objective, f"distillation={self.algorithm_hparams.distillation} of lwf")

    def init_memory(self) -> None:
        """Start with a copy of the network; no task has been learned."""
        super().init_memory()
        if self.gives_task:
            raise ValueError(
                "lwf has one pass for the outputs of all tasks, so it cannot train a network that takes "
                f"the task, got {type(self.net).__name__}.forward(x, t); use a network without t, or another "
                "method, such as ewc"
            )
        if self.algorithm_hparams.resolved(self.objective.classification) != "distance":
            self.seen_classes()  # an error without a spec
        elif self.spec is not None:
            self.blank_output(self.algorithm_hparams.output)
        self.old: Any = copy.deepcopy(self.net).requires_grad_(False)
        like = next(self.net.parameters())
        self.register_buffer("learned", torch.zeros((), dtype=like.dtype, device=like.device))

    @property
    def state(self) -> LwFState:
        """What is remembered of past tasks."""
        return LwFState(*frozen_network(self.old), self.learned)

    @property
    def classes(self) -> Any:
        """The classes of each task, bool `[T, num_classes]`."""
        return self.preprocessing.classes

    def training_loss(self, batch: Batch) -> tuple[Tensor, Any]:
        """Return the training loss of a batch, shape (), and what the network returned for it."""
        augmented = self.trained_on(batch)
        x_old = batch.x if self.algorithm_hparams.old_outputs == "recorded" else augmented.x
        return training_loss(self, augmented, x_old, self.algorithm_hparams)

    def end_task(self, batches: Iterable[Batch]) -> None:
        """Keep a copy of the network."""
        self.old.load_state_dict(self.net.state_dict())
        self.learned.fill_(1)
