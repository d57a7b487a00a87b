"""Mode connectivity SGD (Mirzadeh et al. 2021, https://arxiv.org/abs/2010.04495).

Ordinary training on a task ends in w_hat. The solution w_bar is where the loss stays low on straight lines,
to the last solution for samples of past tasks, and to w_hat for samples of the current one:

    w_bar = argmin_w sum_a L_past(w_bar' + a (w - w_bar')) + L_now(w_hat + a (w - w_hat)),  a = 0, 1/n, ..., 1

found by SGD from w_bar' + p (w_hat - w_bar') on few samples. Between tasks the network holds w_bar, and w_hat
is reported beside it; within a task it holds w_hat on its way. Quirks of the official code are options:
`lmc_gradient`, `lmc_loss`, `lmc_steps` and `lmc_start`. RotatedMNIST (82.3, 20 tasks, MLP 256-256): the
original library comes to it with lmc_gradient=prefix and lmc_steps=epoch; the equation itself goes past it.

Mirror: sequel_flax/algorithms/mcsgd.py
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sequel_core.algorithms.mcsgd import MCSGDHParams, connection_batches
from sequel_core.stream.task import Batch
from sequel_lightning.gradients import backward, holding, native_rnn
from sequel_lightning.networks import check_no_batch_stats, evaluating
from sequel_lightning.replay import (
    Memory,
    ReplayBatch,
    ReplayModule,
    draws,
    forward,
    mean_cross_entropy,
    read,
)
from sequel_lightning.trees import ParameterTree, Params, restricted

Lines = Sequence[tuple[Params, Sequence[ReplayBatch]]]  # where each begins, and the samples that it is for


class MCSGDState(NamedTuple):
    """What MC-SGD keeps."""

    memory: Memory  # samples of all tasks
    w_bar: Params  # the solution at the end of the last task
    w_hat: Params  # where ordinary training ended then
    moving: Any  # online: the solution on its way, and its velocity; () offline
    learned: Tensor  # index of the last task that has ended, -1 before the first, int32 ()


def interpolate(start: Params, end: Params, place: float) -> Params:
    """Return the point of a line at a place from 0 (start) to 1 (end)."""
    return {k: (1 - place) * start[k] + place * b for k, b in end.items()}


def momentum_step(moving: Any, gradient: Params, hparams: MCSGDHParams) -> tuple[Params, Params]:
    """Return the weights and their velocity after a step of SGD."""
    velocity = {k: hparams.lmc_momentum * v + gradient[k] for k, v in moving[1].items()}
    return {k: w - hparams.lmc_lr * velocity[k] for k, w in moving[0].items()}, velocity


class MCSGD(ReplayModule):
    """MC-SGD."""

    hparams_class = MCSGDHParams
    algorithm_hparams: MCSGDHParams
    past_only = True
    moving_trees = ("moving",)
    learned: Tensor
    _samples: Sequence[ReplayBatch] = ()  # the latest batch and, online, its draw

    def check_net(self, net: nn.Module) -> None:
        """Raise ValueError if the network has batch normalisation."""
        check_no_batch_stats(net, "mcsgd", "the weights between two solutions have no running statistics")

    def init_memory(self) -> None:
        """Start with an empty memory, and both solutions at the initial weights."""
        self.online = self.algorithm_hparams.lmc_policy == "online"
        self.num_draws = int(self.online)
        super().init_memory()
        self.w_bar, self.w_hat = (ParameterTree(self.params(), torch.clone) for _ in range(2))
        fresh = (torch.clone, torch.zeros_like) if self.online else ()
        self.moving: Any = nn.ModuleList(ParameterTree(self.params(), f) for f in fresh)
        self.register_buffer("learned", torch.tensor(-1, dtype=torch.int32))

    @property
    def state(self) -> MCSGDState:
        """What is kept of past tasks, and of the current one."""
        w_bar, w_hat, *moving = (tree.get() for tree in (self.w_bar, self.w_hat, *self.moving))
        return MCSGDState(self.held, w_bar, w_hat, tuple(moving), self.learned)

    def start_task(self) -> None:
        """Go on from w_hat; online, let w_bar begin its way."""
        hparams, kept = self.algorithm_hparams, self.state
        if kept.learned >= 0 and hparams.lmc_start == "w_hat":
            self.set_params(kept.w_hat)
        if self.online:
            self._move(_at_rest(interpolate(kept.w_bar, self.frozen_params(), hparams.lmc_init_position)))

    def objective(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of the batch and its logits; then write the batch."""
        batch = self.planned(batch)
        self._samples = draws(self.held, batch)
        (seen,) = forward(self, self._samples[:1], together=True)
        self.remember(batch, seen)
        return mean_cross_entropy(seen), seen.masked

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        """Take the optimizer's step; online, let w_bar follow."""
        super().optimizer_step(*args, **options)
        if self.online and self.lifecycle.fitting and self.learned >= 0:
            kept, (own, *past), w_hat = self.state, self._samples, self.frozen_params()
            moving = [restricted(tree, w_hat) for tree in kept.moving]
            with evaluating(self):
                self._move(self.step(moving, [(kept.w_bar, past), (w_hat, [own])]))

    def step(self, moving: Any, lines: Lines) -> tuple[Params, Params]:
        """Return w and its velocity after a step on the lines that begin at each of the weights given."""
        gradient = {k: torch.zeros_like(w) for k, w in moving[0].items()}
        for begin, samples in lines:
            count = max(sum(s.count for s in samples), 1)
            for place, factor in self.algorithm_hparams.points():
                for chunk in samples:
                    self.add_point(gradient, interpolate(begin, moving[0], place), factor / count, chunk)
        return momentum_step(moving, gradient, self.algorithm_hparams)

    @torch.enable_grad()
    def add_point(self, total: Params, point: Params, factor: float, samples: ReplayBatch) -> None:
        """Add to `total`, times a factor, the gradient of the summed cross-entropy at a point of a line."""
        if samples.count:
            with holding(self, point) as params, native_rnn(self.net):
                loss = F.cross_entropy(self.forward(samples.x, samples.t), samples.y, reduction="sum")
                for k, g in backward(loss, params, self.net).items():
                    total[k].add_(g, alpha=factor)

    def end_task(self, batches: Iterable[Batch]) -> None:
        """Find w_bar, and put it into the network."""
        hparams, kept, task = self.algorithm_hparams, self.state, int(self.task_index)
        w = w_hat = self.frozen_params()
        if kept.learned >= 0 and self.online:
            w = restricted(kept.moving[0], w_hat)
        elif kept.learned >= 0:
            moving = _at_rest(interpolate(kept.w_bar, w_hat, hparams.lmc_init_position))
            for pairs in connection_batches(hparams, kept.memory.t.cpu().numpy(), task, self.seed):
                past, now = ([read(kept.memory, pair[kind]) for pair in pairs] for kind in (0, 1))
                moving = self.step(moving, [(kept.w_bar, past), (w_hat, now)])
            w, _ = moving
        frozen = {k: p for k, p in self.net.named_parameters() if k in kept.w_bar and k not in w_hat}
        self.w_hat.set({**frozen, **w_hat})
        self.w_bar.set({**frozen, **w})
        self.set_params(w)
        self.learned.fill_(task)

    def alternatives(self, x: Tensor, t: Tensor | None = None) -> dict[str, Tensor]:
        """Return the logits of w_hat."""
        with holding(self, self.w_hat.get() if self.learned == self.task_index else {}):
            return {"w_hat": self.forward(x, t)}

    def _move(self, moving: tuple[Params, Params]) -> None:
        for tree, values in zip(self.moving, moving, strict=True):
            tree.set(values)


def _at_rest(w: Params) -> tuple[Params, Params]:
    return w, {k: torch.zeros_like(p) for k, p in w.items()}
