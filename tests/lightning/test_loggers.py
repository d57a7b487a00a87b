"""Lightning's loggers across the Trainers of a run: steps, names, failures, status, resumption."""

import copy
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, LearningRateMonitor
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer.record_writer import RecordWriter

from sequel_core import run
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.hparams import TrainingHParams
from sequel_core.runs.loggers import LoggerWarning
from sequel_core.runs.process import event_errors_left_to_the_caller
from sequel_core.runs.results import Result
from sequel_lightning import LightningLearner
from sequel_lightning.loggers import LOGGERS, ConsoleLogger, GuardedLogger, JsonLinesLogger, resume_logger
from tests.disks import fill, small_disk
from tests.events import scalars
from tests.lightning.parts import BATCH, STEPS, module, stream


class Scores(Callback):
    """Logs through the Trainer, as a user's callback does."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        pl_module.log("own/score", 1.0, on_step=True, on_epoch=False)


def learner(*loggers: Logger, callbacks: Any = ()) -> LightningLearner:
    training = TrainingHParams(batch_size=BATCH, log_every_n_steps=2)
    return LightningLearner(
        module(stream(), NaiveHParams()),
        training,
        trainer={"accelerator": "cpu"},
        callbacks=callbacks,
        loggers=loggers,
    )


def ran(path: Path, *loggers: Logger, callbacks: Any = ()) -> Result:
    return run(learner(*loggers, callbacks=callbacks), stream(), run_dir=path, progress=False)


def read(path: Path) -> EventAccumulator:
    events = EventAccumulator(str(path), {"scalars": 0})
    events.Reload()
    return events


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_what_callbacks_log_continues_across_tasks_and_epochs_are_left_out(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, "own")  # whose default_hp_metric is True
    ran(tmp_path / "run", logger, callbacks=[Scores(), LearningRateMonitor("step")])
    actual = scalars(Path(logger.log_dir))
    tags = set(actual)
    assert {"own/score", "lr-SGD", "train/loss", "test/average_accuracy"} <= tags
    assert not tags & {"epoch", "hp_metric"}
    for tag in tags:
        steps = [step for step, _ in actual[tag]]
        assert steps == sorted(set(steps)), tag
        assert steps[-1] <= 3 * STEPS
    assert actual["lr-SGD"][-1][0] > 2 * STEPS


class Recorder(ConsoleLogger):
    """Keeps the names of the methods that are called; one may fail from its nth call on."""

    def __init__(self, failing: str = "", at: int = 1) -> None:
        super().__init__()
        self.failing, self.left, self.calls = failing, at, [""]
        self.status = ""

    def note(self, name: str) -> None:
        self.calls.append(name)
        if name == self.failing:
            self.left -= 1
            if self.left <= 0:
                raise OSError(28, "No space left on device")

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        self.note("log_metrics")

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.note("log_hyperparams")

    def save(self) -> None:
        self.note("save")

    def finalize(self, status: str) -> None:
        self.status = status
        self.note("finalize")


@pytest.mark.parametrize(
    ("failing", "at"),
    [("log_metrics", 1), ("log_metrics", 5), ("log_hyperparams", 1), ("save", 1), ("finalize", 1)],
)
def test_the_first_error_wherever_it_comes_ends_a_loggers_part(failing: str, at: int, tmp_path: Path) -> None:
    bad, good = Recorder(failing, at), Recorder()
    callbacks = [Scores(), LearningRateMonitor("step")]
    with pytest.warns(LoggerWarning, match="Recorder failed .*No space left") as caught:
        watched = ran(tmp_path / "watched", bad, good, callbacks=callbacks)
    assert len([one for one in caught if one.category is LoggerWarning]) == 1
    assert bad.calls[-1] == failing
    assert bad.calls.count(failing) == at
    assert (good.calls[-1], good.status) == ("finalize", "success")
    assert watched.summary["status"] == "finished"
    unwatched = ran(tmp_path / "unwatched")
    np.testing.assert_array_equal(watched.matrix, unwatched.matrix)


def test_a_run_that_fails_closes_its_loggers_as_failed_and_gives_them_back(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
            raise RuntimeError("stopped")

    recorder, events = Recorder(), TensorBoardLogger(tmp_path, "own", "")
    with pytest.raises(RuntimeError, match="stopped"):
        ran(tmp_path / "run", recorder, events, callbacks=[Stop()])
    assert recorder.status == "failed"
    content = read(tmp_path / "own").PluginTagToContent("hparams")["_hparams_/session_end_info"]
    assert HParamsPluginData.FromString(content).session_end_info.status == 2  # STATUS_FAILURE
    assert "log_metrics" not in vars(recorder)
    recorder.failing, recorder.left = "log_metrics", 1
    with pytest.raises(OSError, match="No space left"):
        recorder.log_metrics({})


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as path:
        yield path


def run_with(logger: Logger) -> None:
    """Run a learner with one logger."""
    model = learner(logger)
    with event_errors_left_to_the_caller():
        model.start_stream({"algo": {"name": "naive"}})
        for _ in range(100):
            model.log({"train/loss": 0.5})
            model.log_image("picture", np.zeros((4, 4, 3), np.uint8))
            model.log_table("table", ["a"], [[1.0]])
        model.end_stream()
        model.close()


@pytest.fixture
def _thread_errors_as_in_a_run() -> Iterator[None]:
    with event_errors_left_to_the_caller():
        yield


@pytest.mark.usefixtures("_thread_errors_as_in_a_run")
@pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists")
@pytest.mark.parametrize("name", ["csv", "jsonl", "tensorboard"])
def test_a_full_disk_under_a_logger_is_reported_once(
    name: str, disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logger = LOGGERS[name](disk, {})
    logger.log_metrics({"a": 0.0}, 0)
    logger.save()
    fill(disk)
    with pytest.warns(LoggerWarning, match="No space left on device.*; the run continues") as caught:
        run_with(logger)
    assert len(caught) == 1
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("_thread_errors_as_in_a_run")
@pytest.mark.parametrize("good", [0, 3, 305])
def test_an_error_in_the_thread_of_tensorboard_is_reported_once(
    good: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    calls, original = [], RecordWriter.write

    def write(self: Any, data: bytes) -> None:
        calls.append(1)
        if len(calls) > good:
            raise OSError(28, "No space left on device")
        original(self, data)

    monkeypatch.setattr(RecordWriter, "write", write)
    with pytest.warns(LoggerWarning, match="TensorBoardLogger failed .*No space left") as caught:
        run_with(LOGGERS["tensorboard"](tmp_path, {}))
    assert len(caught) == 1
    assert capfd.readouterr().err == ""


def test_local_loggers_write_nothing_before_the_run(tmp_path: Path) -> None:
    for name in ("console", "csv", "jsonl", "tensorboard"):
        LOGGERS[name](tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def test_loggers_continue_after_an_interruption(tmp_path: Path) -> None:
    def started() -> list[Logger]:
        return [LOGGERS[name](tmp_path, {}) for name in ("csv", "jsonl", "tensorboard")]

    for logger in started():
        for step in (1, 2, 3, 4):
            logger.log_metrics({"a": float(step)}, step)
        logger.save()
        logger.finalize("failed")
    for logger in started():
        resume_logger(logger, 2)
        for step in (3, 4):
            logger.log_metrics({"a": 10.0 * step, **({"b": 1.0} if step == 4 else {})}, step)
        logger.save()
        logger.finalize("success")
    expected = [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]
    with (tmp_path / "csv" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["step"]), float(row["a"])) for row in rows] == expected
    assert [row["b"] for row in rows] == ["", "", "", "1.0"]
    events = read(tmp_path / "tensorboard")
    assert [(event.step, event.value) for event in events.Scalars("a")] == expected
    lines = (tmp_path / "jsonl" / "metrics.jsonl").read_text().splitlines()
    assert lines == [
        f'{{"step": {s}, "a": {v}{extra}}}'
        for (s, v), extra in zip(expected, ["", "", "", ', "b": 1.0'], strict=True)
    ]


@pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists")
def test_a_run_that_begins_again_replaces_what_was_logged(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        for name in ("csv", "jsonl", "tensorboard"):
            logger = LOGGERS[name](tmp_path, {})
            for step in range(1, 3 - int(value) // 2):
                logger.log_metrics({"a": value}, step)
            logger.finalize("success")
    assert (tmp_path / "csv" / "metrics.csv").read_text() == "a,step\n2.0,1\n"
    assert (tmp_path / "jsonl" / "metrics.jsonl").read_text() == '{"step": 1, "a": 2.0}\n'
    assert [(e.step, e.value) for e in read(tmp_path / "tensorboard").Scalars("a")] == [(1, 2.0)]


class FakeRun:
    """Stands for a run of W&B."""

    exit_code: int | None = None

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.mark.parametrize("failed", [False, True])
def test_a_run_of_wandb_ends_with_its_exit_code(failed: bool) -> None:
    fake: Any = FakeRun()
    learner(WandbLogger(experiment=fake)).close(failed)
    assert fake.exit_code == int(failed)


def test_our_own_loggers_have_names_for_lightnings_paths(tmp_path: Path) -> None:
    lines = JsonLinesLogger(tmp_path / "jsonl")
    assert (lines.name, lines.version, lines.save_dir) == ("jsonl", "", str(tmp_path))
    assert (ConsoleLogger().name, ConsoleLogger().version, ConsoleLogger().save_dir) == ("console", "", None)
    assert isinstance(LOGGERS["csv"](tmp_path, {}), CSVLogger)


def test_callbacks_can_copy_and_change_the_logger_of_a_trainer(tmp_path: Path) -> None:
    csv_logger = CSVLogger(tmp_path, "mine")
    names: list[Any] = []

    class Copies(Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            assert isinstance(trainer.logger, CSVLogger)
            trainer.logger.LOGGER_JOIN_CHAR = "/"
            copies = copy.copy(trainer.logger), copy.deepcopy(trainer.logger)
            names.extend((type(made), made.name) for made in copies)

    run(learner(csv_logger, callbacks=[Copies()]), stream(1), run_dir=tmp_path / "run", progress=False)
    assert csv_logger.LOGGER_JOIN_CHAR == "/"
    assert names == [(GuardedLogger, "mine")] * 2
