"""The fast path: the same weights, reports and checkpoints as Lightning's own loop, and why it is off."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping, GradientAccumulationScheduler, LambdaCallback
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins.precision import Precision
from torch import Tensor, nn
from torch.utils.data import Dataset

from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.hparams import AlgorithmHParams, TrainingHParams
from sequel_core.runs.learner import FitMonitor, Progress
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.task import Batch
from sequel_lightning import EWC, LightningLearner, Naive, fast
from sequel_lightning.learner import CHECKPOINT
from tests.lightning.parts import (
    ADAM,
    BATCH,
    MOMENTUM,
    assert_same,
    data,
    every_algorithm,
    everything,
    module,
    network,
    own_stream,
    stream,
    trainer,
)

CPU = {"accelerator": "cpu", "enable_checkpointing": False}
EVERY_STEPS = 3


def made(benchmark: Benchmark, model: Any, **options: Any) -> LightningLearner:
    training = {"batch_size": BATCH, "log_every_n_steps": 2, "epochs_per_task": 2, **options.pop("training", {})}
    options["trainer"] = {**CPU, **options.get("trainer", {})}
    return LightningLearner(model, TrainingHParams(**training), **options)


class Run:
    """Trains a learner, and keeps what can be observed of that: reports, evaluations and checkpoints."""

    def __init__(self, learner: LightningLearner, directory: Path) -> None:
        self.learner, self._directory = learner, directory
        self.observed: list[Any] = []
        self.checkpoints: list[Path] = []

    def fit(self, benchmark: Benchmark, tasks: slice = slice(None)) -> "Run":
        monitor = FitMonitor(
            self.observed.append,
            self._evaluate,
            evaluate_every=EVERY_STEPS,
            on_checkpoint=self._save,
            checkpoint_every=4,
        )
        for task in benchmark.tasks[tasks]:
            self._task = task
            self.learner.fit_task(task, monitor)
            self._evaluate()
        return self

    def _evaluate(self) -> None:
        self.observed.append((self.learner.step, self.learner.evaluate(self._task, "test")))

    def _save(self) -> None:
        directory = self._directory / str(len(self.checkpoints))
        self.learner.save(directory)
        self.checkpoints.append(directory)

    def files(self) -> list[Any]:
        """Return the contents of the checkpoints."""
        return [torch.load(path / CHECKPOINT, weights_only=True) for path in self.checkpoints]


def by_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "slow_reason", lambda *_: "a test compares it")


def assert_equal(actual: Any, expected: Any, where: str = "") -> None:
    """Compare nested values bit by bit."""
    if isinstance(expected, Tensor):
        assert torch.equal(actual, expected), where
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_equal(actual[key], value, f"{where}/{key}")
    elif isinstance(expected, list | tuple) and type(expected) in (list, tuple):
        assert len(actual) == len(expected), where
        for i, pair in enumerate(zip(actual, expected, strict=True)):
            assert_equal(*pair, f"{where}/{i}")
    else:
        assert actual == expected or (actual != actual and expected != expected), where


def assert_same_runs(
    benchmark: Benchmark, make: Callable[[], LightningLearner], monkeypatch: pytest.MonkeyPatch, path: Path
) -> Run:
    """Train with and without the fast path; return the run with it."""
    quick = Run(make(), path / "fast").fit(benchmark)
    with monkeypatch.context() as patch:
        by_lightning(patch)
        slow = Run(make(), path / "slow").fit(benchmark)
    assert_same(everything(quick.learner.module), everything(slow.learner.module))
    assert_equal(quick.observed, slow.observed)
    assert_equal(quick.files(), slow.files())
    assert len(quick.checkpoints) > 1
    return quick


@every_algorithm
def test_every_method_does_the_same_in_the_fast_path(
    hparams: AlgorithmHParams, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    benchmark = own_stream(hparams, num_tasks=2)
    if hparams.name not in ("icarl", "stable_sgd", "joint"):
        hparams = replace(hparams, reset_optimizer=False)
    make = lambda: made(benchmark, module(benchmark, hparams))  # noqa: E731
    quick = assert_same_runs(benchmark, make, monkeypatch, tmp_path)
    reason = "lamaml takes its steps itself" if hparams.name == "lamaml" else None
    assert quick.learner.fast_steps.reason == reason
    resumed = made(benchmark, module(benchmark, hparams))  # in the middle of the second task
    resumed.restore(quick.checkpoints[-2])
    Run(resumed, tmp_path / "resumed").fit(benchmark, slice(1, 2))
    assert_same(everything(resumed.module), everything(quick.learner.module))
