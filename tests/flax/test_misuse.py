"""Mistakes in user-defined loops: an error that says what to do, or the right result."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.hparams import AlgorithmHParams
from sequel_core.stream.task import Batch, Task
from sequel_flax import ALGORITHMS, State
from sequel_flax.optimizers import get_learning_rates
from tests.flax.parts import (
    BATCH,
    EVERY,
    EWC,
    ICARL,
    MAS,
    Net,
    divided,
    initial_states,
    learner,
    rotated,
    sgd,
    stream_for,
)


def initial(hparams: AlgorithmHParams, tx: Any = None) -> tuple[Any, TrainState, State]:
    """Return an algorithm, a train state, and the state before the first task."""
    algorithm = ALGORITHMS[hparams.name](hparams)
    return algorithm, *initial_states(algorithm, stream_for(hparams).spec, tx=tx)


def task_of(hparams: AlgorithmHParams, k: int) -> Task:
    return list(hparams.training_tasks(stream_for(hparams), 0))[k]


def batches(task: Task, count: int = 2) -> list[Batch]:
    rows = np.arange(count * BATCH).reshape(count, BATCH)
    return [Batch(*task.train.take(row)) for row in rows]


FORGOTTEN = r"call ts, state = algorithm\.start_task\(ts, state, task\) before the first step of every task"


# -- a task that was not started


@pytest.mark.parametrize("hparams", [NaiveHParams(), EWC], ids=["naive", "ewc"])
def test_the_end_of_a_task_that_was_not_started_raises(hparams: AlgorithmHParams) -> None:
    algorithm, ts, state = initial(hparams)
    with pytest.raises(ValueError, match=f"no task was started; .*{FORGOTTEN}"):
        algorithm.end_task(ts, state, batches(task_of(hparams, 0)))


@pytest.mark.parametrize(
    "hparams",
    [pytest.param(h, marks=[] if h.name in ("naive", "er") else [pytest.mark.slow]) for h in EVERY],
    ids=lambda h: h.name,
)
def test_a_step_of_a_task_that_was_not_started_has_a_nan_loss_and_is_recorded(
    hparams: AlgorithmHParams,
) -> None:
    """Before the first task, and before the second without its `start_task`; else the loss is finite."""
    algorithm, ts, state = initial(hparams)
    planner, step = algorithm.planner(stream_for(hparams).spec, state), jax.jit(algorithm.train_step)

    def take(ts: TrainState, state: State, k: int) -> Any:
        (batch,) = batches(task_of(hparams, k), 1)
        batch = batch._replace(t=np.full(BATCH, k))  # joint training also has samples of earlier tasks
        return step(ts, state, batch._replace(plan=planner.next(batch.y, batch.t)))

    if hparams.name != "kcl":  # whose coreset is empty then
        wrong = step(ts, state, batches(task_of(hparams, 0), 1)[0]._replace(plan=_plan(algorithm, hparams)))
        assert np.isnan(wrong[2]["loss"])
        with pytest.raises(ValueError, match=f"samples of a task that was not started; .*{FORGOTTEN}"):
            algorithm.start_task(*wrong[:2], task_of(hparams, 0))
    ts, state = algorithm.start_task(ts, state, task_of(hparams, 0))
    ts, state, outputs = take(ts, state, 0)
    assert np.isfinite(outputs["loss"])
    ts, state = algorithm.end_task(ts, state, batches(task_of(hparams, 0)))
    ts, state, outputs = take(ts, state, 1)
    assert np.isnan(outputs["loss"])
    for act in (
        partial(algorithm.end_task, ts, state, batches(task_of(hparams, 1))),
        partial(algorithm.plan_end, state, batches(task_of(hparams, 1))),
        partial(algorithm.start_task, ts, state, task_of(hparams, 2)),
    ):
        with pytest.raises(ValueError, match=f"samples of a task that was not started; .*{FORGOTTEN}"):
            act()


def _plan(algorithm: Any, hparams: AlgorithmHParams) -> Any:
    _, _, state = initial(hparams)
    (batch,) = batches(task_of(hparams, 0), 1)
    return algorithm.planner(stream_for(hparams).spec, state).next(batch.y, batch.t)


def test_samples_of_earlier_tasks_may_be_among_those_of_a_step() -> None:
    algorithm, ts, state = initial(NaiveHParams())
    step = jax.jit(algorithm.train_step)
    for k in range(2):
        ts, state = algorithm.start_task(ts, state, task_of(NaiveHParams(), k))
    x, y, t = (
        np.concatenate(a) for a in zip(*(batches(rotated().tasks[k])[0][:3] for k in (0, 1)), strict=True)
    )
    ts, state, outputs = step(ts, state, Batch(x, y, t))
    assert np.isfinite(outputs["loss"])
    assert int(state.stream.task) == 1
    for wrong in (-1, 2, 99):
        outputs = step(ts, state, Batch(x, y, np.where(t == 1, wrong, t)))[2]
        assert np.isnan(outputs["loss"])


# -- labels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"y": np.eye(10, dtype=np.float32)[:BATCH]},
            r"labels y .* got float32 \[8, 10\]; give class indices",
        ),
        (
            {"y": np.zeros((BATCH, 1), np.int32)},
            r"labels y of a batch must be integers \[8\], .* got int32 \[8, 1\]",
        ),
        ({"y": np.zeros(1, np.int32)}, r"labels y .* got int32 \[1\]"),  # would be broadcast
        ({"y": np.zeros(BATCH, np.float32)}, r"labels y .* got float32 \[8\]"),
        ({"t": np.zeros(BATCH, np.float32)}, r"task indices t .* got float32 \[8\]"),
        ({"t": 0}, r"task indices t .* got int32 \[\]"),
    ],
)
@pytest.mark.parametrize("hparams", [NaiveHParams(), ICARL], ids=["naive", "icarl"])
def test_invalid_labels_and_task_indices_raise(
    hparams: AlgorithmHParams, change: dict[str, Any], message: str
) -> None:
    algorithm, ts, state = initial(hparams)
    ts, state = algorithm.start_task(ts, state, task_of(hparams, 0))
    (batch,) = batches(task_of(hparams, 0), 1)
    with pytest.raises(ValueError, match=message):
        jax.jit(algorithm.train_step)(ts, state, batch._replace(**change))


@pytest.mark.parametrize("hparams", [NaiveHParams(), ICARL], ids=["naive", "icarl"])
def test_a_label_outside_the_head_gives_a_nan_loss(hparams: AlgorithmHParams) -> None:
    algorithm, ts, state = initial(hparams)
    ts, state = algorithm.start_task(ts, state, task_of(hparams, 0))
    (batch,) = batches(task_of(hparams, 0), 1)
    step = jax.jit(algorithm.train_step)
    assert np.isfinite(step(ts, state, batch)[2]["loss"])
    for label in (-1, 10):
        y = np.where(np.arange(BATCH) == 3, label, batch.y)
        assert np.isnan(step(ts, state, batch._replace(y=y))[2]["loss"])


@pytest.mark.parametrize("hparams", [NaiveHParams(), ICARL], ids=["naive", "icarl"])
def test_a_label_of_another_task_gives_a_nan_loss_if_logits_are_masked(hparams: AlgorithmHParams) -> None:
    """iCaRL's own loss is finite for such a label."""
    task = divided("task").tasks[1]
    (batch,) = batches(task, 1)
    for scenario in ("task", "class"):
        made = learner(hparams, divided(scenario))
        ts, state = made.algorithm.start_task(made.ts, made.state, task)
        for label in (*task.classes, *divided("task").tasks[0].classes):
            y = np.where(np.arange(BATCH) == 3, label, batch.y)
            loss = made.algorithm.train_step(ts, state, batch._replace(y=y))[2]["loss"]
            assert np.isnan(loss) == (scenario == "task" and label not in task.classes)


