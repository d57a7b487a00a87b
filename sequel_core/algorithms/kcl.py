"""Kernel continual learning, KCL (Derakhshani et al. 2021): its settings, its coresets and its planner."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sequel_core.hparams import AlgorithmHParams
from sequel_core.settings import setting
from sequel_core.stream import plan
from sequel_core.stream.arrays import FloatArray, IntArray, SlotArray
from sequel_core.stream.benchmark import Benchmark, StreamSpec
from sequel_core.stream.coresets import with_coreset
from sequel_core.stream.planner import counted
from sequel_core.stream.task import Samples, Task


@dataclass(frozen=True)
class KCLHParams(AlgorithmHParams):
    """Settings of KCL (Derakhshani et al. 2021, https://arxiv.org/abs/2107.05757).

        f_k(x) = gamma_k K(x, C_k) (K(C_k, C_k) + (|lambda_k| + 0.01) I)^-1 Y_k + beta_k
        L = CE(f_k(x), y) + tau * KL(q || p)

    C_k is the coreset of task k, with one-hot labels Y_k. K is a kernel of the last hidden layer. Its random
    bases have the posterior q and the prior p.

    Example:
        >>> from sequel_core import KCLHParams
        >>> KCLHParams(core_size=100, kernel_type="rbf", bandwidth=0.5).bandwidth
        0.5
    """

    name: ClassVar[str] = "kcl"

    core_size: int = setting(
        200, "number of samples in the coreset of a task, equally many of each of its classes", ge=1
    )
    kernel_type: Literal["rff", "rbf"] = setting(
        "rff",
        "kernel: `rff`, variational random Fourier features; `rbf`, exp(-||a - b||^2 / (2 bandwidth^2))",
    )
    d_rn_f: int = setting(1024, "number D of random bases", ge=1, only=("kernel_type", "rff"))
    bandwidth: float = setting(1.0, "bandwidth of the kernel", gt=0, only=("kernel_type", "rbf"))
    tau: float = setting(
        0.01, "weight of the divergence KL(q || p) of the random bases", ge=0, only=("kernel_type", "rff")
    )
    lmd: float = setting(
        0.1, "initial value of each lambda_k; the ridge is |lambda_k| + 0.01", ge=-1000, le=1000
    )
    normalisation: Literal["l2", "minmax"] = setting(
        "l2",
        "normalisation of the features: `l2`, unit length; `minmax`, scaled to [0, 1] by the extremes of the "
        "whole batch (the official code for MLPs)",
    )
    task_parameters: Literal["own", "current"] = setting(
        "own",
        "lambda, gamma and beta at evaluation: `own`, those of the task of the sample; `current`, those of "
        "the latest task (the official code)",
    )

    def check_stream(self, spec: StreamSpec) -> None:
        """Raise ValueError if there are no classes, or predictions do not get the task of each sample."""
        self.check_labels(spec, self.name)
        self.check_array(spec)
        if spec.scenario == "class":
            raise ValueError(
                "kcl cannot run in the class scenario: each task has its own classifier; use "
                "scenario=task or another method"
            )
        if not self.knows_task(spec):
            raise ValueError(
                "task_given must be true for kcl in the domain scenario, got false, because each task has "
                "its own classifier; set task_given=true, which results record, or use scenario=task or "
                "another method"
            )

    def per_class(self, task: Task) -> int:
        """Return the number of samples per class in the coreset of a task.

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
        """Return the coreset of a task.

        Raises:
            ValueError: the task has no coreset, or one of another size.
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
        """Yield the tasks, each with its coreset removed from its training samples.

        Raises:
            ValueError: a class has no samples left for training.
        """
        for task in benchmark.tasks:
            yield with_coreset(task, self.per_class(task), seed)


NOISE = 1 << 20
"""Length of the table of noise that random bases are slices of."""


class BasesPlan(NamedTuple):
    """Where the random bases of a step start in the table of noise; int32."""

    starts: SlotArray  # of each basis [..., D]
    position: SlotArray  # of the planner after the step [..., 1]


class BasesPlanner:
    """The planner of variational random features: where each basis of a step starts in the table of noise.

    Args:
        count: number of bases per step.
        seed: training seed.
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
        """Number of planned steps, int64 `[1]`; may be set."""
        return np.asarray([self._steps], np.int64)

    @state.setter
    def state(self, values: IntArray) -> None:
        self._steps = int(values[0])

    @property
    def position(self) -> SlotArray:
        """Number of planned steps, int32 `[1]`."""
        return self.state.astype(np.int32)

    def resume(self, position: Any) -> None:
        """Continue from the position of another planner."""
        self.state = np.asarray(position, np.int64)


def noise_table(seed: int) -> NDArray[np.float32]:
    """Return the standard normal numbers that random bases are slices of, float32 `[NOISE]`.

    A basis is a slice of this table, which wraps around at its end. Its start is random, so each step gets
    new noise for one random integer per basis (shared noise: Salimans et al. 2017, section 3).
    """
    return plan.normal(seed, "noise of bases", count=NOISE).astype(np.float32)


def basis_constants(seed: int, count: int, width: int) -> tuple[NDArray[Any], FloatArray, NDArray[Any]]:
    """Return the constants of random bases.

    Args:
        seed: training seed.
        count: number of bases, D.
        width: length of a basis, H.

    Returns:
        The table of noise, extended by its own first H - 1 numbers so that no slice wraps around, float32
        `[NOISE + H - 1]`; the phases b, float64 `[D]`; the starts of the bases at evaluation, int32 `[D]`.
    """
    phase = 2 * np.pi * plan.uniform(seed, "phase of bases", count=count)
    fixed = plan.words(seed, "bases of evaluation", count=count) % NOISE
    noise = noise_table(seed)
    return np.concatenate([noise, noise[: width - 1]]), phase, fixed.astype(np.int32)
