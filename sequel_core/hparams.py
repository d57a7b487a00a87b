"""Settings that methods share, and those of optimizers, training, checkpoints and the Trainer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from sequel_core.settings import Settings, setting
from sequel_core.stream.benchmark import Benchmark, StreamSpec
from sequel_core.stream.task import Task

Dtype = Literal["float32", "float64"]


MemoryPolicy = Literal["reservoir", "ring", "class_balanced", "task_balanced", "task_quota", "class_quota"]


@dataclass(frozen=True)
class AlgorithmHParams(Settings):
    """Settings that every algorithm has."""

    name: ClassVar[str]

    lr_decay: float = setting(1.0, "factor of the learning rate from one task to the next", gt=0, le=1)
    min_lr: float = setting(0.0, "floor of the decayed learning rate", ge=0)
    reset_optimizer: bool = setting(True, "start every task with a fresh optimizer state")
    consolidate: Literal["last", "best"] = setting(
        "last",
        "weights that a task is consolidated at: the last, or the best that a ModelCheckpoint kept (pytorch)",
    )

    def learning_rate_factor(self, task: Any, learning_rate: Any) -> Any:
        """Return max(learning_rate * lr_decay^task, min_lr) / learning_rate; tasks count from 0.

        Both arguments are numbers, or arrays of a framework, traced ones too; so is what is returned.
        """
        decayed = learning_rate * self.lr_decay**task
        above = learning_rate > self.min_lr  # no branches: an array that is traced has no value
        floor = self.min_lr * above + learning_rate * (1 - above)
        return (decayed * (decayed > floor) + floor * (decayed <= floor)) / (
            learning_rate + (learning_rate == 0)
        )

    def training_tasks(self, benchmark: Benchmark, seed: int = 0) -> Iterator[Task]:
        """Yield what to train on, stage by stage; a stage's index says after which task it stands.

        Args:
            benchmark: the stream.
            seed: of the run, for methods that set samples aside.
        """
        yield from benchmark.tasks

    def check_stream(self, spec: StreamSpec) -> None:
        """Raise ValueError if the settings do not fit a stream; every algorithm calls it at construction."""

    def check(self, spec: StreamSpec, training: TrainingHParams) -> None:
        """Raise ValueError if the settings do not fit a stream, or how it is trained on."""
        self.check_stream(spec)

    def knows_task(self, spec: StreamSpec) -> bool:
        """Return whether predictions are given the task of each sample, as in the task scenario."""
        return spec.scenario == "task"


@dataclass(frozen=True)
class MemoryHParams(AlgorithmHParams):
    """Settings of methods that keep samples as the stream goes by; see `sequel_core.stream.memory`."""

    memory: MemoryPolicy = setting(
        "reservoir",
        "reservoir: every sample seen alike; ring: the latest of each class of each task; class_balanced, "
        "task_balanced: equal parts for those seen so far; task_quota, class_quota: an equal part of each "
        "task, or of each class of each task, replayed from the next task on",
    )
    mem_size: int = setting(200, "samples kept in all; 0 for none, which is naive finetuning", ge=0)
    per_task_memory_samples: int | None = setting(
        None, "samples kept of each task, in place of mem_size; null for mem_size", ge=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        usual = {spec.name: spec.default for spec in fields(self)}["mem_size"]
        if self.per_task_memory_samples is not None and self.mem_size != usual:
            raise ValueError(
                "per_task_memory_samples takes the place of mem_size, got "
                f"per_task_memory_samples={self.per_task_memory_samples} with mem_size={self.mem_size}; set "
                "per_task_memory_samples=null or leave mem_size out"
            )

    @property
    def drawn(self) -> int:
        """Samples that a step draws from the memory at once."""
        return 0

    def slots(self, num_tasks: int) -> int:
        """Return the number of samples that the memory holds."""
        per_task = self.per_task_memory_samples
        return self.mem_size if per_task is None else per_task * num_tasks

    def parts(self, spec: StreamSpec) -> int:
        """Return into how many parts of fixed and equal size the memory is divided; 1 for no division."""
        if self.memory == "task_quota":
            return spec.num_tasks
        return int(spec.mask.sum()) if self.memory in ("ring", "class_quota") else 1

    def check(self, spec: StreamSpec, training: TrainingHParams) -> None:
        """Raise ValueError for a memory that fits neither the batches nor the parts it is divided into."""
        super().check(spec, training)
        self.check_memory(spec, training.batch_size)

    def check_memory(self, spec: StreamSpec, batch_size: int) -> None:
        """Do what `check` does, of a number of samples per step."""
        size, parts = self.slots(spec.num_tasks), self.parts(spec)
        name = "mem_size" if self.per_task_memory_samples is None else "per_task_memory_samples"
        got = f"got {getattr(self, name)}" + (f" ({size} in all)" if name != "mem_size" else "")
        if 0 < size < batch_size:
            raise ValueError(
                f"{name} must be 0 or give at least batch_size={batch_size} slots, so that the samples of a "
                f"step fit, {got}; raise {name} or lower batch_size"
            )
        if size % parts:
            unit = 1 if name == "mem_size" else spec.num_tasks
            step = math.lcm(parts, unit)
            totals = [k * step for k in (size // step, size // step + 1, size // step + 2)]
            fits = [str(total // unit) for total in totals if total >= max(batch_size, self.drawn)]
            owner = "task" if self.memory == "task_quota" else "class of each task"
            raise ValueError(
                f"{name} must divide into the {parts} equal parts of memory={self.memory}, one for each "
                f"{owner}, {got}; use {' or '.join(fits[:2]) or f'a multiple of {step // unit}'}"
            )


@dataclass(frozen=True)
class ReplayHParams(MemoryHParams):
    """Settings of methods that draw from a memory at every step."""

    mem_batch_size: int = setting(10, "samples drawn from the memory at a step, without replacement", ge=1)

    @property
    def drawn(self) -> int:
        """Samples that a step draws from the memory at once."""
        return self.mem_batch_size

    def check_memory(self, spec: StreamSpec, batch_size: int) -> None:
        """Do what `check` does, of a number of samples per step."""
        super().check_memory(spec, batch_size)
        size = self.slots(spec.num_tasks)
        if 0 < size < self.mem_batch_size:
            name = "mem_size" if self.per_task_memory_samples is None else "per_task_memory_samples"
            raise ValueError(
                f"mem_batch_size must be <= the {size} samples of the memory, got {self.mem_batch_size}; "
                f"lower mem_batch_size or raise {name}"
            )


@dataclass(frozen=True)
class ExemplarHParams(AlgorithmHParams):
    """Settings of methods that keep exemplars of each class; see `sequel_core.stream.exemplars`."""

    mem_size: int = setting(2000, "exemplars kept in all, K", ge=1)
    quota: Literal["floor", "ceil"] = setting(
        "floor", "exemplars of a class, K / classes seen rounded down (the paper) or up (the official code)"
    )
    flip: bool = setting(False, "class means over the exemplars and their mirror images, for colour data")

    def slots(self, num_sets: int) -> int:
        """Return the exemplars that there is room for; `ceil` may exceed mem_size by one for each set."""
        return self.mem_size + (num_sets if self.quota == "ceil" else 0)

    def per_set(self, num_sets: int) -> int:
        """Return the quota m of an exemplar set when there are so many."""
        return -(-self.mem_size // num_sets) if self.quota == "ceil" else self.mem_size // num_sets

    def check_stream(self, spec: StreamSpec) -> None:
        """Raise ValueError if the exemplars are fewer than the classes."""
        sets = int(spec.mask.sum())
        if self.mem_size < sets:
            each = "class" if sets == spec.num_classes else "class of each task"
            raise ValueError(
                f"mem_size must be >= {sets}, one exemplar of each {each}, got {self.mem_size}; raise it"
            )


@dataclass(frozen=True)
class OptimizerHParams(Settings):
    """One of the built-in optimizers, the same arithmetic in both frameworks."""

    type: Literal["sgd", "adam", "adamw"] = setting(
        "sgd", "sgd, adam (weight decay in the gradient) or adamw (decoupled)"
    )
    lr: float = setting(0.01, "learning rate", ge=0)
    momentum: float = setting(0.0, "of sgd", ge=0, lt=1)
    nesterov: bool = setting(False, "Nesterov momentum, of sgd")
    weight_decay: float = setting(0.0, "coefficient of the weights", ge=0)
    beta1: float = setting(0.9, "of adam and adamw", ge=0, lt=1, only=("type", "adam", "adamw"))
    beta2: float = setting(0.999, "of adam and adamw", ge=0, lt=1, only=("type", "adam", "adamw"))
    eps: float = setting(1e-8, "of adam and adamw", gt=0, only=("type", "adam", "adamw"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.type != "sgd" and (self.momentum or self.nesterov):
            raise ValueError(
                f"momentum and nesterov belong to sgd, got type={self.type} momentum={self.momentum}"
            )
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum > 0, got momentum=0.0")


@dataclass(frozen=True)
class TrainingHParams(Settings):
    """How a learner trains and evaluates."""

    batch_size: int = setting(10, "training samples per step", ge=1)
    eval_batch_size: int = setting(1000, "samples per evaluation step", ge=1)
    epochs_per_task: int | tuple[int, ...] = setting(
        1, "epochs of each task: a number, or a list with one per task", ge=1
    )
    grad_clip: float | None = setting(
        None, "greatest global norm of the gradient; null for no clipping", gt=0
    )
    dtype: Dtype = setting("float32", "of the weights and of all arithmetic")
    seed: int = setting(0, "of initial weights, batches and dropout", ge=0)
    log_every_n_steps: int = setting(50, "steps between two records of loss and accuracy", ge=1)

    def epochs(self, task: int) -> int:
        """Return the epochs of a task (from 0).

        Raises:
            ValueError: the list is shorter than the stream.
        """
        if isinstance(self.epochs_per_task, int):
            return self.epochs_per_task
        if task >= len(self.epochs_per_task):
            raise ValueError(
                "epochs_per_task must be a number or have one entry per task, "
                f"got {len(self.epochs_per_task)} entries and none for task {task}"
            )
        return self.epochs_per_task[task]


@dataclass(frozen=True)
class CheckpointHParams(Settings):
    """When checkpoints are written: after every task, when a signal ends the run, and within tasks."""

    every_n_steps: int | None = setting(None, "steps of a task between two; null for none within it", ge=1)
    every_minutes: float | None = setting(None, "minutes between two; null for none by time", gt=0)
    keep: int = setting(2, "the newest so many are kept; 0 to write none", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("every_n_steps", "every_minutes"):
            if self.keep == 0 and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} says when checkpoints are written, got {name}={getattr(self, name)} with "
                    "keep=0, which writes none; set keep >= 1 or drop it"
                )


@dataclass(frozen=True)
class TrainerHParams(Settings):
    """Settings of Lightning's Trainer that a configuration may give; the names in them are Lightning's."""

    accelerator: str = setting("auto", "auto, cpu, gpu, ...")
    devices: Literal["auto"] | int | tuple[int, ...] = setting(
        "auto", "auto, a number of devices, -1 for all, or a list of their indices", ge=-1
    )
    strategy: str = setting("auto", "auto, or one for a single device")
    precision: str | int = setting("32-true", "32-true, 64-true, bf16-mixed, ...", ge=1)
    accumulate_grad_batches: int = setting(1, "batches whose gradients make a step", ge=1)
    deterministic: bool | Literal["warn"] | None = setting(None, "use deterministic operators, or warn")
    benchmark: bool | None = setting(None, "let cuDNN choose the fastest convolutions")
    detect_anomaly: bool = setting(False, "find the operator that a nan comes from; slow")
    profiler: Literal["simple", "advanced", "pytorch"] | None = setting(None, "of Lightning; null for none")
