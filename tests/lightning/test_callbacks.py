"""Lightning's callbacks over a stream of tasks, one by one, and a user's own."""

from __future__ import annotations

import csv
import json
import logging
import math
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    Callback,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    OnExceptionCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
    TQDMProgressBar,
)
from pytorch_lightning.loggers import CSVLogger
from torch.nn import functional as F

from sequel_benchmarks import RotatedDigits
from sequel_core import load_result, run
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.hparams import AlgorithmHParams, TrainingHParams
from sequel_core.runs.callbacks import StreamCallback
from sequel_core.runs.learner import FitMonitor, Progress
from sequel_core.stream import plan
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.benchmark import Benchmark
from sequel_lightning import MLP, LightningLearner, Naive, initialise, make_learner
from sequel_lightning.consolidation import CONSOLIDATED, IDLE, TRAINING
from tests.lightning.parts import At, counted, learn, module, position, stream

SILENT = FitMonitor(lambda progress: None, lambda: None)
BATCH, STEPS, TASKS = 10, 8, 3
SGD = partial(torch.optim.SGD, lr=0.1)


def digits(validation: float = 0.2) -> Benchmark:
    return RotatedDigits(num_tasks=TASKS, subset=BATCH * STEPS + 4, validation=validation)


def network() -> MLP:
    return MLP((8,), 10, image_shape=(8, 8, 1))


def learner(
    *callbacks: Callback,
    hparams: AlgorithmHParams | None = None,
    epochs: int = 1,
    benchmark: Benchmark | None = None,
    optimizer: Any = SGD,
    trainer: dict[str, Any] | None = None,
    **options: Any,
) -> LightningLearner:
    training = TrainingHParams(batch_size=BATCH, epochs_per_task=epochs, log_every_n_steps=3)
    return make_learner(
        hparams or NaiveHParams(),
        network(),
        optimizer,
        benchmark or digits(),
        training,
        callbacks=callbacks,
        trainer={"accelerator": "cpu", **(trainer or {})},
        **options,
    )


class Notes(Callback):
    """A user's own callback: keeps the weights after every step, and counts the tasks."""

    def __init__(self) -> None:
        self.weights: dict[tuple[int, int], FloatArray] = {}  # by task and its step, from 1
        self.tasks: list[int] = []

    def note(self, module: Any, step: int) -> None:
        flat = torch.cat([p.detach().flatten() for p in module.net.parameters()])
        self.weights[int(module.task_index), step] = flat.double().numpy().copy()

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.note(module, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.note(module, trainer.global_step)

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        self.tasks.append(int(module.task_index))

    def state_dict(self) -> dict[str, Any]:
        return {"tasks": list(self.tasks)}


def records(directory: Path, event: str) -> list[dict[str, Any]]:
    actual = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [record for record in actual if record["kind"] == event]


def columns(logger: CSVLogger) -> dict[str, list[tuple[int, float]]]:
    """Return every column of a logger's file as steps and values; no step may come twice or go back."""
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    names = rows[0].keys() - {"step", "epoch"}
    actual = {name: [(int(row["step"]), float(row[name])) for row in rows if row[name]] for name in names}
    for name, points in actual.items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), name
    return actual


# -- early stopping


def epochs_by_hand(patience: int, longest: int) -> list[int]:
    """Return how many epochs each task takes where validation accuracy has to rise: plain PyTorch."""
    stream = digits()
    scale, shift = (np.asarray(a) for a in (stream.spec.normalisation.scale, stream.spec.normalisation.shift))

    def shown(x: Any) -> torch.Tensor:
        return torch.from_numpy((x * scale + shift).astype(np.float32)).movedim(-1, 1)

    net = initialise(network(), 0)
    epochs = []
    for i, task in enumerate(stream.tasks):
        optimizer = SGD(net.parameters())
        held_out = task.validation.take(np.arange(len(task.validation)))
        best, waited, epoch = -math.inf, 0, 0
        while waited < patience and epoch < longest:
            for rows in plan.epoch_batches(0, i, epoch, len(task.train), BATCH):
                x, y, _ = task.train.take(rows)
                optimizer.zero_grad()
                F.cross_entropy(net(shown(x)), torch.from_numpy(y)).backward()
                optimizer.step()
            epoch += 1
            predicted = net(shown(held_out.x)).argmax(1).numpy()
            score = float((predicted == held_out.y).mean())
            best, waited = (score, 0) if score > best else (best, waited + 1)
        epochs.append(epoch)
    return epochs


