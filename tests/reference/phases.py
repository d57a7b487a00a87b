"""Methods with a second training phase at the end of a task, in float64 NumPy, written from the papers.

    GDumb (Prabhu 2020)  theta = theta_0, trained on the memory alone after each task, by SGD whose learning
                         rate is 0.1 lr in epoch 0, then restarts at lr in cycles of 1, 2, 4, ... epochs and
                         falls to min_lr along half a cosine in each (Loshchilov & Hutter 2017)

    BiC (Wu 2019)        L = l L_d + (1 - l) CE, l = n_old / (n_old + n_new), L_d = CE(softmax(z_old / T),
                         softmax(z / T)) over the old classes, z_old with the last correction; then beta and
                         gamma of f = beta z + gamma for the new classes, by CE on held-out samples

The plan of the library decides which samples a step reads. Learning rates and weights are computed here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from sequel_core.algorithms.bic import BiCHParams
from sequel_core.algorithms.gdumb import GDumbHParams
from sequel_core.hparams import OptimizerHParams, PhaseHParams
from sequel_core.stream.arrays import BoolArray, FloatArray
from sequel_core.stream.images import Augmentation
from sequel_core.stream.phase import phase_steps
from sequel_core.stream.task import AnySplit, JoinedSplit, Samples, Split, Task
from tests.reference import network
from tests.reference.network import Weights
from tests.reference.optimizers import Optimizer, clip_by_norm
from tests.reference.replay import Replay
from tests.reference.streams import Reference, concatenate, rows


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


class BiC(Reference):
    """Bias correction."""

    hparams: BiCHParams

    task: int
    old: Weights
    sets: dict[tuple[int, int], Samples]  # exemplars by task and class
    held: dict[tuple[int, int], Samples]  # held-out samples by task and class
    line: Weights  # beta and gamma
    block: BoolArray  # classes that they correct
    old_line: Weights
    old_block: BoolArray

    def start(self, theta: Weights) -> None:
        self.sets, self.held, self.old = {}, {}, theta
        self.line, self.block = self.straight(), np.zeros(self.benchmark.num_classes, bool)

    def straight(self) -> Weights:
        """Return beta = 1 and gamma = 0."""
        return {"beta": np.ones(()), "gamma": np.zeros(())}

    def tasks(self) -> Iterator[Task]:
        yield from self.hparams.training_tasks(self.benchmark, self.training.seed)

    def held_per_set(self, task: int) -> int:
        """Return the number of held-out samples of each class of each task, after the start of a task."""
        total = self.hparams.mem_size // int(self.benchmark.mask[: task + 1].sum())
        return max(1, int(self.hparams.val_fraction * total)) if self.hparams.val_fraction else 0

    def start_task(self, theta: Weights, task: Task) -> Weights:
        self.task, seen = task.index, self.benchmark.mask[: task.index].any(axis=0)
        quota = self.held_per_set(task.index)
        self.held = {key: rows(samples, slice(quota)) for key, samples in self.held.items()}
        if task.coreset is not None:
            new = task.coreset.take(np.arange(len(task.coreset)))
            for c in task.classes:
                self.held[task.index, c] = rows(new, new.y == c)
        self.line = self.straight()
        self.block = self.benchmark.mask[task.index] & ~seen
        return theta

    def training_split(self, task: Task) -> AnySplit:
        splits = [Split(self.sets[t, c].x, self.sets[t, c].y, t) for t, c in sorted(self.sets)]
        return JoinedSplit((*task.train.parts, *splits))

    def correct(self, z: FloatArray, line: Weights, block: BoolArray) -> FloatArray:
        """Return f for logits z `[N, C]`."""
        return np.asarray(np.where(block, line["beta"] * z + line["gamma"], z))

    def objective(self, theta: Weights, samples: Samples) -> tuple[float, Weights]:
        loss, gradient = self.task_loss(theta, samples)
        before = self.benchmark.mask[: self.task]
        past = np.flatnonzero(before.any(axis=0))
        if not len(past):
            return loss, gradient
        x, temperature = self.inputs(samples).x, self.hparams.temperature
        z, inputs = network.logits(theta, x)
        old = self.correct(network.logits(self.old, x)[0], self.old_line, self.old_block)
        log_p, log_q = (network.log_softmax(a[:, past] / temperature, None) for a in (z, old))
        distance = float(-(np.exp(log_q) * log_p).sum(axis=1).mean())
        d_logits = np.zeros_like(z)
        d_logits[:, past] = (np.exp(log_p) - np.exp(log_q)) / temperature / len(z)
        share = before.sum() / (before.sum() + self.benchmark.mask[self.task].sum())
        total = {k: (1 - share) * g for k, g in gradient.items()}
        part = network.backward(theta, inputs, share * d_logits)
        return share * distance + (1 - share) * loss, network.plus(total, part)

    def second_phase(self, theta: Weights, task: Task) -> tuple[list[float], Weights]:
        h, losses, optimizer = self.hparams, list[float](), phase_optimizer(self.hparams)
        if task.index == 0 or not self.held:
            return losses, theta
        memory = concatenate(*(self.held[key] for key in sorted(self.held)))
        for slots in phase_steps(h, Augmentation(), memory.t, task.index, self.training.seed).slots:
            x, y, mask = self.inputs(rows(memory, slots[slots < len(memory.t)]))
            z = network.logits(theta, x)[0]
            f = self.correct(z, self.line, self.block)
            losses.append(float(network.losses(f, y, mask).mean()))
            delta = np.exp(network.log_softmax(f, mask)) - np.eye(f.shape[1])[y]
            delta = np.where(self.block, delta, 0) / len(y)
            gradient = {"beta": np.asarray((delta * z).sum()), "gamma": np.asarray(delta.sum())}
            gradient = clip_by_norm(gradient, h.phase_grad_clip)
            self.line = optimizer.step(self.line, gradient, h.phase_lr)
        return losses, theta

    def end_task(self, theta: Weights, task: Task) -> None:
        total = self.hparams.mem_size // int(self.benchmark.mask[: task.index + 1].sum())
        quota = total - self.held_per_set(task.index)
        self.sets = {key: rows(samples, slice(quota)) for key, samples in self.sets.items()}
        order = self.consolidation_order(task)
        for c in task.classes:
            chosen = order[task.train.targets[order] == c][:quota]
            self.sets[task.index, c] = task.train.take(chosen)
        self.old, self.old_line, self.old_block = theta, self.line, self.block

    def predict(self, theta: Weights, samples: Samples) -> FloatArray:
        return self.correct(super().predict(theta, samples), self.line, self.block)

    def alternatives(self, theta: Weights, samples: Samples) -> dict[str, FloatArray]:
        return {"head": super().predict(theta, samples)}

    def memory_samples(self) -> Samples:
        return concatenate(*(self.sets[key] for key in sorted(self.sets)))
