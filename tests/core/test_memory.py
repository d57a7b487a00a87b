import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from itertools import product
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chi2

from sequel_core.algorithms.agem import AGEMHParams
from sequel_core.algorithms.er import ERHParams
from sequel_core.algorithms.gem import GEMHParams
from sequel_core.hparams import MemoryPolicy
from sequel_core.stream import plan
from sequel_core.stream.arrays import BoolArray, IntArray
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.images import Normalisation
from sequel_core.stream.memory import (
    Greedy,
    MemoryPlanner,
    Reservoir,
    StepPlan,
    distinct,
    independent,
    joined_with_memory,
    memory_stream,
)
from sequel_core.stream.planner import AheadPlanner, NoPlanner
from sequel_core.stream.task import Samples, Split, Task
from sequel_core.stream.trees import LeafSpec
from tests.quick import some

POLICIES: tuple[MemoryPolicy, ...] = get_args(MemoryPolicy)
QUOTAS: tuple[MemoryPolicy, ...] = ("task_quota", "class_quota")
BALANCED: tuple[MemoryPolicy, ...] = ("class_balanced", "task_balanced")
SIZE = 12

every_policy = pytest.mark.parametrize("memory", POLICIES)


def spec_of(*classes: Sequence[int]) -> StreamSpec:
    """Return the spec of a stream from the classes of each of its tasks."""
    num_classes = 1 + max(map(max, classes))
    mask = np.array([[c in task_classes for c in range(num_classes)] for task_classes in classes])
    return StreamSpec(LeafSpec((2, 2, 1), "uint8"), num_classes, len(classes), "class", mask, Normalisation())


SPEC = spec_of((0, 1), (2, 3), (1, 4))  # six pairs of task and class; class 1 is in two tasks


def planner_of(
    memory: MemoryPolicy,
    seed: int = 0,
    size: int = SIZE,
    read: int = 4,
    draws: int = 1,
    past_only: bool = False,
    spec: StreamSpec = SPEC,
) -> MemoryPlanner:
    hparams = ERHParams(memory=memory, mem_size=size, mem_batch_size=read)
    return MemoryPlanner(hparams, spec, seed, draws, past_only)


def stream_of(steps: int, batch: int, seed: int = 0, spec: StreamSpec = SPEC) -> tuple[IntArray, IntArray]:
    """Return labels and tasks `[T * steps, batch]`; the last class of a task is rarer than the first."""
    rng = np.random.default_rng(seed)
    t = np.repeat(np.arange(spec.num_tasks), steps * batch).reshape(-1, batch)
    classes = [np.flatnonzero(task_classes)[[0, 0, -1]] for task_classes in spec.mask]
    return np.array([rng.choice(classes[row[0]], batch) for row in t]), t


def memories(write: NDArray[np.integer], slots: int) -> IntArray:
    """Return the sample in each slot before each step and after the last, `[steps + 1, slots]`, or -1."""
    held = np.full((len(write) + 1, slots + 1), -1)  # samples that are not kept go to the extra slot
    for step, row in enumerate(write):
        held[step + 1] = held[step]
        held[step + 1, row] = step * len(row) + np.arange(len(row))
    return held[:, :slots]


def group_of(memory: MemoryPolicy, y: int, t: int) -> tuple[int, ...]:
    """Return the group whose slots a sample may use: (), (task,), (class,) or (task, class)."""
    if memory == "reservoir":
        return ()
    return {
        "task_quota": (t,),
        "task_ring": (t,),
        "task_balanced": (t,),
        "class_balanced": (y,),
        "greedy": (y,),
    }.get(memory, (t, y))


def _reference_memories(
    memory: MemoryPolicy, size: int, spec: StreamSpec, y: Iterable[int], t: Iterable[int], u: Iterable[float]
) -> IntArray:
    """Return the sample in each slot after 0, 1, 2, ... samples, written one at a time, `[n + 1, size]`."""
    parts = sorted({group_of(memory, int(c), int(i)) for i, c in np.argwhere(spec.mask)})
    quota = size // len(parts)
    held, owner = [-1] * size, [parts[0]] * size
    history, seen = [[*held]], Counter[tuple[int, ...]]()
    full: set[tuple[int, ...]] = set()
    for k, (label, task, x) in enumerate(zip(y, t, u, strict=True)):
        group = group_of(memory, label, task)
        seen[group] += 1
        if memory == "greedy":  # Prabhu 2020, algorithm 1: a class is added to below its equal share
            sizes = Counter(g for g, sample in zip(owner, held, strict=True) if sample >= 0)
            largest = [g for g in parts if sizes[g] == max(sizes.values(), default=0)]
            slots = [slot for g in largest for slot in range(size) if owner[slot] == g]
            place = int(x * len(slots))
            if -1 in held:
                slots, place = [held.index(-1)], 0
            if seen[group] > 1 and sizes[group] >= size / len(seen):
                slots = []
        elif memory not in BALANCED:  # Vitter 1985, algorithm R, or a ring, in the part of the group
            slots = [parts.index(group) * quota + i for i in range(quota)]
            n = seen[group]
            place = n - 1 if n <= quota else (n - 1) % quota if "ring" in memory else int(x * n)
        elif -1 in held:
            slots, place = [held.index(-1)], 0
        else:  # Chrysakis & Moens 2020, algorithm 1: a class is full if it is or was the largest
            sizes = Counter(owner)
            largest = [g for g in parts if sizes[g] == max(sizes.values())]
            full |= {*largest}
            takes_from = [group] if group in full else largest
            slots = [slot for g in takes_from for slot in range(size) if owner[slot] == g]
            place = int(x * (seen[group] if group in full else len(slots)))
        if place < len(slots):
            held[slots[place]], owner[slots[place]] = k, group
        history.append([*held])
    return np.array(history)


