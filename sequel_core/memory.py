"""Which sample sits in which slot of a replay memory, and which slots a step reads: decided in NumPy.

A planner tells for every step where each of its samples is written and what is replayed beside them. Its
decisions are a function of the seed, the samples seen so far and their labels and tasks, never of a
framework; the contents are preallocated arrays in the state of the algorithm, on the framework's side.

    planner = algorithm.planner(benchmark.spec)
    batch = Batch(x, y, t, planner.next(y, t))
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from sequel_core import plan
from sequel_core.hparams import LaMAMLHParams, MCSGDHParams, MemoryHParams
from sequel_core.task import (
    FloatArray,
    IntArray,
    JoinedSplit,
    Samples,
    Split,
    StreamSpec,
    Task,
    join,
)

SlotArray = NDArray[np.int32]

NOISE = 1 << 20
"""Numbers in the table that random bases are cut from."""


class StepPlan(NamedTuple):
    """What a step writes to the memory and reads from it; int32, "none" is the number of slots."""

    write: SlotArray  # of each sample [..., B]; none where it is not kept, or overwritten in the same step
    reads: SlotArray  # of each draw [..., draws, R], ascending, as before the step; none where it has less


class MetaPlan(NamedTuple):
    """What a step of La-MAML writes, reads and in which order it looks at its batch; int32."""

    write: SlotArray  # slot of each sample [..., B], written in the first glance
    reads: SlotArray  # slots of each glance's draw [..., glances, R]; after the first the batch is in
    order: SlotArray  # samples of the batch in the order of each glance [..., glances, B]


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


class NoPlanner:
    """The planner of algorithms whose steps need nothing but their batches."""

    def next(self, y: Any, t: Any) -> Any:
        """Return `()`."""
        return ()

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


class Policy(Protocol):
    """Assigns slots to samples, one after the other."""

    def slot(self, y: int, t: int, u: float) -> int:
        """Return the slot of the next sample, or the number of slots for none; u is uniform in [0, 1)."""
        ...

    def readable(self, t: int) -> Sequence[int]:
        """Return the slots that a step of task t may read."""
        ...

    @property
    def state(self) -> list[int]:
        """What the decisions so far have left; always as long."""
        ...

    @state.setter
    def state(self, values: list[int]) -> None: ...


class Reservoir:
    """Every sample of the stream is held with the same probability M / n (Vitter 1985, algorithm R)."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._seen = 0

    def slot(self, y: int, t: int, u: float) -> int:
        """Return where sample n (from 1) goes: slot n - 1 up to M, then j uniform in 0..n-1 if j < M."""
        self._seen += 1
        return self._seen - 1 if self._seen <= self._size else min(int(u * self._seen), self._size)

    def readable(self, t: int) -> Sequence[int]:
        """Return the slots that are filled."""
        return range(min(self._seen, self._size))

    @property
    def state(self) -> list[int]:
        """Samples seen."""
        return [self._seen]

    @state.setter
    def state(self, values: list[int]) -> None:
        (self._seen,) = values


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
        self._task = [int(np.argwhere(table == part)[0, 0]) for part in range(parts)]
        self._readable: list[int] = []
        self._readable_for: int | None = None

    def slot(self, y: int, t: int, u: float) -> int:
        """Return the slot in the part of task t and class y."""
        part = self._table[t][y]
        seen, quota = self._seen[part], self._quota
        self._seen[part] += 1
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

    @property
    def state(self) -> list[int]:
        """Samples seen of each part."""
        return self._seen

    @state.setter
    def state(self, values: list[int]) -> None:
        self._seen = list(values)
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
        self._has_led = [0] * groups
        self._members: list[list[int]] = [[] for _ in range(groups)]  # slots, ascending
        self._filled = 0

    def slot(self, y: int, t: int, u: float) -> int:
        """Return the slot of a sample of class y and task t."""
        group = t if self._by_task else y
        self._seen[group] += 1
        if self._filled < self._size:
            self._members[group].append(self._filled)
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
                return slot
        j = int(u * self._seen[group])
        own = self._members[group]
        return own[j] if j < len(own) else self._size

    def readable(self, t: int) -> Sequence[int]:
        """Return the slots that are filled."""
        return range(self._filled)

    @property
    def state(self) -> list[int]:
        """Samples seen of each group, whether it has ever been the largest, and the group of each slot."""
        owner = [-1] * self._size
        for group, slots in enumerate(self._members):
            for slot in slots:
                owner[slot] = group
        return [*self._seen, *self._has_led, *owner]

    @state.setter
    def state(self, values: list[int]) -> None:
        groups = len(self._seen)
        self._seen, self._has_led = list(values[:groups]), list(values[groups : 2 * groups])
        owner = values[2 * groups :]
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
        past_only: read past tasks alone, as A-GEM does; only for memories with parts.

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
            ValueError: a batch larger than the memory, or a label or task that the spec does not have;
                nothing was decided.
        """
        labels, tasks = np.asarray(y), np.asarray(t)
        if labels.shape != tasks.shape or labels.ndim not in (1, 2) or not labels.shape[-1]:
            raise ValueError(
                "y and t must be alike, [B] or [steps, B] with at least one sample, "
                f"got {list(labels.shape)} and {list(tasks.shape)}"
            )
        write = np.full(labels.shape, self.slots, np.int32)
        reads = np.full((*labels.shape[:-1], self._draws, self._drawn), self.slots, np.int32)
        if self.slots == 0:
            return StepPlan(write, reads)
        size = labels.shape[-1]
        if size > self.slots:
            self._hparams.check_memory(self._spec, size)
        self._refuse_strangers(labels, tasks)
        keep = self._keep.take(self._seen, labels.size)
        pick = self._pick.take(self._steps * self._draws * self._drawn, reads.size)
        rows = zip(
            labels.reshape(-1, size).tolist(),
            tasks.reshape(-1, size).tolist(),
            write.reshape(-1, size),
            reads.reshape(labels.size // size, self._draws, self._drawn),
            strict=True,
        )
        for row, (row_y, row_t, row_write, row_reads) in enumerate(rows):
            start = row * self._draws * self._drawn
            self._read(row_t[0], pick[start:], row_reads[: self._early])
            last = {}
            for k in range(size):
                last[self._policy.slot(row_y[k], row_t[k], keep[row * size + k])] = k
            row_write[list(last.values())] = list(last)
            if self._early < self._draws:
                start += self._early * self._drawn
                self._read(row_t[0], pick[start:], row_reads[self._early :])
        self._steps += labels.size // size
        self._seen += labels.size
        return StepPlan(write, reads)

    def _read(self, task: int, u: Sequence[float], draws: SlotArray) -> None:
        """Fill in the slots of some draws `[draws, R]`."""
        readable = self._policy.readable(task)
        for k, found in enumerate(draws):
            chosen = distinct(u[k * self._drawn : (k + 1) * self._drawn], len(readable))
            found[: len(chosen)] = [readable[slot] for slot in chosen]

    def _refuse_strangers(self, labels: NDArray[Any], tasks: NDArray[Any]) -> None:
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
        return np.asarray([self._steps, self._seen, *self._policy.state], np.int64)

    @state.setter
    def state(self, values: IntArray) -> None:
        if np.shape(values) != self.state.shape:
            raise ValueError(
                f"the planner's state must have {self.state.size} numbers, got {np.size(values)}; "
                "it comes from a memory of other settings"
            )
        self._steps, self._seen, *rest = np.asarray(values).tolist()
        self._policy.state = rest


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
        write, reads = self._memory.next(y, t)
        shape = (*write.shape[:-1], self._glances, write.shape[-1])
        keys = np.reshape(self._order.take(self._seen * self._glances, write.size * self._glances), shape)
        self._seen += write.size
        return MetaPlan(write, reads, np.argsort(keys, axis=-1, kind="stable").astype(np.int32))

    @property
    def state(self) -> IntArray:
        """Samples seen, then the memory planner's, int64 `[n]`; may be set."""
        return np.concatenate([[self._seen], self._memory.state])

    @state.setter
    def state(self, values: IntArray) -> None:
        self._memory.state = values[1:]
        self._seen = int(values[0])


