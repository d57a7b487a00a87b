"""Training over a stream of tasks in float64 NumPy: naive finetuning, and the steps that methods override.

Only the plan is shared with the library: initial weights, batches, the order of samples in end-of-task work,
and which slots of a memory are written and read.

    naive, joint  L = CE
    Stable SGD    naive with lr_t = max(lr gamma^(t + 1), floor), t from 0 (Mirzadeh 2020, official code)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sequel_core import plan
from sequel_core.hparams import (
    AlgorithmHParams,
    JointHParams,
    OptimizerHParams,
    StableSGDHParams,
    TrainingHParams,
)
from sequel_core.task import Benchmark, BoolArray, FloatArray, IntArray, JoinedSplit, Samples, Task
from tests.reference import network
from tests.reference.network import Weights
from tests.reference.optimizers import Optimizer, clipped


class Stage(NamedTuple):
    """What a stage of the stream ends with."""

    weights: Weights
    losses: list[float]  # of each step, with all terms, before the weights move


class Inputs(NamedTuple):
    """What the network sees of samples."""

    x: FloatArray  # [N, D], standardised
    y: IntArray  # [N]
    mask: BoolArray | None  # [N, C], classes of each sample's own task; None where all count


@dataclass
class Reference:
    """Trains on a benchmark, literally as the equations; naive finetuning as it is here."""

    benchmark: Benchmark
    hparams: AlgorithmHParams
    optimizer: OptimizerHParams
    training: TrainingHParams
    widths: tuple[int, ...]

    def stages(self) -> Iterator[Stage]:
        """Yield weights and losses after each stage."""
        pixels = int(np.prod(self.benchmark.image_shape))
        theta = network.initial(self.training.seed, [pixels, *self.widths, self.benchmark.num_classes])
        optimizer = Optimizer(self.optimizer)
        self.start(theta)
        for task in self.tasks():
            if self.hparams.reset_optimizer:
                optimizer = Optimizer(self.optimizer)
            losses = []
            for samples in self.batches(task):
                self.start_step(samples)
                loss, gradient = self.objective(theta, samples)
                losses.append(loss)
                gradient = clipped(gradient, self.training.grad_clip)
                new = optimizer.step(theta, gradient, self.learning_rate(task.index))
                self.end_step(theta, new, samples)
                theta = new
            self.end_task(theta, task)
            yield Stage(theta, losses)

    # -- what a method overrides

    def start(self, theta: Weights) -> None:
        """Prepare for a stream, at the initial weights."""

    def tasks(self) -> Iterator[Task]:
        """Yield what to train on."""
        yield from self.benchmark.tasks

    def learning_rate(self, task: int) -> float:
        """Return the learning rate of a task, from 0."""
        return max(self.optimizer.lr * self.hparams.lr_decay**task, self.hparams.min_lr)

    def start_step(self, samples: Samples) -> None:
        """Decide what the step needs beside its batch."""

    def objective(self, theta: Weights, samples: Samples) -> tuple[float, Weights]:
        """Return the loss and its gradient; a weight without a gradient is not trained."""
        return self.cross_entropy(theta, samples)

    def end_step(self, theta: Weights, new: Weights, samples: Samples) -> None:
        """Take note of a step from `theta` to `new`."""

    def end_task(self, theta: Weights, task: Task) -> None:
        """Take note of what a task ends with."""

    # -- what a method uses

    def cross_entropy(self, theta: Weights, samples: Samples) -> tuple[float, Weights]:
        """Return the mean cross-entropy and its gradient."""
        inputs = self.inputs(samples)
        return network.loss(theta, *inputs), network.gradient(theta, *inputs)

    def batches(self, task: Task) -> Iterator[Samples]:
        """Yield the training batches of a task."""
        for epoch in range(self.training.epochs(task.index)):
            for positions in plan.epoch_batches(
                self.training.seed, task.index, epoch, len(task.train), self.training.batch_size
            ):
                yield task.train.take(positions)

    def consolidation(self, task: Task, count: int | None) -> Inputs:
        """Return the samples of end-of-task work, `count` of them or all."""
        order = plan.permutation(self.training.seed, "consolidation", task.index, count=len(task.train))
        return self.inputs(task.train.take(order[:count]))

    def inputs(self, samples: Samples) -> Inputs:
        """Return what the network sees."""
        norm = self.benchmark.normalisation
        x = (samples.x / 255.0 - np.asarray(norm.mean)) / np.asarray(norm.std)
        mask = self.benchmark.mask[samples.t] if self.benchmark.scenario == "task" else None
        return Inputs(x.reshape(len(x), -1), samples.y, mask)


class Joint(Reference):
    """Joint training: on the union of the tasks so far, or once on the union of all."""

    hparams: JointHParams

    def tasks(self) -> Iterator[Task]:
        tasks = self.benchmark.tasks
        for i in range(len(tasks) - 1 if self.hparams.policy == "once" else 0, len(tasks)):
            union = JoinedSplit(tuple(part for task in tasks[: i + 1] for part in task.train.parts))
            classes = tuple(range(self.benchmark.num_classes))
            yield Task(i, "union", classes, union, tasks[i].test, tasks[i].validation)


class StableSGD(Reference):
    """Stable SGD: a decaying learning rate."""

    hparams: StableSGDHParams

    def learning_rate(self, task: int) -> float:
        power = task + 1 if self.hparams.decay_first else task
        return max(self.optimizer.lr * self.hparams.lr_decay**power, self.hparams.min_lr)
