"""Averaged gradient episodic memory (Chaudhry et al. 2019, https://arxiv.org/abs/1812.00420).

    g <- g - (g . g_ref / g_ref . g_ref) g_ref  if g . g_ref < 0, else g                             (eq. 11)

g is the gradient of the batch's cross-entropy and g_ref that of a draw from the samples of past tasks;
without any, in the first task, g stays as it is. The projection comes before clipping and the optimizer. The
ring of the official code is written while a task is trained on and read from the next one on; its sizes are
25 (MNIST) or 13 (CIFAR) samples of each class and task, 256 a draw. RotatedMNIST (55.3, MC-SGD paper) has one
sample of each class and task, all of which are drawn.

Mirror: sequel_flax/algorithms/agem.py
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from sequel_core.algorithms.agem import AGEMHParams
from sequel_core.stream.task import Batch
from sequel_lightning.replay import Outputs, ReplayBatch, ReplayModule, draws, forward, mean_cross_entropy
from sequel_lightning.trees import Params


def project(gradient: Params, reference: Params) -> Params:
    """Return the gradient without its part against the reference; a zero reference changes nothing."""
    along, norm = dot(gradient, reference), dot(reference, reference)
    if not (along < 0 and norm > 0):  # a tiny reference's norm rounds to 0
        return gradient
    factor = along / norm
    return {k: torch.addcmul(g, factor, reference[k], value=-1) for k, g in gradient.items()}


def dot(a: Params, b: Params) -> Tensor:
    """Return the inner product over all parameters, shape ()."""
    return torch.stack([torch.dot(a[k].flatten(), x.flatten()) for k, x in b.items()]).sum()


def batch_loss(batch: Outputs, draws: Sequence[Outputs]) -> Tensor:
    """Return the cross-entropy of the batch alone, shape ()."""
    return mean_cross_entropy(batch)


class AGEM(ReplayModule):
    """A-GEM; where the Trainer accumulates gradients, the draw of the last batch is the reference."""

    hparams_class = AGEMHParams
    algorithm_hparams: AGEMHParams
    past_only = True
    _past: ReplayBatch | None = None  # the latest draw

    def objective(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of the batch and its logits; then write the batch."""
        batch = self.planned(batch)
        own, self._past = draws(self.held, batch)
        (seen,) = forward(self, [own], together=True)
        loss = self.replay_loss(seen, [])
        self.remember(batch, seen)
        return loss, seen.masked

    def replay_loss(self, batch: Outputs, draws: Sequence[Outputs]) -> Tensor:
        """Return the training loss, shape ()."""
        return batch_loss(batch, draws)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Project the gradient, before clipping."""
        if self._past is None or not len(self._past.y):
            return
        params = self._trained_params
        gradient = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in params.items()}
        with torch.enable_grad(), self.trainer.precision_plugin.forward_context():
            loss = mean_cross_entropy(*forward(self, [self._past], together=True))
        found = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
        projected = project(gradient, dict(zip(params, found, strict=True)))
        if projected is not gradient:
            for k, p in params.items():
                p.grad = projected[k]
