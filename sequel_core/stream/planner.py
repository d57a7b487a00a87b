"""Planners: they decide in NumPy, on the host, what a training step needs beside its batch.

    planner = algorithm.planner(benchmark.spec, state)
    batch = Batch(x, y, t, planner.next(y, t))

A plan contains the planner's position after the step. A Flax step puts it into the state, so a planner that
is made from the state resumes at exactly that position.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import numpy as np

from sequel_core.stream.arrays import IntArray, SlotArray

LARGEST = int(np.iinfo(np.int32).max)
"""Largest count that a position can hold."""


class Planner(Protocol):
    """Decides on the host what the steps of an algorithm need beside their batches."""

    def next(self, y: Any, t: Any) -> Any:
        """Return what goes into `Batch.plan`.

        Args:
            y: labels of a batch `[B]`, or of several `[steps, B]`.
            t: task index of each sample, alike.
        """
        ...

    @property
    def state(self) -> IntArray:
        """All that decisions to come depend on beside the seed, int64 `[n]`, n fixed; may be set."""
        ...

    @state.setter
    def state(self, values: IntArray) -> None: ...

    @property
    def position(self) -> SlotArray | None:
        """The same with the number of steps planned first, int32 `[n]`; None if there is nothing to plan."""
        ...

    def resume(self, position: Any) -> None:
        """Continue from the position of another one."""
        ...


P = TypeVar("P", bound=Planner)


def resumed(planner: P, position: Any) -> P:
    """Return the planner, set to the position that the state of an algorithm holds.

    Args:
        planner: of the same settings, stream and seed.
        position: `state.position`, int32 `[n]`, or None.

    Raises:
        ValueError: the position is of other settings, or a step of the state was given a plan that was made
            for another step.
    """
    _check_length(planner, position)
    if position is not None:
        planner.resume(np.asarray(position))
    return planner


def check_position(planner: Planner, position: Any) -> None:
    """Raise ValueError if a planner is not where the state of an algorithm is.

    Args:
        planner: that the next steps are to be planned with.
        position: `state.position`, int32 `[n]`, or None.
    """
    _check_length(planner, position)
    if position is None:
        return
    own, found = np.asarray(planner.position), np.asarray(position)
    if not np.array_equal(own, found):
        raise ValueError(
            f"the planner has planned {own[0]} steps and the state has taken {found[0]}"
            f"{'' if own[0] != found[0] else ', of other samples'}; a planner has to be made from the state "
            "that training continues with: planner = algorithm.planner(spec, state)"
        )


def check_steps(position: Any) -> None:
    """Raise ValueError if a step was given a plan that was made for another step.

    Args:
        position: `state.position`, int32 `[..., n]`, or None.
    """
    if position is not None and np.asarray(position)[..., 0].min() < 0:
        raise ValueError(
            "a step was given a plan that was made for another step of the stream, so what the memory holds "
            "is not what the planner knows; restore an earlier state, and make the planner from the state "
            "that training continues with: planner = algorithm.planner(spec, state)"
        )


def _check_length(planner: Planner, position: Any) -> None:
    own = planner.position
    if (own is None) != (position is None) or (own is not None and np.shape(position) != own.shape):
        wanted, found = ("none" if p is None else str(list(np.shape(p))) for p in (own, position))
        raise ValueError(
            f"state.position must have the planner's shape, {wanted} with these settings and this spec, got "
            f"{found}; use the settings and the spec that the state was made with"
        )
    check_steps(position)


def counted(name: str, value: int) -> int:
    """Return a count; raise ValueError if it is more than a position can hold."""
    if value > LARGEST:
        raise ValueError(f"a planner counts up to {LARGEST} {name}, got {value}; train on fewer")
    return value


class NoPlanner:
    """The planner of algorithms whose steps need nothing but their batches."""

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
