"""Objectives against NumPy and closed forms."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from scipy.special import log_softmax, softmax
from scipy.stats import norm

from sequel_core.objectives import ObjectiveHParams, Score
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.task import Batch
from sequel_core.stream.trees import LeafSpec
from sequel_flax.objectives import (
    Objective,
    binary_cross_entropy,
    build_objective,
    cross_entropy,
    from_outputs,
    output_leaf,
    squared_error,
    token_cross_entropy,
)

RNG = np.random.default_rng(0)
LOGITS, LABELS = RNG.normal(size=(6, 4)), np.array([0, 3, 1, 1, 2, 0])
WEIGHTS = (0.5, 2.0, 1.0, 3.0)
TOKENS = np.array([[1, 2, -100], [-100, 0, 3], [0, 1, 2]])
TOKEN_LOGITS = RNG.normal(size=(3, 3, 4))
VALUES, PREDICTED = RNG.normal(size=(5, 3)), RNG.normal(size=(5, 3))
SEVERAL = RNG.random((5, 3)) < 0.5


def batch(x: Any, y: Any) -> Batch:
    return Batch(jnp.asarray(x), jnp.asarray(y), jnp.zeros(len(y), int))


def identity(x: Any) -> Any:
    """Return the inputs: a network whose outputs are given."""
    return x


def mean(objective: Objective, samples: Batch) -> float:
    """Return sum(loss) / sum(weight)."""
    losses = np.asarray(objective.loss(identity, samples))
    weights = np.ones_like(losses) if objective.weight is None else np.asarray(objective.weight(samples))
    return float(losses.sum() / weights.sum())


def _reference_cross_entropy(smoothing: float, weights: tuple[float, ...]) -> FloatArray:
    """Return sum_c q_c w_c (-log p_c) with q the smoothed one-hot label."""
    q = (1 - smoothing) * np.eye(4)[LABELS] + smoothing / 4
    losses: FloatArray = -(q * np.asarray(weights) * log_softmax(LOGITS, axis=1)).sum(1)
    return losses


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_cross_entropy(smoothing: float, weights: tuple[float, ...] | None) -> None:
    samples = batch(LOGITS, LABELS)
    expected = _reference_cross_entropy(smoothing, weights or (1.0,) * 4)
    plain = -log_softmax(LOGITS, axis=1)[np.arange(6), LABELS]
    for reduce in ("samples", "auto"):
        objective = cross_entropy(smoothing, weights, reduce)
        np.testing.assert_allclose(objective.loss(identity, samples), expected, rtol=1e-5)
        assert objective.nll is not None
        np.testing.assert_allclose(objective.nll(identity, samples), plain, rtol=1e-5)
        total = 6 if weights is None or reduce == "samples" else np.asarray(weights)[LABELS].sum()
        assert mean(objective, samples) == pytest.approx(expected.sum() / total, rel=1e-5)
        assert (objective.mean is None) is bool(smoothing or weights)
    assert cross_entropy().mean is not None
    assert float(cross_entropy().mean(identity, samples)) == pytest.approx(plain.mean(), rel=1e-5)  # type: ignore[misc]
    assert objective.score == Score("accuracy", True, True)
    right = (LOGITS.argmax(1) == LABELS).astype(float)
    np.testing.assert_array_equal(objective.values(samples.x, samples.y), right)  # type: ignore[misc]
    assert objective.classification


def test_label_smoothing_leaves_out_masked_classes() -> None:
    """With two of four classes masked, the loss is that of the two others."""
    masked = np.where([True, True, False, False], LOGITS, np.finfo(np.float32).min)
    labels = LABELS % 2
    two = batch(LOGITS[:, :2], labels)
    expected = cross_entropy(0.2).loss(identity, two)
    np.testing.assert_allclose(cross_entropy(0.2).loss(identity, batch(masked, labels)), expected, rtol=1e-5)


def test_binary_cross_entropy() -> None:
    p = 1 / (1 + np.exp(-PREDICTED))
    expected = -np.where(SEVERAL, np.log(p), np.log(1 - p)).sum(1)
    objective = binary_cross_entropy()
    for y in (SEVERAL, SEVERAL.astype(np.int32), SEVERAL.astype(np.float32)):
        samples = batch(PREDICTED, y)
        for function in (objective.loss, objective.nll):
            np.testing.assert_allclose(function(identity, samples), expected, rtol=1e-5)  # type: ignore[misc]
        right = ((PREDICTED > 0) == SEVERAL).mean(1)
        np.testing.assert_allclose(objective.values(samples.x, samples.y), right)  # type: ignore[misc]
    assert objective.score == Score("label accuracy", True, True)


def test_squared_error() -> None:
    objective = squared_error()
    samples = batch(PREDICTED, VALUES)
    squares = (PREDICTED - VALUES) ** 2
    np.testing.assert_allclose(objective.loss(identity, samples), 0.5 * squares.sum(1), rtol=1e-5)
    np.testing.assert_allclose(objective.values(samples.x, samples.y), squares.mean(1), rtol=1e-5)  # type: ignore[misc]
    assert objective.score == Score("squared error", False, False)
    one = squares[:, 0]
    for f in (PREDICTED[:, :1], PREDICTED[:, 0]):
        for y in (VALUES[:, :1], VALUES[:, 0]):
            np.testing.assert_allclose(objective.loss(identity, batch(f, y)), 0.5 * one, rtol=1e-5)
    log_density = norm.logpdf(PREDICTED, VALUES).sum(1) + 1.5 * np.log(2 * np.pi)
    assert objective.nll is not None
    np.testing.assert_allclose(objective.nll(identity, samples), -log_density, rtol=1e-5)
    with pytest.raises(ValueError, match=r"for each value of a target, \[5, 3\], got \[5, 2\]; set num_cla"):
        objective.loss(identity, batch(PREDICTED[:, :2], VALUES))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduce", ["tokens", "samples"])
def test_token_cross_entropy(smoothing: float, reduce: str) -> None:
    objective = token_cross_entropy(label_smoothing=smoothing, reduce=reduce)
    samples = batch(TOKEN_LOGITS, TOKENS)
    log_p = log_softmax(TOKEN_LOGITS, axis=-1)
    losses, plain, right = np.zeros(3), np.zeros(3), np.zeros(3)
    count = np.array([2, 2, 3])
    for b in range(3):
        for k in range(3):
            if (c := TOKENS[b, k]) != -100:
                plain[b] -= log_p[b, k, c]
                losses[b] -= (1 - smoothing) * log_p[b, k, c] + smoothing * log_p[b, k].mean()
                right[b] += TOKEN_LOGITS[b, k].argmax() == c
    per_sample = losses if reduce == "tokens" else losses / count
    np.testing.assert_allclose(objective.loss(identity, samples), per_sample, rtol=1e-5)
    np.testing.assert_allclose(objective.nll(identity, samples), plain, rtol=1e-5)  # type: ignore[misc]
    expected = losses.sum() / 7 if reduce == "tokens" else per_sample.mean()
    assert mean(objective, samples) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(objective.values(samples.x, samples.y), right / count, rtol=1e-6)  # type: ignore[misc]
    np.testing.assert_array_equal(objective.score_weight(samples), count)  # type: ignore[misc]


# -- targets drawn from the model


def test_sampled_classes_follow_the_probabilities() -> None:
    u = (np.arange(1000) + 0.5) / 1000
    logits = np.broadcast_to(LOGITS[0], (1000, 4))
    drawn = np.asarray(cross_entropy().sample(jnp.asarray(logits), jnp.asarray(u)))  # type: ignore[misc]
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 1000, softmax(LOGITS[0]), atol=2e-3)
    tokens = token_cross_entropy().sample(jnp.asarray(logits)[None], jnp.asarray(u)[None])  # type: ignore[misc]
    np.testing.assert_array_equal(tokens[0], drawn)
    several = binary_cross_entropy().sample(jnp.asarray(logits), jnp.asarray(np.repeat(u[:, None], 4, 1)))  # type: ignore[misc]
    np.testing.assert_allclose(np.asarray(several).mean(0), 1 / (1 + np.exp(-LOGITS[0])), atol=2e-3)


def test_sampled_values_are_normal() -> None:
    u = np.array([[0.0, 0.5], [0.975, 1.0]])
    drawn = np.asarray(squared_error().sample(jnp.ones((2, 2)), jnp.asarray(u)))  # type: ignore[misc]
    np.testing.assert_allclose([drawn[0, 1], drawn[1, 0]], [1, 1 + norm.ppf(0.975)], rtol=1e-5)
    assert np.isfinite(drawn).all()


def _gradients(objective: Objective, outputs: FloatArray, y: Any) -> FloatArray:
    """Return the gradient of the nll of each sample by its outputs."""
    assert objective.nll is not None
    nll = objective.nll
    return np.asarray(jax.grad(lambda f: nll(lambda _: f, batch(outputs, y)).sum())(jnp.asarray(outputs)))


def test_outcomes_of_classes_give_the_fisher_by_the_outputs() -> None:
    """E (p - e_c)^2 = p (1 - p) for each output."""
    objective = cross_entropy()
    targets, weights = objective.outcomes(jnp.asarray(LOGITS))  # type: ignore[misc]
    total = sum(
        np.asarray(w)[:, None] * _gradients(objective, LOGITS, y) ** 2
        for y, w in zip(targets, weights, strict=True)
    )
    p = softmax(LOGITS, axis=1)
    np.testing.assert_allclose(total, p * (1 - p), rtol=1e-4)


def test_outcomes_of_values_give_the_fisher_by_the_outputs() -> None:
    """The Fisher information of a normal distribution of unit variance is 1."""
    objective = squared_error()
    targets, weights = objective.outcomes(jnp.asarray(PREDICTED))  # type: ignore[misc]
    total = sum(
        np.asarray(w)[:, None] * _gradients(objective, PREDICTED, y) ** 2
        for y, w in zip(targets, weights, strict=True)
    )
    np.testing.assert_allclose(total, np.ones_like(PREDICTED), rtol=1e-5)


# -- outputs


@struct.dataclass
class ModelOutput:
    """A class like those of the Hugging Face Hub's Flax models."""

    logits: Any
    hidden: Any = None


