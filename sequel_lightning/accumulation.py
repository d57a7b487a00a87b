"""Accumulated gradients of losses that are weighted means, such as those of tokens or of class weights.

Lightning adds up the gradients of the mean losses of several batches, with equal weights. The gradient of the
mean over all their samples has the weights W_k of the batches:

    g = sum_k W_k g_k / sum_k W_k
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from sequel_lightning.algorithm import Algorithm


class Accumulation:
    """The weights of the batches whose gradients are accumulated for one step."""

    def __init__(self) -> None:
        self.weight: Tensor | None = None  # of the latest batch, shape ()
        self.total: Tensor | None = None  # of the batches of the step so far, shape (); None for none

    def weighted(self, module: Algorithm, loss: Tensor) -> Tensor:
        """Return the loss for the backward pass; scale the gradients of the batches before it.

        Afterwards the gradient is always the mean over the batches so far. Nothing changes if the losses have
        no weights, or if each batch has its own step.

        Args:
            module: whose batch it is.
            loss: of the batch, which Lightning has divided by `accumulate_grad_batches`.
        """
        if module.objective.weight is None or self.weight is None:
            return loss
        count = module.trainer.accumulate_grad_batches
        if count == 1:
            return loss
        weight, before = self.weight.to(loss), self.total
        self.total = weight if before is None else before + weight
        total = self.total.where(self.total > 0, 1)
        if before is not None:
            for p in module.parameters():
                if p.grad is not None:
                    p.grad.mul_(before / total)
        return loss * (count * weight / total)
