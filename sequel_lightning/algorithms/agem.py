"""Averaged gradient episodic memory (Chaudhry et al. 2019, https://arxiv.org/abs/1812.00420).

    g <- g - (g . g_ref / g_ref . g_ref) g_ref  if g . g_ref < 0, else g                             (eq. 11)

g is the gradient of the loss of the batch. g_ref is that of a draw from samples of past tasks; in
the first task there are none, and g stays as it is. The projection comes before clipping and the optimizer.
The memory of the official code is a ring, which is written during a task and read from the next task on. Its
sizes are 25 (MNIST) or 13 (CIFAR) samples for each class and task, and draws of 256. RotatedMNIST (55.3,
MC-SGD paper) has one sample for each class and task, and draws all of them.

Mirror: sequel_flax/algorithms/agem.py
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from sequel_core.algorithms.agem import AGEMHParams
from sequel_lightning.gradients import gradients
from sequel_lightning.replay import Outputs, ReplayModule, forward, mean_loss
from sequel_lightning.trees import Params, tree_map


def project(gradient: Params, reference: Params) -> Params:
    """Return the gradient without its component against the reference; 0 as a reference changes nothing."""
    along, norm = dot(gradient, reference), dot(reference, reference)
    if not (along < 0 and norm > 0):  # the norm of a tiny reference rounds to 0
        return gradient
    factor = along / norm
    return tree_map(lambda g, r: torch.addcmul(g, factor, r, value=-1), gradient, reference)


def dot(a: Params, b: Params) -> Tensor:
    """Return the inner product over all parameters, shape ()."""
    return torch.stack([torch.dot(a[k].flatten(), x.flatten()) for k, x in b.items()]).sum()


def batch_loss(batch: Outputs, draws: Sequence[Outputs]) -> Tensor:
    """Return the mean loss of the batch alone, shape ()."""
    return mean_loss(batch)


class AGEM(ReplayModule):
    """A-GEM; see `help(AGEMHParams)` for its settings.

    If the Trainer accumulates gradients, the reference is the gradient of the last draw.

    Example:
        >>> import torch
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import AGEMHParams
        >>> from sequel_lightning import MLP, AGEM
        >>> digits = RotatedDigits(num_tasks=2)
        >>> net = MLP(image_shape=digits.image_shape)
        >>> module = AGEM(net, torch.optim.SGD, AGEMHParams(mem_size=20, mem_batch_size=10), digits.spec)
        >>> module.memory_bytes()  # 20 images, labels and task indices
        1440
    """

    hparams_class = AGEMHParams
    algorithm_hparams: AGEMHParams
    past_only = True
    draws_in_loss = False

    def replay_loss(self, batch: Outputs, draws: Sequence[Outputs]) -> Tensor:
        """Return the training loss, shape ()."""
        return batch_loss(batch, draws)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Project the gradient before it is clipped."""
        past = self.samples[1:]
        if not past or not len(past[0].t):
            return
        params = self._trained_params
        gradient = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in params.items()}
        with torch.enable_grad(), self.trainer.precision_plugin.forward_context(), self.ranks.divided():
            loss = mean_loss(*forward(self, past, together=True))
        (reference,) = gradients(loss, params)
        projected = project(gradient, reference)
        if projected is not gradient:
            for k, p in params.items():
                p.grad = projected[k]
