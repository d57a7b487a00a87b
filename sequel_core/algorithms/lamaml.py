"""La-MAML."""

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
    """La-MAML, look-ahead meta-learning (Gupta et al. 2020); C-MAML with `learn_lr=False`."""

    name: ClassVar[str] = "lamaml"

    glances: int = setting(5, "updates on each batch", ge=1)
    n_inner_updates: int | None = setting(
        None, "inner steps of an update, each on an equal part of the batch; null for one per sample", ge=1
    )
    second_order: bool = setting(False, "differentiate through the gradients of the inner steps")
    learn_lr: bool = setting(True, "learn a rate of every weight; false for the fixed ones of C-MAML")
    lr_alpha: float = setting(0.3, "learning rate of the rates", ge=0, only=("learn_lr", True))
    alpha_init: float = setting(0.15, "rate of every weight at first", gt=0)
    sync_update: bool = setting(
        False,
        "update the weights by the optimizer, beside the rates (Sync); false: by the rates just updated",
    )
    grad_clip_norm: float | None = setting(
        2.0, "greatest norm of the gradient of the weights, and of the rates; null for no clipping", gt=0
    )
    inner_clip: float | None = setting(
        2.0,
        "greatest absolute value in an inner gradient; null for none, which is what the official MNIST code "
        "comes to (it clamps and drops the result), while its CIFAR code clamps",
        gt=0,
    )

    def check(self, spec: StreamSpec, training: TrainingHParams) -> None:
        """Raise ValueError where memory, inner steps or clipping do not fit."""
        super().check(spec, training)
        self.check_parts(training.batch_size)
        if training.grad_clip is not None:
            raise ValueError(
                f"grad_clip_norm is what clips in lamaml, got grad_clip={training.grad_clip}; drop grad_clip"
            )
        if self.lr_decay != 1 and not self.sync_update:
            raise ValueError(
                f"lr_decay must be 1 where the rates take the optimizer's place, got {self.lr_decay}; set "
                "sync_update=true or drop lr_decay"
            )

    def check_parts(self, batch_size: int) -> int:
        """Return the inner steps of a batch; raise ValueError where it does not divide into them."""
        parts = batch_size if self.n_inner_updates is None else self.n_inner_updates
        if batch_size % parts:
            raise ValueError(
                f"n_inner_updates must divide batch_size={batch_size}, got {parts}; change one of them"
            )
        return parts


class MetaPlan(NamedTuple):
    """What a step of La-MAML writes, reads and in which order it looks at its batch; int32."""

    write: SlotArray  # slot of each sample [..., B], written in the first glance
    reads: SlotArray  # slots of each glance's draw [..., glances, R]; after the first the batch is in
    order: SlotArray  # samples of the batch in the order of each glance [..., glances, B]
    position: SlotArray  # of the planner after the step [..., n]


class MetaPlanner:
    """The planner of La-MAML: each glance has a draw from the memory and an order of the batch.

    Args:
        hparams: with the memory's settings and the number of glances.
        spec: of the stream.
        seed: of the run.
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
        """Samples seen, then the memory planner's, int64 `[n]`; may be set."""
        return np.concatenate([[self._seen], self._memory.state])

    @state.setter
    def state(self, values: IntArray) -> None:
        self._memory.state = values[1:]
        self._seen = int(values[0])

    @property
    def position(self) -> SlotArray:
        """That of the memory's planner, which counts the samples seen, too, int32 `[n]`."""
        return self._memory.position

    def resume(self, position: Any) -> None:
        """Continue from the position of another one."""
        self._memory.resume(position)
        self._seen = int(position[1])
