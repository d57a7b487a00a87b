"""The Learner protocol: all that the core knows of a framework."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from sequel_core.hparams import AlgorithmHParams, TrainingHParams
from sequel_core.objectives import Score
from sequel_core.settings import check_name
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.task import Task

EvaluateEvery = Literal["end", "task", "epoch"] | int
EvaluateOn = Literal["test", "validation"]
Mode = Literal["pytorch", "jax"]

T = TypeVar("T")
PLUGINS: dict[Mode, str] = {"pytorch": "sequel_lightning", "jax": "sequel_flax"}
"""The package of each mode; it is imported by name when it is needed."""


class DivergenceError(RuntimeError):
    """The training loss became nan or infinite.

    Args:
        task: index of the task.
        epoch: epoch of the task, from 0.
        step: step within the epoch, from 0.

    Example:
        >>> from sequel_core import DivergenceError
        >>> DivergenceError(task=1, epoch=0, step=12).position
        {'task': 1, 'epoch': 0, 'step': 12}
    """

    def __init__(self, task: int, epoch: int, step: int) -> None:
        super().__init__(
            f"the training loss is no longer finite at task {task}, epoch {epoch}, step {step}; "
            "lower optimizer.lr or set training.grad_clip"
        )
        self.position = {"task": task, "epoch": epoch, "step": step}


class LostProcessError(RuntimeError):
    """The processes that train together can no longer communicate, because one of them has ended.

    Args:
        reason: what the process that raises it has noticed.

    Example:
        >>> from sequel_core.runs.learner import LostProcessError
        >>> print(LostProcessError("connection closed"))
        a process of the run has ended or cannot be reached (connection closed); resume the run
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"a process of the run has ended or cannot be reached ({reason}); resume the run")


class OneProcess(Protocol):
    """The part of a learner that concerns its processes, for a learner that trains in this process alone."""

    num_devices: int = 1

    @property
    def main_process(self) -> bool:
        """Whether this process records the run; the others only train with it."""
        return True

    def launch(self, function: Callable[[], T]) -> T:
        """Call a function in every process, which are started if they do not exist; return its result.

        Args:
            function: takes part in the run; it calls `fit_task`, `evaluate` and `agree` in the same order in
                every process.
        """
        return function()

    def agree(self, value: T | None) -> T:
        """Return the value of the main process, in every process; the others may pass None."""
        return cast(T, value)

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in every process, from the main process on."""
        return [value]


def check_same_settings(gather: Callable[[Any], list[Any]], settings: Mapping[str, Any]) -> None:
    """Check that the processes of a run have the same settings.

    Args:
        gather: returns the values of all processes, in every process; see `OneProcess`.
        settings: of this process; values may be mappings.

    Raises:
        ValueError: settings differ; every process raises it.

    Example:
        >>> from sequel_core.runs.learner import check_same_settings
        >>> def gather(value):
        ...     return [value, {**value, "training.seed": "1"}]
        >>> check_same_settings(gather, {"training": {"seed": 0}})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: settings must be the same in every process, got training.seed=0 and 1 in processes ...
    """
    first, *others = gather(texts(settings))
    for k, other in enumerate(others, 1):
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if names:
            pairs = [f"{name}={first.get(name)} and {other.get(name)}" for name in names]
            raise ValueError(
                f"settings must be the same in every process, got {', '.join(pairs)} in processes 0 and {k}; "
                "start every process with the same settings"
            )


def texts(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the text of each setting by its dotted name; the addresses of objects are left out."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= texts(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = re.sub(r" at 0x[0-9a-f]+", "", str(value))
    return flat


class Evaluation(NamedTuple):
    """The result of one evaluation on one task."""

    score: float  # `Learner.score` says which, and its direction
    total: int  # samples
    loss: float  # mean over the samples
    masked_score: float = math.nan  # with the logits of classes of other tasks masked
    alternatives: Mapping[str, float] = {}  # scores of the algorithm's other predictions, by name


class Progress(NamedTuple):
    """A learner's report during training."""

    step: int  # steps since the start of the stream
    epoch: int  # of the task, from 0
    task_step: int  # steps of this task done
    task_steps: int  # steps of this task in total
    loss: float  # mean since the last report
    score: float  # of the training batches, mean since the last report; nan if it is not computed
    learning_rate: float  # nan if the optimizer does not report it
    extra: Mapping[str, float]  # user-defined metrics since the last report


class FitMonitor(NamedTuple):
    """Functions that a learner calls while it trains on a task, and when they are due."""

    on_progress: Callable[[Progress], None]  # every log_every_n_steps and at the end of each epoch
    on_evaluate: Callable[[], None]  # when due by evaluate_every
    evaluate_every: EvaluateEvery = "task"  # "end" and "task": not during training
    on_checkpoint: Callable[[], None] = lambda: None  # when due; an exception ends the run
    checkpoint_every: int | None = None  # steps of the task
    checkpoint_due: Callable[[], bool] = lambda: False  # whether a checkpoint is due now, whatever the step

    @property
    def intervals(self) -> tuple[int, ...]:
        """Numbers of steps; the learner must call `after_step` at least at every multiple of each."""
        every = (self.evaluate_every, self.checkpoint_every)
        return tuple(steps for steps in every if isinstance(steps, int))

    def after_step(self, task_step: int, task_steps: int, epoch_end: bool) -> None:
        """Evaluate and write a checkpoint if due; the orchestrator does both after the last step of a task.

        Args:
            task_step: steps of this task done.
            task_steps: steps of this task in total.
            epoch_end: whether the step was the last of its epoch.
        """
        if task_step == task_steps:
            return
        every = self.evaluate_every
        if task_step % every == 0 if isinstance(every, int) else every == "epoch" and epoch_end:
            self.on_evaluate()
        if (self.checkpoint_every and task_step % self.checkpoint_every == 0) or self.checkpoint_due():
            self.on_checkpoint()


