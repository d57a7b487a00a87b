"""DER++, dark experience replay with labels (Buzzega et al. 2020, https://arxiv.org/abs/2004.07211).

    L = CE(f(x), y) + alpha * E_(x', z) ||z - f(x')||^2 + beta * E_(x'', y'') CE(f(x''), y'')        (eq. 6)

Dark experience replay, and the labels of a second draw from the same memory, independent of the first. Both
draws go through the network in one pass (the official code: one each), the batch in another.

Mirror: sequel_flax/algorithms/derpp.py
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sequel_core.algorithms.derpp import DERppHParams
from sequel_lightning.algorithms.der import logit_distance
from sequel_lightning.replay import Outputs, ReplayModule, mean_cross_entropy


def replay_loss(batch: Outputs, draws: Sequence[Outputs], hparams: DERppHParams) -> Tensor:
    """Return DER's loss with the first draw plus beta times the cross-entropy of the second, shape ()."""
    dark = mean_cross_entropy(batch) + hparams.alpha * logit_distance(draws[0], hparams)
    return dark + hparams.beta * mean_cross_entropy(draws[1])


class DERpp(ReplayModule):
    """DER++."""

    hparams_class = DERppHParams
    has_penalty = True
    algorithm_hparams: DERppHParams
    num_draws = 2
    keep_logits = True

    def replay_loss(self, batch: Outputs, draws: Sequence[Outputs]) -> Tensor:
        """Return the training loss, shape ()."""
        return replay_loss(batch, draws, self.algorithm_hparams)
