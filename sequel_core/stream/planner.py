"""Planners: they decide in NumPy, on the host, what a training step needs beside its batch.

    planner = algorithm.planner(benchmark.spec, state)
    batch = Batch(x, y, t, planner.next(y, t))

A plan contains the planner's position after the step. A Flax step puts it into the state, so a planner that
is made from the state resumes at exactly that position.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol, TypeVar

import numpy as np

from sequel_core.stream.arrays import IntArray, SlotArray

LARGEST = int(np.iinfo(np.int32).max)
"""Largest count that a position can hold."""


class Planner(Protocol):
    """Decides on the host what a training step needs besides its batch."""

    def next(self, y: Any, t: Any) -> Any:
        """Return the plan of the next step or steps, for `Batch.plan`.

        Args:
            y: labels of a batch `[B]`, or of several batches `[steps, B]`.
            t: task index of each sample, same shape.
        """
        ...

    @property
    def state(self) -> IntArray:
        """Everything that coming decisions depend on besides the seed, int64 `[n]`, n fixed; can be set."""
        ...

    @state.setter
    def state(self, values: IntArray) -> None: ...

    @property
    def position(self) -> SlotArray | None:
        """The number of steps planned, then the state, int32 `[n]`; None if nothing is planned."""
        ...

    def resume(self, position: Any) -> None:
        """Continue from a saved position."""
        ...


P = TypeVar("P", bound=Planner)


def resumed(planner: P, position: Any) -> P:
    """Return the planner after setting it to the position in an algorithm's state.

    Args:
        planner: made with the settings, stream and seed of the state.
        position: `state.position`, int32 `[n]`, or None.

    Raises:
        ValueError: the position belongs to other settings, or a step received the plan of another step.
    """
    _check_length(planner, position)
    if position is not None:
        planner.resume(np.asarray(position))
    return planner


def check_position(planner: Planner, position: Any) -> None:
    """Raise ValueError if the planner is not at the position in an algorithm's state.

    Args:
        planner: plans the next steps.
        position: `state.position`, int32 `[n]`, or None.
    """
    _check_length(planner, position)
    if position is None:
        return
    planned, taken = np.asarray(planner.position), np.asarray(position)
    if not np.array_equal(planned, taken):
        raise ValueError(
            f"the planner has planned {planned[0]} steps and the state has taken {taken[0]}"
            f"{'' if planned[0] != taken[0] else ', with other samples'}; make the planner from the state "
            "that training continues with: planner = algorithm.planner(spec, state)"
        )


def check_steps(position: Any) -> None:
    """Raise ValueError if a step received the plan of another step.

    Args:
        position: `state.position`, int32 `[..., n]`, or None.
    """
    if position is not None and np.asarray(position)[..., 0].min() < 0:
        raise ValueError(
            "a step received the plan of another step, so the memory and the planner no longer agree; "
            "restore an earlier state, and make the planner from the state that training continues with: "
            "planner = algorithm.planner(spec, state)"
        )


def _check_length(planner: Planner, position: Any) -> None:
    planned = planner.position
    shapes = ["none" if p is None else str(list(np.shape(p))) for p in (planned, position)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"state.position must have shape {shapes[0]} with these settings and this spec, got {shapes[1]}; "
            "use the settings and the spec that the state was made with"
        )
    check_steps(position)


def counted(name: str, value: int) -> int:
    """Return the count; raise ValueError if it does not fit into a position."""
    if value > LARGEST:
        raise ValueError(f"a planner counts up to {LARGEST} {name}, got {value}; train on fewer")
    return value


class NoPlanner:
    """Planner of algorithms whose steps need only their batches."""

    def next(self, y: Any, t: Any) -> Any:
        """Return `()`."""
        return ()

    @property
    def position(self) -> None:
        """Nothing."""
        return None

    def resume(self, position: Any) -> None:
        """Do nothing."""

    @property
    def state(self) -> IntArray:
        """Nothing, int64 `[0]`; may be set to that."""
        return np.empty(0, np.int64)

    @state.setter
    def state(self, values: IntArray) -> None:
        if np.size(values):
            raise ValueError(
                f"the planner's state must have 0 numbers, got {np.size(values)}; it comes from a stream "
                "with augmentation or from another method"
            )


class AheadPlanner:
    """A planner that can plan several steps at once, which takes a fifth of the time of single steps.

    `next` returns a plan that was made ahead if it gets the same labels and tasks. If it gets others, the
    planner first returns to the step that was taken last. It does so, too, when its state is read.

    Args:
        planner: makes the plans. Each plan has a `position`, as the planner itself, unless that is None.

    Example:
        >>> from sequel_core import ERHParams, LeafSpec
        >>> from sequel_core.stream.benchmark import StreamSpec
        >>> from sequel_core.stream.memory import MemoryPlanner
        >>> spec = StreamSpec(LeafSpec((3,)), 2, 1, "domain", np.ones((1, 2), bool))
        >>> planner = AheadPlanner(MemoryPlanner(ERHParams(mem_size=6, mem_batch_size=2), spec, seed=0))
        >>> planner.prepare(y=np.array([[0, 1], [1, 1]]), t=np.zeros((2, 2), int))
        >>> planner.next(y=[0, 1], t=[0, 0]).write.tolist(), planner.state.tolist()
        ([0, 1], [1, 2, 2])
    """

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self._coming: deque[tuple[Any, Any, Any]] = deque()  # labels, tasks and plan of each step
        self._taken: Any = None  # the position after the step that was taken last, if others are coming

    def prepare(self, y: Any, t: Any) -> None:
        """Plan the steps that follow those that are planned already.

        Args:
            y: labels of their batches `[steps, B]`, or None.
            t: task indices `[steps, B]`.
        """
        if self._planner.position is None:
            return
        if not self._coming:
            self._taken = self._planner.position
        plans = single_plans(self._planner.next(y, t), len(t))
        self._coming.extend(zip([None] * len(t) if y is None else y, t, plans, strict=True))

    def next(self, y: Any, t: Any) -> Any:
        """Return the plan of the next step or steps; see `Planner.next`."""
        if self._coming:
            labels, tasks, plan = self._coming[0]
            if np.array_equal(labels, y) and np.array_equal(tasks, t):
                self._coming.popleft()
                self._taken = plan.position
                return plan
            self._return()
        return self._planner.next(y, t)

    def _return(self) -> None:
        """Forget the steps that were not taken."""
        if self._coming:
            self._coming.clear()
            self._planner.resume(self._taken)

    @property
    def state(self) -> IntArray:
        """See `Planner.state`."""
        self._return()
        return self._planner.state

    @state.setter
    def state(self, values: IntArray) -> None:
        self._coming.clear()
        self._planner.state = values

    @property
    def position(self) -> SlotArray | None:
        """See `Planner.position`."""
        self._return()
        return self._planner.position

    def resume(self, position: Any) -> None:
        """Continue from a saved position."""
        self._coming.clear()
        self._planner.resume(position)


def single_plans(plan: Any, count: int) -> list[Any]:
    """Return the plan of each of `count` steps, from a plan of arrays `[count, ...]`."""
    if not isinstance(plan, tuple):
        return list(plan)
    if not plan:
        return [plan] * count
    return [type(plan)(*parts) for parts in zip(*(single_plans(part, count) for part in plan), strict=True)]
