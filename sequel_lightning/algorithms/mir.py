"""Maximally interfered retrieval (Aljundi et al. 2019, https://arxiv.org/abs/1908.04742).

    L = mean loss over B_n and B_M together, B_n the batch                                       (algorithm 1)
    B_M = the mem_batch_size candidates with the largest s(x) = l(x; theta_v) - l(x; theta)
    theta_v = theta - lr * gradient of the mean loss of B_n

The candidates are a draw from the memory. Their losses and the virtual step to theta_v are computed in
evaluation mode, and lr is the learning rate of the optimizer, or virtual_lr. Of candidates with equal s(x),
the first in the memory are replayed. They keep the order of the draw, so MIR is ER if all are replayed.

The official code adds the two mean losses (`loss="sum"`), scores in training mode, and does not replay
samples of the current task.

Mirror: sequel_flax/algorithms/mir.py
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from sequel_core.algorithms.mir import MIRHParams
from sequel_core.stream.task import Batch
from sequel_core.stream.trees import tree_map
from sequel_lightning.gradients import gradients, holding, native_rnn
from sequel_lightning.networks import evaluating
from sequel_lightning.objectives import mean_of_batch, sample_losses, weight_of
from sequel_lightning.replay import Outputs, ReplayBatch, ReplayModule, mean_loss


def replay_loss(batch: Outputs, draws: Sequence[Outputs], hparams: MIRHParams) -> Tensor:
    """Return the mean loss of the batch and the replayed samples together, or the sum of both, shape ()."""
    return mean_loss(batch, *draws) if hparams.loss == "mean" else mean_loss(batch) + mean_loss(*draws)


def interference(module: MIR, batch: ReplayBatch, candidates: ReplayBatch, rate: Any) -> Tensor:
    """Return how much a step on the batch raises the loss of each candidate, `[C]`."""
    samples, past = Batch(*batch[:3]), Batch(*candidates[:3])
    with evaluating(module), native_rnn(module.net):
        params = module.params()
        loss = mean_of_batch(module.objective, lambda x: module(x, samples.t), samples)
        (gradient,) = gradients(loss, params)
        with torch.no_grad():
            virtual = {k: p - rate * gradient[k] for k, p in params.items()}
            before = sample_losses(module.objective, lambda x: module(x, past.t), past)
            with holding(module, virtual):
                after = sample_losses(module.objective, lambda x: module(x, past.t), past)
    return after - before


def most_interfered(candidates: ReplayBatch, scores: Tensor, count: int) -> ReplayBatch:
    """Return the candidates with the largest scores `[C]`, in their order; of equal ones, the first."""
    best = torch.sort(scores, descending=True, stable=True).indices[:count]
    kept = torch.sort(best).values
    x, y, t = (tree_map(itemgetter(kept), tree) for tree in candidates[:3])
    return ReplayBatch(x, y, t, None, len(kept))


class MIR(ReplayModule):
    """Maximally interfered retrieval; see `help(MIRHParams)` for its settings.

    Example:
        >>> import torch
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import MIRHParams
        >>> from sequel_lightning import MLP, MIR
        >>> digits = RotatedDigits(num_tasks=2)
        >>> net = MLP(image_shape=digits.image_shape)
        >>> module = MIR(net, torch.optim.SGD, MIRHParams(mem_size=20, num_candidates=15), digits.spec)
        >>> module.memory_bytes()  # 20 images, labels and task indices
        1440
    """

    hparams_class = MIRHParams
    algorithm_hparams: MIRHParams

    def init_memory(self) -> None:
        """Make the empty memory."""
        super().init_memory()
        self.together = self.algorithm_hparams.loss == "mean"

    def chosen(self, samples: list[ReplayBatch]) -> list[ReplayBatch]:
        """Return the batch, and the candidates that the step replays."""
        (batch, candidates), hparams = samples, self.algorithm_hparams
        if not len(candidates.t):
            return samples
        rate = hparams.virtual_lr or self.trainer.optimizers[0].param_groups[0]["lr"]
        scores = interference(self, batch, candidates, rate)
        return [batch, most_interfered(candidates, scores, hparams.mem_batch_size)]

    def replay_loss(self, batch: Outputs, draws: Sequence[Outputs]) -> Tensor:
        """Return the training loss, shape ()."""
        return replay_loss(batch, draws, self.algorithm_hparams)

    def loss_weight(self, batch: Batch) -> Any:
        """Return the weight of the training loss, shape ()."""
        samples = self.samples if self.together else self.samples[:1]
        return sum(weight_of(self.objective, Batch(*s[:3]), s.count) for s in samples)
