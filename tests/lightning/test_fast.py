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
from pytorch_lightning.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateMonitor,
)
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.hparams import AlgorithmHParams, TrainingHParams
from sequel_core.runs.learner import FitMonitor
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.task import Batch
from sequel_lightning import LightningLearner, Naive, fast
from sequel_lightning.learner import CHECKPOINT
from tests.lightning.parts import (
    ADAM,
    BATCH,
    CLASSES,
    MOMENTUM,
    assert_same,
    every_algorithm,
    everything,
    learn,
    module,
    network,
    own_stream,
    stream,
)

CPU = {"accelerator": "cpu", "enable_checkpointing": False}
EVERY_STEPS = 3


def made(benchmark: Benchmark, model: Any, **options: Any) -> LightningLearner:
    training = {"log_every_n_steps": 2, "epochs_per_task": 2, **options.pop("training", {})}
    options["trainer"] = {**CPU, **options.get("trainer", {})}
    return LightningLearner(model, TrainingHParams(batch_size=BATCH, **training), **options)


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


def assert_equal(actual: Any, expected: Any, path: str = "") -> None:
    """Compare nested values bit by bit."""
    if isinstance(expected, Tensor):
        assert torch.equal(actual, expected), path
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), path
        for key, value in expected.items():
            assert_equal(actual[key], value, f"{path}/{key}")
    elif isinstance(expected, list | tuple) and type(expected) in (list, tuple):
        assert len(actual) == len(expected), path
        for i, pair in enumerate(zip(actual, expected, strict=True)):
            assert_equal(*pair, f"{path}/{i}")
    else:
        assert actual == expected or (actual != actual and expected != expected), path


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


