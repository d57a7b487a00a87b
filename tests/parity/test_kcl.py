"""KCL: its kernels, solves and divergence against other libraries; coresets; predictions; both frameworks."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import integrate, stats
from sklearn.kernel_ridge import KernelRidge

import sequel_flax
import sequel_lightning
from sequel_benchmarks import RotatedDigits, SplitDigits
from sequel_core.algorithms.kcl import NOISE, KCLHParams, basis_constants, noise_table
from sequel_core.cli import main
from sequel_core.hparams import AlgorithmHParams, OptimizerHParams, TrainingHParams
from sequel_core.stream import plan
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.benchmark import Benchmark, Scenario
from sequel_core.testing.parity import SILENT, difference
from sequel_flax import kernels as flax_kernels
from sequel_lightning import kernels as torch_kernels
from sequel_lightning.networks import evaluating

BOTH = pytest.mark.parametrize("kernels", [flax_kernels, torch_kernels], ids=["flax", "lightning"])
RFF = KCLHParams(core_size=20, d_rn_f=40, tau=0.1, task_given=True)
RBF = KCLHParams(core_size=20, kernel_type="rbf", bandwidth=0.7, task_given=True)
MOMENTUM = OptimizerHParams(lr=0.1, momentum=0.8)


def of(kernels: Any, *arrays: Any) -> list[Any]:
    """Return NumPy arrays as those of a framework."""
    return [jnp.asarray(a) if kernels is flax_kernels else torch.as_tensor(np.asarray(a)) for a in arrays]


# -- the arithmetic


@BOTH
def test_the_solve_is_numpys(kernels: Any, rng: np.random.Generator) -> None:
    a, y = rng.normal(size=(30, 8)), rng.normal(size=(30, 4))
    actual = np.asarray(kernels.solve(*of(kernels, a @ a.T, 0.13, y)))
    np.testing.assert_allclose(actual, np.linalg.solve(a @ a.T + 0.13 * np.eye(30), y), rtol=1e-9, atol=1e-11)


def test_the_gradient_of_the_solve_is_that_of_finite_differences(rng: np.random.Generator) -> None:
    a, y, w = rng.normal(size=(7, 7)), rng.normal(size=(7, 3)), rng.normal(size=(7, 3))

    def value(a: FloatArray, ridge: float, y: FloatArray) -> float:
        return float((np.linalg.solve(a @ a.T + ridge * np.eye(7), y) * w).sum())

    def numeric(k: int, at: tuple[int, ...]) -> float:
        ends = []
        for step in (1e-6, -1e-6):
            inputs: list[Any] = [a.copy(), np.array(0.2), y.copy()]
            inputs[k][at] += step
            ends.append(value(*inputs))
        return (ends[0] - ends[1]) / 2e-6

    grads = jax.grad(lambda a, r, y: (flax_kernels.solve(a @ a.T, r, y) * w).sum(), (0, 1, 2))(a, 0.2, y)
    tensors: list[Any] = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (a, 0.2, y)]
    (torch_kernels.solve(tensors[0] @ tensors[0].T, *tensors[1:]) * torch.from_numpy(w)).sum().backward()
    for k, at in ((0, (2, 3)), (0, (5, 0)), (1, ()), (2, (4, 1))):
        expected = numeric(k, at)
        np.testing.assert_allclose(np.asarray(grads[k])[at], expected, rtol=1e-5)
        np.testing.assert_allclose(tensors[k].grad.numpy()[at], expected, rtol=1e-5)


def test_a_matrix_that_has_no_factor_gives_no_finite_number() -> None:
    bad = torch.full((3, 3), torch.nan)
    assert not torch.isfinite(torch_kernels.solve(bad, torch.tensor(0.1), torch.ones(3, 2))).any()


def array(value: Any) -> FloatArray:
    actual: FloatArray = value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    return actual


def own_of(kernels: Any, hparams: KCLHParams, width: int) -> Any:
    dtype = jnp.float64 if kernels is flax_kernels else torch.float64
    return kernels.extra_parameters(hparams, 0, 2, width, dtype)


@BOTH
def test_the_classifier_is_scikit_learns_kernel_ridge(kernels: Any, rng: np.random.Generator) -> None:
    core, h = rng.normal(size=(20, 6)), rng.normal(size=(9, 6))
    y = np.eye(4)[np.arange(20) // 5]
    expected = KernelRidge(alpha=0.31, kernel="rbf", gamma=1 / (2 * 0.7**2)).fit(core, y).predict(h)
    extra = own_of(kernels, replace(RBF, lmd=-0.3), 6)
    c, x, targets = of(kernels, core, h, y)
    kernel, cross, source = kernels.compare(extra, RBF, c, x, None, None, None)
    assert source is None
    np.testing.assert_allclose(
        array(kernels.classify(extra, 1, kernel, cross, targets)), expected, rtol=1e-9, atol=1e-12
    )


@BOTH
def test_a_tiny_ridge_gives_the_coreset_its_labels(
    kernels: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "RIDGE", 1e-9)
    core, y = rng.normal(size=(12, 5)), np.eye(3)[np.arange(12) % 3]
    noise, phase, positions = basis_constants(0, 2000, 5)
    for hparams in (replace(RBF, lmd=0), replace(RFF, lmd=0, d_rn_f=2000)):
        extra = own_of(kernels, hparams, 5)
        c, targets, *rest = of(kernels, core, y, noise, phase, positions)
        kernel, cross, _ = kernels.compare(extra, hparams, c, c, *rest)
        np.testing.assert_allclose(array(kernels.classify(extra, 0, kernel, cross, targets)), y, atol=1e-4)


@BOTH
def test_many_bases_of_a_standard_normal_give_the_gaussian_kernel(
    kernels: Any, rng: np.random.Generator
) -> None:
    a, b = rng.normal(size=(8, 3)), rng.normal(size=(6, 3))
    noise, phase, positions = of(kernels, *basis_constants(1, 200_000, 3))
    x, z, zero = of(kernels, a, b, np.zeros(3))
    bases = kernels.draw_bases(kernels.Gaussian(zero, zero), noise, positions)
    psi, others = (kernels.random_features(v, bases, phase) for v in (x, z))
    expected = np.exp(-((a[:, None] - b) ** 2).sum(-1) / 2)
    np.testing.assert_allclose(array(psi @ others.T), expected, atol=0.015)  # 4 / sqrt(D) is 0.009
    np.testing.assert_allclose(array(kernels.gaussian_kernel(x, z, 1.0)), expected, rtol=1e-12)


@BOTH
def test_a_basis_is_a_stretch_of_the_noise_that_goes_round(kernels: Any) -> None:
    mean, log_variance = np.array([1.0, -2.0, 0.5]), np.array([0.0, 2.0, -1.0])
    table = noise_table(5)
    noise, _, fixed = basis_constants(5, 7, 3)
    assert fixed.dtype == np.int32
    assert len(noise) == NOISE + 2
    assert 0 <= fixed.min() < fixed.max() < NOISE
    positions = np.array([0, 17, NOISE - 2, NOISE - 1])
    expected = mean + np.exp(log_variance / 2) * table[(positions[:, None] + np.arange(3)) % NOISE]
    m, v, n, p = of(kernels, mean, log_variance, noise, positions)
    np.testing.assert_allclose(array(kernels.draw_bases(kernels.Gaussian(m, v), n, p)), expected, rtol=1e-15)


@BOTH
def test_the_divergence_of_gaussians(kernels: Any, rng: np.random.Generator) -> None:
    numbers = rng.normal(size=(4, 3))
    m1, v1, m2, v2 = of(kernels, *numbers)
    p, q = kernels.Gaussian(m1, v1), kernels.Gaussian(m2, v2)
    assert float(kernels.gaussian_kl(p, p)) == 0
    expected = 0.0
    for a, va, b, vb in zip(*numbers, strict=True):
        one, other = stats.norm(a, np.exp(va / 2)), stats.norm(b, np.exp(vb / 2))
        expected += integrate.quad(
            lambda w, one=one, other=other: one.pdf(w) * (one.logpdf(w) - other.logpdf(w)), -30, 30, limit=200
        )[0]
    np.testing.assert_allclose(float(kernels.gaussian_kl(p, q)), expected, rtol=1e-6)
    assert float(kernels.gaussian_kl(p, q)) != pytest.approx(float(kernels.gaussian_kl(q, p)))


@BOTH
@pytest.mark.parametrize("how", ["l2", "minmax"])
def test_normalised_features(kernels: Any, how: str, rng: np.random.Generator) -> None:
    h = np.maximum(rng.normal(size=(6, 4)), 0)
    h[2] = 0
    actual = array(kernels.normalised(*of(kernels, h), how))
    norm = np.linalg.norm(h, axis=1, keepdims=True)
    expected = h / np.maximum(norm, 1e-12) if how == "l2" else h / h.max()
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_inferred_gaussians_and_their_initial_weights() -> None:
    features = np.random.default_rng(0).normal(size=(5, 4))
    expected = features.mean(0)
    for name, units in (("dense_0", 4), ("dense_1", 4), ("head", 8)):
        kernel = plan.initial_weights(0, f"kcl/prior/{name}/kernel", (4, units), 4)
        expected = expected @ kernel + plan.initial_weights(0, f"kcl/prior/{name}/bias", (units,), 4)
        if name != "head":
            expected = np.where(expected > 0, expected, np.expm1(expected))
    for kernels, prior in ((flax_kernels, "own['prior']"), (torch_kernels, "own.prior")):
        net = eval(prior, {"own": own_of(kernels, RFF, 4)})
        mean, log_variance = kernels.infer(net, *of(kernels, features))
        np.testing.assert_allclose(np.concatenate([array(mean), array(log_variance)]), expected, rtol=1e-12)


# -- both learners


@cache
def benchmark(scenario: Scenario = "domain") -> Benchmark:
    if scenario == "domain":
        return RotatedDigits(num_tasks=3, subset=180)
    return SplitDigits(num_tasks=5, scenario=scenario, subset=130)


def make(mode: str, hparams: AlgorithmHParams, scenario: Scenario = "domain", **options: Any) -> Any:
    stream = benchmark(scenario)
    optimizer = options.pop("optimizer", MOMENTUM)
    training = TrainingHParams(batch_size=8, dtype="float64", seed=1, **options)
    if mode == "jax":
        net: Any = sequel_flax.MLP((16, 12), stream.num_classes)
        tx = sequel_flax.build_optimizer(optimizer)
        return sequel_flax.make_learner(hparams, net, tx, stream, training, steps_per_call=1)
    net = sequel_lightning.MLP((16, 12), stream.num_classes, image_shape=stream.image_shape)
    factory = sequel_lightning.build_optimizer(optimizer)
    return sequel_lightning.make_learner(hparams, net, factory, stream, training)


def fit(learner: Any, scenario: Scenario = "domain", count: int | None = None) -> Any:
    for task in list(learner.hparams.training_tasks(benchmark(scenario), seed=1))[:count]:
        learner.fit_task(task, SILENT)
    return learner


@cache
def trained(mode: str, hparams: KCLHParams, scenario: Scenario = "domain") -> Any:
    return fit(make(mode, hparams, scenario), scenario)


def predict(learner: Any, x: Any, t: Any) -> FloatArray:
    """Return the logits of images `[n, H, W, C]`."""
    if learner.mode == "jax":
        return np.asarray(
            learner.algorithm.predict(learner.ts, learner.state, jnp.asarray(x), jnp.asarray(t))
        )
    with evaluating(learner.module), torch.no_grad():
        actual: FloatArray = learner.module.predict(
            torch.from_numpy(x).movedim(-1, 1), torch.from_numpy(t)
        ).numpy()
    return actual


def mixed(scenario: Scenario = "domain", each: int = 9) -> Any:
    """Return test samples of all tasks, shuffled."""
    parts = [task.test.take(np.arange(each)) for task in benchmark(scenario).tasks]
    x, y, t = (np.concatenate(a) for a in zip(*parts, strict=True))
    order = np.random.default_rng(0).permutation(len(y))
    return x[order], y[order], t[order]


OPTIMIZERS = {
    "momentum": OptimizerHParams(lr=0.01, momentum=0.8),
    "decay": OptimizerHParams(lr=0.01, momentum=0.8, nesterov=True, weight_decay=0.05),
    "adam": OptimizerHParams(type="adam", lr=0.002),
}
MODES = pytest.mark.parametrize("mode", ["pytorch", "jax"])


CLIPPED = replace(RFF, tau=1, lmd=-0.2, reset_optimizer=False, lr_decay=0.8)
SHORT: list[tuple[KCLHParams, str, Any, Scenario]] = [
    (replace(RFF, normalisation="minmax", task_parameters="current"), "adam", {"epochs_per_task": 2}, "task"),
]
SLOW: list[tuple[KCLHParams, str, Any, Scenario]] = [
    (RFF, "momentum", {}, "domain"),
    (RBF, "decay", {}, "task"),
    (RFF, "momentum", {}, "task"),
    (CLIPPED, "decay", {"grad_clip": 0.5}, "domain"),
    (replace(RBF, normalisation="minmax", bandwidth=3), "momentum", {}, "domain"),
]


@pytest.mark.parametrize(
    ("hparams", "optimizer", "options", "scenario"),
    [*SHORT, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_short_runs_agree_in_weights_predictions_and_accuracy(
    hparams: KCLHParams, optimizer: str, options: Any, scenario: Scenario
) -> None:
    """The settings as they come, lambda near 0 too: few steps, so that rounding errors stay small."""
    learners = [
        fit(make(mode, hparams, scenario, optimizer=OPTIMIZERS[optimizer], **options), scenario, count=2)
        for mode in ("pytorch", "jax")
    ]
    weights = [learner.weights() for learner in learners]
    assert difference(*weights) < 1e-8
    x, _, t = mixed(scenario)
    torch_, flax_ = (predict(learner, x, t) for learner in learners)
    np.testing.assert_allclose(torch_, flax_, rtol=1e-7, atol=1e-7)
    for task in benchmark(scenario).tasks[:2]:
        one, other = (learner.evaluate(task, "test") for learner in learners)
        assert one.score == other.score > 0.2
        np.testing.assert_allclose(one.loss, other.loss, rtol=1e-7)
    head = make("jax", hparams, scenario).weights()
    for name in ("head/kernel", "head/bias"):
        assert all(np.array_equal(actual[name], head[name]) for actual in weights)


@MODES
def test_the_parameters_of_each_task_move_in_its_turn(mode: str) -> None:
    """Beta alone does not: it is the same for every class, which cross-entropy does not see."""
    learner, last = make(mode, RFF), {}
    for k, task in enumerate(RFF.training_tasks(benchmark(), seed=1)):
        before = learner.weights()
        assert {"kcl/lmd", "kcl/gain", "kcl/offset"} <= before.keys()
        learner.fit_task(task, SILENT)
        last = learner.weights()
        for name in ("lmd", "gain"):
            changed = last[f"kcl/{name}"] != before[f"kcl/{name}"]
            np.testing.assert_array_equal(changed, np.arange(3) == k)
        for name in ("posterior/dense_0/kernel", "prior/head/bias"):
            assert np.abs(last[f"kcl/{name}"] - before[f"kcl/{name}"]).max() > 1e-6
    assert not last["kcl/offset"].any()


@MODES
@pytest.mark.parametrize("scenario", [pytest.param("domain", marks=pytest.mark.slow), "task"])
def test_a_mixed_batch_is_answered_as_its_tasks_are_alone(mode: str, scenario: Scenario) -> None:
    learner = trained(mode, RFF, scenario)
    x, _, t = mixed(scenario)
    whole = predict(learner, x, t)
    assert np.abs(whole).max() > 0.1
    for j in np.unique(t):
        np.testing.assert_allclose(
            predict(learner, x[t == j], t[t == j]), whole[t == j], rtol=1e-9, atol=1e-12
        )
    halves = [predict(learner, x[k : k + 5], t[k : k + 5]) for k in range(0, len(t), 5)]
    np.testing.assert_allclose(np.concatenate(halves), whole, rtol=1e-9, atol=1e-12)


@MODES
def test_the_answer_is_the_formula(mode: str) -> None:
    """Written out in NumPy from the learner's weights: the parameters of each task, or the current ones."""
    for hparams in (RFF, replace(RFF, task_parameters="current")):
        learner = trained(mode, hparams)
        w, (x, y, t) = learner.weights(), mixed()
        scale, shift = benchmark().normalisation.scale, benchmark().normalisation.shift

        def features(images: Any, w: Any = w, scale: Any = scale, shift: Any = shift) -> FloatArray:
            h = (images * scale + shift).reshape(len(images), -1)
            for name in ("dense_0", "dense_1"):
                h = np.maximum(h @ w[f"{name}/kernel"] + w[f"{name}/bias"], 0)
            return np.asarray(h / np.maximum(np.linalg.norm(h, axis=1, keepdims=True), 1e-12))

        fixed = plan.words(1, "bases of evaluation", count=40) % NOISE
        eps = noise_table(1)[(fixed[:, None] + np.arange(12, dtype=np.uint64)) % NOISE]
        phase = 2 * np.pi * plan.uniform(1, "phase of bases", count=40)
        expected = np.empty((len(y), 10))
        for j, task in enumerate(hparams.training_tasks(benchmark(), seed=1)):
            assert task.coreset is not None
            samples = task.coreset.take(np.arange(20))
            core = features(samples.x)
            h = core.mean(0)
            for name in ("dense_0", "dense_1"):
                h = h @ w[f"kcl/posterior/{name}/kernel"] + w[f"kcl/posterior/{name}/bias"]
                h = np.where(h > 0, h, np.expm1(h))
            mean, log_variance = np.split(
                h @ w["kcl/posterior/head/kernel"] + w["kcl/posterior/head/bias"], 2
            )
            omega = mean + np.exp(log_variance / 2) * eps
            psi, others = (np.sqrt(2 / 40) * np.cos(f @ omega.T + phase) for f in (core, features(x[t == j])))
            k = j if hparams.task_parameters == "own" else 2
            ridge = abs(w["kcl/lmd"][k]) + 0.01
            alpha = np.linalg.solve(psi @ psi.T + ridge * np.eye(20), np.eye(10)[samples.y])
            expected[t == j] = w["kcl/gain"][k] * others @ psi.T @ alpha + w["kcl/offset"][k]
        np.testing.assert_allclose(predict(learner, x, t), expected, rtol=1e-7, atol=1e-9)


