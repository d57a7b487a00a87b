"""From settings to a learner; `sequel_flax.build` has the same functions with the same parameters."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.loggers import Logger
from torch import nn
from torchmetrics import MetricCollection

from sequel_core.config import ExperimentConfig
from sequel_core.hparams import AlgorithmHParams, OptimizerHParams, TrainingHParams
from sequel_core.task import Benchmark
from sequel_lightning.algorithms import ALGORITHMS
from sequel_lightning.backbones import BACKBONES, initialise
from sequel_lightning.learner import TORCH_DTYPES, LightningLearner
from sequel_lightning.module import OptimizerFactory


def build_optimizer(hparams: OptimizerHParams) -> OptimizerFactory:
    """Return the factory of the optimizer that the settings name."""
    if hparams.type == "sgd":
        return partial(
            torch.optim.SGD,
            lr=hparams.lr,
            momentum=hparams.momentum,
            nesterov=hparams.nesterov,
            weight_decay=hparams.weight_decay,
        )
    return partial(
        torch.optim.Adam if hparams.type == "adam" else torch.optim.AdamW,
        lr=hparams.lr,
        betas=(hparams.beta1, hparams.beta2),
        eps=hparams.eps,
        weight_decay=hparams.weight_decay,
    )


def make_learner(
    hparams: AlgorithmHParams,
    model: nn.Module,
    optimizer: OptimizerFactory,
    benchmark: Benchmark,
    training: TrainingHParams | None = None,
    *,
    metrics: MetricCollection | None = None,
    loggers: Sequence[Logger] = (),
    **options: Any,
) -> LightningLearner:
    """Return a learner; the algorithm is the one that the settings' class belongs to.

    Args:
        hparams: settings of the algorithm, for example `EWCHParams(ewc_lambda=1)`.
        model: a built-in network starts from the weights that the plan has for `training.seed`, any other as
            it is.
        optimizer: factory over parameters, for example `partial(torch.optim.SGD, lr=0.1)`.
        benchmark: whose tasks will be learned.
        training: batch size, epochs, clipping, seed, dtype.
        metrics: of the training batches.
        loggers: of Lightning.
        options: further arguments of `LightningLearner`: `trainer`, `callbacks`.
    """
    training = training or TrainingHParams()
    net = initialise(model.to(TORCH_DTYPES[training.dtype]), training.seed)
    module = ALGORITHMS[hparams.name](net, optimizer, hparams, benchmark.spec, metrics, training.seed)
    return LightningLearner(module, training, loggers=loggers, **options)


def use_one_thread() -> None:
    """Run on one thread unless OMP_NUM_THREADS says otherwise.

    On a CPU the operators of a multi-layer perceptron are too small to share, and waiting threads cost a busy
    machine nine tenths of the rate.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def build_learner(config: ExperimentConfig, benchmark: Benchmark, run_dir: Path) -> LightningLearner:
    """Return the learner of an experiment's configuration; for a multi-layer perceptron, on one thread."""
    if config.backbone.type == "mlp":
        use_one_thread()
    model = BACKBONES[config.backbone.type](
        **vars(config.backbone), num_classes=benchmark.num_classes, image_shape=benchmark.image_shape
    )
    return make_learner(
        config.algo,
        model,
        build_optimizer(config.optimizer),
        benchmark,
        config.training,
        loggers=[wandb_logger(run_dir, config.wandb_arguments())] if config.wandb is not None else (),
        trainer={**config.trainer, "default_root_dir": os.fspath(run_dir)},
    )


def wandb_logger(run_dir: Path, settings: Mapping[str, Any]) -> Logger:
    """Return Lightning's Weights & Biases logger; the run starts at the first write."""
    from pytorch_lightning.loggers import WandbLogger

    return WandbLogger(save_dir=os.fspath(run_dir), **settings)
