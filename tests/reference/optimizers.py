"""SGD, Adam and clipping as in torch.optim, in float64 NumPy.

    both   g <- g + wd theta
    SGD    v <- mu v + g (0 at first);  theta <- theta - lr v
    Adam   m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
           theta <- theta - lr (m / (1 - b1^n)) / (sqrt(v / (1 - b2^n)) + eps), n the step from 1
    clip   g <- g min(1, c / (|g| + 1e-6)), before the optimizer, |g| over all arrays together
"""

from __future__ import annotations

import numpy as np

from sequel_core.hparams import OptimizerHParams
from tests.reference.network import Weights, dot


class Optimizer:
    """One of the above, with its moments."""

    def __init__(self, hparams: OptimizerHParams) -> None:
        assert hparams.type in ("sgd", "adam")
        assert not hparams.nesterov
        self.hparams = hparams
        self.steps = 0
        self.first: Weights = {}
        self.second: Weights = {}

    def step(self, theta: Weights, gradient: Weights, rate: float) -> Weights:
        """Return the new weights; one that has no gradient stays as it is."""
        h, new = self.hparams, dict(theta)
        self.steps += 1
        for k, slope in gradient.items():
            g = slope + h.weight_decay * theta[k]
            m = self.first.get(k, np.zeros_like(g))
            v = self.second.get(k, np.zeros_like(g))
            if h.type == "sgd":
                self.first[k] = move = h.momentum * m + g
            else:
                self.first[k] = m = h.beta1 * m + (1 - h.beta1) * g
                self.second[k] = v = h.beta2 * v + (1 - h.beta2) * g**2
                move = (m / (1 - h.beta1**self.steps)) / (np.sqrt(v / (1 - h.beta2**self.steps)) + h.eps)
            new[k] = theta[k] - rate * move
        return new


def clipped(gradient: Weights, max_norm: float | None) -> Weights:
    """Return the gradient, scaled down where it is longer than `max_norm`."""
    if max_norm is None:
        return gradient
    factor = min(1.0, max_norm / (dot(gradient, gradient) ** 0.5 + 1e-6))
    return {k: factor * g for k, g in gradient.items()}
