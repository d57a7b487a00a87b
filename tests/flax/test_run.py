"""The orchestrator with a real learner: the run directory, the evaluated steps, and errors."""

from __future__ import annotations

import csv
import json
import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
import yaml
from threadpoolctl import threadpool_info, threadpool_limits

import sequel_core
from sequel_core import load_result, load_weights, run
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.joint import JointHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.cli.run import execute
from sequel_core.experiment.compose import compose
from sequel_core.runs.learner import DivergenceError
from sequel_core.runs.results import Result
from sequel_flax import process_settings
from tests.flax.parts import STEPS, divided, learner, rotated, same, settings

EWC = EWCHParams(ewc_lambda=30, fisher_samples=20)


def records(directory: Path, event: str) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == event]


def test_the_contents_of_the_run_directory(tmp_path: Path) -> None:
    model = learner(EWC, training=settings(log_every_n_steps=3))
    result = run(model, rotated(), run_dir=tmp_path / "new" / "run", progress=False)
    directory = tmp_path / "new" / "run"
    names = {"config.yaml", "metrics.jsonl", "accuracy_matrix.csv", "summary.json", "weights.npz"}
    assert {path.name for path in directory.iterdir()} == {*names, "checkpoints"}

    config = yaml.safe_load((directory / "config.yaml").read_text())
    assert config["mode"] == "jax"
    assert config["algo"] == {"name": "ewc", **vars(EWC)}
    assert config["training"] == {**vars(model.training)}
    assert config["benchmark"]["num_tasks"] == 3
    assert config["parameters"] == 65 * 12 + 13 * 10

    rows = list(csv.reader((directory / "accuracy_matrix.csv").read_text().splitlines()))
    assert rows[0] == ["task_0", "task_1", "task_2"]
    matrix = np.array([[float(cell or "nan") for cell in row] for row in rows[1:]])
    np.testing.assert_array_equal(np.isnan(matrix), ~np.tri(3, dtype=bool))
    np.testing.assert_array_equal(matrix, result.matrix)
    for j, task in enumerate(rotated().tasks):
        assert matrix[2, j] == model.evaluate(task, "test").score

    summary = json.loads((directory / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["mode"] == "jax"
    assert summary["split"] == "test"
    assert summary["average_accuracy"] == summary["test_average_accuracy"] == pytest.approx(matrix[2].mean())
    assert summary["forgetting"] == pytest.approx(np.mean(np.nanmax(matrix[:2, :2], axis=0) - matrix[2, :2]))
    assert summary["bwt"] == pytest.approx(np.mean(matrix[2, :2] - np.diag(matrix)[:2]))
    assert summary["learning_accuracy"] == pytest.approx(np.diag(matrix).mean())
    assert summary["fwt"] is None
    assert "masked_average_accuracy" not in summary
    assert summary["steps"] == model.step == 3 * STEPS
    seconds = summary["seconds"]
    parts = [seconds[part] for part in ("train", "evaluate", "checkpoint", "other")]
    assert sum(parts) == pytest.approx(seconds["total"])
    assert min(seconds.values()) > 0
    assert summary["threads"] == model.threads() >= 1
    assert summary["peak_memory_bytes"] > 50e6
    assert summary["versions"]["jax"] == jax.__version__
    assert {"python", "numpy", "flax", "optax", "sequel-cl"} <= summary["versions"].keys()

    trained = records(directory, "train")
    assert [(r["task"], r["step"]) for r in trained] == [(i, STEPS * i + k) for i in range(3) for k in (3, 5)]
    assert all(r["samples_per_second"] > 0 and r["loss"] > 0 and 0 <= r["accuracy"] <= 1 for r in trained)
    evaluations = records(directory, "evaluation")
    evaluated = [(r["after_task"], r["task"], r["step"], r["accuracy"]) for r in evaluations]
    assert evaluated == [(i, j, STEPS * (i + 1), matrix[i, j]) for i in range(3) for j in range(i + 1)]
    assert same(load_weights(directory), model.weights())


def test_load_result_returns_what_run_returned(tmp_path: Path) -> None:
    result = run(learner(NaiveHParams()), rotated(), run_dir=tmp_path, evaluate_future=True, progress=False)
    again = load_result(tmp_path)
    np.testing.assert_array_equal(again.matrix, result.matrix)
    assert (again.run_dir, again.config, again.summary) == (result.run_dir, result.config, result.summary)
    for name in ("average_accuracy", "forgetting", "bwt", "fwt", "learning_accuracy", "worst_case_accuracy"):
        assert getattr(again, name) == getattr(result, name) == result.summary[name]


def test_runs_are_repeatable(tmp_path: Path) -> None:
    a, b = (run(learner(NaiveHParams()), rotated(), run_dir=tmp_path / x, progress=False) for x in "ab")
    np.testing.assert_array_equal(a.matrix, b.matrix)
    assert same(load_weights(tmp_path / "a"), load_weights(tmp_path / "b"))
    other = learner(NaiveHParams(), training=settings(seed=1))
    run(other, rotated(), run_dir=tmp_path / "c", progress=False)
    assert not same(load_weights(tmp_path / "a"), load_weights(tmp_path / "c"))


@pytest.mark.parametrize(
    ("every", "steps_per_call", "within"),
    [("task", 1, []), ("epoch", 1, [5]), (3, 1, [3, 6, 9]), (3, 2, [3, 6, 9]), (99, 1, [])],
)
def test_evaluate_every(every: Any, steps_per_call: int, within: list[int], tmp_path: Path) -> None:
    model = learner(NaiveHParams(), training=settings(epochs_per_task=2), steps_per_call=steps_per_call)
    result = run(model, rotated(2), run_dir=tmp_path, evaluate_every=every, progress=False)
    evaluations = records(tmp_path, "evaluation")
    seen = [(r["after_task"], r["step"], r["task"]) for r in evaluations if r["within_task"]]
    assert seen == [(i, 10 * i + k, j) for i in range(2) for k in within for j in range(i + 1)]
    ends = [(r["after_task"], r["task"], r["accuracy"]) for r in evaluations if not r["within_task"]]
    assert ends == [(i, j, result.matrix[i, j]) for i in range(2) for j in range(i + 1)]


def test_evaluation_within_a_task_changes_no_weight(tmp_path: Path) -> None:
    plain, watched = learner(EWC), learner(EWC)
    often: dict[str, Any] = {"evaluate_every": 1, "evaluate_future": True}
    run(plain, rotated(), run_dir=tmp_path / "plain", progress=False)
    run(watched, rotated(), run_dir=tmp_path / "watched", progress=False, **often)
    assert same(plain.weights(), watched.weights())


def test_evaluation_on_validation(tmp_path: Path) -> None:
    stream = rotated(validation=0.2)
    model = learner(NaiveHParams(), stream)
    result = run(model, stream, run_dir=tmp_path, evaluate_on="validation", progress=False)
    on_validation = [model.evaluate(task, "validation").score for task in stream.tasks]
    on_test = [model.evaluate(task, "test").score for task in stream.tasks]
    np.testing.assert_array_equal(result.matrix[2], on_validation)
    assert result.average_accuracy == pytest.approx(np.mean(on_validation))
    assert result.summary["validation_average_accuracy"] == result.average_accuracy
    assert result.summary["test_average_accuracy"] == pytest.approx(np.mean(on_test))
    assert result.summary["split"] == "validation"
    splits = [r["split"] for r in records(tmp_path, "evaluation")]
    assert splits == ["validation"] * 6 + ["test"] * 3


def test_forward_transfer_is_measured_against_the_untrained_network(tmp_path: Path) -> None:
    model = learner(NaiveHParams())
    untrained = [model.evaluate(task, "test").score for task in rotated().tasks]
    result = run(model, rotated(), run_dir=tmp_path, evaluate_future=True, progress=False)
    assert not np.isnan(result.matrix).any()
    expected = np.mean([result.matrix[j - 1, j] - untrained[j] for j in (1, 2)])
    assert result.fwt == pytest.approx(expected)
    first = records(tmp_path, "evaluation")[:3]
    assert [r["accuracy"] for r in first] == untrained
    assert {(r["after_task"], r["step"]) for r in first} == {(None, 0)}


def test_joint_once_has_only_the_last_row(tmp_path: Path) -> None:
    model = learner(JointHParams(policy="once"))
    result = run(model, rotated(), run_dir=tmp_path, progress=False)
    assert np.isnan(result.matrix[:2]).all()
    assert not np.isnan(result.matrix[2]).any()
    assert (tmp_path / "accuracy_matrix.csv").read_text().splitlines()[1:3] == [",,", ",,"]
    assert result.average_accuracy == pytest.approx(result.matrix[2].mean())
    assert np.isnan(result.forgetting)
    assert np.isnan(result.learning_accuracy)
    assert model.step == sum(len(task.train) for task in rotated().tasks) // model.training.batch_size


def test_joint_training_trains_on_all_tasks_so_far(tmp_path: Path) -> None:
    model = learner(JointHParams())
    result = run(model, rotated(), run_dir=tmp_path, progress=False)
    size = STEPS * 8 + 3
    assert model.step == size // 8 + 2 * size // 8 + 3 * size // 8
    np.testing.assert_array_equal(np.isnan(result.matrix), ~np.tri(3, dtype=bool))


def test_the_class_scenario_reports_the_masked_accuracy(tmp_path: Path) -> None:
    stream = divided("class")
    model = learner(NaiveHParams(), stream)
    result = run(model, stream, run_dir=tmp_path, progress=False)
    masked = [model.evaluate(task, "test").masked_score for task in stream.tasks]
    assert result.summary["masked_average_accuracy"] == pytest.approx(np.mean(masked))
    assert np.mean(masked) > result.average_accuracy + 0.1
    assert [r["masked_accuracy"] for r in records(tmp_path, "evaluation")[-5:]] == masked


# -- errors before training


def check_raises(match: str, model: Any, benchmark: Any, directory: Path, **options: Any) -> None:
    before = sorted(path.name for path in directory.iterdir())
    with pytest.raises(ValueError, match=match):
        run(model, benchmark, **{"run_dir": directory / "run", "progress": False, **options})
    assert model.step == 0
    assert sorted(path.name for path in directory.iterdir()) == before


def test_a_directory_that_is_not_empty_raises(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    model = learner(NaiveHParams())
    message = r"run_dir must be empty or new, got .*notes\.txt"
    check_raises(message, model, rotated(), tmp_path, run_dir=tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    check_raises("run_dir must be a directory", model, rotated(), tmp_path, run_dir=tmp_path / "notes.txt")


def test_a_batch_larger_than_the_smallest_task_raises(tmp_path: Path) -> None:
    stream = sequel_core.Benchmark("two", (rotated(2).tasks[0], small_second()), 10, "domain")
    model = learner(NaiveHParams(), stream)
    message = "batch_size must be <= the samples of a task, got 8 with 5 .* in task 1"
    check_raises(message, model, stream, tmp_path)


def small_second() -> sequel_core.Task:
    task = rotated(2).tasks[1]
    (part,) = task.train.parts
    return sequel_core.Task(1, "small", task.classes, part.head(5), task.test, task.validation)


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("evaluate_on must be test or validation, got 'train'", {"evaluate_on": "train"}),
        ("evaluate_on=validation needs validation samples, task 0 has none", {"evaluate_on": "validation"}),
        ("evaluate_every must be .*got 0", {"evaluate_every": 0}),
        ("evaluate_every must be .*got 'step'", {"evaluate_every": "step"}),
    ],
)
def test_settings_that_do_not_fit_raise(match: str, options: dict[str, Any], tmp_path: Path) -> None:
    check_raises(match, learner(NaiveHParams()), rotated(), tmp_path, **options)


def test_a_learner_for_another_benchmark_raises(tmp_path: Path) -> None:
    model = learner(NaiveHParams())
    check_raises("the learner was made for 10 outputs .* has 2 ", model, divided("domain"), tmp_path)


def test_too_few_epochs_raise(tmp_path: Path) -> None:
    model = learner(NaiveHParams(), training=settings(epochs_per_task=(1, 2)))
    check_raises("epochs_per_task must .* one entry per task, got 2 entries", model, rotated(), tmp_path)


# -- runs that end early


def test_a_diverged_run_keeps_its_records(tmp_path: Path) -> None:
    tx = optax.sgd(optax.piecewise_constant_schedule(0.1, {STEPS: 1e38}))
    model = learner(NaiveHParams(reset_optimizer=False), tx=tx)
    with pytest.raises(DivergenceError) as caught:
        run(model, rotated(), run_dir=tmp_path, progress=False)
    result = load_result(tmp_path)
    position = caught.value.position
    assert position["task"] in (1, 2)
    assert result.summary["status"] == "diverged"
    assert result.summary["diverged_at"] == position
    done = position["task"]
    kept = np.tri(3, dtype=bool)
    kept[done:] = False
    np.testing.assert_array_equal(np.isnan(result.matrix), ~kept)
    assert len(records(tmp_path, "evaluation")) == done * (done + 1) // 2
    assert result.matrix[0, 0] > 0.2


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "interrupted"), (OSError, "failed")])
def test_an_interrupted_run_keeps_its_records(
    error: type[BaseException], status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = learner(NaiveHParams())
    fit: Callable[..., None] = model.fit_task

    def stop(task: Any, monitor: Any) -> None:
        if task.index == 1:
            raise error
        fit(task, monitor)

    monkeypatch.setattr(model, "fit_task", stop)
    with pytest.raises(error):
        run(model, rotated(), run_dir=tmp_path, progress=False)
    result: Result = load_result(tmp_path)
    assert result.summary["status"] == status
    assert result.summary["steps"] == STEPS
    assert not np.isnan(result.matrix[0, 0])
    assert not (tmp_path / "weights.npz").exists()


def test_lapack_has_one_thread_unless_a_variable_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def threads() -> set[int]:
        return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}

    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    with threadpool_limits(2, "blas"):
        with process_settings(compose(["mode=jax"]).config):
            assert threads() == {1}
        assert threads() == {2}
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
        with process_settings(compose(["mode=jax"]).config):
            assert threads() == {2}


def test_process_settings_end_with_the_run(tmp_path: Path) -> None:
    def settings_of_process() -> list[Any]:
        filters = [logging.getLogger(name).filters[:] for name in ("absl", "asyncio")]
        return [sys.unraisablehook, threading.excepthook, jax.config.read("jax_enable_x64"), filters]

    before = settings_of_process()
    line = ["mode=jax", "training.dtype=float64", "benchmark=rotateddigits", "benchmark.subset=40"]
    execute(compose([*line, "backbone.widths=[4]"]).config, tmp_path, progress=False)
    assert load_weights(tmp_path)["head/kernel"].dtype == np.float64
    assert settings_of_process() == before
