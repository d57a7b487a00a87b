"""LightningLearner: like own Trainers; loggers, callbacks across tasks; divergence, masks, bad input."""

import csv
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.strategies import ModelParallelStrategy
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from sequel_core import run
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.joint import JointHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.hparams import AlgorithmHParams, TrainingHParams
from sequel_core.runs.learner import DivergenceError, FitMonitor, Progress
from sequel_core.stream import plan
from sequel_core.stream.benchmark import Benchmark, Scenario
from sequel_lightning import LightningLearner
from sequel_lightning.preprocessing import mask_logits
from tests.lightning.parts import (
    ADAM,
    BATCH,
    CLASSES,
    MOMENTUM,
    STEPS,
    assert_same,
    data,
    everything,
    learn,
    module,
    network,
    own_loader,
    stream,
    trainer,
)

SILENT = FitMonitor(lambda progress: None, lambda: None)
CPU = {"accelerator": "cpu"}


def learner(
    benchmark: Benchmark, hparams: AlgorithmHParams | None = None, optimizer: Any = MOMENTUM, **options: Any
) -> LightningLearner:
    training = options.pop("training", {})
    settings = TrainingHParams(**{"batch_size": BATCH, "log_every_n_steps": 2, **training})
    options["trainer"] = {**CPU, **options.get("trainer", {})}
    return LightningLearner(module(benchmark, hparams, optimizer), settings, **options)


@pytest.mark.parametrize(
    ("hparams", "optimizer"),
    [
        (NaiveHParams(lr_decay=0.8), MOMENTUM),
        (EWCHParams(ewc_lambda=10.0, lr_decay=0.8, reset_optimizer=False), MOMENTUM),
        (EWCHParams(ewc_lambda=10.0, accumulation="online", gamma=0.5), ADAM),
    ],
)
def test_own_trainers_end_with_the_weights_of_run(
    hparams: AlgorithmHParams, optimizer: Any, tmp_path: Path
) -> None:
    benchmark = stream(validation=6)
    orchestrated = learner(benchmark, hparams, optimizer, training={"epochs_per_task": 2})
    run(orchestrated, benchmark, run_dir=tmp_path / "run", evaluate_every=3, progress=False)
    expected = module(benchmark, hparams, optimizer)
    for task in range(len(benchmark)):
        learn(expected, benchmark, task, epochs=2)
    assert_same(everything(orchestrated.module), everything(expected))


def test_testing_with_a_trainer_finds_the_learners_accuracy() -> None:
    benchmark = stream(validation=9)
    made = learner(benchmark, training={"eval_batch_size": 5})
    for task in benchmark.tasks:
        made.fit_task(task, SILENT)
    for j, task in enumerate(benchmark.tasks):
        other = trainer()
        (tested,) = other.test(made.module, datamodule=data(benchmark, j, eval_batch_size=4), verbose=False)
        (validated,) = other.validate(made.module, datamodule=data(benchmark, j), verbose=False)
        expected = {name: made.evaluate(task, name) for name in ("test", "validation")}
        assert tested["test/accuracy"] == pytest.approx(expected["test"].score, rel=1e-6)
        assert tested["test/loss"] == pytest.approx(expected["test"].loss, rel=1e-5)
        assert validated["val/accuracy"] == pytest.approx(expected["validation"].score, rel=1e-6)


def x_axis(logger: CSVLogger) -> list[int]:
    """Return the steps of a logger's rows; no row may go back, no metric may have a step twice."""
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(steps)
    for name in rows[0].keys() - {"step", "epoch"}:
        expected = [step for step, row in zip(steps, rows, strict=True) if row[name]]
        assert expected == sorted(set(expected)), name
    return steps


def test_the_x_axis_of_loggers_grows_across_the_learners_trainers(tmp_path: Path) -> None:
    benchmark = stream(validation=6)
    logger = CSVLogger(tmp_path, name="learner")
    made = learner(
        benchmark,
        training={"epochs_per_task": 2},
        loggers=[logger],
        callbacks=[LearningRateMonitor("step"), EarlyStopping("val/loss", patience=9)],
    )
    run(made, benchmark, run_dir=tmp_path / "run", progress=False)
    steps = x_axis(logger)
    assert steps[-1] == made.step == len(benchmark) * 2 * STEPS
    assert {(task * 2 + epoch + 1) * STEPS for task in range(3) for epoch in range(2)} <= set(steps)


@pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists")
def test_the_x_axis_of_loggers_grows_across_own_trainers(tmp_path: Path) -> None:
    benchmark = stream(validation=6)
    logger = CSVLogger(tmp_path, name="own", version=0)
    model = module(benchmark)
    for task in range(len(benchmark)):
        learn(model, benchmark, task, epochs=2, logger=logger, callbacks=[LearningRateMonitor("step")])
        trainer(logger=logger).test(model, datamodule=data(benchmark, task), verbose=False)
    steps = x_axis(logger)
    assert steps[-1] == model.running_metrics.steps_done == 3 * 2 * STEPS


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_callbacks_start_afresh_with_every_task(tmp_path: Path) -> None:
    benchmark = stream(validation=8)
    stopping = EarlyStopping("val/loss", patience=1)
    keeping = ModelCheckpoint(tmp_path, filename="{epoch}-{step}", monitor="val/loss")
    made = learner(
        benchmark,
        optimizer=partial(torch.optim.SGD, lr=0.0),
        training={"epochs_per_task": 5},
        callbacks=[stopping, keeping],
    )
    for i, task in enumerate(benchmark.tasks):
        made.fit_task(task, SILENT)
        assert made.step == (i + 1) * 2 * STEPS
    assert stopping.wait_count == 0
    assert stopping.best_score == math.inf
    assert keeping.best_model_path == ""
    assert len(list(tmp_path.rglob("*.ckpt"))) == len(benchmark)


def test_progress_is_reported_with_the_means_since_the_last_report() -> None:
    benchmark = stream()
    reports: list[Progress] = []
    metrics = MetricCollection({"own": MulticlassAccuracy(CLASSES, average="micro")})
    model = module(benchmark, NaiveHParams(lr_decay=0.5), partial(torch.optim.SGD, lr=0.1), metrics=metrics)
    settings = TrainingHParams(batch_size=BATCH, log_every_n_steps=2, epochs_per_task=2)
    made = LightningLearner(model, settings, trainer=CPU)
    for task in benchmark.tasks[:2]:
        made.fit_task(task, FitMonitor(reports.append, lambda: None))
    assert [r.task_step for r in reports] == [2, 4, 5, 6, 8, 10] * 2
    assert [r.step for r in reports] == [2, 4, 5, 6, 8, 10, 12, 14, 15, 16, 18, 20]
    assert [r.epoch for r in reports] == [0, 0, 0, 1, 1, 1] * 2
    assert {r.task_steps for r in reports} == {10}
    assert [r.learning_rate for r in reports] == pytest.approx([0.1] * 6 + [0.05] * 6)
    assert [r.extra["own"] for r in reports] == pytest.approx([r.score for r in reports])
    losses, accuracies = plain_loop(benchmark, lr=0.1, epochs=2)
    parts = (slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 6), slice(6, 8))
    for report, part in zip(reports, parts, strict=False):
        assert report.loss == pytest.approx(np.mean(losses[part]), rel=1e-6)
        assert report.score == pytest.approx(np.mean(accuracies[part]))


@pytest.mark.parametrize(("every", "calls"), [("task", 0), ("epoch", 2), (3, 6), (1, 18)])
def test_evaluation_is_called_for_when_due(every: Any, calls: int) -> None:
    benchmark = stream()
    made = learner(benchmark, training={"epochs_per_task": 2})
    at: list[int] = []
    for task in benchmark.tasks[:2]:
        made.fit_task(task, FitMonitor(lambda p: None, lambda: at.append(made.step), every))
    assert len(at) == calls
    assert at == {"task": [], "epoch": [5, 15], 3: [3, 6, 9, 13, 16, 19]}.get(
        every, [step for step in range(1, 20) if step != 10]
    )


def test_evaluation_and_reports_follow_limited_epochs() -> None:
    benchmark = stream()
    made = learner(benchmark, training={"epochs_per_task": 2}, trainer={"limit_train_batches": 3})
    at: list[int] = []
    reports: list[Progress] = []
    made.fit_task(benchmark.tasks[0], FitMonitor(reports.append, lambda: at.append(made.step), "epoch"))
    assert at == [3]
    assert [(r.task_step, r.task_steps) for r in reports] == [(2, 6), (3, 6), (4, 6), (6, 6)]


