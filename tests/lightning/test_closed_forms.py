"""The pure functions of the algorithms against NumPy, on random trees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sequel_core.algorithms.der import DERHParams
from sequel_core.algorithms.er_ace import ERACEHParams
from sequel_core.algorithms.gem import GEMHParams
from sequel_core.algorithms.si import SIHParams
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.task import Batch
from sequel_lightning import quadratic
from sequel_lightning.algorithms import agem, der, er_ace, gem, lfl, lwf, si
from sequel_lightning.objectives import cross_entropy, sample_losses
from sequel_lightning.replay import Outputs, mean_loss, over_classes
from tests.reference.replay import nonnegative_minimum

Tree = dict[str, FloatArray]
SHAPES = {"dense.weight": (3, 4), "dense.bias": (3,), "head.weight": (2, 3)}


def tree(rng: np.random.Generator) -> Tree:
    return {k: rng.normal(size=shape) for k, shape in SHAPES.items()}


def tensors(arrays: Tree) -> dict[str, Tensor]:
    return {k: torch.from_numpy(a) for k, a in arrays.items()}


def assert_tree(actual: dict[str, Tensor], expected: Tree) -> None:
    assert actual.keys() == expected.keys()
    for k, a in expected.items():
        np.testing.assert_allclose(actual[k].numpy(), a, rtol=1e-12, atol=1e-14, err_msg=k)


def dot(a: Tree, b: Tree) -> float:
    return float(sum(np.vdot(a[k], b[k]) for k in a))


def test_a_projected_gradient_is_orthogonal_to_the_reference(rng: np.random.Generator) -> None:
    g, r = tree(rng), tree(rng)
    if dot(g, r) > 0:
        r = {k: -a for k, a in r.items()}
    actual = {k: a.numpy() for k, a in agem.project(tensors(g), tensors(r)).items()}
    assert dot(g, r) < -0.1
    assert dot(actual, r) == pytest.approx(0, abs=1e-12)
    assert dot(actual, actual) == pytest.approx(dot(g, g) - dot(g, r) ** 2 / dot(r, r))


@pytest.mark.parametrize("reference", ["along", "orthogonal", "zero"])
def test_a_gradient_that_agrees_is_left_alone(reference: str, rng: np.random.Generator) -> None:
    g = tree(rng)
    r = {k: np.zeros_like(a) for k, a in g.items()}
    if reference == "along":
        r = {k: 3 * a for k, a in g.items()}
    elif reference == "orthogonal":
        g["dense.bias"][:], r["dense.bias"][:] = 0, 1
    actual = agem.project(tensors(g), tensors(r))
    assert all(np.array_equal(actual[k].numpy(), a) for k, a in g.items())


@pytest.mark.parametrize("count", [0, 3, 5])
@pytest.mark.parametrize("distance", ["sum", "mean"])
def test_output_distance(distance: str, count: int, rng: np.random.Generator) -> None:
    """The first samples of a draw of five count; the others are padding."""
    stored, logits = rng.normal(size=(2, 5, 4))
    squares = (stored - logits)[:count] ** 2
    expected = squares.sum() / max(count, 1) / (1 if distance == "sum" else 4)
    z, f = torch.from_numpy(stored), torch.from_numpy(logits)
    outputs = Outputs(f, f, torch.zeros(5), None, z, count)
    hparams = DERHParams(distance=distance)  # type: ignore[arg-type]
    assert float(der.output_distance(outputs, hparams)) == pytest.approx(expected, rel=1e-12)
    assert float(der.output_distance(outputs._replace(stored=f), hparams)) == 0


def test_mean_loss_is_of_all_samples_that_count(rng: np.random.Generator) -> None:
    losses, w = rng.uniform(size=(2, 2, 5))
    values, weights = torch.from_numpy(losses), torch.from_numpy(w)
    batch, draw = Outputs((), (), values[0], None, None, 5), Outputs((), (), values[1], None, None, 2)
    assert float(mean_loss(batch)) == pytest.approx(losses[0].mean(), rel=1e-12)
    mean = (losses[0].sum() + losses[1, :2].sum()) / 7
    assert float(mean_loss(batch, draw)) == pytest.approx(mean, rel=1e-12)
    assert float(mean_loss(draw._replace(count=0))) == 0
    batch, draw = batch._replace(weights=weights[0]), draw._replace(weights=weights[1])
    weighted = (losses[0].sum() + losses[1, :2].sum()) / (w[0].sum() + w[1, :2].sum())
    assert float(mean_loss(batch, draw)) == pytest.approx(weighted, rel=1e-12)
    assert float(mean_loss(draw._replace(count=0))) == 0


@pytest.mark.parametrize("classes", ["batch", "unseen"])
def test_rows_of_other_classes_get_no_gradient(classes: str, rng: np.random.Generator) -> None:
    """Classes 0 to 3 have been seen, 4 and 5 have not; the batch has 1 and 3."""
    y, seen = torch.tensor([1, 3, 3]), torch.arange(6) < 4
    kept = er_ace.batch_classes(y, seen, ERACEHParams(classes=classes))  # type: ignore[arg-type]
    assert kept.tolist() == [False, True, False, True, classes == "unseen", classes == "unseen"]
    logits = torch.from_numpy(rng.normal(size=(3, 6))).requires_grad_()
    batch = Batch(torch.zeros(3), y, torch.zeros(3, dtype=torch.int64))

    def loss(kept: Tensor | None) -> Tensor:
        return sample_losses(cross_entropy(), over_classes(lambda x: logits, kept), batch).mean()

    (gradient,) = torch.autograd.grad(loss(kept), logits)
    assert (gradient[:, ~kept] == 0).all()
    p = np.exp(np.where(kept, logits.detach(), -np.inf))
    expected = (p / p.sum(1, keepdims=True) - np.eye(6)[y]) / 3
    np.testing.assert_allclose(gradient, expected, atol=1e-14)
    assert loss(torch.ones(6, dtype=torch.bool)) == loss(None)


def test_feature_distance(rng: np.random.Generator) -> None:
    h, old = rng.normal(size=(2, 6, 5))
    actual = lfl.feature_distance(torch.from_numpy(h), torch.from_numpy(old))
    assert float(actual) == pytest.approx(
        np.sum([(a - b) @ (a - b) for a, b in zip(h, old, strict=True)]) / 12
    )


def test_the_dual_of_gem_is_the_minimum_over_all_active_sets(rng: np.random.Generator) -> None:
    """Also with tasks without samples, equal gradients, more tasks than parameters, any lengths.

    The gradients of past tasks share a direction, so that numbers leave the active set again.
    """
    positive = 0
    for trial in range(60):
        references, g, shared = (rng.normal(size=(*k, 2 + trial % 6)) for k in ((6,), (), ()))
        references, g = references + 2 * shared, g - 2 * shared
        if trial % 3 == 1:
            references[1], references[2] = 2 * references[0], 0
        gram, linear = references @ references.T, references @ g
        expected = nonnegative_minimum(gram, linear)
        least = 0.5 * expected @ gram @ expected + linear @ expected  # for references of any lengths
        if trial % 3 == 2:
            references *= np.array([1e-9, 1, 1, 1e6, 1, 1])[:, None]
            gram, linear = references @ references.T, references @ g
        v = gem.solve_dual(gram, linear)
        assert (v >= 0).all()
        assert 0.5 * v @ gram @ v + linear @ v == pytest.approx(least, rel=1e-10, abs=1e-12)
        lengths = np.linalg.norm(references, axis=1)
        assert (references @ (g + v @ references) >= -1e-10 * lengths).all()
        positive += (v > 0).sum() > 1
    assert positive > 10


@pytest.mark.parametrize("rule", ["add", "bound"])
def test_the_margin_of_gem(rule: str) -> None:
    """Two orthogonal gradients of length 1, of which the first is violated: v = (2, 0) without a margin."""
    hparams, gram = GEMHParams(margin=0.5, margin_rule=rule), np.eye(2)  # type: ignore[arg-type]
    violated, agreeing = np.array([-2.0, 1.0]), np.array([2.0, 1.0])
    weights = [gem.task_weights(gram, b, hparams) for b in (violated, agreeing)]
    assert weights[0].tolist() == pytest.approx([2.5, 0.5] if rule == "add" else [2, 0.5], rel=1e-12)
    assert weights[1].tolist() == [0, 0]


CLASSES_OF_TASKS = np.array([[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]], bool)


@pytest.mark.parametrize("separate", [True, False])
def test_distillation_of_past_heads(separate: bool, rng: np.random.Generator) -> None:
    """Cross-entropy of softmaxes over the classes of each past task, or of all of them; NumPy, T = 2."""
    heads = lwf.past_heads(torch.from_numpy(CLASSES_OF_TASKS), torch.tensor(2), separate)
    logits, old = (torch.from_numpy(a) for a in 3 * rng.normal(size=(2, 4, 5)))
    expected = 0.0
    for columns in ([0, 1], [2, 3]) if separate else ([0, 1, 2, 3],):
        p, q = (np.exp(z.numpy()[:, columns] / 2) for z in (logits, old))
        p, q = (e / e.sum(1, keepdims=True) for e in (p, q))
        expected -= (q * np.log(p)).sum() / 4
    assert float(lwf.softmax_distillation(logits, old, heads, 2.0)) == pytest.approx(expected, rel=1e-12)
    logits.requires_grad_()
    loss = lwf.softmax_distillation(logits, logits.detach(), heads, 2.0)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient == 0).all()


def test_path_integral_adds_minus_the_gradient_times_the_step(rng: np.random.Generator) -> None:
    path, g, before, after = (tree(rng) for _ in range(4))
    expected = {k: path[k] - g[k] * after[k] + g[k] * before[k] for k in path}
    actual = si.accumulate_path_integral(*map(tensors, (path, g, before, after)))
    assert_tree(actual, expected)


@pytest.mark.parametrize("clamp", [False, True])
def test_si_consolidates_the_path(clamp: bool, rng: np.random.Generator) -> None:
    theta, anchor, omega, path = (tree(rng) for _ in range(4))
    omega = {k: abs(a) for k, a in omega.items()}
    expected = {k: omega[k] + path[k] / (np.square(theta[k] - anchor[k]) + 0.2) for k in path}
    assert min(a.min() for a in expected.values()) < 0
    if clamp:
        expected = {k: np.where(a < 0, 0, a) for k, a in expected.items()}
    state = si.SIState(tensors(anchor), tensors(omega), tensors(path))
    actual = si.consolidate(tensors(theta), state, SIHParams(xi=0.2, clamp=clamp))
    assert_tree(actual.importance, expected)
    assert_tree(actual.anchor, theta)
    assert_tree(actual.path, {k: np.zeros_like(a) for k, a in path.items()})


def test_the_quadratic_penalty_and_its_gradient(rng: np.random.Generator) -> None:
    theta, anchor, importance = (tree(rng) for _ in range(3))
    weights = {k: p.requires_grad_() for k, p in tensors(theta).items()}
    actual = quadratic.penalty(weights, tensors(anchor), tensors(importance))
    away = {k: theta[k] - anchor[k] for k in theta}
    assert actual.item() == pytest.approx(dot(importance, {k: a**2 for k, a in away.items()}) / 2)
    (3 * actual).backward()
    gradient = {k: p.grad for k, p in weights.items() if p.grad is not None}
    assert_tree(gradient, {k: 3 * importance[k] * a for k, a in away.items()})


@pytest.mark.parametrize("gamma", [1.0, 0.4])
def test_the_past_decays_and_is_anchored_at_the_end_of_the_task(
    gamma: float, rng: np.random.Generator
) -> None:
    theta, anchor, old, new = (tree(rng) for _ in range(4))
    state = quadratic.QuadraticState(tensors(anchor), tensors(old))
    actual = quadratic.consolidate(tensors(theta), state, tensors(new), gamma=gamma)
    assert_tree(actual.importance, {k: gamma * old[k] + new[k] for k in old})
    assert_tree(actual.anchor, theta)


def test_separate_anchors_collapse_into_one_up_to_a_constant(rng: np.random.Generator) -> None:
    """sum_k F_k (theta - theta_k)^2 differs by one number from the collapsed term, at every theta."""
    anchors, fishers = ([tree(rng) for _ in range(3)] for _ in range(2))
    fishers = [{k: np.maximum(a, 0) for k, a in f.items()} for f in fishers]
    state = quadratic.QuadraticState(tensors(anchors[0]), tensors({k: 0 * a for k, a in fishers[0].items()}))
    for theta, fisher in zip(anchors, fishers, strict=True):
        state = quadratic.consolidate(tensors(theta), state, tensors(fisher), separate=True)
    assert_tree(state.importance, {k: fishers[0][k] + fishers[1][k] + fishers[2][k] for k in SHAPES})
    constants = []
    for at in (tree(rng) for _ in range(4)):
        terms = [dot(f, {k: (at[k] - a[k]) ** 2 for k in at}) for a, f in zip(anchors, fishers, strict=True)]
        constants.append(sum(terms) / 2 - float(quadratic.penalty(tensors(at), *state)))
    np.testing.assert_allclose(constants, constants[0], rtol=1e-10)


def test_a_reference_too_small_to_square_changes_nothing() -> None:
    gradient, reference = {"w": torch.tensor([1.0, -2.0])}, {"w": torch.tensor([-1e-25, 1e-25])}
    assert torch.equal(agem.project(gradient, reference)["w"], gradient["w"])
