"""The NumPy references alone: finite differences, closed forms, torch's optimizers, effects of settings."""

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
from tests.reference.algorithms import make_reference
from tests.reference.cases import (
    ADAM,
    CASES,
    CLIPPED,
    EWC_CASE,
    LMC,
    MEMORY,
    MOMENTUM,
    RFF,
    SGD,
    TRAINING,
    WIDTHS,
    Case,
    benchmark,
    case_parameters,
    final_weights,
    naive_case,
    run_reference,
    without_each_setting,
)
from tests.reference.connectivity import MCSGD, interpolate
from tests.reference.exemplars import ICaRL, herd
from tests.reference.kernels import KCL, Bases
from tests.reference.meta import LaMAML
from tests.reference.network import Weights
from tests.reference.optimizers import Optimizer, clip_by_norm
from tests.reference.replay import DER, Replay, project
from tests.reference.streams import Reference, concatenate

METHOD_CASES = [case for case in CASES if case.hparams.name not in ("naive", "joint", "ewc")]
# A-GEM, GEM and first-order La-MAML do not step along the gradient of a loss, and GDumb has none for batches.
DIFFERENTIABLE = [
    case
    for case in METHOD_CASES
    if case.hparams.name not in ("agem", "gem", "gdumb") and vars(case.hparams).get("second_order", True)
]
NO_EXTRA_TERM = ("stable_sgd", "mcsgd", "kcl")  # CE alone, or (KCL) CE of other logits than the network's


def distance(a: Weights, b: Weights) -> dict[str, float]:
    """Return the distance between two sets of weights for each array, relative to the norm of the second."""
    lengths = {k: np.linalg.norm(p) or 1.0 for k, p in b.items()}
    return {k: float(np.linalg.norm(a[k] - p) / lengths[k]) for k, p in b.items()}


def cases_of(name: str) -> list[Case]:
    """Return the cases of a method."""
    return [case for case in CASES if case.hparams.name == name]


def check_gradient(loss: Any, gradient: Weights, weights: Weights, rng: np.random.Generator) -> None:
    """Compare the gradient with a finite difference of the loss in a random direction of each array."""
    for name, g in gradient.items():
        direction = rng.normal(size=g.shape)
        ahead, behind = ({**weights, name: weights[name] + s * 1e-6 * direction} for s in (1, -1))
        difference = (loss(ahead) - loss(behind)) / 2e-6
        np.testing.assert_allclose((g * direction).sum(), difference, rtol=1e-6, atol=1e-8)


def test_the_gradient_of_the_cross_entropy_equals_the_finite_difference(rng: np.random.Generator) -> None:
    weights = network.initial(0, [6, 5, 4, 3])
    x, y = rng.normal(size=(8, 6)), rng.integers(0, 2, 8)
    for m in (None, np.tile([True, True, False], (8, 1))):
        gradient = network.gradient(weights, x, y, m)
        check_gradient(lambda at, m=m: network.loss(at, x, y, m), gradient, weights, rng)


def test_the_backward_pass_for_logits_and_features_equals_the_finite_difference(
    rng: np.random.Generator,
) -> None:
    weights = network.initial(0, [6, 5, 4, 3])
    x, of_logits, of_features = (rng.normal(size=(8, n)) for n in (6, 3, 4))

    def loss(at: Weights) -> float:
        a, inputs = network.logits(at, x)
        return float((of_logits * a).sum() + (of_features * inputs[-1] ** 2).sum())

    _, inputs = network.logits(weights, x)
    gradient = network.backward(weights, inputs, of_logits, 2 * of_features * inputs[-1])
    check_gradient(loss, gradient, weights, rng)


