"""The Learner protocol: all that the core knows of a framework."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from sequel_core.hparams import AlgorithmHParams, TrainingHParams
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.task import Task

EvaluateEvery = Literal["task", "epoch"] | int
Mode = Literal["pytorch", "jax"]

PLUGINS: dict[Mode, str] = {"pytorch": "sequel_lightning", "jax": "sequel_flax"}
"""The package that runs each mode; the core finds it by name, at run time."""


class DivergenceError(RuntimeError):
    """The training loss became nan or infinite."""

    def __init__(self, task: int, epoch: int, step: int) -> None:
        """Say where: task, epoch and step within the epoch, all from 0."""
        super().__init__(
            f"the training loss is no longer finite at task {task}, epoch {epoch}, step {step}; "
            "lower optimizer.lr or set training.grad_clip"
        )
        self.where = {"task": task, "epoch": epoch, "step": step}


class Evaluation(NamedTuple):
    """What an evaluation of one task counted."""

    correct: int
    total: int
    loss: float  # mean cross-entropy
    masked_correct: int  # with the logits of other tasks' classes masked
    alternatives: Mapping[str, int] = {}  # correct by what else the algorithm can predict with

    @property
    def accuracy(self) -> float:
        """Fraction of correct predictions."""
        return self.correct / self.total

    @property
    def masked_accuracy(self) -> float:
        """Fraction of correct predictions among the classes of the task."""
        return self.masked_correct / self.total


class Progress(NamedTuple):
    """What a learner reports while it trains."""

    step: int  # steps done since the start of the stream
    epoch: int  # of the task, from 0
    task_step: int  # steps done in this task
    task_steps: int  # steps that this task has in all
    loss: float  # mean since the last report
    accuracy: float  # the same, of the training batches
    learning_rate: float  # nan where the optimizer does not tell
    extra: Mapping[str, float]  # the user's own metrics since the last report


class FitMonitor(NamedTuple):
    """What a learner calls while it fits a task."""

    on_progress: Callable[[Progress], None]  # every log_every_n_steps and at the end of each epoch
    on_evaluate: Callable[[], None]  # when due, by evaluate_every
    evaluate_every: EvaluateEvery = "task"  # "task": never within fit_task; "epoch"; or a number of steps
    on_checkpoint: Callable[[], None] = lambda: None  # when due; may raise, which ends the run
    checkpoint_every: int | None = None  # steps of the task
    checkpoint_due: Callable[[], bool] = lambda: False  # whether a checkpoint is due now, whatever the step

    @property
    def intervals(self) -> tuple[int, ...]:
        """Numbers of steps: what is due at a multiple of one has to be seen at exactly that step."""
        every = (self.evaluate_every, self.checkpoint_every)
        return tuple(steps for steps in every if isinstance(steps, int))

    def after_step(self, task_step: int, task_steps: int, epoch_end: bool) -> None:
        """Evaluate and write a checkpoint where due; after the last step of a task come the task's own.

        Args:
            task_step: steps done in this task.
            task_steps: steps that this task has in all.
            epoch_end: whether the step was the last of its epoch.
        """
        if task_step == task_steps:
            return
        every = self.evaluate_every
        if task_step % every == 0 if isinstance(every, int) else every == "epoch" and epoch_end:
            self.on_evaluate()
        if (self.checkpoint_every and task_step % self.checkpoint_every == 0) or self.checkpoint_due():
            self.on_checkpoint()


class Learner(Protocol):
    """A model with an algorithm, in one of the frameworks."""

    mode: Mode
    hparams: AlgorithmHParams
    training: TrainingHParams
    spec: StreamSpec
    shows_progress: bool  # a callback or hook of the user's shows it, so the orchestrator shows no bars

    @property
    def step(self) -> int:
        """Training steps (batches) since the start of the stream."""
        ...

    def fit_task(self, task: Task, monitor: FitMonitor) -> None:
        """Train on one task, then do the algorithm's end-of-task work.

        Raises:
            DivergenceError: the loss is no longer finite.
        """
        ...

    def evaluate(self, task: Task, split: str) -> Evaluation:
        """Count correct predictions on a task's `test`, `validation` or `train` split."""
        ...

    @property
    def logs(self) -> bool:
        """Whether there are loggers, for which pictures are worth making."""
        ...

    def start_stream(self, config: Mapping[str, Any], resumed: bool = False) -> None:
        """Before everything else: send the run's configuration to the framework's own loggers.

        Args:
            config: plain values.
            resumed: whether the run goes on from a checkpoint, `restore`d before; the loggers then go on
                where they were at the current step, and forget what came after.
        """
        ...

    def end_stream(self) -> None:
        """After the last task and its evaluation; not where the run was broken off."""
        ...

    def log(self, metrics: Mapping[str, float]) -> None:
        """Send numbers to the framework's own loggers, at the learner's current step."""
        ...

    def log_image(self, name: str, image: NDArray[np.uint8]) -> None:
        """Send a picture `[H, W, 3]` to the loggers that take pictures, at the current step."""
        ...

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Send a table of numbers and text to the loggers that take tables, at the current step."""
        ...

    def save(self, directory: Path) -> Callable[[], None]:
        """Write all that the coming steps depend on, also in the middle of a task, into a new directory.

        Returns:
            What waits until everything is written; the training may go on meanwhile.
        """
        ...

    def restore(self, directory: Path) -> None:
        """Read back what `save` wrote; a task that it was in the middle of is gone on with by `fit_task`.

        Raises:
            ValueError: it was written by another algorithm, network, ...; what differs is named.
        """
        ...

    def weights(self) -> dict[str, FloatArray]:
        """Return the weights in the canonical layout: `layer/kernel` `[in, out]`, `layer/bias` `[out]`."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return the model, the optimizer and all settings as plain values, for the run's `config.yaml`."""
        ...

    def memory_bytes(self) -> int:
        """Return the bytes of all that the algorithm keeps of past tasks: anchors, samples, logits, ..."""
        ...

    def threads(self) -> int:
        """Return the number of threads that arithmetic runs on; another number may round differently."""
        ...

    def close(self, failed: bool = False) -> None:
        """Flush and close the loggers, with the status that the run ended with where they take one."""
        ...


def plugin(mode: Mode) -> Any:
    """Import and return the plug-in of a mode.

    Raises:
        ValueError: no such mode, or its plug-in is not installed.
    """
    if mode not in PLUGINS:
        raise ValueError(f"mode must be one of {', '.join(PLUGINS)}, got {mode!r}")
    try:
        return import_module(PLUGINS[mode])
    except ModuleNotFoundError as error:
        extra = PLUGINS[mode].removeprefix("sequel_")
        raise ValueError(
            f"mode={mode} needs the package {error.name}; install it with: pip install 'sequel-cl[{extra}]'"
        ) from error