def test_early_stopping_ends_each_task_when_it_should(tmp_path: Path) -> None:
    expected = epochs_by_hand(patience=2, longest=12)
    assert min(expected) < 12
    assert len(set(expected)) > 1
    stopping = EarlyStopping("val/accuracy", mode="max", patience=2)
    made = learner(stopping, epochs=12)
    calls = counted(made.module)
    run(made, digits(), run_dir=tmp_path, evaluate_every="epoch", progress=False)
    reports = records(tmp_path, "train")
    ends = [max(r["task_step"] for r in reports if r["task"] == i) for i in range(TASKS)]
    assert ends == [STEPS * epochs for epochs in expected]
    assert {r["task_steps"] for r in reports} == {12 * STEPS}
    assert made.step == STEPS * sum(expected)
    assert calls == [0, 1, 2]
    assert position(made.module) == (2, CONSOLIDATED)
    actual = [(r["step"], r["task"]) for r in records(tmp_path, "evaluation") if r["split"] == "test"]
    assert len(actual) == len(set(actual))  # none at the end of a task beside the task's own
    assert {step for step, _ in actual} == set(range(STEPS, made.step + 1, STEPS))
    assert stopping.wait_count == 0
    assert stopping.best_score == -math.inf
    used = made.trainer.early_stopping_callback
    assert isinstance(used, EarlyStopping)
    assert used.stopped_epoch == (expected[2] - 1 if expected[2] < 12 else 0)


@pytest.mark.parametrize(("every", "at"), [("epoch", [8, 24]), (4, [4, 8, 12, 20, 24, 28]), (8, [8, 24])])
def test_callbacks_do_not_change_when_evaluations_are_due(every: Any, at: list[int]) -> None:
    for callbacks in ((), (Callback(),)):
        made = learner(*callbacks, epochs=2)
        actual: list[int] = []
        monitor = FitMonitor(
            lambda p: None, partial(lambda made, actual: actual.append(made.step), made, actual), every
        )
        for task in digits().tasks[:2]:
            made.fit_task(task, monitor)
        assert actual == at


def test_a_monitor_without_validation_samples_raises_before_the_task() -> None:
    stream = digits(validation=0)
    made = learner(EarlyStopping("val/loss"), benchmark=stream)
    with pytest.raises(ValueError, match=r"EarlyStopping monitors val/loss, and task 0 has no validation"):
        made.fit_task(stream.tasks[0], SILENT)
    assert made.step == 0


# -- checkpoints


def weights_in(path: str) -> FloatArray:
    state = torch.load(path, weights_only=True)["state_dict"]
    flat = torch.cat([v.flatten() for k, v in state.items() if k.startswith("net.")])
    return np.asarray(flat.double().numpy())