@pytest.mark.slow
@every_algorithm
def test_every_method_does_the_same_with_the_incomplete_last_batch(
    hparams: AlgorithmHParams, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    benchmark = own_stream(hparams, num_tasks=2)
    options = {"training": {"drop_last": False}}
    make = lambda: made(benchmark, module(benchmark, hparams), **options)  # noqa: E731
    quick = assert_same_runs(benchmark, make, monkeypatch, tmp_path).learner
    exemplars = 12 if hparams.name == "icarl" else 0  # of the first task, in the second
    sizes = [len(task.train) + exemplars * task.index for task in benchmark.tasks]
    assert quick.step == sum(2 * -(-size // BATCH) for size in sizes)


def scheduled(params: Any, interval: str = "step") -> Any:
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}


def follows_the_loss(params: Any) -> Any:
    optimizer = torch.optim.SGD(params, lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    settings = {"scheduler": scheduler, "interval": "step", "monitor": "train/loss"}
    return {"optimizer": optimizer, "lr_scheduler": settings}


LBFGS = partial(torch.optim.LBFGS, lr=0.1, max_iter=3)  # which computes the gradient several times a step


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (ADAM, {"training": {"grad_clip": 0.1}}),
        (MOMENTUM, {"training": {"grad_clip": 0.01, "grad_clip_algorithm": "value"}}),
        (scheduled, {}),
        (partial(scheduled, interval="epoch"), {}),
        (follows_the_loss, {"training": {"log_every_n_steps": 1}}),
        (LBFGS, {}),
        (ADAM, {"training": {"dtype": "float64"}}),
        (ADAM, {"trainer": {"limit_train_batches": 4}}),
        (ADAM, {"training": {"drop_last": False}}),
    ],
    ids=["norm", "value", "scheduler", "epochs", "plateau", "lbfgs", "float64", "limit", "incomplete"],
)
def test_what_the_fast_path_supports(
    optimizer: Any, options: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    benchmark = stream(2)
    hparams = EWCHParams(ewc_lambda=10.0)
    double = options.get("training", {}).get("dtype") == "float64"

    def make() -> LightningLearner:
        model = module(benchmark, hparams, optimizer)
        if double:
            net = network(benchmark).double()
            model = type(model)(net, optimizer, hparams, benchmark.spec)
        return made(benchmark, model, **options)

    assert assert_same_runs(benchmark, make, monkeypatch, tmp_path).learner.fast_steps.reason is None


class Logs(Naive):
    """Logs the norm of the weights at every step."""

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        norm = torch.stack([p.norm() for p in self.params().values()]).sum()
        self.log("norm", norm.detach(), on_step=True, on_epoch=True)
        return super().loss(outputs, batch) + 0.01 * norm


def test_values_and_metrics_that_are_logged_at_each_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    benchmark = stream(2)
    files: list[Path] = []

    def make() -> LightningLearner:
        files.append(tmp_path / f"log_{len(files)}")
        metrics = MetricCollection({"own": MulticlassAccuracy(CLASSES)})
        model = Logs(network(benchmark), MOMENTUM, NaiveHParams(), benchmark.spec, metrics)
        return made(benchmark, model, loggers=[CSVLogger(files[-1], "", "")])

    quick = assert_same_runs(benchmark, make, monkeypatch, tmp_path)
    assert quick.learner.fast_steps.reason is None
    quick.learner.close()
    rows, expected = ((path / "metrics.csv").read_text() for path in files)
    assert rows == expected
    assert "norm" in rows


def test_callbacks_that_look_at_epochs_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    benchmark = stream(2, validation=6)

    def make() -> LightningLearner:
        stop = EarlyStopping("val/accuracy", mode="max", patience=1)
        return made(benchmark, module(benchmark), callbacks=[stop], training={"epochs_per_task": 4})

    assert assert_same_runs(benchmark, make, monkeypatch, tmp_path).learner.fast_steps.reason is None


def test_a_request_to_stop_is_followed_after_the_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    benchmark = stream(1)
    steps = []
    for fails in (False, True):
        with monkeypatch.context() as patch:
            if fails:
                by_lightning(patch)
            learner = made(benchmark, module(benchmark))

            def stop(learner: LightningLearner = learner) -> None:
                learner.trainer.should_stop = True

            learner.fit_task(benchmark.tasks[0], FitMonitor(lambda _: None, stop, evaluate_every=3))
            steps.append(learner.step)
    assert steps == [3, 3]


@pytest.mark.parametrize(
    ("drop_last", "expected"), [(True, [(1, 4), (6, 9)]), (False, [(1, 5), (7, 11)])], ids=["whole", "all"]
)
def test_only_the_first_and_the_last_step_of_an_epoch_are_lightnings(
    drop_last: bool, expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = stream(1)
    taken: list[tuple[int, int]] = []
    learner = made(benchmark, module(benchmark), training={"drop_last": drop_last})
    take = fast._Steps.take

    def noted(self: Any, batches: Any) -> None:
        before = learner.step
        take(self, batches)
        taken.append((before, learner.step))

    monkeypatch.setattr(fast._Steps, "take", noted)
    learner.fit_task(benchmark.tasks[0], FitMonitor(lambda _: None, lambda: None))
    assert taken == expected  # of 5 whole batches and an incomplete one in each of 2 epochs


class Hooked(Naive):
    """Overrides a hook of Lightning."""

    def on_after_backward(self) -> None:
        self.calls = getattr(self, "calls", 0) + 1


def test_why_the_fast_path_is_off(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    benchmark = stream(1)
    hooked = Hooked(network(benchmark), MOMENTUM, NaiveHParams(), benchmark.spec)
    patched = module(benchmark)
    object.__setattr__(patched, "on_train_batch_start", lambda *_: None)
    cases: list[tuple[str, LightningLearner]] = [
        ("Hooked overrides on_after_backward", made(benchmark, hooked)),
        ("EWC overrides on_train_batch_start", made(benchmark, patched)),
    ]
    callbacks = (
        ("LearningRateMonitor has on_train_batch_start", LearningRateMonitor("step")),
        ("LambdaCallback has on_train_batch_end", LambdaCallback(on_train_batch_end=lambda *_: None)),
        ("trainer.accumulate_grad_batches=2", GradientAccumulationScheduler({0: 2})),
    )
    for reason, callback in callbacks:
        loggers = [CSVLogger(tmp_path, "", "")] if isinstance(callback, LearningRateMonitor) else []
        cases.append((reason, made(benchmark, module(benchmark), callbacks=[callback], loggers=loggers)))
    for reason, settings in (
        ("trainer.accumulate_grad_batches=2", {"accumulate_grad_batches": 2}),
        ("trainer.max_steps=4", {"max_steps": 4}),
        ("trainer.precision=bf16-mixed", {"precision": "bf16-mixed"}),
        ("trainer.profiler=SimpleProfiler", {"profiler": "simple"}),
    ):
        cases.append((reason, made(benchmark, module(benchmark), trainer=settings)))
    for reason, learner in cases:
        caplog.clear()
        with caplog.at_level(logging.INFO, "sequel_lightning.fast"):
            learner.fit_task(benchmark.tasks[0], FitMonitor(lambda _: None, lambda: None))
        assert [record.getMessage() for record in caplog.records if record.name == fast.__name__] == [
            f"fast path: off, because {'the callback ' if ' has ' in reason else ''}{reason}"
        ]
    assert hooked.calls == learner_steps(benchmark)


def learner_steps(benchmark: Benchmark) -> int:
    """Return the steps of two epochs of the first task."""
    return 2 * (len(benchmark.tasks[0].train) // BATCH)


def test_nothing_changes_under_an_own_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(fast.FastSteps, "_advance")
    benchmark = stream(1)
    new: pl.Trainer = learn(module(benchmark), benchmark, 0)
    assert "advance" not in vars(new.fit_loop.epoch_loop)
