"""Kernel continual learning in float64 NumPy, written from the paper (Derakhshani 2021) and its code.

For samples x of task k, with coreset C and one-hot labels Y; z and c are the normalised features of x and C:

    A = M^-1 Y, M = K(c, c) + (|lambda_k| + 0.01) I;  f = gamma_k K(z, c) A + beta_k
    L = CE(f, y) + tau KL(N(mu_r, e^v_r) || N(mu_p, e^v_p)), the second term only for rff
    rff  K(a, b) = psi(a) psi(b)^T, psi(a)_d = sqrt(2/D) cos(omega_d a + b_d), omega_d = mu_r + e^(v_r/2) e_d
         (mu_r, v_r) = posterior(mean of c), (mu_p, v_p) = prior(mean of z)
    rbf  K(a, b) = e^(-|a - b|^2 / (2 bandwidth^2))
    KL   = 1/2 sum_j [v_p - v_r + (e^v_r + (mu_r - mu_p)^2) / e^v_p - 1]

Backward pass, for any function L of A: dL/dY = M^-T dL/dA, dL/dM = -dL/dY A^T. The head of the network is not
used. Adding beta_k to all classes does not change CE, so its gradient is 0 and it stays 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Literal, NamedTuple

import numpy as np

from sequel_core.algorithms.kcl import NOISE, BasesPlanner, KCLHParams, noise_table
from sequel_core.stream import plan
from sequel_core.stream.arrays import FloatArray, SlotArray
from sequel_core.stream.task import Samples, Task
from tests.reference import network
from tests.reference.network import Weights
from tests.reference.streams import Reference, concatenate

Normalisation = Literal["l2", "minmax"]
FLOOR = 1e-12
NETS = ("posterior", "prior")
LAYERS = ("dense_0", "dense_1", "head")


@cache
def noise(seed: int) -> FloatArray:
    """Return the noise table from which the bases are read."""
    return noise_table(seed).astype(np.float64)


# -- the normalisation of features


def normalised(h: FloatArray, how: Normalisation) -> FloatArray:
    """Return features `[N, H]`: rows of unit length (l2), or values in [0, 1] (minmax)."""
    if how == "l2":
        return np.asarray(h / np.maximum(np.linalg.norm(h, axis=1, keepdims=True), FLOOR))
    return np.asarray((h - h.min()) / max(h.max() - h.min(), FLOOR))


def normalised_backward(h: FloatArray, how: Normalisation, d: FloatArray) -> FloatArray:
    """Return dL/dh for dL/dnormalised(h); equal extremes share the gradient equally."""
    u = normalised(h, how)
    if how == "l2":
        lengths = np.linalg.norm(h, axis=1, keepdims=True)
        along = np.where(lengths > FLOOR, (u * d).sum(axis=1, keepdims=True), 0)
        return np.asarray((d - along * u) / np.maximum(lengths, FLOOR))
    extent = h.max() - h.min()
    width = max(extent, FLOOR)
    d_width = -(d * u).sum() / width if extent > FLOOR else 0.0
    low, high = h == h.min(), h == h.max()
    d_low = -d.sum() / width - d_width
    return np.asarray(d / width + low * d_low / low.sum() + high * d_width / high.sum())


# -- inference networks: three layers, ELU after the first two


def infer(weights: Weights, net: str, mean: FloatArray) -> tuple[FloatArray, list[FloatArray]]:
    """Return the outputs `[2H]` of an inference network for mean features `[H]`, and its layers' inputs."""
    inputs = [mean]
    for layer in LAYERS:
        a = inputs[-1] @ weights[f"kcl/{net}/{layer}/kernel"] + weights[f"kcl/{net}/{layer}/bias"]
        inputs.append(a if layer == "head" else np.where(a > 0, a, np.expm1(a)))
    return inputs.pop(), inputs


def infer_backward(
    weights: Weights, net: str, inputs: list[FloatArray], d: FloatArray
) -> tuple[Weights, FloatArray]:
    """Return dL/dweights of an inference network and dL/dmean, for dL/doutputs."""
    gradient: Weights = {}
    for layer, h in zip(reversed(LAYERS), reversed(inputs), strict=True):
        gradient[f"kcl/{net}/{layer}/kernel"] = np.outer(h, d)
        gradient[f"kcl/{net}/{layer}/bias"] = d
        d = weights[f"kcl/{net}/{layer}/kernel"] @ d
        if layer != LAYERS[0]:
            d = d * np.where(h > 0, 1, h + 1)  # dELU/da = e^a = ELU + 1 if a < 0
    return gradient, d


def divergence(mu: FloatArray, v: FloatArray, mu_p: FloatArray, v_p: FloatArray) -> float:
    """Return KL(N(mu, e^v) || N(mu_p, e^v_p))."""
    return float(0.5 * (v_p - v + (np.exp(v) + (mu - mu_p) ** 2) / np.exp(v_p) - 1).sum())


# -- kernels