def test_output_leaf() -> None:
    a, b = jnp.ones((2, 3)), jnp.zeros((2, 8))
    assert output_leaf(a) is a
    assert output_leaf((a,)) is a
    assert output_leaf({"scores": a}) is a
    assert output_leaf({"logits": a, "hidden": b}) is a
    assert output_leaf(ModelOutput(a, b)) is a
    assert output_leaf(ModelOutput(a, b), "hidden") is b
    assert output_leaf((a, b), "1") is b
    for outputs, name, message in (
        (
            (a, b),
            None,
            r"needs one array, or one called logits .* got tuple of \[0\] \[2, 3\], \[1\] \[2, 8\]; call",
        ),
        ((a, b), "2", "needs an array 2 in what"),
        ({"scores": a}, "logits", r"an array logits .* got dict of \['scores'\] \[2, 3\]; call the"),
        (a, "hidden", r"an array hidden .* got \[2, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            output_leaf(outputs, name)


def test_built_in_objectives_take_structured_outputs() -> None:
    samples = batch(LOGITS, LABELS)
    expected = cross_entropy().loss(identity, samples)
    losses = cross_entropy().loss(lambda x: ModelOutput(x, jnp.zeros(3)), samples)
    np.testing.assert_array_equal(losses, expected)


# -- settings


def spec(y: Any, num_classes: int = 4) -> StreamSpec:
    return StreamSpec(LeafSpec((3,)), num_classes, 1, "domain", np.ones((1, num_classes), bool), y=y)


def test_auto_depends_on_the_targets() -> None:
    for y, name in (
        (LeafSpec((), "int64"), "accuracy"),
        (LeafSpec((3,), "int64"), "token accuracy"),
        (LeafSpec((3,), "bool"), "label accuracy"),
        (LeafSpec((3,), "float32"), "squared error"),
        (LeafSpec((), "float32"), "squared error"),
    ):
        assert build_objective(ObjectiveHParams(), spec(y)).score.name == name
    with pytest.raises(ValueError, match="no objective is built in for targets a \\[\\]"):
        build_objective(ObjectiveHParams(), spec({"a": LeafSpec(())}))


def test_settings_reach_the_loss() -> None:
    samples = batch(LOGITS, LABELS)
    hparams = ObjectiveHParams("cross_entropy", label_smoothing=0.2, class_weights=WEIGHTS)
    objective = build_objective(hparams, spec(LeafSpec((), "int64")))
    expected = _reference_cross_entropy(0.2, WEIGHTS)
    np.testing.assert_allclose(objective.loss(identity, samples), expected, rtol=1e-5)
    assert mean(objective, samples) == pytest.approx(expected.sum() / np.asarray(WEIGHTS)[LABELS].sum())
    tokens = build_objective(
        ObjectiveHParams("token_cross_entropy", ignore_index=2), spec(LeafSpec((3,), "int64"))
    )
    assert tokens.weight is not None
    np.testing.assert_array_equal(tokens.weight(batch(TOKEN_LOGITS, TOKENS)), [2, 3, 2])
    with pytest.raises(ValueError, match="label_smoothing must be"):
        cross_entropy(label_smoothing=1.0)


def test_from_outputs() -> None:
    objective = from_outputs(lambda outputs, y: jnp.abs(outputs["a"] - y), score=Score("error", False, False))
    samples = batch(VALUES, VALUES[:, 0])
    losses = objective.loss(lambda x: {"a": x[:, 1]}, samples)
    np.testing.assert_allclose(losses, np.abs(VALUES[:, 1] - VALUES[:, 0]), rtol=1e-6)
    assert objective.nll is None
