"""SGD, Adam and gradient clipping as in PyTorch, in float64 NumPy.

both   g <- g + wd theta
SGD    v <- mu v + g, v = 0 at first;  theta <- theta - lr v
Adam   m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
       theta <- theta - lr (m / (1 - b1^n)) / (sqrt(v / (1 - b2^n)) + eps), n the step from 1
clip   g <- g min(1, c / (|g| + 1e-6)), before the optimizer; |g| is the norm over all arrays
"""

from __future__ import annotations

import numpy as np

from sequel_core.hparams import OptimizerHParams, TrainingHParams
from tests.reference.network import Weights, dot


class Optimizer:
    """SGD or Adam, with its moments."""

    def __init__(self, hparams: OptimizerHParams) -> None:
        assert hparams.type in ("sgd", "adam")
        assert not hparams.nesterov
        self.hparams = hparams
        self.steps = 0
        self.first: Weights = {}
        self.second: Weights = {}

    def step(self, theta: Weights, gradient: Weights, rate: float) -> Weights:
        """Return the new weights. A weight without a gradient does not change."""
        h, new = self.hparams, dict(theta)
        self.steps += 1
        for k, raw in gradient.items():
            g = raw + h.weight_decay * theta[k]
            m = self.first.get(k, np.zeros_like(g))
            v = self.second.get(k, np.zeros_like(g))
            if h.type == "sgd":
                self.first[k] = update = h.momentum * m + g
            else:
                self.first[k] = m = h.beta1 * m + (1 - h.beta1) * g
                self.second[k] = v = h.beta2 * v + (1 - h.beta2) * g**2
                update = (m / (1 - h.beta1**self.steps)) / (np.sqrt(v / (1 - h.beta2**self.steps)) + h.eps)
            new[k] = theta[k] - rate * update
        return new


def clip(gradient: Weights, training: TrainingHParams) -> Weights:
    """Return the gradient, clipped as the training settings say."""
    bound = training.grad_clip
    if bound is None or training.grad_clip_algorithm == "norm":
        return clip_by_norm(gradient, bound)
    return {k: g.clip(-bound, bound) for k, g in gradient.items()}


def clip_by_norm(gradient: Weights, max_norm: float | None) -> Weights:
    """Return the gradient, scaled down if its norm is above `max_norm`."""
    if max_norm is None:
        return gradient
    factor = min(1.0, max_norm / (dot(gradient, gradient) ** 0.5 + 1e-6))
    return {k: factor * g for k, g in gradient.items()}
