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

from sequel_core.task import Benchmark, Task

Dtype = Literal["float32", "float64"]


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
        if float(value) != int(value):
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
    cls.name: cls for cls in (NaiveHParams, JointHParams, EWCHParams)
}

BACKBONES: dict[str, type[BackboneHParams]] = {cls.type: cls for cls in (MLPHParams,)}
