"""Fixtures: a sandbox without a framework or a network."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sequel_lightning._torchvision  # noqa: F401 - as the plug-in would
from sequel_benchmarks import cache, data
from sequel_core.experiment.schema import ExperimentConfig
from sequel_core.runs import learner
from sequel_core.runs.learner import Learner
from sequel_core.stream.benchmark import Benchmark
from tests.hostile.fuzzing import Sandbox


class Untrained(Learner):
    """A learner that can be built, saved and restored, and raises if it is trained."""

    shows_progress = False
    logs = False
    step = 0

    def __init__(self, config: ExperimentConfig, benchmark: Benchmark) -> None:
        self.mode, self.hparams, self.training, self.spec = (
            config.mode, config.algo, config.training, benchmark.spec
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        return {"parameters": 0}

    def fit_task(self, *_: object) -> None:
        raise ValueError("nothing is trained here")

    def evaluate(self, *_: object) -> Any:
        raise ValueError("nothing is evaluated here")

    def weights(self) -> Any:
        raise ValueError("nothing was trained here")


class Plugin:
    """A stand-in for the module that `sequel_core.runs.learner.plugin` returns."""

    def process_settings(self, config: ExperimentConfig) -> AbstractContextManager[None]:
        return nullcontext()

    def build_learner(
        self, config: ExperimentConfig, benchmark: Benchmark, run_dir: Path, callbacks: object
    ) -> Learner:
        return Untrained(config, benchmark)  # type: ignore[abstract]  # not called


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Sandbox:
    """A sandbox with a small MNIST in its data directory."""
    made = Sandbox(tmp_path)
    monkeypatch.chdir(made.here)
    monkeypatch.setattr(learner, "plugin", lambda mode: Plugin())
    folder = made.given / "data" / "mnist"
    folder.mkdir(parents=True)
    monkeypatch.setenv("SEQUEL_DATA_DIR", str(folder.parent))
    for name, count in zip(cache.NPY_FILES, (200, 200, 50, 50), strict=True):
        images = np.arange(count * 784).astype(np.uint8).reshape(count, 28, 28, 1)
        np.save(folder / name, images if "images" in name else np.arange(count) % 10)
    for name, origin in data.ORIGINS.items():  # the mirror is a port without a server
        monkeypatch.setitem(data.ORIGINS, name, replace(origin, mirrors=("http://127.0.0.1:9/",)))
    return made
