"""Settings that several algorithms share, and settings of optimizers, training, checkpoints, the Trainer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from sequel_core.settings import Settings, setting
from sequel_core.stream.benchmark import Benchmark, StreamSpec
from sequel_core.stream.task import Task
from sequel_core.stream.trees import specs_text

Dtype = Literal["float32", "float64"]


MemoryDevice = Literal["auto", "cpu"]
MemoryDtype = Literal["auto", "float16", "bfloat16", "float32"]
MemoryPolicy = Literal[
    "reservoir", "ring", "task_ring", "class_balanced", "task_balanced", "task_quota", "class_quota", "greedy"
]


@dataclass(frozen=True)
class AlgorithmHParams(Settings):
    """Settings that every algorithm has.

    Example:
        >>> from dataclasses import dataclass
        >>> from sequel_core import AlgorithmHParams
        >>> from sequel_core.settings import setting
        >>> @dataclass(frozen=True)
        ... class DecayHParams(AlgorithmHParams):
        ...     name = "decay"
        ...     strength: float = setting(1.0, "factor of the penalty", ge=0)
        >>> DecayHParams(strength=2).strength
        2.0
    """

    name: ClassVar[str]

    lr_decay: float = setting(1.0, "factor by which the learning rate decays from task to task", gt=0, le=1)
    min_lr: float = setting(0.0, "lower bound of the decayed learning rate", ge=0)
    reset_optimizer: bool = setting(True, "reset the state of the optimizer at the start of each task")
    consolidate: Literal["last", "best"] = setting(
        "last",
        "weights at which a task is consolidated: `last`, or `best`, the best that Lightning's "
        "ModelCheckpoint kept (only with mode=pytorch)",
    )

    task_given: bool = setting(
        False,
        "give the network and predictions the task of each sample in every scenario; results record this",
    )

    def learning_rate_factor(self, task: Any, learning_rate: Any) -> Any:
        """Return max(learning_rate * lr_decay^task, min_lr) / learning_rate; tasks count from 0.

        Args:
            task: index of the task. Numbers and arrays, also traced ones, are accepted.
            learning_rate: the learning rate before any decay.
        """
        decayed = learning_rate * self.lr_decay**task
        above = learning_rate > self.min_lr  # without branches, because a traced array has no value
        floor = self.min_lr * above + learning_rate * (1 - above)
        return (decayed * (decayed > floor) + floor * (decayed <= floor)) / (
            learning_rate + (learning_rate == 0)
        )

    def training_tasks(self, benchmark: Benchmark, seed: int = 0) -> Iterator[Task]:
        """Yield the tasks to train on.

        Args:
            benchmark: the stream.
            seed: training seed, for methods that set samples aside.
        """
        yield from benchmark.tasks

    def check_stream(self, spec: StreamSpec) -> None:
        """Raise ValueError if the settings do not fit a stream. Every algorithm's constructor calls this."""

    def check_labels(self, spec: StreamSpec, what: str) -> None:
        """Raise ValueError if the targets of a stream are not class labels, which `what` needs."""
        if not spec.labelled:
            raise ValueError(
                f"{what} needs targets that are class labels, one integer per sample, got "
                f"{specs_text(spec.y)}; use another method or memory"
            )

    def check_array(self, spec: StreamSpec) -> None:
        """Raise ValueError if the inputs of a stream are a dict, which some methods cannot keep."""
        if isinstance(spec.x, Mapping):
            raise ValueError(
                f"{self.name} needs inputs that are one array, got a dict with the keys "
                f"{', '.join(spec.x)}; concatenate the arrays, or use another method"
            )

    def check(self, spec: StreamSpec, training: TrainingHParams) -> None:
        """Raise ValueError if the settings do not fit a stream or the training settings."""
        self.check_stream(spec)

    def knows_task(self, spec: StreamSpec) -> bool:
        """Return whether predictions get the task of each sample, as in the task scenario."""
        return spec.scenario == "task" or self.task_given