class BasesPlanner:
    """The planner of variational random features: where each basis of a step begins in the table of noise.

    Args:
        count: bases of a step.
        seed: of the run.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count = count
        self._seed = seed
        self._steps = 0

    def next(self, y: Any, t: Any) -> SlotArray:
        """Return positions in the table, int32 `[count]` or `[steps, count]`; see `Planner.next`."""
        lead = np.shape(y)[:-1]
        steps = int(np.prod(lead, dtype=np.int64))
        start, self._steps = self._steps * self._count, self._steps + steps
        words = plan.words(self._seed, "bases", count=steps * self._count, start=start)
        return (words % NOISE).astype(np.int32).reshape(*lead, self._count)

    @property
    def state(self) -> IntArray:
        """Steps planned, int64 `[1]`; may be set."""
        return np.asarray([self._steps], np.int64)

    @state.setter
    def state(self, values: IntArray) -> None:
        self._steps = int(values[0])


def noise_table(seed: int) -> NDArray[np.float32]:
    """Return the standard normal numbers that random bases are cut from, float32 `[NOISE]`.

    A basis is a stretch of the table that begins at a random place and goes round at its end: fresh noise at
    every step for the price of one integer (Salimans et al. 2017, section 3, shared noise).
    """
    return plan.normal(seed, "noise of bases", count=NOISE).astype(np.float32)


def basis_constants(seed: int, count: int, width: int) -> tuple[NDArray[Any], FloatArray, NDArray[Any]]:
    """Return what bases are made of: noise, phases b, and where in it the bases of evaluation begin.

    Args:
        seed: of the run.
        count: bases, D.
        width: numbers of a basis, H.

    Returns:
        Noise float32 `[NOISE + H - 1]`, which at its end begins again, so that every stretch lies in it;
        phases float64 `[D]`; positions int32 `[D]`.
    """
    phase = 2 * np.pi * plan.uniform(seed, "phase of bases", count=count)
    fixed = plan.words(seed, "bases of evaluation", count=count) % NOISE
    noise = noise_table(seed)
    return np.concatenate([noise, noise[: width - 1]]), phase, fixed.astype(np.int32)


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