def test_checkpoints_of_each_task_have_their_own_directory(tmp_path: Path) -> None:
    notes = Notes()
    made = learner(
        notes,
        ModelCheckpoint(tmp_path / "best", "{epoch}", monitor="val/loss", save_last=True),
        ModelCheckpoint(tmp_path / "often", "{step}", every_n_train_steps=5, save_top_k=-1),
        epochs=2,
        hparams=EWCHParams(),
    )
    for i, task in enumerate(digits().tasks):
        made.fit_task(task, SILENT)
        best = made.trainer.checkpoint_callback
        assert isinstance(best, ModelCheckpoint)
        step = int(torch.load(best.best_model_path, weights_only=True)["global_step"])
        np.testing.assert_array_equal(weights_in(best.best_model_path), notes.weights[i, step])
    directories = [f"task_{i}" for i in range(TASKS)]
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == directories
    for i, name in enumerate(directories):
        assert len(list((tmp_path / "best" / name).glob("epoch=*.ckpt"))) == 1
        assert (tmp_path / "best" / name / "last.ckpt").exists()
        often = tmp_path / "often" / name
        assert sorted(path.name for path in often.iterdir()) == [f"step={s}.ckpt" for s in (10, 15, 5)]
        for step in (5, 10, 15):
            np.testing.assert_array_equal(
                weights_in(str(often / f"step={step}.ckpt")), notes.weights[i, step]
            )
        saved = torch.load(often / "step=5.ckpt", weights_only=True)["callbacks"]
        assert saved["Notes"] == {"tasks": list(range(i))}


def test_the_best_checkpoint_loads_into_a_fresh_module(tmp_path: Path) -> None:
    made = learner(ModelCheckpoint(monitor="val/loss"), trainer={"default_root_dir": tmp_path}, epochs=2)
    for task in digits().tasks[:2]:
        made.fit_task(task, SILENT)
    path = made.trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    assert Path(path).parent == tmp_path / "checkpoints" / "task_1"
    parts: dict[str, Any] = {"net": network(), "optimizer": SGD, "hparams": NaiveHParams()}
    loaded = Naive.load_from_checkpoint(path, **parts, spec=digits().spec, weights_only=True)
    flat = torch.cat([p.detach().flatten() for p in loaded.net.parameters()]).double().numpy()
    np.testing.assert_array_equal(flat, weights_in(path))
    assert position(loaded) == (1, TRAINING)
    assert loaded.running_metrics.steps_done > STEPS


# -- learning rates, averages, accumulation, time


