"""The pure functions of the algorithms against NumPy, on random trees."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sequel_core.algorithms.der import DERHParams
from sequel_core.algorithms.er_ace import ERACEHParams
from sequel_core.algorithms.gem import GEMHParams
from sequel_core.algorithms.si import SIHParams
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.task import Batch
from sequel_flax.algorithms.agem import project
from sequel_flax.algorithms.der import output_distance
from sequel_flax.algorithms.er_ace import batch_classes
from sequel_flax.algorithms.gem import solve_dual, task_weights
from sequel_flax.algorithms.lfl import feature_distance
from sequel_flax.algorithms.lwf import past_heads, softmax_distillation
from sequel_flax.algorithms.si import SIState, accumulate_path_integral, consolidate
from sequel_flax.objectives import cross_entropy, losses_of
from sequel_flax.quadratic import QuadraticState, penalty
from sequel_flax.quadratic import consolidate as consolidate_quadratic
from sequel_flax.replay import Outputs, mean_loss, over_classes
from tests.reference.replay import nonnegative_minimum

pytestmark = pytest.mark.usefixtures("_double_precision")

Tree = dict[str, FloatArray]
SHAPES = {"dense.weight": (3, 4), "dense.bias": (3,), "head.weight": (2, 3)}


@pytest.fixture
def _double_precision() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def tree(rng: np.random.Generator) -> Tree:
    return {k: rng.normal(size=shape) for k, shape in SHAPES.items()}


def arrays_of(arrays: Tree) -> dict[str, jax.Array]:
    return {k: jnp.asarray(a) for k, a in arrays.items()}


def assert_tree(actual: dict[str, jax.Array], expected: Tree) -> None:
    assert actual.keys() == expected.keys()
    for k, a in expected.items():
        np.testing.assert_allclose(actual[k], a, rtol=1e-12, atol=1e-14, err_msg=k)


def dot(a: Tree, b: Tree) -> float:
    return float(sum(np.vdot(a[k], b[k]) for k in a))


def test_a_projected_gradient_is_orthogonal_to_the_reference(rng: np.random.Generator) -> None:
    g, r = tree(rng), tree(rng)
    if dot(g, r) > 0:
        r = {k: -a for k, a in r.items()}
    actual = {k: np.asarray(a) for k, a in project(arrays_of(g), arrays_of(r)).items()}
    assert dot(g, r) < -0.1
    assert dot(actual, r) == pytest.approx(0, abs=1e-12)
    assert dot(actual, actual) == pytest.approx(dot(g, g) - dot(g, r) ** 2 / dot(r, r))


@pytest.mark.parametrize("reference", ["along", "orthogonal", "zero"])
def test_a_gradient_that_agrees_is_not_projected(reference: str, rng: np.random.Generator) -> None:
    g = tree(rng)
    r = {k: np.zeros_like(a) for k, a in g.items()}
    if reference == "along":
        r = {k: 3 * a for k, a in g.items()}
    elif reference == "orthogonal":
        g["dense.bias"][:], r["dense.bias"][:] = 0, 1
    actual = project(arrays_of(g), arrays_of(r))
    assert all(np.array_equal(actual[k], a) for k, a in g.items())


@pytest.mark.parametrize("count", [0, 3, 5])
@pytest.mark.parametrize("distance", ["sum", "mean"])
def test_output_distance(distance: str, count: int, rng: np.random.Generator) -> None:
    """The first samples of a draw of five count; the others are padding."""
    stored, logits = rng.normal(size=(2, 5, 4))
    squares = (stored - logits)[:count] ** 2
    expected = squares.sum() / max(count, 1) / (1 if distance == "sum" else 4)
    z, f = jnp.asarray(stored), jnp.asarray(logits)
    outputs = Outputs(f, f, jnp.zeros(5), None, z, count)
    hparams = DERHParams(distance=distance)  # type: ignore[arg-type]
    assert float(output_distance(outputs, hparams)) == pytest.approx(expected, rel=1e-12)
    assert float(output_distance(outputs._replace(stored=f), hparams)) == 0


def test_mean_loss_of_the_samples_that_count(rng: np.random.Generator) -> None:
    logits, labels = rng.normal(size=(2, 5, 4)), rng.integers(0, 4, (2, 5))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = -np.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    f = jnp.asarray(logits)
    batch, draw = (
        Outputs(f[k], f[k], jnp.asarray(losses[k]), None, None, count) for k, count in ((0, 5), (1, 2))
    )
    assert float(mean_loss(batch)) == pytest.approx(losses[0].mean())
    assert float(mean_loss(batch, draw)) == pytest.approx((losses[0].sum() + losses[1, :2].sum()) / 7)
    assert float(mean_loss(draw._replace(count=0))) == 0


def test_mean_loss_of_weighted_samples(rng: np.random.Generator) -> None:
    """The sum of the losses that count, over the sum of their weights."""
    losses, weights = rng.random((2, 5)), rng.random((2, 5))
    f = jnp.zeros((5, 4))
    batch, draw = (
        Outputs(f, f, jnp.asarray(losses[k]), jnp.asarray(weights[k]), None, count)
        for k, count in ((0, 5), (1, 2))
    )
    total = weights[0].sum() + weights[1, :2].sum()
    expected = (losses[0].sum() + losses[1, :2].sum()) / total
    assert float(mean_loss(batch, draw)) == pytest.approx(expected)
    assert float(mean_loss(draw._replace(count=0))) == 0


@pytest.mark.parametrize("classes", ["batch", "unseen"])
def test_rows_of_other_classes_get_no_gradient(classes: str, rng: np.random.Generator) -> None:
    """Classes 0 to 3 have been seen, 4 and 5 have not; the batch has 1 and 3."""
    y, seen = jnp.array([1, 3, 3]), jnp.arange(6) < 4
    kept = batch_classes(y, seen, ERACEHParams(classes=classes))  # type: ignore[arg-type]
    assert kept.tolist() == [False, True, False, True, classes == "unseen", classes == "unseen"]
    logits, batch = jnp.asarray(rng.normal(size=(3, 6))), Batch(jnp.zeros(3), y, jnp.zeros(3, int))

    def loss(logits: jax.Array, kept: jax.Array | None) -> jax.Array:
        return losses_of(cross_entropy(), over_classes(lambda x: logits, kept), batch).mean()

    gradient = jax.grad(loss)(logits, kept)
    assert (gradient[:, ~kept] == 0).all()
    p = np.exp(np.where(kept, logits, -np.inf))
    expected = (p / p.sum(1, keepdims=True) - np.eye(6)[y]) / 3
    np.testing.assert_allclose(gradient, expected, atol=1e-14)
    assert loss(logits, jnp.ones(6, bool)) == loss(logits, None)


def test_feature_distance(rng: np.random.Generator) -> None:
    h, old = rng.normal(size=(2, 6, 5))
    actual = feature_distance(jnp.asarray(h), jnp.asarray(old))
    assert float(actual) == pytest.approx(
        np.sum([(a - b) @ (a - b) for a, b in zip(h, old, strict=True)]) / 12
    )


def test_the_dual_of_gem_is_the_minimum_over_all_active_sets(rng: np.random.Generator) -> None:
    """Also with tasks without samples, equal gradients, more tasks than parameters, any lengths.

    The gradients of past tasks share a direction, so that numbers leave the active set again.
    """
    solve = jax.jit(solve_dual)
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
        v = np.asarray(solve(jnp.asarray(gram), jnp.asarray(linear)))
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
    weights = [task_weights(jnp.asarray(gram), jnp.asarray(b), hparams) for b in (violated, agreeing)]
    assert weights[0].tolist() == pytest.approx([2.5, 0.5] if rule == "add" else [2, 0.5], rel=1e-12)
    assert weights[1].tolist() == [0, 0]


CLASSES_OF_TASKS = np.array([[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]], bool)


@pytest.mark.parametrize("separate", [True, False])
def test_distillation_of_past_heads(separate: bool, rng: np.random.Generator) -> None:
    """Cross-entropy of softmaxes over the classes of each past task, or of all of them; NumPy, T = 2."""
    heads = past_heads(jnp.asarray(CLASSES_OF_TASKS), jnp.int32(2), separate)
    logits, old = (jnp.asarray(a) for a in 3 * rng.normal(size=(2, 4, 5)))
    expected = 0.0
    for columns in ([0, 1], [2, 3]) if separate else ([0, 1, 2, 3],):
        p, q = (np.exp(np.asarray(z)[:, columns] / 2) for z in (logits, old))
        p, q = (e / e.sum(1, keepdims=True) for e in (p, q))
        expected -= (q * np.log(p)).sum() / 4
    assert float(softmax_distillation(logits, old, heads, 2.0)) == pytest.approx(expected, rel=1e-12)
    gradient = jax.grad(softmax_distillation)(logits, logits, heads, 2.0)
    assert (gradient == 0).all()


def test_path_integral_adds_minus_the_gradient_times_the_step(rng: np.random.Generator) -> None:
    path, g, before, after = (tree(rng) for _ in range(4))
    actual = accumulate_path_integral(*map(arrays_of, (path, g, before, after)))
    assert_tree(actual, {k: path[k] - g[k] * after[k] + g[k] * before[k] for k in path})


@pytest.mark.parametrize("clamp", [False, True])
def test_si_consolidates_the_path(clamp: bool, rng: np.random.Generator) -> None:
    theta, anchor, omega, path = (tree(rng) for _ in range(4))
    omega = {k: abs(a) for k, a in omega.items()}
    expected = {k: omega[k] + path[k] / (np.square(theta[k] - anchor[k]) + 0.2) for k in path}
    assert min(a.min() for a in expected.values()) < 0
    if clamp:
        expected = {k: np.where(a < 0, 0, a) for k, a in expected.items()}
    state = SIState(arrays_of(anchor), arrays_of(omega), arrays_of(path))
    actual = consolidate(arrays_of(theta), state, SIHParams(xi=0.2, clamp=clamp))
    assert_tree(actual.importance, expected)
    assert_tree(actual.anchor, theta)
    assert_tree(actual.path, {k: np.zeros_like(a) for k, a in path.items()})


def test_the_quadratic_penalty_and_its_gradient(rng: np.random.Generator) -> None:
    theta, anchor, importance = (tree(rng) for _ in range(3))
    actual, gradient = jax.value_and_grad(penalty)(*map(arrays_of, (theta, anchor, importance)))
    difference = {k: theta[k] - anchor[k] for k in theta}
    assert float(actual) == pytest.approx(dot(importance, {k: a**2 for k, a in difference.items()}) / 2)
    assert_tree(gradient, {k: importance[k] * a for k, a in difference.items()})


@pytest.mark.parametrize("gamma", [1.0, 0.4])
def test_importance_decays_and_the_anchor_is_replaced(gamma: float, rng: np.random.Generator) -> None:
    theta, anchor, old, new = (tree(rng) for _ in range(4))
    state = QuadraticState(arrays_of(anchor), arrays_of(old))
    actual = consolidate_quadratic(arrays_of(theta), state, arrays_of(new), gamma=gamma)
    assert_tree(actual.importance, {k: gamma * old[k] + new[k] for k in old})
    assert_tree(actual.anchor, theta)


def test_separate_anchors_equal_one_anchor_up_to_a_constant(rng: np.random.Generator) -> None:
    """sum_k F_k (theta - theta_k)^2 minus the term of one anchor is the same number at every theta."""
    anchors, fishers = ([tree(rng) for _ in range(3)] for _ in range(2))
    fishers = [{k: np.maximum(a, 0) for k, a in f.items()} for f in fishers]
    state = QuadraticState(arrays_of(anchors[0]), arrays_of({k: 0 * a for k, a in fishers[0].items()}))
    for theta, fisher in zip(anchors, fishers, strict=True):
        state = consolidate_quadratic(arrays_of(theta), state, arrays_of(fisher), separate=True)
    assert_tree(state.importance, {k: fishers[0][k] + fishers[1][k] + fishers[2][k] for k in SHAPES})
    constants = []
    for params in (tree(rng) for _ in range(4)):
        squares = [{k: (params[k] - anchor[k]) ** 2 for k in params} for anchor in anchors]
        terms = [dot(fisher, square) for fisher, square in zip(fishers, squares, strict=True)]
        constants.append(sum(terms) / 2 - float(penalty(arrays_of(params), *state)))
    np.testing.assert_allclose(constants, constants[0], rtol=1e-10)


def test_a_reference_too_small_to_square_changes_nothing() -> None:
    gradient, reference = ({"w": jnp.float32(values)} for values in ([1.0, -2.0], [-1e-25, 1e-25]))
    np.testing.assert_array_equal(project(gradient, reference)["w"], gradient["w"])
