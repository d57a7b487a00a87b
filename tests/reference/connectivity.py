"""MC-SGD in float64 NumPy, written from the paper (Mirzadeh 2021, algorithm 1).

    w_hat_k  naive training on task k, from w_hat_{k-1} (the official code) or w_bar_{k-1}
    w_bar_0  = w_hat_0;  w_bar_k ~ argmin_w sum_{i=0..n} L_past(w_bar_{k-1} + i/n (w - w_bar_{k-1}))
                                                       + L_k(w_hat_k + i/n (w - w_hat_k))
             from w = w_bar_{k-1} + p (w_hat_k - w_bar_{k-1}), v <- mu v + g, w <- w - lr v

g is the gradient of the sum with respect to w (`sum`), the gradients at its points without the factor i/n
(`plain`), or what the official code adds up as it never empties a sum of gradients (`prefix`): after each of
the points 0..n the sum of those so far, so point i is counted n + 1 - i times.
"""

from __future__ import annotations

import numpy as np

from sequel_core.algorithms.mcsgd import MCSGDHParams, connection_batches
from sequel_core.stream.arrays import FloatArray, IntArray
from sequel_core.stream.memory import MemoryPlanner
from sequel_core.stream.task import Samples, Task
from tests.reference import network
from tests.reference.network import Weights
from tests.reference.replay import Replay


def between(a: Weights, b: Weights, share: float) -> Weights:
    """Return the point on the line from a (share 0) to b (1)."""
    return {k: (1 - share) * p + share * b[k] for k, p in a.items()}


class MCSGD(Replay):
    """Mode connectivity SGD; `theta` of the training is w_hat."""

    hparams: MCSGDHParams
    past_only = True

    task: int
    w_hat: Weights  # of the last task
    w_bar: Weights  # of the last task
    w: Weights  # on its way to the next w_bar
    velocity: Weights

    def make_planner(self) -> MemoryPlanner:
        draws = 1 if self.hparams.lmc_policy == "online" else 0
        return MemoryPlanner(
            self.hparams, self.benchmark.spec, self.training.seed, draws=draws, past_only=self.past_only
        )

    def start_task(self, theta: Weights, task: Task) -> Weights:
        self.task = task.index
        if self.task > 0 and self.hparams.lmc_start == "w_bar":
            theta = self.w_bar
        if self.task > 0 and self.hparams.lmc_policy == "online":
            self.begin(theta)
        return theta

    def end_step(self, theta: Weights, new: Weights, samples: Samples) -> None:
        super().end_step(theta, new, samples)
        if self.task > 0 and self.hparams.lmc_policy == "online":
            self.descend(new, self.contents(self.drawn(0)), samples)

    def end_task(self, theta: Weights, task: Task) -> None:
        self.w_hat = theta
        if task.index == 0:
            self.w_bar = theta
            return
        if self.hparams.lmc_policy == "offline":
            self.begin(theta)
            for pairs in connection_batches(self.hparams, self.held.t, task.index, self.training.seed):
                past, current = (self.filled(np.concatenate(kind)) for kind in zip(*pairs, strict=True))
                self.descend(theta, self.contents(past), self.contents(current))
        self.w_bar = self.w

    def evaluated(self, theta: Weights) -> Weights:
        return self.w_bar

    def alternatives(self, theta: Weights, samples: Samples) -> dict[str, FloatArray]:
        return {"w_hat": self.predict(self.w_hat, samples)}

    def filled(self, slots: IntArray) -> IntArray:
        """Return the slots without those that stand for none."""
        return np.asarray(slots[slots < self.planner.slots])

    def begin(self, w_hat: Weights) -> None:
        """Put w where its way starts."""
        self.w = between(self.w_bar, w_hat, self.hparams.lmc_init_position)
        self.velocity = network.zeros(w_hat)

    def descend(self, w_hat: Weights, past: Samples, current: Samples) -> None:
        """Take one step of w."""
        h = self.hparams
        g = network.plus(self.line(self.w_bar, self.w, past), self.line(w_hat, self.w, current))
        self.velocity = {k: h.lmc_momentum * v + g[k] for k, v in self.velocity.items()}
        self.w = {k: p - h.lmc_lr * self.velocity[k] for k, p in self.w.items()}

    def line(self, start: Weights, w: Weights, samples: Samples) -> Weights:
        """Return what the line from `start` to `w` adds to g, on samples; 0 where there are none."""
        h, n = self.hparams, self.hparams.lmc_line_samples
        total = network.zeros(w)
        if len(samples.y) == 0:
            return total
        for i in range(n + 1):
            _, slope = self.cross_entropy(between(start, w, i / n), samples)
            count = {"sum": i / n, "plain": 1, "prefix": n + 1 - i}[h.lmc_gradient]
            share = count / (h.lmc_batch_size if h.lmc_loss == "mean_over_batch_size" else 1)
            total = {k: g + share * slope[k] for k, g in total.items()}
        return total
