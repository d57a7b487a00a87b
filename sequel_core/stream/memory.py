"""Replay memories: which sample is in which slot, and which slots a step reads, decided in NumPy.

The decisions are a function of the seed and of the labels and tasks seen so far. They do not depend on a
framework. The contents are preallocated arrays in the state of the algorithm, on the framework's side.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import numpy as np

from sequel_core.hparams import MemoryHParams
from sequel_core.stream import plan
from sequel_core.stream.arrays import IntArray, SlotArray
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.planner import counted
from sequel_core.stream.task import JoinedSplit, Samples, Split, Task, join
from sequel_core.stream.trees import tree_map


class StepPlan(NamedTuple):
    """Slots that a step writes and reads, int32; M (1 for a memory without slots) stands for no slot."""

    write: SlotArray  # slot of each sample [..., B]; M if it is not kept or overwritten in the same step
    reads: SlotArray  # slots of each draw [..., draws, R], ascending; padded with M
    position: SlotArray  # position of the planner after the step [..., n]


class Policy(Protocol):
    """Assigns slots to samples, one after the other."""

    state: SlotArray  # everything that coming decisions depend on, int32 of fixed length

    def slot(self, y: int, t: int, u: float) -> int:
        """Return the slot of the next sample, or M if it is not kept; u is uniform in [0, 1)."""
        ...

    def readable(self, t: int) -> Sequence[int]:
        """Return the slots that a step of task t can read."""
        ...

    def resume(self, state: IntArray) -> None:
        """Continue from a saved state."""
        ...


class Reservoir:
    """Reservoir sampling: each of n samples is kept with probability M / n (Vitter 1985, algorithm R)."""

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
        """Return the slots that hold a sample."""
        return range(min(self._seen, self._size))

    def resume(self, state: IntArray) -> None:
        """Continue from a saved state."""
        self.state[:] = state
        self._seen = int(state[0])


class Parts:
    """Parts of fixed and equal size; each is a ring buffer or a reservoir.

    Args:
        table: part of each task and class, int `[T, num_classes]`; -1 if the task does not have the class.
        quota: slots of a part, >= 1.
        size: slots of the memory; those after the parts stay empty.
        ring: keep the latest samples of a part; False for reservoir sampling.
        past_only: do not read samples of the current task, which is the task of a batch's first sample.
    """

    def __init__(self, table: IntArray, quota: int, size: int, ring: bool, past_only: bool) -> None:
        self._table = table.tolist()
        self._parts = [sorted({part for part in row if part >= 0}) for row in self._table]
        parts = int(table.max()) + 1
        self._quota, self._ring, self._past_only = quota, ring, past_only
        self._size = size
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
            offset = seen
        else:
            offset = seen % quota if self._ring else int(u * (seen + 1))
        return part * quota + offset if offset < quota else self._size

    def readable(self, t: int) -> Sequence[int]:
        """Return the slots that hold a sample, without those of task t if `past_only`."""
        if self._readable_for != t:
            self._readable = [
                part * self._quota + k
                for part, seen in enumerate(self._seen)
                if not (self._past_only and self._task[part] == t)
                for k in range(min(seen, self._quota))
            ]
            self._readable_for = t
        return self._readable

    def held(self, task: int) -> Sequence[int]:
        """Return the slots that hold a sample of a task."""
        return [
            part * self._quota + k
            for part in self._parts[task]
            for k in range(min(self._seen[part], self._quota))
        ]

    def resume(self, state: IntArray) -> None:
        """Continue from a saved state."""
        self.state[:] = state
        self._seen = self.state.tolist()
        self._readable_for = None


class Balanced:
    """Class- or task-balanced reservoir sampling (Chrysakis & Moens 2020, algorithm 1).

    While there is room, every sample is kept. Then a sample of a group that has never been the largest
    replaces a random sample of the largest group. In any other group, reservoir sampling decides.

    Args:
        size: number of slots, >= 1.
        groups: number of classes or tasks.
        by_task: balance tasks instead of classes.
    """

    def __init__(self, size: int, groups: int, by_task: bool) -> None:
        self._size, self._by_task = size, by_task
        self._seen = [0] * groups
        # of each group: samples seen, and whether it has ever been the largest; then the group of each slot
        self.state = np.full(2 * groups + size, -1, np.int32)
        self.state[: 2 * groups] = 0
        self._has_led = self.state[groups : 2 * groups]
        self._owner = self.state[2 * groups :]
        self._members: list[list[int]] = [[] for _ in range(groups)]  # slots, ascending
        self._used = 0

    def slot(self, y: int, t: int, u: float) -> int:
        """Return the slot of a sample of class y and task t."""
        group = t if self._by_task else y
        self._seen[group] += 1
        self.state[group] = self._seen[group]
        if self._used < self._size:
            self._members[group].append(self._used)
            self._owner[self._used] = group
            self._used += 1
            return self._used - 1
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
        members = self._members[group]
        return members[j] if j < len(members) else self._size

    def readable(self, t: int) -> Sequence[int]:
        """Return the slots that hold a sample."""
        return range(self._used)

    def resume(self, state: IntArray) -> None:
        """Continue from a saved state."""
        self.state[:] = state
        groups, owner = len(self._seen), self._owner.tolist()
        self._seen = self.state[:groups].tolist()
        self._members = [[slot for slot, of in enumerate(owner) if of == group] for group in range(groups)]
        self._used = sum(map(len, self._members))


class Greedy:
    """GDumb's sampler (Prabhu, Torr & Dokania 2020, algorithm 1): equally many samples of each class seen.

    A sample is kept if its class is new, or has fewer than size / (classes seen) samples in the memory. If
    the memory is full, it replaces a random sample of the largest class.

    Args:
        size: number of slots, >= 1.
        groups: number of classes.
    """

    def __init__(self, size: int, groups: int) -> None:
        self._size, self._groups = size, groups
        # whether each class was seen; then the class of each slot
        self.state = np.full(groups + size, -1, np.int32)
        self.state[:groups] = 0
        self._members: list[list[int]] = [[] for _ in range(groups)]  # slots, ascending
        self._used = 0

    def slot(self, y: int, t: int, u: float) -> int:
        """Return the slot of a sample of class y."""
        is_new = not self.state[y]
        self.state[y] = 1
        seen = int(self.state[: self._groups].sum())
        if not is_new and len(self._members[y]) * seen >= self._size:
            return self._size
        if self._used < self._size:
            slot = self._used
            self._used += 1
        else:
            most = max(map(len, self._members))
            largest = [members for members in self._members if len(members) == most]
            which, place = divmod(int(u * most * len(largest)), most)
            slot = largest[which].pop(place)
        insort(self._members[y], slot)
        self.state[self._groups + slot] = y
        return slot

    def readable(self, t: int) -> Sequence[int]:
        """Return the slots that hold a sample."""
        return range(self._used)

    def resume(self, state: IntArray) -> None:
        """Continue from a saved state."""
        self.state[:] = state
        owner = self.state[self._groups :].tolist()
        self._members = [[s for s, of in enumerate(owner) if of == y] for y in range(self._groups)]
        self._used = sum(map(len, self._members))


class MemoryPlanner:
    """Planner of replay methods.

    Args:
        hparams: policy and sizes of the memory.
        spec: specification of the stream.
        seed: seed of the run.
        draws: number of independent draws from the memory at each step, before the step writes to it.
        past_only: read the samples of past tasks only; needs a memory with parts.
        per_task: draw k of a step is from the samples of task k, empty for the current task; `draws` is then
            the number of tasks. It needs a memory with parts.
        later_draws: number of further draws, after the step has written to the memory.

    Raises:
        ValueError: the memory does not divide into its parts, is smaller than a draw, or has no parts with
            `past_only`.

    Example:
        >>> import numpy as np
        >>> from sequel_core import ERHParams, LeafSpec
        >>> spec = StreamSpec(LeafSpec((3,)), 2, 1, "domain", np.ones((1, 2), bool))
        >>> planner = MemoryPlanner(ERHParams(mem_size=6, mem_batch_size=2), spec, seed=0)
        >>> planner.next(y=[0, 1, 0, 1], t=[0, 0, 0, 0]).write.tolist()
        [0, 1, 2, 3]
    """

    def __init__(
        self,
        hparams: MemoryHParams,
        spec: StreamSpec,
        seed: int,
        draws: int = 1,
        past_only: bool = False,
        later_draws: int = 0,
        per_task: bool = False,
    ) -> None:
        draws = spec.num_tasks if per_task else draws
        hparams.check_memory(spec, batch_size=1)
        self.slots = hparams.slots(spec.num_tasks)
        self._none = max(self.slots, 1)  # arrays of a memory have at least one slot
        self._hparams, self._spec = hparams, spec
        self._early, self._draws = draws, draws + later_draws
        self._drawn = hparams.drawn if self.slots else 0
        if per_task:
            self._drawn = min(self._drawn, self.slots // spec.num_tasks)
        self._policy = policy(hparams, spec, past_only or per_task)
        self._held = self._policy.held if per_task and isinstance(self._policy, Parts) else None
        self._choose = independent if hparams.replacement else distinct
        self._known = {(int(y), int(t)) for t, y in np.argwhere(spec.groups)}
        self._keep, self._pick = (plan.Uniforms(seed, f"memory {name}") for name in ("writes", "reads"))
        self._steps = 0
        self._seen = 0

    def next(self, y: Any, t: Any) -> StepPlan:
        """Return the plan of the next step, or of the next steps; see `Planner.next`.

        Raises:
            ValueError: a batch is larger than the memory, a label or task is not in the spec, or there are
                more samples than can be counted. The planner is unchanged.
        """
        labels, tasks = self._spec.group(y, t), np.asarray(t)
        if labels.shape != tasks.shape or labels.ndim not in (1, 2) or not labels.shape[-1]:
            raise ValueError(
                "y and t must have the same shape, [B] or [steps, B] with B >= 1, "
                f"got {list(labels.shape)} and {list(tasks.shape)}"
            )
        lead, size = labels.shape[:-1], labels.shape[-1]
        steps = labels.size // size
        counted("samples", self._seen + labels.size)
        position = np.zeros((steps, 2 + len(self._policy.state)), np.int32)
        rows = labels.reshape(steps, size).tolist(), tasks.reshape(steps, size).tolist()
        if self.slots:
            if size > self.slots:
                self._hparams.check_memory(self._spec, size)
            self._check_known_labels(*rows)
        write: list[int] = []  # lists, because small arrays are slow
        reads: list[int] = []
        for row_y, row_t, row_position in zip(*rows, position, strict=True):
            if self.slots:
                self._plan_step(row_y, row_t, write, reads)
            self._steps, self._seen = self._steps + 1, self._seen + size
            row_position[0], row_position[1], row_position[2:] = self._steps, self._seen, self._policy.state
        if not self.slots:
            write = [self._none] * labels.size
        return StepPlan(
            np.array(write, np.int32).reshape(labels.shape),
            np.array(reads, np.int32).reshape(*lead, self._draws, self._drawn),
            position.reshape(*lead, position.shape[1]),
        )

    def _plan_step(self, y: list[int], t: list[int], write: list[int], reads: list[int]) -> None:
        """Append the slots that the next step writes and reads."""
        count = self._draws * self._drawn
        pick = self._pick.take(self._steps * count, count)
        self._read(t[0], pick, range(self._early), reads)
        slots = list(map(self._policy.slot, y, t, self._keep.take(self._seen, len(y))))
        last = {slot: k for k, slot in enumerate(slots)}
        write += [slot if last[slot] == k else self._none for k, slot in enumerate(slots)]
        self._read(t[0], pick, range(self._early, self._draws), reads)

    def _read(self, task: int, u: Sequence[float], draws: range, reads: list[int]) -> None:
        """Append the slots of some draws of a step, padded."""
        if not draws:
            return
        readable = self._policy.readable(task)
        for k in draws:
            if self._held is not None:
                readable = [] if k == task else self._held(k)
            chosen = self._choose(u[k * self._drawn : (k + 1) * self._drawn], len(readable))
            reads += [readable[slot] for slot in chosen]
            reads += [self._none] * (self._drawn - len(chosen))

    def _check_known_labels(self, labels: list[list[int]], tasks: list[list[int]]) -> None:
        pairs = {pair for y, t in zip(labels, tasks, strict=True) for pair in zip(y, t, strict=True)}
        if not pairs <= self._known:
            y, t = min(pairs - self._known)
            num_tasks, num_classes = self._spec.mask.shape
            raise ValueError(
                f"labels and tasks must be in the stream's spec, got label {y} in task {t}; the spec has "
                f"{num_tasks} tasks and {num_classes} classes, and spec.mask says which task has which"
            )

    @property
    def state(self) -> IntArray:
        """Everything that coming decisions depend on besides the seed, int64 `[n]`, n fixed; can be set."""
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
        """Continue from a saved position."""
        self.state = np.asarray(position, np.int64)


def policy(hparams: MemoryHParams, spec: StreamSpec, past_only: bool) -> Policy:
    """Return a new policy of the type that the settings name."""
    size = hparams.slots(spec.num_tasks)
    if past_only and hparams.memory in ("reservoir", "class_balanced", "task_balanced", "greedy"):
        raise ValueError(f"past_only needs a memory with parts, got memory={hparams.memory}; use memory=ring")
    if hparams.memory == "reservoir":
        return Reservoir(size)
    if hparams.memory == "greedy":
        return Greedy(size, spec.groups.shape[1])
    if hparams.memory in ("class_balanced", "task_balanced"):
        by_task = hparams.memory == "task_balanced"
        return Balanced(size, spec.num_tasks if by_task else spec.groups.shape[1], by_task)
    groups = spec.groups
    table = np.full(groups.shape, -1, np.int64)
    if hparams.memory in ("task_quota", "task_ring"):
        table[groups] = np.nonzero(groups)[0]
    else:
        table[groups] = np.arange(groups.sum())
    quota = size // hparams.parts(spec)
    ring = hparams.memory in ("ring", "task_ring")
    return Parts(table, quota, size, ring, past_only or not ring)


def distinct(u: Sequence[float], population: int) -> list[int]:
    """Return a uniform random set of `min(len(u), population)` numbers below `population`, ascending.

    Source: Floyd's algorithm (Bentley & Floyd 1987).

    Args:
        u: random numbers, uniform in [0, 1).
        population: >= 0.
    """
    if len(u) >= population:
        return list(range(population))
    chosen: set[int] = set()
    for x, top in zip(u, range(max(0, population - len(u)), population), strict=False):
        j = int(x * (top + 1))
        chosen.add(top if j in chosen else j)
    return sorted(chosen)


def independent(u: Sequence[float], population: int) -> list[int]:
    """Return `min(len(u), population)` independent uniform numbers below `population`, ascending.

    Args:
        u: random numbers, uniform in [0, 1).
        population: >= 0.
    """
    return sorted(int(x * population) for x in u[:population])


def memory_stream(samples: Samples, tasks: Collection[int] | None = None) -> JoinedSplit:
    """Return the samples of a memory as a split, sorted by task.

    Args:
        samples: of the memory, `[n, ...]`; they are copied.
        tasks: indices of the tasks to include; None for all.

    Example:
        >>> samples = Samples(np.zeros((4, 8, 8, 1), np.uint8), np.arange(4), np.array([1, 0, 1, 2]))
        >>> memory_stream(samples, tasks=[0, 1]).targets.tolist()
        [1, 0, 2]
    """
    included = np.unique(samples.t) if tasks is None else sorted(set(tasks))
    parts = []
    for task in included:
        rows = samples.t == task
        x, y = (tree_map(itemgetter(rows), part) for part in samples[:2])
        parts.append(Split(x, y, int(task)))
    return JoinedSplit(tuple(parts))


def joined_with_memory(task: Task, memory: JoinedSplit) -> Task:
    """Return a task with the samples of a memory appended to its training samples.

    Args:
        task: its classes are extended by those of the memory.
        memory: as `memory_stream` returns it.

    Example:
        >>> split = Split(np.zeros((6, 8, 8, 1), np.uint8), np.arange(6) % 2)
        >>> task = Task(1, "example", (0, 1), train=split, test=split, validation=split.head(0))
        >>> samples = Samples(np.zeros((4, 8, 8, 1), np.uint8), np.arange(4), np.zeros(4, np.int64))
        >>> joined = joined_with_memory(task, memory_stream(samples))
        >>> len(joined.train), joined.classes
        (10, (0, 1, 2, 3))
    """
    classes = {*task.classes, *(memory.targets.tolist() if memory.labelled else ())}
    return replace(task, train=join([task.train, memory]), classes=tuple(sorted(classes)))
