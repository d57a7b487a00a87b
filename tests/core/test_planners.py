"""The planners of La-MAML, MC-SGD and KCL, and the table of noise that KCL takes its bases from."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from scipy import stats

from sequel_core.algorithms.kcl import NOISE, BasesPlanner, KCLHParams, noise_table
from sequel_core.algorithms.lamaml import LaMAMLHParams, MetaPlanner
from sequel_core.algorithms.mcsgd import MCSGDHParams, connection_batches
from sequel_core.stream import plan
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.coresets import with_coreset
from sequel_core.stream.images import Normalisation
from sequel_core.stream.memory import MemoryPlanner
from sequel_core.stream.task import JoinedSplit, Split, Task
from sequel_core.stream.trees import LeafSpec

SPEC = StreamSpec(LeafSpec((2, 2, 1), "uint8"), 4, 3, "domain", np.ones((3, 4), np.bool_), Normalisation())
META = LaMAMLHParams(mem_size=12, mem_batch_size=4, glances=3)


def labels(steps: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    y = np.arange(steps * size).reshape(steps, size) % 4
    return y, np.repeat(np.arange(steps) * 3 // steps, size).reshape(steps, size)


def test_each_glance_has_another_order_and_another_draw() -> None:
    y, t = labels(30, 6)
    write, reads, order, _ = MetaPlanner(META, SPEC, 0).next(y, t)
    assert (write.shape, reads.shape, order.shape) == ((30, 6), (30, 3, 4), (30, 3, 6))
    assert {a.dtype for a in (write, reads, order)} == {np.dtype(np.int32)}
    np.testing.assert_array_equal(np.sort(order, axis=-1), np.broadcast_to(np.arange(6), order.shape))
    assert len({row.tobytes() for row in order.reshape(-1, 6)}) > 60  # distinct ones of 90; 720 are possible
    assert len({row.tobytes() for row in reads.reshape(-1, 4)}) > 60


def test_the_first_glance_reads_before_the_step_is_written_and_the_others_after() -> None:
    planner = MetaPlanner(META, SPEC, 0)
    (write, reads, *_), held = planner.next(np.arange(4), np.zeros(4, int)), set(range(4))
    assert set(write.tolist()) == held
    assert set(reads[0].tolist()) == {12}  # the memory was empty
    assert {tuple(r) for r in reads[1:].tolist()} == {(0, 1, 2, 3)}  # the samples just written
    write, reads, *_ = planner.next(np.arange(4), np.zeros(4, int))
    assert set(reads[0].tolist()) <= held
    assert set(write.tolist()) == {4, 5, 6, 7}
    assert not set(reads[1:].ravel().tolist()) <= held


def test_the_reservoir_is_the_same_as_in_replay_methods() -> None:
    y, t = labels(20, 6)
    ours, theirs = MetaPlanner(META, SPEC, 5), MemoryPlanner(META, SPEC, 5)
    np.testing.assert_array_equal(ours.next(y, t).write, theirs.next(y, t).write)


@pytest.mark.parametrize("hparams", [META, LaMAMLHParams(mem_size=0)], ids=["memory", "none"])
def test_single_steps_and_a_restored_state_give_the_same_plan(hparams: LaMAMLHParams) -> None:
    y, t = labels(12, 6)
    whole = MetaPlanner(hparams, SPEC, 1).next(y, t)
    one, other = (MetaPlanner(hparams, SPEC, 1) for _ in range(2))
    for k in range(12):
        step = one.next(y[k], t[k])
        for a, b in zip(step, whole, strict=True):
            np.testing.assert_array_equal(a, b[k])
        if k == 6:
            other.state = one.state
    assert len({row.tobytes() for row in whole.order.reshape(-1, 6)}) > 20
    rest = other.next(y[7:], t[7:])
    for a, b in zip(rest, whole, strict=True):
        np.testing.assert_array_equal(a, b[7:])


def test_zero_draws_give_no_reads() -> None:
    offline = MCSGDHParams(mem_size=12, lmc_batch_size=5)
    y, t = labels(6, 4)
    assert MemoryPlanner(offline, SPEC, 0, draws=0, past_only=True).next(y, t).reads.shape == (6, 0, 0)
    online = MemoryPlanner(MCSGDHParams(mem_size=12, lmc_policy="online"), SPEC, 0, past_only=True)
    assert online.next(y, t).reads.shape == (6, 1, 64)  # padded, since the memory is smaller


def test_starts_of_bases_are_uniform_and_independent_of_chunks() -> None:
    whole, alone = (BasesPlanner(50, 3) for _ in range(2))
    y = np.zeros((40, 6), int)
    starts = whole.next(y, y).starts
    assert starts.shape == (40, 50)
    assert starts.dtype == np.int32
    for k in range(40):
        if k == 20:
            alone.state = alone.state.copy()
        np.testing.assert_array_equal(alone.next(y[k], y[k]).starts, starts[k])
    assert alone.state == whole.state == [40]
    assert stats.kstest(starts.ravel() / NOISE, "uniform").pvalue > 1e-3


def test_noise_is_standard_normal() -> None:
    table = noise_table(0)
    assert table.shape == (NOISE,)
    assert table.dtype == np.float32
    assert stats.kstest(table[:20000], "norm").pvalue > 1e-3
    assert abs(np.corrcoef(table[:-1], table[1:])[0, 1]) < 5 / np.sqrt(NOISE)
    odd = plan.normal("a", count=7)
    np.testing.assert_array_equal(odd[:4], plan.normal("a", count=8)[:4])
    assert not np.array_equal(noise_table(1), table)


TASKS = np.array([0, 0, 1, -1, 1, 1, 2, 2, 0, 2])


@pytest.mark.parametrize("steps", ["batch", "epoch"])
def test_connection_batches_contain_each_sample_once_per_epoch(steps: Literal["batch", "epoch"]) -> None:
    hparams = MCSGDHParams(lmc_batch_size=2, lmc_epochs=3, lmc_steps=steps)
    steps_of_pairs = list(connection_batches(hparams, TASKS, 2, seed=4))
    assert [len(pairs) for pairs in steps_of_pairs] == ([1] * 9 if steps == "batch" else [3] * 3)
    pairs = [pair for step in steps_of_pairs for pair in step]
    epochs = [pairs[k : k + 3] for k in (0, 3, 6)]
    for epoch in epochs:
        past, current = (np.concatenate(batches) for batches in zip(*epoch, strict=True))
        assert sorted(past[past < 10].tolist()) == [0, 1, 2, 4, 5, 8]
        assert sorted(current[current < 10].tolist()) == [6, 7, 9]
        assert current.dtype == np.int32
    assert len({np.concatenate(epoch).tobytes() for epoch in epochs}) == 3


def test_a_coreset_is_stratified_and_disjoint_from_the_training_samples() -> None:
    y = np.array([0, 1, 0, 1, 1, 0, 0, 1, 1, 0])
    images = np.arange(40, dtype=np.uint8).reshape(10, 2, 2, 1)
    first = Split(images, y, 1, indices=np.array([9, 0, 1, 2, 3]))
    second = Split(images, y, 1, indices=np.array([4, 5, 6, 7, 8]))
    for train in (Split(images, y, 1), JoinedSplit((first, second))):
        task = Task(1, "two classes", (0, 1), train, first, first)
        made = with_coreset(task, 3, seed=0)
        assert made.coreset is not None
        core, rest = (s.take(np.arange(len(s))) for s in (made.coreset, made.train))
        assert core.y.tolist() == [0, 0, 0, 1, 1, 1]
        kept = [x.tobytes() for x in (*core.x, *rest.x)]
        assert sorted(kept) == sorted(x.tobytes() for x in images)
        order = [x.tobytes() for x in train.take(np.arange(10)).x]
        assert [x.tobytes() for x in rest.x] == sorted((x.tobytes() for x in rest.x), key=order.index)
        again = with_coreset(task, 3, seed=0).coreset
        assert again is not None
        np.testing.assert_array_equal(again.take(np.arange(6)).x, core.x)
    with pytest.raises(ValueError, match=r"core_size must leave samples of every class to train on, got 5"):
        with_coreset(task, 5, seed=0)


def test_the_coreset_size_must_be_a_multiple_of_the_number_of_classes() -> None:
    task = Task(0, "three", (0, 1, 2), *[Split(np.zeros((3, 1, 1, 1), np.uint8), np.arange(3))] * 3)
    with pytest.raises(ValueError, match=r"core_size must divide into the 3 classes of task 0, got 200; use"):
        KCLHParams().per_class(task)
    assert KCLHParams(core_size=9).per_class(task) == 3
