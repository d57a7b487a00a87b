"""Settings as frozen dataclasses, shared by both plug-ins, and the schema of the configuration files.

Every field carries its range; construction checks it and raises a ValueError that names the field, the rule
and the value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set
from dataclasses import Field, dataclass, field, fields
from types import UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from sequel_core import plan
from sequel_core.task import Benchmark, Samples, StreamSpec, Task

Dtype = Literal["float32", "float64"]
MemoryPolicy = Literal["reservoir", "ring", "class_balanced", "task_balanced", "task_quota", "class_quota"]


MOST_UNITS = 100_000
"""The width of a layer has this bound: two such layers alone would take 40 GB."""


def setting(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    only: tuple[Any, ...] | None = None,
) -> Any:
    """Declare a field with its meaning and the range of its numbers.

    `only` names another field and the values of it with which alone this one is read; beside any other value
    it must keep its default.
    """
    rules = {"ge": ge, "gt": gt, "le": le, "lt": lt, "only": only}
    metadata = {"help": help, **{key: rule for key, rule in rules.items() if rule is not None}}
    return field(default=default, metadata=metadata)


def allowed(spec: Field[Any]) -> str:
    """Return the range of a field as text, for example `>= 0`; empty where there is none."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return " and ".join(f"{signs[key]} {spec.metadata[key]:g}" for key in signs if key in spec.metadata)


def _check_number(name: str, value: float, spec: Field[Any]) -> None:
    rule = allowed(spec)
    bounds = spec.metadata
    if isinstance(value, int) and abs(value) >= 2**63:
        rule += f"{' and ' if rule else ''}of less than 64 bits"
        raise ValueError(f"{name} must be {rule}, got {value!r}")
    if math.isinf(value) and not {"le", "lt"} & bounds.keys():
        rule += f"{' and ' if rule else ''}finite"
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
        if isinstance(value, str | bytes | Mapping | Set) or not hasattr(value, "__iter__"):
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
    try:
        number = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        number = math.inf
    if hint is int:
        if not math.isfinite(number) or value != int(value):
            raise ValueError(f"{name} must be a whole number{_and_range(spec)}, got {value!r}")
        number = int(value)
    _check_number(name, number, spec)
    return number


