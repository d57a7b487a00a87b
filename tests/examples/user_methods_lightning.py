"""User-defined methods in Lightning: a regulariser, a replay method, and one that is neither."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from sequel_core.stream.task import Batch
from sequel_lightning.module import ContinualModule, Params
from sequel_lightning.networks import evaluating
from sequel_lightning.quadratic import Model, QuadraticModule
from sequel_lightning.replay import Outputs, ReplayModule, mean_loss, sum_of_first
from sequel_lightning.trees import ParameterTree, StateTree
from tests.examples.user_methods import ConfidentHParams, ImitateHParams, MagnitudeHParams


def magnitudes(params: Params, model: Model, batches: Iterable[Batch]) -> Params:
    """Return the importances of a task: the squares of the weights at the end of the task."""
    return {k: p.square() for k, p in params.items()}


class Magnitude(QuadraticModule):
    hparams_class = MagnitudeHParams
    algorithm_hparams: MagnitudeHParams

    def init_memory(self) -> None:
        super().init_memory()
        self.strength = self.algorithm_hparams.strength

    def importances(self, params: Params, batches: Iterable[Batch]) -> Params:
        return magnitudes(params, self, batches)


def replay_loss(batch: Outputs, draws: Sequence[Outputs], hparams: ConfidentHParams) -> Tensor:
    """Return the cross-entropy of batch and draw plus the weighted mean entropy of the draw, shape ()."""
    (draw,) = draws
    entropies: Tensor = -(draw.outputs.softmax(1) * draw.outputs.log_softmax(1)).sum(1)
    entropy: Tensor = sum_of_first(entropies, draw.count) / max(draw.count, 1)
    return hparams.weight * entropy + mean_loss(batch, draw)


class Confident(ReplayModule):
    hparams_class = ConfidentHParams
    algorithm_hparams: ConfidentHParams

    def replay_loss(self, batch: Outputs, draws: Sequence[Outputs]) -> Tensor:
        return replay_loss(batch, draws, self.algorithm_hparams)


class ImitateState(NamedTuple):
    """What the method remembers of past tasks."""

    anchor: Params  # weights at the end of the last task
    statistics: Params  # running statistics of batch normalisation then; empty without batch normalisation
    learned: Tensor  # 1 after the end of the first task, 0 before, shape ()


def logit_distance(logits: Tensor, old: Tensor) -> Tensor:
    """Return the mean squared distance of logits `[B, num_classes]`, shape ()."""
    return ((logits - old) ** 2).sum(1).mean()


def training_loss(module: Imitate, batch: Batch, hparams: ImitateHParams) -> tuple[Tensor, Tensor]:
    """Return the loss of a batch, shape (), and its logits `[B, num_classes]`."""
    anchor, statistics, learned = module.state
    logits = module.network(batch.x)
    masked_logits = module.masked(logits, batch.t)
    with evaluating(module.net), torch.no_grad():
        old = functional_call(module.net, {**anchor, **statistics}, (module.normalise(batch.x),))
    penalty = module.added(learned * hparams.strength * logit_distance(logits, old))
    return module.loss(masked_logits, batch) + penalty, masked_logits


class Imitate(ContinualModule):
    hparams_class = ImitateHParams
    algorithm_hparams: ImitateHParams
    has_penalty = True  # `train/penalty` is logged
    learned: Tensor

    def init_memory(self) -> None:
        like = next(self.net.parameters())
        self.anchor = ParameterTree(self.params(), torch.clone)
        self.statistics = StateTree({name: b.clone() for name, b in self.net.named_buffers()})
        self.register_buffer("learned", torch.zeros((), dtype=like.dtype, device=like.device))

    @property
    def state(self) -> ImitateState:
        return ImitateState(self.anchor.get(), self.statistics.get(), self.learned)

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return training_loss(self, self.trained_on(batch), self.algorithm_hparams)

    def end_task(self, batches: Iterable[Batch]) -> None:
        self.anchor.set(self.frozen_params())
        self.statistics.set(dict(self.net.named_buffers()))
        self.learned.fill_(1)