@dataclass(frozen=True)
class MemoryHParams(AlgorithmHParams):
    """Settings of methods that keep samples of the stream; see `sequel_core.stream.memory`.

    Example:
        >>> from sequel_core.hparams import MemoryHParams
        >>> MemoryHParams(per_task_memory_samples=10).slots(num_tasks=20)
        200
    """

    memory: MemoryPolicy = setting(
        "reservoir",
        "which samples are kept: `reservoir`, a uniform sample of the stream; `ring`, the latest of each "
        "class of each task; `task_ring`, the latest of each task; `class_balanced`, equally many of each "
        "class seen so far; `task_balanced`, "
        "equally many of each task seen so far; `task_quota`, a uniform sample of each task; `class_quota`, "
        "a uniform sample of each class of each task; `greedy`, samples of classes with less than an equal "
        "share (GDumb). The two quotas are replayed from the next task on",
    )
    mem_size: int = setting(
        200,
        "number of samples in the memory; 0 for naive finetuning. A memory with parts of equal size needs a "
        "multiple of their number; of the default, the largest multiple is used",
        ge=0,
    )
    per_task_memory_samples: int | None = setting(
        None, "number of samples per task, instead of mem_size; null to use mem_size", ge=0
    )
    mem_device: MemoryDevice = setting(
        "auto",
        "device of the memory: `auto`, that of the network; `cpu`, host memory, from which the "
        "samples of a step are copied to the device",
    )
    mem_dtype: MemoryDtype = setting(
        "auto",
        "dtype of the floats in the memory, which are inputs and outputs: `auto`, those of the stream and of "
        "the network; `float16`, `bfloat16` or `float32`. Targets and integers, such as uint8 images and "
        "tokens, keep their dtype",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per_task_memory_samples is not None and not self._has_default_size():
            raise ValueError(
                "per_task_memory_samples replaces mem_size, got "
                f"per_task_memory_samples={self.per_task_memory_samples} with mem_size={self.mem_size}; set "
                "per_task_memory_samples=null or leave mem_size out"
            )

    @property
    def drawn(self) -> int:
        """Number of samples per replay batch; 0 if steps do not read the memory."""
        return 0

    @property
    def replacement(self) -> bool:
        """Whether a replay batch is drawn with replacement."""
        return False

    def slots(self, num_tasks: int) -> int:
        """Return the number of slots of the memory."""
        per_task = self.per_task_memory_samples
        return self.mem_size if per_task is None else per_task * num_tasks

    def _has_default_size(self) -> bool:
        return bool(self.mem_size == {spec.name: spec.default for spec in fields(self)}["mem_size"])

    def parts(self, spec: StreamSpec) -> int:
        """Return the number of parts of fixed, equal size that the memory has; 1 if it is not divided."""
        if self.memory in ("task_quota", "task_ring"):
            return spec.num_tasks
        return int(spec.groups.sum()) if self.memory in ("ring", "class_quota") else 1

    def check_stream(self, spec: StreamSpec) -> None:
        """Raise ValueError if the memory is divided among classes and the stream has none."""
        super().check_stream(spec)
        if self.memory in ("class_balanced", "class_quota", "greedy"):
            self.check_labels(spec, f"memory={self.memory} of {self.name}")

    def check(self, spec: StreamSpec, training: TrainingHParams) -> None:
        """Raise ValueError also if a batch does not fit into the memory, or if its parts are not equal."""
        super().check(spec, training)
        self.check_memory(spec, training.batch_size)

    def check_memory(self, spec: StreamSpec, batch_size: int) -> None:
        """Do the part of `check` that depends on the number of samples per step."""
        size, parts = self.slots(spec.num_tasks), self.parts(spec)
        name = "mem_size" if self.per_task_memory_samples is None else "per_task_memory_samples"
        got = f"got {getattr(self, name)}" + (f" ({size} in all)" if name != "mem_size" else "")
        if 0 < size < batch_size:
            raise ValueError(
                f"{name} must be 0 or give at least batch_size={batch_size} slots, so that the samples of a "
                f"step fit, {got}; raise {name} or lower batch_size"
            )
        rounded = size > parts and self.per_task_memory_samples is None and self._has_default_size()
        if size % parts and not rounded:
            unit = 1 if name == "mem_size" else spec.num_tasks
            step = math.lcm(parts, unit)
            totals = [k * step for k in (size // step, size // step + 1, size // step + 2)]
            fits = [str(total // unit) for total in totals if total >= max(batch_size, self.drawn)]
            unit_name = "task" if self.memory.startswith("task_") else "class of each task"
            raise ValueError(
                f"{name} must divide into the {parts} equal parts of memory={self.memory}, one for each "
                f"{unit_name}, {got}; use {' or '.join(fits[:2]) or f'a multiple of {step // unit}'}"
            )


@dataclass(frozen=True)
class ReplayHParams(MemoryHParams):
    """Settings of methods that read a replay batch from the memory at each step.

    Example:
        >>> from sequel_core.hparams import ReplayHParams
        >>> ReplayHParams(memory="ring", mem_batch_size=32).mem_batch_size
        32
    """

    mem_batch_size: int = setting(10, "number of samples per replay batch", ge=1)
    mem_replacement: bool = setting(
        False,
        "draw a replay batch with replacement, at most as many samples as the memory holds (the code of MER, "
        "https://arxiv.org/abs/1810.11910, and of La-MAML, https://arxiv.org/abs/2007.13904)",
    )

    @property
    def drawn(self) -> int:
        """Number of samples per replay batch."""
        return self.mem_batch_size

    @property
    def replacement(self) -> bool:
        """Whether a replay batch is drawn with replacement."""
        return self.mem_replacement

    def check_memory(self, spec: StreamSpec, batch_size: int) -> None:
        """Do the part of `check` that depends on the number of samples per step."""
        super().check_memory(spec, batch_size)
        size = self.slots(spec.num_tasks)
        if 0 < size < self.mem_batch_size:
            name = "mem_size" if self.per_task_memory_samples is None else "per_task_memory_samples"
            raise ValueError(
                f"mem_batch_size must be <= the {size} samples of the memory, got {self.mem_batch_size}; "
                f"lower mem_batch_size or raise {name}"
            )


@dataclass(frozen=True)
class PhaseHParams(AlgorithmHParams):
    """Settings of methods with a second training phase at the end of each task, on samples of their memory.

        g = the gradient of the mean loss, shortened to the norm phase_grad_clip, + phase_weight_decay * theta
        v = phase_momentum * v + g, theta = theta - learning rate * v

    The optimizer starts with v = 0 in each task. See `sequel_core.stream.phase`.

    Example:
        >>> from sequel_core.hparams import PhaseHParams
        >>> PhaseHParams(phase_lr=0.1).phase_learning_rate(epoch=3)
        0.1
    """

    phase_epochs: int = setting(100, "number of epochs of the second phase", ge=1)
    phase_batch_size: int = setting(16, "number of samples per step of the second phase", ge=1)
    phase_lr: float = setting(0.05, "learning rate of the second phase", ge=0)
    phase_momentum: float = setting(0.9, "momentum of the second phase", ge=0, lt=1)
    phase_weight_decay: float = setting(0.0, "coefficient of the weight decay of the second phase", ge=0)
    phase_grad_clip: float | None = setting(
        None, "largest global norm of the gradient in the second phase; null for no clipping", gt=0
    )

    def phase_learning_rate(self, epoch: int) -> float:
        """Return the learning rate of an epoch (from 0) of the second phase."""
        return self.phase_lr


@dataclass(frozen=True)
class ExemplarHParams(AlgorithmHParams):
    """Settings of methods that keep exemplars of each class; see `sequel_core.stream.exemplars`.

    Example:
        >>> from sequel_core.hparams import ExemplarHParams
        >>> ExemplarHParams(mem_size=2000, quota="ceil").per_set(num_sets=30)
        67
    """

    mem_size: int = setting(2000, "number K of exemplars", ge=1)
    quota: Literal["floor", "ceil"] = setting(
        "floor",
        "rounding of the number of exemplars per class, K / classes seen so far: `floor` (the "
        "paper) or `ceil` (the official code)",
    )
    flip: bool = setting(
        False,
        "compute class means over the exemplars and their mirror images (the official code, for CIFAR-100); "
        "mirror images of digits are other symbols",
    )
    normalise_features: bool = setting(
        True,
        "scale features and class means to unit length (the paper); false to use them as they are (Mammoth)",
    )

    def slots(self, num_sets: int) -> int:
        """Return the number of slots; quota=ceil may exceed mem_size by one per exemplar set."""
        return self.mem_size + (num_sets if self.quota == "ceil" else 0)

    def per_set(self, num_sets: int) -> int:
        """Return the quota m of each exemplar set if there are `num_sets` of them."""
        return -(-self.mem_size // num_sets) if self.quota == "ceil" else self.mem_size // num_sets

    def check_stream(self, spec: StreamSpec) -> None:
        """Raise ValueError if there are no classes, fewer exemplars than classes, or inputs do not fit."""
        self.check_labels(spec, self.name)
        self.check_array(spec)
        if self.flip and not spec.images:
            raise ValueError(f"flip needs images, got inputs {specs_text(spec.x)}; leave flip out")
        sets = int(spec.mask.sum())
        if self.mem_size < sets:
            each = "class" if sets == spec.num_classes else "class of each task"
            raise ValueError(
                f"mem_size must be >= {sets}, one exemplar of each {each}, got {self.mem_size}; raise it"
            )


@dataclass(frozen=True)
class OptimizerHParams(Settings):
    """Settings of a built-in optimizer, which does the same arithmetic in both frameworks.

    Raises:
        ValueError: a setting has the wrong type or is out of range, or nesterov=True without momentum.

    Example:
        >>> from sequel_core import OptimizerHParams
        >>> OptimizerHParams(type="sgd", lr=0.1, momentum=0.9).momentum
        0.9
    """

    type: Literal["sgd", "adam", "adamw"] = setting(
        "sgd", "optimizer: `sgd`, `adam` (weight decay in the gradient) or `adamw` (decoupled weight decay)"
    )
    lr: float = setting(0.01, "learning rate", ge=0)
    momentum: float = setting(0.0, "momentum", ge=0, lt=1, only=("type", "sgd"))
    nesterov: bool = setting(False, "use Nesterov momentum", only=("type", "sgd"))
    weight_decay: float = setting(0.0, "coefficient of the weight decay", ge=0)
    beta1: float = setting(
        0.9, "decay rate of the first moment of the gradient", ge=0, lt=1, only=("type", "adam", "adamw")
    )
    beta2: float = setting(
        0.999, "decay rate of the second moment of the gradient", ge=0, lt=1, only=("type", "adam", "adamw")
    )
    eps: float = setting(
        1e-8, "term added to the denominator of the step", gt=0, only=("type", "adam", "adamw")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum > 0, got momentum=0.0")


@dataclass(frozen=True)
class TrainingHParams(Settings):
    """Settings of training and evaluation.

    Example:
        >>> from sequel_core import TrainingHParams
        >>> training = TrainingHParams(batch_size=64, epochs_per_task=(5, 1))
        >>> training.epochs(task=1)
        1
    """

    batch_size: int = setting(10, "number of training samples per step, of all devices together", ge=1)
    drop_last: bool = setting(
        True, "drop the incomplete last batch of an epoch; false to train on it, as most published code does"
    )
    eval_batch_size: int = setting(
        1000, "number of samples per evaluation step, of all devices together", ge=1
    )
    epochs_per_task: int | tuple[int, ...] = setting(
        1, "number of epochs per task, or a list with one number for each task", ge=1
    )
    grad_clip: float | None = setting(
        None, "largest norm or value of the gradient, see grad_clip_algorithm; null for no clipping", gt=0
    )
    grad_clip_algorithm: Literal["norm", "value"] = setting(
        "norm",
        "what grad_clip bounds: `norm`, the norm of the whole gradient; `value`, each of its values (the "
        "code of the DER paper for SI, https://arxiv.org/abs/2004.07211)",
    )
    dtype: Dtype = setting("float32", "type of the weights and of all arithmetic: `float32` or `float64`")
    seed: int = setting(0, "seed of initial weights, batches and dropout", ge=0)
    log_every_n_steps: int = setting(
        50, "number of steps between two logged values of loss and accuracy", ge=1
    )

    def epochs(self, task: int) -> int:
        """Return the number of epochs of a task (from 0).

        Raises:
            ValueError: `epochs_per_task` is a list without an entry for this task.
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
    """When checkpoints are written within a task.

    A checkpoint is also written after each task, and when a signal ends the run.

    Example:
        >>> from sequel_core.hparams import CheckpointHParams
        >>> CheckpointHParams(every_minutes=30, keep=1).every_minutes
        30.0
    """

    every_n_steps: int | None = setting(
        None, "number of steps of a task between two checkpoints; null for none", ge=1
    )
    every_minutes: float | None = setting(None, "minutes between two checkpoints; null for none", gt=0)
    keep: int = setting(2, "number of latest checkpoints to keep; 0 to write none", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("every_n_steps", "every_minutes"):
            if self.keep == 0 and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} needs keep >= 1, got {name}={getattr(self, name)} with keep=0, which writes no "
                    f"checkpoints; set keep >= 1 or leave {name} out"
                )


@dataclass(frozen=True)
class JaxHParams(Settings):
    """Settings of the devices that JAX uses; only with mode=jax.

    Example:
        >>> from sequel_core.hparams import JaxHParams
        >>> JaxHParams(devices=4).runs
        1
    """

    devices: int = setting(1, "number of devices that share each batch", ge=1)
    runs: int = setting(
        1,
        "number of groups of devices among which hydra/launcher=vmap divides the runs; a divisor of devices",
        ge=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.devices % self.runs:
            raise ValueError(
                f"runs must be a divisor of devices={self.devices}, got {self.runs}; use 1 or {self.devices}"
            )


@dataclass(frozen=True)
class TrainerHParams(Settings):
    """Settings of Lightning's Trainer that an experiment may give; see Lightning's documentation.

    Example:
        >>> from sequel_core.hparams import TrainerHParams
        >>> TrainerHParams(accelerator="gpu", precision="bf16-mixed").devices
        'auto'
    """

    accelerator: str = setting("auto", "type of device: auto, cpu, gpu, ...")
    devices: Literal["auto"] | int | tuple[int, ...] = setting(
        "auto", "auto, a number of devices, -1 for all devices, or a list of device indices", ge=-1
    )
    num_nodes: int = setting(1, "number of machines, each with so many devices", ge=1)
    strategy: str = setting("auto", "auto, ddp or ddp_spawn: how several devices share each batch")
    precision: str | int = setting("32-true", "precision: 32-true, 64-true, bf16-mixed, ...", ge=1)
    accumulate_grad_batches: int = setting(
        1, "number of batches whose gradients are added up for one step", ge=1
    )
    deterministic: bool | Literal["warn"] | None = setting(
        None, "true: use deterministic operators; `warn`: warn if there is none"
    )
    benchmark: bool | None = setting(None, "let cuDNN find the fastest convolutions")
    detect_anomaly: bool = setting(False, "find the operator that produced a nan; slow")
    profiler: Literal["simple", "advanced", "pytorch"] | None = setting(
        None, "profiler: `simple`, `advanced`, `pytorch`, or null for none"
    )
