"""A NumPy learner, with which the command is tested without a framework."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sequel_core.experiment.schema import ExperimentConfig
from sequel_core.objectives import Score
from sequel_core.runs import learner
from sequel_core.runs.learner import DivergenceError, Evaluation, FitMonitor, OneProcess
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.task import Task


class NearestMean(OneProcess):
    """A classifier that predicts the class with the nearest mean image of its latest task.

    With a learning rate below 0.01 it learns nothing and predicts class 0; from 100 on, it diverges.
    """

    logs = shows_progress = False
    score = Score()

    def __init__(self, config: ExperimentConfig, benchmark: Benchmark) -> None:
        self.config = config
        self.mode = config.mode
        self.hparams = config.algo
        self.training = config.training
        self.spec = benchmark.spec
        self.step = 0
        self.means = np.zeros((benchmark.num_classes, int(np.prod(benchmark.image_shape))))

    def fit_task(self, task: Task, monitor: FitMonitor) -> None:
        x, y, _ = task.train.take(np.arange(len(task.train)))
        if self.config.optimizer.lr >= 100:
            raise DivergenceError(task.index, 0, 0)
        if self.config.optimizer.lr >= 0.01:
            for k in np.unique(y):
                self.means[k] = x[y == k].reshape(-1, self.means.shape[1]).mean(0)
        self.step += 1

    def evaluate(self, task: Task, split: str) -> Evaluation:
        part = task.split(split)
        x, y, _ = part.take(np.arange(len(part)))
        distance = ((x.reshape(len(x), 1, -1) - self.means) ** 2).sum(-1)
        accuracy = int((distance.argmin(1) == y).sum()) / len(y)
        return Evaluation(accuracy, len(y), 0.0, accuracy)

    def start_stream(self, config: Mapping[str, Any], resumed: bool = False) -> None:
        """Do nothing."""

    def end_stream(self) -> None:
        """Do nothing."""

    def log(self, metrics: Mapping[str, float]) -> None:
        """Do nothing."""

    def save(self, directory: Path) -> Callable[[], None]:
        directory.mkdir()
        np.savez(directory / "means.npz", means=self.means, step=self.step)
        return lambda: None

    def restore(self, directory: Path) -> None:
        with np.load(directory / "means.npz") as arrays:
            self.means, self.step = arrays["means"], int(arrays["step"])

    def weights(self) -> dict[str, FloatArray]:
        return {"means": self.means}

    def describe(self) -> dict[str, Any]:
        return {"model": "nearest mean", "parameters": self.means.size}

    def memory_bytes(self) -> int:
        return self.means.nbytes

    def threads(self) -> int:
        return 1

    def close(self, failed: bool = False) -> None:
        """Do nothing."""


class Plugin:
    """A NumPy plug-in for `sequel_core.runs.learner.plugin`, which records the configurations it receives."""

    def __init__(self) -> None:
        self.built: list[ExperimentConfig] = []

    def process_settings(self, config: ExperimentConfig) -> AbstractContextManager[None]:
        return nullcontext()

    def build_learner(
        self, config: ExperimentConfig, benchmark: Benchmark, run_dir: Path, callbacks: Any = ()
    ) -> NearestMean:
        self.built.append(config)
        return NearestMean(config, benchmark)


@pytest.fixture
def numpy_plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Plugin:
    plugin = Plugin()
    monkeypatch.setattr(learner, "plugin", lambda mode: plugin)
    monkeypatch.chdir(tmp_path)
    return plugin
