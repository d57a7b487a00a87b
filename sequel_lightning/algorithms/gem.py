"""Gradient episodic memory (Lopez-Paz & Ranzato 2017, https://arxiv.org/abs/1706.08840).

    g~ = g + sum_k v_k g_k  if g . g_k < 0 for a past task k, else g                          (eqs. 8 to 11)
    v = argmin_{v >= 0} 1/2 v^T A v + b^T v, plus margin;  A_jk = g_j . g_k, b_k = g . g_k

g is the gradient of the loss of the batch, and g_k that of a draw from the samples of past task k. The
projection comes before clipping and the optimizer. The minimum is found with an active set, as in the method
of Lawson and Hanson for nonnegative least squares.

The official code has `margin_rule="bound"`, v >= margin instead of an added margin, and `ridge=0.001`. Its
memory is a ring of the latest 256 samples of each task, and each g_k is of all of them. It writes a batch to
the memory before the step; here it is written after the step, which makes no difference to past tasks.

Mirror: sequel_flax/algorithms/gem.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from sequel_core.algorithms.gem import GEMHParams
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.memory import MemoryPlanner
from sequel_lightning.gradients import gradients
from sequel_lightning.replay import Outputs, ReplayModule, forward, mean_loss
from sequel_lightning.trees import Params

Array = NDArray[Any]


def project(gradient: Tensor, references: Tensor, hparams: GEMHParams) -> Tensor:
    """Return g~ `[P]` for g `[P]` and the gradients of past tasks `[T, P]`; 0 for a task without samples."""
    products = references @ references.T, references @ gradient
    gram, linear = (a.cpu().double().numpy() for a in products)
    weights = task_weights(gram, linear, hparams)
    return gradient + torch.from_numpy(weights).to(references) @ references if weights.any() else gradient


def task_weights(gram: Array, products: Array, hparams: GEMHParams) -> Array:
    """Return v `[T]`, 0 if no product is negative.

    `gram` are the products of the gradients of past tasks `[T, T]`, `products` those with g `[T]`.
    """
    margin = np.where(np.diag(gram) > 0, hparams.margin, 0)
    gram = gram + hparams.ridge * np.eye(len(gram), dtype=gram.dtype)
    shift = margin if hparams.margin_rule == "bound" else np.zeros_like(margin)
    weights = margin + solve_dual(gram, products + gram @ shift)
    return np.where((products < 0).any(), weights, 0)


def solve_dual(gram: Array, linear: Array) -> Array:
    """Return the v >= 0 that minimises 1/2 v^T A v + b^T v, `[T]`.

    `gram` is A, positive semidefinite `[T, T]`, `linear` is b `[T]`, in the range of A.
    """
    length = np.sqrt(np.diag(gram))
    inverse = np.where(length > 0, 1 / np.where(length > 0, length, 1), 0)
    eps = len(linear) * float(np.finfo(linear.dtype).eps)
    a = gram * inverse[:, None] * inverse[None] + eps * np.eye(len(linear), dtype=linear.dtype)
    b = linear * inverse
    tolerance = 10 * eps * np.abs(b).max()
    v, active, more = np.zeros_like(b), np.zeros(len(b), bool), np.asarray(True)
    for _ in range(5 * len(b)):
        if more:
            v, active, more = active_set_step(a, b, v, active, tolerance)
    return v * inverse


def active_set_step(
    a: Array, b: Array, v: Array, active: Array, tolerance: Array
) -> tuple[Array, Array, Array]:
    """Return v, the active set, bool `[T]`, and whether v may not be the minimum yet, after a step.

    v is feasible, and positive in the active set alone. It moves to the minimum over the active set, or until
    one of its numbers is 0, which leaves the set. At that minimum, the number with the steepest descent
    enters the set; of equal ones, the first.
    """
    size = len(b)
    both = active[:, None] & active[None]
    target = -np.linalg.solve(np.where(both, a, np.eye(size, dtype=b.dtype)), np.where(active, b, 0))
    blocked = active & (target <= 0)
    ratio = np.where(blocked, v / np.where(v > target, v - target, 1), np.inf)
    share = np.minimum(ratio.min(), 1)  # of the way to the target, until the first v_k is 0
    v = np.where(ratio > share, (1 - share) * v + share * target, 0)
    descent = np.where(active, -np.inf, -(a @ v + b))
    steepest = (np.arange(size) == descent.argmax()) & (descent.max() > tolerance)
    stopped = blocked.any()
    active = np.where(stopped, active & (v > 0), active | steepest)
    return v, active, np.where(stopped, share > 0, steepest.any())


def batch_loss(batch: Outputs, draws: Sequence[Outputs]) -> Tensor:
    """Return the mean loss of the batch alone, shape ()."""
    return mean_loss(batch)


class GEM(ReplayModule):
    """GEM; see `help(GEMHParams)` for its settings.

    If the Trainer accumulates gradients, the gradients of past tasks are those of the last draws.

    Example:
        >>> import torch
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import GEMHParams
        >>> from sequel_lightning import GEM, MLP
        >>> digits = RotatedDigits(num_tasks=2)
        >>> net = MLP(image_shape=digits.image_shape)
        >>> module = GEM(net, torch.optim.SGD, GEMHParams(mem_size=20), digits.spec)
        >>> module.memory_bytes()  # 20 images, labels and task indices
        1440
    """

    hparams_class = GEMHParams
    algorithm_hparams: GEMHParams
    draws_in_loss = False

    def make_planner(self, spec: StreamSpec) -> Any:
        """Return the planner, with a draw for each past task."""
        return MemoryPlanner(self.algorithm_hparams, spec, self.seed, per_task=True)

    def replay_loss(self, batch: Outputs, draws: Sequence[Outputs]) -> Tensor:
        """Return the training loss, shape ()."""
        return batch_loss(batch, draws)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Project the gradient before it is clipped."""
        past = [draw for draw in self.samples[1:] if len(draw.t)]
        if not past:
            return
        params, rows = self._trained_params, []
        for draw in past:
            with torch.enable_grad(), self.trainer.precision_plugin.forward_context(), self.ranks.divided():
                loss = mean_loss(*forward(self, [draw], together=True))
            rows.append(_flat(gradients(loss, params)[0]))
        gradient = _flat({k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in params.items()})
        projected = project(gradient, torch.stack(rows), self.algorithm_hparams)
        if projected is not gradient:
            sizes = [p.numel() for p in params.values()]
            for p, part in zip(params.values(), projected.split(sizes), strict=True):
                p.grad = part.reshape(p.shape)


def _flat(tree: Params) -> Tensor:
    """Return all arrays as one, `[P]`."""
    return torch.cat([a.reshape(-1) for a in tree.values()])
