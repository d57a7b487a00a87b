"""Kernel continual learning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sequel_core.hparams import AlgorithmHParams
from sequel_core.settings import setting
from sequel_core.stream import plan
from sequel_core.stream.arrays import FloatArray, IntArray, SlotArray
from sequel_core.stream.benchmark import Benchmark, StreamSpec
from sequel_core.stream.planner import counted
from sequel_core.stream.task import Samples, Task


@dataclass(frozen=True)
class KCLHParams(AlgorithmHParams):
    """Kernel continual learning (Derakhshani et al. 2021)."""

    name: ClassVar[str] = "kcl"

    core_size: int = setting(
        200, "samples of a task that are set aside for its classifier, equally many of each class", ge=1
    )
    kernel_type: Literal["rff", "rbf"] = setting(
        "rff", "rff: variational random Fourier features; rbf: exp(-|a - b|^2 / (2 bandwidth^2))"
    )
    d_rn_f: int = setting(1024, "random bases D of the kernel rff", ge=1, only=("kernel_type", "rff"))
    bandwidth: float = setting(1.0, "of the kernel rbf", gt=0, only=("kernel_type", "rbf"))
    tau: float = setting(
        0.01,
        "weight of KL(posterior || prior) of the bases, of the kernel rff",
        ge=0,
        only=("kernel_type", "rff"),
    )
    lmd: float = setting(
        0.1, "lambda of every task at first; |lambda| + 0.01 is the ridge", ge=-1000, le=1000
    )
    normalisation: Literal["l2", "minmax"] = setting(
        "l2",
        "features of unit length, or scaled to [0, 1] by the extremes of the whole batch (the official MLP)",
    )
    task_parameters: Literal["own", "current"] = setting(
        "own",
        "lambda, gamma and beta that a sample is evaluated with: its own task's, or those of the task "
        "trained last (the official code)",
    )
    task_given: bool = setting(
        False,
        "predict with the task of each sample in the domain scenario, too, in which other methods are not "
        "given it; the results say so",
    )

    def check_stream(self, spec: StreamSpec) -> None:
        """Raise ValueError if the task of a sample, which says whose classifier predicts, is not given."""
        if spec.scenario == "class":
            raise ValueError(
                "kcl cannot run in the class scenario: its classifiers belong to tasks; use scenario=task or "
                "another method"
            )
        if not self.knows_task(spec):
            raise ValueError(
                "task_given must be true for kcl in the domain scenario, got false: its classifiers belong "
                "to tasks; set task_given=true to give it the task of each sample, which the results name, "
                "or use scenario=task or another method"
            )

    def knows_task(self, spec: StreamSpec) -> bool:
        """Return whether predictions are given the task of each sample: see `task_given`."""
        return super().knows_task(spec) or (spec.scenario == "domain" and self.task_given)

    def per_class(self, task: Task) -> int:
        """Return the samples of each class in the coreset of a task.

        Raises:
            ValueError: core_size does not divide into the classes of the task.
        """
        classes = len(task.classes)
        if self.core_size % classes:
            raise ValueError(
                f"core_size must divide into the {classes} classes of task {task.index}, "
                f"got {self.core_size}; use a multiple of {classes}"
            )
        return self.core_size // classes

    def coreset(self, task: Task) -> Samples:
        """Return the samples that a task has set aside.

        Raises:
            ValueError: it has none, or another number of them.
        """
        if task.coreset is None:
            raise ValueError(
                f"kcl needs tasks with a coreset, got task {task.index} without one; iterate over "
                "hparams.training_tasks(benchmark, seed)"
            )
        if len(task.coreset) != self.core_size:
            raise ValueError(
                f"a coreset must have core_size={self.core_size} samples, got {len(task.coreset)} in task "
                f"{task.index}; iterate over training_tasks(benchmark, seed) of the same hparams"
            )
        return task.coreset.take(np.arange(self.core_size))

    def training_tasks(self, benchmark: Benchmark, seed: int = 0) -> Iterator[Task]:
        """Yield the tasks, each with its coreset taken from its training samples.

        Raises:
            ValueError: a class has not more samples than its part of the coreset.
        """
        for task in benchmark.tasks:
            yield with_coreset(task, self.per_class(task), seed)


NOISE = 1 << 20
"""Numbers in the table that random bases are cut from."""


class BasesPlan(NamedTuple):
    """Where the random bases of a step begin in the table of noise; int32."""

    starts: SlotArray  # of each basis [..., D]
    position: SlotArray  # of the planner after the step [..., 1]


class BasesPlanner:
    """The planner of variational random features: where each basis of a step begins in the table of noise.

    Args:
        count: bases of a step.
        seed: of the run.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count = count
        self._seed = seed
        self._steps = 0

    def next(self, y: Any, t: Any) -> BasesPlan:
        """Return the plan of the next step, or of the next steps; see `Planner.next`."""
        lead = np.shape(y)[:-1]
        steps = int(np.prod(lead, dtype=np.int64))
        before, self._steps = self._steps, counted("steps", self._steps + steps)
        words = plan.words(self._seed, "bases", count=steps * self._count, start=before * self._count)
        starts = (words % NOISE).astype(np.int32).reshape(*lead, self._count)
        position = np.arange(before + 1, self._steps + 1, dtype=np.int32).reshape(*lead, 1)
        return BasesPlan(starts, position)

    @property
    def state(self) -> IntArray:
        """Steps planned, int64 `[1]`; may be set."""
        return np.asarray([self._steps], np.int64)

    @state.setter
    def state(self, values: IntArray) -> None:
        self._steps = int(values[0])

    @property
    def position(self) -> SlotArray:
        """Steps planned, int32 `[1]`."""
        return self.state.astype(np.int32)

    def resume(self, position: Any) -> None:
        """Continue from the position of another one."""
        self.state = np.asarray(position, np.int64)


