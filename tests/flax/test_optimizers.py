"""The built-in optimizers and clipping against torch, in float64."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from sequel_core.hparams import OptimizerHParams
from sequel_flax import build_optimizer
from sequel_flax.optimizers import clip_by_global_norm

SHAPES = {"kernel": (4, 3), "bias": (3,)}


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def torch_optimizer(h: OptimizerHParams, params: list[torch.Tensor]) -> torch.optim.Optimizer:
    if h.type == "sgd":
        return torch.optim.SGD(params, h.lr, h.momentum, weight_decay=h.weight_decay, nesterov=h.nesterov)
    family = torch.optim.Adam if h.type == "adam" else torch.optim.AdamW
    return family(params, h.lr, (h.beta1, h.beta2), h.eps, h.weight_decay)


@pytest.mark.parametrize(
    "hparams",
    [
        OptimizerHParams(lr=0.1),
        OptimizerHParams(lr=0.1, momentum=0.9),
        OptimizerHParams(lr=0.1, momentum=0.7, weight_decay=0.1),
        OptimizerHParams(lr=0.1, momentum=0.7, nesterov=True, weight_decay=0.1),
        OptimizerHParams(type="adam", lr=0.01, beta1=0.8, beta2=0.99, eps=1e-5),
        OptimizerHParams(type="adam", lr=0.01, weight_decay=0.1),
        OptimizerHParams(type="adamw", lr=0.01, weight_decay=0.1),
    ],
    ids=lambda h: f"{h.type} {h.momentum} {h.nesterov} {h.weight_decay} {h.eps}",
)
def test_fifty_steps_equal_those_of_torch(hparams: OptimizerHParams, rng: np.random.Generator) -> None:
    start = {k: rng.normal(size=shape) for k, shape in SHAPES.items()}
    theirs = {k: torch.tensor(v, requires_grad=True) for k, v in start.items()}
    expected = torch_optimizer(hparams, list(theirs.values()))
    tx = build_optimizer(hparams)
    ours = jax.tree.map(jnp.asarray, start)
    state = tx.init(ours)
    update = jax.jit(tx.update)
    for _ in range(50):
        gradient = {k: rng.normal(size=shape) for k, shape in SHAPES.items()}
        for k, p in theirs.items():
            p.grad = torch.tensor(gradient[k])
        expected.step()
        updates, state = update(gradient, state, ours)
        ours = optax.apply_updates(ours, updates)
    for k, p in theirs.items():
        np.testing.assert_allclose(ours[k], p.detach().numpy(), rtol=1e-12)
        assert np.abs(p.detach().numpy() - start[k]).max() > 0.05


@pytest.mark.parametrize("norm", [1e-3, 0.4999999, 0.5, 0.5000001, 40.0])
def test_clipping_equals_that_of_torch(norm: float, rng: np.random.Generator) -> None:
    gradient = {k: rng.normal(size=shape) for k, shape in SHAPES.items()}
    length = np.sqrt(sum((g**2).sum() for g in gradient.values()))
    gradient = {k: g * norm / length for k, g in gradient.items()}
    theirs = {k: torch.zeros(shape, dtype=torch.float64, requires_grad=True) for k, shape in SHAPES.items()}
    for k, p in theirs.items():
        p.grad = torch.tensor(gradient[k])
    torch.nn.utils.clip_grad_norm_(theirs.values(), 0.5)
    clip = clip_by_global_norm(0.5)
    ours, _ = clip.update(gradient, clip.init(gradient))
    for k, p in theirs.items():
        assert p.grad is not None
        np.testing.assert_allclose(ours[k], p.grad.numpy(), rtol=1e-12)
        np.testing.assert_allclose(ours[k], gradient[k] * min(1, 0.5 / norm), rtol=1e-5)
