"""La-MAML in float64 NumPy, written from the paper (Gupta 2020, algorithm 1, eq. 5 and 8).

    theta'_0 = theta, theta'_k = theta'_{k-1} - [alpha]+ g_k, g_k = dCE(part k of the batch; theta'_{k-1})
    M = 1/K sum_k CE(batch and memory; theta'_k)
    alpha <- alpha - eta dM/dalpha, theta <- theta - [alpha]+ dM/dtheta

With l_k = dM/dtheta'_k, along all paths from step k on, and G_k = dCE(batch and memory; theta'_k):

    l_K = G_K / K, l_{k-1} = l_k - H_k ([alpha]+ l_k) + G_{k-1} / K (no G_0), dM/dtheta = l_0
    dM/dalpha = -[alpha > 0] sum_k l_k g_k

H_k is the Hessian of CE(part k) at theta'_{k-1}. At first order, H_k = 0. If g_k is clipped by value, its
derivative is 0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sequel_core.algorithms.lamaml import LaMAMLHParams, MetaPlan, MetaPlanner
from sequel_core.stream.task import Samples
from tests.reference import network
from tests.reference.network import Weights
from tests.reference.optimizers import Optimizer, clip_by_norm
from tests.reference.replay import Replay
from tests.reference.streams import concatenate, rows


class LookAhead(NamedTuple):
    """The meta-loss and its gradients."""

    loss: float  # M
    d_theta: Weights
    d_alpha: Weights


class LaMAML(Replay):
    """Look-ahead meta-learning. `objective` is M of the first glance."""

    hparams: LaMAMLHParams
    step_plan: MetaPlan
    alpha: Weights  # one learning rate per weight

    def make_planner(self) -> MetaPlanner:
        return MetaPlanner(self.hparams, self.benchmark.spec, self.training.seed)

    def start(self, theta: Weights) -> None:
        super().start(theta)
        self.alpha = {k: np.full_like(p, self.hparams.alpha_init) for k, p in theta.items()}

    def update(
        self, theta: Weights, samples: Samples, optimizer: Optimizer, rate: float
    ) -> tuple[float, Weights]:
        h, losses, before = self.hparams, [], theta
        for glance in range(h.glances):
            ahead = self.look_ahead(theta, samples, glance)
            losses.append(ahead.loss)
            d_theta, d_alpha = (clip_by_norm(d, h.grad_clip_norm) for d in (ahead.d_theta, ahead.d_alpha))
            if h.learn_lr:
                self.alpha = {k: a - h.lr_alpha * d_alpha[k] for k, a in self.alpha.items()}
            if h.sync_update:
                theta = optimizer.step(theta, d_theta, rate)
            else:
                theta = {k: p - np.maximum(self.alpha[k], 0) * d_theta[k] for k, p in theta.items()}
            if glance == 0:
                self.write(before, samples)
        return losses[0], theta

    def end_step(self, theta: Weights, new: Weights, samples: Samples) -> None:
        """Do nothing: `update` writes to the memory at the first glance."""

    def objective(self, theta: Weights, samples: Samples) -> tuple[float, Weights]:
        ahead = self.look_ahead(theta, samples, 0)
        return ahead.loss, ahead.d_theta

    def look_ahead(self, theta: Weights, samples: Samples, glance: int) -> LookAhead:
        """Return M and its gradients."""
        h = self.hparams
        bound = np.inf if h.inner_clip is None else h.inner_clip
        order = self.step_plan.order[glance]
        meta = concatenate(samples, self.contents(self.read_slots(glance)))
        parts = [rows(samples, part) for part in np.split(order, self.parts(samples))]
        rates = {k: np.maximum(a, 0) for k, a in self.alpha.items()}

        path, inner, outer, losses = [theta], [], [], []
        for part in parts:
            inner.append(self.task_loss(path[-1], part)[1])
            path.append({k: p - rates[k] * inner[-1][k].clip(-bound, bound) for k, p in path[-1].items()})
            loss, gradient = self.task_loss(path[-1], meta)
            losses.append(loss)
            outer.append(gradient)

        d_theta, d_alpha = network.zeros(theta), network.zeros(theta)
        for k in reversed(range(len(parts))):
            d_theta = {name: d + outer[k][name] / len(parts) for name, d in d_theta.items()}
            for name, g in inner[k].items():
                d_alpha[name] -= (self.alpha[name] > 0) * d_theta[name] * g.clip(-bound, bound)
            if h.second_order:
                v = {name: (abs(g) < bound) * rates[name] * d_theta[name] for name, g in inner[k].items()}
                curvature = network.hessian_product(path[k], v, *self.inputs(parts[k]))
                d_theta = {name: d - curvature[name] for name, d in d_theta.items()}
        return LookAhead(float(np.mean(losses)), d_theta, d_alpha)

    def parts(self, samples: Samples) -> int:
        """Return the number of inner steps, K."""
        return self.hparams.n_inner_updates or len(samples.y)
