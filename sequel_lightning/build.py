"""From settings to a learner; `sequel_flax.build` has the same functions with the same parameters."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.loggers import Logger
from torch import nn
from torchmetrics import MetricCollection

from sequel_core import entry_points
from sequel_core.backbones import FOR_TOKENS
from sequel_core.experiment.build import SUPPLIED
from sequel_core.experiment.schema import ExperimentConfig
from sequel_core.experiment.target import TARGET, Target
from sequel_core.hparams import AlgorithmHParams, OptimizerHParams, TrainingHParams
from sequel_core.objectives import ObjectiveHParams
from sequel_core.stream import plan
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.plan import Init
from sequel_lightning.algorithms import ALGORITHMS
from sequel_lightning.backbones import BACKBONES, initialise
from sequel_lightning.learner import SEEDS, TORCH_DTYPES, LightningLearner
from sequel_lightning.loggers import LOGGERS
from sequel_lightning.module import ContinualModule
from sequel_lightning.objectives import Objective, build_objective
from sequel_lightning.optimizers import OptimizerFactory, make_optimizer


def build_optimizer(hparams: OptimizerHParams) -> OptimizerFactory:
    """Return an optimizer factory for settings.

    Args:
        hparams: type, learning rate and other settings of the optimizer.

    Returns:
        A function from parameters to an optimizer of `torch.optim`.

    Example:
        >>> from sequel_core import OptimizerHParams
        >>> from sequel_lightning import MLP
        >>> factory = build_optimizer(OptimizerHParams(type="adam", lr=0.001))
        >>> type(factory(MLP().parameters())).__name__
        'Adam'
    """
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
    objective: Objective | None = None,
    loggers: Sequence[Logger] = (),
    implementation: Callable[..., ContinualModule] | None = None,
    init: Init = "torch",
    **options: Any,
) -> LightningLearner:
    """Return a learner for the algorithm that the settings belong to.

    Args:
        hparams: settings of the algorithm, for example `EWCHParams(ewc_lambda=1)`.
        model: the network. A built-in one is set to the initial weights of `training.seed`.
        optimizer: factory over parameters, for example `partial(torch.optim.SGD, lr=0.1)`.
        benchmark: the stream of tasks.
        training: batch size, epochs, clipping, seed, dtype; see `help(TrainingHParams)`.
        metrics: of the training batches, in addition to loss and score.
        objective: what the network is trained and scored on; None for the built-in objective that fits the
            targets of the stream.
        loggers: loggers of Lightning.
        implementation: a user-defined subclass of ContinualModule; None for the built-in one, or that of an
            installed package, see `sequel_core.entry_points`.
        init: the distribution of the initial weights of a built-in network: `torch`, `xavier` or `kaiming`.
        options: further arguments of `LightningLearner`: `trainer`, `callbacks`.

    Returns:
        A learner, for `sequel_core.run`.

    Raises:
        ValueError: `implementation` is missing for settings of a method that is not built in and that no
            installed package provides, or it has the wrong type.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import EWCHParams, run
        >>> from sequel_lightning import MLP
        >>> digits = RotatedDigits(num_tasks=2, subset=100)
        >>> net = MLP((16,), num_classes=10, image_shape=digits.image_shape)
        >>> learner = make_learner(EWCHParams(), net, partial(torch.optim.SGD, lr=0.1), digits)
        >>> result = run(learner, digits, progress=False)
        >>> result.matrix.shape
        (2, 2)
    """
    training = training or TrainingHParams()
    implementation = implementation or ALGORITHMS.get(hparams.name)
    if implementation is None:
        implementation = entry_points.implementation(hparams, "pytorch")
    net = initialise(model.to(TORCH_DTYPES[training.dtype]), training.seed, init)
    given = {} if objective is None else {"objective": objective}
    module = implementation(net, optimizer, hparams, benchmark.spec, metrics, training.seed, **given)
    if not isinstance(module, ContinualModule):
        raise ValueError(f"implementation must give a ContinualModule, got a {type(module).__name__}")
    return LightningLearner(module, training, loggers=loggers, **options)


@contextmanager
def process_settings(config: ExperimentConfig) -> Iterator[None]:
    """Apply the process-wide settings of an experiment, and restore the previous ones at the end.

    A built-in multi-layer perceptron runs on one thread unless OMP_NUM_THREADS is set. On a CPU its operators
    are too small to share, and waiting threads cost a busy machine nine tenths of the rate.

    Args:
        config: The configuration of the experiment.

    Example:
        >>> from sequel_core.experiment.compose import compose
        >>> with process_settings(compose(["backbone=mlp"]).config):
        ...     num_threads = torch.get_num_threads()
    """
    num_threads = torch.get_num_threads()
    built_in = "backbone" not in config.user_code
    if built_in and config.backbone.type == "mlp" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def build_learner(
    config: ExperimentConfig, benchmark: Benchmark, run_dir: Path, *, callbacks: Sequence[Any] = ()
) -> LightningLearner:
    """Return the learner of an experiment's configuration; call it within `process_settings(config)`.

    Args:
        config: the configuration, as `sequel_core.experiment.compose` returns it.
        benchmark: the stream of tasks.
        run_dir: directory of the loggers' files.
        callbacks: callbacks of Lightning.

    Returns:
        A learner, for `sequel_core.run`.

    Raises:
        ValueError: a setting does not fit the stream, or user-defined code does not take an argument.

    Example:
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core.experiment.compose import compose
        >>> digits = RotatedDigits(num_tasks=2)
        >>> config = compose(["backbone=mlp", "algo=ewc", "logger=[]"]).config
        >>> with process_settings(config):
        ...     learner = build_learner(config, digits, Path("run"))
        >>> type(learner.module).__name__
        'EWC'
    """
    user_code = config.user_code
    spec, any_inputs = benchmark.spec, "backbone" in user_code or config.backbone.type == "mlp"
    sizes: dict[str, Any] = {"num_classes": benchmark.num_classes}
    if "backbone" not in user_code and config.backbone.type in FOR_TOKENS:
        sizes["per_token"] = spec.per_token
    elif not any_inputs or not isinstance(spec.x, Mapping):
        sizes["image_shape"] = spec.x.shape if any_inputs else spec.image_shape
    if "backbone" in user_code:
        model = user_backbone(user_code["backbone"], config.training.seed, **sizes)
    else:
        model = BACKBONES[config.backbone.type](**config.backbone.arguments(), **sizes)
    if "optimizer" in user_code:
        optimizer = user_optimizer(user_code["optimizer"])
    else:
        optimizer = build_optimizer(config.optimizer)
    if "objective" in user_code:
        objective = _checked(user_code["objective"].make(), Objective, user_code["objective"])
    else:  # None is the default of every method, also of user code without the argument
        is_default = config.objective == ObjectiveHParams()
        objective = None if is_default else build_objective(config.objective, spec)
    made = make_learner(
        config.algo,
        model,
        optimizer,
        benchmark,
        config.training,
        objective=objective,
        loggers=[build_logger(name, chosen, run_dir) for name, chosen in config.logger.items()],
        implementation=user_code["algo"].function if "algo" in user_code else None,
        init=config.backbone.init,
        callbacks=callbacks,
        trainer={**config.trainer, "default_root_dir": os.fspath(run_dir)},
    )
    made.settings = config.plain()
    return made


def user_backbone(target: Target, seed: int, **sizes: Any) -> nn.Module:
    """Return a user's own network; its initial weights follow from the seed, the global generator is left.

    Raises:
        ValueError: the result is no module, or the code does not take an argument.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(plan.words(seed, "own weights", count=1)[0]) % SEEDS)
        net: nn.Module = _checked(target.make(**sizes), nn.Module, target)
        return net


