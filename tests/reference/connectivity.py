"""MC-SGD in float64 NumPy, written from the paper (Mirzadeh 2021, algorithm 1).

    w_hat_k  naive training on task k, starting at w_hat_{k-1} (the official code) or w_bar_{k-1}
    w_bar_0  = w_hat_0;  w_bar_k ~ argmin_w sum_{i=0..n} L_past(w_bar_{k-1} + i/n (w - w_bar_{k-1}))
                                                       + L_k(w_hat_k + i/n (w - w_hat_k))
             starting at w = w_bar_{k-1} + p (w_hat_k - w_bar_{k-1}), v <- mu v + g, w <- w - lr v

g depends on `lmc_gradient`:

    sum      the gradient of the sum with respect to w
    plain    the sum of the gradients at the points, without the factor i/n
    prefix   as in the official code, which never resets its accumulated gradients: the sum over the points
             0..n of the gradients so far, so point i counts n + 1 - i times
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


def interpolate(a: Weights, b: Weights, position: float) -> Weights:
    """Return a + position * (b - a): a at position 0, b at position 1."""
    return {k: (1 - position) * p + position * b[k] for k, p in a.items()}


class MCSGD(Replay):
    """Mode connectivity SGD. The weights `theta` that are trained are w_hat."""

    hparams: MCSGDHParams
    past_only = True

    task: int
    w_hat: Weights  # at the end of the last task
    w_bar: Weights  # at the end of the last task
    w: Weights  # the next w_bar, while it is optimised
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
            self.start_connection(theta)
        return theta

    def end_step(self, theta: Weights, new: Weights, samples: Samples) -> None:
        super().end_step(theta, new, samples)
        if self.task > 0 and self.hparams.lmc_policy == "online":
            self.connection_step(new, self.contents(self.read_slots(0)), samples)

    def end_task(self, theta: Weights, task: Task) -> None:
        self.w_hat = theta
        if task.index == 0:
            self.w_bar = theta
            return
        if self.hparams.lmc_policy == "offline":
            self.start_connection(theta)
            for pairs in connection_batches(self.hparams, self.memory.t, task.index, self.training.seed):
                past, current = (self.without_padding(np.concatenate(s)) for s in zip(*pairs, strict=True))
                self.connection_step(theta, self.contents(past), self.contents(current))
        self.w_bar = self.w

    def evaluated_weights(self, theta: Weights) -> Weights:
        return self.w_bar

    def alternatives(self, theta: Weights, samples: Samples) -> dict[str, FloatArray]:
        return {"w_hat": self.predict(self.w_hat, samples)}

    def without_padding(self, slots: IntArray) -> IntArray:
        """Return the slots without padding."""
        return np.asarray(slots[slots < self.planner.slots])

    def start_connection(self, w_hat: Weights) -> None:
        """Set w to its starting point and the velocity to zero."""
        self.w = interpolate(self.w_bar, w_hat, self.hparams.lmc_init_position)
        self.velocity = network.zeros(w_hat)

    def connection_step(self, w_hat: Weights, past: Samples, current: Samples) -> None:
        """Take one SGD step of w."""
        h = self.hparams
        of_past = self.line_gradient(self.w_bar, self.w, past)
        g = network.plus(of_past, self.line_gradient(w_hat, self.w, current))
        self.velocity = {k: h.lmc_momentum * v + g[k] for k, v in self.velocity.items()}
        self.w = {k: p - h.lmc_lr * self.velocity[k] for k, p in self.w.items()}

    def line_gradient(self, start: Weights, w: Weights, samples: Samples) -> Weights:
        """Return the contribution to g of the line from `start` to `w`; 0 if there are no samples."""
        h, n = self.hparams, self.hparams.lmc_line_samples
        total = network.zeros(w)
        if len(samples.y) == 0:
            return total
        for i in range(n + 1):
            _, gradient = self.task_loss(interpolate(start, w, i / n), samples)
            count = {"sum": i / n, "plain": 1, "prefix": n + 1 - i}[h.lmc_gradient]
            scale = count / (h.lmc_batch_size if h.lmc_loss == "mean_over_batch_size" else 1)
            total = {k: g + scale * gradient[k] for k, g in total.items()}
        return total
