"""Task boundaries as pure functions: three seeds under vmap equal three separate runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

from sequel_benchmarks import RotatedDigits
from sequel_core.algorithms.agem import AGEMHParams
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.mas import MASHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.hparams import AlgorithmHParams
from sequel_core.stream import plan
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.task import Batch, Task
from sequel_flax import ALGORITHMS, Algorithm, State
from sequel_flax.boundaries import collected, stack_plans
from sequel_flax.steps import strong_types
from tests.flax.parts import (
    EVERY,
    EWC,
    MCSGD,
    SILENT,
    Layered,
    initial_states,
    learner,
    settings,
    sgd,
    stream_for,
)

SEEDS, STEPS, SIZE = 3, 50, 4
STREAM = RotatedDigits(num_tasks=2, subset=220)
TX = sgd(0.05)
SMALL_STEPS = sgd(0.001)  # for KCL, whose solves amplify rounding errors, more with larger steps
NET = Layered(width=6)
METHODS = tuple(replace(h, mem_size=160) if isinstance(h, AGEMHParams) else h for h in EVERY)
CHEAP = ("agem",)


def initial(algorithm: Algorithm, seed: int) -> tuple[TrainState, State]:
    tx = SMALL_STEPS if algorithm.hparams.name == "kcl" else TX
    states = initial_states(algorithm, STREAM.spec, model=NET, tx=tx, seed=seed, dtype="float64")
    initial: tuple[TrainState, State] = strong_types(states)
    return initial


def steps(algorithm: Algorithm, ts: TrainState, state: State, batches: Batch) -> tuple[TrainState, State]:
    def one(carry: Any, batch: Batch) -> Any:
        ts, state = carry
        return algorithm.train_step(ts, state, batch)[:2], None

    end: tuple[TrainState, State] = jax.lax.scan(one, (ts, state), batches)[0]
    return end


def task_batches(algorithm: Algorithm, state: State, task: Task, seed: int) -> Batch:
    """Return 50 batches with their plans."""
    split = algorithm.training_split(state, task.train)
    rows = plan.epoch_batches(seed, task.index, 0, len(split), SIZE)[:STEPS]
    x, y, t = split.take(rows.ravel())
    labels, tasks = (a.reshape(STEPS, SIZE).astype(np.int32) for a in (y, t))
    step_plans = algorithm.planner(STREAM.spec, state).next(labels, tasks)
    return Batch(x.reshape(STEPS, SIZE, *x.shape[1:]), labels, tasks, step_plans)


def last_batches(task: Task, seed: int, counts: Sequence[int]) -> list[Batch]:
    """Return the batches for `end_task`; the number of samples may differ between seeds."""
    rows = np.random.default_rng(seed).permutation(len(task.train))[: counts[seed]]
    return [Batch(*task.train.take(rows[k : k + 8])) for k in range(0, len(rows), 8)]


def seen_samples() -> tuple[np.ndarray, np.ndarray]:
    parts = [task.test.take(np.arange(8)) for task in STREAM.tasks]
    return np.concatenate([p.x for p in parts]), np.concatenate([p.t for p in parts]).astype(np.int32)


def alone(algorithm: Algorithm, seed: int, counts: Sequence[int]) -> list[Any]:
    """Train one seed with `start_task` and `end_task`."""
    ts, state = initial(algorithm, seed)
    run, predict = jax.jit(partial(steps, algorithm)), jax.jit(algorithm.predict)
    for task in algorithm.hparams.training_tasks(STREAM, seed):
        ts, state = algorithm.start_task(ts, state, task)
        ts, state = run(*strong_types((ts, state)), task_batches(algorithm, state, task, seed))
        ts, state = algorithm.end_task(ts, state, last_batches(task, seed, counts))
    return [ts.params, ts.opt_state, state.memory, state.position, predict(ts, state, *seen_samples())]


def mapped(algorithms: Sequence[Algorithm], counts: Sequence[int]) -> list[Any]:
    """Train all seeds in one program; only the plans are made for each seed on its own."""
    first = algorithms[0]
    start, end, run = (
        jax.jit(jax.vmap(f)) for f in (first.apply_start, first.apply_end, partial(steps, first))
    )
    predict = jax.jit(jax.vmap(first.predict, in_axes=(0, 0, None, None)))
    ts, state = jax.tree.map(lambda *a: jnp.stack(a), *(initial(a, k) for k, a in enumerate(algorithms)))

    def each(function: Callable[..., Any], tasks: Sequence[Task]) -> Any:
        states = [jax.tree.map(lambda a, k=k: a[k], state) for k in range(len(algorithms))]
        return stack_plans([function(a, states[k], tasks[k], k) for k, a in enumerate(algorithms)])

    def plan_end(algorithm: Algorithm, state: State, task: Task, seed: int) -> Any:
        return algorithm.plan_end(state, last_batches(task, seed, counts))

    streams = [list(a.hparams.training_tasks(STREAM, k)) for k, a in enumerate(algorithms)]
    for tasks in zip(*streams, strict=True):
        ts, state = start(ts, state, each(lambda a, state, task, k: a.plan_start(state, task), tasks))
        ts, state = run(ts, state, each(task_batches, tasks))
        ts, state = end(ts, state, each(plan_end, tasks))
    return [ts.params, ts.opt_state, state.memory, state.position, predict(ts, state, *seen_samples())]


def check(hparams: AlgorithmHParams, counts: Sequence[int]) -> None:
    jax.config.update("jax_enable_x64", True)  # in every thread: iCaRL has a host callback
    algorithms = [ALGORITHMS[hparams.name](hparams, seed=seed) for seed in range(SEEDS)]
    together = mapped(algorithms, counts)
    tolerance = 1e-8 if hparams.name == "kcl" else 1e-10
    for seed, algorithm in enumerate(algorithms):
        single = alone(algorithm, seed, counts)
        for name, a, b in zip(
            ("params", "opt", "memory", "position", "logits"), single, together, strict=True
        ):
            for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
                message = f"{name} of seed {seed}"
                np.testing.assert_allclose(y[seed], x, rtol=tolerance, atol=tolerance, err_msg=message)


@pytest.mark.parametrize(
    "hparams",
    [pytest.param(h, marks=[] if h.name in CHEAP else [pytest.mark.slow]) for h in METHODS],
    ids=lambda h: f"{h.name}-{getattr(h, 'lmc_policy', '')}",
)
def test_three_seeds_under_vmap_equal_three_runs(hparams: AlgorithmHParams) -> None:
    check(hparams, [24, 24, 24])


@pytest.mark.parametrize(
    "hparams",
    [
        EWC,
        pytest.param(EWCHParams(accumulation="online", fisher_samples=None), marks=pytest.mark.slow),
        pytest.param(MASHParams(gradients="batch", mas_samples=21), marks=pytest.mark.slow),
        pytest.param(replace(MCSGD, lmc_steps="epoch"), marks=pytest.mark.slow),
    ],
    ids=["ewc", "ewc-online", "mas-batch", "mcsgd-epoch"],
)
def test_seeds_with_different_numbers_of_samples_are_padded(hparams: AlgorithmHParams) -> None:
    check(hparams, [24, 13, 19])


def test_stacked_plans_are_padded_with_samples_that_do_not_count() -> None:
    x = np.arange(10, dtype=np.uint8).reshape(5, 2)
    first = collected(
        [Batch(x[:2], np.array([1, 2]), np.array([0, 0])), Batch(x[2:3], np.array([3]), np.array([0]))]
    )
    np.testing.assert_array_equal(first.t, [[0, 0], [0, -1]])
    np.testing.assert_array_equal(first.y, [[1, 2], [3, 0]])
    np.testing.assert_array_equal(first.x, [[[0, 1], [2, 3]], [[4, 5], [0, 0]]])
    second = collected([Batch(x[3:], np.array([4, 5]), np.array([1, 1]))], samples=1)
    assert second.t.shape == (1, 1)
    both = stack_plans([first, second])
    np.testing.assert_array_equal(both.t, [[[0, 0], [0, -1]], [[1, -1], [-1, -1]]])
    np.testing.assert_array_equal(both.y[1], [[4, -1], [-1, -1]])
    np.testing.assert_array_equal(both.x[1, 0], [[6, 7], [0, 0]])
    assert [a.dtype.kind for a in both[:3]] == ["u", "i", "i"]
    with pytest.raises(ValueError, match="the end of a task needs the task's samples, got no batch"):
        collected([])


# -- no intermediate NaN


@pytest.fixture
def _debug_nans() -> Any:
    jax.config.update("jax_debug_nans", True)
    yield
    jax.config.update("jax_debug_nans", False)


@pytest.mark.usefixtures("_debug_nans")
@pytest.mark.parametrize(
    "hparams",
    [pytest.param(h, marks=[] if h.name in CHEAP else [pytest.mark.slow]) for h in METHODS],
    ids=lambda h: h.name,
)
def test_no_method_computes_a_nan(hparams: AlgorithmHParams) -> None:
    stream: Benchmark = stream_for(hparams, num_tasks=2)
    model = learner(hparams, stream, settings())
    for task in hparams.training_tasks(stream):
        model.fit_task(task, SILENT)
        for evaluated in stream.tasks:
            model.evaluate(evaluated, "test")
    plain = learner(NaiveHParams(), stream, tx=optax.sgd(0.1))
    assert plain.state.stream.learning_rates == ()