def user_optimizer(target: Target) -> OptimizerFactory:
    """Return the factory that a user's own class or function is, with its arguments.

    Raises:
        ValueError: the code does not take an argument.
    """
    factory: OptimizerFactory = replace(target, partial=True).make()
    try:
        make_optimizer(factory, [("weight", nn.Parameter(torch.zeros(1, 1)))])
    except ValueError as error:
        raise ValueError(f"{target.key}: {error}") from error
    return factory


def build_logger(name: str, chosen: Target | Mapping[str, Any], run_dir: Path) -> Logger:
    """Return the logger that a name and its settings choose, or the user's own."""
    return user_logger(chosen, run_dir) if isinstance(chosen, Target) else LOGGERS[name](run_dir, chosen)


def user_logger(target: Target, run_dir: Path) -> Logger:
    """Return a user's own logger; one that asks for a directory gets the run's.

    Raises:
        ValueError: the result is no logger of Lightning, or the code does not take an argument.
    """
    made = target.make(**dict.fromkeys(SUPPLIED["logger"], os.fspath(run_dir)))
    logger: Logger = _checked(made, Logger, target)
    return logger


def _checked(made: Any, wanted: Any, target: Target) -> Any:
    """Return what a user's own code has made; raise ValueError where it is not of the class."""
    if not isinstance(made, wanted):
        raise ValueError(
            f"{target.key}.{TARGET} must give a {wanted.__module__}.{wanted.__name__} with mode=pytorch, got "
            f"a {type(made).__name__} from {target.path}"
        )
    return made