class Learner(OneProcess, Protocol):
    """A model with an algorithm, in one of the frameworks; all that the orchestrator uses of it.

    `sequel_lightning.make_learner` and `sequel_flax.make_learner` make learners.

    Attributes:
        mode: `"pytorch"` or `"jax"`.
        hparams: settings of the algorithm.
        training: batch size, epochs, seed, dtype.
        spec: of the stream that the learner was made for.
        score: what `evaluate` measures.
        shows_progress: whether a callback or hook of the user shows a progress bar; the orchestrator then
            shows none.
        num_devices: the number of devices that share each batch.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import Learner, NaiveHParams
        >>> from sequel_lightning import MLP, make_learner
        >>> benchmark = RotatedDigits(num_tasks=2, subset=50)
        >>> net = MLP((16,), benchmark.num_classes, image_shape=benchmark.image_shape)
        >>> learner: Learner = make_learner(NaiveHParams(), net, partial(torch.optim.SGD, lr=0.1), benchmark)
        >>> learner.mode, learner.step
        ('pytorch', 0)
    """

    mode: Mode
    hparams: AlgorithmHParams
    training: TrainingHParams
    spec: StreamSpec
    score: Score = Score()
    shows_progress: bool

    @property
    def step(self) -> int:
        """Training steps (batches) since the start of the stream."""
        ...

    def fit_task(self, task: Task, monitor: FitMonitor) -> None:
        """Train on one task, then do the algorithm's work at the end of a task.

        A task that `restore` found unfinished is continued.

        Args:
            task: to train on.
            monitor: functions to call during training.

        Raises:
            DivergenceError: the loss is no longer finite.
        """
        ...

    def evaluate(self, task: Task, split: str) -> Evaluation:
        """Measure score and loss on a task.

        Args:
            task: to evaluate.
            split: `"test"`, `"validation"` or `"train"`.
        """
        ...

    @property
    def logs(self) -> bool:
        """Whether there are loggers; without any, images and tables need not be made."""
        ...

    def start_stream(self, config: Mapping[str, Any], resumed: bool = False) -> None:
        """Send the run's configuration to the loggers; called before everything else except `restore`.

        Args:
            config: plain values.
            resumed: whether `restore` was called; the loggers then continue at the current step and discard
                what was logged after it.
        """
        ...

    def end_stream(self) -> None:
        """Called after the last task and its evaluation, unless the run was interrupted or failed."""
        ...

    def log(self, metrics: Mapping[str, float]) -> None:
        """Send numbers to the loggers, at the learner's current step."""
        ...

    def log_image(self, name: str, image: NDArray[np.uint8]) -> None:
        """Send an image `[H, W, 3]` to the loggers that accept images, at the current step."""
        ...

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Send a table of numbers and text to the loggers that accept tables, at the current step."""
        ...

    def save(self, directory: Path) -> Callable[[], None]:
        """Write everything that the following steps depend on; also in the middle of a task.

        Args:
            directory: does not exist yet.

        Returns:
            A function that waits until everything is written; training may continue meanwhile.
        """
        ...

    def restore(self, directory: Path) -> None:
        """Read what `save` wrote.

        Raises:
            ValueError: another algorithm, network, ... wrote it; the error names what differs.
        """
        ...

    def weights(self) -> dict[str, FloatArray]:
        """Return the weights in the canonical layout: `layer/kernel` `[in, out]`, `layer/bias` `[out]`."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return the model, the optimizer and all settings as plain values, for the run's `config.yaml`."""
        ...

    def memory_bytes(self) -> int:
        """Return the bytes of what the algorithm keeps of past tasks: anchors, samples, logits, ..."""
        ...

    def threads(self) -> int:
        """Return the number of threads used for arithmetic; another number may round differently."""
        ...

    def close(self, failed: bool = False) -> None:
        """Flush and close the loggers.

        Args:
            failed: whether the run failed, for loggers that record it.
        """
        ...


def plugin(mode: Mode) -> Any:
    """Import and return the plug-in of a mode.

    Args:
        mode: `"pytorch"` or `"jax"`.

    Raises:
        ValueError: there is no such mode, or its plug-in is not installed.

    Example:
        >>> from sequel_core.runs.learner import plugin
        >>> plugin("pytorch").__name__
        'sequel_lightning'
    """
    check_name("mode", mode, PLUGINS)
    try:
        return import_module(PLUGINS[mode])
    except ModuleNotFoundError as error:
        extra = PLUGINS[mode].removeprefix("sequel_")
        raise ValueError(
            f"mode={mode} needs the package {error.name}; install it with: pip install 'sequel-cl[{extra}]'"
        ) from error
