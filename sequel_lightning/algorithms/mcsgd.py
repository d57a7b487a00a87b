"""Mode connectivity SGD (Mirzadeh et al. 2021, https://arxiv.org/abs/2010.04495).

Ordinary training on a task ends at the weights w_hat. A search then finds the solution w_bar, whose loss is
low on two straight lines: from the last solution w_bar' for samples of past tasks, and from w_hat for
samples of the current task:

    w_bar = argmin_w sum_a L_past(w_bar' + a (w - w_bar')) + L_now(w_hat + a (w - w_hat)),  a = 0, 1/n, ..., 1

The search is SGD with momentum on a few samples. It starts at w_bar' + p (w_hat - w_bar'). Between tasks the
network has the weights w_bar; the accuracy of w_hat is reported, too. During a task the network is trained
towards w_hat. Quirks of the official code are options: `lmc_gradient`, `lmc_loss`, `lmc_steps`, `lmc_start`.
The original library reaches its RotatedMNIST accuracy (82.3, 20 tasks, MLP 256-256) with lmc_gradient=prefix
and lmc_steps=epoch. The equation as it is written reaches more.

Mirror: sequel_flax/algorithms/mcsgd.py
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sequel_core.algorithms.mcsgd import ConnectionPlan, MCSGDHParams, connection_plan
from sequel_core.stream.task import Batch
from sequel_lightning.gradients import gradient_at, holding
from sequel_lightning.networks import check_no_batch_stats, evaluating
from sequel_lightning.objectives import sample_losses, weight_of
from sequel_lightning.placement import to_device
from sequel_lightning.quadratic import Model
from sequel_lightning.replay import Memory, Outputs, ReplayBatch, ReplayModule, mean_loss, read
from sequel_lightning.trees import ParameterTree, Params, restricted, tree_map

Moving = tuple[Params, Params]  # weights w on their way to w_bar, and their velocity
Lines = Sequence[tuple[Params, Sequence[ReplayBatch]]]  # start of each line, and the samples of its loss


class MCSGDState(NamedTuple):
    """What MC-SGD keeps."""

    memory: Memory  # samples of all tasks
    w_bar: Params  # the solution at the end of the last task
    w_hat: Params  # where ordinary training ended then
    moving: Any  # online: Moving of the current task; offline: ()
    learned: Tensor  # index of the last task that has ended, -1 before the first, int32 ()


def interpolate(start: Params, end: Params, place: float) -> Params:
    """Return the point of a line at a place from 0 (start) to 1 (end)."""
    return tree_map(lambda b, a: (1 - place) * a + place * b, end, start)


def at_rest(w: Params) -> Moving:
    """Return weights with velocity 0."""
    return w, tree_map(torch.zeros_like, w)


def momentum_step(moving: Moving, gradient: Params, hparams: MCSGDHParams) -> Moving:
    """Return the weights and their velocity after a step of SGD."""
    velocity = tree_map(lambda v, g: hparams.lmc_momentum * v + g, moving[1], gradient)
    return tree_map(lambda w, v: w - hparams.lmc_lr * v, moving[0], velocity), velocity


def connection_step(moving: Moving, model: Model, lines: Lines, hparams: MCSGDHParams) -> Moving:
    """Return the weights and their velocity after a step on the losses along lines that end at them."""
    gradient = tree_map(torch.zeros_like, moving[0])
    for start, samples in lines:
        weight = sum(weight_of(model.objective, Batch(*s[:3]), s.count) for s in samples)
        count = float(weight) or 1.0
        for place, factor in hparams.points():
            for chunk in samples:
                gradient = add_gradient(gradient, model, start, moving[0], place, factor / count, chunk)
    return momentum_step(moving, gradient, hparams)


def add_gradient(
    total: Params, model: Model, start: Params, end: Params, place: float, factor: Any, samples: ReplayBatch
) -> Params:
    """Return `total` plus `factor` times the gradient of the summed loss at a point of a line."""
    if not samples.count:
        return total

    def summed_loss(params: Params) -> Tensor:
        batch = Batch(*samples[:3])
        return sample_losses(model.objective, lambda x: model.forward(x, batch.t), batch).sum()

    gradient = gradient_at(interpolate(start, end, place), model, summed_loss)
    return tree_map(lambda a, g: a.add_(g, alpha=factor), total, gradient)  # in place


def plan_connection(state: MCSGDState, task: int, hparams: MCSGDHParams, seed: int) -> ConnectionPlan:
    """Return the slots of the memory that the search for w_bar reads; none online or after the first task."""
    tasks, search = state.memory.t.cpu().numpy(), hparams.lmc_policy == "offline" and state.learned >= 0
    return connection_plan(hparams, tasks if search else np.full_like(tasks, -1), task, seed)


def begin(params: Params, state: MCSGDState, hparams: MCSGDHParams) -> tuple[Params, MCSGDState]:
    """Return the weights that a task starts with, and the state, online with w_bar on its way."""
    if hparams.lmc_start == "w_hat" and state.learned >= 0:
        params = restricted(state.w_hat, params)
    if hparams.lmc_policy == "online":
        state = state._replace(moving=at_rest(interpolate(state.w_bar, params, hparams.lmc_init_position)))
    return params, state


def finish(
    params: Params, model: Model, state: MCSGDState, plan: ConnectionPlan, task: Tensor, hparams: MCSGDHParams
) -> MCSGDState:
    """Return the state at the end of a task, from the weights at its end."""
    moving = state.moving
    if hparams.lmc_policy == "offline":
        moving = at_rest(interpolate(state.w_bar, params, hparams.lmc_init_position))
        load = partial(to_device, device=state.learned.device)
        for pairs in plan.slots[: int(plan.count)]:
            past, now = ([load(read(state.memory, pair[part])) for pair in pairs] for part in (0, 1))
            moving = connection_step(moving, model, [(state.w_bar, past), (params, now)], hparams)
    w_bar = restricted(moving[0] if state.learned >= 0 else params, params)
    return state._replace(w_bar=w_bar, w_hat=params, learned=task)


class MCSGD(ReplayModule):
    """MC-SGD; see `help(MCSGDHParams)` for its settings.

    Example:
        >>> import torch
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import MCSGDHParams
        >>> from sequel_lightning import MLP, MCSGD
        >>> digits = RotatedDigits(num_tasks=2)
        >>> net = MLP(image_shape=digits.image_shape)
        >>> module = MCSGD(net, torch.optim.SGD, MCSGDHParams(per_task_memory_samples=20), digits.spec)
        >>> int(module.state.learned)  # no task has ended yet
        -1
    """

    hparams_class = MCSGDHParams
    algorithm_hparams: MCSGDHParams
    past_only = True
    draws_in_loss = False
    moving_trees = ("moving",)
    learned: Tensor

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
        return MCSGDState(self.contents, w_bar, w_hat, tuple(moving), self.learned)

    def start_task(self) -> None:
        """Start from w_hat; online, start the search for w_bar."""
        params, state = begin(self.frozen_params(), self.state, self.algorithm_hparams)
        self.set_params(params)
        self._move(state.moving)

    def replay_loss(self, batch: Outputs, draws: Sequence[Outputs]) -> Tensor:
        """Return the mean loss of the batch, shape ()."""
        return mean_loss(batch)

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        """Take the optimizer's step; online, take a step of the search for w_bar."""
        super().optimizer_step(*args, **options)
        if self.online and self.lifecycle.fitting and self.learned >= 0:
            state, (current, *past), params = self.state, self.samples, self.frozen_params()
            lines = [(state.w_bar, past), (params, [current])]
            w, velocity = (restricted(tree, params) for tree in state.moving)
            with evaluating(self), self.ranks.divided():
                self._move(connection_step((w, velocity), self, lines, self.algorithm_hparams))

    def end_task(self, batches: Iterable[Batch]) -> None:
        """Find w_bar and copy it into the network."""
        hparams, params, task = self.algorithm_hparams, self.frozen_params(), int(self.task_index)
        plan = plan_connection(self.state, task, hparams, self.seed)
        state = finish(params, self, self.state, plan, self.task_index, hparams)
        frozen = {k: p for k, p in self.net.named_parameters() if k in self.w_bar.get() and k not in params}
        self.w_hat.set({**frozen, **state.w_hat})
        self.w_bar.set({**frozen, **state.w_bar})
        self.set_params(state.w_bar)
        self.learned.fill_(task)

    def alternatives(self, x: Any, t: Tensor | None = None) -> dict[str, Any]:
        """Return the outputs of w_hat."""
        w_hat = self.w_hat.get() if self.learned == self.task_index else {}
        with holding(self, w_hat):
            return {"w_hat": self.forward(x, t)}

    def _move(self, moving: Moving) -> None:
        for tree, values in zip(self.moving, moving, strict=True):
            tree.set(values)
