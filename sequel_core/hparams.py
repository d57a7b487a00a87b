"""Settings as frozen dataclasses, shared by both plug-ins, and the schema of the configuration files.

Every field carries its range; construction checks it and raises a ValueError that names the field, the rule
and the value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields
from types import UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from sequel_core.task import Benchmark, StreamSpec, Task

Dtype = Literal["float32", "float64"]
MemoryPolicy = Literal["reservoir", "ring", "class_balanced", "task_balanced", "task_quota", "class_quota"]


def setting(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """Declare a field with its meaning and the range of its numbers."""
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    metadata = {"help": help, **{key: bound for key, bound in bounds.items() if bound is not None}}
    return field(default=default, metadata=metadata)


def allowed(spec: Field[Any]) -> str:
    """Return the range of a field as text, for example `>= 0`; empty where there is none."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return " and ".join(f"{signs[key]} {spec.metadata[key]:g}" for key in signs if key in spec.metadata)


def _check_number(name: str, value: float, spec: Field[Any]) -> None:
    rule = allowed(spec)
    bounds = spec.metadata
    fits = (
        math.isfinite(value)
        and value >= bounds.get("ge", -math.inf)
        and value > bounds.get("gt", -math.inf)
        and value <= bounds.get("le", math.inf)
        and value < bounds.get("lt", math.inf)
    )
    if not fits:
        raise ValueError(f"{name} must be {rule or 'finite'}, got {value!r}")


def _coerce(name: str, value: Any, hint: Any, spec: Field[Any]) -> Any:
    """Return the value as the type that the field is annotated with, or raise ValueError."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and type(None) in args:
            return None
        errors = []
        for option in (a for a in args if a is not type(None)):
            try:
                return _coerce(name, value, option, spec)
            except ValueError as error:
                errors.append(str(error))
        raise ValueError(errors[0] if len(errors) == 1 else " or ".join(errors))
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{name} must be one of {', '.join(map(str, args))}, got {value!r}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise ValueError(f"{name} must be a list, got {value!r}")
        return tuple(_coerce(name, item, args[0], spec) for item in value)
    if hint is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r}")
        return value
    if hint is str:
        if not isinstance(value, str):
            raise ValueError(f"{name} must be text, got {value!r}")
        return value
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise ValueError(f"{name} must be a number{_and_range(spec)}, got {value!r}")
    if hint is int:
        if not math.isfinite(value) or value != int(value):
            raise ValueError(f"{name} must be a whole number{_and_range(spec)}, got {value!r}")
        value = int(value)
    else:
        value = float(value)
    _check_number(name, value, spec)
    return value


def _and_range(spec: Field[Any]) -> str:
    return f" {allowed(spec)}" if allowed(spec) else ""


@dataclass(frozen=True)
class Settings:
    """A group of checked settings; see `setting`."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for spec in fields(self):
            value = _coerce(spec.name, getattr(self, spec.name), hints[spec.name], spec)
            object.__setattr__(self, spec.name, value)


@dataclass(frozen=True)
class AlgorithmHParams(Settings):
    """Settings that every algorithm has."""

    name: ClassVar[str]

    lr_decay: float = setting(1.0, "factor of the learning rate from one task to the next", gt=0, le=1)
    min_lr: float = setting(0.0, "floor of the decayed learning rate", ge=0)
    reset_optimizer: bool = setting(True, "start every task with a fresh optimizer state")

    def learning_rate_factor(self, task: int, learning_rate: float) -> float:
        """Return max(learning_rate * lr_decay^task, min_lr) / learning_rate; tasks count from 0."""
        decayed = learning_rate * self.lr_decay**task
        return float(max(decayed, min(self.min_lr, learning_rate)) / learning_rate)

    def training_tasks(self, benchmark: Benchmark) -> Iterator[Task]:
        """Yield what to train on, stage by stage; a stage's index says after which task it stands."""
        yield from benchmark.tasks

    def check(self, spec: StreamSpec, batch_size: int) -> None:
        """Raise ValueError where the settings do not fit a stream or its batches."""


@dataclass(frozen=True)
class NaiveHParams(AlgorithmHParams):
    """Naive finetuning: no setting of its own."""

    name: ClassVar[str] = "naive"


