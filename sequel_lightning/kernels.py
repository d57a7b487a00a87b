"""The parts of KCL: kernel ridge classifiers, and networks that infer distributions of random bases.

    f(h) = gamma * K(h, C) (K(C, C) + (|lambda| + 0.01) I)^-1 Y + beta, of features h; Y labels of a coreset C
    N(mu, diag exp(v)), (mu, v) = net(mean of features), net: H units, H, H, 2H, with ELU after the first two
    omega_d = mu + exp(v / 2) * eps_d, eps_d H consecutive numbers of one table of noise

Mirror: sequel_flax/kernels.py
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sequel_core.algorithms.kcl import KCLHParams
from sequel_core.stream.plan import initial_weights

RIDGE = 0.01


class Gaussian(NamedTuple):
    """A normal distribution of independent components."""

    mean: Tensor  # [H]
    log_variance: Tensor  # [H]


def normalised(features: Tensor, how: str) -> Tensor:
    """Return features `[n, H]` scaled to unit length (l2), or to [0, 1] by their extremes (minmax)."""
    if how == "l2":
        squares = features.square().sum(1, keepdim=True)
        return features / squares.clamp(min=1e-24).sqrt()
    low, high = features.min(), features.max()
    return (features - low) / (high - low).clamp(min=1e-12)


def random_features(features: Tensor, bases: Tensor, phase: Tensor) -> Tensor:
    """Return psi(h) = sqrt(2/D) cos(omega h + b) of features `[n, H]` and bases `[D, H]`, shape `[n, D]`."""
    return math.sqrt(2 / len(bases)) * (features @ bases.T + phase).cos()


def gaussian_kernel(a: Tensor, b: Tensor, bandwidth: float) -> Tensor:
    """Return exp(-||a_i - b_j||^2 / (2 bandwidth^2)) of rows `[n, H]` and `[m, H]`, shape `[n, m]`."""
    squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * (a @ b.T)
    return (-squares / (2 * bandwidth**2)).exp()


def solve(kernel: Tensor, ridge: Tensor, targets: Tensor) -> Tensor:
    """Return (K + ridge I)^-1 Y of a kernel `[N, N]` and targets `[N, num_classes]`, by Cholesky."""
    matrix = kernel + ridge * torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    wide = torch.promote_types(matrix.dtype, torch.float32)  # there is no solver for 16 bits
    matrix, right = matrix.to(wide), targets.to(wide)
    factor, failed = torch.linalg.cholesky_ex(matrix.detach())
    factor = factor.masked_fill(failed > 0, math.nan)  # as in JAX: a loss that is not finite, no exception
    solution = torch.cholesky_solve(right, factor)
    # d(M^-1 Y) = -M^-1 dM M^-1 Y: a third of the time of a gradient through the factor
    return torch.cholesky_solve(right - (matrix - matrix.detach()) @ solution, factor).to(targets.dtype)


def compare(
    extra: Any, hparams: KCLHParams, core: Tensor, h: Tensor, noise: Any, phase: Any, positions: Any
) -> tuple[Tensor, Tensor, Any]:
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
    source = infer(extra.posterior, core)
    bases = draw_bases(source, noise, positions)
    psi, others = (random_features(a, bases, phase) for a in (core, h))
    return psi @ psi.T, others @ psi.T, source


def classify(extra: Any, k: Any, kernel: Tensor, cross: Tensor, targets: Tensor) -> Tensor:
    """Return the logits `[n, num_classes]` from K(C, C), K(h, C), one-hot labels and task k's parameters."""
    coefficients = solve(kernel, extra.lmd[k].abs() + RIDGE, targets)
    offset = extra.offset[k].detach()  # the same for all classes: its gradient is 0 up to rounding
    logits: Tensor = extra.gain[k] * (cross @ coefficients) + offset
    return logits


def extra_parameters(hparams: KCLHParams, seed: int, num_tasks: int, width: int, dtype: Any) -> nn.Module:
    """Return the initial lambda, gamma and beta of every task, and for rff the networks that infer bases.

    Args:
        hparams: settings.
        seed: of the run.
        num_tasks: tasks of the stream.
        width: number of features, H.
        dtype: of the weights.
    """
    initial = {"lmd": hparams.lmd, "gain": 1.0, "offset": 0.0}
    module = nn.Module()
    for name, value in initial.items():
        module.register_parameter(name, nn.Parameter(torch.full((num_tasks,), value, dtype=dtype)))
    if hparams.kernel_type == "rff":
        for name in ("posterior", "prior"):
            module.add_module(name, inference_net(seed, f"kcl/{name}", width, dtype))
    return module


@torch.no_grad()
def inference_net(seed: int, path: str, width: int, dtype: Any) -> nn.Module:
    """Return a network from H features to a Gaussian, with the initial weights of the plan.

    Args:
        seed: of the run.
        path: its name in the canonical layout, for example `kcl/prior`.
        width: H.
        dtype: of the weights.
    """

    def layer(name: str, units: int) -> nn.Module:
        made = nn.Linear(width, units, dtype=dtype)
        kernel = initial_weights(seed, f"{path}/{name}/kernel", (width, units), width)
        made.weight.copy_(torch.from_numpy(kernel.T.copy()))
        made.bias.copy_(torch.from_numpy(initial_weights(seed, f"{path}/{name}/bias", (units,), width)))
        return made

    sizes = {"dense_0": width, "dense_1": width, "head": 2 * width}
    return nn.ModuleDict({name: layer(name, units) for name, units in sizes.items()})


def infer(net: Any, features: Tensor) -> Gaussian:
    """Return the Gaussian that a network infers from the mean of features `[n, H]`."""
    h = features.mean(0)
    for name in ("dense_0", "dense_1"):
        h = F.elu(net[name](h))
    return Gaussian(*net["head"](h).chunk(2))


def draw_bases(source: Gaussian, noise: Tensor, positions: Tensor) -> Tensor:
    """Return one basis for each position `[D]` at which its noise begins, `[D, H]`."""
    width = len(source.mean)
    eps = noise.unfold(0, width, 1)[positions]  # a view of overlapping rows, then a copy of some
    scale = (source.log_variance / 2).exp()
    return source.mean + scale * eps.to(scale.dtype)


def gaussian_kl(p: Gaussian, q: Gaussian) -> Tensor:
    """Return KL(p || q) = 1/2 sum_j [v_q - v_p + (exp(v_p) + (mu_p - mu_q)^2) / exp(v_q) - 1], shape ()."""
    ratio = (p.log_variance.exp() + (p.mean - q.mean).square()) / q.log_variance.exp()
    return 0.5 * (q.log_variance - p.log_variance + ratio - 1).sum()
