"""FlaxLearner: dropout, divergence, evaluation, user-defined modules and metrics, writers."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import clu.metrics
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sequel_core import run
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.runs.learner import DivergenceError, FitMonitor, Progress
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.benchmark import Benchmark, Scenario
from sequel_core.stream.task import AnySplit, Split
from sequel_flax import MLP, naive
from sequel_flax.evaluation import as_batch
from sequel_flax.writers import SilentWriter
from tests.flax.parts import (
    SILENT,
    STEPS,
    Net,
    batches,
    divided,
    flat,
    learner,
    rotated,
    same,
    settings,
    sgd,
    user_loop,
)


@flax.struct.dataclass
class Largest(clu.metrics.Metric):  # type: ignore[misc]  # clu has no types
    """A user-defined metric: the largest loss."""

    value: jax.Array

    @classmethod
    def empty(cls) -> "Largest":
        return cls(value=jnp.array(-jnp.inf, jnp.float32))

    @classmethod
    def from_model_output(cls, loss: jax.Array, **_: Any) -> "Largest":
        return cls(value=loss)

    def merge(self, other: "Largest") -> "Largest":
        return Largest(value=jnp.maximum(self.value, other.value))

    def compute(self) -> jax.Array:
        return self.value


@flax.struct.dataclass
class UsersMetrics(clu.metrics.Collection):  # type: ignore[misc]
    """A user-defined collection without accuracy."""

    loss: clu.metrics.Average.from_output("loss")  # type: ignore[valid-type]
    largest: Largest


# -- models


def test_a_user_defined_module_starts_from_its_init() -> None:
    image = np.zeros((1, 8, 8, 1), np.float32)
    expected = flat(Net().init(jax.random.key(4), image)["params"])
    assert same(learner(NaiveHParams(), training=settings(seed=4)).weights(), expected)
    other = learner(NaiveHParams(), training=settings(seed=5)).weights()
    assert not np.array_equal(other["Dense_0/kernel"], expected["Dense_0/kernel"])


@pytest.mark.parametrize("model", [Net(outputs=7), MLP((5,), num_classes=7)], ids=["users", "built in"])
def test_a_head_of_another_width_raises(model: Any) -> None:
    with pytest.raises(ValueError, match=r"must return logits \[B, 10\].*got \[1, 7\].*set num_classes=10"):
        learner(NaiveHParams(), model=model)


def test_float64_without_64_bit_jax_raises() -> None:
    with pytest.raises(ValueError, match="dtype=float64 needs 64-bit JAX"):
        learner(NaiveHParams(), training=settings(dtype="float64"))


@pytest.mark.parametrize("steps", [0, -3])
def test_steps_per_call_below_one_raises(steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps_per_call must be >= 1, got {steps}"):
        learner(NaiveHParams(), steps_per_call=steps)


# -- dropout


def dropping(dropout: float, seed: int = 0, **options: Any) -> Any:
    return learner(NaiveHParams(), model=MLP((12,), dropout=dropout), seed=seed, **options)


def trained(model: Any) -> dict[str, FloatArray]:
    model.fit_task(rotated().tasks[0], SILENT)
    weights: dict[str, FloatArray] = model.weights()
    return weights


def test_dropout_depends_on_its_seed_only() -> None:
    half = trained(dropping(0.5))
    assert same(half, trained(dropping(0.5)))
    assert not same(half, trained(dropping(0.5, seed=1)))
    assert not same(half, trained(dropping(0.0)))


def test_dropout_is_active_in_training_only() -> None:
    half, none = dropping(0.5), dropping(0.0)
    task = rotated().tasks[0]
    assert half.evaluate(task, "test") == half.evaluate(task, "test") == none.evaluate(task, "test")
    batch = next(iter(batches(task, half.training)))
    for model, dropped in ((half, True), (none, False)):
        _, _, outputs = jax.jit(model.algorithm.train_step)(model.ts, model.state, batch)
        logits = jax.jit(model.algorithm.predict)(model.ts, model.state, batch.x, batch.t)
        assert bool(np.abs(outputs["logits"] - logits).max() > 1e-2) is dropped


def test_each_step_has_its_own_dropout_mask() -> None:
    model = dropping(0.5, tx=sgd(0.0))
    batch = next(iter(batches(rotated().tasks[0], model.training)))
    ts, state, step = model.ts, model.state, jax.jit(model.algorithm.train_step)
    losses = []
    for _ in range(6):
        ts, state, outputs = step(ts, state, batch)
        losses.append(float(outputs["loss"]))
    assert same(flat(ts.params), flat(model.ts.params))
    assert len(set(losses)) == 6


# -- divergence


@pytest.mark.parametrize(("steps_per_call", "interval"), [(1, 1), (1, 50), (3, 50)])
def test_divergence_names_the_step(steps_per_call: int, interval: int) -> None:
    training = settings(epochs_per_task=3, log_every_n_steps=interval)
    exploding = optax.sgd(optax.piecewise_constant_schedule(0.1, {4: 1e38}))
    _, _, losses = user_loop(naive(NaiveHParams()), rotated(1), training, exploding)
    bad = int(np.flatnonzero(~np.isfinite(losses))[0])
    assert STEPS < bad < 3 * STEPS - 2  # neither in the first epoch nor near the end of the task
    model = learner(NaiveHParams(), rotated(1), training, tx=exploding, steps_per_call=steps_per_call)
    with pytest.raises(DivergenceError, match=f"task 0, epoch {bad // STEPS}, step {bad % STEPS};") as caught:
        model.fit_task(rotated(1).tasks[0], SILENT)
    assert caught.value.position == {"task": 0, "epoch": bad // STEPS, "step": bad % STEPS}


# -- evaluation


@pytest.mark.parametrize("scenario", ["domain", "task", "class"])
def test_evaluation_counts_every_sample_once(scenario: Scenario) -> None:
    stream = divided(scenario)
    training, net = settings(eval_batch_size=50), Net(outputs=stream.num_classes)
    model = learner(NaiveHParams(), stream, training, model=net)
    for task in stream.tasks[:3]:
        model.fit_task(task, SILENT)
    mixed = stream.joined(3)
    assert len(mixed.test) % 50 > 0
    x, y, t = mixed.test.take(np.arange(len(mixed.test)))
    logits = np.asarray(
        model.algorithm.predict(model.ts, model.state, jnp.asarray(x), jnp.asarray(t)), np.float64
    )
    masked = np.where(stream.mask[t], logits, -np.inf)
    scored = masked if scenario == "task" else logits
    log_p = scored - scored.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    result = model.evaluate(mixed, "test")
    assert result.total == len(y) > 200
    assert result.score == (scored.argmax(1) == y).sum() / len(y) > 0
    assert result.masked_score == (masked.argmax(1) == y).sum() / len(y)
    np.testing.assert_allclose(result.loss, -log_p[np.arange(len(y)), y].mean(), rtol=1e-5)
    assert (result.masked_score > result.score) is (scenario == "class")


def first(split: AnySplit, size: int) -> Split:
    x, y, _ = split.take(np.arange(size))
    return Split(x, y)


def test_splits_of_all_sizes_are_evaluated_by_one_program(compiled: Counter[str], tmp_path: Path) -> None:
    sizes = (3, 70, 31)
    tasks = tuple(
        replace(task, test=first(task.train, size), validation=first(task.test, size // 3))
        for task, size in zip(rotated(subset=80).tasks, sizes, strict=True)
    )
    stream = Benchmark("uneven", tasks, num_classes=10, scenario="domain")
    model = learner(NaiveHParams(), stream)
    result = run(model, stream, run_dir=tmp_path, evaluate_future=True, progress=False)
    assert compiled["jit(_traced_measure)"] == 1
    for row, task in zip(result.matrix.T, tasks, strict=True):
        batch = as_batch(task.test.take(np.arange(len(task.test))))
        logits = np.asarray(model.algorithm.predict(model.ts, model.state, batch.x, jnp.asarray(batch.t)))
        assert row[-1] == (logits.argmax(1) == batch.y).mean()


def test_masked_logits_have_no_gradient() -> None:
    stream = divided("task")
    model = learner(NaiveHParams(), stream)
    before = model.weights()
    model.fit_task(stream.tasks[2], SILENT)
    changed = np.flatnonzero(model.weights()["Dense_1/bias"] != before["Dense_1/bias"])
    np.testing.assert_array_equal(changed, stream.tasks[2].classes)


# -- metrics and writers


def test_reports_are_means_over_the_steps_since_the_last_report() -> None:
    hparams = EWCHParams(ewc_lambda=30, fisher_samples=20)
    training = settings(log_every_n_steps=3, epochs_per_task=2)
    model = learner(hparams, training=training, metrics=UsersMetrics)
    shown: list[Progress] = []
    for task in rotated().tasks:
        model.fit_task(task, FitMonitor(shown.append, lambda: None))
    _, _, losses = user_loop(model.algorithm, rotated(), training, sgd())
    ends = [3, 5, 6, 9, 10]
    assert [p.task_step for p in shown] == ends * 3
    assert [p.step for p in shown] == [10 * i + k for i in range(3) for k in ends]
    assert [p.epoch for p in shown] == [0, 0, 1, 1, 1] * 3
    for before, report in zip([0, *(p.step for p in shown)], shown, strict=False):
        since = losses[before : report.step]
        np.testing.assert_allclose(report.loss, np.mean(since), rtol=1e-5)
        np.testing.assert_allclose(report.extra["largest"], max(since), rtol=1e-6)
        assert np.isnan(report.score)


def test_the_reported_accuracy_is_that_of_the_training_batches() -> None:
    model = learner(NaiveHParams(), training=settings(log_every_n_steps=1), tx=sgd(0.0))
    shown: list[Progress] = []
    task = rotated().tasks[0]
    model.fit_task(task, FitMonitor(shown.append, lambda: None))
    hits = []
    for x, y, t, _ in batches(task, model.training):
        logits = np.asarray(model.algorithm.predict(model.ts, model.state, x, t))
        hits.append((logits.argmax(1) == y).mean())
    np.testing.assert_allclose([p.score for p in shown], hits, rtol=1e-6)


class Recorder(SilentWriter):
    """A user-defined writer."""

    def __init__(self) -> None:
        self.scalars: list[tuple[int, dict[str, float]]] = []
        self.ends: list[str] = []
        self.hparams: list[dict[str, Any]] = []

    def write_summaries(self, step: int, values: Any, metadata: Any = None) -> None:
        raise AssertionError

    def write_scalars(self, step: int, scalars: Any) -> None:
        assert not self.ends
        self.scalars.append((step, dict(scalars)))

    def write_hparams(self, hparams: Any) -> None:
        self.hparams.append(dict(hparams))

    def flush(self) -> None:
        self.ends.append("flush")

    def close(self) -> None:
        self.ends.append("close")


def test_writers_receive_every_number_with_increasing_steps(tmp_path: Path) -> None:
    writers = [Recorder(), Recorder()]
    training = settings(log_every_n_steps=2)
    model = learner(NaiveHParams(), training=training, writers=writers, metrics=UsersMetrics)
    result = run(model, rotated(), run_dir=tmp_path, evaluate_every=2, progress=False)
    steps: dict[str, list[int]] = {}
    last: dict[str, float] = {}
    for step, scalars in writers[0].scalars:
        last.update(scalars)
        for tag in scalars:
            steps.setdefault(tag, []).append(step)
    trained_at = [2, 4, 5, 7, 9, 10, 12, 14, 15]
    assert steps["train/loss"] == steps["largest"] == trained_at
    for j in range(3):
        assert steps[f"test/accuracy/task_{j}"] == [s for s in trained_at if s > STEPS * j]
        assert last[f"test/accuracy/task_{j}"] == result.matrix[2, j]
    assert steps["test/average_accuracy"] == trained_at
    assert last["test/average_accuracy"] == pytest.approx(result.average_accuracy)
    assert [step for step, _ in writers[1].scalars] == [step for step, _ in writers[0].scalars]
    assert [w.hparams for w in writers] == [[result.config]] * 2
    assert [w.ends for w in writers] == [["flush", "flush", "close"]] * 2  # at the ends of stream and run
