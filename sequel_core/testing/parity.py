"""Both versions of a method end with the same weights: three tasks, float64, the real learners."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

from sequel_core import entry_points
from sequel_core.algorithms import ALGORITHMS
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.hparams import AlgorithmHParams, OptimizerHParams, TrainingHParams
from sequel_core.runs.learner import PLUGINS, FitMonitor, Learner, Mode, plugin
from sequel_core.settings import check_name
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.benchmark import Benchmark, Scenario
from sequel_core.testing.streams import Targets, table

Stream = Scenario | Targets
Weights = dict[str, FloatArray]
Implementations = Mapping[Mode, Any] | None
"""By mode, what `make_learner(implementation=...)` takes; None for a method that is built in or installed."""

BOTH: tuple[Mode, Mode] = ("pytorch", "jax")
WIDTHS = (32, 24)
SILENT = FitMonitor(on_progress=lambda progress: None, on_evaluate=lambda: None)

SGD = OptimizerHParams(lr=0.05)
OPTIMIZERS: dict[str, tuple[OptimizerHParams, dict[str, Any]]] = {
    "sgd": (SGD, {}),
    "momentum": (OptimizerHParams(lr=0.02, momentum=0.9), {}),
    "nesterov and weight decay": (
        OptimizerHParams(lr=0.02, momentum=0.8, nesterov=True, weight_decay=0.01),
        {},
    ),
    "adam": (OptimizerHParams(type="adam", lr=0.002), {}),
    "adam and weight decay": (OptimizerHParams(type="adam", lr=0.002, weight_decay=0.01), {}),
    "adamw": (OptimizerHParams(type="adamw", lr=0.002, weight_decay=0.1), {}),
    "clipping": (SGD, {"grad_clip": 0.5}),
    "clipping by value": (SGD, {"grad_clip": 0.02, "grad_clip_algorithm": "value"}),
    "two epochs": (SGD, {"epochs_per_task": (1, 2, 1)}),
}
"""Name: optimizer, and what differs in the training settings."""


def check_parity(
    hparams: AlgorithmHParams,
    optimizer: str = "sgd",
    scenario: Stream = "domain",
    *,
    implementations: Implementations = None,
    benchmark: Benchmark | None = None,
    tolerance: float = 1e-10,
) -> float:
    """Check that both frameworks end with the same weights, in float64.

    Args:
        hparams: settings of the method.
        optimizer: one of `sequel_core.testing.parity.OPTIMIZERS`: `sgd`, `momentum`, `adam`, `clipping`, ...
        scenario: `domain`, `task` or `class` for images; `classes`, `labels` or `values` for tables with
            these targets.
        implementations: the module and the factory by mode; None if the method is built in or installed.
        benchmark: the stream; None for the scenario's, with three tasks of 205 steps or five of 40.
        tolerance: bound of |a - b| / |b| of each array, > 0.

    Returns:
        The greatest relative difference of an array.

    Raises:
        AssertionError: the difference is not below the tolerance.
        ValueError: there is no implementation for a mode.

    Example:
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import SIHParams
        >>> check_parity(SIHParams(), benchmark=RotatedDigits(num_tasks=2, subset=35)) < 1e-10
        True
    """
    torch, flax = (trained(mode, hparams, optimizer, scenario, implementations, benchmark) for mode in BOTH)
    gap = difference(flax, torch)
    if not gap < tolerance:
        raise AssertionError(
            f"{hparams} with {optimizer}: the weights of the frameworks differ by {gap:.2g}, which is not "
            f"below {tolerance:g}"
        )
    return gap


def check_effect(
    hparams: AlgorithmHParams,
    optimizer: str = "sgd",
    scenario: Stream = "domain",
    *,
    implementations: Implementations = None,
    modes: Sequence[Mode] | None = None,
    benchmark: Benchmark | None = None,
    naive: NaiveHParams | None = None,
) -> float:
    """Check that a usual strength changes the result: the weights differ from those of naive finetuning.

    Args:
        hparams: settings of the method.
        optimizer: see `check_parity`.
        scenario: see `check_parity`.
        implementations: see `check_parity`.
        modes: frameworks to check; None for all that the method has an implementation for.
        benchmark: see `check_parity`.
        naive: settings of naive finetuning; None for those that it shares with `hparams`.

    Returns:
        The greatest relative difference of an array, the least over the modes.

    Raises:
        AssertionError: no array differs by more than 1e-3.

    Example:
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import ERHParams
        >>> stream = RotatedDigits(num_tasks=2, subset=70)
        >>> check_effect(ERHParams(mem_batch_size=7), benchmark=stream, modes=["pytorch"]) > 1e-3
        True
    """
    shared = ("lr_decay", "min_lr", "reset_optimizer")
    naive = naive or NaiveHParams(**{name: getattr(hparams, name) for name in shared})
    gaps = []
    for mode in modes_of(hparams, implementations) if modes is None else modes:
        plain = trained(mode, naive, optimizer, scenario, None, benchmark)
        weights = trained(mode, hparams, optimizer, scenario, implementations, benchmark)
        gaps.append(difference({name: weights[name] for name in plain}, plain))
        if not gaps[-1] > 1e-3:
            raise AssertionError(
                f"{hparams} with mode={mode}: the weights differ from those of naive finetuning by "
                f"{gaps[-1]:.2g}, which is not above 1e-3"
            )
    return min(gaps)


def check_strength_zero(
    hparams: AlgorithmHParams,
    optimizer: str = "momentum",
    scenario: Stream = "class",
    *,
    implementations: Implementations = None,
    modes: Sequence[Mode] | None = None,
    benchmark: Benchmark | None = None,
) -> None:
    """Check that a method whose strength is 0 is naive finetuning: the weights are bit-identical.

    Args:
        hparams: settings of the method, with the strength 0.
        optimizer: see `check_parity`.
        scenario: see `check_parity`.
        implementations: see `check_parity`.
        modes: frameworks to check; None for all that the method has an implementation for.
        benchmark: see `check_parity`.

    Raises:
        AssertionError: a weight differs.

    Example:
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import EWCHParams
        >>> stream = RotatedDigits(num_tasks=2, subset=35)
        >>> check_strength_zero(EWCHParams(ewc_lambda=0), benchmark=stream, modes=["pytorch"])
    """
    for mode in modes_of(hparams, implementations) if modes is None else modes:
        zero = trained(mode, hparams, optimizer, scenario, implementations, benchmark)
        for name, array in trained(mode, NaiveHParams(), optimizer, scenario, None, benchmark).items():
            np.testing.assert_array_equal(zero[name], array, f"{hparams}, mode={mode}: {name}")


# -- parts, also for tests of one's package that these checks do not cover


def modes_of(hparams: AlgorithmHParams, implementations: Implementations = None) -> list[Mode]:
    """Return the modes that a method has an implementation for."""
    if implementations is not None:
        return [mode for mode in PLUGINS if mode in implementations]
    return list(PLUGINS) if hparams.name in ALGORITHMS else entry_points.modes_of(hparams.name)


@cache
def stream(scenario: Stream = "domain") -> Benchmark:
    """Return three rotations of the digits, 205 batches of 7 each; or five pairs of digits, 40 batches each.

    The streams of tables have three tasks of 205 batches.
    """
    if scenario == "classes" or scenario == "labels" or scenario == "values":
        return table(scenario, train=205 * 7)
    benchmarks: Any = import_module("sequel_benchmarks")
    made: Benchmark
    if scenario == "domain":
        made = benchmarks.RotatedDigits(num_tasks=3)
    else:
        made = benchmarks.SplitDigits(num_tasks=5, scenario=scenario, class_order="seeded")
    return made


def training(**changes: Any) -> TrainingHParams:
    """Return the training settings of the parity runs."""
    return TrainingHParams(batch_size=7, dtype="float64", seed=3, **changes)


def learner(
    mode: Mode,
    hparams: AlgorithmHParams,
    optimizer: OptimizerHParams,
    benchmark: Benchmark,
    implementations: Implementations = None,
    options: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Learner:
    """Return a learner with an MLP; its loop is the real one.

    Args:
        mode: the framework.
        hparams: settings of the method.
        optimizer: settings of the optimizer.
        benchmark: the stream.
        implementations: see `check_parity`.
        options: further arguments of the plug-in's `make_learner`.
        **changes: training settings that differ from those of `training()`.
    """
    package: Any = plugin(mode)
    shape = {"image_shape": benchmark.spec.x.shape} if mode == "pytorch" else {}
    net = package.MLP(WIDTHS, benchmark.num_classes, **shape)
    made: Learner = package.make_learner(
        hparams,
        net,
        package.build_optimizer(optimizer),
        benchmark,
        training(**changes),
        implementation=None if implementations is None else implementations[mode],
        **(options or {}),
    )
    return made


def train(made: Learner, benchmark: Benchmark) -> Learner:
    """Train a learner on all tasks, and return it."""
    tasks = list(made.hparams.training_tasks(benchmark, made.training.seed))
    for task in tasks:
        made.fit_task(task, SILENT)
    steps = sum(len(task.train) // made.training.batch_size for task in tasks)
    if made.step < steps:
        raise AssertionError(f"{made.hparams}: {made.step} steps were taken for {steps} batches")
    return made


def trained(
    mode: Mode,
    hparams: AlgorithmHParams,
    optimizer: str,
    scenario: Stream = "domain",
    implementations: Implementations = None,
    benchmark: Benchmark | None = None,
) -> Weights:
    """Return the weights after all tasks, in float64; a run with the same arguments is not repeated."""
    check_name("optimizer", optimizer, OPTIMIZERS)
    given = None if implementations is None else implementations[mode]
    if benchmark is None:
        return _trained(mode, hparams, optimizer, scenario, given)
    return _weights(mode, hparams, optimizer, benchmark, given)


@cache
def _trained(
    mode: Mode, hparams: AlgorithmHParams, optimizer: str, scenario: Stream, implementation: Any
) -> Weights:
    return _weights(mode, hparams, optimizer, stream(scenario), implementation)


def _weights(
    mode: Mode, hparams: AlgorithmHParams, optimizer: str, benchmark: Benchmark, implementation: Any
) -> Weights:
    settings, changes = OPTIMIZERS[optimizer]
    implementations = None if implementation is None else {mode: implementation}
    with double_precision(mode):
        return train(
            learner(mode, hparams, settings, benchmark, implementations, **changes), benchmark
        ).weights()


@contextmanager
def double_precision(mode: Mode) -> Iterator[None]:
    """Let JAX compute in float64; PyTorch needs no such setting."""
    if mode == "pytorch":
        yield
        return
    with import_module("jax").enable_x64(True):
        yield


def difference(a: Mapping[str, FloatArray], b: Mapping[str, FloatArray]) -> float:
    """Return the greatest relative difference of an array, |a - b| / |b| in the Euclidean norm.

    Example:
        >>> round(difference({"w": np.array([3.0, 4.1])}, {"w": np.array([3.0, 4.0])}), 3)
        0.02
    """
    if a.keys() != b.keys():
        raise AssertionError(f"the weights must have the same names, got {sorted(a)} and {sorted(b)}")
    size = {k: float(np.linalg.norm(b[k])) or 1.0 for k in b}
    return max(float(np.linalg.norm(a[k] - b[k])) / size[k] for k in a)
