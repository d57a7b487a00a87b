"""Memory aware synapses (Aljundi et al. 2018, https://arxiv.org/abs/1711.09601).

    L = loss(f(x), y) + lambda * sum_i Omega_i (theta_i - theta*_i)^2                                  (eq. 4)
    Omega_i <- Omega_i + 1/N sum_n |d ||f(x_n)||^2 / d theta_i| at theta*, one gradient per sample (eq. 2, 3)

f are the outputs; for classes, the logits of all classes, unmasked. No targets are used. theta* are the
weights at the end of the last task. The official code takes one gradient per batch, of the sum of ||f||^2
over it (`gradients="batch"`). Importances then depend on the batch size, and strengths are not comparable.

Mirror: sequel_flax/algorithms/mas.py
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sequel_core.algorithms.mas import MASHParams
from sequel_core.stream.task import Batch
from sequel_lightning.gradients import call_with
from sequel_lightning.networks import call_network
from sequel_lightning.objectives import output_leaf
from sequel_lightning.quadratic import Model, QuadraticModule, mean_gradients
from sequel_lightning.trees import Params


def squared_norm(params: Params, model: Any, batch: Batch) -> Tensor:
    """Return the sum over a batch of ||f(x)||^2, in evaluation mode, shape ()."""
    call = partial(call_with, model.net, params)
    outputs = call_network(call, model.normalise(batch.x), model.task_argument(batch.t))
    f = output_leaf(outputs, model.algorithm_hparams.output)
    norms: Tensor = (f.reshape(len(f), -1) ** 2).sum(1)
    return norms.sum()


def sensitivity(params: Params, model: Model, batches: Iterable[Batch], hparams: MASHParams) -> Params:
    """Return the mean absolute gradient of ||f(x)||^2 over a task's samples."""
    return mean_gradients(
        params, model, batches, [squared_norm], torch.abs, hparams.mas_samples, hparams.gradients == "batch"
    )


class MAS(QuadraticModule):
    """Memory aware synapses; see `help(MASHParams)` for its settings.

    Example:
        >>> import torch
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import MASHParams
        >>> from sequel_lightning import MLP, MAS
        >>> digits = RotatedDigits(num_tasks=2)
        >>> net = MLP(image_shape=digits.image_shape)
        >>> module = MAS(net, torch.optim.SGD, MASHParams(mas_lambda=0.1), digits.spec)
        >>> float(module.state.importance["head.bias"].sum())  # no task has ended yet
        0.0
    """

    hparams_class = MASHParams
    algorithm_hparams: MASHParams

    def init_memory(self) -> None:
        """Start with zero importances."""
        super().init_memory()
        if self.spec is not None:
            self.blank_output(self.algorithm_hparams.output)  # raises an error if there is none
        self.strength = 2 * self.algorithm_hparams.mas_lambda

    def importances(self, params: Params, batches: Iterable[Batch]) -> Params:
        """Return the sensitivity of the outputs to the weights on a task."""
        return sensitivity(params, self, batches, self.algorithm_hparams)
