"""The Learner protocol: all that the core knows of a framework."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Literal, NamedTuple, Protocol

from sequel_core.hparams import AlgorithmHParams, TrainingHParams
from sequel_core.task import FloatArray, StreamSpec, Task

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

    def due(self, task_step: int, task_steps: int, epoch_end: bool) -> bool:
        """Whether an evaluation is due; after the last step of a task comes the task's own."""
        if task_step == task_steps:
            return False
        if isinstance(self.evaluate_every, int):
            return task_step % self.evaluate_every == 0
        return self.evaluate_every == "epoch" and epoch_end


class Learner(Protocol):
    """A model with an algorithm, in one of the frameworks."""

    mode: Mode
    hparams: AlgorithmHParams
    training: TrainingHParams
    spec: StreamSpec

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

    def log_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Send the run's configuration to the framework's own loggers."""
        ...

    def log(self, metrics: Mapping[str, float]) -> None:
        """Send numbers to the framework's own loggers, at the learner's current step."""
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

    def close(self) -> None:
        """Flush and close the loggers."""
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
