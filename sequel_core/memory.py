"""Which sample sits in which slot of a replay memory, and which slots a step reads: decided in NumPy.

A planner tells for every step where each of its samples is written and what is replayed beside them. Its
decisions are a function of the seed, the samples seen so far and their labels and tasks, never of a
framework; the contents are preallocated arrays in the state of the algorithm, on the framework's side.

    planner = algorithm.planner(benchmark.spec, state)
    batch = Batch(x, y, t, planner.next(y, t))

A plan holds the planner's position after its step, which a step of Flax puts into the state: a planner that
is made from the state resumes at exactly that position.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypeVar

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

LARGEST = int(np.iinfo(np.int32).max)
"""Largest count that a position can hold."""


class StepPlan(NamedTuple):
    """What a step writes and reads; int32, "none" is the number of the memory's slots, 1 if it has none."""

    write: SlotArray  # of each sample [..., B]; none where it is not kept, or overwritten in the same step
    reads: SlotArray  # of each draw [..., draws, R], ascending, as before the step; none where it has less
    position: SlotArray  # of the planner after the step [..., n]


class MetaPlan(NamedTuple):
    """What a step of La-MAML writes, reads and in which order it looks at its batch; int32."""

    write: SlotArray  # slot of each sample [..., B], written in the first glance
    reads: SlotArray  # slots of each glance's draw [..., glances, R]; after the first the batch is in
    order: SlotArray  # samples of the batch in the order of each glance [..., glances, B]
    position: SlotArray  # of the planner after the step [..., n]


class BasesPlan(NamedTuple):
    """Where the random bases of a step begin in the table of noise; int32."""

    starts: SlotArray  # of each basis [..., D]
    position: SlotArray  # of the planner after the step [..., 1]


class ConnectionPlan(NamedTuple):
    """Which samples the steps read that look for MC-SGD's w_bar after a task; int32."""

    slots: SlotArray  # of each step and pair, past and current [steps, pairs, 2, lmc_batch_size]
    count: Any  # of steps, (); what follows them is padding


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
        self._refuse_strangers(labels, tasks)
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

    def next(self, y: Any, t: Any) -> BasesPlan:
        """Return the plan of the next step, or of the next steps; see `Planner.next`."""
        lead = np.shape(y)[:-1]
        steps = int(np.prod(lead, dtype=np.int64))
        before, self._steps = self._steps, counted("steps", self._steps + steps)
        words = plan.words(self._seed, "bases", count=steps * self._count, start=before * self._count)
        starts = (words % NOISE).astype(np.int32).reshape(*lead, self._count)
        position = np.arange(before + 1, self._steps + 1, dtype=np.int32).reshape(*lead, 1)
        return BasesPlan(starts, position)

    @property
    def state(self) -> IntArray:
        """Steps planned, int64 `[1]`; may be set."""
        return np.asarray([self._steps], np.int64)

    @state.setter
    def state(self, values: IntArray) -> None:
        self._steps = int(values[0])

    @property
    def position(self) -> SlotArray:
        """Steps planned, int32 `[1]`."""
        return self.state.astype(np.int32)

    def resume(self, position: Any) -> None:
        """Continue from the position of another one."""
        self.state = np.asarray(position, np.int64)


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


def connection_plan(hparams: MCSGDHParams, tasks: IntArray, task: int, seed: int) -> ConnectionPlan:
    """Return all of `connection_batches` as one array, with a step of padding if there are none."""
    steps = list(connection_batches(hparams, tasks, task, seed))
    none = np.full((1, 1, 2, hparams.lmc_batch_size), len(tasks))
    return ConnectionPlan(np.asarray(steps or none, np.int32), np.asarray(len(steps), np.int32))


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
