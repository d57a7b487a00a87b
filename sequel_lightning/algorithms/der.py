"""Dark experience replay (Buzzega et al. 2020, https://arxiv.org/abs/2004.07211).

    L = loss(f(x), y) + alpha * E_(x', z) ||z - f(x')||^2                                            (eq. 5)

(x', z) is a draw from the memory. z are the outputs for x' at the step at which it was a training sample:
before the update, in training mode. For classes they are the logits of all classes, unmasked. The memory is a
reservoir, which is read as soon as it has a sample. `distance="sum"` is the squared norm of the paper. The
official code, and so its tuned alphas, has the mean over classes (`distance="mean"`), a tenth of it for ten
classes.

Mirror: sequel_flax/algorithms/der.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from sequel_core.algorithms.der import DERHParams
from sequel_lightning.objectives import output_leaf
from sequel_lightning.replay import Outputs, ReplayModule, mean_loss, sum_of_first


def output_distance(draw: Outputs, hparams: DERHParams) -> Tensor:
    """Return the mean over a draw of ||z - f(x')||^2, 0 for an empty one, shape ()."""
    squares = (draw.stored - output_leaf(draw.outputs, hparams.output)).square()
    squares = squares.reshape(len(squares), math.prod(squares.shape[1:]))
    norms = squares.sum(1) if hparams.distance == "sum" else squares.mean(1)
    distance: Tensor = sum_of_first(norms, draw.count) / max(draw.count, 1)
    return distance


def replay_loss(batch: Outputs, draws: Sequence[Outputs], hparams: DERHParams) -> Tensor:
    """Return the mean loss of the batch plus alpha times the distance of the draw, shape ()."""
    return mean_loss(batch) + hparams.alpha * output_distance(draws[0], hparams)


class DER(ReplayModule):
    """Dark experience replay; see `help(DERHParams)` for its settings.

    Example:
        >>> import torch
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import DERHParams
        >>> from sequel_lightning import MLP, DER
        >>> digits = RotatedDigits(num_tasks=2)
        >>> net = MLP(image_shape=digits.image_shape)
        >>> module = DER(net, torch.optim.SGD, DERHParams(mem_size=20), digits.spec)
        >>> module.memory_bytes()  # 20 images, labels, task indices and outputs
        2240
    """

    hparams_class = DERHParams
    has_penalty = True
    algorithm_hparams: DERHParams
    keep_outputs = True

    def replay_loss(self, batch: Outputs, draws: Sequence[Outputs]) -> Tensor:
        """Return the training loss, shape ()."""
        return replay_loss(batch, draws, self.algorithm_hparams)
