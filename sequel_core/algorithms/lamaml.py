"""La-MAML, look-ahead meta-learning (Gupta et al. 2020): its settings and its planner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from sequel_core.hparams import ReplayHParams, TrainingHParams
from sequel_core.settings import setting
from sequel_core.stream import plan
from sequel_core.stream.arrays import IntArray, SlotArray
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.memory import MemoryPlanner


@dataclass(frozen=True)
class LaMAMLHParams(ReplayHParams):
    """Settings of La-MAML (Gupta, Yadav & Paull 2020, https://arxiv.org/abs/2007.13904).

        theta'_k = theta'_{k-1} - relu(alpha) * grad CE(part k of the batch; theta'_{k-1}),  k = 1, ..., K
        M = 1/K sum_k CE(batch and replay batch; theta'_k)
        alpha <- alpha - eta dM/dalpha, then theta <- theta - relu(alpha) * dM/dtheta

    alpha holds one learning rate per parameter. `learn_lr=False` gives C-MAML.

    Example:
        >>> from sequel_core import LaMAMLHParams
        >>> LaMAMLHParams(glances=2, n_inner_updates=5).check_parts(batch_size=10)
        5
    """

    name: ClassVar[str] = "lamaml"

    glances: int = setting(5, "number of updates per batch", ge=1)
    n_inner_updates: int | None = setting(
        None,
        "number K of inner steps per update, each on an equal part of the batch; null for one per sample",
        ge=1,
    )
    second_order: bool = setting(
        False, "differentiate through the gradients of the inner steps, instead of taking them as constants"
    )
    learn_lr: bool = setting(True, "learn the learning rates alpha; false keeps them fixed (C-MAML)")
    lr_alpha: float = setting(
        0.3, "learning rate eta of the learning rates alpha", ge=0, only=("learn_lr", True)
    )
    alpha_init: float = setting(0.15, "initial value of every learning rate in alpha", gt=0)
    sync_update: bool = setting(
        False,
        "update the weights with the optimizer, at the same time as alpha (Sync La-MAML); with false, update "
        "them with the new alpha",
    )
    grad_clip_norm: float | None = setting(
        2.0,
        "largest norm of the gradient of the weights, and of that of alpha; null for no clipping",
        gt=0,
    )
    inner_clip: float | None = setting(
        2.0,
        "largest absolute value in the gradient of an inner step; null for no clipping. The official CIFAR "
        "code clips; the official MNIST code does not, because it drops the clipped values",
        gt=0,
    )

    def check(self, spec: StreamSpec, training: TrainingHParams) -> None:
        """Raise ValueError if memory, inner steps or clipping do not fit the stream or the training."""
        super().check(spec, training)
        self.check_parts(training.batch_size)
        if self.n_inner_updates is not None and not training.drop_last:
            raise ValueError(
                f"n_inner_updates={self.n_inner_updates} needs whole batches, got drop_last=false; set "
                "drop_last=true or leave n_inner_updates out"
            )
        if training.grad_clip is not None:
            raise ValueError(
                f"grad_clip_norm replaces grad_clip in lamaml, got grad_clip={training.grad_clip}; leave "
                "grad_clip out"
            )
        if self.lr_decay != 1 and not self.sync_update:
            raise ValueError(
                f"lr_decay must be 1 with sync_update=false, which uses no optimizer, got {self.lr_decay}; "
                "set sync_update=true or leave lr_decay out"
            )

    def check_parts(self, batch_size: int) -> int:
        """Return the number of inner steps per batch.

        Raises:
            ValueError: the batch does not divide into them.
        """
        parts = batch_size if self.n_inner_updates is None else self.n_inner_updates
        if batch_size % parts:
            raise ValueError(
                f"n_inner_updates must divide batch_size={batch_size}, got {parts}; change one of them"
            )
        return parts


class MetaPlan(NamedTuple):
    """What a step of La-MAML writes and reads, and the order of its batch in each glance; int32."""

    write: SlotArray  # slot of each sample [..., B]; written in the first glance
    reads: (
        SlotArray  # slots of each glance's replay batch [..., glances, R]; after the first, the batch is in
    )
    order: SlotArray  # samples of the batch in the order of each glance [..., glances, B]
    position: SlotArray  # of the planner after the step [..., n]


class MetaPlanner:
    """The planner of La-MAML: each glance has a replay batch and an order of the batch.

    Args:
        hparams: settings of La-MAML.
        spec: description of the stream.
        seed: training seed.
    """

    def __init__(self, hparams: LaMAMLHParams, spec: StreamSpec, seed: int) -> None:
        self._glances = hparams.glances
        self._memory = MemoryPlanner(hparams, spec, seed, draws=1, later_draws=hparams.glances - 1)
        self._order = plan.Uniforms(seed, "order of glances")
        self._seen = 0
        self.slots = self._memory.slots

    def next(self, y: Any, t: Any) -> MetaPlan:
        """Return the plan of the next step, or of the next steps; see `Planner.next`."""
        write, reads, position = self._memory.next(y, t)
        shape = (*write.shape[:-1], self._glances, write.shape[-1])
        keys = np.reshape(self._order.take(self._seen * self._glances, write.size * self._glances), shape)
        self._seen += write.size
        order = np.argsort(keys, axis=-1, kind="stable").astype(np.int32)
        return MetaPlan(write, reads, order, position)

    @property
    def state(self) -> IntArray:
        """The number of samples seen, then the state of the memory's planner, int64 `[n]`; may be set."""
        return np.concatenate([[self._seen], self._memory.state])

    @state.setter
    def state(self, values: IntArray) -> None:
        self._memory.state = values[1:]
        self._seen = int(values[0])

    @property
    def position(self) -> SlotArray:
        """The position of the memory's planner, which also counts the samples seen, int32 `[n]`."""
        return self._memory.position

    def resume(self, position: Any) -> None:
        """Continue from the position of another planner."""
        self._memory.resume(position)
        self._seen = int(position[1])
