"""From settings to a learner; `sequel_lightning.build` has the same functions with the same parameters."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import clu.metrics
import jax
import optax
import scipy.linalg  # noqa: F401 - whose LAPACK jaxlib calls
from flax import linen as nn
from threadpoolctl import threadpool_limits

from sequel_core.config import ExperimentConfig
from sequel_core.hparams import AlgorithmHParams, TrainingHParams
from sequel_core.task import Benchmark
from sequel_flax.algorithms import ALGORITHMS
from sequel_flax.backbones import BACKBONES
from sequel_flax.learner import FlaxLearner, TrainMetrics
from sequel_flax.optimizers import build_optimizer
from sequel_flax.writers import MetricWriter, WandbWriter


def make_learner(
    hparams: AlgorithmHParams,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    benchmark: Benchmark,
    training: TrainingHParams | None = None,
    *,
    metrics: type[clu.metrics.Collection] | None = None,
    loggers: Sequence[MetricWriter] = (),
    **options: Any,
) -> FlaxLearner:
    """Return a learner; the algorithm is the one that the settings' class belongs to.

    Args:
        hparams: settings of the algorithm, for example `EWCHParams(ewc_lambda=1)`.
        model: a built-in network starts from the weights that the plan has for `training.seed`, any other
            from `model.init`.
        optimizer: for example `optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)`.
        benchmark: whose tasks will be learned.
        training: batch size, epochs, clipping, seed, dtype.
        metrics: of the training batches.
        loggers: metric writers.
        options: further arguments of `FlaxLearner`: `steps_per_call`.
    """
    training = training or TrainingHParams()
    algorithm = ALGORITHMS[hparams.name](hparams, seed=training.seed)
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


def build_learner(config: ExperimentConfig, benchmark: Benchmark, run_dir: Path) -> FlaxLearner:
    """Return the learner of an experiment's configuration; LAPACK's routines run on one thread."""
    use_one_thread()
    if config.training.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    model = BACKBONES[config.backbone.type](**vars(config.backbone), num_classes=benchmark.num_classes)
    return make_learner(
        config.algo,
        model,
        build_optimizer(config.optimizer),
        benchmark,
        config.training,
        loggers=[WandbWriter(run_dir, config.wandb_arguments())] if config.wandb is not None else (),
    )