def plain_loop(benchmark: Benchmark, lr: float, epochs: int) -> tuple[list[float], list[float]]:
    """Return loss and accuracy of every step of the first task, in plain PyTorch on the plan's batches."""
    net = network(benchmark)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    task = benchmark.tasks[0]
    losses, accuracies = [], []
    for epoch in range(epochs):
        for rows in plan.epoch_batches(0, 0, epoch, len(task.train), BATCH):
            x, y, _ = (torch.from_numpy(a) for a in task.train.take(rows))
            logits = net(((x.float() / 255 - 0.4) / 0.25).movedim(-1, 1))
            loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            accuracies.append(float((logits.argmax(-1) == y).float().mean()))
    return losses, accuracies


@pytest.mark.parametrize("lr", [3e9, 1e13, 1e38])
def test_divergence_is_found_at_its_step(lr: float) -> None:
    benchmark = stream()
    losses, _ = plain_loop(benchmark, lr, epochs=3)
    first = int(np.flatnonzero(~np.isfinite(losses))[0])
    made = learner(
        benchmark, NaiveHParams(), partial(torch.optim.SGD, lr=lr), training={"epochs_per_task": 3}
    )
    with pytest.raises(DivergenceError, match="no longer finite at task 0, epoch") as caught:
        made.fit_task(benchmark.tasks[0], SILENT)
    assert caught.value.position == {"task": 0, "epoch": first // STEPS, "step": first % STEPS}


@pytest.mark.parametrize("scenario", ["domain", "task", "class"])
def test_masks_are_applied_to_each_sample_where_the_scenario_says_so(scenario: Scenario) -> None:
    benchmark = stream(scenario=scenario)
    model = module(benchmark, NaiveHParams())
    mixed = benchmark.joined(2).train
    x, y, t = (torch.from_numpy(a) for a in mixed.take(np.arange(0, len(mixed), 5)))
    assert set(t.tolist()) == {0, 1, 2}
    x = x.movedim(-1, 1)
    raw = model.net((x.float() / 255 - 0.4) / 0.25)
    logits = model(x, t)
    hidden = ~torch.from_numpy(benchmark.mask)[t]
    if scenario != "task":
        torch.testing.assert_close(logits, raw)
        return
    assert int(hidden.sum()) == 4 * len(y)
    assert (logits[hidden] == torch.finfo(torch.float32).min).all()
    torch.testing.assert_close(logits[~hidden], raw[~hidden])
    rows = [
        F.cross_entropy(raw[i, 2 * t[i] : 2 * t[i] + 2][None], y[i][None] - 2 * t[i]) for i in range(len(y))
    ]
    torch.testing.assert_close(F.cross_entropy(logits, y), torch.stack(rows).mean())


@pytest.mark.parametrize("scenario", ["domain", "task", "class"])
def test_evaluations_count_as_numpy_does(scenario: Scenario) -> None:
    benchmark = stream(scenario=scenario)
    made = learner(benchmark, NaiveHParams(), training={"epochs_per_task": 3, "eval_batch_size": 4})
    for task in benchmark.tasks:
        made.fit_task(task, SILENT)
    for task in benchmark.tasks:
        x, y, _ = task.test.take(np.arange(len(task.test)))
        with torch.no_grad():
            raw = (
                made.module.net(((torch.from_numpy(x).float() / 255 - 0.4) / 0.25).movedim(-1, 1))
                .double()
                .numpy()
            )
        masked = np.where(benchmark.mask[task.index], raw, -np.inf)
        seen = masked if scenario == "task" else raw
        shifted = seen - seen.max(1, keepdims=True)
        losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(y)), y]
        actual = made.evaluate(task, "test")
        assert actual.total == len(y) == 23
        assert actual.score == int((seen.argmax(1) == y).sum()) / 23
        assert actual.masked_score == int((masked.argmax(1) == y).sum()) / 23
        assert actual.loss == pytest.approx(losses.mean(), rel=1e-5)
        assert actual.masked_score >= actual.score
    if scenario == "class":
        first = made.evaluate(benchmark.tasks[0], "test")
        assert first.masked_score > first.score