def _told(value: Any) -> str:
    """Return a value as a configuration has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


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
        for spec in (spec for spec in fields(self) if "only" in spec.metadata):
            other, *wanted = spec.metadata["only"]
            value, beside = getattr(self, spec.name), getattr(self, other)
            if beside not in wanted and value != spec.default:
                told = f"{other}={' or '.join(map(_told, wanted))}"
                raise ValueError(
                    f"{spec.name} is read with {told} alone, got {spec.name}={_told(value)} with "
                    f"{other}={_told(beside)}; set {told} or leave {spec.name} out"
                )


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

    def training_tasks(self, benchmark: Benchmark, seed: int = 0) -> Iterator[Task]:
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
    gamma: float = setting(
        1.0,
        "decay of past importances, read only by accumulation=online",
        ge=0,
        le=1,
        only=("accumulation", "online"),
    )
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

    def learning_rate_factor(self, task: Any, learning_rate: Any) -> Any:
        """Return max(learning_rate * lr_decay^(task + 1), min_lr) / learning_rate; see `decay_first`."""
        return super().learning_rate_factor(task + self.decay_first, learning_rate)


@dataclass(frozen=True)
class MemoryHParams(AlgorithmHParams):
    """Settings of methods that keep samples as the stream goes by; see `sequel_core.memory`."""

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
class MCSGDHParams(MemoryHParams):
    """Mode connectivity SGD (Mirzadeh et al. 2021)."""

    name: ClassVar[str] = "mcsgd"

    memory: Literal["task_quota", "class_quota"] = setting(
        "task_quota", "a uniform choice of each task, or of each class of each task"
    )
    lmc_policy: Literal["offline", "online"] = setting(
        "offline",
        "when w_bar is found: offline, after the task, on the samples kept of it and of past tasks; online, "
        "at every step, on its batch and a draw of lmc_batch_size from past tasks",
    )
    lmc_interpolation: Literal["linear"] = setting("linear", "the paths between weights: straight lines")
    lmc_lr: float = setting(0.05, "learning rate of w_bar", ge=0)
    lmc_momentum: float = setting(0.8, "momentum of w_bar", ge=0, lt=1)
    lmc_batch_size: int = setting(64, "samples of past tasks, and of the current, in a step of w_bar", ge=1)
    lmc_init_position: float = setting(
        0.1, "where w_bar starts on the line from its last value (0) to w_hat (1)", ge=0, le=1
    )
    lmc_line_samples: int = setting(
        10, "intervals of the grid on a line; its points are one more", ge=2, le=1000
    )
    lmc_epochs: int = setting(
        1, "passes over the samples that w_bar is found on (offline)", ge=1, only=("lmc_policy", "offline")
    )
    lmc_steps: Literal["batch", "epoch"] = setting(
        "batch",
        "one step of w_bar for each batch, or one for each pass (offline; the code's first version)",
        only=("lmc_policy", "offline"),
    )
    lmc_gradient: Literal["sum", "plain", "prefix"] = setting(
        "sum",
        "sum: of the sum of losses on the lines (the paper); plain: each point's own gradient, without the "
        "factor that its place gives it; prefix: plain with the point k of n counted n + 1 - k times, as the "
        "official code accumulates",
    )
    lmc_loss: Literal["mean", "mean_over_batch_size"] = setting(
        "mean_over_batch_size",
        "mean cross-entropy, or the same divided by lmc_batch_size: the official code, and so its lmc_lr",
    )
    lmc_start: Literal["w_hat", "w_bar"] = setting(
        "w_hat", "what the training on a task goes on from: the last w_hat (official code) or w_bar"
    )

    @property
    def drawn(self) -> int:
        """Samples that a step draws from the memory at once."""
        return self.lmc_batch_size if self.lmc_policy == "online" else 0

    def points(self) -> list[tuple[float, float]]:
        """Return the place of each point on a line, in [0, 1], and the factor of its gradient."""
        n = self.lmc_line_samples
        factors = {"sum": [k / n for k in range(n + 1)], "plain": [1.0] * (n + 1)}
        factors["prefix"] = [float(n + 1 - k) for k in range(n + 1)]
        scale = 1.0 if self.lmc_loss == "mean" else 1.0 / self.lmc_batch_size
        return [(k / n, scale * factor) for k, factor in enumerate(factors[self.lmc_gradient])]


@dataclass(frozen=True)
class LaMAMLHParams(ReplayHParams):
    """La-MAML, look-ahead meta-learning (Gupta et al. 2020); C-MAML with `learn_lr=False`."""

    name: ClassVar[str] = "lamaml"

    glances: int = setting(5, "updates on each batch", ge=1)
    n_inner_updates: int | None = setting(
        None, "inner steps of an update, each on an equal part of the batch; null for one per sample", ge=1
    )
    second_order: bool = setting(False, "differentiate through the gradients of the inner steps")
    learn_lr: bool = setting(True, "learn a rate of every weight; false for the fixed ones of C-MAML")
    lr_alpha: float = setting(0.3, "learning rate of the rates", ge=0, only=("learn_lr", True))
    alpha_init: float = setting(0.15, "rate of every weight at first", gt=0)
    sync_update: bool = setting(
        False,
        "update the weights by the optimizer, beside the rates (Sync); false: by the rates just updated",
    )
    grad_clip_norm: float | None = setting(
        2.0, "greatest norm of the gradient of the weights, and of the rates; null for no clipping", gt=0
    )
    inner_clip: float | None = setting(
        2.0,
        "greatest absolute value in an inner gradient; null for none, which is what the official MNIST code "
        "comes to (it clamps and drops the result), while its CIFAR code clamps",
        gt=0,
    )

    def check(self, spec: StreamSpec, training: TrainingHParams) -> None:
        """Raise ValueError where memory, inner steps or clipping do not fit."""
        super().check(spec, training)
        self.check_parts(training.batch_size)
        if training.grad_clip is not None:
            raise ValueError(
                f"grad_clip_norm is what clips in lamaml, got grad_clip={training.grad_clip}; drop grad_clip"
            )
        if self.lr_decay != 1 and not self.sync_update:
            raise ValueError(
                f"lr_decay must be 1 where the rates take the optimizer's place, got {self.lr_decay}; set "
                "sync_update=true or drop lr_decay"
            )

    def check_parts(self, batch_size: int) -> int:
        """Return the inner steps of a batch; raise ValueError where it does not divide into them."""
        parts = batch_size if self.n_inner_updates is None else self.n_inner_updates
        if batch_size % parts:
            raise ValueError(
                f"n_inner_updates must divide batch_size={batch_size}, got {parts}; change one of them"
            )
        return parts


@dataclass(frozen=True)
class ICaRLHParams(AlgorithmHParams):
    """iCaRL, incremental classifier and representation learning (Rebuffi et al. 2017)."""

    name: ClassVar[str] = "icarl"

    mem_size: int = setting(2000, "exemplars kept in all, K", ge=1)
    quota: Literal["floor", "ceil"] = setting(
        "floor", "exemplars of a class, K / classes seen rounded down (the paper) or up (the official code)"
    )
    outputs: Literal["seen", "all"] = setting(
        "seen", "the loss is the mean over the classes seen so far, or over all (the official code)"
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
            yield plan.with_coreset(task, self.per_class(task), seed)


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


@dataclass(frozen=True)
class BackboneHParams(Settings):
    """Settings of a built-in backbone."""

    type: ClassVar[str]
    modes: ClassVar[tuple[str, ...]] = ("pytorch", "jax")


@dataclass(frozen=True)
class MLPHParams(BackboneHParams):
    """Multi-layer perceptron: dense layers with ReLU, then one dense layer to the classes."""

    type: ClassVar[str] = "mlp"

    widths: tuple[int, ...] = setting((256, 256), "units of each hidden layer, in order", ge=1, le=MOST_UNITS)
    dropout: float = setting(0.0, "probability of dropping a hidden unit while training", ge=0, lt=1)


def _check_groups(norm: str, groups: int, channels: tuple[int, ...]) -> None:
    """Raise ValueError where group normalisation cannot divide the channels of a layer."""
    uneven = [c for c in channels if c % groups]
    if norm == "group" and uneven:
        fits = [g for g in range(1, min(channels) + 1) if all(c % g == 0 for c in channels)]
        raise ValueError(
            f"norm_groups must divide the channels of every layer, got norm_groups={groups} with channels "
            f"{', '.join(map(str, channels))}; use one of {', '.join(map(str, fits))}"
        )


@dataclass(frozen=True)
class CNNHParams(BackboneHParams):
    """Convolutional network: convolutions, hidden dense layers, then one dense layer to the classes."""

    type: ClassVar[str] = "cnn"

    channels: tuple[int, ...] = setting(
        (32, 64), "channels of each convolution, in order", ge=1, le=MOST_UNITS
    )
    kernel_size: int = setting(
        3, "height and width of the kernels; images are padded by half of it, rounded down", ge=1, le=255
    )
    stride: int = setting(2, "step of the convolutions, in pixels", ge=1, le=2)
    max_pool: bool = setting(False, "take the maxima of 2x2 pixels after each convolution; needs stride=1")
    linear_widths: tuple[int, ...] = setting(
        (128,), "units of each hidden dense layer after the convolutions", ge=1, le=MOST_UNITS
    )
    activation: Literal["relu", "tanh", "sigmoid", "elu", "gelu"] = setting(
        "relu", "of the convolutions and hidden dense layers"
    )
    norm: Literal["none", "batch", "group"] = setting(
        "none", "normalisation after each convolution: by batch statistics, in groups of channels, or none"
    )
    norm_groups: int = setting(
        4,
        "groups of channels, read only by norm=group; must divide channels",
        ge=1,
        only=("norm", "group"),
    )
    dropout: float = setting(0.0, "probability of dropping a hidden unit while training", ge=0, lt=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_pool and self.stride != 1:
            raise ValueError(
                f"max_pool needs stride=1, as both halve the image, got stride={self.stride}; set stride=1 "
                "or max_pool=false"
            )
        _check_groups(self.norm, self.norm_groups, self.channels)

    def feature_shape(self, image_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return (H, W, C) of what the convolutions make of images (H, W, C).

        Raises:
            ValueError: nothing is left of the image.
        """
        height, width, channels = image_shape
        for i in range(len(self.channels)):
            height, width = self._after(height), self._after(width)
            if not height * width:
                raise ValueError(
                    f"images of shape {list(image_shape)} are too small for the layers of channels="
                    f"{list(self.channels)}: nothing is left after the max-pool of layer conv_{i}; use at "
                    f"most {i} layers or max_pool=false"
                )
        return height, width, (channels, *self.channels)[-1]

    def _after(self, size: int) -> int:
        size = (size + 2 * (self.kernel_size // 2) - self.kernel_size) // self.stride + 1
        return size // 2 if self.max_pool else size


@dataclass(frozen=True)
class ResNet18HParams(BackboneHParams):
    """ResNet-18 (He et al. 2016) for small images: a first convolution of 3x3 with stride 1, no max-pool."""

    type: ClassVar[str] = "resnet18"

    channels: int = setting(
        64, "channels of the first of four stages; each has twice the one before's", ge=1, le=MOST_UNITS
    )
    norm: Literal["batch", "group"] = setting(
        "batch", "normalisation after each convolution: by batch statistics, or in groups of channels"
    )
    norm_groups: int = setting(
        4,
        "groups of channels, read only by norm=group; must divide channels",
        ge=1,
        only=("norm", "group"),
    )
    dropout: float = setting(
        0.0, "probability of dropping a unit between the convolutions of a block while training", ge=0, lt=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_groups(self.norm, self.norm_groups, (self.channels,))


@dataclass(frozen=True)
class ResNet18ThinHParams(ResNet18HParams):
    """ResNet-18 with 20 channels in its first stage (Lopez-Paz & Ranzato 2017)."""

    type: ClassVar[str] = "resnet18_thin"

    channels: int = setting(
        20, "channels of the first of four stages; each has twice the one before's", ge=1, le=MOST_UNITS
    )


@dataclass(frozen=True)
class TorchvisionHParams(BackboneHParams):
    """A classification model of torchvision; its last dense layer is replaced by one for the classes."""

    type: ClassVar[str] = "torchvision"
    modes: ClassVar[tuple[str, ...]] = ("pytorch",)

    model: str = setting("mobilenet_v3_small", "name, as torchvision.models.list_models() gives it")
    weights: str | None = setting(None, "trained weights to start from, for example DEFAULT; null for none")


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
        MCSGDHParams,
        LaMAMLHParams,
        ICaRLHParams,
        KCLHParams,
    )
}

BACKBONES: dict[str, type[BackboneHParams]] = {
    cls.type: cls
    for cls in (MLPHParams, CNNHParams, ResNet18HParams, ResNet18ThinHParams, TorchvisionHParams)
}
