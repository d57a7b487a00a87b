"""Both plug-ins against float64 NumPy written from the papers: weights, losses, memories, importances."""

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
from sequel_flax.learner import as_batch as flax_batch
from sequel_lightning.algorithms.ewc import diagonal_fisher as torch_fisher
from sequel_lightning.backbones import canonical_name
from sequel_lightning.data import as_batch as torch_batch
from tests.reference import closed_forms
from tests.reference.cases import CASES, CORE, SGD, TRAINING, WIDTHS, Case, benchmark, parameters, ran
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
    net = sequel_lightning.MLP(widths, data.num_classes, image_shape=data.image_shape)
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


def alternatives(by_hand: Reference, stage: Stage, task: Task) -> dict[str, int]:
    """Return how many test samples of a task are told correctly by what else can be predicted with."""
    samples = task.test.take(np.arange(len(task.test)))
    mask = by_hand.inputs(samples).mask
    correct = {}
    for name, logits in by_hand.alternatives(stage.weights, samples).items():
        best = (logits if mask is None else np.where(mask, logits, -np.inf)).argmax(axis=1)
        correct[name] = int((best == samples.y).sum())
    return correct


FRAMEWORKS = pytest.mark.parametrize("framework", [torch_learner, flax_learner], ids=["lightning", "flax"])
Make = Callable[..., Learner]


def stages(learner: Learner, stream: str) -> Iterator[Stage]:
    """Yield what the reference yields, of a learner; scores where a method predicts in a way of its own."""
    data = benchmark(stream)
    predicts = learner.hparams.name in ("icarl", "kcl")
    for task in learner.hparams.training_tasks(data, learner.training.seed):
        reports: list[Progress] = []
        learner.fit_task(task, FitMonitor(reports.append, lambda: None))
        past = data.tasks[: task.index + 1] if predicts else ()
        scores = [learner.evaluate(each, "test").loss for each in past]
        yield Stage(learner.weights(), [report.loss for report in reports], scores)


def assert_close(found: Weights, expected: Weights, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.linalg.norm(found[name] - array) <= tolerance * np.linalg.norm(array), name


@FRAMEWORKS
@pytest.mark.parametrize("case", parameters(CASES))
def test_weights_after_every_task_and_the_loss_of_every_step(framework: Make, case: Case) -> None:
    by_hand, expected = ran(case)
    learner: Any = framework(*case)
    found = list(stages(learner, case.stream))
    assert len(found) == len(expected) == (1 if vars(case.hparams).get("policy") == "once" else 3)
    exact = 1e-8 if case.hparams.name == "kcl" else 1e-9
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours.weights, theirs.weights, exact)
        assert len(ours.losses) >= 27
        # a penalty compiled with the anchor of task 1 would be wrong from task 3 on; clu's means are float32
        tolerance = exact if framework is torch_learner else 5e-7
        np.testing.assert_allclose(ours.losses, theirs.losses, rtol=tolerance)
        if ours.scores:
            np.testing.assert_allclose(ours.scores, theirs.scores, rtol=exact)
    memory = by_hand.memory_samples()
    if memory is not None:
        for array, held in zip(learner.memory_samples(), memory, strict=True):
            np.testing.assert_array_equal(array, held)
    if case.hparams.name in ("icarl", "mcsgd"):
        for task in benchmark(case.stream).tasks:
            assert learner.evaluate(task, "test").alternatives == alternatives(by_hand, expected[-1], task)


@FRAMEWORKS
@pytest.mark.parametrize("stream", ["rotated", "masked"])
def test_icarl_predicts_with_its_head_until_there_are_means(framework: Make, stream: str) -> None:
    learner = framework(stream, ICaRLHParams(mem_size=60), SGD)
    first, second, _ = benchmark(stream).tasks
    found = [learner.evaluate(first, "test")]
    for task in (first, second):
        within = FitMonitor(lambda p: None, lambda: found.append(learner.evaluate(first, "test")), 15)
        learner.fit_task(task, within)
    assert len(found) >= 3  # before the first task and in the middle of both
    for evaluation in found:
        assert evaluation.alternatives == {"head": evaluation.correct}


@FRAMEWORKS
@pytest.mark.parametrize("stream", ["rotated", "masked"])
def test_logits_of_a_task_without_a_coreset_are_zero(framework: Make, stream: str) -> None:
    learner = framework(stream, KCLHParams(**CORE), SGD)
    first, *later = learner.hparams.training_tasks(benchmark(stream), TRAINING.seed)
    learner.fit_task(first, FitMonitor(lambda p: None, lambda: None))
    for task in later:
        equal = np.log(len(task.classes))
        np.testing.assert_allclose(learner.evaluate(task, "test").loss, equal, rtol=1e-12)


# -- importances in closed form


def importance(learner: Any) -> Weights:
    """Return the importance that a learner keeps, in the canonical layout."""
    if learner.mode == "jax":
        found: Weights = flatten_dict(jax.device_get(learner.state.memory.importance), sep="/")
        return found
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
def test_mas_of_a_linear_model(framework: Make, gradients: Any, size: int, count: int | None) -> None:
    hparams = MASHParams(gradients=gradients, mas_samples=count)
    training = replace(TRAINING, batch_size=size)
    learner = fit_first_task(framework("rotated", hparams, SGD, training, widths=()))
    summed = 1 if gradients == "sample" else size
    assert_close(importance(learner), closed_forms.linear_mas(learner.weights(), count, summed), 1e-12)


@FRAMEWORKS
def test_si_of_plain_sgd(framework: Make) -> None:
    learner = framework("rotated", SIHParams(xi=0.02), SGD)
    expected = closed_forms.sgd_si(learner.weights(), SGD.lr, 0.02)
    assert_close(importance(fit_first_task(learner)), expected, 1e-11)


def test_batches_of_any_size_give_the_same_fisher() -> None:
    task = benchmark("rotated").tasks[0]
    torch_: Any = torch_learner("rotated", EWCHParams(), SGD)
    flax_: Any = flax_learner("rotated", EWCHParams(), SGD)
    params, model = torch_.module.frozen_params(), (flax_.ts, flax_.state)
    for count in (None, 50):
        by_hand = EWC(benchmark("rotated"), EWCHParams(fisher_samples=count), SGD, TRAINING, WIDTHS)
        expected = by_hand.fisher(flax_.weights(), task)
        for size in (210, 64, 7):
            batches = list(plan.consolidation_batches(TRAINING.seed, task, size))
            named = torch_fisher(params, torch_.module, map(torch_batch, batches), count)
            ours = {canonical_name(torch_.module.net, k): v.numpy().T for k, v in named.items()}
            assert_close(ours, expected, 1e-12)
            tree = flax_fisher(flax_.ts.params, model, map(flax_batch, batches), count)
            assert_close(flatten_dict(jax.device_get(tree), sep="/"), expected, 1e-12)
