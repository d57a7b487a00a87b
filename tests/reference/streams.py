"""Naive finetuning, joint training and EWC over a stream of tasks in float64 NumPy, written from the papers.

Only the plan is shared with the library: initial weights, batches, and the samples of a Fisher estimate.

    EWC (Kirkpatrick 2017, eq. 3)  L = CE + sum_k lambda/2 sum_i F_{k,i} (theta_i - theta*_{k,i})^2
    online EWC (Schwarz 2018)      L = CE + lambda/2 sum_i F_i (theta_i - theta*_i)^2, F <- gamma F + F_k
    SGD as in torch.optim          g <- g + wd theta;  v <- mu v + g (0 at first);  theta <- theta - lr v
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sequel_core import plan
from sequel_core.hparams import AlgorithmHParams, EWCHParams, OptimizerHParams, TrainingHParams
from sequel_core.task import Benchmark, BoolArray, FloatArray, IntArray, JoinedSplit, Samples, Task
from tests.reference import network
from tests.reference.network import Weights


class Term(NamedTuple):
    """One quadratic term of the penalty."""

    anchor: Weights  # theta*_k
    fisher: Weights  # F_k


class Stage(NamedTuple):
    """What a stage of the stream ends with."""

    weights: Weights
    losses: list[float]  # of each step: cross-entropy + penalty - (least value of the penalty)


@dataclass
class Reference:
    """Trains on a benchmark, literally as the equations above."""

    benchmark: Benchmark
    hparams: AlgorithmHParams
    optimizer: OptimizerHParams
    training: TrainingHParams
    widths: tuple[int, ...]

    def stages(self) -> Iterator[Stage]:
        """Yield weights and losses after each stage."""
        pixels = int(np.prod(self.benchmark.image_shape))
        theta = network.initial(self.training.seed, [pixels, *self.widths, self.benchmark.num_classes])
        velocity = {k: np.zeros_like(p) for k, p in theta.items()}
        terms: list[Term] = []
        for task in self._tasks():
            if self.hparams.reset_optimizer:
                velocity = {k: np.zeros_like(p) for k, p in theta.items()}
            rate = max(self.optimizer.lr * self.hparams.lr_decay**task.index, self.hparams.min_lr)
            losses = []
            for samples in self._batches(task):
                x, y, mask = self._inputs(samples)
                losses.append(network.loss(theta, x, y, mask) + self._penalty(theta, terms))
                gradient = network.gradient(theta, x, y, mask)
                for k, p in theta.items():
                    pull = sum(self._strength * term.fisher[k] * (p - term.anchor[k]) for term in terms)
                    g = gradient[k] + pull + self.optimizer.weight_decay * p
                    velocity[k] = self.optimizer.momentum * velocity[k] + g
                theta = {k: p - rate * velocity[k] for k, p in theta.items()}
            if isinstance(self.hparams, EWCHParams):
                terms = self._remember(terms, theta, self.fisher(theta, task))
            yield Stage(theta, losses)

    def fisher(self, theta: Weights, task: Task) -> Weights:
        """Return the mean of squared per-sample gradients, one sample at a time."""
        assert isinstance(self.hparams, EWCHParams)
        order = plan.permutation(self.training.seed, "consolidation", task.index, count=len(task.train))
        x, y, mask = self._inputs(task.train.take(order[: self.hparams.fisher_samples]))
        total = {k: np.zeros_like(p) for k, p in theta.items()}
        for n in range(len(y)):
            own = slice(n, n + 1)
            one = network.gradient(theta, x[own], y[own], None if mask is None else mask[own])
            total = {k: f + one[k] ** 2 for k, f in total.items()}
        return {k: f / len(y) for k, f in total.items()}

    @property
    def _strength(self) -> float:
        return self.hparams.ewc_lambda if isinstance(self.hparams, EWCHParams) else 0.0

    def _remember(self, terms: list[Term], theta: Weights, fisher: Weights) -> list[Term]:
        assert isinstance(self.hparams, EWCHParams)
        if self.hparams.accumulation == "separate":
            return [*terms, Term(theta, fisher)]
        past = terms[0].fisher if terms else {k: np.zeros_like(p) for k, p in theta.items()}
        return [Term(theta, {k: self.hparams.gamma * past[k] + f for k, f in fisher.items()})]

    def _penalty(self, theta: Weights, terms: list[Term]) -> float:
        """Return the sum of the terms, minus its least value over theta, which no gradient sees."""

        def literal(at: Weights) -> float:
            sums = [((at[k] - t.anchor[k]) ** 2 * t.fisher[k]).sum() for t in terms for k in at]
            return float(self._strength / 2 * np.sum(sums))

        least = {}
        for k, p in theta.items():
            total = np.sum([t.fisher[k] for t in terms], axis=0)
            weighted = np.sum([t.fisher[k] * t.anchor[k] for t in terms], axis=0)
            least[k] = np.divide(weighted, total, out=p.copy(), where=total > 0) if terms else p
        return literal(theta) - literal(least)

    def _tasks(self) -> Iterator[Task]:
        """Yield what to train on: the tasks; for joint training their unions, or the union of all, once."""
        tasks = self.benchmark.tasks
        if self.hparams.name != "joint":
            yield from tasks
            return
        once = vars(self.hparams)["policy"] == "once"
        for i in range(len(tasks) - 1 if once else 0, len(tasks)):
            union = JoinedSplit(tuple(part for task in tasks[: i + 1] for part in task.train.parts))
            classes = tuple(range(self.benchmark.num_classes))
            yield Task(i, "union", classes, union, tasks[i].test, tasks[i].validation)

    def _batches(self, task: Task) -> Iterator[Samples]:
        for epoch in range(self.training.epochs(task.index)):
            for positions in plan.epoch_batches(
                self.training.seed, task.index, epoch, len(task.train), self.training.batch_size
            ):
                yield task.train.take(positions)

    def _inputs(self, samples: Samples) -> tuple[FloatArray, IntArray, BoolArray | None]:
        norm = self.benchmark.normalisation
        x = (samples.x / 255.0 - np.asarray(norm.mean)) / np.asarray(norm.std)
        mask = self.benchmark.mask[samples.t] if self.benchmark.scenario == "task" else None
        return x.reshape(len(x), -1), samples.y, mask
