"""Elastic weight consolidation (Kirkpatrick et al. 2017, https://arxiv.org/abs/1612.00796).

    L = CE(f(x), y) + lambda/2 * sum_k sum_i F_{k,i} (theta_i - theta*_{k,i})^2                      (eq. 3)
    F_{k,i} = 1/N sum_n (d log p(y_n | x_n) / d theta_i)^2 at theta*_k, one gradient per sample, y_n the label

Up to a constant, the sum over past tasks k equals one term with importance = sum_k F_k and
anchor = sum_k F_k theta*_k / sum_k F_k. The anchor is computed as theta* + share (anchor - theta*), so the
penalty of a weight that never changed is exactly 0 (Adam would turn a rounding error into a step). The online
variant (Schwarz et al. 2018, https://arxiv.org/abs/1805.06370) decays the importance by gamma and has its
anchor at the latest theta*. The published RotatedMNIST accuracy (48.5, MC-SGD paper) comes from another
variant, with a min-max normalised Fisher.

Mirror: sequel_flax/algorithms/ewc.py
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.stream.task import Batch
from sequel_lightning.gradients import call_with
from sequel_lightning.quadratic import Model, QuadraticModule, mean_gradients
from sequel_lightning.trees import Params


def negative_log_likelihood(params: Params, model: Model, batch: Batch) -> Tensor:
    """Return -log p(y | x) of a batch of one sample, in evaluation mode, shape ()."""
    weights = {f"net.{k}": p for k, p in params.items()}
    return F.cross_entropy(call_with(model, weights, batch.x, batch.t), batch.y)


def diagonal_fisher(params: Params, model: Model, batches: Iterable[Batch], samples: int | None) -> Params:
    """Return the mean squared per-sample gradient over the first `samples` samples (None for all)."""
    return mean_gradients(params, model, batches, negative_log_likelihood, torch.square, samples)


class EWC(QuadraticModule):
    """Elastic weight consolidation; see `help(EWCHParams)` for its settings.

    Each `Trainer.fit` trains on one task. When it ends, the Fisher information of the task is estimated, and
    the anchor moves. The published RotatedMNIST number (48.5, MC-SGD paper) comes from another variant, with
    a min-max normalised Fisher.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from pytorch_lightning import Trainer
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import EWCHParams
        >>> from sequel_lightning import EWC, MLP, TaskDataModule
        >>> digits = RotatedDigits(num_tasks=2, subset=100)
        >>> net = MLP((16,), num_classes=10, image_shape=digits.image_shape)
        >>> module = EWC(net, partial(torch.optim.SGD, lr=0.1), EWCHParams(ewc_lambda=10.0), digits.spec)
        >>> silent = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        >>> for task in digits.tasks:
        ...     trainer = Trainer(max_epochs=1, accelerator="cpu", enable_progress_bar=False, **silent)
        ...     trainer.fit(module, datamodule=TaskDataModule(task, batch_size=10))
        >>> int(module.task_index), int(module.phase)  # task 1 is consolidated
        (1, 2)
        >>> bool(module.state.importance["head.weight"].min() >= 0)
        True
    """

    hparams_class = EWCHParams
    algorithm_hparams: EWCHParams

    def init_memory(self) -> None:
        """Start with zero importances."""
        super().init_memory()
        hparams = self.algorithm_hparams
        online = hparams.accumulation == "online"
        self.strength = hparams.ewc_lambda
        self.separate = not online
        self.gamma = hparams.gamma if online else 1.0

    def importances(self, params: Params, batches: Iterable[Batch]) -> Params:
        """Return the diagonal Fisher of a task."""
        return diagonal_fisher(params, self, batches, self.algorithm_hparams.fisher_samples)
