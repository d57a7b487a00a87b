"""Bias correction, BiC (Wu et al. 2019): its settings and the samples that it holds out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from sequel_core.hparams import PhaseHParams
from sequel_core.settings import setting
from sequel_core.stream.benchmark import Benchmark, StreamSpec
from sequel_core.stream.coresets import with_coreset
from sequel_core.stream.task import Samples, Task


class Part(NamedTuple):
    """A part of the memory: a number of samples per set."""

    numbers: tuple[int, ...]  # per set, for 1, 2, ... sets

    def slots(self, num_sets: int) -> int:
        """Return the number of slots for so many sets."""
        return max(1, *(k * number for k, number in enumerate(self.numbers[:num_sets], start=1)))

    def per_set(self, num_sets: int) -> int:
        """Return the number of samples of each set if there are `num_sets` of them."""
        return self.numbers[num_sets - 1]


@dataclass(frozen=True)
class BiCHParams(PhaseHParams):
    """Settings of BiC (Wu et al. 2019, https://arxiv.org/abs/1905.13260).

        L = lambda L_d + (1 - lambda) CE,  lambda = n_old / (n_old + n_new)
        L_d = CE(softmax(z_old / temperature), softmax(z / temperature)) over the classes of past tasks
        f_c(x) = beta z_c + gamma for the classes that are new in the task, else z_c

    z_old are the corrected outputs of the network after the last task. n_old and n_new count the classes of
    past tasks and of the current one. A task trains on its samples and on the exemplars of past tasks. Its
    second phase fits beta and gamma to samples that are held out of training.

    Example:
        >>> from sequel_core import BiCHParams
        >>> hparams = BiCHParams(mem_size=2000, val_fraction=0.1)
        >>> hparams.exemplars(10).per_set(10), hparams.held_out(10).per_set(10)
        (180, 20)
    """

    name: ClassVar[str] = "bic"

    mem_size: int = setting(2000, "number of samples in the memory, with those that are held out", ge=1)
    val_fraction: float = setting(
        0.1,
        "fraction of the memory that is held out for the second phase, at least one sample of each class; 0 "
        "for no correction",
        ge=0,
        lt=1,
    )
    temperature: float = setting(2.0, "temperature of the distillation", gt=0)
    phase_epochs: int = setting(200, "number of epochs of the second phase", ge=1)
    phase_batch_size: int = setting(256, "number of samples per step of the second phase", ge=1)
    phase_lr: float = setting(0.1, "learning rate of the second phase", ge=0)

    def exemplars(self, num_sets: int) -> Part:
        """Return the part of the memory that is trained on; `num_sets` are those of the stream."""
        held = self.held_out(num_sets).numbers
        return Part(tuple(self.mem_size // (k + 1) - held[k] for k in range(num_sets)))

    def held_out(self, num_sets: int) -> Part:
        """Return the part of the memory that is held out; `num_sets` are those of the stream."""
        totals = [self.mem_size // k for k in range(1, num_sets + 1)]
        least = int(self.val_fraction > 0)
        return Part(tuple(max(least, int(self.val_fraction * total)) for total in totals))

    def check_stream(self, spec: StreamSpec) -> None:
        """Raise ValueError if there are no classes, or the memory is too small for them."""
        super().check_stream(spec)
        self.check_labels(spec, self.name)
        self.check_array(spec)
        sets = int(spec.mask.sum())
        least = sets * (2 if self.val_fraction else 1)
        if self.mem_size < least:
            raise ValueError(
                f"mem_size must be >= {least}, because each of the {sets} classes of all tasks needs an "
                f"exemplar and, with val_fraction > 0, a held-out sample, got {self.mem_size}; raise it"
            )

    def training_tasks(self, benchmark: Benchmark, seed: int = 0) -> Iterator[Task]:
        """Yield the tasks, each with the held-out samples of its classes removed from its training samples.

        Raises:
            ValueError: a class has no samples left for training.
        """
        mask = benchmark.spec.mask
        for task in benchmark.tasks:
            count = self.held_out(int(mask.sum())).per_set(int(mask[: task.index + 1].sum()))
            yield with_coreset(task, count, seed, "val_fraction") if count else task

    def held_out_samples(self, task: Task) -> Samples:
        """Return the held-out samples of a task.

        Raises:
            ValueError: the task has none.
        """
        if not self.val_fraction:
            return task.train.take(np.arange(0))
        if task.coreset is None:
            raise ValueError(
                f"bic needs tasks with held-out samples, got task {task.index} without them; iterate over "
                "hparams.training_tasks(benchmark, seed), or set val_fraction=0 for no correction"
            )
        return task.coreset.take(np.arange(len(task.coreset)))
