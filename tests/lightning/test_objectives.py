"""Objectives against float64 NumPy."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sequel_core.objectives import ObjectiveHParams
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.task import Batch
from sequel_core.stream.trees import LeafSpec
from sequel_lightning.objectives import (
    Objective,
    binary_cross_entropy,
    build_objective,
    cross_entropy,
    from_outputs,
    map_outputs,
    named_outputs,
    output_leaf,
    squared_error,
    token_cross_entropy,
)

N, K = 6, 4
WEIGHTS = (0.5, 2.0, 1.0, 0.0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def batch(y: Any) -> Batch:
    return Batch(torch.zeros(len(y)), torch.as_tensor(y), torch.zeros(len(y), dtype=torch.int64))


def applied(function: Any, outputs: Any, y: Any) -> NDArray[Any]:
    """Return a function of model and batch, for a network that returns these outputs."""
    values: NDArray[Any] = function(lambda x: torch.from_numpy(outputs), batch(y)).numpy()
    return values


def log_softmax(f: NDArray[Any]) -> NDArray[Any]:
    shifted = f - f.max(-1, keepdims=True)
    result: NDArray[Any] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def one_hot(y: NDArray[Any], k: int) -> NDArray[Any]:
    result: NDArray[Any] = np.eye(k)[y]
    return result


def normals(u: NDArray[Any]) -> NDArray[Any]:
    """Return the quantiles of the standard normal distribution, by bisection of its distribution."""
    erf = np.vectorize(__import__("math").erf)
    low, high = np.full(u.shape, -40.0), np.full(u.shape, 40.0)
    for _ in range(200):
        middle = (low + high) / 2
        below = 0.5 * (1 + erf(middle / np.sqrt(2))) < u
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return low


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("reduce", ["auto", "samples"])
def test_cross_entropy(
    smoothing: float, weights: tuple[float, ...] | None, reduce: str, rng: np.random.Generator
) -> None:
    """As torch's own, also its weighted mean."""
    f, y = rng.normal(size=(N, K)), rng.integers(0, K, N)
    objective = cross_entropy(smoothing, weights, reduce)
    w = np.ones(K) if weights is None else np.array(weights)
    target = (1 - smoothing) * one_hot(y, K) + smoothing / K
    expected = -(target * w * log_softmax(f)).sum(1)
    np.testing.assert_allclose(applied(objective.loss, f, y), expected, rtol=1e-12, atol=1e-15)
    assert objective.nll is not None
    assert objective.values is not None
    np.testing.assert_allclose(applied(objective.nll, f, y), -log_softmax(f)[np.arange(N), y], rtol=1e-12)
    scores = objective.values(torch.from_numpy(f), torch.from_numpy(y))
    assert scores.tolist() == (f.argmax(1) == y).tolist()
    assert objective.score == ("accuracy", True, True)
    if weights is None or reduce == "samples":
        assert objective.weight is None
        denominator = float(N)
    else:
        assert objective.weight is not None
        np.testing.assert_allclose(objective.weight(batch(y)).numpy(), w[y])
        denominator = w[y].sum()
        torchs = nn.CrossEntropyLoss(torch.tensor(weights).double(), label_smoothing=smoothing)
        mean = torchs(torch.from_numpy(f), torch.from_numpy(y))
        assert expected.sum() / denominator == pytest.approx(float(mean), rel=1e-12)
    if weights is None and not smoothing:
        assert objective.mean is not None
        assert applied(objective.mean, f, y) == pytest.approx(expected.sum() / denominator, rel=1e-12)
    else:
        assert objective.mean is None


def test_label_smoothing_leaves_masked_classes_out(rng: np.random.Generator) -> None:
    f, y = rng.normal(size=(N, K)), rng.integers(0, 2, N)
    masked = torch.from_numpy(f)
    masked[:, 2:] = torch.finfo(torch.float64).min
    target = 0.9 * one_hot(y, 2) + 0.05
    loss = cross_entropy(0.1).loss(lambda x: masked, batch(y))
    np.testing.assert_allclose(loss.numpy(), -(target * log_softmax(f[:, :2])).sum(1), rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.bool_, np.int64, np.float64])
def test_binary_cross_entropy(dtype: Any, rng: np.random.Generator) -> None:
    f, y = rng.normal(size=(N, K)), rng.integers(0, 2, (N, K)).astype(dtype)
    objective, p = binary_cross_entropy(), 1 / (1 + np.exp(-f))
    expected = -np.where(y > 0, np.log(p), np.log(1 - p)).sum(1)
    assert objective.nll is not None
    assert objective.values is not None
    assert objective.sample is not None
    np.testing.assert_allclose(applied(objective.loss, f, y), expected, rtol=1e-12)
    np.testing.assert_allclose(applied(objective.nll, f, y), expected, rtol=1e-12)
    scores = objective.values(torch.from_numpy(f), torch.from_numpy(y))
    np.testing.assert_allclose(scores.numpy(), ((f > 0) == (y > 0)).mean(1))
    u = rng.uniform(size=(N, K))
    drawn = objective.sample(torch.from_numpy(f), torch.from_numpy(u))
    assert drawn.tolist() == (u < p).tolist()


