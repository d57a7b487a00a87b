"""BiC's correction: fits to synthetic logits in both frameworks, against Newton's method in NumPy."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sequel_core.algorithms.bic import BiCHParams
from sequel_core.stream.arrays import FloatArray, IntArray
from sequel_flax.second_phase import sgd_step as flax_step
from sequel_lightning import attach
from sequel_lightning.gradients import gradients
from sequel_lightning.second_phase import sgd_step as torch_step

flax_bic, torch_bic = (import_module(f"sequel_{plugin}.algorithms.bic") for plugin in ("flax", "lightning"))
HPARAMS = BiCHParams(phase_lr=0.1)
BLOCK = np.array([False, False, False, True, True])


def planted(count: int) -> tuple[FloatArray, IntArray]:
    """Return logits whose new block is 2 z + 3, and labels drawn from softmax(z)."""
    rng = np.random.default_rng(0)
    z = rng.normal(0, 2, (count, 5))
    y = (z + rng.gumbel(size=z.shape)).argmax(axis=1)
    return np.where(BLOCK, 2 * z + 3, z), y


def newton(z: FloatArray, y: IntArray) -> FloatArray:
    """Return beta and gamma that minimise the cross-entropy, by Newton's method."""
    line, one = np.array([0.4, -1.0]), np.eye(5)[y]
    features = np.where(BLOCK[:, None], np.stack([z, np.ones_like(z)], axis=2), 0)  # df/d(beta, gamma)
    for _ in range(30):
        f = np.where(BLOCK, line[0] * z + line[1], z)
        p = np.exp(f - np.logaddexp.reduce(f, axis=1, keepdims=True))
        gradient = np.einsum("nc,nck->k", p - one, features)
        mean = np.einsum("nc,nck->nk", p, features)
        hessian = np.einsum("nc,nck,ncl->kl", p, features, features) - mean.T @ mean
        line = line - np.linalg.solve(hessian, gradient)
    return line


def same(logits: Any) -> Any:
    """Return the logits, which have no masks."""
    return logits


def fit_torch(z: FloatArray, y: IntArray) -> list[float]:
    logits, labels, block = torch.from_numpy(z), torch.from_numpy(y), torch.from_numpy(BLOCK)
    line = torch_bic.identity(logits)
    velocity = {name: torch.zeros_like(v) for name, v in line.items()}
    for _ in range(400):
        line = {name: v.detach().requires_grad_() for name, v in line.items()}
        loss = torch_bic.correction_loss(line, logits, labels, block, same).mean()
        (gradient,) = gradients(loss, line)
        with torch.no_grad():
            line, velocity = torch_step(line, velocity, gradient, 0.1, HPARAMS)
    return [float(line["beta"]), float(line["gamma"])]


def fit_flax(z: FloatArray, y: IntArray) -> list[float]:
    line = flax_bic.identity(jnp.asarray(z))
    velocity = jax.tree.map(jnp.zeros_like, line)
    logits, labels, block = map(jnp.asarray, (z, y, BLOCK))

    @jax.jit
    def step(line: Any, velocity: Any) -> Any:
        gradient = jax.grad(lambda c: flax_bic.correction_loss(c, logits, labels, block, same).mean())
        return flax_step(line, velocity, gradient(line), 0.1, HPARAMS)

    for _ in range(400):
        line, velocity = step(line, velocity)
    return [float(line["beta"]), float(line["gamma"])]


@pytest.mark.parametrize("fit", [fit_torch, fit_flax], ids=["lightning", "flax"])
def test_the_fit_finds_the_planted_correction(fit: Any) -> None:
    z, y = planted(20_000)
    fitted = fit(z, y)
    np.testing.assert_allclose(fitted, newton(z, y), rtol=1e-6)
    np.testing.assert_allclose(fitted, [0.5, -1.5], atol=0.03)


def test_no_correction_changes_nothing() -> None:
    z, _ = planted(10)
    logits = torch.from_numpy(z)
    ours = torch_bic.corrected(logits, torch_bic.identity(logits), torch.from_numpy(BLOCK))
    theirs = flax_bic.corrected(jnp.asarray(z), flax_bic.identity(jnp.asarray(z)), jnp.asarray(BLOCK))
    np.testing.assert_array_equal(ours.numpy(), z)
    np.testing.assert_array_equal(np.asarray(theirs), z)


def test_bic_cannot_be_attached() -> None:
    with pytest.raises(AttributeError, match="BiC cannot be attached"):
        attach.BiC  # noqa: B018
