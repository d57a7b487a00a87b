"""iCaRL in both frameworks: the same exemplars and means, and what is predicted before, within and after."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

import sequel_flax
import sequel_lightning
from sequel_core.algorithms.icarl import ICaRLHParams
from sequel_core.runs.learner import Evaluation, FitMonitor, Learner
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.benchmark import Scenario
from sequel_core.stream.task import Samples, Task
from sequel_core.testing.parity import SGD, SILENT
from sequel_core.testing.parity import stream as benchmark
from tests.parity.cases import flax_learner, torch_learner

FEW = ICaRLHParams(mem_size=33)
MIRRORED = ICaRLHParams(mem_size=33, quota="ceil", flip=True, outputs="all")
PLENTY = ICaRLHParams(mem_size=5000)  # more than the digits have
MAKERS = {"flax": flax_learner, "torch": torch_learner}
CASES: list[tuple[ICaRLHParams, Scenario]] = [
    (FEW, "class"),
    (FEW, "domain"),
    (MIRRORED, "task"),
    (MIRRORED, "domain"),
    (PLENTY, "class"),
]
QUICK = [(FEW, "class"), (MIRRORED, "domain")]
each_case = pytest.mark.parametrize(
    ("hparams", "scenario"),
    [
        pytest.param(
            *case,
            id=f"{case[0].mem_size} {case[0].quota} {case[1]}",
            marks=[] if case in QUICK else [pytest.mark.slow],
        )
        for case in CASES
    ],
)
each_framework = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def kept(learner: Learner) -> dict[str, Any]:
    """Return the state's numbers as NumPy arrays."""
    if isinstance(learner, sequel_flax.FlaxLearner):
        state = learner.state.memory
        classes: Any = sequel_flax.seen_classes(learner.state.stream)
    else:
        assert isinstance(learner, sequel_lightning.LightningLearner)
        state, classes = learner.module.state, learner.module.seen_classes()
    arrays = {name: getattr(state, name) for name in ("means", "has_mean", "learned")}
    return {name: np.asarray(a).copy() for name, a in {**arrays, "classes": classes}.items()}


@cache
def history(make: Callable[..., Learner], hparams: ICaRLHParams, scenario: Scenario) -> list[dict[str, Any]]:
    """Return, after each of three tasks, what is kept, the weights, the steps and the evaluations."""
    learner = make(hparams, SGD, scenario)
    ends = []
    for task in benchmark(scenario).tasks[:3]:
        learner.fit_task(task, SILENT)
        ends.append(
            {
                **kept(learner),
                "exemplars": learner.memory_samples(),  # type: ignore[attr-defined]
                "weights": learner.weights(),
                "step": learner.step,
                "bytes": learner.memory_bytes(),
                "evaluations": [learner.evaluate(t, "test") for t in benchmark(scenario).tasks[:3]],
            }
        )
    return ends


def sets(samples: Samples) -> dict[tuple[int, int], FloatArray]:
    """Return the images of each set, in the order of slots."""
    keys = sorted({(int(t), int(y)) for _, y, t in zip(*samples, strict=True)})
    return {(t, y): samples.x[(samples.t == t) & (samples.y == y)] for t, y in keys}


def normalised(x: Any, scenario: Scenario) -> FloatArray:
    norm = benchmark(scenario).normalisation
    flat: FloatArray = ((x / 255 - np.array(norm.mean)) / np.array(norm.std)).reshape(len(x), -1)
    return flat


def hidden(weights: dict[str, FloatArray], x: Any, scenario: Scenario) -> FloatArray:
    """Return the last hidden layer of the multi-layer perceptron."""
    h = normalised(x, scenario)
    for layer in ("dense_0", "dense_1"):
        h = np.maximum(h @ weights[f"{layer}/kernel"] + weights[f"{layer}/bias"], 0)
    return h


def directions(weights: dict[str, FloatArray], x: Any, scenario: Scenario) -> FloatArray:
    h = hidden(weights, x, scenario)
    return np.asarray([row / np.linalg.norm(row) if row.any() else row for row in h])


def nearest(after: dict[str, Any], hparams: ICaRLHParams, scenario: Scenario, x: Any) -> FloatArray:
    """Return the scores of classes, from nothing but weights and exemplars; -inf without exemplars."""
    exemplars, weights = after["exemplars"], after["weights"]
    scores = np.full((len(x), benchmark(scenario).num_classes), -np.inf)
    features = directions(weights, x, scenario)
    for label in np.unique(exemplars.y):
        images = exemplars.x[exemplars.y == label]
        mean = directions(weights, images, scenario).mean(axis=0)
        if hparams.flip:
            mean = (mean + directions(weights, images[:, :, ::-1], scenario).mean(axis=0)) / 2
        scores[:, label] = -np.linalg.norm(features - mean / np.linalg.norm(mean), axis=1)
    return scores


def accuracies(scores: FloatArray, task: Task, scenario: Scenario) -> tuple[float, float]:
    """Return the accuracies, as the scenario has it and among the task's own classes."""
    y = task.test.targets
    masked = np.where(benchmark(scenario).mask[task.index], scores, -np.inf)
    plain = masked if scenario == "task" else scores
    correct = int((plain.argmax(1) == y).sum()), int((masked.argmax(1) == y).sum())
    return correct[0] / len(y), correct[1] / len(y)