# -- samples at the end of a task


@pytest.mark.parametrize("hparams", [EWC, MAS, ICARL], ids=["ewc", "mas", "icarl"])
def test_a_generator_that_was_read_before_raises(hparams: AlgorithmHParams) -> None:
    algorithm, ts, state = initial(hparams)
    ts, state = algorithm.start_task(ts, state, task_of(hparams, 0))
    read = iter(batches(task_of(hparams, 0)))
    list(read)
    nothing: list[Batch] = []
    for spent in (read, iter(nothing), nothing):
        for act in (partial(algorithm.end_task, ts, state), partial(algorithm.plan_end, state)):
            with pytest.raises(ValueError, match="got no batch; give the task's batches again: a generator"):
                act(spent)
    for act in (partial(algorithm.end_task, ts, state), partial(algorithm.plan_end, state)):
        with pytest.raises(ValueError, match=r"got a single Batch; give \[batch\]"):
            act(batches(task_of(hparams, 0))[0])


# -- several learning rates


def two_rates(head: Any = 0.2) -> optax.GradientTransformation:
    transforms = {"body": sgd(0.1, momentum=None), "head": sgd(head)}
    return optax.multi_transform(
        transforms, lambda params: {k: "head" if k == "Dense_1" else "body" for k in params}
    )


