"""Experience replay (Chaudhry et al. 2019, https://arxiv.org/abs/1902.10486).

    L = mean loss over B_n and B_M together, B_n the batch and B_M a draw from the memory        (algorithm 1)

The network sees the batch and the draw in one pass, from the first task on. The batch is then written to the
memory. A reservoir holds each sample of the stream with probability M/n exactly. A ring holds the latest
samples of each class, or of each class of each task if tasks share classes. The published accuracies have
batches and draws of 10; RotatedMNIST (69.2, MC-SGD paper) has one sample per class and task, `mem_size=200`.

Mirror: sequel_flax/algorithms/er.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sequel_core.algorithms.er import ERHParams
from sequel_core.stream.task import Batch
from sequel_lightning.objectives import weight_of
from sequel_lightning.replay import Outputs, ReplayModule, mean_loss


def replay_loss(batch: Outputs, draws: Sequence[Outputs]) -> Tensor:
    """Return the mean loss of the batch and the draw together, shape ()."""
    return mean_loss(batch, *draws)


class ER(ReplayModule):
    """Experience replay; see `help(ERHParams)` for its settings.

    Example:
        >>> import torch
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import ERHParams
        >>> from sequel_lightning import MLP, ER
        >>> digits = RotatedDigits(num_tasks=2)
        >>> net = MLP(image_shape=digits.image_shape)
        >>> module = ER(net, torch.optim.SGD, ERHParams(mem_size=20), digits.spec)
        >>> module.memory_bytes()  # 20 images, labels and task indices
        1440
    """

    hparams_class = ERHParams
    together = True

    def replay_loss(self, batch: Outputs, draws: Sequence[Outputs]) -> Tensor:
        """Return the training loss, shape ()."""
        return replay_loss(batch, draws)

    def loss_weight(self, batch: Batch) -> Any:
        """Return the weight of the batch and the draw, shape ()."""
        return sum(weight_of(self.objective, Batch(*s[:3]), s.count) for s in self.samples)