@each_case
def test_both_frameworks_keep_the_same(hparams: ICaRLHParams, scenario: Scenario) -> None:
    for task, (ours, theirs) in enumerate(
        zip(history(flax_learner, hparams, scenario), history(torch_learner, hparams, scenario), strict=True)
    ):
        for a, b in zip(ours["exemplars"], theirs["exemplars"], strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(ours["means"], theirs["means"], rtol=1e-9, atol=1e-12)
        for name in ("has_mean", "classes", "step", "bytes"):
            np.testing.assert_array_equal(ours[name], theirs[name])
        assert ours["learned"] == theirs["learned"] == task
        for j, (mine, other) in enumerate(zip(ours["evaluations"], theirs["evaluations"], strict=True)):
            assert mine._replace(loss=0.0) == other._replace(loss=0.0)
            if j <= task:  # the loss of classes that have no mean yet is a matter of overflow
                np.testing.assert_allclose(mine.loss, other.loss, rtol=1e-9)


@each_framework
@each_case
def test_sets_are_as_large_as_their_quota_and_old_ones_are_cut(
    make: Callable[..., Learner], hparams: ICaRLHParams, scenario: Scenario
) -> None:
    stream = benchmark(scenario)
    before: dict[tuple[int, int], FloatArray] = {}
    for task, after in enumerate(history(make, hparams, scenario)):
        actual = sets(after["exemplars"])
        wanted = [(int(t), int(c)) for t, c in np.argwhere(stream.mask[: task + 1])]
        share = hparams.mem_size / len(wanted)
        quota = int(np.ceil(share) if hparams.quota == "ceil" else np.floor(share))
        assert list(actual) == wanted
        for (t, label), images in actual.items():
            assert len(images) == min(quota, int((stream.tasks[t].train.targets == label).sum()))
        for key, images in before.items():
            np.testing.assert_array_equal(actual[key], images[:quota])
        before = actual
    if hparams is PLENTY:
        assert all((len(v) == (stream.tasks[t].train.targets == c).sum()) for (t, c), v in before.items())


@each_framework
@each_case
def test_a_task_trains_on_its_samples_and_all_exemplars(
    make: Callable[..., Learner], hparams: ICaRLHParams, scenario: Scenario
) -> None:
    steps, held = 0, 0
    for task, after in zip(benchmark(scenario).tasks[:3], history(make, hparams, scenario), strict=True):
        steps += (len(task.train) + held) // 7
        held = len(after["exemplars"].y)
        assert after["step"] == steps


@each_framework
@each_case
def test_the_nearest_mean_and_the_head_predict_as_computed_by_hand(
    make: Callable[..., Learner], hparams: ICaRLHParams, scenario: Scenario
) -> None:
    for after in history(make, hparams, scenario):
        for task, evaluation in zip(benchmark(scenario).tasks[:3], after["evaluations"], strict=True):
            x = task.test.take(np.arange(len(task.test))).x
            scores = nearest(after, hparams, scenario, x)
            if scenario != "task" or after["learned"] >= task.index:
                assert (evaluation.score, evaluation.masked_score) == accuracies(scores, task, scenario)
            w = after["weights"]
            head = hidden(w, x, scenario) @ w["head/kernel"] + w["head/bias"]
            assert evaluation.alternatives == {"head": accuracies(head, task, scenario)[0]}
        assert any(e.score != e.alternatives["head"] for e in after["evaluations"])


@each_framework
def test_the_head_predicts_before_and_within_a_task(make: Callable[..., Learner]) -> None:
    learner = make(FEW, SGD, "class")
    tasks = benchmark("class").tasks
    within: list[Evaluation] = []

    def record() -> None:
        within.extend(learner.evaluate(task, "test") for task in tasks[:2])

    record()
    after = []
    for task in tasks[:2]:
        learner.fit_task(task, FitMonitor(lambda progress: None, record, evaluate_every=20))
        after.append(learner.evaluate(task, "test"))
    assert len(within) >= 2 * 4
    assert all(e.score == e.alternatives["head"] and np.isfinite(e.loss) for e in within)
    assert all(e.score != e.alternatives["head"] for e in after)


@each_framework
@pytest.mark.parametrize("scenario", ["domain", "class"])
def test_less_room_than_classes_is_refused(make: Callable[..., Learner], scenario: Scenario) -> None:
    sets = 30 if scenario == "domain" else 10
    each = "class of each task" if scenario == "domain" else "class"
    with pytest.raises(
        ValueError, match=rf"^mem_size must be >= {sets}, one exemplar of each {each}, got 9;"
    ):
        make(ICaRLHParams(mem_size=9), SGD, scenario)


def test_old_classes_are_distilled_only_where_they_have_passed() -> None:
    """The old network's outputs are targets in the class scenario; where classes come back they are not."""
    for scenario, distils in (("class", True), ("domain", False)):
        ends = []
        for spoil in (False, True):
            learner = torch_learner(FEW, SGD, scenario)  # type: ignore[arg-type]
            assert isinstance(learner, sequel_lightning.LightningLearner)
            learner.fit_task(benchmark(scenario).tasks[0], SILENT)
            if spoil:
                for p in learner.module.old.parameters():  # type: ignore[union-attr]
                    p.data.zero_()
            learner.fit_task(benchmark(scenario).tasks[1], SILENT)
            ends.append(learner.weights())
        same = all(np.array_equal(ends[0][k], ends[1][k]) for k in ends[0])
        assert same is not distils


@each_framework
def test_the_network_that_learned_beats_forgetting(make: Callable[..., Learner]) -> None:
    """Half of the digits' classes are recognised after five tasks, where naive finetuning knows two."""
    learner = make(ICaRLHParams(mem_size=200), SGD, "class", epochs_per_task=3)
    for task in benchmark("class").tasks:
        learner.fit_task(task, SILENT)
    evaluations = [learner.evaluate(task, "test") for task in benchmark("class").tasks]
    assert np.mean([e.score for e in evaluations]) > 0.6