def noise_table(seed: int) -> NDArray[np.float32]:
    """Return the standard normal numbers that random bases are cut from, float32 `[NOISE]`.

    A basis is a stretch of the table that begins at a random place and goes round at its end: fresh noise at
    every step for the price of one integer (Salimans et al. 2017, section 3, shared noise).
    """
    return plan.normal(seed, "noise of bases", count=NOISE).astype(np.float32)


def basis_constants(seed: int, count: int, width: int) -> tuple[NDArray[Any], FloatArray, NDArray[Any]]:
    """Return what bases are made of: noise, phases b, and where in it the bases of evaluation begin.

    Args:
        seed: of the run.
        count: bases, D.
        width: numbers of a basis, H.

    Returns:
        Noise float32 `[NOISE + H - 1]`, which at its end begins again, so that every stretch lies in it;
        phases float64 `[D]`; positions int32 `[D]`.
    """
    phase = 2 * np.pi * plan.uniform(seed, "phase of bases", count=count)
    fixed = plan.words(seed, "bases of evaluation", count=count) % NOISE
    noise = noise_table(seed)
    return np.concatenate([noise, noise[: width - 1]]), phase, fixed.astype(np.int32)


def with_coreset(task: Task, per_class: int, seed: int) -> Task:
    """Return a task with a coreset, equally many samples of each class, that its training samples lack.

    Args:
        task: its training samples stay in their order.
        per_class: samples of each class in the coreset, which is sorted by class.
        seed: of the run.

    Raises:
        ValueError: a class has no sample left for training.
    """
    targets = task.train.targets
    chosen = []
    for label in task.classes:
        own = np.flatnonzero(targets == label)
        if len(own) <= per_class:
            raise ValueError(
                f"core_size must leave samples of every class to train on, got {per_class} per class with "
                f"{len(own)} of class {label} in task {task.index}; lower core_size or raise subset"
            )
        chosen.append(own[plan.permutation(seed, "coreset", task.index, label, count=len(own))[:per_class]])
    core = np.concatenate(chosen)
    rest = np.setdiff1d(np.arange(len(targets)), core)
    return replace(task, train=task.train.pick(rest), coreset=task.train.pick(core))
