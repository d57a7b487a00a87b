"""A user-defined regulariser and a user-defined replay method in Lightning."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from sequel_core.stream.task import Batch
from sequel_lightning.module import Params
from sequel_lightning.quadratic import Model, QuadraticModule
from sequel_lightning.replay import Outputs, ReplayModule, mean_cross_entropy, sum_of_first
from tests.examples.user_methods import ConfidentHParams, MagnitudeHParams


def magnitudes(params: Params, model: Model, batches: Iterable[Batch]) -> Params:
    """Return the importances of a task: the squares of the weights at the end of the task."""
    return {k: p.square() for k, p in params.items()}


class Magnitude(QuadraticModule):
    hparams_class = MagnitudeHParams

    def __init__(self, net: Any, optimizer: Any, hparams: MagnitudeHParams, *args: Any) -> None:
        super().__init__(net, optimizer, hparams, *args)
        self.strength = hparams.strength

    def importances(self, params: Params, batches: Iterable[Batch]) -> Params:
        return magnitudes(params, self, batches)


def replay_loss(batch: Outputs, draws: Sequence[Outputs], hparams: ConfidentHParams) -> Tensor:
    """Return the cross-entropy of batch and draw plus the weighted mean entropy of the draw, shape ()."""
    (draw,) = draws
    entropies: Tensor = -(draw.logits.softmax(1) * draw.logits.log_softmax(1)).sum(1)
    entropy: Tensor = sum_of_first(entropies, draw.count) / max(draw.count, 1)
    return hparams.weight * entropy + mean_cross_entropy(batch, draw)


class Confident(ReplayModule):
    hparams_class = ConfidentHParams
    algorithm_hparams: ConfidentHParams

    def replay_loss(self, batch: Outputs, draws: Sequence[Outputs]) -> Tensor:
        return replay_loss(batch, draws, self.algorithm_hparams)