def test_the_learning_rate_monitors_axis_continues(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "csv")
    made = learner(
        LearningRateMonitor("step"),
        DeviceStatsMonitor(),
        hparams=NaiveHParams(lr_decay=0.5),
        epochs=2,
        loggers=[logger],
    )
    run(made, digits(), run_dir=tmp_path / "run", evaluate_every="epoch", progress=False)
    actual = columns(logger)
    rates = actual["lr-SGD"]
    assert len(rates) == TASKS * 2 * STEPS // 3
    for step, rate in rates:
        assert rate == pytest.approx(0.1 * 0.5 ** ((step - 1) // (2 * STEPS)))
    assert actual["val/loss"][-1][0] == made.step == TASKS * 2 * STEPS
    measured = [points for name, points in actual.items() if name.startswith("DeviceStatsMonitor")]
    assert len(measured) >= 2
    assert {len(points) for points in measured} == {len(rates)}


def test_stochastic_weight_averaging_averages_within_each_task(tmp_path: Path) -> None:
    """Of four epochs the last two count, with the weights at their starts; the method gets the average."""
    notes = Notes()
    made = learner(
        notes,
        StochasticWeightAveraging(0.05, swa_epoch_start=3, annealing_epochs=1),
        hparams=EWCHParams(ewc_lambda=1, accumulation="online", reset_optimizer=False),
        epochs=4,
    )
    anchors = []

    class Keep(StreamCallback):
        def on_task_end(self, learner: Any, task: Any, matrix: Any) -> None:
            anchors.append(torch.cat([a.flatten() for a in learner.module.anchor.get().values()]).clone())

    run(made, digits(), run_dir=tmp_path, progress=False, callbacks=[Keep()])
    for i, anchor in enumerate(anchors):
        average = (notes.weights[i, 2 * STEPS] + notes.weights[i, 3 * STEPS]) / 2
        np.testing.assert_allclose(anchor.numpy(), average, rtol=1e-6, atol=1e-7)
        if i < 2:
            np.testing.assert_allclose(notes.weights[i + 1, 0], average, rtol=1e-6, atol=1e-7)
    assert position(made.module) == (2, CONSOLIDATED)


def test_averaging_over_one_epoch_raises() -> None:
    with pytest.raises(ValueError, match=r"StochasticWeightAveraging .* set epochs_per_task >= 2, got 1"):
        learner(StochasticWeightAveraging(0.05))


def test_gradients_accumulate_by_the_schedule_of_each_task() -> None:
    steps: list[int] = []
    made = learner(
        GradientAccumulationScheduler({0: 1, 1: 3}),
        At(lambda trainer, hook: steps.append(trainer.global_step), "on_train_end"),
        epochs=2,
    )
    for task in digits().tasks:
        made.fit_task(task, SILENT)
    assert steps == [STEPS + math.ceil(STEPS / 3)] * TASKS
    assert made.step == TASKS * 2 * STEPS  # batches


class Ticking(Timer):
    """A timer whose clock moves a second at every look at it."""

    seconds = 0

    def time_elapsed(self, stage: Any = "train") -> float:
        self.seconds += 1
        return self.seconds


def test_a_timer_starts_again_for_each_task(tmp_path: Path) -> None:
    made = learner(Ticking("00:00:00:05"), epochs=2)  # looks once before the first step
    run(made, digits(), run_dir=tmp_path, evaluate_every=2, progress=False)
    assert made.step == 4 * TASKS
    assert position(made.module) == (2, CONSOLIDATED)
    assert load_result(tmp_path).summary["status"] == "finished"


def test_a_tuners_search_is_no_part_of_the_task() -> None:
    def reports(*callbacks: Callback) -> list[Progress]:
        actual: list[Progress] = []
        made = learner(*callbacks)
        for task in digits().tasks[:2]:
            made.fit_task(task, FitMonitor(actual.append, lambda: None))
        return actual

    finder = LearningRateFinder(num_training_steps=6, update_attr=False)
    assert reports(finder) == reports()


# -- what is shown


def test_the_summary_is_printed_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    made = learner(ModelSummary())
    for task in digits().tasks:
        made.fit_task(task, SILENT)
    assert caplog.text.count("Non-trainable params") == 1


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_a_progress_bar_is_shown_and_said_to_be(bar: Any, capsys: pytest.CaptureFixture[str]) -> None:
    made = learner(bar(), epochs=2)
    assert made.shows_progress
    for task in digits().tasks[:2]:
        made.fit_task(task, SILENT)
    captured = capsys.readouterr()
    shown = captured.out + captured.err
    assert "Epoch 1" in shown
    assert "train/loss" in shown
    assert f"{STEPS}/{STEPS}" in shown


def test_who_shows_progress() -> None:
    assert not learner().shows_progress
    assert not learner(Notes(), EarlyStopping("val/loss")).shows_progress
    assert learner(trainer={"enable_progress_bar": True}).shows_progress


# -- a user's own


class Both(Callback, StreamCallback):
    """Both kinds in one object."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_stream_start(self, learner: Any, benchmark: Any) -> None:
        self.calls.append("stream")

    def on_task_start(self, learner: Any, task: Any) -> None:
        self.calls.append(f"task {task.index}")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.calls.append(f"train {int(pl_module.task_index)}")

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.calls.append("trained")

    def on_task_end(self, learner: Any, task: Any, matrix: FloatArray) -> None:
        self.calls.append(f"accuracy {np.isfinite(matrix).sum()}")

    def on_stream_end(self, learner: Any, matrix: FloatArray) -> None:
        self.calls.append("end")


def test_one_callback_of_both_kinds_is_one_object(tmp_path: Path) -> None:
    both = Both()
    made = learner(both)
    run(made, digits(), run_dir=tmp_path, progress=False, callbacks=[both])
    tasks = [[f"task {i}", f"train {i}", "trained", f"accuracy {n}"] for i, n in enumerate((1, 3, 6))]
    assert both.calls == ["stream", *(call for calls in tasks for call in calls), "end"]


def test_own_callbacks_keep_what_they_gather(tmp_path: Path) -> None:
    notes, ended = Notes(), []
    with open(tmp_path / "own", "w") as file:
        notes.file = file  # type: ignore[attr-defined]  # cannot be copied, and need not be
        made = learner(notes, LambdaCallback(on_train_end=lambda *_: ended.append(1)))
        for task in digits().tasks:
            made.fit_task(task, SILENT)
    assert notes.tasks == [0, 1, 2]
    assert ended == [1, 1, 1]


def test_what_cannot_be_copied_raises(tmp_path: Path) -> None:
    stopping = EarlyStopping("val/loss")
    with open(tmp_path / "own", "w") as file:
        stopping.file = file  # type: ignore[attr-defined]
        with pytest.raises(
            ValueError, match=r"EarlyStopping must be copyable.*TypeError.*open files .* setup"
        ):
            learner(stopping)


@pytest.mark.parametrize(
    ("callback", "match"),
    [
        (BatchSizeFinder(), "BatchSizeFinder changes the batch size.*set training.batch_size"),
        (
            OnExceptionCheckpoint("here"),
            r"OnExceptionCheckpoint would let .* use sequel_core.run.resume=True.",
        ),
        (EMAWeightAveraging(), "EMAWeightAveraging replaces buffers.*use StochasticWeightAveraging"),
        (ModelPruning("l1_unstructured"), "ModelPruning replaces the network.s parameters.*after the last"),
        (
            StreamCallback(),
            "must be objects of subclasses of pytorch_lightning.Callback, got a .*StreamCallback",
        ),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_damages_a_method_raises(callback: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        learner(callback)


@pytest.mark.parametrize(
    ("callback", "match"),
    [
        (EMAWeightAveraging(update_starting_at_step=100), "EMAWeightAveraging replaces buffers"),
        (ModelPruning("l1_unstructured"), "ModelPruning replaces the network's parameters"),
    ],
    ids=["averaging", "pruning"],
)
def test_what_damages_a_method_raises_under_any_trainer(callback: Callback, match: str) -> None:
    """The buffers of the average say that no task has begun; pruned weights had no importances."""
    benchmark = stream()
    model = module(benchmark)
    with pytest.raises(ValueError, match=match):
        learn(model, benchmark, 0, callbacks=[callback])
    assert position(model) == (-1, IDLE)


# -- errors


def fail(trainer: Trainer, hook: str) -> None:
    raise OSError("of the user's")


def interrupt(trainer: Trainer, hook: str) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("act", "error"), [(fail, OSError), (interrupt, KeyboardInterrupt)])
@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_batch_end", "on_validation_end", "on_train_end"])
def test_an_error_in_a_callback_leaves_the_task_to_be_resumed(hook: str, act: Any, error: Any) -> None:
    made = learner(At(act, hook, step=3 if "batch" in hook else None), hparams=EWCHParams())
    calls = counted(made.module)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(error):
        made.fit_task(digits().tasks[0], SILENT)
    assert signal.getsignal(signal.SIGINT) is handler
    started = hook != "on_fit_start"
    assert position(made.module) == ((0, TRAINING) if started else (-1, 0))
    assert calls == []
    made.callbacks = ()
    made.fit_task(digits().tasks[0], SILENT)
    made.fit_task(digits().tasks[1], SILENT)
    assert calls == [0, 1]
    assert position(made.module) == (1, CONSOLIDATED)


@pytest.mark.parametrize(("act", "status"), [(fail, "failed"), (interrupt, "interrupted")])
def test_the_run_tells_how_it_ended(act: Any, status: str, tmp_path: Path) -> None:
    made = learner(At(act, "on_train_batch_end", step=3))
    with pytest.raises((OSError, KeyboardInterrupt)):
        run(made, digits(), run_dir=tmp_path, progress=False)
    assert load_result(tmp_path).summary["status"] == status
