"""Replay memories: which sample is in which slot, and which slots a step reads, decided in NumPy.

The decisions are a function of the seed and of the labels and tasks seen so far. They do not depend on a
framework. The contents are preallocated arrays in the state of the algorithm, on the framework's side.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from sequel_core.hparams import MemoryHParams
from sequel_core.stream import plan
from sequel_core.stream.arrays import IntArray, SlotArray
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.planner import counted
from sequel_core.stream.task import JoinedSplit, Samples, Split, Task, join


class StepPlan(NamedTuple):
    """What a step writes and reads; int32, "none" is the number of the memory's slots, 1 if it has none."""

    write: SlotArray  # of each sample [..., B]; none where it is not kept, or overwritten in the same step
    reads: SlotArray  # of each draw [..., draws, R], ascending, as before the step; none where it has less
    position: SlotArray  # of the planner after the step [..., n]


class Policy(Protocol):
    """Assigns slots to samples, one after the other."""

    state: SlotArray  # what the decisions so far have left, int32; always as long; read-only for others

    def slot(self, y: int, t: int, u: float) -> int:
        """Return the slot of the next sample, or the number of slots for none; u is uniform in [0, 1)."""
        ...

    def readable(self, t: int) -> Sequence[int]:
        """Return the slots that a step of task t may read."""
        ...

    def resume(self, state: IntArray) -> None:
        """Continue from the state of another one."""
        ...


