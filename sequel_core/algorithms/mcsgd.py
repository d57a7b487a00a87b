"""Mode connectivity SGD."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from sequel_core.hparams import MemoryHParams
from sequel_core.settings import setting
from sequel_core.stream import plan
from sequel_core.stream.arrays import IntArray, SlotArray


@dataclass(frozen=True)
class MCSGDHParams(MemoryHParams):
    """Mode connectivity SGD (Mirzadeh et al. 2021)."""

    name: ClassVar[str] = "mcsgd"

    memory: Literal["task_quota", "class_quota"] = setting(
        "task_quota", "a uniform choice of each task, or of each class of each task"
    )
    lmc_policy: Literal["offline", "online"] = setting(
        "offline",
        "when w_bar is found: offline, after the task, on the samples kept of it and of past tasks; online, "
        "at every step, on its batch and a draw of lmc_batch_size from past tasks",
    )
    lmc_interpolation: Literal["linear"] = setting("linear", "the paths between weights: straight lines")
    lmc_lr: float = setting(0.05, "learning rate of w_bar", ge=0)
    lmc_momentum: float = setting(0.8, "momentum of w_bar", ge=0, lt=1)
    lmc_batch_size: int = setting(64, "samples of past tasks, and of the current, in a step of w_bar", ge=1)
    lmc_init_position: float = setting(
        0.1, "where w_bar starts on the line from its last value (0) to w_hat (1)", ge=0, le=1
    )
    lmc_line_samples: int = setting(
        10, "intervals of the grid on a line; its points are one more", ge=2, le=1000
    )
    lmc_epochs: int = setting(
        1, "passes over the samples that w_bar is found on (offline)", ge=1, only=("lmc_policy", "offline")
    )
    lmc_steps: Literal["batch", "epoch"] = setting(
        "batch",
        "one step of w_bar for each batch, or one for each pass (offline; the code's first version)",
        only=("lmc_policy", "offline"),
    )
    lmc_gradient: Literal["sum", "plain", "prefix"] = setting(
        "sum",
        "sum: of the sum of losses on the lines (the paper); plain: each point's own gradient, without the "
        "factor that its place gives it; prefix: plain with the point k of n counted n + 1 - k times, as the "
        "official code accumulates",
    )
    lmc_loss: Literal["mean", "mean_over_batch_size"] = setting(
        "mean_over_batch_size",
        "mean cross-entropy, or the same divided by lmc_batch_size: the official code, and so its lmc_lr",
    )
    lmc_start: Literal["w_hat", "w_bar"] = setting(
        "w_hat", "what the training on a task goes on from: the last w_hat (official code) or w_bar"
    )

    @property
    def drawn(self) -> int:
        """Samples that a step draws from the memory at once."""
        return self.lmc_batch_size if self.lmc_policy == "online" else 0

    def points(self) -> list[tuple[float, float]]:
        """Return the place of each point on a line, in [0, 1], and the factor of its gradient."""
        n = self.lmc_line_samples
        factors = {"sum": [k / n for k in range(n + 1)], "plain": [1.0] * (n + 1)}
        factors["prefix"] = [float(n + 1 - k) for k in range(n + 1)]
        scale = 1.0 if self.lmc_loss == "mean" else 1.0 / self.lmc_batch_size
        return [(k / n, scale * factor) for k, factor in enumerate(factors[self.lmc_gradient])]


class ConnectionPlan(NamedTuple):
    """Which samples the steps read that look for MC-SGD's w_bar after a task; int32."""

    slots: SlotArray  # of each step and pair, past and current [steps, pairs, 2, lmc_batch_size]
    count: Any  # of steps, (); what follows them is padding


def connection_batches(
    hparams: MCSGDHParams, tasks: IntArray, task: int, seed: int
) -> Iterator[list[tuple[SlotArray, SlotArray]]]:
    """Yield, for each step that looks for w_bar after a task, pairs of slots `[lmc_batch_size]`.

    The first of a pair hold samples of past tasks, the second of the task itself; both are in a random order
    in each epoch. Where one kind has run out its slots are all "none", the number of slots.

    Args:
        hparams: of MC-SGD.
        tasks: task of each slot of the memory `[M]`, -1 where it is empty.
        task: index.
        seed: of the run.
    """
    size, none = hparams.lmc_batch_size, len(tasks)
    kinds = [np.flatnonzero((tasks >= 0) & (tasks < task)), np.flatnonzero(tasks == task)]
    for epoch in range(hparams.lmc_epochs):
        columns = []
        for kind, slots in zip(("past", "current"), kinds, strict=True):
            order = slots[plan.permutation(seed, "connection", kind, task, epoch, count=len(slots))]
            rows = max(-(-len(s) // size) for s in kinds)
            columns.append(np.full(rows * size, none, np.int32))
            columns[-1][: len(order)] = order
            columns[-1].shape = (rows, size)
        pairs = list(zip(*columns, strict=True))
        yield from [pairs] if hparams.lmc_steps == "epoch" else [[pair] for pair in pairs]


def connection_plan(hparams: MCSGDHParams, tasks: IntArray, task: int, seed: int) -> ConnectionPlan:
    """Return all of `connection_batches` as one array, with a step of padding if there are none."""
    steps = list(connection_batches(hparams, tasks, task, seed))
    none = np.full((1, 1, 2, hparams.lmc_batch_size), len(tasks))
    return ConnectionPlan(np.asarray(steps or none, np.int32), np.asarray(len(steps), np.int32))