@dataclass(frozen=True)
class JointHParams(AlgorithmHParams):
    """Joint training on the union of tasks, the usual upper bound."""

    name: ClassVar[str] = "joint"

    policy: Literal["cumulative", "once"] = setting(
        "cumulative",
        "cumulative: at task i go on with the same network on tasks 0 to i; once: from initialisation on all",
    )

    def training_tasks(self, benchmark: Benchmark) -> Iterator[Task]:
        """Yield the joined tasks: every prefix of the stream, or the whole stream once."""
        first = len(benchmark) - 1 if self.policy == "once" else 0
        for i in range(first, len(benchmark)):
            yield benchmark.joined(i)


@dataclass(frozen=True)
class EWCHParams(AlgorithmHParams):
    """Elastic weight consolidation (Kirkpatrick et al. 2017)."""

    name: ClassVar[str] = "ewc"

    ewc_lambda: float = setting(
        1.0, "strength lambda of the penalty lambda/2 * sum F (theta - theta*)^2", ge=0
    )
    accumulation: Literal["separate", "online"] = setting(
        "separate",
        "separate: one anchor per task (collapsed exactly); online: one anchor, importances decayed by gamma",
    )
    gamma: float = setting(1.0, "decay of past importances, read only by accumulation=online", ge=0, le=1)
    fisher_samples: int | None = setting(1024, "samples of the Fisher estimate of a task; null for all", ge=1)


@dataclass(frozen=True)
class SIHParams(AlgorithmHParams):
    """Synaptic intelligence (Zenke et al. 2017)."""

    name: ClassVar[str] = "si"

    si_lambda: float = setting(0.1, "strength c of the penalty c * sum Omega (theta - theta*)^2", ge=0)
    xi: float = setting(0.1, "damping of the squared displacement that importances are divided by", gt=0)
    clamp: bool = setting(False, "keep importances at zero or above, as the official code does")


@dataclass(frozen=True)
class MASHParams(AlgorithmHParams):
    """Memory aware synapses (Aljundi et al. 2018)."""

    name: ClassVar[str] = "mas"

    mas_lambda: float = setting(
        1.0, "strength lambda of the penalty lambda * sum Omega (theta - theta*)^2", ge=0
    )
    gradients: Literal["sample", "batch"] = setting(
        "sample", "absolute values of the gradient of each sample, or of each batch's sum (the official code)"
    )
    mas_samples: int | None = setting(None, "samples of the importances of a task; null for all", ge=1)


@dataclass(frozen=True)
class LFLHParams(AlgorithmHParams):
    """Less-forgetting learning (Jung et al. 2016)."""

    name: ClassVar[str] = "lfl"

    lfl_lambda: float = setting(
        0.001, "strength lambda_e of lambda_e/2 * ||f(x) - f_old(x)||^2, f the last hidden features", ge=0
    )
    freeze_head: bool = setting(True, "keep the last layer as the first task left it")


@dataclass(frozen=True)
class StableSGDHParams(AlgorithmHParams):
    """Stable SGD (Mirzadeh et al. 2020); dropout and momentum are the backbone's and the optimizer's."""

    name: ClassVar[str] = "stable_sgd"

    lr_decay: float = setting(0.8, "factor gamma of the learning rate from one task to the next", gt=0, le=1)
    min_lr: float = setting(5e-5, "floor of the decayed learning rate", ge=0)
    decay_first: bool = setting(
        True, "task t (from 0) has lr * gamma^(t + 1), as in the official code; false for lr * gamma^t"
    )

    def learning_rate_factor(self, task: int, learning_rate: float) -> float:
        """Return max(learning_rate * lr_decay^(task + 1), min_lr) / learning_rate; see `decay_first`."""
        return super().learning_rate_factor(task + self.decay_first, learning_rate)