@pytest.mark.parametrize("chained", [False, True])
def test_each_of_two_learning_rates_decays_from_its_own_value(chained: bool) -> None:
    hparams = NaiveHParams(lr_decay=0.5, min_lr=0.03)
    tx = optax.chain(optax.clip_by_global_norm(1e6), two_rates()) if chained else two_rates()
    algorithm, ts, state = initial(hparams, tx)
    expected = {"Dense_0": 0.1, "Dense_1": 0.2}
    step = jax.jit(algorithm.train_step)
    for k, rates in enumerate([(0.1, 0.2), (0.05, 0.1), (0.03, 0.05)]):
        task = rotated().tasks[k]
        ts, state = algorithm.start_task(ts, state, task)
        np.testing.assert_allclose(sorted(map(float, get_learning_rates(ts.opt_state))), rates, rtol=1e-6)
        before, (batch,) = ts.params, batches(task, 1)
        ts, state, _ = step(ts, state, batch)
        expected = dict(zip(("Dense_0", "Dense_1"), rates, strict=True))
        gradient = loss_gradient(before, batch)
        for name, rate in expected.items():
            for leaf in ("kernel", "bias"):
                expected_leaf = before[name][leaf] - rate * gradient[name][leaf]  # the momentum is reset
                np.testing.assert_allclose(ts.params[name][leaf], expected_leaf, rtol=1e-5, atol=1e-6)


def loss_gradient(params: Any, batch: Batch) -> Any:
    """Return the gradient of the mean cross-entropy."""
    normalisation = rotated().normalisation
    x = jnp.asarray((batch.x / 255 - normalisation.mean[0]) / normalisation.std[0], jnp.float32)

    def loss(params: Any) -> jax.Array:
        logits: Any = Net().apply({"params": params}, x)
        logits = jax.nn.log_softmax(logits)
        return -jnp.sum(logits * jax.nn.one_hot(batch.y, 10)) / len(batch.y)

    return jax.grad(loss)(params)


def test_one_schedule_among_two_learning_rates_raises_with_lr_decay_only() -> None:
    tx = two_rates(optax.constant_schedule(0.1))
    with pytest.raises(ValueError, match=r"lr_decay=0\.5 needs an optimizer whose learning rate can be set"):
        initial(NaiveHParams(lr_decay=0.5), tx)
    assert get_learning_rates(initial(NaiveHParams(), tx)[1].opt_state) == ()


def test_a_parameter_called_learning_rate_is_not_a_learning_rate() -> None:
    params = {"learning_rate": jnp.zeros(3), "w": jnp.zeros(2)}
    np.testing.assert_allclose(get_learning_rates(sgd(0.3).init(params)), [0.3], rtol=1e-6)