def kept_of(memory: MemoryPolicy, size: int, spec: StreamSpec, y: IntArray, t: IntArray) -> BoolArray:
    """Return which samples the memory holds after a stream `[n]`, for 1000 seeds, bool `[1000, n]`."""
    kept = np.zeros((1000, len(y)), np.bool_)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "BLOCK_NUMBERS", 1)  # a short stream needs few random numbers
        for seed, row in enumerate(kept):
            planner = planner_of(memory, seed, size, 1, spec=spec)
            write = planner.next(y[:, None], t[:, None]).write.ravel().tolist()
            last = {slot: k for k, slot in enumerate(write) if slot < size}
            row[[*last.values()]] = True
    return kept


def check_equally_likely(kept: BoolArray) -> None:
    """Check that each of n items is kept equally often, `[rows, n]`.

    If m of n items are kept and all subsets are equally likely, an item is kept with p = m / n. Because m is
    fixed, two items have the covariance -p (1 - p) / (n - 1). With V = sum over rows of p (1 - p), the counts
    have the covariance V n / (n - 1) (I - 1/n). Therefore (n - 1) / n sum_i (count_i - mean)^2 / V is
    chi-square with n - 1 degrees of freedom.
    """
    n, p = kept.shape[1], kept.mean(1)
    counts = kept.sum(0)
    statistic = (n - 1) / n * ((counts - counts.mean()) ** 2).sum() / (p * (1 - p)).sum()
    assert chi2.ppf(0.0005, n - 1) < statistic < chi2.ppf(0.9995, n - 1)


def check_uniform(outcomes: Iterable[object], cells: int) -> None:
    """Check with a chi-square test that independent outcomes are uniform over the cells."""
    counts = np.array([*Counter(outcomes).values()])
    expected = counts.sum() / cells
    assert len(counts) == cells
    assert ((counts - expected) ** 2 / expected).sum() < chi2.ppf(0.999, cells - 1)


def assert_same(got: StepPlan, expected: StepPlan) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


# Contents


