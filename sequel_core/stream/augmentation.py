"""Which part of an image a step sees, and whether mirrored: decided in NumPy, outside both frameworks.

The crops come with the batch (`Batch.plan`), and the step applies them: memories keep images as they are, and
what is replayed is augmented afresh.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sequel_core.stream import plan
from sequel_core.stream.arrays import IntArray, SlotArray
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.images import Augmentation
from sequel_core.stream.planner import Planner, counted
from sequel_core.stream.task import Batch

NUMBERS = 3
"""Numbers of a crop: rows down and columns right that it begins at, within +-padding, and 1 for a mirror."""


class AugmentedPlan(NamedTuple):
    """A step's plan with the crops of its samples, int32."""

    plan: Any  # of the method; () where it needs none
    own: Any  # of the batch [..., B, 3]
    reads: Any  # of each draw from a memory [..., draws, R, 3]
    position: Any  # of the planner after the step, int32 [..., n]


class AugmentingPlanner:
    """Adds the crops of a stream's augmentation to what a method plans.

    Args:
        planner: of the method.
        augmentation: of the stream.
        seed: of the run.
    """

    def __init__(self, planner: Planner, augmentation: Augmentation, seed: int) -> None:
        self._planner = planner
        self._augmentation = augmentation
        self._seed = seed
        self._steps = self._seen = self._read = 0

    def next(self, y: Any, t: Any) -> AugmentedPlan:
        """Return the plan of the next step, or of the next steps; see `Planner.next`."""
        own, shape = self._planner.next(y, t), np.shape(y)
        drawn = own.reads.shape if hasattr(own, "reads") else (*shape[:-1], 0, 0)
        crops = [
            self._crops(name, size, start)
            for name, size, start in (("batch", shape, self._seen), ("reads", drawn, self._read))
        ]
        steps = int(np.prod(shape[:-1], dtype=np.int64))
        counts = np.arange(1, steps + 1)[:, None] * [[1, shape[-1], int(np.prod(drawn[-2:]))]]
        counts += [[self._steps, self._seen, self._read]]
        counted("samples", int(counts[-1].max()))
        self._steps, self._seen, self._read = counts[-1].tolist()
        inner = own.position.reshape(steps, own.position.shape[-1]) if own else np.empty((steps, 0), np.int32)
        position = np.concatenate([counts.astype(np.int32), inner], axis=1)
        return AugmentedPlan(own, crops[0], crops[1], position.reshape(*shape[:-1], position.shape[1]))

    def _crops(self, name: str, shape: tuple[int, ...], start: int) -> NDArray[np.int32]:
        """Return crops `[*shape, 3]`, those of item `start` of the stream `name` and of what follows it."""
        count, padding = int(np.prod(shape)), self._augmentation.padding
        u = plan.uniform(self._seed, f"crops of {name}", count=NUMBERS * count, start=NUMBERS * start)
        crops = np.floor(u.reshape(count, NUMBERS) * [2 * padding + 1, 2 * padding + 1, 2]).astype(np.int32)
        crops -= np.asarray([padding, padding, 0], np.int32)
        crops[:, 2] *= self._augmentation.flip
        return crops.reshape(*shape, NUMBERS)

    @property
    def state(self) -> IntArray:
        """Samples seen and drawn, then the method's planner's state, int64 `[n]`; may be set."""
        return np.concatenate([np.asarray([self._seen, self._read], np.int64), self._planner.state])

    @state.setter
    def state(self, values: IntArray) -> None:
        if np.shape(values) != self.state.shape:
            raise ValueError(
                f"the planner's state must have {self.state.size} numbers, got {np.size(values)}; it comes "
                "from a stream without augmentation or a method of other settings"
            )
        self._planner.state = values[2:]
        self._seen, self._read = int(values[0]), int(values[1])

    @property
    def position(self) -> SlotArray:
        """Steps planned, samples seen and drawn, then the method's planner's, int32 `[n]`."""
        inner = () if self._planner.position is None else self._planner.position
        return np.asarray([self._steps, self._seen, self._read, *inner], np.int32)

    def resume(self, position: Any) -> None:
        """Continue from the position of another one."""
        self._steps, self._seen, self._read = map(int, position[:3])
        self._planner.resume(position[3:])


def augmenting(planner: Planner, spec: StreamSpec, seed: int) -> Planner:
    """Return the planner; where the stream's samples are augmented, one that plans their crops too."""
    return AugmentingPlanner(planner, spec.augmentation, seed) if spec.augmentation else planner


def method_plan(batch: Batch) -> Any:
    """Return what the method itself has planned for a batch."""
    return batch.plan.plan if isinstance(batch.plan, AugmentedPlan) else batch.plan