def test_the_hessian_product_equals_the_finite_difference_of_the_gradient(rng: np.random.Generator) -> None:
    weights = network.initial(0, [6, 5, 4, 3])
    x, y = rng.normal(size=(8, 6)), rng.integers(0, 2, 8)
    v = {k: rng.normal(size=p.shape) for k, p in weights.items()}
    for mask in (None, np.tile([True, True, False], (8, 1))):
        ahead, behind = (
            network.gradient({k: p + s * 1e-6 * v[k] for k, p in weights.items()}, x, y, mask)
            for s in (1, -1)
        )
        for k, product in network.hessian_product(weights, v, x, y, mask).items():
            np.testing.assert_allclose(product, (ahead[k] - behind[k]) / 2e-6, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("case", [EWC_CASE, *DIFFERENTIABLE], ids=str)
def test_the_gradient_of_every_loss_equals_the_finite_difference(
    case: Case, rng: np.random.Generator
) -> None:
    reference, stages = run_reference(case)
    theta = {k: p + 0.05 * rng.normal(size=p.shape) for k, p in stages[-1].weights.items()}
    samples = benchmark(case.stream).tasks[2].train.take(np.arange(7))
    loss, gradient = reference.objective(theta, samples)
    if case.hparams.name not in NO_EXTRA_TERM:
        cross_entropy, _ = Reference.objective(reference, theta, samples)
        assert abs(loss - cross_entropy) > 1e-3
    check_gradient(lambda at: reference.objective(at, samples)[0], gradient, theta, rng)


@pytest.mark.parametrize("hparams", [OptimizerHParams(lr=0.1), MOMENTUM, ADAM])
@pytest.mark.parametrize("grad_clip", [None, 0.5])
def test_optimizers_equal_those_of_torch(
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
        theta = ours.step(theta, clip_by_norm(g, grad_clip), hparams.lr)
        for k, p in params.items():
            p.grad = torch.from_numpy(g[k])
        if grad_clip:
            torch.nn.utils.clip_grad_norm_(params.values(), grad_clip)
        theirs.step()
        for k, p in params.items():
            np.testing.assert_allclose(theta[k], p.detach().numpy(), rtol=1e-12)


@pytest.mark.parametrize("case", [EWC_CASE, *METHOD_CASES], ids=str)
def test_every_case_changes_the_weights(case: Case) -> None:
    assert min(distance(final_weights(case), final_weights(naive_case(case))).values()) > 1e-3


@pytest.mark.parametrize("case", case_parameters(METHOD_CASES))
def test_every_setting_of_a_case_changes_the_result(case: Case) -> None:
    for name, variant in without_each_setting(case).items():
        (*_, chosen), (*_, default) = run_reference(case)[1], run_reference(variant)[1]
        common = {k: p for k, p in default.weights.items() if k in chosen.weights}
        change = max(distance(chosen.weights, common).values())
        if name in ("flip", "task_parameters"):  # they change the predictions only
            assert change == 0
            change = np.max(abs(np.subtract(chosen.scores, default.scores)))
        assert change > 1e-3, name


@pytest.mark.parametrize(
    "hparams",
    [
        SIHParams(si_lambda=0),
        MASHParams(mas_lambda=0),
        LFLHParams(lfl_lambda=0, freeze_head=False),
        StableSGDHParams(lr_decay=1, min_lr=0),
        AGEMHParams(mem_size=0),
        ERHParams(mem_size=0),
        DERHParams(**MEMORY, alpha=0),
        DERHParams(mem_size=0),
        DERppHParams(**MEMORY, alpha=0, beta=0),
        MCSGDHParams(mem_size=60, lmc_init_position=1, lmc_lr=0),
        MCSGDHParams(mem_size=0, lmc_init_position=1),
    ],
    ids=str,
)
def test_every_method_at_strength_zero_equals_naive(hparams: AlgorithmHParams) -> None:
    case = Case("masked", hparams, MOMENTUM, CLIPPED)
    for stage, expected in zip(run_reference(case)[1], run_reference(naive_case(case))[1], strict=True):
        assert stage.losses == expected.losses
        assert max(distance(stage.weights, expected.weights).values()) == 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_learning_rates_follow_the_settings(case: Case) -> None:
    rate = case.optimizer.lr
    for task in range(3):
        factor = case.hparams.learning_rate_factor(task, rate)
        np.testing.assert_allclose(run_reference(case)[0].learning_rate(task), rate * factor, rtol=1e-14)


def first_task(hparams: AlgorithmHParams, optimizer: OptimizerHParams = SGD, **options: Any) -> Any:
    """Return a reference after the first of the rotated tasks, and the results of that task."""
    options = {"training": TRAINING, "widths": WIDTHS, **options}
    reference = make_reference(benchmark("rotated"), hparams, optimizer, **options)
    return reference, next(reference.stages())


def test_si_importance_with_plain_sgd() -> None:
    reference, _ = first_task(SIHParams(xi=0.02))
    theta = network.initial(TRAINING.seed, [64, *WIDTHS, 10])
    expected = closed_forms.sgd_si(theta, SGD.lr, 0.02)
    assert max(distance(reference.importance, expected).values()) < 1e-12


@pytest.mark.parametrize(("gradients", "size", "count"), [("sample", 7, None), ("batch", 64, 150)])
def test_mas_importance_of_a_linear_model(gradients: Any, size: int, count: int | None) -> None:
    hparams = MASHParams(gradients=gradients, mas_samples=count)
    reference, stage = first_task(hparams, training=replace(TRAINING, batch_size=size), widths=())
    expected = closed_forms.linear_mas(stage.weights, count, 1 if gradients == "sample" else size)
    assert max(distance(reference.importance, expected).values()) < 1e-12


def test_a_frozen_head_does_not_change_after_the_first_task() -> None:
    case = next(c for c in METHOD_CASES if c.hparams.name == "lfl" and c.optimizer is MOMENTUM)
    first, _, last = (stage.weights for stage in run_reference(case)[1])
    change = distance(last, first)
    assert change.pop("head/kernel") == change.pop("head/bias") == 0
    assert min(change.values()) > 1e-3


def test_a_projected_gradient_has_no_component_against_g_ref(rng: np.random.Generator) -> None:
    g, past = ({k: rng.normal(size=p.shape) for k, p in network.initial(0, [6, 5, 3]).items()} for _ in "gp")
    along = network.dot(g, past)
    for sign in (1, -1):
        g_ref = {k: sign * np.sign(along) * p for k, p in past.items()}  # g.g_ref > 0, then < 0
        projected = project(g, g_ref)
        if sign == 1:
            assert projected is g
        else:
            assert abs(network.dot(projected, g_ref)) < 1e-12 * network.dot(g_ref, g_ref)
            removed = {k: p - projected[k] for k, p in g.items()}  # parallel to g_ref
            assert abs(network.dot(removed, g_ref) + abs(along)) < 1e-12 * abs(along)
            np.testing.assert_allclose(network.dot(removed, removed) * network.dot(g_ref, g_ref), along**2)


def test_a_gem_projects_some_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    projected: list[bool] = []

    def record(g: Weights, g_ref: Weights) -> Weights:
        projected.append(network.dot(g, g_ref) < 0)
        return project(g, g_ref)

    monkeypatch.setattr("tests.reference.replay.project", record)
    for case in (c for c in METHOD_CASES if c.hparams.name == "agem"):
        projected.clear()
        first, *_ = list(make_reference(benchmark(case.stream), *case[1:], WIDTHS).stages())
        assert first.losses == run_reference(naive_case(case))[1][0].losses
        assert len(projected) == 60  # the memory has no samples of past tasks in the first task
        assert 10 <= sum(projected) <= 50


def test_a_large_reservoir_contains_the_stream_in_order() -> None:
    reference, _ = first_task(ERHParams(mem_size=210))
    assert isinstance(reference, Replay)
    seen = list(reference.batches(benchmark("rotated").tasks[0]))
    for stored, *batches in zip(reference.memory_samples(), *seen, strict=True):
        np.testing.assert_array_equal(stored, np.concatenate(batches))


def test_a_ring_contains_the_latest_samples_of_each_class() -> None:
    reference, _ = first_task(ERHParams(memory="ring", mem_size=60))
    seen = list(reference.batches(benchmark("rotated").tasks[0]))
    x, y, t = (np.concatenate(arrays) for arrays in zip(*seen, strict=True))
    memory = reference.memory_samples()
    np.testing.assert_array_equal(memory.y, np.repeat(np.arange(10), 2))
    for c in range(10):
        latest = x[y == c][-2:]
        stored = memory.x[memory.y == c]
        np.testing.assert_array_equal(np.sort(stored, axis=0), np.sort(latest, axis=0))
    assert not memory.t.any()
    assert not t.any()


def test_replayed_samples_are_masked_by_their_tasks() -> None:
    case = next(c for c in METHOD_CASES if c.hparams.name == "er" and c.stream == "masked")
    reference, stages = run_reference(case)
    assert isinstance(reference, Replay)
    theta, samples = stages[-1].weights, benchmark("masked").tasks[2].train.take(np.arange(7))
    replayed = reference.contents(reference.read_slots(0))
    assert set(replayed.t.tolist()) == {0, 1}
    scores = []
    for part in (samples, replayed):
        outputs, _ = network.logits(theta, reference.inputs(part).x)
        for a, y, t in zip(outputs, part.y, part.t, strict=True):
            unmasked = a[2 * t : 2 * t + 2]  # the two classes of the task
            scores.append(np.log(np.exp(unmasked).sum()) - unmasked[y - 2 * t])
    np.testing.assert_allclose(reference.objective(theta, samples)[0], np.mean(scores), rtol=1e-12)


def test_stored_logits_are_computed_before_the_step() -> None:
    no_update = replace(SGD, lr=0.0)
    reference, stage = first_task(DERHParams(**MEMORY, alpha=100), no_update)
    assert isinstance(reference, DER)
    pixels = reference.inputs(reference.memory_samples()).x
    np.testing.assert_allclose(reference.memory_logits, network.logits(stage.weights, pixels)[0], rtol=1e-12)
    _, naive_stage = first_task(NaiveHParams(), no_update)
    np.testing.assert_allclose(stage.losses, naive_stage.losses, rtol=1e-12)  # the distillation term is 0

    reference, _ = first_task(DERHParams(mem_size=210))  # all are stored; slots 0 to 6 hold batch 1
    start = network.initial(TRAINING.seed, [64, *WIDTHS, 10])
    logits, _ = network.logits(start, reference.inputs(reference.contents(np.arange(7))).x)
    np.testing.assert_allclose(reference.memory_logits[:7], logits, rtol=1e-12)


# -- MC-SGD


def mcsgd_after_first_task(**settings: Any) -> MCSGD:
    """Return a reference of MC-SGD after one task, with w halfway between w_bar and the initial weights."""
    reference, stage = first_task(MCSGDHParams(**{**LMC, **settings}))
    assert isinstance(reference, MCSGD)
    reference.w = interpolate(stage.weights, reference.initial(), 0.5)
    return reference


@pytest.mark.parametrize("policy", ["offline", "online"])
def test_w_bar_does_not_change_without_steps(policy: Any) -> None:
    hparams = MCSGDHParams(mem_size=66, lmc_init_position=0, lmc_lr=0, lmc_policy=policy)
    first, *later = run_reference(Case("rotated", hparams, SGD))[1]
    naive_stages = run_reference(Case("rotated", NaiveHParams(), SGD))[1]
    assert first.losses == naive_stages[0].losses
    for stage, naive_stage in zip(later, naive_stages[1:], strict=True):
        assert stage.losses == naive_stage.losses  # w_hat is trained as naive finetuning
        assert max(distance(stage.weights, first.weights).values()) == 0


def test_a_line_is_sampled_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = mcsgd_after_first_task(lmc_line_samples=5)
    positions: list[float] = []

    def record(theta: Weights, samples: Samples) -> tuple[float, Weights]:
        ends = reference.w_bar["head/bias"], reference.w["head/bias"]
        positions.append(float(np.mean((theta["head/bias"] - ends[0]) / (ends[1] - ends[0]))))
        return 0.0, network.zeros(theta)

    monkeypatch.setattr(reference, "task_loss", record)
    reference.line_gradient(reference.w_bar, reference.w, reference.memory_samples())
    np.testing.assert_allclose(positions, np.linspace(0, 1, 6), atol=1e-12)


@pytest.mark.parametrize("loss", ["mean", "mean_over_batch_size"])
def test_the_gradient_along_a_line(loss: Any, rng: np.random.Generator) -> None:
    reference = mcsgd_after_first_task(lmc_loss=loss)
    start, samples, size = reference.w_bar, reference.memory_samples(), 1 if loss == "mean" else 8

    def total(w: Weights) -> float:
        points = (interpolate(start, w, i / 4) for i in range(5))
        return sum(network.loss(point, *reference.inputs(samples)) for point in points) / size

    check_gradient(total, reference.line_gradient(start, reference.w, samples), reference.w, rng)

    points = (interpolate(start, reference.w, i / 4) for i in range(5))
    gradients = [reference.task_loss(point, samples)[1] for point in points]
    for name in start:
        terms = np.stack([g[name] for g in gradients]) / size
        for setting, expected in (("plain", terms), ("prefix", np.cumsum(terms, axis=0))):
            variant = mcsgd_after_first_task(lmc_loss=loss, lmc_gradient=setting)
            gradient = variant.line_gradient(start, reference.w, samples)[name]
            np.testing.assert_allclose(gradient, expected.sum(axis=0), rtol=1e-10, atol=1e-15)


def test_the_gradient_along_a_line_is_zero_without_samples() -> None:
    reference = mcsgd_after_first_task()
    nothing = reference.contents(np.zeros(0, np.int64))
    gradient = reference.line_gradient(reference.w_bar, reference.w, nothing)
    assert not any(g.any() for g in gradient.values())


# -- La-MAML

ONE_STEP: dict[str, Any] = {"mem_size": 0, "glances": 1, "n_inner_updates": 1, "grad_clip_norm": None}


def test_one_inner_step_is_sgd_with_the_gradient_after_a_step() -> None:
    rate = 0.05
    hparams = LaMAMLHParams(**ONE_STEP, learn_lr=False, alpha_init=rate)
    reference, stage = first_task(hparams)
    theta, losses = reference.initial(), []
    for samples in reference.batches(benchmark("rotated").tasks[0]):
        inputs = reference.inputs(samples)
        g = network.gradient(theta, *inputs)
        ahead = {k: p - rate * g[k] for k, p in theta.items()}
        losses.append(network.loss(ahead, *inputs))
        g = network.gradient(ahead, *inputs)
        theta = {k: p - rate * g[k] for k, p in theta.items()}
    np.testing.assert_allclose(stage.losses, losses, rtol=1e-11)
    assert max(distance(stage.weights, theta).values()) < 1e-11


def test_a_learning_rate_of_almost_zero_in_the_inner_loop_equals_naive() -> None:
    hparams = LaMAMLHParams(**{**ONE_STEP, "grad_clip_norm": 0.8}, alpha_init=1e-200, sync_update=True)
    case = Case("masked", replace(hparams, learn_lr=False), MOMENTUM, CLIPPED)
    for stage, expected in zip(run_reference(case)[1], run_reference(naive_case(case))[1], strict=True):
        np.testing.assert_allclose(stage.losses, expected.losses, rtol=1e-9)
        assert max(distance(stage.weights, expected.weights).values()) < 1e-10


def lamaml_at_the_end(case: Case) -> tuple[LaMAML, Weights, Samples]:
    """Return a reference of La-MAML after the last task of a case, its weights and a batch."""
    reference, stages = run_reference(case)
    assert isinstance(reference, LaMAML)
    size = case.training.batch_size
    return reference, stages[-1].weights, benchmark(case.stream).tasks[2].train.take(np.arange(size))


@pytest.mark.parametrize("case", [c for c in cases_of("lamaml") if c in DIFFERENTIABLE], ids=str)
def test_the_gradient_of_learned_rates_equals_the_finite_difference(
    case: Case, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, theta, samples = lamaml_at_the_end(case)
    rates = {k: rng.uniform(-0.05, 0.15, p.shape) for k, p in theta.items()}

    def loss(at: Weights) -> float:
        monkeypatch.setattr(reference, "alpha", at)
        return reference.look_ahead(theta, samples, 1).loss

    monkeypatch.setattr(reference, "alpha", rates)
    gradient = reference.look_ahead(theta, samples, 1).d_alpha
    for k, g in gradient.items():
        assert not g[rates[k] < 0].any()
    check_gradient(loss, gradient, rates, rng)


def test_first_order_gradients_treat_inner_gradients_as_constants(rng: np.random.Generator) -> None:
    for case in (c for c in cases_of("lamaml") if c not in DIFFERENTIABLE):
        reference, theta, samples = lamaml_at_the_end(case)
        x, y, t = (np.split(a[reference.step_plan.order[0]], reference.parts(samples)) for a in samples)
        meta = reference.inputs(concatenate(samples, reference.contents(reference.read_slots(0))))
        inner, ahead = [], theta
        for part in map(Samples, x, y, t):
            gradient, bound = reference.task_loss(ahead, part)[1], reference.hparams.inner_clip or np.inf
            inner.append({k: np.clip(g, -bound, bound) for k, g in gradient.items()})
            ahead = {k: p - np.maximum(reference.alpha[k], 0) * inner[-1][k] for k, p in ahead.items()}

        def loss(at: Weights, alpha: Weights, inner: Any = inner, meta: Any = meta) -> float:
            losses = []
            for g in inner:
                at = {k: p - np.maximum(alpha[k], 0) * g[k] for k, p in at.items()}
                losses.append(network.loss(at, *meta))
            return float(np.mean(losses))

        result = reference.look_ahead(theta, samples, 0)
        np.testing.assert_allclose(result.loss, loss(theta, reference.alpha), rtol=1e-12)
        alpha = reference.alpha
        check_gradient(lambda at, a=alpha, loss=loss: loss(at, a), result.d_theta, theta, rng)
        check_gradient(lambda at, theta=theta, loss=loss: loss(theta, at), result.d_alpha, alpha, rng)


def test_every_sample_is_written_once_with_several_glances() -> None:
    reference, _ = first_task(LaMAMLHParams(mem_size=210, glances=3))
    seen = list(reference.batches(benchmark("rotated").tasks[0]))
    for stored, *batches in zip(reference.memory_samples(), *seen, strict=True):
        np.testing.assert_array_equal(stored, np.concatenate(batches))


# -- iCaRL


def unit(rng: np.random.Generator, *shape: int) -> Any:
    """Return random rows of unit length with non-negative entries."""
    rows = abs(rng.normal(size=shape))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_herding_of_fewer_exemplars_is_a_prefix_and_equals_the_library(rng: np.random.Generator) -> None:
    for size in (1, 2, 40):
        phi = unit(rng, size, 6)
        order = herd(phi, size)
        assert sorted(order) == list(range(size))
        for count in range(size + 1):
            assert herd(phi, count) == order[:count] == herding(phi, count).tolist()
        assert order[0] == np.argmin(np.linalg.norm(phi - phi.mean(axis=0), axis=1))


def test_the_mean_of_herded_exemplars_is_closer_than_most_random_means(rng: np.random.Generator) -> None:
    phi = unit(rng, 60, 6)

    def error(rows: Any) -> float:
        return float(np.linalg.norm(phi[rows].mean(axis=0) - phi.mean(axis=0)))

    assert error(herd(phi, 6)) < np.quantile([error(rng.permutation(60)[:6]) for _ in range(200)], 0.1)


@pytest.mark.parametrize("case", cases_of("icarl"), ids=str)
def test_every_set_of_exemplars_fills_its_quota(case: Case) -> None:
    data, hparams = benchmark(case.stream), case.hparams
    assert isinstance(hparams, ICaRLHParams)
    reference = make_reference(data, *case[1:], WIDTHS)
    assert isinstance(reference, ICaRL)
    before: dict[tuple[int, int], Any] = {}
    for k, _ in enumerate(reference.stages()):
        sets = [(t, c) for t in range(k + 1) for c in data.tasks[t].classes]
        assert sorted(reference.sets) == sets
        for (t, c), exemplars in reference.sets.items():
            m = hparams.per_set(len(sets))
            assert len(exemplars.y) == min(m, np.sum(data.tasks[t].train.targets == c))
            assert set(exemplars.y.tolist()) == {c}
            assert set(exemplars.t.tolist()) == {t}
            if (t, c) in before:
                np.testing.assert_array_equal(exemplars.x, before[t, c].x[:m])
        before = reference.sets
        assert len(reference.memory_samples().y) <= hparams.slots(len(sets))


def test_distillation_has_no_gradient_at_the_old_weights() -> None:
    reference, _ = run_reference(next(c for c in cases_of("icarl") if c.stream == "incremental"))
    assert isinstance(reference, ICaRL)
    samples = benchmark("incremental").tasks[2].train.take(np.arange(20))
    _, g = reference.objective(reference.old, samples)
    assert abs(g["head/kernel"][:, :4]).max() < 1e-16  # classes of tasks 0 and 1
    assert abs(g["head/kernel"][:, 4:6]).max() > 1e-4
    assert not g["head/kernel"][:, 6:].any()  # classes of later tasks


def test_the_loss_of_icarl_is_the_mean_binary_cross_entropy() -> None:
    hparams = ICaRLHParams(mem_size=60)
    reference, stage = first_task(hparams)
    samples = benchmark("rotated").tasks[0].train.take(np.arange(20))
    g = 1 / (1 + np.exp(-network.logits(stage.weights, reference.inputs(samples).x)[0]))
    terms = [-np.log(g[n, c] if c == y else 1 - g[n, c]) for n, y in enumerate(samples.y) for c in range(10)]
    np.testing.assert_allclose(reference.objective(stage.weights, samples)[0], np.mean(terms), rtol=1e-12)


def test_icarl_predicts_the_nearest_mean_of_exemplars() -> None:
    reference, stages = run_reference(next(c for c in cases_of("icarl") if c.stream == "masked"))
    theta, samples = stages[-1].weights, benchmark("masked").tasks[1].test.take(np.arange(30))
    assert isinstance(reference, ICaRL)
    phi = reference.phi(theta, samples)
    exemplars = reference.memory_samples()
    exemplar_phi = reference.phi(theta, exemplars)
    means = [exemplar_phi[exemplars.y == c].mean(axis=0) for c in range(6)]
    means = [mean / np.linalg.norm(mean) for mean in means]
    nearest = [min(range(6), key=lambda c: np.linalg.norm(row - means[c])) for row in phi]
    np.testing.assert_array_equal(reference.predict(theta, samples).argmax(axis=1), nearest)


# -- kernel continual learning


def test_the_divergence_of_equal_gaussians_is_zero(rng: np.random.Generator) -> None:
    mu, v, other = rng.normal(size=(3, 5))
    assert kernels.divergence(mu, v, mu, v) == 0
    assert kernels.divergence(mu, v, other, v) > 0
    assert kernels.divergence(mu, v, mu, other) > 0
    np.testing.assert_allclose(kernels.divergence(mu, v, mu + 3, v), 4.5 * np.exp(-v).sum())


def test_a_tiny_ridge_reproduces_the_labels_of_the_coreset(rng: np.random.Generator) -> None:
    c, targets = unit(rng, 12, 8), np.eye(4)[rng.integers(0, 4, 12)]
    psi = Bases(rng.normal(size=(200, 8)), 2 * np.pi * rng.random(200)).psi(c)
    for kernel in (psi @ psi.T, kernels.rbf(c, c, 0.5)):
        predictions = kernel @ kernels.coefficients(kernel, 1e-9, targets)
        np.testing.assert_allclose(predictions, targets, atol=1e-4)
    assert kernels.ridge(-0.3) == kernels.ridge(0.3) == 0.31


def test_many_bases_approximate_the_gaussian_kernel(rng: np.random.Generator) -> None:
    a, b, count = rng.normal(size=(3, 4)), rng.normal(size=(2, 4)), 200_000
    bases = Bases(rng.normal(size=(count, 4)), 2 * np.pi * rng.random(count))
    np.testing.assert_allclose(bases.psi(a) @ bases.psi(b).T, kernels.rbf(a, b, 1.0), atol=0.01)


@pytest.mark.parametrize("how", ["l2", "minmax"])
def test_the_gradient_of_normalised_features_equals_the_finite_difference(
    how: Any, rng: np.random.Generator
) -> None:
    h, d = rng.normal(size=(2, 5, 4))  # of both signs, so that the minimum is not 0

    def loss(at: Weights) -> float:
        return float((d * kernels.normalised(at["h"], how)).sum())

    check_gradient(loss, {"h": kernels.normalised_backward(h, how, d)}, {"h": h}, rng)
    for scale in (0.0, 1e-13):  # no division by 0
        assert abs(kernels.normalised(scale * h, how)).max() < 1


@pytest.mark.parametrize("case", cases_of("kcl"), ids=str)
def test_the_head_and_the_parameters_of_other_tasks_do_not_change(case: Case) -> None:
    reference, stages = run_reference(case)
    start = reference.initial()
    for name in ("head/kernel", "head/bias"):
        np.testing.assert_array_equal(stages[-1].weights[name], start[name])
    if not case.optimizer.weight_decay:
        for name in ("kcl/lmd", "kcl/gain"):
            np.testing.assert_array_equal(stages[0].weights[name][1:], start[name][1:])
            assert (stages[-1].weights[name] != start[name]).all()


@pytest.mark.parametrize("case", cases_of("kcl"), ids=str)
def test_the_offset_does_not_change_the_loss(case: Case) -> None:
    reference, stages = run_reference(case)
    theta, samples = stages[-1].weights, benchmark(case.stream).tasks[2].train.take(np.arange(7))
    shifted = {**theta, "kcl/offset": theta["kcl/offset"] + 3}
    loss, expected = (reference.objective(at, samples)[0] for at in (shifted, theta))
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    assert not theta["kcl/offset"].any()  # its gradient is 0


def test_a_coreset_and_the_training_samples_are_disjoint() -> None:
    hparams = KCLHParams(**RFF)
    reference, _ = run_reference(Case("masked", hparams, SGD))
    coresets = reference.memory_samples()
    assert coresets is not None
    assert coresets.y.tolist() == np.repeat(np.arange(6), 10).tolist()
    assert coresets.t.tolist() == np.repeat(np.arange(3), 20).tolist()
    for task, whole in zip(reference.tasks(), benchmark("masked").tasks, strict=True):
        trained, everything = (t.train.take(np.arange(len(t.train))).x for t in (task, whole))
        both = np.concatenate([trained, coresets.x[coresets.t == task.index]])
        assert sorted(image.tobytes() for image in both) == sorted(image.tobytes() for image in everything)


def test_the_logits_of_later_tasks_are_zero() -> None:
    reference, stage = first_task(KCLHParams(**RFF))
    assert isinstance(reference, KCL)
    for task in benchmark("rotated").tasks:
        logits = reference.predict(stage.weights, task.test.take(np.arange(9)))
        assert logits.any() == (task.index == 0)


def test_predictions_do_not_depend_on_the_other_tasks_in_a_batch() -> None:
    reference, stages = run_reference(next(c for c in cases_of("kcl") if c.stream == "rotated"))
    theta, tests = stages[-1].weights, [task.test.take(np.arange(9)) for task in benchmark("rotated").tasks]
    mixed = concatenate(concatenate(tests[2], tests[0]), tests[1])
    separate = np.concatenate([reference.predict(theta, tests[t]) for t in (2, 0, 1)])
    np.testing.assert_allclose(reference.predict(theta, mixed), separate, rtol=1e-10)


def test_bases_are_read_from_one_table() -> None:
    reference, _ = first_task(KCLHParams(**RFF))
    assert isinstance(reference, KCL)
    table = plan.normal(TRAINING.seed, "noise of bases", count=1 << 20).astype(np.float32)
    bases = reference.eps(np.asarray([0, 7, (1 << 20) - 3]))
    for row, start in zip(bases, (0, 7, -3), strict=True):
        np.testing.assert_array_equal(row, np.roll(table, -start)[: WIDTHS[-1]])