@pytest.mark.parametrize(("outputs", "targets"), [((N, 3), (N, 3)), ((N, 1), (N,)), ((N,), (N,))])
def test_squared_error(outputs: tuple[int, ...], targets: tuple[int, ...], rng: np.random.Generator) -> None:
    f, y, u = rng.normal(size=outputs), rng.normal(size=targets), rng.uniform(size=targets)
    objective, residual = squared_error(), (f.reshape(N, -1) - y.reshape(N, -1))
    assert objective.nll is not None
    assert objective.values is not None
    np.testing.assert_allclose(applied(objective.loss, f, y), (residual**2).sum(1) / 2, rtol=1e-12)
    np.testing.assert_allclose(applied(objective.nll, f, y), (residual**2).sum(1) / 2, rtol=1e-12)
    scores = objective.values(torch.from_numpy(f), torch.from_numpy(y))
    np.testing.assert_allclose(scores.numpy(), (residual**2).mean(1), rtol=1e-12)
    assert objective.score == ("squared error", False, False)
    assert objective.sample is not None
    assert objective.outcomes is not None
    drawn = objective.sample(torch.from_numpy(f), torch.from_numpy(u))
    expected = f.reshape(N, -1) + normals(u).reshape(N, -1)
    np.testing.assert_allclose(drawn.numpy(), expected, rtol=1e-9, atol=1e-12)
    ends = objective.sample(torch.zeros(2, 1), torch.tensor([0.0, 1.0]))
    assert bool(ends.isfinite().all())
    y_k, weights = objective.outcomes(torch.from_numpy(f))
    gradients = f.reshape(1, N, -1) - y_k.numpy()
    np.testing.assert_allclose(gradients, np.eye(residual.shape[1])[:, None].repeat(N, 1), atol=1e-12)
    assert weights.shape == (residual.shape[1], N)
    assert bool((weights == 1).all())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduce", ["tokens", "samples"])
def test_token_cross_entropy(smoothing: float, reduce: str, rng: np.random.Generator) -> None:
    f, y = rng.normal(size=(N, 5, K)), rng.integers(0, K, (N, 5))
    y[0, 1:], y[1], y[2, 3] = -1, -1, -1
    counts = (y >= 0).sum(1)
    objective = token_cross_entropy(-1, smoothing, reduce)
    target = (1 - smoothing) * one_hot(y.clip(0), K) + smoothing / K
    losses = -(target * log_softmax(f)).sum(2)
    summed = np.where(y >= 0, losses, 0).sum(1)
    loss = summed if reduce == "tokens" else summed / counts.clip(1)
    np.testing.assert_allclose(applied(objective.loss, f, y), loss, rtol=1e-12)
    if not smoothing:
        assert objective.nll is not None
        np.testing.assert_allclose(applied(objective.nll, f, y), summed, rtol=1e-12)
    assert objective.values is not None
    assert objective.score_weight is not None
    scores = objective.values(torch.from_numpy(f), torch.from_numpy(y))
    right = ((f.argmax(2) == y) & (y >= 0)).sum(1)
    np.testing.assert_allclose(scores.numpy(), right / counts.clip(1), rtol=1e-6)
    assert objective.score_weight(batch(y)).tolist() == counts.tolist()
    assert (objective.weight is None) == (reduce == "samples")
    if objective.weight is not None:
        assert objective.weight(batch(y)).tolist() == counts.tolist()
    if reduce == "tokens" and not smoothing:
        torchs = nn.CrossEntropyLoss(ignore_index=-1)(
            torch.from_numpy(f).flatten(0, 1), torch.from_numpy(y).flatten()
        )
        assert summed.sum() / counts.sum() == pytest.approx(float(torchs), rel=1e-12)