@dataclass(frozen=True)
class ReplayHParams(AlgorithmHParams):
    """Settings of methods that keep samples of the stream; see `sequel_core.memory`."""

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
    mem_batch_size: int = setting(10, "samples drawn from the memory at a step, without replacement", ge=1)

    def slots(self, num_tasks: int) -> int:
        """Return the number of samples that the memory holds."""
        per_task = self.per_task_memory_samples
        return self.mem_size if per_task is None else per_task * num_tasks

    def parts(self, spec: StreamSpec) -> int:
        """Return into how many parts of fixed and equal size the memory is divided; 1 for no division."""
        if self.memory == "task_quota":
            return spec.num_tasks
        return int(spec.mask.sum()) if self.memory in ("ring", "class_quota") else 1

    def check(self, spec: StreamSpec, batch_size: int) -> None:
        """Raise ValueError for a memory that fits neither the batches nor the parts it is divided into."""
        size, parts = self.slots(spec.num_tasks), self.parts(spec)
        name = "mem_size" if self.per_task_memory_samples is None else "per_task_memory_samples"
        got = f"got {getattr(self, name)}" + (f" ({size} in all)" if name != "mem_size" else "")
        if 0 < size < batch_size:
            raise ValueError(
                f"{name} must be 0 or give at least batch_size={batch_size} slots, so that the samples of a "
                f"step fit, {got}; raise {name} or lower batch_size"
            )
        if 0 < size < self.mem_batch_size:
            raise ValueError(
                f"mem_batch_size must be <= the {size} samples of the memory, got {self.mem_batch_size}; "
                f"lower mem_batch_size or raise {name}"
            )
        if size % parts:
            unit = 1 if name == "mem_size" else spec.num_tasks
            step = math.lcm(parts, unit)
            totals = [k * step for k in (size // step, size // step + 1, size // step + 2)]
            fits = [str(total // unit) for total in totals if total >= max(batch_size, self.mem_batch_size)]
            owner = "task" if self.memory == "task_quota" else "class of each task"
            raise ValueError(
                f"{name} must divide into the {parts} equal parts of memory={self.memory}, one for each "
                f"{owner}, {got}; use {' or '.join(fits[:2]) or f'a multiple of {step // unit}'}"
            )


@dataclass(frozen=True)
class AGEMHParams(ReplayHParams):
    """Averaged gradient episodic memory (Chaudhry et al. 2019)."""

    name: ClassVar[str] = "agem"

    memory: Literal["ring", "task_quota", "class_quota"] = setting(
        "ring",
        "ring: the latest samples of each class of each task; task_quota, class_quota: a uniform choice of "
        "each task, or of each class of each task",
    )
    mem_size: int = setting(1000, "samples kept in all; 0 for none, which is naive finetuning", ge=0)
    mem_batch_size: int = setting(256, "samples of past tasks that the reference gradient is taken on", ge=1)


@dataclass(frozen=True)
class ERHParams(ReplayHParams):
    """Experience replay (Chaudhry et al. 2019)."""

    name: ClassVar[str] = "er"


@dataclass(frozen=True)
class DERHParams(ReplayHParams):
    """Dark experience replay (Buzzega et al. 2020)."""

    name: ClassVar[str] = "der"

    alpha: float = setting(0.1, "weight of the squared distance to the stored logits", ge=0)
    distance: Literal["sum", "mean"] = setting(
        "sum", "of squares over classes: sum (the paper's norm) or mean (its code and tuned alphas)"
    )


@dataclass(frozen=True)
class DERppHParams(DERHParams):
    """DER++, dark experience replay with labels (Buzzega et al. 2020)."""

    name: ClassVar[str] = "derpp"

    beta: float = setting(0.5, "weight of the cross-entropy of a second draw from the memory", ge=0)


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
    beta1: float = setting(0.9, "of adam and adamw", ge=0, lt=1)
    beta2: float = setting(0.999, "of adam and adamw", ge=0, lt=1)
    eps: float = setting(1e-8, "of adam and adamw", gt=0)

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
class BackboneHParams(Settings):
    """Settings of a built-in backbone."""

    type: ClassVar[str]


@dataclass(frozen=True)
class MLPHParams(BackboneHParams):
    """Multi-layer perceptron: dense layers with ReLU, then one dense layer to the classes."""

    type: ClassVar[str] = "mlp"

    widths: tuple[int, ...] = setting((256, 256), "units of each hidden layer, in order", ge=1)
    dropout: float = setting(0.0, "probability of dropping a hidden unit while training", ge=0, lt=1)


ALGORITHMS: dict[str, type[AlgorithmHParams]] = {
    cls.name: cls
    for cls in (
        NaiveHParams,
        JointHParams,
        EWCHParams,
        SIHParams,
        MASHParams,
        LFLHParams,
        StableSGDHParams,
        AGEMHParams,
        ERHParams,
        DERHParams,
        DERppHParams,
    )
}

BACKBONES: dict[str, type[BackboneHParams]] = {cls.type: cls for cls in (MLPHParams,)}
