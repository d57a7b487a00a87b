"""Builds learners from settings; `sequel_lightning.build` has the same functions with the same parameters."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import clu.metrics
import jax
import optax
import scipy.linalg  # noqa: F401 - whose LAPACK jaxlib calls
from flax import linen as nn
from threadpoolctl import threadpool_limits

from sequel_core import entry_points
from sequel_core.backbones import FOR_TOKENS
from sequel_core.experiment.build import SUPPLIED
from sequel_core.experiment.schema import ExperimentConfig
from sequel_core.experiment.target import TARGET, Target
from sequel_core.hparams import AlgorithmHParams, OptimizerHParams, TrainingHParams
from sequel_core.objectives import ObjectiveHParams
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.plan import Init
from sequel_flax._compat import write_errors_left_to_the_caller
from sequel_flax.algorithms import ALGORITHMS
from sequel_flax.backbones import BACKBONES
from sequel_flax.bundle import Algorithm
from sequel_flax.learner import FlaxLearner
from sequel_flax.objectives import Objective, build_objective
from sequel_flax.optimizers import build_optimizer as build_optimizer
from sequel_flax.programs import kept_on_disk, released
from sequel_flax.sharding import device_mesh
from sequel_flax.writers import WRITERS, MetricWriter

if TYPE_CHECKING:
    from flax import nnx  # slow to import


def make_learner(
    hparams: AlgorithmHParams,
    model: nn.Module | nnx.Module,
    optimizer: optax.GradientTransformation | OptimizerHParams,
    benchmark: Benchmark,
    training: TrainingHParams | None = None,
    *,
    metrics: type[clu.metrics.Collection] | None = None,
    objective: Objective | None = None,
    loggers: Sequence[MetricWriter] = (),
    implementation: Callable[..., Algorithm] | None = None,
    init: Init = "torch",
    **options: Any,
) -> FlaxLearner:
    """Return a learner for an algorithm, chosen by the class of its settings.

    Args:
        hparams: Settings of the algorithm, for example `EWCHParams(ewc_lambda=1)`.
        model: A linen or an NNX module. A built-in network has the plan's initial weights for
            `training.seed`, another linen module those of `model.init`, and an NNX module its current ones.
        optimizer: For example `optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)`, or the settings of a
            built-in one.
        benchmark: The stream of tasks.
        training: Batch size, epochs, clipping, seed and dtype; None for the defaults.
        metrics: Metrics of the training batches; None for the loss and the score.
        objective: What the network is trained and scored on; None for the built-in objective that fits the
            targets of the stream.
        loggers: Metric writers.
        implementation: A user-defined algorithm, called as `implementation(hparams, seed=...)`; None for the
            built-in one, or that of an installed package, see `sequel_core.entry_points`.
        init: The distribution of the initial weights of a built-in network: `torch`, `xavier` or `kaiming`.
        options: `hooks`, `steps_per_call` and `devices` of `FlaxLearner`, and `trainable`, the parameters to
            train: a predicate over paths, a tree of bools, or an NNX filter.

    Returns:
        The learner.

    Raises:
        ValueError: The algorithm is not built in, no installed package provides it, and it has no
            implementation; or the implementation does not return an `Algorithm`.

    Example:
        >>> import optax
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core.algorithms.ewc import EWCHParams
        >>> from sequel_flax import MLP
        >>> benchmark = RotatedDigits(num_tasks=2, subset=20)
        >>> optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
        >>> learner = make_learner(EWCHParams(ewc_lambda=1), MLP(widths=(8,)), optimizer, benchmark)
        >>> learner.step
        0
    """
    training = training or TrainingHParams()
    implementation = implementation or ALGORITHMS.get(hparams.name)
    if implementation is None:
        implementation = entry_points.implementation(hparams, "jax")
    trainable = options.pop("trainable", None)
    given = {"trainable": trainable, "objective": objective}
    selection = {name: value for name, value in given.items() if value is not None}
    implementation = partial(implementation, seed=training.seed, **selection)
    algorithm = implementation(hparams)
    if not isinstance(algorithm, Algorithm):
        raise ValueError(f"implementation must give an Algorithm, got a {type(algorithm).__name__}")
    learner = FlaxLearner(
        algorithm,
        model,
        optimizer,
        benchmark.spec,
        training,
        metrics=metrics,
        writers=loggers,
        init=init,
        **options,
    )
    learner.implementation = implementation
    return learner


@contextmanager
def process_settings(config: ExperimentConfig) -> Iterator[None]:
    """Apply the process-wide settings of an experiment, and restore the previous ones at the end.

    They are:

    - 64-bit JAX if `training.dtype` is float64.
    - One thread for LAPACK unless OMP_NUM_THREADS or OPENBLAS_NUM_THREADS is set. XLA calls LAPACK for KCL's
      factorisations. They are too small for several threads, which compete with those of XLA: on two cores a
      step took three times as long.
    - Failed writes of checkpoints are raised as exceptions, and orbax does not log them as well.
    - Compiled programs are kept in the user's cache directory; see `sequel_flax.programs.kept_on_disk`.

    After every tenth run of a process, its compiled programs are freed.

    Args:
        config: The configuration of the experiment.

    Example:
        >>> from sequel_core.experiment.compose import compose
        >>> config = compose(["mode=jax", "training.dtype=float64"]).config
        >>> with process_settings(config):
        ...     str(jax.numpy.zeros(1).dtype)
        'float64'
        >>> str(jax.numpy.zeros(1).dtype)
        'float32'
    """
    with ExitStack() as stack:
        stack.enter_context(write_errors_left_to_the_caller())
        stack.enter_context(released())
        stack.enter_context(kept_on_disk())
        if not {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"} & os.environ.keys():
            stack.enter_context(threadpool_limits(1, "blas"))
        if config.training.dtype == "float64" and not jax.config.read("jax_enable_x64"):
            jax.config.update("jax_enable_x64", True)  # for all threads
            stack.callback(jax.config.update, "jax_enable_x64", False)
        yield


def build_learner(
    config: ExperimentConfig, benchmark: Benchmark, run_dir: Path, *, callbacks: Sequence[Any] = ()
) -> FlaxLearner:
    """Return the learner of an experiment; call it within `process_settings(config)`.

    Args:
        config: The configuration of the experiment.
        benchmark: The stream of tasks.
        run_dir: The directory of the run, for loggers.
        callbacks: Hooks.

    Returns:
        The learner.

    Raises:
        ValueError: A user-defined model, objective, optimizer, algorithm or logger is of the wrong type.

    Example:
        >>> from sequel_core.experiment.compose import compose
        >>> from sequel_core.experiment.build import build_benchmark
        >>> config = compose(["mode=jax", "algo=ewc", "benchmark=rotateddigits"]).config
        >>> learner = build_learner(config, build_benchmark(config), Path("run"))
        >>> learner.hparams.name
        'ewc'
    """
    join_processes(config.jax.devices)
    targets = config.user_code
    if "backbone" in targets:
        from flax import nnx

        shape = {"image_shape": benchmark.image_shape} if benchmark.spec.images else {}
        model = targets["backbone"].make(
            num_classes=benchmark.num_classes, rngs=nnx.Rngs(config.training.seed), **shape
        )
    else:
        sizes: dict[str, Any] = {"num_classes": benchmark.num_classes}
        if config.backbone.type in FOR_TOKENS:
            sizes["per_token"] = benchmark.spec.per_token
        model = BACKBONES[config.backbone.type](**config.backbone.arguments(), **sizes)
    optimizer: Any = config.optimizer
    if "optimizer" in targets:
        optimizer = user_optimizer(targets["optimizer"])
    return make_learner(
        config.algo,
        model,
        optimizer,
        benchmark,
        config.training,
        loggers=[build_logger(name, chosen, run_dir) for name, chosen in config.logger.items()],
        implementation=targets["algo"].function if "algo" in targets else None,
        objective=user_objective(config, benchmark),
        init=config.backbone.init,
        hooks=callbacks,
        devices=device_mesh(config.jax.devices, config.jax.runs) or 1,
    )


def join_processes(devices: int) -> None:
    """Connect the processes that SLURM's `srun` has started, if a run divides batches among their devices.

    Args:
        devices: Of the run, in all processes.

    Example:
        >>> join_processes(1)
    """
    started = "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1
    if devices > 1 and started and not jax.distributed.is_initialized():
        jax.distributed.initialize()


def user_objective(config: ExperimentConfig, benchmark: Benchmark) -> Objective | None:
    """Return the objective of an experiment; None for the one that fits the targets of the stream.

    Args:
        config: The configuration of the experiment.
        benchmark: The stream of tasks.

    Returns:
        The objective.

    Raises:
        ValueError: A user-defined factory does not return an `Objective`, or it does not fit the stream.

    Example:
        >>> from sequel_core.experiment.compose import compose
        >>> from sequel_core.experiment.build import build_benchmark
        >>> config = compose(["mode=jax", "benchmark=rotateddigits", "objective.type=cross_entropy"]).config
        >>> user_objective(config, build_benchmark(config)).score.name
        'accuracy'
    """
    target = config.user_code.get("objective")
    if target is None:
        if config.objective == ObjectiveHParams():
            return None
        return build_objective(config.objective, benchmark.spec)
    objective = target.make()
    if not isinstance(objective, Objective):
        raise ValueError(
            f"{target.key}.{TARGET} must give a sequel_flax.Objective with mode=jax, got a "
            f"{type(objective).__name__} from {target.path}"
        )
    return objective


def user_optimizer(target: Target) -> optax.GradientTransformation:
    """Return the optimizer of a user-defined factory; `lr_decay` works if its learning rate is a number.

    Args:
        target: The factory and its arguments.

    Returns:
        The optimizer.

    Raises:
        ValueError: The factory does not return an optimizer, or does not accept an argument.

    Example:
        >>> target = Target("optimizer", "optax.adam", {"learning_rate": 0.01}, optax.adam)
        >>> isinstance(user_optimizer(target), optax.GradientTransformation)
        True
    """
    tx = target.make()
    if not isinstance(tx, optax.GradientTransformation):
        raise ValueError(
            f"{target.key}.{TARGET} must give an optax.GradientTransformation with mode=jax, got a "
            f"{type(tx).__name__} from {target.path}"
        )
    rate = target.argument("learning_rate")
    if not isinstance(rate, int | float):
        return tx

    def optimizer(learning_rate: float) -> optax.GradientTransformation:
        arguments = {key: value for key, value in target.arguments.items() if key != "learning_rate"}
        tx: optax.GradientTransformation = replace(target, arguments=arguments).make(
            learning_rate=learning_rate
        )
        return tx

    return optax.inject_hyperparams(optimizer)(learning_rate=float(rate))


def build_logger(name: str, chosen: Target | Mapping[str, Any], run_dir: Path) -> MetricWriter:
    """Return a built-in logger, or a user-defined one.

    Args:
        name: The name of the logger.
        chosen: The settings of a built-in logger, or the factory of a user-defined one.
        run_dir: The directory of the run.

    Returns:
        The metric writer.

    Raises:
        ValueError: A user-defined logger lacks a method; see `user_logger`.

    Example:
        >>> type(build_logger("csv", {}, Path("run"))).__name__
        'CsvWriter'
    """
    return user_logger(chosen, run_dir) if isinstance(chosen, Target) else WRITERS[name](run_dir, chosen)


def user_logger(target: Target, run_dir: Path) -> MetricWriter:
    """Return the metric writer of a user-defined factory.

    Args:
        target: The factory and its arguments. If it takes a directory, it receives that of the run.
        run_dir: The directory of the run.

    Returns:
        The metric writer.

    Raises:
        ValueError: The writer lacks a method of MetricWriter, or the factory does not accept an argument.

    Example:
        >>> from sequel_flax.writers import SilentWriter
        >>> target = Target("logger.mine", "sequel_flax.writers.SilentWriter", {}, SilentWriter)
        >>> type(user_logger(target, Path("run"))).__name__
        'SilentWriter'
    """
    writer = target.make(**dict.fromkeys(SUPPLIED["logger"], os.fspath(run_dir)))
    needed = ("write_scalars", "write_images", "write_texts", "write_hparams", "flush", "close")
    lacking = [name for name in needed if not hasattr(writer, name)]
    if lacking:
        raise ValueError(
            f"{target.key}.{TARGET} must give a metric writer with mode=jax, got a {type(writer).__name__} "
            f"without {lacking[0]} from {target.path}; sequel_flax.writers.SilentWriter has them all"
        )
    made: MetricWriter = writer
    return made
