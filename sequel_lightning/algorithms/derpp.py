"""DER++, dark experience replay with labels (Buzzega et al. 2020, https://arxiv.org/abs/2004.07211).

    L = loss(f(x), y) + alpha * E_(x', z) ||z - f(x')||^2 + beta * E_(x'', y'') loss(f(x''), y'')    (eq. 6)

DER++ adds the targets of a second draw to dark experience replay. The second draw is from the same memory and
independent of the first. The network sees the batch in one pass and both draws in another; the official code
has one pass for each draw.

Mirror: sequel_flax/algorithms/derpp.py
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sequel_core.algorithms.derpp import DERppHParams
from sequel_lightning.algorithms.der import output_distance
from sequel_lightning.replay import Outputs, ReplayModule, mean_loss


def replay_loss(batch: Outputs, draws: Sequence[Outputs], hparams: DERppHParams) -> Tensor:
    """Return DER's loss with the first draw plus beta times the mean loss of the second, shape ()."""
    dark = mean_loss(batch) + hparams.alpha * output_distance(draws[0], hparams)
    return dark + hparams.beta * mean_loss(draws[1])


class DERpp(ReplayModule):
    """DER++; see `help(DERppHParams)` for its settings.

    Example:
        >>> import torch
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import DERppHParams
        >>> from sequel_lightning import MLP, DERpp
        >>> digits, hparams = RotatedDigits(num_tasks=2), DERppHParams(mem_size=20, beta=1.0)
        >>> module = DERpp(MLP(image_shape=digits.image_shape), torch.optim.SGD, hparams, digits.spec)
        >>> module.memory_bytes()  # 20 images, labels, task indices and outputs
        2240
    """

    hparams_class = DERppHParams
    has_penalty = True
    algorithm_hparams: DERppHParams
    num_draws = 2
    keep_outputs = True

    def replay_loss(self, batch: Outputs, draws: Sequence[Outputs]) -> Tensor:
        """Return the training loss, shape ()."""
        return replay_loss(batch, draws, self.algorithm_hparams)