class Bases(NamedTuple):
    """Parameters of random Fourier features."""

    omega: FloatArray  # [D, H]
    phase: FloatArray  # b [D]

    def psi(self, a: FloatArray) -> FloatArray:
        """Return the features `[n, D]` of `[n, H]`."""
        return np.asarray(np.sqrt(2 / len(self.phase)) * np.cos(a @ self.omega.T + self.phase))

    def psi_backward(self, a: FloatArray, d: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return dL/da and dL/domega for dL/dpsi(a)."""
        d_angle = -np.sqrt(2 / len(self.phase)) * np.sin(a @ self.omega.T + self.phase) * d
        return d_angle @ self.omega, d_angle.T @ a


def rbf(a: FloatArray, b: FloatArray, bandwidth: float) -> FloatArray:
    """Return the kernel `[n, m]` of `[n, H]` and `[m, H]`."""
    squares = ((a[:, None] - b[None]) ** 2).sum(axis=2)
    return np.asarray(np.exp(-squares / (2 * bandwidth**2)))


def rbf_backward(
    a: FloatArray, b: FloatArray, bandwidth: float, d: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return dL/da and dL/db for dL/drbf(a, b). If a and b are the same array, the gradient is their sum."""
    d_difference = -(d * rbf(a, b, bandwidth))[:, :, None] * (a[:, None] - b[None]) / bandwidth**2
    return d_difference.sum(axis=1), -d_difference.sum(axis=0)


def ridge(lmd: float) -> float:
    """Return the number that is added to the diagonal of the kernel."""
    return abs(lmd) + 0.01


def coefficients(kernel: FloatArray, strength: float, targets: FloatArray) -> FloatArray:
    """Return the coefficients A `[N, C]` of kernel ridge regression."""
    return np.asarray(np.linalg.solve(kernel + strength * np.eye(len(kernel)), targets))


class KCL(Reference):
    """Kernel continual learning."""

    hparams: KCLHParams

    task: int
    planner: BasesPlanner
    positions: SlotArray  # positions of the bases of this step in the noise table [D]
    coresets: list[Samples]  # one per task so far

    # -- parameters, tasks and coresets

    def initial(self) -> Weights:
        tasks, width, seed = len(self.benchmark), self.widths[-1], self.training.seed
        theta = super().initial()
        theta["kcl/lmd"] = np.full(tasks, self.hparams.lmd)
        theta["kcl/gain"], theta["kcl/offset"] = np.ones(tasks), np.zeros(tasks)
        for net in NETS if self.hparams.kernel_type == "rff" else ():
            for layer in LAYERS:
                path, out = f"kcl/{net}/{layer}", 2 * width if layer == "head" else width
                for name, shape in ((f"{path}/kernel", (width, out)), (f"{path}/bias", (out,))):
                    theta[name] = plan.initial_weights(seed, name, shape, width)
        return theta

    def start(self, theta: Weights) -> None:
        self.planner, self.coresets = BasesPlanner(self.hparams.d_rn_f, self.training.seed), []

    def tasks(self) -> Iterator[Task]:
        yield from self.hparams.training_tasks(self.benchmark, self.training.seed)

    def start_task(self, theta: Weights, task: Task) -> Weights:
        assert task.coreset is not None
        self.task = task.index
        self.coresets.append(task.coreset.take(np.arange(len(task.coreset))))
        return theta

    def start_step(self, samples: Samples) -> None:
        self.positions = self.planner.next(samples.y, samples.t).starts

    # -- the loss

    def features(self, theta: Weights, samples: Samples) -> tuple[FloatArray, list[FloatArray]]:
        """Return the normalised features `[N, H]` and the inputs of the network's layers."""
        _, inputs = network.logits(encoder(theta), self.inputs(samples).x)
        return normalised(inputs[-1], self.hparams.normalisation), inputs

    def targets(self, coreset: Samples) -> FloatArray:
        """Return the one-hot labels of a coreset."""
        return np.asarray(np.eye(self.benchmark.num_classes)[coreset.y])

    def bases(self, posterior: FloatArray, positions: SlotArray) -> Bases:
        """Return the bases for a posterior `[2H]` and positions in the noise table."""
        mu, v = np.split(posterior, 2)
        phase = 2 * np.pi * plan.uniform(self.training.seed, "phase of bases", count=self.hparams.d_rn_f)
        return Bases(mu + np.exp(v / 2) * self.eps(positions), phase)

    def eps(self, positions: SlotArray) -> FloatArray:
        """Return the noise of the bases `[D, H]`."""
        places = positions.astype(np.int64)[:, None] + np.arange(self.widths[-1])
        return np.asarray(noise(self.training.seed)[places % NOISE])

    def objective(self, theta: Weights, samples: Samples) -> tuple[float, Weights]:
        h, k = self.hparams, self.task
        coreset = self.coresets[k]
        _, y, mask = self.inputs(samples)
        (z, batch_inputs), (c, core_inputs) = (self.features(theta, s) for s in (samples, coreset))
        gain, offset, lmd = (theta[f"kcl/{name}"][k] for name in ("gain", "offset", "lmd"))

        if h.kernel_type == "rff":
            posterior, posterior_inputs = infer(theta, "posterior", c.mean(axis=0))
            prior, prior_inputs = infer(theta, "prior", z.mean(axis=0))
            bases = self.bases(posterior, self.positions)
            psi_z, psi_c = bases.psi(z), bases.psi(c)
            among, across = psi_c @ psi_c.T, psi_z @ psi_c.T
        else:
            among, across = rbf(c, c, h.bandwidth), rbf(z, c, h.bandwidth)
        a = coefficients(among, ridge(lmd), self.targets(coreset))
        f = gain * (across @ a) + offset
        logs = network.log_softmax(f, mask)
        loss = -float(logs[np.arange(len(y)), y].mean())

        d_f = np.exp(logs)
        d_f[np.arange(len(y)), y] -= 1
        d_f /= len(y)
        gradient = {f"kcl/{name}": np.zeros(len(self.benchmark)) for name in ("lmd", "gain", "offset")}
        gradient["kcl/gain"][k] = (d_f * (across @ a)).sum()
        d_across, d_a = gain * d_f @ a.T, across.T @ (gain * d_f)
        d_among = -coefficients(among, ridge(lmd), d_a) @ a.T  # the kernel is symmetric
        gradient["kcl/lmd"][k] = np.sign(lmd) * np.trace(d_among)

        if h.kernel_type == "rff":
            d_psi_c = (d_among + d_among.T) @ psi_c + d_across.T @ psi_z
            d_c, d_omega = bases.psi_backward(c, d_psi_c)
            d_z, d_omega_z = bases.psi_backward(z, d_across @ psi_c)
            d_omega += d_omega_z
            (mu, v), (mu_p, v_p) = np.split(posterior, 2), np.split(prior, 2)
            loss += h.tau * divergence(mu, v, mu_p, v_p)
            d_kl = h.tau * (mu - mu_p) / np.exp(v_p)
            d_mu = d_omega.sum(axis=0) + d_kl
            d_v = (d_omega * self.eps(self.positions)).sum(axis=0) * np.exp(v / 2) / 2
            d_v += h.tau / 2 * (np.exp(v - v_p) - 1)
            d_v_p = h.tau / 2 * (1 - (np.exp(v) + (mu - mu_p) ** 2) / np.exp(v_p))
            d_posterior, d_mean = infer_backward(
                theta, "posterior", posterior_inputs, np.concatenate([d_mu, d_v])
            )
            d_c = d_c + d_mean / len(c)
            d_prior, d_mean = infer_backward(theta, "prior", prior_inputs, np.concatenate([-d_kl, d_v_p]))
            d_z = d_z + d_mean / len(z)
            gradient |= d_posterior | d_prior
        else:
            d_z, d_c = rbf_backward(z, c, h.bandwidth, d_across)
            for d in rbf_backward(c, c, h.bandwidth, d_among):
                d_c = d_c + d

        for inputs, d in ((batch_inputs, d_z), (core_inputs, d_c)):
            d_h = normalised_backward(inputs[-1], h.normalisation, d)
            d_logits = np.zeros((len(d), self.benchmark.num_classes))
            for name, g in network.backward(encoder(theta), inputs, d_logits, d_h).items():
                if not name.startswith("head/"):
                    gradient[name] = gradient.get(name, 0) + g
        return loss, gradient

    # -- prediction

    def predict(self, theta: Weights, samples: Samples) -> FloatArray:
        h = self.hparams
        z, _ = self.features(theta, samples)
        words = plan.words(self.training.seed, "bases of evaluation", count=h.d_rn_f)
        fixed = (words % NOISE).astype(np.int32)
        f = np.zeros((len(z), self.benchmark.num_classes))
        for t in set(samples.t.tolist()) & set(range(len(self.coresets))):
            of_task, k = samples.t == t, t if h.task_parameters == "own" else self.task
            c, _ = self.features(theta, self.coresets[t])
            if h.kernel_type == "rff":
                bases = self.bases(infer(theta, "posterior", c.mean(axis=0))[0], fixed)
                among, across = bases.psi(c) @ bases.psi(c).T, bases.psi(z[of_task]) @ bases.psi(c).T
            else:
                among, across = rbf(c, c, h.bandwidth), rbf(z[of_task], c, h.bandwidth)
            a = coefficients(among, ridge(theta["kcl/lmd"][k]), self.targets(self.coresets[t]))
            f[of_task] = theta["kcl/gain"][k] * (across @ a) + theta["kcl/offset"][k]
        return f

    def memory_samples(self) -> Samples:
        return concatenate(*self.coresets)


def encoder(theta: Weights) -> Weights:
    """Return the weights of the network, without the parameters of KCL."""
    return {k: p for k, p in theta.items() if not k.startswith("kcl/")}
