"""Methods with a second training phase at the end of a task, in float64 NumPy, written from the papers.

    GDumb (Prabhu 2020)  theta = theta_0, trained on the memory alone after each task, by SGD whose learning
                         rate is 0.1 lr in epoch 0, then restarts at lr in cycles of 1, 2, 4, ... epochs and
                         falls to min_lr along half a cosine in each (Loshchilov & Hutter 2017)

The plan of the library decides which samples a step reads. Learning rates and weights are computed here.
"""

from __future__ import annotations

import math

import numpy as np

from sequel_core.algorithms.gdumb import GDumbHParams
from sequel_core.hparams import OptimizerHParams, PhaseHParams
from sequel_core.stream.images import Augmentation
from sequel_core.stream.phase import phase_steps
from sequel_core.stream.task import Samples, Task
from tests.reference.network import Weights
from tests.reference.optimizers import Optimizer, clip_by_norm
from tests.reference.replay import Replay


def cosine_restarts(epochs: int, highest: float, lowest: float) -> list[float]:
    """Return the learning rate of each epoch."""
    rates, length = [0.1 * highest], 1
    while len(rates) < epochs:
        fractions = [k / length for k in range(length)]
        rates += [lowest + 0.5 * (highest - lowest) * (1 + math.cos(math.pi * f)) for f in fractions]
        length *= 2
    return rates[:epochs]


def phase_optimizer(h: PhaseHParams) -> Optimizer:
    """Return the optimizer of a second phase."""
    return Optimizer(OptimizerHParams(momentum=h.phase_momentum, weight_decay=h.phase_weight_decay))


class GDumb(Replay):
    """Greedy sampler and dumb learner."""

    hparams: GDumbHParams
    draws = 0

    first: Weights

    def start(self, theta: Weights) -> None:
        super().start(theta)
        self.first = theta

    def update(
        self, theta: Weights, samples: Samples, optimizer: Optimizer, rate: float
    ) -> tuple[float, Weights]:
        return self.task_loss(theta, samples)[0], theta

    def second_phase(self, theta: Weights, task: Task) -> tuple[list[float], Weights]:
        h, theta, losses = self.hparams, self.first, []
        optimizer = phase_optimizer(h)
        steps = phase_steps(h, Augmentation(), self.memory.t, task.index, self.training.seed)
        rates = cosine_restarts(h.phase_epochs, h.phase_lr, h.phase_min_lr)
        for slots, rate in zip(steps.slots, np.repeat(rates, len(steps.slots) // len(rates)), strict=True):
            read = slots[slots < self.planner.slots]
            loss, gradient = self.task_loss(theta, self.contents(read))
            theta = optimizer.step(theta, clip_by_norm(gradient, h.phase_grad_clip), float(rate))
            losses.append(loss)
        return losses, theta
