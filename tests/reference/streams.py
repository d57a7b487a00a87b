"""Training on a stream of tasks in float64 NumPy: naive finetuning, and the methods that subclasses override.

Only the plan is shared with the library: initial weights, batches, the order of samples in the end-of-task
pass, the memory slots that are written and read, the coreset of each task, and random bases.

    naive, joint  L = CE
    Stable SGD    naive with lr_t = max(lr gamma^(t + 1), floor), t from 0 (Mirzadeh 2020, official code)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sequel_core.algorithms.joint import JointHParams
from sequel_core.algorithms.stable_sgd import StableSGDHParams
from sequel_core.hparams import AlgorithmHParams, OptimizerHParams, TrainingHParams
from sequel_core.stream import plan
from sequel_core.stream.arrays import BoolArray, FloatArray, IntArray
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.task import AnySplit, JoinedSplit, Samples, Task
from tests.reference import network
from tests.reference.network import Weights
from tests.reference.optimizers import Optimizer, clip


class Stage(NamedTuple):
    """The results of one training task."""

    weights: Weights
    losses: list[float]  # of each step, with all terms, at the weights before the step
    scores: list[float]  # mean CE of the predictions on the test samples of each task so far


class Inputs(NamedTuple):
    """Samples as the network and the loss take them."""

    x: FloatArray  # [N, D], standardised if it is an image
    y: Any  # [N] or [N, C]
    mask: BoolArray | None  # [N, C], the classes of the task of each sample; None for all classes


def rows(samples: Samples, index: IntArray | slice) -> Samples:
    """Return the samples at an index."""
    return Samples(samples.x[index], samples.y[index], samples.t[index])


def concatenate(*parts: Samples) -> Samples:
    """Return the samples of all parts, in order."""
    x, y, t = zip(*parts, strict=True)
    return Samples(np.concatenate(x), np.concatenate(y), np.concatenate(t))


@dataclass
class Reference:
    """Training on a benchmark as the equations say. This class is naive finetuning."""

    benchmark: Benchmark
    hparams: AlgorithmHParams
    optimizer: OptimizerHParams
    training: TrainingHParams
    widths: tuple[int, ...]

    def stages(self) -> Iterator[Stage]:
        """Yield weights, losses and scores after each training task."""
        theta = self.initial()
        optimizer = Optimizer(self.optimizer)
        self.start(theta)
        for task in self.tasks():
            if self.hparams.reset_optimizer:
                optimizer = Optimizer(self.optimizer)
            theta = self.start_task(theta, task)
            losses = []
            for samples in self.batches(task):
                self.start_step(samples)
                loss, new = self.update(theta, samples, optimizer, self.learning_rate(task.index))
                losses.append(loss)
                self.end_step(theta, new, samples)
                theta = new
            more, theta = self.second_phase(theta, task)
            losses += more
            self.end_task(theta, task)
            weights = self.evaluated_weights(theta)
            past = self.benchmark.tasks[: task.index + 1]
            yield Stage(weights, losses, [self.score(weights, each) for each in past])

    # -- overridden by methods

    def initial(self) -> Weights:
        """Return the initial weights of the network and of other trained parameters."""
        numbers = int(np.prod(self.benchmark.spec.x.shape))
        return network.initial(self.training.seed, [numbers, *self.widths, self.benchmark.num_classes])

    def start(self, theta: Weights) -> None:
        """Initialise the state of the method, given the initial weights."""

    def tasks(self) -> Iterator[Task]:
        """Yield the training tasks."""
        yield from self.benchmark.tasks

    def start_task(self, theta: Weights, task: Task) -> Weights:
        """Return the weights from which the training on a task starts."""
        return theta

    def training_split(self, task: Task) -> AnySplit:
        """Return the training samples of a task."""
        return task.train

    def learning_rate(self, task: int) -> float:
        """Return the learning rate of a task, counted from 0."""
        return max(self.optimizer.lr * self.hparams.lr_decay**task, self.hparams.min_lr)

    def start_step(self, samples: Samples) -> None:
        """Plan the memory slots or random bases of the step."""

    def update(
        self, theta: Weights, samples: Samples, optimizer: Optimizer, rate: float
    ) -> tuple[float, Weights]:
        """Take a step; return its loss and the new weights."""
        loss, gradient = self.objective(theta, samples)
        return loss, optimizer.step(theta, clip(gradient, self.training), rate)

    def objective(self, theta: Weights, samples: Samples) -> tuple[float, Weights]:
        """Return the loss and its gradient. A weight without a gradient is not trained."""
        return self.task_loss(theta, samples)

    def end_step(self, theta: Weights, new: Weights, samples: Samples) -> None:
        """Update the state of the method after a step from `theta` to `new`."""

    def second_phase(self, theta: Weights, task: Task) -> tuple[list[float], Weights]:
        """Return the loss of each step of a second training phase, and the weights after it."""
        return [], theta

    def end_task(self, theta: Weights, task: Task) -> None:
        """Update the state of the method after a task that ended at `theta`."""

    def evaluated_weights(self, theta: Weights) -> Weights:
        """Return the weights to evaluate after a task that ended at `theta`."""
        return theta

    def predict(self, theta: Weights, samples: Samples) -> FloatArray:
        """Return the class scores `[N, C]`, not masked."""
        return network.logits(theta, self.inputs(samples).x)[0]

    def alternatives(self, theta: Weights, samples: Samples) -> dict[str, FloatArray]:
        """Return class scores `[N, C]` of the other ways to predict, by name."""
        return {}

    def memory_samples(self) -> Samples | None:
        """Return the samples in memory, in the order of the slots; None for methods without a memory."""
        return None

    # -- used by methods

    def task_loss(self, theta: Weights, samples: Samples) -> tuple[float, Weights]:
        """Return the mean loss of samples and its gradient; for labels the cross-entropy."""
        inputs = self.inputs(samples)
        return network.loss(theta, *inputs), network.gradient(theta, *inputs)

    def batches(self, task: Task) -> Iterator[Samples]:
        """Yield the training batches of a task."""
        split = self.training_split(task)
        for epoch in range(self.training.epochs(task.index)):
            for positions in plan.epoch_batches(
                self.training.seed, task.index, epoch, len(split), self.training.batch_size
            ):
                yield split.take(positions)

    def score(self, theta: Weights, task: Task) -> float:
        """Return the mean cross-entropy of the predictions on the test samples of a task."""
        samples = task.test.take(np.arange(len(task.test)))
        _, y, mask = self.inputs(samples)
        return float(network.losses(self.predict(theta, samples), y, mask).mean())

    def consolidation(self, task: Task, count: int | None) -> Inputs:
        """Return the samples of the end-of-task pass: the first `count`, or all if None."""
        return self.inputs(task.train.take(self.consolidation_order(task)[:count]))

    def consolidation_order(self, task: Task) -> IntArray:
        """Return the order of the training samples in the end-of-task pass."""
        return plan.permutation(self.training.seed, "consolidation", task.index, count=len(task.train))

    def inputs(self, samples: Samples) -> Inputs:
        """Return standardised pixels or other numbers, targets and masks."""
        if not self.benchmark.spec.images:
            return Inputs(samples.x.astype(np.float64), samples.y, None)
        norm = self.benchmark.normalisation
        x = (samples.x / 255.0 - np.asarray(norm.mean)) / np.asarray(norm.std)
        mask = self.benchmark.mask[samples.t] if self.benchmark.scenario == "task" else None
        return Inputs(x.reshape(len(x), -1), samples.y, mask)


class Joint(Reference):
    """Joint training on the union of the tasks so far, or once on the union of all tasks."""

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
