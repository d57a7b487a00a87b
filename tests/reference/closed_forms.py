"""Importances in the cases that have a closed form, after the first task of the rotated digits."""

from __future__ import annotations

import numpy as np

from sequel_core.stream import plan
from sequel_core.stream.arrays import FloatArray, IntArray
from tests.reference import network
from tests.reference.cases import TRAINING, benchmark
from tests.reference.network import Weights


def samples(positions: IntArray) -> tuple[FloatArray, IntArray]:
    """Return pixels `[n, D]` and labels of training samples of the first task."""
    data = benchmark("rotated")
    x, y, _ = data.tasks[0].train.take(positions)
    return (x.reshape(len(x), -1) / 255 - data.normalisation.mean[0]) / data.normalisation.std[0], y


def consolidated(count: int | None) -> tuple[FloatArray, IntArray]:
    """Return the samples of the end-of-task pass: the first `count`, or all if None."""
    total = len(benchmark("rotated").tasks[0].train)
    return samples(plan.permutation(TRAINING.seed, "consolidation", 0, count=total)[:count])


def logistic_fisher(weights: Weights, count: int | None) -> Weights:
    """Return the Fisher of a linear model: dCE/dW_{dc} = x_d (p_c - [y = c]), dCE/db_c = p_c - [y = c]."""
    x, y = consolidated(count)
    scores = np.exp(x @ weights["head/kernel"] + weights["head/bias"])
    error = scores / scores.sum(axis=1, keepdims=True) - np.eye(10)[y]
    return {
        "head/kernel": np.mean(x[:, :, None] ** 2 * error[:, None, :] ** 2, axis=0),
        "head/bias": np.mean(error**2, axis=0),
    }


def linear_mas(weights: Weights, count: int | None, size: int) -> Weights:
    """Return MAS's Omega of a linear model: d||f||^2/dW_{dc} = 2 f_c x_d, d||f||^2/db_c = 2 f_c.

    Args:
        weights: the weights of the model.
        count: the number of samples of the estimate; None for all.
        size: the number of samples whose gradients are summed before the absolute value is taken.
    """
    x, _ = consolidated(count)
    f = x @ weights["head/kernel"] + weights["head/bias"]
    starts = np.arange(0, len(x), size)
    each = {"head/kernel": 2 * x[:, :, None] * f[:, None, :], "head/bias": 2 * f}
    return {k: abs(np.add.reduceat(g, starts)).sum(axis=0) / len(x) for k, g in each.items()}


def sgd_si(theta: Weights, rate: float, xi: float) -> Weights:
    """Return SI's Omega after a task of plain SGD from `theta`: omega = rate * sum_steps g^2."""
    size, total = TRAINING.batch_size, len(benchmark("rotated").tasks[0].train)
    start, squares = theta, network.zeros(theta)
    for positions in plan.epoch_batches(TRAINING.seed, 0, 0, total, size):
        g = network.gradient(theta, *samples(positions))
        squares = {k: s + g[k] ** 2 for k, s in squares.items()}
        theta = {k: p - rate * g[k] for k, p in theta.items()}
    return {k: rate * s / ((theta[k] - start[k]) ** 2 + xi) for k, s in squares.items()}