@every_policy
@settings(max_examples=20)
@given(batch=st.integers(1, SIZE), seed=st.integers(0, 2**32))
def test_a_step_equals_writing_its_samples_one_by_one(memory: MemoryPolicy, batch: int, seed: int) -> None:
    y, t = stream_of(36 // batch + 1, batch, seed)
    write = planner_of(memory, seed).next(y, t).write
    assert write.shape == y.shape
    for row in write:
        slots = row[row < SIZE].tolist()
        assert len(set(slots)) == len(slots)
        assert row.min() >= 0
        assert row.max() <= SIZE
    u = plan.uniform(seed, "memory writes", count=y.size)
    expected = _reference_memories(memory, SIZE, SPEC, y.ravel().tolist(), t.ravel().tolist(), u.tolist())
    np.testing.assert_array_equal(memories(write, SIZE), expected[::batch])


@every_policy
def test_a_step_as_large_as_the_memory_writes_the_last_sample_of_each_slot(memory: MemoryPolicy) -> None:
    y, t = stream_of(20, SIZE)
    whole = planner_of(memory).next(y, t).write
    single = planner_of(memory).next(y.reshape(-1, 1), t.reshape(-1, 1)).write.reshape(-1, SIZE)
    for row, slots in zip(whole.tolist(), map(list, single), strict=True):
        assert row == [SIZE if slot in slots[k + 1 :] else slot for k, slot in enumerate(slots)]


def test_all_possible_draws_of_a_reservoir_give_every_subset_equally_often() -> None:
    # sample n draws one of n places, so 3 * 4 * 5 draws of equal probability for samples 3, 4 and 5
    subsets: Counter[tuple[int, ...]] = Counter()
    for draws in product(range(3), range(4), range(5)):
        reservoir, held = Reservoir(2), [-1, -1, -1]
        uniforms = [0.99, 0.99, *((j + 0.5) / n for j, n in zip(draws, (3, 4, 5), strict=True))]
        for k, u in enumerate(uniforms):
            held[reservoir.slot(0, 0, u)] = k
        subsets[tuple(sorted(held[:2]))] += 1
    assert [*subsets.values()] == [6] * 10
    assert sum(count for subset, count in subsets.items() if 4 in subset) == 60 * 2 / 5  # the last: M / n


@pytest.mark.parametrize(("size", "n"), [(4, 16), (3, 4), (1, 5)])
def test_a_reservoir_holds_every_sample_of_the_stream_with_the_same_probability(size: int, n: int) -> None:
    zeros = np.zeros(n, np.int64)
    kept = kept_of("reservoir", size, SPEC, zeros, zeros)
    assert (kept.sum(1) == size).all()
    check_equally_likely(kept)
    # the last sample alone: M / n within 3.3 standard deviations, far from M / (n + 1)
    p = size / n
    assert abs(kept[:, -1].mean() - p) < 3.3 * np.sqrt(p * (1 - p) / len(kept))


@given(n=st.integers(0, 15), seed=st.integers(0, 2**32))
def test_a_reservoir_keeps_all_samples_until_it_is_full(n: int, seed: int) -> None:
    write = planner_of("reservoir", seed, 15).next(np.zeros((n, 1), int), np.zeros((n, 1), int)).write
    assert write.ravel().tolist() == list(range(n))


def test_the_parts_of_a_ring_hold_the_latest_samples() -> None:
    y, t = stream_of(15, 5)
    held = memories(planner_of("ring").next(y, t).write, SIZE)
    latest = {(int(i), int(c)): deque[int](maxlen=2) for i, c in np.argwhere(SPEC.mask)}
    for k, key in enumerate(zip(t.ravel().tolist(), y.ravel().tolist(), strict=True)):
        latest[key].append(k)
        if (k + 1) % 5 == 0:
            parts = held[(k + 1) // 5].reshape(6, 2).tolist()
            assert [{*part} - {-1} for part in parts] == [{*newest} for newest in latest.values()]
    assert all(map(len, latest.values()))


@pytest.mark.parametrize("memory", some(QUOTAS, ["task_quota"]))
def test_quota_parts_hold_each_of_their_samples_with_the_same_probability(memory: MemoryPolicy) -> None:
    spec = spec_of((0, 1), (1, 2))
    y = np.array([0, 0, 1, 0, 1, 1, 0, 0, 1, 0] + [1] * 9 + [2])
    t = np.repeat([0, 1], 10)
    kept = kept_of(memory, 8, spec, y, t)
    groups = [group_of(memory, label, task) for label, task in zip(y.tolist(), t.tolist(), strict=True)]
    sizes = {}
    for group in {*groups}:
        kept_of_group = kept[:, [other == group for other in groups]]
        sizes[group] = kept_of_group.shape[1]
        quota = 8 // (2 if memory == "task_quota" else 4)
        assert (kept_of_group.sum(1) == min(kept_of_group.shape[1], quota)).all()
        if kept_of_group.shape[1] > quota:
            check_equally_likely(kept_of_group)
    of_classes = {(0, 0): 6, (0, 1): 4, (1, 1): 9, (1, 2): 1}
    assert sizes == ({(0,): 10, (1,): 10} if memory == "task_quota" else of_classes)


@pytest.mark.parametrize("memory", BALANCED)
@settings(max_examples=60)
@given(groups=st.lists(st.integers(0, 3), max_size=80), size=st.integers(1, 15), seed=st.integers(0, 2**32))
def test_balanced_memories_cut_only_the_largest_groups(
    memory: MemoryPolicy, groups: list[int], size: int, seed: int
) -> None:
    # A group that is smaller than the largest by two or more has lost no sample. So in any order, each group
    # with at least M / groups samples ends with an equal share.
    labels = np.array([groups], np.int64).T
    write = planner_of(memory, seed, size, 1, spec=spec_of(*[range(4)] * 4)).next(labels, labels).write
    for n, held in enumerate(memories(write, size)):
        sizes = np.bincount(labels[held[held >= 0], 0], minlength=4)
        seen = np.bincount(labels[:n, 0], minlength=4)
        assert sizes.sum() == min(n, size)
        assert ((sizes == seen) | (sizes >= sizes.max() - 1)).all()
        assert (sizes <= seen).all()
        if (seen >= -(-size // 4)).all():
            assert np.ptp(sizes) <= 1


@pytest.mark.parametrize("memory", BALANCED)
@pytest.mark.parametrize("order", ["common first", "rare first", "mixed"])
def test_an_imbalanced_stream_ends_in_equal_parts(
    memory: MemoryPolicy, order: str, rng: np.random.Generator
) -> None:
    groups = np.repeat(range(4), [500, 60, 30, 6])
    if order != "common first":
        groups = groups[::-1] if order == "rare first" else rng.permutation(groups)
    for size, sizes in ((20, [5, 5, 5, 5]), (22, [5, 5, 6, 6])):
        planner = planner_of(memory, 0, size, 1, spec=spec_of(*[range(4)] * 4))
        held = memories(planner.next(groups[:, None], groups[:, None]).write, size)[-1]
        assert sorted(np.bincount(groups[held])) == sizes


@pytest.mark.parametrize("memory", some(BALANCED, ["class_balanced"]))
def test_balanced_memories_hold_each_sample_of_a_group_with_the_same_probability(
    memory: MemoryPolicy,
) -> None:
    # group 0 fills the memory; 1 and 2 follow; 3 is rare and loses no sample
    later = [1, 0, 1, 1, 0, 1, 2, 0, 1, 2, 1, 0, 3, 2, 2, 1, 0, 2, 3, 1, 0, 2, 1, 2, 2, 0]
    groups = np.array([0] * 12 + later)
    kept = kept_of(memory, 10, spec_of(*[range(4)] * 4), groups, groups)
    assert kept[:, groups == 3].all()
    sizes = np.array([kept[:, groups == group].sum(1) for group in range(4)])
    assert (sizes.sum(0) == 10).all()
    assert (np.ptp(sizes[:3], axis=0) <= 1).all()
    for group in range(3):
        check_equally_likely(kept[:, groups == group])


# Reads


@pytest.mark.parametrize(
    ("draw", "population"), [(1, 4), (2, 4), (3, 5), (4, 5), (3, 3), (4, 3), (2, 0), (0, 4)]
)
def test_distinct_over_all_possible_draws_gives_every_subset_equally_often(
    draw: int, population: int
) -> None:
    size = min(draw, population)
    tops = range(population - size, population)  # Floyd's k-th number is one of 0..top
    subsets: Counter[tuple[int, ...]] = Counter()
    for numbers in product(*(range(top + 1) for top in tops)):
        u = [(j + 0.5) / (top + 1) for j, top in zip(numbers, tops, strict=True)]
        chosen = distinct([*u, *[0.5] * (draw - size)], population)
        assert chosen == sorted({*chosen})
        subsets[tuple(chosen)] += 1
    assert {len(subset) for subset in subsets} == {size}
    assert all(0 <= k < population for subset in subsets for k in subset)
    assert len(subsets) == math.comb(population, size)
    assert len({*subsets.values()}) == 1


@pytest.mark.parametrize(("draw", "population", "cells"), [(2, 5, 10), (3, 6, 20), (5, 6, 6)])
def test_distinct_of_random_numbers_is_uniform_over_subsets(draw: int, population: int, cells: int) -> None:
    u = plan.uniform(0, "distinct", count=4000 * draw).reshape(-1, draw).tolist()
    check_uniform((tuple(distinct(row, population)) for row in u), cells)


@given(u=st.lists(st.floats(0, 1, exclude_max=True), max_size=20), population=st.integers(0, 30))
def test_distinct_numbers_are_ascending_and_below_the_population(u: list[float], population: int) -> None:
    chosen = distinct(u, population)
    assert len(chosen) == min(len(u), population)
    assert chosen == sorted({*chosen})
    assert all(0 <= k < population for k in chosen)


def test_independent_over_all_possible_draws_gives_every_sequence_equally_often() -> None:
    drawn = Counter(tuple(independent([(j + 0.5) / 4, (k + 0.5) / 4], 4)) for j in range(4) for k in range(4))
    pairs = [tuple(sorted(pair)) for pair in product(range(4), repeat=2)]
    assert drawn == Counter(pairs)
    assert independent([0.1, 0.9, 0.99], 2) == [0, 1]  # at most as many as there are
    assert independent([0.1], 0) == []


def test_a_batch_with_replacement_holds_a_sample_twice() -> None:
    hparams = ERHParams(mem_size=4, mem_batch_size=4, mem_replacement=True)
    spec = spec_of([0, 1])
    planner = MemoryPlanner(hparams, spec, seed=0)
    reads = planner.next(np.zeros((400, 1), np.int64), np.zeros((400, 1), np.int64)).reads[4:, 0]
    assert reads.max() == 3
    repeats = [len({*row}) for row in reads.tolist()]
    assert np.mean(repeats) == pytest.approx(4 * (1 - 0.75**4), abs=0.15)  # expected distinct of 4 draws


@pytest.mark.parametrize(
    ("memory", "past_only"), [*product(POLICIES, [False]), *product(("ring", *QUOTAS), [True])]
)
@settings(max_examples=12)
@given(
    batch=st.integers(1, SIZE), read=st.integers(1, SIZE), draws=st.integers(1, 3), seed=st.integers(0, 2**32)
)
def test_reads_hold_different_samples_of_earlier_steps(
    memory: MemoryPolicy, past_only: bool, batch: int, read: int, draws: int, seed: int
) -> None:
    y, t = stream_of(36 // batch + 1, batch, seed)
    write, reads, _ = planner_of(memory, seed, read=read, draws=draws, past_only=past_only).next(y, t)
    assert reads.shape == (len(y), draws, read)
    for step, held in enumerate(memories(write, SIZE)[:-1]):
        readable = held >= 0
        if past_only or memory in QUOTAS:
            readable &= t.ravel()[held] != t[step, 0]
        for draw in reads[step].tolist():
            count = min(read, int(readable.sum()))
            slots = draw[:count]
            assert slots == sorted({*slots})
            assert draw[count:] == [SIZE] * (read - count)
            assert all(readable[slot] and held[slot] < step * batch for slot in slots)


@pytest.mark.parametrize(
    ("memory", "past_only"),
    [*product(("ring", *QUOTAS), [True]), *product([m for m in POLICIES if m != "greedy"], [False])],
)
def test_a_draw_as_large_as_the_memory_reads_all_available_samples(
    memory: MemoryPolicy, past_only: bool
) -> None:
    # two samples per step, two per class and task: all but `greedy` keep all; the last step is of task 0
    y = [[0, 1], [1, 0], [2, 3], [3, 2], [1, 4], [4, 1], [0, 0]]
    t = [[0, 0], [0, 0], [1, 1], [1, 1], [2, 2], [2, 2], [0, 0]]
    write, reads, _ = planner_of(memory, read=SIZE, past_only=past_only).next(y, t)
    first, second, third = {0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9, 10, 11}
    expected: list[set[int]] = [set(range(2 * step)) for step in range(7)]
    if past_only or memory in QUOTAS:
        expected = [set(), set(), first, first, first | second, first | second, second | third]
    for held, (slots,), samples in zip(memories(write, SIZE), reads, expected, strict=False):
        assert {*held[slots[slots < SIZE]].tolist()} == samples
        assert (slots < SIZE).sum() == len(samples)


def test_draws_are_uniform_and_independent_across_draws_and_steps() -> None:
    planner = planner_of("reservoir", size=4, read=2, draws=2)
    zeros = np.zeros((3601, 4), np.int64)
    reads = [[tuple(draw) for draw in step] for step in planner.next(zeros, zeros).reads[1:].tolist()]
    check_uniform((tuple(step) for step in reads), 6 * 6)
    check_uniform(((a, b) for (_, a), (b, _) in zip(reads[::2], reads[1::2], strict=True)), 6 * 6)


def test_reads_are_uniform_over_seeds() -> None:
    zeros = np.zeros((2, 4), np.int64)
    reads = [planner_of("reservoir", seed, 4, 2).next(zeros, zeros).reads[1, 0] for seed in range(1200)]
    check_uniform((tuple(row.tolist()) for row in reads), 6)


@pytest.mark.parametrize("memory", QUOTAS)
def test_reads_of_quota_memories_are_uniform_over_past_samples(memory: MemoryPolicy) -> None:
    t = np.repeat([0, 1], [4, 1500])[:, None]
    y = np.where(t == 0, np.arange(len(t))[:, None] % 2, 2)
    reads = planner_of(memory, size=8, read=2, spec=spec_of((0, 1), (2, 3))).next(y, t).reads[4:, 0]
    check_uniform(map(tuple, reads.tolist()), 6)


# Chunks, resuming, seeds


@every_policy
@settings(max_examples=15)
@given(data=st.data(), batch=st.integers(1, 6), seed=st.integers(0, 2**32))
def test_chunks_of_any_length_give_the_same_plan(
    memory: MemoryPolicy, data: st.DataObject, batch: int, seed: int
) -> None:
    y, t = stream_of(6, batch, seed)
    whole, single = (planner_of(memory, seed, draws=2) for _ in range(2))
    expected = whole.next(y, t)
    steps = [single.next(labels, tasks) for labels, tasks in zip(y, t, strict=True)]
    assert_same(StepPlan(*map(np.stack, zip(*steps, strict=True))), expected)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(y)), max_size=4)))
    planner = planner_of(memory, seed, draws=2)
    chunks = [planner.next(y[a:b], t[a:b]) for a, b in zip([0, *cuts], [*cuts, len(y)], strict=True)]
    assert_same(StepPlan(*map(np.concatenate, zip(*chunks, strict=True))), expected)
    for other in (single, planner):
        np.testing.assert_array_equal(other.state, whole.state)


@every_policy
def test_steps_that_are_planned_ahead_are_planned_as_single_steps(memory: MemoryPolicy) -> None:
    y, t = stream_of(6, 5)
    single, ahead = planner_of(memory, 3, draws=2), AheadPlanner(planner_of(memory, 3, draws=2))
    for k, (labels, tasks) in enumerate(zip(y, t, strict=True)):
        if k % 4 == 0:
            ahead.prepare(y[k : k + 5], t[k : k + 5])  # one step more than is taken
        if k == 6:
            labels = np.roll(labels, 1)  # not those that were planned
        assert_same(ahead.next(labels, tasks), single.next(labels, tasks))
        if k % 5 == 2:
            np.testing.assert_array_equal(ahead.state, single.state)
            ahead.resume(single.position)
    np.testing.assert_array_equal(ahead.state, single.state)


@every_policy
def test_a_planner_resumes_from_the_state_at_any_step(memory: MemoryPolicy) -> None:
    y, t = stream_of(6, 5)
    planner = planner_of(memory, 3, draws=2)
    length, states, expected = planner.state.shape, [], []
    for labels, tasks in zip(y, t, strict=True):
        states.append(planner.state)
        expected.append(planner.next(labels, tasks))
    for start, state in enumerate(states):
        assert state.shape == length
        assert state.dtype == np.int64
        resumed = planner_of(memory, 3, draws=2)
        if start % 2:  # also in a planner that has seen other samples
            resumed.next(y[::-1], t[::-1])
        resumed.state = state
        np.testing.assert_array_equal(resumed.state, state)
        rest = resumed.next(y[start:], t[start:])
        assert_same(rest, StepPlan(*map(np.stack, zip(*expected[start:], strict=True))))
        np.testing.assert_array_equal(resumed.state, planner.state)


@every_policy
def test_plans_do_not_depend_on_the_blocks_of_random_numbers(
    memory: MemoryPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    y, t = stream_of(20, 5)
    expected = planner_of(memory).next(y, t)
    monkeypatch.setattr(plan, "BLOCK_NUMBERS", 7)
    planner = planner_of(memory)
    steps = [planner.next(labels, tasks) for labels, tasks in zip(y, t, strict=True)]
    assert_same(StepPlan(*map(np.stack, zip(*steps, strict=True))), expected)


@every_policy
def test_labels_may_be_lists_or_integers_of_any_dtype(memory: MemoryPolicy) -> None:
    y, t = stream_of(8, 5)
    expected = planner_of(memory).next(y, t)
    assert [array.dtype for array in expected] == [np.int32] * 3
    assert_same(planner_of(memory).next(y.tolist(), t.tolist()), expected)
    for dtype in (np.int32, np.int64, np.uint8):
        assert_same(planner_of(memory).next(y.astype(dtype), t.astype(dtype)), expected)


@every_policy
def test_the_plan_depends_on_the_seed(memory: MemoryPolicy) -> None:
    y, t = stream_of(20, 5)
    first, again, other = (planner_of(memory, seed).next(y, t) for seed in (0, 0, 1))
    assert_same(again, first)
    assert not np.array_equal(other.reads, first.reads)
    assert np.array_equal(other.write, first.write) == ("ring" in memory)  # a ring is deterministic


# Settings


@every_policy
def test_a_memory_of_size_zero_writes_and_reads_nothing(memory: MemoryPolicy) -> None:
    planner = planner_of(memory, size=0, read=10, draws=2)
    y, t = stream_of(2, 5)
    for labels, tasks in ((y, t), (y[0], t[0])):
        write, reads, _ = planner.next(labels, tasks)
        assert planner.slots == 0
        np.testing.assert_array_equal(write, np.ones(labels.shape))  # out of range: nothing is written
        assert reads.shape == (*labels.shape[:-1], 2, 0)


def test_no_planner() -> None:
    assert NoPlanner().next(*stream_of(2, 3)) == ()


@every_policy
def test_the_size_may_be_given_per_task(memory: MemoryPolicy) -> None:
    hparams = ERHParams(memory=memory, per_task_memory_samples=4, mem_batch_size=4)
    assert hparams.slots(SPEC.num_tasks) == SIZE
    planner = MemoryPlanner(hparams, SPEC, 0)
    assert planner.slots == SIZE
    assert_same(planner.next(*stream_of(8, 5)), planner_of(memory).next(*stream_of(8, 5)))


@pytest.mark.parametrize("size", [1, 12, 17])
def test_a_step_must_fit_into_the_memory(size: int) -> None:
    message = rf"mem_size must be 0 or give at least batch_size={size + 1} slots.*got {size}; raise mem_size"
    planner = planner_of("reservoir", size=size, read=1)
    y = np.zeros((2, size + 1), np.int64)
    before = planner.state
    for labels in (y, y[0]):
        with pytest.raises(ValueError, match=message):
            planner.next(labels, labels)
    np.testing.assert_array_equal(planner.state, before)
    with pytest.raises(ValueError, match=message):
        ERHParams(mem_size=size, mem_batch_size=1).check_memory(SPEC, size + 1)
    ERHParams(mem_size=size, mem_batch_size=1).check_memory(SPEC, size)


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        (
            ERHParams(mem_size=8),
            "mem_batch_size must be <= the 8 samples of the memory, got 10; .* or raise mem_size",
        ),
        (
            ERHParams(per_task_memory_samples=3),
            "must be <= the 9 samples of .* or raise per_task_memory_samples",
        ),
        (AGEMHParams(mem_size=252), "mem_batch_size must be <= the 252 samples of the memory, got 256"),
    ],
)
def test_a_draw_must_fit_into_the_memory(hparams: ERHParams, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryPlanner(hparams, SPEC, 0)


@pytest.mark.parametrize(
    ("memory", "size", "parts", "totals"),
    [
        ("ring", 20, "6 equal parts of memory=ring, one for each class of each task", [18, 24]),
        ("class_quota", 5, "6 equal parts of memory=class_quota, one for each class of each task", [6, 12]),
        ("task_quota", 20, "3 equal parts of memory=task_quota, one for each task", [18, 21]),
    ],
)
def test_the_memory_must_divide_into_its_parts(
    memory: MemoryPolicy, size: int, parts: str, totals: list[int]
) -> None:
    with pytest.raises(ValueError, match=f"^mem_size must divide into the {parts}, got {size};") as error:
        planner_of(memory, size=size)
    assert str(error.value).endswith(f"; use {' or '.join(map(str, totals))}")
    for total in totals:
        assert planner_of(memory, size=total).slots == total


def test_draw_k_is_from_the_samples_of_task_k() -> None:
    """With as many reads as a task has slots, they are all of its samples; none in the task itself."""
    hparams = GEMHParams(memory="task_quota", mem_size=SIZE)
    y, t = stream_of(steps=10, batch=3)
    plan_ = MemoryPlanner(hparams, SPEC, 0, per_task=True).next(y, t)
    assert plan_.reads.shape == (30, 3, SIZE // 3)
    held = memories(plan_.write, SIZE)
    for step, reads in enumerate(plan_.reads):
        for task, slots in enumerate(reads):
            expected = [s for s in range(SIZE) if held[step][s] >= 0 and t.ravel()[held[step][s]] == task]
            assert [s for s in slots if s < SIZE] == (expected if task != t[step][0] else [])
    with pytest.raises(ValueError, match="past_only needs a memory with parts, got memory=reservoir"):
        MemoryPlanner(ERHParams(), SPEC, 0, per_task=True)


def test_the_samples_of_each_task_must_divide_into_its_classes() -> None:
    message = r"^per_task_memory_samples must divide .*, got 5 \(15 in all\); use 4 or 6$"
    with pytest.raises(ValueError, match=message):
        MemoryPlanner(ERHParams(memory="ring", per_task_memory_samples=5), SPEC, 0)


@pytest.mark.parametrize(
    ("memory", "y", "t"),
    [
        *(
            (memory, *sample)
            for memory in ("ring", *QUOTAS)
            for sample in [(2, 0), (5, 0), (-1, 2), (1, 3), (1, -1)]
        ),
        *(("class_balanced", y, 0) for y in (5, -1)),
        *(("task_balanced", 0, t) for t in (3, -1)),
    ],
)
def test_an_error_names_a_sample_that_is_not_in_the_spec(memory: MemoryPolicy, y: int, t: int) -> None:
    with pytest.raises(ValueError, match=f"must be in the stream's spec, got label {y} in task {t};"):
        planner_of(memory).next([0, y], [0, t])


@every_policy
def test_a_state_of_other_settings_raises(memory: MemoryPolicy) -> None:
    planner = planner_of(memory)
    n = planner.state.size
    for state in (np.zeros(n + 1, np.int64), planner.state[:-1], planner.state[None]):
        with pytest.raises(
            ValueError, match=f"state must have {n} numbers, got {state.size}; .* memory of other settings"
        ):
            planner.state = state


# The memory as a stream


def samples_of() -> Samples:
    """Return 12 samples; sample k has the pixels 4 k to 4 k + 3."""
    x = np.arange(48, dtype=np.uint8).reshape(12, 2, 2, 1)
    return Samples(x, np.arange(12) % 5, np.array([2, 0, 1, 0, 2, 2, 0, 1, 1, 0, 2, 2]))


@pytest.mark.parametrize(
    ("tasks", "ids"),
    [
        ([1], [2, 7, 8]),
        ({2, 0}, [1, 3, 6, 9, 0, 4, 5, 10, 11]),
        (None, [1, 3, 6, 9, 2, 7, 8, 0, 4, 5, 10, 11]),
    ],
)
def test_memory_stream(tasks: list[int] | set[int] | None, ids: list[int]) -> None:
    samples, whole = samples_of(), samples_of()
    stream = memory_stream(samples, tasks)
    for array in samples:
        array[...] = 0
    assert len(stream) == len(ids)
    assert [part.task for part in stream.parts] == sorted({*whole.t[ids].tolist()})
    assert stream.targets.tolist() == whole.y[ids].tolist()
    taken = stream.take(np.arange(len(ids)))
    for name in Samples._fields:
        np.testing.assert_array_equal(getattr(taken, name), getattr(whole, name)[ids])
        assert getattr(taken, name).dtype == getattr(whole, name).dtype


def test_a_task_joined_with_the_memory_trains_on_both() -> None:
    images = np.arange(100, 128, dtype=np.uint8).reshape(7, 2, 2, 1)
    train = Split(images, np.array([7, 5, 7, 5, 7, 7, 5]), task=3, indices=np.array([6, 0, 1, 2, 3]))
    task = Task(3, "current", (5, 7), train, train.head(2), train.head(0))
    samples = samples_of()
    joined = joined_with_memory(task, memory_stream(samples, [0, 1]))
    assert joined.classes == (1, 2, 3, 4, 5, 7)
    assert (joined.index, joined.name) == (3, "current")
    assert (joined.test, joined.validation) == (task.test, task.validation)
    assert task.classes == (5, 7)
    assert task.train is train
    assert len(joined.train) == 5 + 7

    remembered = [1, 3, 6, 9, 2, 7, 8]  # task 0, then task 1
    expected = np.concatenate([images[[6, 0, 1, 2, 3]], samples.x[remembered]])
    positions = plan.epoch_batches(0, joined.index, 0, len(joined.train), 4)
    assert sorted(positions.ravel().tolist()) == list(range(12))
    batches = joined.train.take(positions.ravel())
    np.testing.assert_array_equal(batches.x, expected[positions.ravel()])
    np.testing.assert_array_equal(
        batches.y, np.array([5, 7, 5, 7, 5, 1, 3, 1, 4, 2, 2, 3])[positions.ravel()]
    )
    np.testing.assert_array_equal(batches.t, np.repeat([3, 0, 1], [5, 4, 3])[positions.ravel()])
    (chunk,) = plan.take_in_chunks(joined.train, positions)
    np.testing.assert_array_equal(chunk.x, expected[positions])


def test_joining_an_empty_memory_changes_nothing() -> None:
    split = Split(np.zeros((3, 2, 2, 1), np.uint8), np.array([0, 1, 0]))
    task = Task(0, "current", (0, 1), split, split, split)
    x, y, t = samples_of()
    empty = Samples(x[:0], y[:0], t[:0])
    for memory in (memory_stream(empty), memory_stream(empty, [1]), memory_stream(samples_of(), [])):
        joined = joined_with_memory(task, memory)
        assert joined.classes == (0, 1)
        assert joined.train.take(np.arange(3)).y.tolist() == [0, 1, 0]
        assert len(joined.train) == 3


@pytest.mark.parametrize("memory", ["reservoir", "class_balanced", "task_balanced"])
def test_past_only_needs_a_memory_with_parts(memory: MemoryPolicy) -> None:
    hparams = ERHParams(memory=memory, mem_size=12)
    with pytest.raises(ValueError, match=f"^past_only needs a memory with parts, got memory={memory};"):
        MemoryPlanner(hparams, SPEC, 0, past_only=True)


@pytest.mark.parametrize(("y", "t"), [([], []), ([0, 1], [0]), ([[[0]]], [[[0]]])])
def test_labels_and_tasks_must_have_the_same_shape(y: list[int], t: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^y and t must have the same shape, \[B\] or \[steps, B\]"):
        planner_of("reservoir").next(y, t)


def test_a_batch_that_raises_does_not_change_the_state() -> None:
    planner = planner_of("ring")
    before = planner.state
    with pytest.raises(ValueError, match="must be in the stream's spec"):
        planner.next([0, 99], [0, 0])
    np.testing.assert_array_equal(planner.state, before)


@given(st.permutations([0] * 5 + [1] * 5 + [2] * 5), st.lists(st.floats(0, 1, exclude_max=True), min_size=15))
def test_greedy_memory_is_balanced_in_any_order(labels: list[int], u: list[float]) -> None:
    policy = Greedy(9, 3)
    owner: dict[int, int] = {}
    for y, x in zip(labels, u, strict=False):
        owner[policy.slot(y, 0, x)] = y
    owner.pop(9, None)
    assert sorted(Counter(owner.values()).items()) == [(0, 3), (1, 3), (2, 3)]


@given(st.lists(st.integers(0, 4), max_size=60), st.integers(1, 12), st.integers(0, 60))
def test_greedy_memory_keeps_what_the_paper_says(labels: list[int], size: int, cut: int) -> None:
    """Sizes of classes; in a memory that is smaller than the number of classes they depend on ties."""
    policy = Greedy(size, 5)
    owner: dict[int, int] = {}
    for n, y in enumerate(labels):
        if n == cut:  # a saved position
            state, policy = policy.state.astype(np.int64), Greedy(size, 5)
            policy.resume(state)
        before = sum(c == y for c in owner.values())
        new = y not in labels[:n]
        slot = policy.slot(y, 0, (n * 0.37) % 1)
        kept = new or before < size / len(set(labels[: n + 1]))
        assert (slot < size) is kept
        if kept:
            if slot in owner:
                counts = Counter(owner.values())
                assert len(owner) == size
                assert counts[owner[slot]] == max(counts.values())
            else:
                assert slot == len(owner)
            owner[slot] = y
    assert policy.readable(0) == range(len(owner))
    assert policy.state[5 : 5 + len(owner)].tolist() == [owner[k] for k in range(len(owner))]