@pytest.mark.parametrize(
    ("objective", "shape"),
    [(cross_entropy(), (N, K)), (token_cross_entropy(), (N, 3, K))],
    ids=["classes", "tokens"],
)
def test_classes_are_drawn_from_the_softmax(
    objective: Objective, shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    f, u = rng.normal(size=shape), rng.uniform(size=shape[:-1])
    assert objective.sample is not None
    drawn = objective.sample(torch.from_numpy(f), torch.from_numpy(u)).numpy()
    cumulative = np.exp(log_softmax(f)).cumsum(-1)
    for index in np.ndindex(u.shape):
        c = drawn[index]
        assert (cumulative[index][c - 1] if c else 0) <= u[index] < cumulative[index][c]


def test_outcomes_of_classes(rng: np.random.Generator) -> None:
    f = rng.normal(size=(N, K))
    objective = cross_entropy()
    assert objective.outcomes is not None
    y, weights = objective.outcomes(torch.from_numpy(f))
    assert y.tolist() == np.arange(K)[:, None].repeat(N, 1).tolist()
    np.testing.assert_allclose(weights.numpy(), np.exp(log_softmax(f)).T, rtol=1e-12)


def test_from_outputs(rng: np.random.Generator) -> None:
    f, y = rng.normal(size=(2, N, K))

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs - y).abs().sum(1)

    objective = from_outputs(loss, target="y")
    np.testing.assert_allclose(applied(objective.loss, f, y), abs(f - y).sum(1), rtol=1e-12)
    assert (objective.nll, objective.values, objective.target) == (None, None, "y")
    assert objective.score == ("loss", False, False)
    likelihood = from_outputs(loss, nll=loss).nll
    assert likelihood is not None
    np.testing.assert_allclose(applied(likelihood, f, y), abs(f - y).sum(1), rtol=1e-12)


class Named(NamedTuple):
    logits: Any
    hidden: Any


@dataclass
class Fields:
    logits: Any
    hidden: Any


class Attributes(OrderedDict[str, Any]):
    """As a `ModelOutput` of Hugging Face: keys are attributes too."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        object.__setattr__(self, key, value)


STRUCTURES: list[Callable[[Any, Any], Any]] = [
    Named,
    Fields,
    lambda f, h: {"logits": f, "hidden": h},
    lambda f, h: Attributes(logits=f, hidden=h),
]


@pytest.mark.parametrize("make", STRUCTURES)
def test_outputs_of_several_arrays(make: Callable[[Any, Any], Any]) -> None:
    f, h = torch.zeros(2, 3), torch.ones(2, 8)
    outputs = make(f, h)
    assert output_leaf(outputs) is f
    assert output_leaf(outputs, "hidden") is h
    with pytest.raises(
        ValueError, match=r"an array other in what the network returns, got .*logits \[2, 3\]"
    ):
        output_leaf(outputs, "other")
    first = map_outputs(lambda a: a[:1], outputs)
    assert type(first) is type(outputs)
    assert [(k, a.shape[0]) for k, a in named_outputs(first)] == [("logits", 1), ("hidden", 1)]
    assert getattr(first, "logits", first if isinstance(first, Tensor) else None) is not f
    assert output_leaf(outputs) is f


def test_outputs_without_names() -> None:
    f, h = torch.zeros(2, 3), torch.ones(2, 8)
    assert output_leaf((f, h), "1") is h
    assert output_leaf((f, None)) is f
    assert output_leaf({"a": f, "loss": None}) is f
    assert type(map_outputs(lambda a: a[:1], (f, h))) is tuple
    with pytest.raises(
        ValueError, match=r"one array, or one called logits.*got tuple of 0 \[2, 3\], 1 \[2, 8\]"
    ):
        output_leaf((f, h))


def spec(y: Any, num_classes: int = K) -> StreamSpec:
    return StreamSpec(LeafSpec((3,)), num_classes, 1, "domain", np.ones((1, num_classes), bool), y=y)


@pytest.mark.parametrize(
    ("y", "name"),
    [
        (LeafSpec((), "int64"), "accuracy"),
        (LeafSpec((K,), "bool"), "label accuracy"),
        (LeafSpec((2,)), "squared error"),
        (LeafSpec((7,), "int64"), "token accuracy"),
    ],
    ids=str,
)
def test_the_objective_follows_from_the_targets(y: LeafSpec, name: str) -> None:
    assert build_objective(ObjectiveHParams(), spec(y)).score.name == name


def test_settings_of_objectives() -> None:
    f, y = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([1])
    hparams = ObjectiveHParams("cross_entropy", label_smoothing=0.5, class_weights=(1.0, 3.0))
    objective = build_objective(hparams, spec(LeafSpec((), "int64"), 2))
    expected = np.log(2) * (0.5 * 3 + 0.25 * (1 + 3))
    assert float(objective.loss(lambda x: f, batch(y))) == pytest.approx(expected, rel=1e-12)
    assert objective.weight is not None
    assert objective.weight(batch(y)).tolist() == [3.0]
    with pytest.raises(ValueError, match="one value for each value of a target"):
        squared_error().loss(lambda x: torch.zeros(1, 2), batch(torch.zeros(1, 3)))
