"""Random crops and flips, drawn in NumPy outside both frameworks.

The crops are part of the plan (`Batch.plan`) and the step applies them. Memories keep the original images, so
a replayed sample gets a new crop each time.
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
"""Numbers per crop: row and column offset, each in [-padding, padding], and 1 for a flip, else 0."""


class AugmentedPlan(NamedTuple):
    """The plan of a method with the crops of a step, int32."""

    plan: Any  # of the method; () for methods without a planner
    batch: Any  # crops of the batch [..., B, 3]
    reads: Any  # crops of each draw from a memory [..., draws, R, 3]
    position: Any  # position of the planner after the step [..., n]


class AugmentingPlanner:
    """Adds random crops to the plans of a method.

    Args:
        planner: planner of the method.
        augmentation: augmentation of the stream.
        seed: seed of the run.
    """

    def __init__(self, planner: Planner, augmentation: Augmentation, seed: int) -> None:
        self._planner = planner
        self._augmentation = augmentation
        self._seed = seed
        self._steps = self._seen = self._read = 0

    def next(self, y: Any, t: Any) -> AugmentedPlan:
        """Return the plan of the next step, or of the next steps; see `Planner.next`."""
        inner, shape = self._planner.next(y, t), np.shape(t)
        drawn = inner.reads.shape if hasattr(inner, "reads") else (*shape[:-1], 0, 0)
        crops = [
            random_crops(self._augmentation, size, self._seed, f"crops of {name}", start=start)
            for name, size, start in (("batch", shape, self._seen), ("reads", drawn, self._read))
        ]
        steps = int(np.prod(shape[:-1], dtype=np.int64))
        counts = np.arange(1, steps + 1)[:, None] * [[1, shape[-1], int(np.prod(drawn[-2:]))]]
        counts += [[self._steps, self._seen, self._read]]
        counted("samples", int(counts[-1].max()))
        self._steps, self._seen, self._read = counts[-1].tolist()
        method = inner.position if inner else np.empty((steps, 0), np.int32)
        position = np.concatenate([counts.astype(np.int32), method.reshape(steps, method.shape[-1])], axis=1)
        return AugmentedPlan(inner, crops[0], crops[1], position.reshape(*shape[:-1], position.shape[1]))

    @property
    def state(self) -> IntArray:
        """Samples seen and drawn, then the state of the method's planner, int64 `[n]`; can be set."""
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
        """Steps planned, samples seen and drawn, then the position of the method's planner, int32 `[n]`."""
        inner = () if self._planner.position is None else self._planner.position
        return np.asarray([self._steps, self._seen, self._read, *inner], np.int32)

    def resume(self, position: Any) -> None:
        """Continue from a saved position."""
        self._steps, self._seen, self._read = map(int, position[:3])
        self._planner.resume(position[3:])


def random_crops(
    augmentation: Augmentation, shape: tuple[int, ...], *key: object, start: int = 0
) -> NDArray[np.int32]:
    """Return the crops `[*shape, 3]` of the random stream `key`, from item `start` on."""
    count, padding = int(np.prod(shape)), augmentation.padding
    u = plan.uniform(*key, count=NUMBERS * count, start=NUMBERS * start)
    crops = np.floor(u.reshape(count, NUMBERS) * [2 * padding + 1, 2 * padding + 1, 2]).astype(np.int32)
    crops -= np.asarray([padding, padding, 0], np.int32)
    crops[:, 2] *= augmentation.flip
    return crops.reshape(*shape, NUMBERS)


def augmenting(planner: Planner, spec: StreamSpec, seed: int) -> Planner:
    """Return the planner, extended by crops if the stream is augmented."""
    return AugmentingPlanner(planner, spec.augmentation, seed) if spec.augmentation else planner


def method_plan(batch: Batch) -> Any:
    """Return the method's part of the plan of a batch."""
    return batch.plan.plan if isinstance(batch.plan, AugmentedPlan) else batch.plan
