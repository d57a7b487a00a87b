"""The references alone: gradients against slopes, closed forms, torch's optimizers, and what settings do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sequel_core.algorithms.agem import AGEMHParams
from sequel_core.algorithms.der import DERHParams
from sequel_core.algorithms.derpp import DERppHParams
from sequel_core.algorithms.er import ERHParams
from sequel_core.algorithms.icarl import ICaRLHParams
from sequel_core.algorithms.kcl import KCLHParams
from sequel_core.algorithms.lamaml import LaMAMLHParams
from sequel_core.algorithms.lfl import LFLHParams
from sequel_core.algorithms.mas import MASHParams
from sequel_core.algorithms.mcsgd import MCSGDHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.algorithms.si import SIHParams
from sequel_core.algorithms.stable_sgd import StableSGDHParams
from sequel_core.hparams import AlgorithmHParams, OptimizerHParams
from sequel_core.stream import plan
from sequel_core.stream.exemplars import herding
from sequel_core.stream.task import Samples
from tests.reference import closed_forms, kernels, network
from tests.reference.algorithms import reference
from tests.reference.cases import (
    ADAM,
    CASES,
    CLIPPED,
    CORE,
    LINES,
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
    parameters,
    ran,
    without_each_setting,
)
from tests.reference.connectivity import MCSGD, between
from tests.reference.exemplars import ICaRL, herd
from tests.reference.kernels import KCL, Bases
from tests.reference.meta import LaMAML
from tests.reference.network import Weights
from tests.reference.optimizers import Optimizer, clipped
from tests.reference.replay import DER, Replay, project
from tests.reference.streams import Reference, together

NEW = [case for case in CASES if case.hparams.name not in ("naive", "joint", "ewc")]
SLOPED = [
    case
    for case in NEW
    if case.hparams.name != "agem" and vars(case.hparams).get("second_order", True)  # these take no slope
]
PLAIN = ("stable_sgd", "mcsgd", "kcl")  # CE alone, or CE of something else than the network's logits


def distance(a: Weights, b: Weights) -> dict[str, float]:
    """Return how far apart two sets of weights are, array by array, relative to the second."""
    lengths = {k: np.linalg.norm(p) or 1.0 for k, p in b.items()}
    return {k: float(np.linalg.norm(a[k] - p) / lengths[k]) for k, p in b.items()}


def of(name: str) -> list[Case]:
    """Return the cases of a method."""
    return [case for case in CASES if case.hparams.name == name]


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


def test_the_product_with_the_hessian_is_the_slope_of_the_gradient(rng: np.random.Generator) -> None:
    weights = network.initial(0, [6, 5, 4, 3])
    x, y = rng.normal(size=(8, 6)), rng.integers(0, 2, 8)
    v = {k: rng.normal(size=p.shape) for k, p in weights.items()}
    for mask in (None, np.tile([True, True, False], (8, 1))):
        ahead, behind = (
            network.gradient({k: p + s * 1e-6 * v[k] for k, p in weights.items()}, x, y, mask)
            for s in (1, -1)
        )
        for k, found in network.hessian_product(weights, v, x, y, mask).items():
            np.testing.assert_allclose(found, (ahead[k] - behind[k]) / 2e-6, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("case", [SEPARATE, *SLOPED], ids=str)
def test_the_gradient_of_an_objective_is_the_slope_of_its_loss(case: Case, rng: np.random.Generator) -> None:
    by_hand, stages = ran(case)
    theta = {k: p + 0.05 * rng.normal(size=p.shape) for k, p in stages[-1].weights.items()}
    samples = benchmark(case.stream).tasks[2].train.take(np.arange(7))
    loss, found = by_hand.objective(theta, samples)
    if case.hparams.name not in PLAIN:
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


@pytest.mark.parametrize("case", parameters(NEW))
def test_every_setting_of_a_case_moves_its_weights(case: Case) -> None:
    for name, variant in without_each_setting(case).items():
        (*_, found), (*_, expected) = ran(case)[1], ran(variant)[1]
        both = {k: p for k, p in expected.weights.items() if k in found.weights}
        moved = max(distance(found.weights, both).values())
        if name in ("flip", "task_parameters"):  # of what is predicted alone
            assert moved == 0
            moved = np.max(abs(np.subtract(found.scores, expected.scores)))
        assert moved > 1e-3, name


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
        MCSGDHParams(mem_size=60, lmc_init_position=1, lmc_lr=0),
        MCSGDHParams(mem_size=0, lmc_init_position=1),
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


# -- MC-SGD


def connected(**settings: Any) -> MCSGD:
    """Return a reference of MC-SGD after the first task, with w halfway between w_bar and where it began."""
    by_hand, stage = first_task(MCSGDHParams(**{**LINES, **settings}))
    assert isinstance(by_hand, MCSGD)
    by_hand.w = between(stage.weights, by_hand.initial(), 0.5)
    return by_hand


@pytest.mark.parametrize("policy", ["offline", "online"])
def test_w_bar_that_starts_and_stays_at_its_last_value_never_changes(policy: Any) -> None:
    hparams = MCSGDHParams(mem_size=66, lmc_init_position=0, lmc_lr=0, lmc_policy=policy)
    first, *later = ran(Case("rotated", hparams, SGD))[1]
    naive_stages = ran(Case("rotated", NaiveHParams(), SGD))[1]
    assert first.losses == naive_stages[0].losses
    for stage, same in zip(later, naive_stages[1:], strict=True):
        assert stage.losses == same.losses  # w_hat goes on
        assert max(distance(stage.weights, first.weights).values()) == 0


def test_a_line_has_one_point_more_than_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    by_hand = connected(lmc_line_samples=5)
    at: list[float] = []

    def record(theta: Weights, samples: Samples) -> tuple[float, Weights]:
        ends = by_hand.w_bar["head/bias"], by_hand.w["head/bias"]
        at.append(float(np.mean((theta["head/bias"] - ends[0]) / (ends[1] - ends[0]))))
        return 0.0, network.zeros(theta)

    monkeypatch.setattr(by_hand, "cross_entropy", record)
    by_hand.line(by_hand.w_bar, by_hand.w, by_hand.memory_samples())
    np.testing.assert_allclose(at, np.linspace(0, 1, 6), atol=1e-12)


@pytest.mark.parametrize("loss", ["mean", "mean_over_batch_size"])
def test_gradients_of_a_line(loss: Any, rng: np.random.Generator) -> None:
    by_hand = connected(lmc_loss=loss)
    start, samples, size = by_hand.w_bar, by_hand.memory_samples(), 1 if loss == "mean" else 8

    def total(w: Weights) -> float:
        points = (between(start, w, i / 4) for i in range(5))
        return sum(network.loss(point, *by_hand.inputs(samples)) for point in points) / size

    assert_slope(total, by_hand.line(start, by_hand.w, samples), by_hand.w, rng)

    slopes = [by_hand.cross_entropy(between(start, by_hand.w, i / 4), samples)[1] for i in range(5)]
    for name in start:
        own = np.stack([slope[name] for slope in slopes]) / size
        for kind, expected in (("plain", own), ("prefix", np.cumsum(own, axis=0))):
            found = connected(lmc_loss=loss, lmc_gradient=kind).line(start, by_hand.w, samples)[name]
            np.testing.assert_allclose(found, expected.sum(axis=0), rtol=1e-10, atol=1e-15)


def test_a_line_without_samples_adds_nothing() -> None:
    by_hand = connected()
    nothing = by_hand.line(by_hand.w_bar, by_hand.w, by_hand.contents(np.zeros(0, np.int64)))
    assert not any(g.any() for g in nothing.values())


# -- La-MAML

ONE_STEP: dict[str, Any] = {"mem_size": 0, "glances": 1, "n_inner_updates": 1, "grad_clip_norm": None}


def test_one_inner_step_is_sgd_with_the_gradient_ahead() -> None:
    rate = 0.05
    hparams = LaMAMLHParams(**ONE_STEP, learn_lr=False, alpha_init=rate)
    by_hand, stage = first_task(hparams)
    theta, losses = by_hand.initial(), []
    for samples in by_hand.batches(benchmark("rotated").tasks[0]):
        inputs = by_hand.inputs(samples)
        g = network.gradient(theta, *inputs)
        ahead = {k: p - rate * g[k] for k, p in theta.items()}
        losses.append(network.loss(ahead, *inputs))
        g = network.gradient(ahead, *inputs)
        theta = {k: p - rate * g[k] for k, p in theta.items()}
    np.testing.assert_allclose(stage.losses, losses, rtol=1e-11)
    assert max(distance(stage.weights, theta).values()) < 1e-11


def test_looking_nowhere_and_the_optimizer_are_naive() -> None:
    hparams = LaMAMLHParams(**{**ONE_STEP, "grad_clip_norm": 0.8}, alpha_init=1e-200, sync_update=True)
    case = Case("masked", replace(hparams, learn_lr=False), MOMENTUM, CLIPPED)
    for found, expected in zip(ran(case)[1], ran(naive(case))[1], strict=True):
        np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-9)
        assert max(distance(found.weights, expected.weights).values()) < 1e-10


def looking(case: Case) -> tuple[LaMAML, Weights, Samples]:
    """Return a reference of La-MAML at the end of a case, its weights and a batch."""
    by_hand, stages = ran(case)
    assert isinstance(by_hand, LaMAML)
    size = case.training.batch_size
    return by_hand, stages[-1].weights, benchmark(case.stream).tasks[2].train.take(np.arange(size))


@pytest.mark.parametrize("case", [c for c in of("lamaml") if c in SLOPED], ids=str)
def test_the_gradient_of_rates_is_the_slope_of_the_loss(
    case: Case, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_hand, theta, samples = looking(case)
    rates = {k: rng.uniform(-0.05, 0.15, p.shape) for k, p in theta.items()}

    def loss(at: Weights) -> float:
        monkeypatch.setattr(by_hand, "alpha", at)
        return by_hand.look_ahead(theta, samples, 1).loss

    monkeypatch.setattr(by_hand, "alpha", rates)
    found = by_hand.look_ahead(theta, samples, 1).d_alpha
    for k, g in found.items():
        assert not g[rates[k] < 0].any()
    assert_slope(loss, found, rates, rng)


def test_gradients_of_first_order_are_slopes_at_constant_inner_gradients(rng: np.random.Generator) -> None:
    for case in (c for c in of("lamaml") if c not in SLOPED):
        by_hand, theta, samples = looking(case)
        x, y, t = (np.split(a[by_hand.step_plan.order[0]], by_hand.parts(samples)) for a in samples)
        meta = by_hand.inputs(together(samples, by_hand.contents(by_hand.drawn(0))))
        inner, ahead = [], theta
        for part in map(Samples, x, y, t):
            slope, bound = by_hand.cross_entropy(ahead, part)[1], by_hand.hparams.inner_clip or np.inf
            inner.append({k: np.clip(g, -bound, bound) for k, g in slope.items()})
            ahead = {k: p - np.maximum(by_hand.alpha[k], 0) * inner[-1][k] for k, p in ahead.items()}

        def loss(at: Weights, alpha: Weights, inner: Any = inner, meta: Any = meta) -> float:
            found = []
            for g in inner:
                at = {k: p - np.maximum(alpha[k], 0) * g[k] for k, p in at.items()}
                found.append(network.loss(at, *meta))
            return float(np.mean(found))

        look = by_hand.look_ahead(theta, samples, 0)
        np.testing.assert_allclose(look.loss, loss(theta, by_hand.alpha), rtol=1e-12)
        assert_slope(lambda at, b=by_hand, loss=loss: loss(at, b.alpha), look.d_theta, theta, rng)
        assert_slope(lambda at, theta=theta, loss=loss: loss(theta, at), look.d_alpha, by_hand.alpha, rng)


def test_every_sample_is_offered_to_the_memory_once_whatever_the_glances() -> None:
    by_hand, _ = first_task(LaMAMLHParams(mem_size=210, glances=3))
    seen = list(by_hand.batches(benchmark("rotated").tasks[0]))
    for found, *batches in zip(by_hand.memory_samples(), *seen, strict=True):
        np.testing.assert_array_equal(found, np.concatenate(batches))


# -- iCaRL


def unit(rng: np.random.Generator, *shape: int) -> Any:
    """Return random rows of unit length, none of them negative."""
    rows = abs(rng.normal(size=shape))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_herding_chooses_prefixes_of_one_order_and_the_library_the_same(rng: np.random.Generator) -> None:
    for size in (1, 2, 40):
        phi = unit(rng, size, 6)
        order = herd(phi, size)
        assert sorted(order) == list(range(size))
        for count in range(size + 1):
            assert herd(phi, count) == order[:count] == herding(phi, count).tolist()
        assert order[0] == np.argmin(np.linalg.norm(phi - phi.mean(axis=0), axis=1))


def test_herded_means_are_closer_than_most_random_ones(rng: np.random.Generator) -> None:
    phi = unit(rng, 60, 6)

    def away(rows: Any) -> float:
        return float(np.linalg.norm(phi[rows].mean(axis=0) - phi.mean(axis=0)))

    assert away(herd(phi, 6)) < np.quantile([away(rng.permutation(60)[:6]) for _ in range(200)], 0.1)


@pytest.mark.parametrize("case", of("icarl"), ids=str)
def test_exemplars_are_as_many_as_the_quota_of_each_class_of_each_task(case: Case) -> None:
    data, hparams = benchmark(case.stream), case.hparams
    assert isinstance(hparams, ICaRLHParams)
    by_hand = reference(data, *case[1:], WIDTHS)
    assert isinstance(by_hand, ICaRL)
    before: dict[tuple[int, int], Any] = {}
    for k, _ in enumerate(by_hand.stages()):
        sets = [(t, c) for t in range(k + 1) for c in data.tasks[t].classes]
        assert sorted(by_hand.sets) == sets
        for (t, c), held in by_hand.sets.items():
            m = hparams.per_set(len(sets))
            assert len(held.y) == min(m, np.sum(data.tasks[t].train.targets == c))
            assert set(held.y.tolist()) == {c}
            assert set(held.t.tolist()) == {t}
            if (t, c) in before:
                np.testing.assert_array_equal(held.x, before[t, c].x[:m])
        before = by_hand.sets
        assert len(by_hand.memory_samples().y) <= hparams.slots(len(sets))


def test_a_network_is_not_pulled_away_from_its_own_outputs_of_past_classes() -> None:
    by_hand, _ = ran(next(c for c in of("icarl") if c.stream == "incremental"))
    assert isinstance(by_hand, ICaRL)
    samples = benchmark("incremental").tasks[2].train.take(np.arange(20))
    _, g = by_hand.objective(by_hand.old, samples)
    assert abs(g["head/kernel"][:, :4]).max() < 1e-16  # the classes of tasks 0 and 1
    assert abs(g["head/kernel"][:, 4:6]).max() > 1e-4
    assert not g["head/kernel"][:, 6:].any()  # not seen yet


def test_the_loss_of_icarl_is_the_cross_entropy_of_each_output() -> None:
    hparams = ICaRLHParams(mem_size=60)
    by_hand, stage = first_task(hparams)
    samples = benchmark("rotated").tasks[0].train.take(np.arange(20))
    g = 1 / (1 + np.exp(-network.logits(stage.weights, by_hand.inputs(samples).x)[0]))
    terms = [-np.log(g[n, c] if c == y else 1 - g[n, c]) for n, y in enumerate(samples.y) for c in range(10)]
    np.testing.assert_allclose(by_hand.objective(stage.weights, samples)[0], np.mean(terms), rtol=1e-12)


def test_the_nearest_mean_of_exemplars_is_predicted() -> None:
    by_hand, stages = ran(next(c for c in of("icarl") if c.stream == "masked"))
    theta, samples = stages[-1].weights, benchmark("masked").tasks[1].test.take(np.arange(30))
    assert isinstance(by_hand, ICaRL)
    phi = by_hand.phi(theta, samples)
    held = by_hand.memory_samples()
    of_held = by_hand.phi(theta, held)
    means = [of_held[held.y == c].mean(axis=0) for c in range(6)]
    means = [mean / np.linalg.norm(mean) for mean in means]
    nearest = [min(range(6), key=lambda c: np.linalg.norm(row - means[c])) for row in phi]
    np.testing.assert_array_equal(by_hand.predict(theta, samples).argmax(axis=1), nearest)


# -- kernel continual learning


def test_the_divergence_of_equal_gaussians_is_none(rng: np.random.Generator) -> None:
    mu, v, other = rng.normal(size=(3, 5))
    assert kernels.divergence(mu, v, mu, v) == 0
    assert kernels.divergence(mu, v, other, v) > 0
    assert kernels.divergence(mu, v, mu, other) > 0
    np.testing.assert_allclose(kernels.divergence(mu, v, mu + 3, v), 4.5 * np.exp(-v).sum())


def test_a_tiny_ridge_reproduces_the_labels_of_the_coreset(rng: np.random.Generator) -> None:
    c, targets = unit(rng, 12, 8), np.eye(4)[rng.integers(0, 4, 12)]
    psi = Bases(rng.normal(size=(200, 8)), 2 * np.pi * rng.random(200)).psi(c)
    for kernel in (psi @ psi.T, kernels.rbf(c, c, 0.5)):
        found = kernel @ kernels.coefficients(kernel, 1e-9, targets)
        np.testing.assert_allclose(found, targets, atol=1e-4)
    assert kernels.ridge(-0.3) == kernels.ridge(0.3) == 0.31


def test_many_bases_are_the_gaussian_kernel(rng: np.random.Generator) -> None:
    a, b, count = rng.normal(size=(3, 4)), rng.normal(size=(2, 4)), 200_000
    bases = Bases(rng.normal(size=(count, 4)), 2 * np.pi * rng.random(count))
    np.testing.assert_allclose(bases.psi(a) @ bases.psi(b).T, kernels.rbf(a, b, 1.0), atol=0.01)


@pytest.mark.parametrize("how", ["l2", "minmax"])
def test_gradients_of_normalised_features_are_slopes(how: Any, rng: np.random.Generator) -> None:
    h, d = rng.normal(size=(2, 5, 4))  # of either sign, so that the least is not 0

    def loss(at: Weights) -> float:
        return float((d * kernels.normalised(at["h"], how)).sum())

    assert_slope(loss, {"h": kernels.normalised_backward(h, how, d)}, {"h": h}, rng)
    for scale in (0.0, 1e-13):  # nothing to divide by
        assert abs(kernels.normalised(scale * h, how)).max() < 1


@pytest.mark.parametrize("case", of("kcl"), ids=str)
def test_the_head_of_the_network_and_the_parameters_of_other_tasks_stay(case: Case) -> None:
    by_hand, stages = ran(case)
    start = by_hand.initial()
    for name in ("head/kernel", "head/bias"):
        np.testing.assert_array_equal(stages[-1].weights[name], start[name])
    if not case.optimizer.weight_decay:
        for name in ("kcl/lmd", "kcl/gain"):
            np.testing.assert_array_equal(stages[0].weights[name][1:], start[name][1:])
            assert (stages[-1].weights[name] != start[name]).all()


@pytest.mark.parametrize("case", of("kcl"), ids=str)
def test_a_shift_of_all_classes_changes_no_loss(case: Case) -> None:
    by_hand, stages = ran(case)
    theta, samples = stages[-1].weights, benchmark(case.stream).tasks[2].train.take(np.arange(7))
    shifted = {**theta, "kcl/offset": theta["kcl/offset"] + 3}
    found, expected = (by_hand.objective(at, samples)[0] for at in (shifted, theta))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert not theta["kcl/offset"].any()  # so it never moves


def test_a_coreset_is_apart_from_the_samples_of_training() -> None:
    hparams = KCLHParams(**CORE)
    by_hand, _ = ran(Case("masked", hparams, SGD))
    held = by_hand.memory_samples()
    assert held is not None
    assert held.y.tolist() == np.repeat(np.arange(6), 10).tolist()
    assert held.t.tolist() == np.repeat(np.arange(3), 20).tolist()
    for task, whole in zip(by_hand.tasks(), benchmark("masked").tasks, strict=True):
        trained, everything = (t.train.take(np.arange(len(t.train))).x for t in (task, whole))
        both = np.concatenate([trained, held.x[held.t == task.index]])
        assert sorted(image.tobytes() for image in both) == sorted(image.tobytes() for image in everything)


def test_a_task_that_is_not_trained_on_yet_gets_logits_of_zero() -> None:
    by_hand, stage = first_task(KCLHParams(**CORE))
    assert isinstance(by_hand, KCL)
    for task in benchmark("rotated").tasks:
        found = by_hand.predict(stage.weights, task.test.take(np.arange(9)))
        assert found.any() == (task.index == 0)


def test_what_is_predicted_of_a_sample_depends_on_its_task_alone() -> None:
    by_hand, stages = ran(next(c for c in of("kcl") if c.stream == "rotated"))
    theta, tests = stages[-1].weights, [task.test.take(np.arange(9)) for task in benchmark("rotated").tasks]
    joined = together(together(tests[2], tests[0]), tests[1])
    apart = np.concatenate([by_hand.predict(theta, tests[t]) for t in (2, 0, 1)])
    np.testing.assert_allclose(by_hand.predict(theta, joined), apart, rtol=1e-10)


def test_bases_are_cut_from_one_table() -> None:
    by_hand, _ = first_task(KCLHParams(**CORE))
    assert isinstance(by_hand, KCL)
    table = plan.normal(TRAINING.seed, "noise of bases", count=1 << 20).astype(np.float32)
    found = by_hand.eps(np.asarray([0, 7, (1 << 20) - 3]))
    for row, start in zip(found, (0, 7, -3), strict=True):
        np.testing.assert_array_equal(row, np.roll(table, -start)[: WIDTHS[-1]])
