"""A learner without training. Its scores and weights are random numbers of algorithm, framework and seed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.experiment.schema import ExperimentConfig
from sequel_core.hparams import AlgorithmHParams, TrainingHParams
from sequel_core.runs.learner import DivergenceError, Evaluation, FitMonitor, Learner, Mode, Progress
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.task import Task

STEPS = 7


class Scripted(Learner):
    """Raises OSError with seed 13 and DivergenceError with `ewc_lambda` above 1000."""

    shows_progress = False

    def __init__(
        self, mode: Mode, hparams: AlgorithmHParams, benchmark: Benchmark, seed: int = 0, **settings: Any
    ) -> None:
        self.mode, self.hparams, self.spec = mode, hparams, benchmark.spec
        self.training = TrainingHParams(seed=seed, **settings)
        self._step = 0
        self._rng = np.random.default_rng([crc32(f"{hparams.name} {mode}".encode()), seed])

    @property
    def step(self) -> int:
        return self._step

    @property
    def logs(self) -> bool:
        return False

    def fit_task(self, task: Task, monitor: FitMonitor) -> None:
        self._step += STEPS
        if self.training.seed == 13:
            raise OSError("no space")
        if isinstance(self.hparams, EWCHParams) and self.hparams.ewc_lambda > 1000:
            raise DivergenceError(task.index, 0, 0)
        monitor.on_progress(Progress(self._step, 0, STEPS, STEPS, 1.5, 0.5, 0.1, {}))

    def evaluate(self, task: Task, split: str) -> Evaluation:
        total = len(task.split(split))
        correct = int(self._rng.integers(total + 1))
        return Evaluation(correct / total, total, 0.0, correct / total)

    def save(self, directory: Path) -> Callable[[], None]:
        directory.mkdir(parents=True)
        return lambda: None

    def weights(self) -> dict[str, FloatArray]:
        return {"a/kernel": self._rng.normal(size=(3, 4)), "head/bias": self._rng.normal(size=2)}

    def describe(self) -> dict[str, Any]:
        return {}

    def memory_bytes(self) -> int:
        return 1000 + self.training.seed

    def threads(self) -> int:
        return 1


def scripted(
    mode: Mode, hparams: AlgorithmHParams, benchmark: Benchmark, seed: int = 0, **settings: Any
) -> Scripted:
    return Scripted(mode, hparams, benchmark, seed, **settings)  # type: ignore[abstract]


class ScriptedPlugin:
    """A fake of what `sequel_core.runs.learner.plugin` returns; it records configurations."""

    def __init__(self) -> None:
        self.built: list[ExperimentConfig] = []

    def process_settings(self, config: ExperimentConfig) -> AbstractContextManager[None]:
        return nullcontext()

    def build_learner(
        self, config: ExperimentConfig, benchmark: Benchmark, run_dir: Path, **_: Any
    ) -> Scripted:
        self.built.append(config)
        return scripted(config.mode, config.algo, benchmark, config.training.seed)
