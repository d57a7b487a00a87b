"""A loop that resumes from `(ts, state)` alone ends like one that was not interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState

from sequel_benchmarks import RotatedDigits
from sequel_core.algorithms.agem import AGEMHParams
from sequel_core.algorithms.er import ERHParams
from sequel_core.algorithms.kcl import BasesPlanner
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.hparams import AlgorithmHParams, MemoryHParams, MemoryPolicy
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.planner import LARGEST, check_position
from sequel_core.stream.task import Batch
from sequel_flax import ALGORITHMS, Algorithm, State
from tests.flax.parts import (
    AGEM,
    DERPP,
    ER,
    EVERY,
    KCL,
    LAMAML,
    ONLINE,
    SILENT,
    batches,
    initial_states,
    learner,
    rotated,
    settings,
    stream_for,
)

QUOTAS = [
    AGEMHParams(memory=memory, mem_size=60, mem_batch_size=12) for memory in ("task_quota", "class_quota")
]
POLICIES: list[MemoryHParams] = [replace(ER, memory=memory, mem_size=60) for memory in get_args(MemoryPolicy)]
PLANNED: list[AlgorithmHParams] = [replace(AGEM, mem_size=60), DERPP, LAMAML, ONLINE, KCL, *QUOTAS, *POLICIES]
FAST = (DERPP, QUOTAS[1])
STOP = 7  # within the second task


def all_batches(hparams: AlgorithmHParams, stream: Benchmark) -> list[tuple[Any, list[Batch]]]:
    tasks = list(hparams.training_tasks(stream, 0))
    return [(task, list(batches(task, settings()))) for task in tasks]


def continued(
    algorithm: Algorithm, stream: Benchmark, ts: TrainState, state: State, first: int, last: int
) -> tuple[TrainState, State]:
    """Take steps `first` to `last - 1` of two tasks, with a planner from the state."""
    planner, step, k = algorithm.planner(stream.spec, state), jax.jit(algorithm.train_step), 0
    for task, parts in all_batches(algorithm.hparams, stream):
        for n, (x, y, t, _) in enumerate(parts):
            if first <= k < last:
                if n == 0:
                    ts, state = algorithm.start_task(ts, state, task)
                ts, state, _ = step(ts, state, Batch(x, y, t, planner.next(y, t)))
                if n == len(parts) - 1:
                    ts, state = algorithm.end_task(ts, state, iter(parts))
            k += 1
    return ts, state


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
    "hparams",
    [pytest.param(h, marks=[] if h in FAST else [pytest.mark.slow]) for h in PLANNED],
    ids=lambda h: f"{h.name}-{getattr(h, 'memory', '')}",
)
def test_a_plain_loop_resumes_from_ts_and_state(hparams: AlgorithmHParams, tmp_path: Path) -> None:
    stream = stream_for(hparams, num_tasks=2)
    algorithm, restarted = (ALGORITHMS[hparams.name](hparams) for _ in range(2))
    straight = continued(algorithm, stream, *initial_states(algorithm, stream.spec), 0, 99)
    stopped = continued(algorithm, stream, *initial_states(algorithm, stream.spec), 0, STOP)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "stopped", stopped)
        checkpointer.wait_until_finished()
        ts, state = checkpointer.restore(tmp_path / "stopped", initial_states(restarted, stream.spec))
    resumed = continued(restarted, stream, ts, state, STOP, 99)
    assert int(straight[0].step) >= 10
    for a, b in zip(leaves(straight), leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("hparams", [*EVERY, ERHParams(mem_size=0)], ids=lambda h: h.name)
def test_no_array_of_a_state_is_empty(hparams: AlgorithmHParams) -> None:
    algorithm, stream = ALGORITHMS[hparams.name](hparams), stream_for(hparams)
    assert all(leaf.size for leaf in leaves(initial_states(algorithm, stream.spec)))


@pytest.mark.parametrize("hparams", [ER, KCL, LAMAML, NaiveHParams()], ids=lambda h: h.name)
@pytest.mark.parametrize("augmented", [False, True], ids=["plain", "augmented"])
def test_a_planner_from_a_state_continues_the_plan(hparams: AlgorithmHParams, augmented: bool) -> None:
    """One call for six steps equals six calls, each with a planner from the state."""
    stream = RotatedDigits(num_tasks=2, subset=63, crop_padding=2 if augmented else 0)
    algorithm = ALGORITHMS[hparams.name](hparams)
    _, state = initial_states(algorithm, stream.spec)
    y = np.arange(48).reshape(6, 8) % 10
    t = np.zeros_like(y)
    together, alone = (algorithm.planner(stream.spec, state) for _ in range(2))
    whole = together.next(y, t)
    for k in range(6):
        one = alone.next(y[k], t[k])
        for a, b in zip(leaves(one), leaves(whole), strict=True):
            np.testing.assert_array_equal(a, b[k])
        position = getattr(one, "position", None)
        assert (position is None) == (state.position is None) == (hparams.name == "naive" and not augmented)
        if position is not None:
            assert position.dtype == np.int32
            assert (position[0], position.shape) == (k + 1, state.position.shape)
            alone = algorithm.planner(stream.spec, state._replace(position=position))


# -- errors


def test_a_checkpoint_of_an_older_layout_raises(tmp_path: Path) -> None:
    """The older layout had the state of the planner beside that of the algorithm."""
    model = learner(ER)
    tree = model._tree()
    older = {**tree, "state": tree["state"]._replace(position=None), "planner": model.planner.state}
    model._saver.save(tmp_path / "1", older)()
    model.close()
    with pytest.raises(
        ValueError, match=r"checkpoint .*1 does not fit: planner is int64 \[3\] there, and unk"
    ):
        learner(ER).restore(tmp_path / "1")


def test_a_position_of_other_settings_raises() -> None:
    _, state = initial_states(ALGORITHMS["er"](ER), rotated().spec)
    other = ALGORITHMS["er"](replace(ER, memory="class_balanced"))
    with pytest.raises(ValueError, match=r"must have shape \[42\] with these settings .*, got \[3\]"):
        other.planner(rotated().spec, state)
    with pytest.raises(ValueError, match=r"must have shape none with these settings .* got \[3\]; use the"):
        ALGORITHMS["naive"](NaiveHParams()).planner(rotated().spec, state)
    with pytest.raises(ValueError, match=r"must have shape \[3\] with these settings .* got none"):
        ALGORITHMS["er"](ER).planner(rotated().spec, state._replace(position=None))


def test_a_learner_whose_state_was_assigned_without_its_planner_raises() -> None:
    first, second = learner(ER), learner(ER)
    first.fit_task(rotated().tasks[0], SILENT)
    second.ts, second.state = first.ts, first.state
    with pytest.raises(ValueError, match="has planned 0 steps and the state has taken 5; make the planner"):
        second.fit_task(rotated().tasks[1], SILENT)
    assert second.step == 5
    second.planner = second.algorithm.planner(second.spec, second.state)
    second.fit_task(rotated().tasks[1], SILENT)
    third = learner(ER)
    for task in rotated().tasks[:2]:
        third.fit_task(task, SILENT)
    for a, b in zip(leaves((second.ts, second.state)), leaves((third.ts, third.state)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("hparams", [ER, pytest.param(KCL, marks=pytest.mark.slow)], ids=lambda h: h.name)
def test_a_plan_of_another_step_raises_at_the_next_boundary(hparams: AlgorithmHParams) -> None:
    """In a plain loop that uses a new planner after it restored a state."""
    algorithm, stream = ALGORITHMS[hparams.name](hparams), stream_for(hparams, num_tasks=2)
    ts, state = initial_states(algorithm, stream.spec)
    (first, parts), (second, _) = all_batches(hparams, stream)
    stale = algorithm.planner(stream.spec, state)
    ts, state = continued(algorithm, stream, ts, state, 0, 3)
    with pytest.raises(ValueError, match="has planned 0 steps and the state has taken 3"):
        check_position(stale, state.position)
    check_position(algorithm.planner(stream.spec, state), state.position)
    x, y, t, _ = parts[3]
    ts, state, _ = jax.jit(algorithm.train_step)(ts, state, Batch(x, y, t, stale.next(y, t)))
    for boundary in (
        lambda: algorithm.end_task(ts, state, iter(parts)),
        lambda: algorithm.start_task(ts, state, second),
        lambda: algorithm.plan_end(state, iter(parts)),
        lambda: algorithm.planner(stream.spec, state),
    ):
        with pytest.raises(ValueError, match="a step received the plan of another step"):
            boundary()
    assert first.index == 0


def test_a_count_that_does_not_fit_into_a_position_raises() -> None:
    _, state = initial_states(ALGORITHMS["er"](ER), rotated().spec)
    almost_full = np.array([10, LARGEST - 8, 0], np.int32)
    planner = ALGORITHMS["er"](ER).planner(rotated().spec, state._replace(position=almost_full))
    labels = np.zeros(8, int)
    assert planner.next(labels, labels).position.tolist()[:2] == [11, LARGEST]
    before = planner.state
    with pytest.raises(ValueError, match=f"a planner counts up to {LARGEST} samples, got {LARGEST + 8}"):
        planner.next(labels, labels)
    np.testing.assert_array_equal(planner.state, before)
    bases = BasesPlanner(4, 0)
    bases.resume([LARGEST])
    with pytest.raises(ValueError, match=f"a planner counts up to {LARGEST} steps"):
        bases.next(labels, labels)
