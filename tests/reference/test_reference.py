"""Both plug-ins against the float64 NumPy references: weights, losses, memories and importances."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import sequel_flax
import sequel_lightning
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.icarl import ICaRLHParams
from sequel_core.algorithms.kcl import KCLHParams
from sequel_core.algorithms.mas import MASHParams
from sequel_core.algorithms.si import SIHParams
from sequel_core.hparams import AlgorithmHParams, OptimizerHParams, TrainingHParams
from sequel_core.runs.learner import FitMonitor, Learner, Progress
from sequel_core.stream import plan
from sequel_core.stream.task import Task
from sequel_flax.algorithms.ewc import diagonal_fisher as flax_fisher
from sequel_flax.bundle import Model
from sequel_flax.learner import as_batch as flax_batch
from sequel_lightning.algorithms.ewc import diagonal_fisher as torch_fisher
from sequel_lightning.backbones import canonical_name
from sequel_lightning.data import as_batch as torch_batch
from tests.reference import closed_forms
from tests.reference.cases import (
    CASES,
    RFF,
    SGD,
    TRAINING,
    WIDTHS,
    Case,
    benchmark,
    case_parameters,
    run_reference,
)
from tests.reference.network import Weights
from tests.reference.regularisers import EWC
from tests.reference.streams import Reference, Stage


def torch_learner(
    stream: str,
    hparams: AlgorithmHParams,
    optimizer: OptimizerHParams,
    training: TrainingHParams = TRAINING,
    widths: Any = WIDTHS,
) -> Learner:
    data = benchmark(stream)
    net = sequel_lightning.MLP(widths, data.num_classes, image_shape=data.spec.x.shape)
    factory = sequel_lightning.build_optimizer(optimizer)
    return sequel_lightning.make_learner(hparams, net, factory, data, training)


def flax_learner(
    stream: str,
    hparams: AlgorithmHParams,
    optimizer: OptimizerHParams,
    training: TrainingHParams = TRAINING,
    widths: Any = WIDTHS,
) -> Learner:
    data = benchmark(stream)
    net = sequel_flax.MLP(widths, data.num_classes)
    tx = sequel_flax.build_optimizer(optimizer)
    return sequel_flax.make_learner(hparams, net, tx, data, training)


def alternatives(reference: Reference, stage: Stage, task: Task) -> dict[str, float]:
    """Return the accuracy on the test samples of a task, by the name of the alternative prediction."""
    samples = task.test.take(np.arange(len(task.test)))
    mask = reference.inputs(samples).mask
    accuracies = {}
    for name, logits in reference.alternatives(stage.weights, samples).items():
        best = (logits if mask is None else np.where(mask, logits, -np.inf)).argmax(axis=1)
        accuracies[name] = int((best == samples.y).sum()) / len(samples.y)
    return accuracies


FRAMEWORKS = pytest.mark.parametrize("framework", [torch_learner, flax_learner], ids=["lightning", "flax"])
Make = Callable[..., Learner]


def stages(learner: Learner, stream: str) -> Iterator[Stage]:
    """Yield the same results as the reference; scores only for methods that do not predict with the head."""
    data = benchmark(stream)
    predicts = learner.hparams.name in ("bic", "icarl", "kcl")
    for task in learner.hparams.training_tasks(data, learner.training.seed):
        reports: list[Progress] = []
        learner.fit_task(task, FitMonitor(reports.append, lambda: None))
        past = data.tasks[: task.index + 1] if predicts else ()
        scores = [learner.evaluate(each, "test").loss for each in past]
        yield Stage(learner.weights(), [report.loss for report in reports], scores)


def assert_close(weights: Weights, expected: Weights, tolerance: float) -> None:
    assert weights.keys() == expected.keys()
    for name, array in expected.items():
        assert np.linalg.norm(weights[name] - array) <= tolerance * np.linalg.norm(array), name


def in_each_framework() -> list[Any]:
    """Return cases with a framework. By default JAX, which compiles for seconds, has one case per method."""
    parameters, seen = [], set()
    for case in case_parameters(CASES):
        name = case.values[0].hparams.name
        parameters.append(
            pytest.param(torch_learner, *case.values, id=f"{case.id}-lightning", marks=case.marks)
        )
        marks = [pytest.mark.slow] if name in seen else case.marks
        parameters.append(pytest.param(flax_learner, *case.values, id=f"{case.id}-flax", marks=marks))
        if not case.marks:
            seen.add(name)
    return parameters


@pytest.mark.parametrize(("framework", "case"), in_each_framework())
def test_weights_after_every_task_and_losses_of_every_step(framework: Make, case: Case) -> None:
    reference, expected = run_reference(case)
    learner: Any = framework(*case)
    results = list(stages(learner, case.stream))
    assert len(results) == len(expected) == (1 if vars(case.hparams).get("policy") == "once" else 3)
    exact = 1e-8 if case.hparams.name == "kcl" else 1e-9
    for ours, theirs in zip(results, expected, strict=True):
        assert_close(ours.weights, theirs.weights, exact)
        assert len(ours.losses) >= 27
        # a penalty compiled with the anchor of task 1 would differ from task 3 on; clu's means are float32
        tolerance = exact if framework is torch_learner else 5e-7
        np.testing.assert_allclose(ours.losses, theirs.losses, rtol=tolerance)
        if ours.scores:
            np.testing.assert_allclose(ours.scores, theirs.scores, rtol=exact)
    memory = reference.memory_samples()
    if memory is not None:
        for array, stored in zip(learner.memory_samples(), memory, strict=True):
            np.testing.assert_array_equal(array, stored)
    if case.hparams.name in ("bic", "icarl", "mcsgd"):
        for task in benchmark(case.stream).tasks:
            assert learner.evaluate(task, "test").alternatives == alternatives(reference, expected[-1], task)


@FRAMEWORKS
@pytest.mark.parametrize("stream", ["rotated", "masked"])
def test_icarl_predicts_with_its_head_until_there_are_means(framework: Make, stream: str) -> None:
    learner = framework(stream, ICaRLHParams(mem_size=60), SGD)
    first, second, _ = benchmark(stream).tasks
    evaluations = [learner.evaluate(first, "test")]
    for task in (first, second):
        evaluate = FitMonitor(lambda p: None, lambda: evaluations.append(learner.evaluate(first, "test")), 15)
        learner.fit_task(task, evaluate)
    assert len(evaluations) >= 3  # before the first task and during both tasks
    for evaluation in evaluations:
        assert evaluation.alternatives == {"head": evaluation.score}


@FRAMEWORKS
@pytest.mark.parametrize("stream", ["rotated", "masked"])
def test_logits_of_a_task_without_a_coreset_are_zero(framework: Make, stream: str) -> None:
    learner = framework(stream, KCLHParams(**RFF), SGD)
    first, *later = learner.hparams.training_tasks(benchmark(stream), TRAINING.seed)
    learner.fit_task(first, FitMonitor(lambda p: None, lambda: None))
    for task in later:
        expected = np.log(len(task.classes))  # equal probabilities
        np.testing.assert_allclose(learner.evaluate(task, "test").loss, expected, rtol=1e-12)


# -- importances in closed form


def importance(learner: Any) -> Weights:
    """Return the importance of a learner in the canonical layout."""
    if learner.mode == "jax":
        importances: Weights = flatten_dict(jax.device_get(learner.state.memory.importance), sep="/")
        return importances
    named = learner.module.importance.get()
    return {canonical_name(learner.module.net, k): v.numpy().T for k, v in named.items()}


def fit_first_task(learner: Learner) -> Learner:
    learner.fit_task(benchmark("rotated").tasks[0], FitMonitor(lambda p: None, lambda: None))
    return learner


@FRAMEWORKS
@pytest.mark.parametrize("count", [None, 100])
def test_fisher_of_logistic_regression(framework: Make, count: int | None) -> None:
    learner = fit_first_task(framework("rotated", EWCHParams(fisher_samples=count), SGD, widths=()))
    assert_close(importance(learner), closed_forms.logistic_fisher(learner.weights(), count), 1e-12)


@FRAMEWORKS
@pytest.mark.parametrize(
    ("gradients", "size", "count"), [("sample", 7, None), ("sample", 64, 100), ("batch", 64, None)]
)
def test_mas_importance_of_a_linear_model(
    framework: Make, gradients: Any, size: int, count: int | None
) -> None:
    hparams = MASHParams(gradients=gradients, mas_samples=count)
    training = replace(TRAINING, batch_size=size)
    learner = fit_first_task(framework("rotated", hparams, SGD, training, widths=()))
    summed = 1 if gradients == "sample" else size
    assert_close(importance(learner), closed_forms.linear_mas(learner.weights(), count, summed), 1e-12)


@FRAMEWORKS
def test_si_importance_with_plain_sgd(framework: Make) -> None:
    learner = framework("rotated", SIHParams(xi=0.02), SGD)
    expected = closed_forms.sgd_si(learner.weights(), SGD.lr, 0.02)
    assert_close(importance(fit_first_task(learner)), expected, 1e-11)


def test_the_fisher_does_not_depend_on_the_batch_size() -> None:
    task = benchmark("rotated").tasks[0]
    torch_: Any = torch_learner("rotated", EWCHParams(), SGD)
    flax_: Any = flax_learner("rotated", EWCHParams(), SGD)
    params, model = torch_.module.frozen_params(), Model(flax_.ts, flax_.state, flax_.objective)
    for count in (None, 50):
        reference = EWC(benchmark("rotated"), EWCHParams(fisher_samples=count), SGD, TRAINING, WIDTHS)
        expected = reference.fisher(flax_.weights(), task)
        for size in (210, 64, 7):
            batches = list(plan.consolidation_batches(TRAINING.seed, task, size))
            hparams = EWCHParams(fisher_samples=count)
            named = torch_fisher(params, torch_.module, map(torch_batch, batches), hparams, 0, 0)
            ours = {canonical_name(torch_.module.net, k): v.numpy().T for k, v in named.items()}
            assert_close(ours, expected, 1e-12)
            hparams = EWCHParams(fisher_samples=count)
            tree = flax_fisher(flax_.ts.params, model, map(flax_batch, batches), hparams, 0, 0)
            assert_close(flatten_dict(jax.device_get(tree), sep="/"), expected, 1e-12)
