"""Synaptic intelligence (Zenke, Poole & Ganguli 2017, https://arxiv.org/abs/1703.04200).

    L = loss(f(x), y) + c * sum_i Omega_i (theta_i - theta*_i)^2                                     (eq. 4)
    omega_i = sum over the steps of a task of -g_i (theta_i after - theta_i before)                  (eq. 3)
    Omega_i <- Omega_i + omega_i / ((theta_i - theta*_i)^2 + xi) at its end; then theta* <- theta    (eq. 5)

g is the gradient of the loss alone, before clipping; with `path_gradient=total`, also that of the penalty.
The step is the optimizer's real step, with momentum, weight decay and clipping. theta* are the weights at the
start of the task; for the first task, the initial weights. The official code keeps Omega >= 0 (`clamp`). Its
Permuted MNIST accuracies (10 tasks, MLP 2000-2000, Adam 1e-3 that is not reset between tasks, batch 256, 20
epochs) have c = 0.1 and xi = 0.1. Its Split MNIST accuracies have c = 1, xi = 0.001 and reset the optimizer
for each task.

Mirror: sequel_flax/algorithms/si.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from sequel_core.algorithms.si import SIHParams
from sequel_core.stream.task import Batch
from sequel_lightning._compat import foreach_add, foreach_add_, foreach_mul_, foreach_sub
from sequel_lightning.gradients import quadratic_penalty
from sequel_lightning.module import ContinualModule
from sequel_lightning.trees import ParameterTree, Params, SumTree, restricted


class SIState(NamedTuple):
    """What SI remembers; all trees have the structure of the parameters."""

    anchor: Params  # theta*, weights at the start of the current task
    importance: Params  # Omega, all 0 before the end of the first task
    path: Params  # omega, the path integral of the current task


def accumulate_path_integral(path: Params, gradient: Params, before: Params, after: Params) -> Params:
    """Return omega after one more step: omega - g (after - before)."""
    names = list(path)
    change = foreach_sub([after[k].to(path[k].dtype) for k in names], [before[k] for k in names])
    foreach_mul_(change, [gradient[k] for k in names])
    foreach_add_(list(path.values()), change, alpha=-1)  # in place
    return path


def consolidate(params: Params, state: SIState, hparams: SIHParams) -> SIState:
    """Return the state at the end of a task: Omega with the importances of the task, and omega 0."""

    def add(total: Tensor, path: Tensor, p: Tensor, anchor: Tensor) -> Tensor:
        total = total + path / ((p.to(path.dtype) - anchor) ** 2 + hparams.xi)
        return total.clamp(min=0) if hparams.clamp else total

    importance = {k: add(state.importance[k], state.path[k], p, state.anchor[k]) for k, p in params.items()}
    return SIState(params, importance, {k: torch.zeros_like(path) for k, path in state.path.items()})


class SI(ContinualModule):
    """Synaptic intelligence; see `help(SIHParams)` for its settings.

    Example:
        >>> import torch
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import SIHParams
        >>> from sequel_lightning import MLP, SI
        >>> digits = RotatedDigits(num_tasks=2)
        >>> net = MLP(image_shape=digits.image_shape)
        >>> module = SI(net, torch.optim.SGD, SIHParams(si_lambda=0.1), digits.spec)
        >>> sorted(module.state.importance)
        ['dense_0.bias', 'dense_0.weight', 'dense_1.bias', 'dense_1.weight', 'head.bias', 'head.weight']
    """

    hparams_class = SIHParams
    has_penalty = True
    path_integrals = ("path",)
    algorithm_hparams: SIHParams

    def init_memory(self) -> None:
        """Start with the anchor at the initial weights and zero importances."""
        super().init_memory()
        self.strength = 2 * self.algorithm_hparams.si_lambda
        self.anchor = ParameterTree(self.params(), torch.clone)
        self.importance, self.path = (SumTree(self.params()) for _ in range(2))
        self._gradient: Params = {}  # of the path integral, at the current step
        self._penalty_gradient: Params = {}  # without its factor, at the current weights

    @property
    def state(self) -> SIState:
        """What is remembered of past tasks and of the current one."""
        return SIState(self.anchor.get(), self.importance.get(), self.path.get())

    def start_task(self) -> None:
        """Set the anchor to the weights at the start of the task."""
        self.anchor.set(self.frozen_params())

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the mean loss plus the penalty, shape (); only the mean loss has a gradient here."""
        with torch.no_grad():
            params = self._trained_params or self.params()
            value, self._penalty_gradient = self._penalty(params)
        return super().loss(outputs, batch) + self.added(self.strength * value)

    def _penalty(self, params: Params) -> tuple[Tensor, Params]:
        """Return the penalty without its factor, shape (), and its gradient."""
        trees = (restricted(tree.get(), params).values() for tree in (self.anchor, self.importance))
        value, gradient = quadratic_penalty(list(params.values()), *map(list, trees))
        return value, dict(zip(params, gradient, strict=True))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Add the gradient of the penalty, before clipping; store the gradient of the path integral."""
        params = {k: p for k, p in self._trained_params.items() if p.grad is not None}
        loss_gradient: Params = {k: p.grad for k, p in params.items() if p.grad is not None}
        with torch.no_grad():
            of_penalty = self._penalty_gradient or self._penalty(params)[1]
            total = foreach_add(
                list(loss_gradient.values()), [of_penalty[k] for k in params], alpha=self.strength
            )
        for p, gradient in zip(params.values(), total, strict=True):
            p.grad = gradient.to(p.dtype)  # the loss gradient itself is kept
        self._penalty_gradient = {}
        if self.algorithm_hparams.path_gradient == "total":
            loss_gradient = {k: p.grad.clone() for k, p in params.items() if p.grad is not None}
        self._gradient = loss_gradient

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Take the optimizer's step and add it to the path."""
        before = {k: p.detach().clone() for k, p in self._trained_params.items()}
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.lifecycle.fitting:
            path = restricted(self.path.get(), self._gradient)
            after = {k: p.detach() for k, p in self._trained_params.items()}
            accumulate_path_integral(path, self._gradient, before, after)

    def end_task(self, batches: Iterable[Batch]) -> None:
        """Add the importances of the task, and set the anchor to the weights at its end."""
        params = self.frozen_params()
        past = SIState(*(restricted(tree, params) for tree in self.state))
        state = consolidate(params, past, self.algorithm_hparams)
        for tree, tensors in zip((self.anchor, self.importance, self.path), state, strict=True):
            tree.set(tensors)
