"""Mode connectivity SGD, MC-SGD (Mirzadeh et al. 2021): its settings and its plan after each task."""

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
    """Settings of MC-SGD (Mirzadeh et al. 2021, https://arxiv.org/abs/2010.04495).

        w_bar = argmin_w sum_a L_past(w_bar' + a (w - w_bar')) + L_now(w_hat + a (w - w_hat)),
        with a = 0, 1/n, ..., 1

    w_hat are the weights after training on the current task, and w_bar' is the previous w_bar. L_past is the
    loss on samples of past tasks, L_now that on samples of the current task.

    Example:
        >>> from sequel_core import MCSGDHParams
        >>> MCSGDHParams(lmc_line_samples=2, lmc_loss="mean").points()
        [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)]
    """

    name: ClassVar[str] = "mcsgd"

    memory: Literal["task_quota", "class_quota"] = setting(
        "task_quota",
        "which samples are kept: `task_quota`, a uniform sample of each task; `class_quota`, a uniform "
        "sample of each class of each task",
    )
    lmc_policy: Literal["offline", "online"] = setting(
        "offline",
        "when w_bar is optimized: `offline`, after each task, on the samples that the memory keeps of it and "
        "of past tasks; `online`, at every step, on its batch and a replay batch of past tasks",
    )
    lmc_interpolation: Literal["linear"] = setting(
        "linear", "paths between weights: `linear`, straight lines"
    )
    lmc_lr: float = setting(0.05, "learning rate of the optimizer (SGD) of w_bar", ge=0)
    lmc_momentum: float = setting(0.8, "momentum of the optimizer of w_bar", ge=0, lt=1)
    lmc_batch_size: int = setting(
        64, "number of samples of past tasks, and of the current task, in a step of w_bar", ge=1
    )
    lmc_init_position: float = setting(
        0.1, "start of w_bar on the line from the previous w_bar (0) to w_hat (1)", ge=0, le=1
    )
    lmc_line_samples: int = setting(10, "number n of intervals between the points on a line", ge=2, le=1000)
    lmc_epochs: int = setting(
        1, "number of passes over the samples for w_bar", ge=1, only=("lmc_policy", "offline")
    )
    lmc_steps: Literal["batch", "epoch"] = setting(
        "batch",
        "steps of w_bar: `batch`, one per batch; `epoch`, one per pass (the first version of the official "
        "code)",
        only=("lmc_policy", "offline"),
    )
    lmc_gradient: Literal["sum", "plain", "prefix"] = setting(
        "sum",
        "gradient over the points of a line: `sum`, that of the sum of the losses (the paper); `plain`, the "
        "sum of the gradients at the points, without the factor a; `prefix`, plain with the point k of n "
        "weighted by n + 1 - k (the official code)",
    )
    lmc_loss: Literal["mean", "mean_over_batch_size"] = setting(
        "mean_over_batch_size",
        "loss at a point: `mean`, the mean cross-entropy; `mean_over_batch_size`, the mean divided by "
        "lmc_batch_size (the official code and its values of lmc_lr)",
    )
    lmc_start: Literal["w_hat", "w_bar"] = setting(
        "w_hat",
        "weights from which training on a task starts: `w_hat`, those of the previous task (the official "
        "code), or `w_bar`",
    )

    @property
    def drawn(self) -> int:
        """Number of samples per replay batch; 0 if steps do not read the memory."""
        return self.lmc_batch_size if self.lmc_policy == "online" else 0

    def points(self) -> list[tuple[float, float]]:
        """Return the position of each point on a line, in [0, 1], and the factor of its gradient."""
        n = self.lmc_line_samples
        factors = {"sum": [k / n for k in range(n + 1)], "plain": [1.0] * (n + 1)}
        factors["prefix"] = [float(n + 1 - k) for k in range(n + 1)]
        scale = 1.0 if self.lmc_loss == "mean" else 1.0 / self.lmc_batch_size
        return [(k / n, scale * factor) for k, factor in enumerate(factors[self.lmc_gradient])]


class ConnectionPlan(NamedTuple):
    """The samples that each step of w_bar reads after a task; int32."""

    slots: SlotArray  # past and current samples of each pair of batches [steps, pairs, 2, lmc_batch_size]
    count: Any  # number of steps, (); the rest is padding


def connection_batches(
    hparams: MCSGDHParams, tasks: IntArray, task: int, seed: int
) -> Iterator[list[tuple[SlotArray, SlotArray]]]:
    """Yield, for each step of w_bar after a task, pairs of batches of slots, each `[lmc_batch_size]`.

    The first batch of a pair has samples of past tasks, the second has samples of the task itself. Both are
    shuffled in each epoch. If one of the two runs out of samples, its slots are M, which means "none".

    Args:
        hparams: settings of MC-SGD.
        tasks: task of each slot of the memory `[M]`, -1 if the slot is empty.
        task: index of the task.
        seed: training seed.
    """
    size, none = hparams.lmc_batch_size, len(tasks)
    sources = [np.flatnonzero((tasks >= 0) & (tasks < task)), np.flatnonzero(tasks == task)]
    for epoch in range(hparams.lmc_epochs):
        columns = []
        for source, slots in zip(("past", "current"), sources, strict=True):
            order = slots[plan.permutation(seed, "connection", source, task, epoch, count=len(slots))]
            rows = max(-(-len(s) // size) for s in sources)
            columns.append(np.full(rows * size, none, np.int32))
            columns[-1][: len(order)] = order
            columns[-1].shape = (rows, size)
        pairs = list(zip(*columns, strict=True))
        yield from [pairs] if hparams.lmc_steps == "epoch" else [[pair] for pair in pairs]


def connection_plan(hparams: MCSGDHParams, tasks: IntArray, task: int, seed: int) -> ConnectionPlan:
    """Return `connection_batches` as one array, with one step of padding if there are no steps."""
    steps = list(connection_batches(hparams, tasks, task, seed))
    none = np.full((1, 1, 2, hparams.lmc_batch_size), len(tasks))
    return ConnectionPlan(np.asarray(steps or none, np.int32), np.asarray(len(steps), np.int32))
