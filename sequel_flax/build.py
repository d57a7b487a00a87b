"""From settings to a learner; `sequel_lightning.build` has the same functions with the same parameters."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import clu.metrics
import jax
import optax
import scipy.linalg  # noqa: F401 - whose LAPACK jaxlib calls
from flax import linen as nn
from flax import nnx
from threadpoolctl import threadpool_limits

from sequel_core.experiment.config import SUPPLIED, ExperimentConfig
from sequel_core.experiment.target import TARGET, Target
from sequel_core.hparams import AlgorithmHParams, TrainingHParams
from sequel_core.stream.benchmark import Benchmark
from sequel_flax.algorithms import ALGORITHMS
from sequel_flax.backbones import BACKBONES
from sequel_flax.bundle import Algorithm
from sequel_flax.learner import FlaxLearner, TrainMetrics
from sequel_flax.optimizers import build_optimizer
from sequel_flax.writers import WRITERS, MetricWriter


def make_learner(
    hparams: AlgorithmHParams,
    model: nn.Module | nnx.Module,
    optimizer: optax.GradientTransformation,
    benchmark: Benchmark,
    training: TrainingHParams | None = None,
    *,
    metrics: type[clu.metrics.Collection] | None = None,
    loggers: Sequence[MetricWriter] = (),
    implementation: Callable[..., Algorithm] | None = None,
    **options: Any,
) -> FlaxLearner:
    """Return a learner; the algorithm is the one that the settings' class belongs to.

    Args:
        hparams: settings of the algorithm, for example `EWCHParams(ewc_lambda=1)`.
        model: linen or NNX; a built-in network starts from the weights that the plan has for
            `training.seed`, any other linen module from `model.init`, an NNX module as it is.
        optimizer: for example `optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)`.
        benchmark: whose tasks will be learned.
        training: batch size, epochs, clipping, seed, dtype.
        metrics: of the training batches.
        loggers: metric writers.
        implementation: of an algorithm of one's own, called as `implementation(hparams, seed=...)`.
        options: further arguments of `FlaxLearner`, `hooks` and `steps_per_call`, and `trainable`, which
            parameters are trained: a predicate over paths, a tree of bools, or an NNX filter.

    Raises:
        ValueError: an algorithm that is not built in without an implementation, or one of another type.
    """
    training = training or TrainingHParams()
    implementation = implementation or ALGORITHMS.get(hparams.name)
    if implementation is None:
        raise ValueError(f"implementation is needed for {hparams.name}, which is not built in; pass it")
    trainable = options.pop("trainable", None)
    selection = {} if trainable is None else {"trainable": trainable}
    algorithm = implementation(hparams, seed=training.seed, **selection)
    if not isinstance(algorithm, Algorithm):
        raise ValueError(f"implementation must give an Algorithm, got a {type(algorithm).__name__}")
    return FlaxLearner(
        algorithm,
        model,
        optimizer,
        benchmark.spec,
        training,
        metrics=metrics or TrainMetrics,
        writers=loggers,
        **options,
    )


def use_one_thread() -> None:
    """Let LAPACK's routines run on one thread unless OMP_NUM_THREADS or OPENBLAS_NUM_THREADS says otherwise.

    XLA calls them for KCL's factorisations, which are too small to share, and their threads wait on its own:
    on two cores a step took three times as long.
    """
    if not {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"} & os.environ.keys():
        threadpool_limits(1, "blas")


def build_learner(
    config: ExperimentConfig, benchmark: Benchmark, run_dir: Path, *, callbacks: Sequence[Any] = ()
) -> FlaxLearner:
    """Return the learner of an experiment's configuration; LAPACK's routines run on one thread."""
    use_one_thread()
    if config.training.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    own = config.own
    if "backbone" in own:
        model = own["backbone"].make(
            num_classes=benchmark.num_classes,
            image_shape=benchmark.image_shape,
            rngs=nnx.Rngs(config.training.seed),
        )
    else:
        model = BACKBONES[config.backbone.type](**vars(config.backbone), num_classes=benchmark.num_classes)
    return make_learner(
        config.algo,
        model,
        user_optimizer(own["optimizer"]) if "optimizer" in own else build_optimizer(config.optimizer),
        benchmark,
        config.training,
        loggers=[build_logger(name, chosen, run_dir) for name, chosen in config.logger.items()],
        implementation=own["algo"].function if "algo" in own else None,
        hooks=callbacks,
    )


def user_optimizer(target: Target) -> optax.GradientTransformation:
    """Return what a user's own factory makes; a learning rate that is a number can be set between tasks.

    Raises:
        ValueError: it makes no optimizer, or refuses an argument.
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
        arguments = {**target.arguments, "learning_rate": learning_rate}
        made: optax.GradientTransformation = replace(target, arguments=arguments).make()
        return made

    return optax.inject_hyperparams(optimizer)(learning_rate=float(rate))


def build_logger(name: str, chosen: Target | Mapping[str, Any], run_dir: Path) -> MetricWriter:
    """Return the logger that a name and its settings choose, or the user's own."""
    return user_logger(chosen, run_dir) if isinstance(chosen, Target) else WRITERS[name](run_dir, chosen)


def user_logger(target: Target, run_dir: Path) -> MetricWriter:
    """Return a user's own metric writer; one that asks for a directory gets the run's.

    Raises:
        ValueError: it lacks the methods of a MetricWriter, or refuses an argument.
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
