"""Predictions depend on the task of a sample only if the scenario, or a setting of KCL, gives it."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax.training.train_state import TrainState

import sequel_core
import sequel_flax
import sequel_lightning
from sequel_benchmarks import RotatedDigits, SplitDigits
from sequel_core.algorithms import ALGORITHMS
from sequel_core.algorithms.kcl import KCLHParams
from sequel_core.hparams import AlgorithmHParams, OptimizerHParams, TrainingHParams
from sequel_core.report.runs import read_study
from sequel_core.runs.learner import Learner
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.benchmark import Benchmark, Scenario
from sequel_core.testing.parity import SILENT
from tests.core.scripted import scripted

SMALL: dict[str, dict[str, Any]] = {
    "lamaml": {"n_inner_updates": 1, "glances": 1, "mem_size": 20, "mem_batch_size": 4},
    "mcsgd": {"mem_size": 20, "lmc_line_samples": 2, "lmc_batch_size": 4},
    "kcl": {"core_size": 10, "d_rn_f": 8},
    "icarl": {"mem_size": 50},
    **{name: {"mem_size": 100, "mem_batch_size": 4} for name in ("agem", "er", "der", "derpp")},
}
HPARAMS: dict[str, AlgorithmHParams] = {name: cls(**SMALL.get(name, {})) for name, cls in ALGORITHMS.items()}
QUICK = [(name, "class") for name in ("naive", "lfl", "derpp", "icarl", "mcsgd", "lamaml")]
MODES = pytest.mark.parametrize("mode", ["pytorch", "jax"])


@cache
def stream(scenario: Scenario) -> Benchmark:
    if scenario == "domain":
        return RotatedDigits(num_tasks=5, subset=60)
    return SplitDigits(num_tasks=5, scenario=scenario, subset=60)


def made(mode: str, hparams: AlgorithmHParams, scenario: Scenario) -> Learner:
    benchmark, optimizer = stream(scenario), OptimizerHParams(lr=0.1)
    training = TrainingHParams(batch_size=20)
    if mode == "jax":
        net = sequel_flax.MLP((8,), benchmark.num_classes)
        tx = sequel_flax.build_optimizer(optimizer)
        return sequel_flax.make_learner(hparams, net, tx, benchmark, training, steps_per_call=1)
    ours = sequel_lightning.MLP((8,), benchmark.num_classes, image_shape=benchmark.image_shape)
    factory = sequel_lightning.build_optimizer(optimizer)
    return sequel_lightning.make_learner(hparams, ours, factory, benchmark, training)


def predictions(learner: Any, x: Any, t: Any) -> dict[str, FloatArray]:
    """Return all logits that the method can predict with, by name."""
    if learner.mode == "jax":
        algorithm, given = learner.algorithm, (learner.ts, learner.state, jnp.asarray(x), jnp.asarray(t))
        predictions = {"own": algorithm.predict(*given), **algorithm.alternatives(*given)}
    else:
        learner.module.eval()
        with torch.no_grad():
            images, tasks = torch.from_numpy(x).movedim(-1, 1), torch.from_numpy(t)
            predictions = {
                "own": learner.module.predict(images, tasks),
                **learner.module.alternatives(images, tasks),
            }
    return {name: np.asarray(value) for name, value in predictions.items()}


def by_task(mode: str, hparams: AlgorithmHParams, scenario: Scenario) -> list[dict[str, FloatArray]]:
    """Train on two of five tasks; return what is predicted of the same images as samples of each task."""
    learner = made(mode, hparams, scenario)
    for task in list(hparams.training_tasks(stream(scenario)))[:2]:
        learner.fit_task(task, SILENT)
    x = np.concatenate([task.test.take(np.arange(4)).x for task in stream(scenario).tasks])
    tasks = [np.full(len(x), j, np.int32) for j in range(5)]
    return [predictions(learner, x, t) for t in (*tasks, np.arange(len(x), dtype=np.int32) % 5)]


@MODES
@pytest.mark.parametrize(
    ("name", "scenario"),
    [
        pytest.param(name, scenario, marks=[] if (name, scenario) in QUICK else [pytest.mark.slow])
        for name in HPARAMS
        for scenario in ("domain", "class")
        if name != "kcl"
    ],
)
def test_a_prediction_does_not_depend_on_the_task(mode: str, name: str, scenario: Scenario) -> None:
    first, *others = by_task(mode, HPARAMS[name], scenario)
    assert all(np.ptp(logits, axis=0).any() for logits in first.values())
    for other in others:
        assert other.keys() == first.keys()
        for key, logits in first.items():
            np.testing.assert_array_equal(other[key], logits)


GIVEN = KCLHParams(**SMALL["kcl"], task_given=True)


@MODES
def test_kcl_with_the_task_given_answers_by_it(mode: str) -> None:
    """The control of the test above: its predictions do depend on the task."""
    first, second, *_ = by_task(mode, GIVEN, "domain")
    assert np.abs(first["own"] - second["own"]).max() > 1e-3


def bare(mode: str, hparams: Any, scenario: Scenario) -> Any:
    """Make a method without a learner, as in a user-defined loop or under a user's Trainer."""
    spec = stream(scenario).spec
    if mode == "jax":
        net: Any = sequel_flax.MLP((8,), spec.num_classes)
        algorithm = sequel_flax.kcl(hparams)
        variables = sequel_flax.backbones.initial_variables(net, spec, 0)
        ts = TrainState.create(apply_fn=net.apply, tx=optax.sgd(0.1), **variables)
        return algorithm.init(algorithm.prepare(ts, spec), spec)
    net = sequel_lightning.MLP((8,), spec.num_classes, image_shape=spec.image_shape)
    return sequel_lightning.KCL(net, partial(torch.optim.SGD, lr=0.1), hparams, spec)


