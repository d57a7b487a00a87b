"""The references alone: gradients against slopes, closed forms, torch's optimizers, and what settings do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sequel_core.hparams import (
    AGEMHParams,
    AlgorithmHParams,
    DERHParams,
    DERppHParams,
    ERHParams,
    LFLHParams,
    MASHParams,
    NaiveHParams,
    OptimizerHParams,
    SIHParams,
    StableSGDHParams,
)
from tests.reference import closed_forms, network
from tests.reference.algorithms import reference
from tests.reference.cases import (
    ADAM,
    CASES,
    CLIPPED,
    MOMENTUM,
    SEPARATE,
    SGD,
    SIZES,
    TRAINING,
    WIDTHS,
    Case,
    benchmark,
    final,
    naive,
    ran,
    without_each_setting,
)
from tests.reference.network import Weights
from tests.reference.optimizers import Optimizer, clipped
from tests.reference.replay import DER, Replay, project
from tests.reference.streams import Reference

NEW = [case for case in CASES if case.hparams.name not in ("naive", "joint", "ewc")]


def distance(a: Weights, b: Weights) -> dict[str, float]:
    """Return how far apart two sets of weights are, array by array, relative to the second."""
    return {k: float(np.linalg.norm(a[k] - p) / np.linalg.norm(p)) for k, p in b.items()}


def assert_slope(loss: Any, gradient: Weights, weights: Weights, rng: np.random.Generator) -> None:
    """Assert that the gradient is that of the loss, in a random direction of each array."""
    for name, found in gradient.items():
        direction = rng.normal(size=found.shape)
        ahead, behind = ({**weights, name: weights[name] + s * 1e-6 * direction} for s in (1, -1))
        slope = (loss(ahead) - loss(behind)) / 2e-6
        np.testing.assert_allclose((found * direction).sum(), slope, rtol=1e-6, atol=1e-8)


def test_the_gradient_of_the_cross_entropy_is_its_slope(rng: np.random.Generator) -> None:
    weights = network.initial(0, [6, 5, 4, 3])
    x, y = rng.normal(size=(8, 6)), rng.integers(0, 2, 8)
    for m in (None, np.tile([True, True, False], (8, 1))):
        found = network.gradient(weights, x, y, m)
        assert_slope(lambda at, m=m: network.loss(at, x, y, m), found, weights, rng)


def test_the_gradient_of_any_function_of_logits_and_features_is_its_slope(rng: np.random.Generator) -> None:
    weights = network.initial(0, [6, 5, 4, 3])
    x, of_logits, of_features = (rng.normal(size=(8, n)) for n in (6, 3, 4))

    def loss(at: Weights) -> float:
        a, inputs = network.logits(at, x)
        return float((of_logits * a).sum() + (of_features * inputs[-1] ** 2).sum())

    _, inputs = network.logits(weights, x)
    found = network.backward(weights, inputs, of_logits, 2 * of_features * inputs[-1])
    assert_slope(loss, found, weights, rng)


@pytest.mark.parametrize("case", [SEPARATE, *(c for c in NEW if c.hparams.name != "agem")], ids=str)
def test_the_gradient_of_an_objective_is_the_slope_of_its_loss(case: Case, rng: np.random.Generator) -> None:
    by_hand, stages = ran(case)
    theta = {k: p + 0.05 * rng.normal(size=p.shape) for k, p in stages[-1].weights.items()}
    samples = benchmark(case.stream).tasks[2].train.take(np.arange(7))
    loss, found = by_hand.objective(theta, samples)
    if case.hparams.name != "stable_sgd":
        assert abs(loss - Reference.objective(by_hand, theta, samples)[0]) > 1e-3  # there is a term beside CE
    assert_slope(lambda at: by_hand.objective(at, samples)[0], found, theta, rng)


@pytest.mark.parametrize("hparams", [OptimizerHParams(lr=0.1), MOMENTUM, ADAM])
@pytest.mark.parametrize("grad_clip", [None, 0.5])
def test_optimizers_are_those_of_torch(
    hparams: OptimizerHParams, grad_clip: float | None, rng: np.random.Generator
) -> None:
    theta = network.initial(0, [6, 5, 3])
    params = {k: torch.nn.Parameter(torch.from_numpy(p.copy())) for k, p in theta.items()}
    decay = hparams.weight_decay
    theirs: torch.optim.Optimizer = torch.optim.Adam(params.values(), hparams.lr, weight_decay=decay)
    if hparams.type == "sgd":
        theirs = torch.optim.SGD(params.values(), hparams.lr, hparams.momentum, weight_decay=decay)
    ours = Optimizer(hparams)
    for scale in (1.0, 0.01, 3.0, 1e-9):
        g = {k: scale * rng.normal(size=p.shape) for k, p in theta.items()}
        theta = ours.step(theta, clipped(g, grad_clip), hparams.lr)
        for k, p in params.items():
            p.grad = torch.from_numpy(g[k])
        if grad_clip:
            torch.nn.utils.clip_grad_norm_(params.values(), grad_clip)
        theirs.step()
        for k, p in params.items():
            np.testing.assert_allclose(theta[k], p.detach().numpy(), rtol=1e-12)


@pytest.mark.parametrize("case", [SEPARATE, *NEW], ids=str)
def test_every_case_ends_away_from_naive(case: Case) -> None:
    assert min(distance(final(case), final(naive(case))).values()) > 1e-3


@pytest.mark.parametrize("case", NEW, ids=str)
def test_every_setting_of_a_case_moves_its_weights(case: Case) -> None:
    for name, variant in without_each_setting(case).items():
        assert max(distance(final(case), final(variant)).values()) > 1e-3, name


@pytest.mark.parametrize(
    "hparams",
    [
        SIHParams(si_lambda=0),
        MASHParams(mas_lambda=0),
        LFLHParams(lfl_lambda=0, freeze_head=False),
        StableSGDHParams(lr_decay=1, min_lr=0),
        AGEMHParams(mem_size=0),
        ERHParams(mem_size=0),
        DERHParams(**SIZES, alpha=0),
        DERHParams(mem_size=0),
        DERppHParams(**SIZES, alpha=0, beta=0),
    ],
    ids=str,
)
def test_without_strength_every_method_is_naive(hparams: AlgorithmHParams) -> None:
    case = Case("masked", hparams, MOMENTUM, CLIPPED)
    for found, expected in zip(ran(case)[1], ran(naive(case))[1], strict=True):
        assert found.losses == expected.losses
        assert max(distance(found.weights, expected.weights).values()) == 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_learning_rates_are_those_of_the_settings(case: Case) -> None:
    rate = case.optimizer.lr
    for task in range(3):
        factor = case.hparams.learning_rate_factor(task, rate)
        np.testing.assert_allclose(ran(case)[0].learning_rate(task), rate * factor, rtol=1e-14)


def first_task(hparams: AlgorithmHParams, optimizer: OptimizerHParams = SGD, **options: Any) -> Any:
    """Return a reference after the first of the rotated tasks, and what that ended with."""
    options = {"training": TRAINING, "widths": WIDTHS, **options}
    by_hand = reference(benchmark("rotated"), hparams, optimizer, **options)
    return by_hand, next(by_hand.stages())


def test_si_of_plain_sgd() -> None:
    by_hand, _ = first_task(SIHParams(xi=0.02))
    theta = network.initial(TRAINING.seed, [64, *WIDTHS, 10])
    expected = closed_forms.sgd_si(theta, SGD.lr, 0.02)
    assert max(distance(by_hand.importance, expected).values()) < 1e-12


@pytest.mark.parametrize(("gradients", "size", "count"), [("sample", 7, None), ("batch", 64, 150)])
def test_mas_of_a_linear_model(gradients: Any, size: int, count: int | None) -> None:
    hparams = MASHParams(gradients=gradients, mas_samples=count)
    by_hand, stage = first_task(hparams, training=replace(TRAINING, batch_size=size), widths=())
    expected = closed_forms.linear_mas(stage.weights, count, 1 if gradients == "sample" else size)
    assert max(distance(by_hand.importance, expected).values()) < 1e-12


def test_a_frozen_head_stays_as_the_first_task_left_it() -> None:
    case = next(c for c in NEW if c.hparams.name == "lfl" and c.optimizer is MOMENTUM)
    first, _, last = (stage.weights for stage in ran(case)[1])
    moved = distance(last, first)
    assert moved.pop("head/kernel") == moved.pop("head/bias") == 0
    assert min(moved.values()) > 1e-3


def test_a_projected_gradient_is_never_against_the_past(rng: np.random.Generator) -> None:
    g, past = ({k: rng.normal(size=p.shape) for k, p in network.initial(0, [6, 5, 3]).items()} for _ in "gp")
    along = network.dot(g, past)
    for sign in (1, -1):
        ours = {k: sign * np.sign(along) * p for k, p in past.items()}  # the past agrees, then disagrees
        found = project(g, ours)
        if sign == 1:
            assert found is g
        else:
            assert abs(network.dot(found, ours)) < 1e-12 * network.dot(ours, ours)
            apart = {k: p - found[k] for k, p in g.items()}  # only along the past
            assert abs(network.dot(apart, ours) + abs(along)) < 1e-12 * abs(along)
            np.testing.assert_allclose(network.dot(apart, apart) * network.dot(ours, ours), along**2)


def test_a_gem_projects_some_steps_and_not_others(monkeypatch: pytest.MonkeyPatch) -> None:
    against: list[bool] = []

    def record(g: Weights, past: Weights) -> Weights:
        against.append(network.dot(g, past) < 0)
        return project(g, past)

    monkeypatch.setattr("tests.reference.replay.project", record)
    for case in (c for c in NEW if c.hparams.name == "agem"):
        against.clear()
        first, *_ = list(reference(benchmark(case.stream), *case[1:], WIDTHS).stages())
        assert first.losses == ran(naive(case))[1][0].losses
        assert len(against) == 60  # nothing to read in the first task
        assert 10 <= sum(against) <= 50


def test_a_large_reservoir_holds_the_stream_in_order() -> None:
    by_hand, _ = first_task(ERHParams(mem_size=210))
    assert isinstance(by_hand, Replay)
    seen = list(by_hand.batches(benchmark("rotated").tasks[0]))
    for found, *batches in zip(by_hand.memory_samples(), *seen, strict=True):
        np.testing.assert_array_equal(found, np.concatenate(batches))


def test_a_ring_holds_the_latest_of_each_class() -> None:
    by_hand, _ = first_task(ERHParams(memory="ring", mem_size=60))
    seen = list(by_hand.batches(benchmark("rotated").tasks[0]))
    x, y, t = (np.concatenate(arrays) for arrays in zip(*seen, strict=True))
    found = by_hand.memory_samples()
    np.testing.assert_array_equal(found.y, np.repeat(np.arange(10), 2))
    for c in range(10):
        latest = x[y == c][-2:]
        held = found.x[found.y == c]
        np.testing.assert_array_equal(np.sort(held, axis=0), np.sort(latest, axis=0))
    assert not found.t.any()
    assert not t.any()


def test_replayed_samples_keep_the_masks_of_their_own_tasks() -> None:
    case = next(c for c in NEW if c.hparams.name == "er" and c.stream == "masked")
    by_hand, stages = ran(case)
    assert isinstance(by_hand, Replay)
    theta, samples = stages[-1].weights, benchmark("masked").tasks[2].train.take(np.arange(7))
    replayed = by_hand.contents(by_hand.drawn(0))
    assert set(replayed.t.tolist()) == {0, 1}
    scores = []
    for part in (samples, replayed):
        outputs, _ = network.logits(theta, by_hand.inputs(part).x)
        for a, y, t in zip(outputs, part.y, part.t, strict=True):
            two = a[2 * t : 2 * t + 2]  # the task's own classes
            scores.append(np.log(np.exp(two).sum()) - two[y - 2 * t])
    np.testing.assert_allclose(by_hand.objective(theta, samples)[0], np.mean(scores), rtol=1e-12)


def test_stored_logits_are_those_before_the_step() -> None:
    still = replace(SGD, lr=0.0)
    by_hand, stage = first_task(DERHParams(**SIZES, alpha=100), still)
    assert isinstance(by_hand, DER)
    pixels = by_hand.inputs(by_hand.memory_samples()).x
    np.testing.assert_allclose(by_hand.held_logits, network.logits(stage.weights, pixels)[0], rtol=1e-12)
    _, naive_stage = first_task(NaiveHParams(), still)
    np.testing.assert_allclose(stage.losses, naive_stage.losses, rtol=1e-12)  # at no distance from itself

    by_hand, _ = first_task(DERHParams(mem_size=210))  # all is kept; slots 0 to 6 are of the first step
    start = network.initial(TRAINING.seed, [64, *WIDTHS, 10])
    emitted, _ = network.logits(start, by_hand.inputs(by_hand.contents(np.arange(7))).x)
    np.testing.assert_allclose(by_hand.held_logits[:7], emitted, rtol=1e-12)
