"""The parts of KCL: kernel ridge classifiers, and networks that infer distributions of random bases.

    f(h) = gamma * K(h, C) (K(C, C) + (|lambda| + 0.01) I)^-1 Y + beta, of features h; Y labels of a coreset C
    N(mu, diag exp(v)), (mu, v) = net(mean of features), net: H units, H, H, 2H, with ELU after the first two
    omega_d = mu + exp(v / 2) * eps_d, eps_d H consecutive numbers of one table of noise

Mirror: sequel_lightning/kernels.py
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sequel_core.algorithms.kcl import KCLHParams
from sequel_core.stream.plan import initial_weights
from sequel_flax.bundle import Params

RIDGE = 0.01


class Gaussian(NamedTuple):
    """A normal distribution of independent components."""

    mean: jax.Array  # [H]
    log_variance: jax.Array  # [H]


def normalised(features: jax.Array, how: str) -> jax.Array:
    """Return features `[n, H]` scaled to unit length (l2), or to [0, 1] by their extremes (minmax)."""
    if how == "l2":
        squares = jnp.sum(features**2, axis=1, keepdims=True)
        return features / jnp.sqrt(jnp.maximum(squares, 1e-24))
    low, high = features.min(), features.max()
    return (features - low) / jnp.maximum(high - low, 1e-12)


def random_features(features: jax.Array, bases: jax.Array, phase: jax.Array) -> jax.Array:
    """Return psi(h) = sqrt(2/D) cos(omega h + b) of features `[n, H]` and bases `[D, H]`, shape `[n, D]`."""
    return math.sqrt(2 / len(bases)) * jnp.cos(features @ bases.T + phase[None])


def gaussian_kernel(a: jax.Array, b: jax.Array, bandwidth: float) -> jax.Array:
    """Return exp(-||a_i - b_j||^2 / (2 bandwidth^2)) of rows `[n, H]` and `[m, H]`, shape `[n, m]`."""
    squares = jnp.sum(a**2, axis=1)[:, None] + jnp.sum(b**2, axis=1)[None] - 2 * (a @ b.T)
    return jnp.exp(-squares / (2 * bandwidth**2))


def solve(kernel: jax.Array, ridge: jax.Array, targets: jax.Array) -> jax.Array:
    """Return (K + ridge I)^-1 Y of a kernel `[N, N]` and targets `[N, num_classes]`, by Cholesky."""
    matrix = kernel + ridge * jnp.eye(len(kernel), dtype=kernel.dtype)
    wide = jnp.promote_types(matrix.dtype, jnp.float32)  # there is no solver for 16 bits
    solution: jax.Array = jax.scipy.linalg.solve(matrix.astype(wide), targets.astype(wide), assume_a="pos")
    return solution.astype(targets.dtype)


def compare(
    extra: Any, hparams: KCLHParams, core: jax.Array, h: jax.Array, noise: Any, phase: Any, positions: Any
) -> tuple[jax.Array, jax.Array, Any]:
    """Return K(C, C), K(h, C) and the Gaussian from which the bases are drawn, None for the kernel rbf.

    Args:
        extra: parameters, see `extra_parameters`.
        hparams: settings.
        core: normalised features of a coreset `[N, H]`.
        h: normalised features `[n, H]`.
        noise: see `sequel_core.algorithms.kcl.basis_constants`; None for the kernel rbf.
        phase: of each basis `[D]`; None for the kernel rbf.
        positions: where in the noise each basis begins `[D]`; None for the kernel rbf.
    """
    if hparams.kernel_type == "rbf":
        core_kernel, kernel = (gaussian_kernel(a, core, hparams.bandwidth) for a in (core, h))
        return core_kernel, kernel, None
    source = infer(extra["posterior"], core)
    bases = draw_bases(source, noise, positions)
    psi, others = (random_features(a, bases, phase) for a in (core, h))
    return psi @ psi.T, others @ psi.T, source


def classify(extra: Any, k: Any, kernel: jax.Array, cross: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the logits `[n, num_classes]` from K(C, C), K(h, C), one-hot labels and task k's parameters."""
    coefficients = solve(kernel, jnp.abs(extra["lmd"][k]) + RIDGE, targets)
    offset = jax.lax.stop_gradient(
        extra["offset"][k]
    )  # the same for all classes: its gradient is 0 up to rounding
    logits: jax.Array = extra["gain"][k] * (cross @ coefficients) + offset
    return logits


def extra_parameters(hparams: KCLHParams, seed: int, num_tasks: int, width: int, dtype: Any) -> Params:
    """Return the initial lambda, gamma and beta of every task, and for rff the networks that infer bases.

    Args:
        hparams: settings.
        seed: of the run.
        num_tasks: tasks of the stream.
        width: number of features, H.
        dtype: of the weights.
    """
    initial = {"lmd": hparams.lmd, "gain": 1.0, "offset": 0.0}
    params: Params = {name: jnp.full(num_tasks, value, dtype) for name, value in initial.items()}
    if hparams.kernel_type == "rff":
        for name in ("posterior", "prior"):
            params[name] = inference_net(seed, f"kcl/{name}", width, dtype)
    return params


def inference_net(seed: int, path: str, width: int, dtype: Any) -> Params:
    """Return a network from H features to a Gaussian, with the initial weights of the plan.

    Args:
        seed: of the run.
        path: its name in the canonical layout, for example `kcl/prior`.
        width: H.
        dtype: of the weights.
    """

    def layer(name: str, units: int) -> Params:
        shapes = {"kernel": (width, units), "bias": (units,)}
        return {
            leaf: jnp.asarray(initial_weights(seed, f"{path}/{name}/{leaf}", shape, width), dtype)
            for leaf, shape in shapes.items()
        }

    sizes = {"dense_0": width, "dense_1": width, "head": 2 * width}
    return {name: layer(name, units) for name, units in sizes.items()}


def infer(net: Params, features: jax.Array) -> Gaussian:
    """Return the Gaussian that a network infers from the mean of features `[n, H]`."""
    h = features.mean(axis=0)
    for name in ("dense_0", "dense_1"):
        h = jax.nn.elu(h @ net[name]["kernel"] + net[name]["bias"])
    return Gaussian(*jnp.split(h @ net["head"]["kernel"] + net["head"]["bias"], 2))


def draw_bases(source: Gaussian, noise: jax.Array, positions: jax.Array) -> jax.Array:
    """Return one basis for each position `[D]` at which its noise begins, `[D, H]`."""
    width = len(source.mean)
    eps = jax.vmap(lambda start: jax.lax.dynamic_slice(noise, (start,), (width,)))(positions)
    scale = jnp.exp(source.log_variance / 2)
    return source.mean[None] + scale[None] * eps.astype(scale.dtype)


def gaussian_kl(p: Gaussian, q: Gaussian) -> jax.Array:
    """Return KL(p || q) = 1/2 sum_j [v_q - v_p + (exp(v_p) + (mu_p - mu_q)^2) / exp(v_q) - 1], shape ()."""
    ratio = (jnp.exp(p.log_variance) + (p.mean - q.mean) ** 2) / jnp.exp(q.log_variance)
    return 0.5 * jnp.sum(q.log_variance - p.log_variance + ratio - 1)