class Reservoir:
    """Every sample of the stream is held with the same probability M / n (Vitter 1985, algorithm R)."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._seen = 0
        self.state = np.zeros(1, np.int32)  # samples seen

    def slot(self, y: int, t: int, u: float) -> int:
        """Return where sample n (from 1) goes: slot n - 1 up to M, then j uniform in 0..n-1 if j < M."""
        self._seen += 1
        self.state[0] = self._seen
        return self._seen - 1 if self._seen <= self._size else min(int(u * self._seen), self._size)

    def readable(self, t: int) -> Sequence[int]:
        """Return the slots that are filled."""
        return range(min(self._seen, self._size))

    def resume(self, state: IntArray) -> None:
        """Continue from the state of another one."""
        self.state[:] = state
        self._seen = int(state[0])


class Parts:
    """Parts of fixed and equal size, each with the latest samples (ring) or a reservoir of its own.

    Args:
        table: part of each task and class, int `[T, num_classes]`; -1 where a task lacks the class.
        quota: slots of a part.
        ring: keep the latest samples of a part; else each of them with the same probability.
        past_only: tasks are read only while another one is trained on; a batch is of its first sample's task.
    """

    def __init__(self, table: IntArray, quota: int, ring: bool, past_only: bool) -> None:
        self._table = table.tolist()
        parts = int(table.max()) + 1
        self._quota, self._ring, self._past_only = quota, ring, past_only
        self._size = parts * quota
        self._seen = [0] * parts
        self.state = np.zeros(parts, np.int32)  # samples seen of each part
        self._task = [int(np.argwhere(table == part)[0, 0]) for part in range(parts)]
        self._readable: list[int] = []
        self._readable_for: int | None = None

    def slot(self, y: int, t: int, u: float) -> int:
        """Return the slot in the part of task t and class y."""
        part = self._table[t][y]
        seen, quota = self._seen[part], self._quota
        self._seen[part] = self.state[part] = seen + 1
        if seen < quota:
            self._readable_for = None
            within = seen
        else:
            within = seen % quota if self._ring else int(u * (seen + 1))
        return part * quota + within if within < quota else self._size

    def readable(self, t: int) -> Sequence[int]:
        """Return the slots that are filled, without those of task t where only the past is read."""
        if self._readable_for != t:
            self._readable = [
                part * self._quota + k
                for part, seen in enumerate(self._seen)
                if not (self._past_only and self._task[part] == t)
                for k in range(min(seen, self._quota))
            ]
            self._readable_for = t
        return self._readable

    def resume(self, state: IntArray) -> None:
        """Continue from the state of another one."""
        self.state[:] = state
        self._seen = self.state.tolist()
        self._readable_for = None


class Balanced:
    """Equal parts for the classes, or tasks, seen so far (Chrysakis & Moens 2020, algorithm 1).

    While there is room everything is kept. Then a group that has never been the largest takes the place of a
    random sample of the largest; any other holds each of its own samples with the same probability.

    Args:
        size: number of slots.
        groups: number of classes or tasks.
        by_task: whether the groups are tasks.
    """

    def __init__(self, size: int, groups: int, by_task: bool) -> None:
        self._size, self._by_task = size, by_task
        self._seen = [0] * groups
        # samples seen of each group, whether it has ever been the largest, and the group of each slot
        self.state = np.full(2 * groups + size, -1, np.int32)
        self.state[: 2 * groups] = 0
        self._has_led = self.state[groups : 2 * groups]
        self._owner = self.state[2 * groups :]
        self._members: list[list[int]] = [[] for _ in range(groups)]  # slots, ascending
        self._filled = 0

    def slot(self, y: int, t: int, u: float) -> int:
        """Return the slot of a sample of class y and task t."""
        group = t if self._by_task else y
        self._seen[group] += 1
        self.state[group] = self._seen[group]
        if self._filled < self._size:
            self._members[group].append(self._filled)
            self._owner[self._filled] = group
            self._filled += 1
            return self._filled - 1
        if not self._has_led[group]:
            most = max(map(len, self._members))
            leaders = [g for g, slots in enumerate(self._members) if len(slots) == most]
            for leader in leaders:
                self._has_led[leader] = 1
            if not self._has_led[group]:
                which, place = divmod(int(u * most * len(leaders)), most)
                slot = self._members[leaders[which]].pop(place)
                insort(self._members[group], slot)
                self._owner[slot] = group
                return slot
        j = int(u * self._seen[group])
        own = self._members[group]
        return own[j] if j < len(own) else self._size

    def readable(self, t: int) -> Sequence[int]:
        """Return the slots that are filled."""
        return range(self._filled)

    def resume(self, state: IntArray) -> None:
        """Continue from the state of another one."""
        self.state[:] = state
        groups, owner = len(self._seen), self._owner.tolist()
        self._seen = self.state[:groups].tolist()
        self._members = [[slot for slot, of in enumerate(owner) if of == group] for group in range(groups)]
        self._filled = sum(map(len, self._members))


class MemoryPlanner:
    """The planner of replay methods.

    Args:
        hparams: with the policy and the sizes.
        spec: of the stream.
        seed: of the run.
        draws: independent draws that a step makes from the memory.
        later_draws: further draws, from the memory as it is after the step has written to it.
        past_only: read the samples of past tasks only; needs a memory with parts.

    Raises:
        ValueError: the memory does not divide into its parts, is smaller than a draw, or has none to read the
            past alone from.
    """

    def __init__(
        self,
        hparams: MemoryHParams,
        spec: StreamSpec,
        seed: int,
        draws: int = 1,
        past_only: bool = False,
        later_draws: int = 0,
    ) -> None:
        hparams.check_memory(spec, batch_size=1)
        self.slots = hparams.slots(spec.num_tasks)
        self._none = max(self.slots, 1)  # a memory has one slot at least, as its arrays must not be empty
        self._hparams, self._spec = hparams, spec
        self._early, self._draws = draws, draws + later_draws
        self._drawn = hparams.drawn if self.slots else 0
        self._policy = policy(hparams, spec, past_only)
        self._known = {(int(y), int(t)) for t, y in np.argwhere(spec.mask)}
        self._keep, self._pick = (plan.Uniforms(seed, f"memory {name}") for name in ("writes", "reads"))
        self._steps = 0
        self._seen = 0

    def next(self, y: Any, t: Any) -> StepPlan:
        """Return the plan of the next step, or of the next steps; see `Planner.next`.

        Raises:
            ValueError: a batch larger than the memory, a label or task that the spec does not have, or more
                samples than can be counted; nothing was decided.
        """
        labels, tasks = np.asarray(y), np.asarray(t)
        if labels.shape != tasks.shape or labels.ndim not in (1, 2) or not labels.shape[-1]:
            raise ValueError(
                "y and t must be alike, [B] or [steps, B] with at least one sample, "
                f"got {list(labels.shape)} and {list(tasks.shape)}"
            )
        lead, size = labels.shape[:-1], labels.shape[-1]
        steps = labels.size // size
        seen = counted("samples", self._seen + labels.size)
        write = np.full(labels.shape, self._none, np.int32)
        reads = np.full((*lead, self._draws, self._drawn), self._none, np.int32)
        position = np.zeros((steps, 2 + len(self._policy.state)), np.int32)
        position[:, 0] = np.arange(self._steps + 1, self._steps + steps + 1)
        position[:, 1] = np.arange(self._seen + size, seen + size, size)
        step_plan = StepPlan(write, reads, position.reshape(*lead, position.shape[1]))
        if self.slots == 0:
            self._steps, self._seen = self._steps + steps, seen
            return step_plan
        if size > self.slots:
            self._hparams.check_memory(self._spec, size)
        self._check_known_labels(labels, tasks)
        keep = self._keep.take(self._seen, labels.size)
        pick = self._pick.take(self._steps * self._draws * self._drawn, reads.size)
        rows = zip(
            labels.reshape(-1, size).tolist(),
            tasks.reshape(-1, size).tolist(),
            write.reshape(-1, size),
            reads.reshape(steps, self._draws, self._drawn),
            position[:, 2:],
            strict=True,
        )
        for row, (row_y, row_t, row_write, row_reads, row_state) in enumerate(rows):
            start = row * self._draws * self._drawn
            self._read(row_t[0], pick[start:], row_reads[: self._early])
            last = {}
            for k in range(size):
                last[self._policy.slot(row_y[k], row_t[k], keep[row * size + k])] = k
            row_write[list(last.values())] = list(last)
            if self._early < self._draws:
                start += self._early * self._drawn
                self._read(row_t[0], pick[start:], row_reads[self._early :])
            row_state[:] = self._policy.state
        self._steps, self._seen = self._steps + steps, seen
        return step_plan

    def _read(self, task: int, u: Sequence[float], draws: SlotArray) -> None:
        """Fill in the slots of some draws `[draws, R]`."""
        readable = self._policy.readable(task)
        for k, found in enumerate(draws):
            chosen = distinct(u[k * self._drawn : (k + 1) * self._drawn], len(readable))
            found[: len(chosen)] = [readable[slot] for slot in chosen]

    def _check_known_labels(self, labels: NDArray[Any], tasks: NDArray[Any]) -> None:
        strangers = {*zip(labels.ravel().tolist(), tasks.ravel().tolist(), strict=True)} - self._known
        if strangers:
            y, t = min(strangers)
            num_tasks, num_classes = self._spec.mask.shape
            raise ValueError(
                f"a sample has label {y} and task {t}, which the stream's spec does not have; "
                f"it has {num_tasks} tasks and {num_classes} classes, of each task those in spec.mask"
            )

    @property
    def state(self) -> IntArray:
        """All that decisions to come depend on beside the seed, int64 `[n]`, n fixed; may be set."""
        return np.concatenate([np.asarray([self._steps, self._seen], np.int64), self._policy.state])

    @state.setter
    def state(self, values: IntArray) -> None:
        if np.shape(values) != self.state.shape:
            raise ValueError(
                f"the planner's state must have {self.state.size} numbers, got {np.size(values)}; "
                "it comes from a memory of other settings"
            )
        steps, seen, *_ = np.asarray(values).tolist()
        self._steps, self._seen = steps, counted("samples", seen)
        self._policy.resume(np.asarray(values)[2:])

    @property
    def position(self) -> SlotArray:
        """Steps, samples seen, and the state of the policy, int32 `[n]`."""
        return self.state.astype(np.int32)

    def resume(self, position: Any) -> None:
        """Continue from the position of another one."""
        self.state = np.asarray(position, np.int64)


def policy(hparams: MemoryHParams, spec: StreamSpec, past_only: bool) -> Policy:
    """Return the policy that the settings name, with nothing seen."""
    size = hparams.slots(spec.num_tasks)
    if past_only and hparams.memory in ("reservoir", "class_balanced", "task_balanced"):
        raise ValueError(f"past_only needs a memory in parts, got memory={hparams.memory}; use ring")
    if hparams.memory == "reservoir":
        return Reservoir(size)
    if hparams.memory in ("class_balanced", "task_balanced"):
        by_task = hparams.memory == "task_balanced"
        return Balanced(size, spec.num_tasks if by_task else spec.num_classes, by_task)
    table = np.full(spec.mask.shape, -1, np.int64)
    if hparams.memory == "task_quota":
        table[spec.mask] = np.nonzero(spec.mask)[0]
    else:
        table[spec.mask] = np.arange(spec.mask.sum())
    quota = size // hparams.parts(spec)
    ring = hparams.memory == "ring"
    return Parts(table, quota, ring, past_only or not ring)


def distinct(u: Sequence[float], population: int) -> list[int]:
    """Return `min(len(u), population)` different numbers below `population`, ascending (Floyd's algorithm).

    Every such set is as likely as any other.

    Args:
        u: uniform in [0, 1).
        population: >= 0.
    """
    chosen: set[int] = set()
    for x, top in zip(u, range(max(0, population - len(u)), population), strict=False):
        j = int(x * (top + 1))
        chosen.add(top if j in chosen else j)
    return sorted(chosen)


def memory_stream(samples: Samples, tasks: Collection[int] | None = None) -> JoinedSplit:
    """Return the samples that a memory holds as a training stream, task after task.

    Args:
        samples: of the memory, images `[n, H, W, C]`; they are copied.
        tasks: indices of the tasks whose samples are wanted; None for all.
    """
    wanted = np.unique(samples.t) if tasks is None else sorted(set(tasks))
    parts = []
    for task in wanted:
        own = samples.t == task
        parts.append(Split(samples.x[own], samples.y[own].astype(np.int64), int(task)))
    return JoinedSplit(tuple(parts))


def joined_with_memory(task: Task, memory: JoinedSplit) -> Task:
    """Return a task whose training samples are its own and, after them, those of a memory."""
    classes = {*task.classes, *memory.targets.tolist()}
    return replace(task, train=join([task.train, memory]), classes=tuple(sorted(classes)))
