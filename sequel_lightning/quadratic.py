"""A quadratic penalty on leaving the weights of past tasks: the shared part of EWC, MAS and SI.

    L = loss(f(x), y) + strength * 1/2 * sum_i F_i (theta_i - theta*_i)^2

A new method of this type defines only its importances F, often a mean over samples: `mean_gradients`.

Mirror: sequel_flax/quadratic.py
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sequel_core.stream.task import Batch
from sequel_lightning.batches import rows
from sequel_lightning.distributed import reduce
from sequel_lightning.gradients import Contribution, GradientSums, Loss, QuadraticPenalty
from sequel_lightning.module import ContinualModule
from sequel_lightning.networks import evaluating
from sequel_lightning.trees import ParameterTree, Params, SumTree, restricted

Model = ContinualModule


class QuadraticState(NamedTuple):
    """What is remembered of past tasks; both trees have the structure of the parameters."""

    anchor: Params  # theta*, where the penalty is least
    importance: Params  # F, all 0 before the end of the first task


def penalty(params: Params, anchor: Params, importance: Params) -> Tensor:
    """Return 1/2 * sum_i F_i (theta_i - theta*_i)^2 over all parameters, shape ()."""
    names = params.keys()
    penalty: Tensor = QuadraticPenalty.apply(  # type: ignore[no-untyped-call]
        len(params), *params.values(), *(anchor[k] for k in names), *(importance[k] for k in names)
    )
    return penalty


def consolidate(
    params: Params, state: QuadraticState, importance: Params, separate: bool = False, gamma: float = 1.0
) -> QuadraticState:
    """Return the state after one more task.

    Args:
        params: weights at the end of the task.
        state: of past tasks.
        importance: of the task, taken at `params`.
        separate: whether each task keeps its term (theta - theta*_k)^2; if not, all have the anchor `params`.
        gamma: decay of past importances in [0, 1], if they are not separate.
    """
    if not separate:
        return QuadraticState(params, {k: gamma * f + importance[k] for k, f in state.importance.items()})
    total = {k: f + importance[k] for k, f in state.importance.items()}
    share = {k: f / torch.where(total[k] > 0, total[k], 1) for k, f in state.importance.items()}
    anchor = {k: p + share[k] * (state.anchor[k] - p) for k, p in params.items()}
    return QuadraticState(anchor, total)


def mean_gradients(
    params: Params,
    model: Model,
    batches: Iterable[Batch],
    losses: Sequence[Loss],
    contribution: Contribution,
    samples: int | None = None,
    per_batch: bool = False,
) -> Params:
    """Return 1/N sum_n sum_k contribution(d loss_k(x_n) / d theta), in evaluation mode.

    Args:
        params: weights at which gradients are taken.
        model: passed to the losses.
        batches: of samples, each sample once.
        losses: each returns the value of a batch, shape (). Unless `per_batch`, a batch has one sample.
        contribution: of a gradient array to the sum, elementwise, for example its square.
        samples: N, the first so many samples; None for all.
        per_batch: whether to take one gradient for each batch instead of each sample.
    """
    sums, count, ranks = GradientSums(params, model, contribution, per_batch), 0, model.ranks
    divide = ranks.dividing and not per_batch
    with ranks.divided(False):
        for batch in batches:
            wanted = len(batch.t) if samples is None else min(len(batch.t), samples - count)
            share = slice(ranks.rank, wanted, ranks.size) if divide else slice(wanted)
            for loss in losses:
                sums.add(rows(batch, share), loss)
            count += wanted
            if count == samples:
                break
    if divide:
        reduce(list(sums.total.values()))
    return {k: f / count for k, f in sums.total.items()}


class QuadraticModule(ContinualModule):
    """A quadratic penalty with importances that are computed at the end of a task; subclasses define them."""

    has_penalty = True
    strength = 1.0  # factor of the penalty
    separate = False  # see `consolidate`
    gamma = 1.0  # see `consolidate`
    _checked = False  # whether the network has importances; tried with the first batch

    def init_memory(self) -> None:
        """Start with the anchor at the initial weights and zero importances."""
        super().init_memory()
        self.anchor = ParameterTree(self.params(), torch.clone)
        self.importance = SumTree(self.params())

    def importances(self, params: Params, batches: Iterable[Batch]) -> Params:
        """Return the importances of a task, from the weights at its end and batches of its samples."""
        raise TypeError(f"{type(self).__name__} has to override importances(params, batches)")

    @property
    def state(self) -> QuadraticState:
        """What is remembered of past tasks."""
        return QuadraticState(self.anchor.get(), self.importance.get())

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the mean loss plus the penalty, shape ()."""
        params = self._trained_params or self.params()
        return super().loss(outputs, batch) + self.added(self.strength * penalty(params, *self.state))

    def training_loss(self, batch: Batch) -> tuple[Tensor, Any]:
        """Return the training loss of a batch, shape (), and what the network returned for it.

        Raises:
            ValueError: gradients of single samples, which the end of a task needs, fail for the network.
        """
        if not self._checked:
            self.check_importances(batch)
        return super().training_loss(batch)

    def check_importances(self, batch: Batch) -> None:
        """Compute the importances of two samples, as at the end of a task.

        Raises:
            ValueError: this fails.
        """
        try:
            with evaluating(self), self.ranks.divided(False):
                self.importances(self.frozen_params(), [rows(batch, slice(2))])
        except Exception as error:
            raise ValueError(
                f"{self.algorithm_hparams.name} takes gradients of single samples at the end of a task, in "
                f"evaluation mode and in batches of one, which fails: {' '.join(str(error).split())}; the "
                "network must allow that"
            ) from error
        self._checked = True

    def end_task(self, batches: Iterable[Batch]) -> None:
        """Add the importances of the task and update the anchor."""
        params = self.frozen_params()
        importance = self.importances(params, batches)
        past = QuadraticState(*(restricted(tree, params) for tree in self.state))
        memory = consolidate(params, past, importance, self.separate, self.gamma)
        self.anchor.set(memory.anchor)
        self.importance.set(memory.importance)