def test_joint_training_masks_each_sample_to_its_own_task() -> None:
    benchmark = stream(scenario="task", steps=10)
    made = learner(benchmark, JointHParams(policy="once"), training={"epochs_per_task": 8})
    for task in made.hparams.training_tasks(benchmark):
        made.fit_task(task, SILENT)
    assert made.step == 8 * (3 * 42 // BATCH)
    losses = [made.evaluate(task, "train").loss for task in benchmark.tasks]
    assert max(losses) < math.log(2)


def test_mask_logits_has_no_infinite_number() -> None:
    masked = mask_logits(torch.zeros(1, 3, dtype=torch.bfloat16), torch.tensor([[True, False, True]]))
    assert torch.isfinite(masked).all()
    assert masked.argmin() == 1


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("max_epochs", 3, "training.epochs_per_task"),
        ("gradient_clip_val", 1.0, "training.grad_clip"),
        ("log_every_n_steps", 1, "training.log_every_n_steps"),
        ("logger", False, "loggers"),
        ("callbacks", [], "callbacks"),
    ],
)
def test_settings_of_the_learner_raise_as_settings_of_the_trainer(name: str, value: Any, remedy: str) -> None:
    with pytest.raises(ValueError, match=rf"trainer.{name} is set by the learner; use {remedy}"):
        learner(stream(), trainer={name: value})


def test_dtypes_that_do_not_fit_raise() -> None:
    benchmark = stream()
    with pytest.raises(ValueError, match=r"dtype=float64 but the network's weights are torch.float32"):
        learner(benchmark, training={"dtype": "float64"})
    model = module(benchmark).double()
    with pytest.raises(ValueError, match=r"dtype=float64 needs trainer.precision=64-true, got '16-mixed'"):
        LightningLearner(model, TrainingHParams(dtype="float64"), trainer={"precision": "16-mixed"})


def test_a_module_without_a_spec_raises() -> None:
    with pytest.raises(ValueError, match=r"no spec; construct it with spec=benchmark.spec"):
        LightningLearner(module(stream(), spec=None))


def test_gradients_are_clipped_to_the_training_setting() -> None:
    benchmark = stream()
    clipped = learner(benchmark, training={"grad_clip": 0.1})
    clipped.fit_task(benchmark.tasks[0], SILENT)
    expected = module(benchmark)
    learn(expected, benchmark, 0, gradient_clip_val=0.1)
    free = module(benchmark)
    learn(free, benchmark, 0)
    assert_same(everything(clipped.module), everything(expected))
    assert not torch.equal(
        everything(free)["tensors"]["net.head.weight"], expected.net.get_parameter("head.weight")
    )


@pytest.mark.parametrize(
    "strategy",
    ["fsdp", "deepspeed_stage_2", ModelParallelStrategy()],
    ids=["fsdp", "deepspeed", "model_parallel"],
)
def test_strategies_that_divide_the_network_raise_before_any_process_is_started(strategy: Any) -> None:
    name = strategy if isinstance(strategy, str) else "ModelParallelStrategy"
    with pytest.raises(ValueError, match=f"must be auto, ddp, ddp_spawn or .* single device, got {name}"):
        learner(stream(), trainer={"accelerator": "cpu", "devices": 2, "strategy": strategy})


SPAWNED = r"strategy must be ddp, .* got ddp_spawn, ddp_fork or ddp_notebook, .*; set strategy=ddp"


def test_ddp_spawn_with_a_learner_made_in_python_raises_before_any_process_is_started(tmp_path: Path) -> None:
    benchmark = stream()
    made = learner(benchmark, trainer={"accelerator": "cpu", "devices": 2, "strategy": "ddp_spawn"})
    with pytest.raises(ValueError, match=SPAWNED):
        run(made, benchmark, run_dir=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_ddp_spawn_of_a_trainer_of_the_user_raises_before_any_process_is_started() -> None:
    benchmark = stream()
    spawning = trainer(devices=2, strategy="ddp_spawn")
    with pytest.raises(ValueError, match=SPAWNED):
        spawning.fit(module(benchmark), own_loader(benchmark, 0, with_task=True))