@MODES
def test_a_task_not_yet_begun_is_answered_with_zeros(mode: str) -> None:
    learner = make(mode, RFF, "task")
    x, _, t = mixed("task")
    hidden = ~benchmark("task").mask[t]
    assert (predict(learner, x, t)[~hidden] == 0).all()
    fit(learner, "task", count=2)
    actual = predict(learner, x, t)
    later = t[:, None] > 1
    assert (actual[~hidden & later] == 0).all()
    assert (np.abs(actual[~hidden & ~later]) > 1e-6).all()
    assert (actual[hidden] == np.finfo(np.float64).min).all()


@pytest.mark.parametrize("scenario", ["domain", "task"])
def test_coresets_are_stratified_apart_from_training_and_the_same_for_ever(scenario: Scenario) -> None:
    stream = benchmark(scenario)
    tasks = list(RFF.training_tasks(stream, seed=1))
    for task, whole in zip(tasks, stream.tasks, strict=True):
        assert task.coreset is not None
        core, rest, both = (s.take(np.arange(len(s))) for s in (task.coreset, task.train, whole.train))
        classes, each = np.unique(core.y, return_counts=True)
        np.testing.assert_array_equal(classes, sorted(task.classes))
        assert set(each) == {20 // len(task.classes)}
        assert len(rest.y) + 20 == len(both.y)
        actual = sorted(x.tobytes() for x in np.concatenate([core.x, rest.x]))
        assert actual == sorted(x.tobytes() for x in both.x)
    cores = [task.coreset.take(np.arange(20)) for task in tasks if task.coreset is not None]
    expected = [np.concatenate(a) for a in zip(*cores, strict=True)]
    for mode in ("pytorch", "jax"):
        learner = make(mode, RFF, scenario)
        for k, task in enumerate(tasks):
            learner.fit_task(task, SILENT)
            for actual, wanted in zip(learner.memory_samples(), expected, strict=True):
                np.testing.assert_array_equal(actual, wanted[: 20 * (k + 1)])


@MODES
def test_a_coreset_larger_than_a_class_is_one_line_before_any_run(
    mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [
        "algo=kcl",
        "algo.task_given=true",
        "benchmark=rotateddigits",
        "benchmark.subset=300",
        f"mode={mode}",
    ]
    for size, message in (
        (400, "core_size must leave samples of every class"),
        (55, "core_size must divide"),
    ):
        assert main(["run", *line, f"algo.core_size={size}", f"run_dir={tmp_path / 'run'}"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"sequel: algo.{message}")
        assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# -- what an evaluation costs


def test_one_solve_for_each_task_present_however_many_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learner, solves = trained("pytorch", RFF), []
    original = torch_kernels.solve

    def counted(kernel: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        solves.append(tuple(kernel.shape))
        return original(kernel, *others)

    monkeypatch.setattr(torch_kernels, "solve", counted)
    x, _, t = mixed()
    for n, tasks in ((len(t), 3), (5, len(np.unique(t[:5])))):
        solves.clear()
        predict(learner, x[:n], t[:n])
        assert solves == [(20, 20)] * tasks
    solves.clear()
    predict(learner, x[t == 1], t[t == 1])
    assert solves == [(20, 20)]


def test_the_compiled_evaluation_is_linear_in_samples() -> None:
    """As XLA counts flops: the body of the loop over tasks, a branch for a present one, counts once."""
    learner = trained("jax", RFF)
    counted = {}
    for n in (64, 128, 256, 512):
        x, t = np.zeros((n, 8, 8, 1), np.uint8), np.zeros(n, np.int32)
        lowered = jax.jit(learner.algorithm.predict).lower(learner.ts, learner.state, x, t)
        cost: Any = lowered.compile().cost_analysis()
        counted[n] = (cost[0] if isinstance(cost, list) else cost)["flops"]
    steps = [(counted[2 * n] - counted[n]) / n for n in (64, 128, 256)]
    np.testing.assert_allclose(steps, steps[0], rtol=0.05)
    text = str(jax.make_jaxpr(learner.algorithm.predict)(learner.ts, learner.state, x, t))
    assert text.count("cholesky") >= 1
    assert text.count("cond[") >= 1