@MODES
@pytest.mark.parametrize("make", [made, bare], ids=["learner", "bare"])
def test_kcl_raises_if_no_task_is_given(mode: str, make: Any) -> None:
    for hparams in (HPARAMS["kcl"], GIVEN):
        with pytest.raises(ValueError, match=r"kcl cannot run in the class scenario: .* use scenario=task"):
            make(mode, hparams, "class")
    with pytest.raises(ValueError, match=r"task_given must be true for kcl in the domain scenario, got fals"):
        make(mode, HPARAMS["kcl"], "domain")
    assert make(mode, GIVEN, "domain")
    assert make(mode, HPARAMS["kcl"], "task")


def test_the_results_say_that_the_task_was_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the summary, the configuration, the printed tables and the report; not in the task scenario."""
    runs = {
        "kcl": scripted("jax", GIVEN, stream("domain")),
        "naive": scripted("jax", HPARAMS["naive"], stream("domain")),
    }
    comparison = sequel_core.compare(runs, stream("domain"), run_dir=tmp_path / "all")
    given, other = (item.result for item in comparison.runs)
    assert given is not None
    assert other is not None
    assert given.task_given
    assert given.summary["task_given"] is given.config["algo"]["task_given"] is True
    assert not other.task_given
    assert other.summary["task_given"] is False
    assert [row.task_given for row in comparison.rows] == [True, False]
    assert "kcl, task given" in capsys.readouterr().out
    labels = [group.label for group in read_study([tmp_path / "all"]).groups]
    assert sorted(labels) == ["kcl, task given", "naive"]
    page = comparison.report
    assert page is not None
    assert "kcl, task given" in page.read_text()

    masked = sequel_core.run(
        scripted("jax", GIVEN, stream("task")), stream("task"), run_dir=tmp_path / "task"
    )
    assert masked.summary["task_given"] is True
    assert not masked.task_given
    assert "task given" not in capsys.readouterr().out
