"""clu's writers, which need TensorFlow, and ours in clu's containers; `make clu` installs them."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.util.tensor_util import make_ndarray

from sequel_benchmarks import RotatedDigits
from sequel_core import run
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.backbones import MLPHParams
from sequel_core.hparams import OptimizerHParams, TrainingHParams
from sequel_core.runs.loggers import LoggerWarning
from sequel_core.runs.results import Result
from sequel_flax import MLP, make_learner
from sequel_flax.optimizers import build_optimizer
from sequel_flax.writers import CsvWriter, JsonLinesWriter, SilentWriter, TensorBoardWriter

pytestmark = pytest.mark.slow

TASKS, STEPS, EVERY = 3, 20, 6
REPORTED = [s for t in range(0, TASKS * STEPS, STEPS) for s in (t + 6, t + 12, t + 18, t + 20)]


@pytest.fixture(scope="module")
def clu() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TensorFlow, at import
        pytest.importorskip("tensorflow")
        writers: ModuleType = pytest.importorskip("clu.metric_writers")
    return writers


def ran(path: Path, *writers: Any) -> Result:
    """Run three short tasks of digits with the given writers."""
    benchmark = RotatedDigits(num_tasks=TASKS, subset=5 * STEPS)
    learner = make_learner(
        NaiveHParams(),
        MLP(**MLPHParams(widths=(8,)).arguments(), num_classes=10),
        build_optimizer(OptimizerHParams(lr=0.05)),
        benchmark,
        TrainingHParams(batch_size=5, log_every_n_steps=EVERY),
        loggers=writers,
    )
    return run(learner, benchmark, run_dir=path / "run", progress=False)


def read(path: Path) -> EventAccumulator:
    events = EventAccumulator(str(path), {"tensors": 0, "scalars": 0, "images": 0})
    events.Reload()
    return events


def check(events: EventAccumulator, result: Result) -> None:
    """Compare the numbers and images that TensorFlow wrote, all as tensors, with the result."""
    series = {
        tag: [(e.step, make_ndarray(e.tensor_proto)) for e in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }
    assert [step for step, _ in series["train/loss"]] == REPORTED
    for j in range(TASKS):
        points = series[f"test/accuracy/task_{j}"]
        assert [step for step, _ in points] == [STEPS * k for k in range(j + 1, TASKS + 1)]
        assert points[-1][1] == np.float32(result.matrix[-1, j])
    assert series["test/average_accuracy"][-1][1] == np.float32(result.average_accuracy)
    assert series["test/forgetting"][-1][1] == np.float32(result.forgetting)
    (_, picture), *_ = series["samples/task_0"]
    assert [int(side) for side in picture[:2]] == [44, 44]
    assert series["test/accuracy_matrix_table"][-1][1].item().startswith(b"| after_task | task_0")
    start = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    settings = HParamsPluginData.FromString(start).session_start_info.hparams
    assert settings["training.batch_size"].number_value == 5
    assert settings["algo.name"].string_value == "naive"


def test_clus_summary_writer(clu: Any, tmp_path: Path) -> None:
    result = ran(tmp_path, clu.SummaryWriter(str(tmp_path / "clu")))
    check(read(tmp_path / "clu"), result)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_clus_default_writer(clu: Any, asynchronous: bool, tmp_path: Path) -> None:
    result = ran(tmp_path, clu.create_default_writer(tmp_path / "clu", asynchronous=asynchronous))
    check(read(tmp_path / "clu"), result)


@pytest.mark.parametrize("container", ["MultiWriter", "AsyncMultiWriter"])
def test_our_writers_work_in_clus_containers(clu: Any, container: str, tmp_path: Path) -> None:
    def ours(name: str) -> list[Any]:
        writers = (CsvWriter, JsonLinesWriter, TensorBoardWriter)
        return [writer(tmp_path / name / writer.__name__) for writer in writers]

    result = ran(tmp_path, getattr(clu, container)(ours("within")), *ours("alone"))
    for name in ("within", "alone"):
        with (tmp_path / name / "CsvWriter" / "metrics.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["train/loss"]]
        assert [int(row["step"]) for row in rows] == REPORTED
        events = read(tmp_path / name / "TensorBoardWriter")
        assert [event.step for event in events.Scalars("train/loss")] == REPORTED
        assert events.Scalars("test/average_accuracy")[-1].value == np.float32(result.average_accuracy)
        assert events.Images("samples/task_0")[0].height == 44
    files = [tmp_path / name / "JsonLinesWriter" / "metrics.jsonl" for name in ("within", "alone")]
    within, alone = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    named = [{key: value for key, value in line.items() if "table" not in key} for line in alone]
    assert [line for line in within if "test/accuracy_matrix_table" not in line] == [
        line for line in named if line.keys() != {"step"}
    ]


def test_clus_helper_writes_typed_values_with_ours(clu: Any, tmp_path: Path) -> None:
    from clu import values

    writer = TensorBoardWriter(tmp_path)
    picture = np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3)
    typed = {
        "plain": 0.5,
        "scalar": values.Scalar(np.float32(1.5)),
        "picture": values.Image(picture),
        "text": values.Text("hello"),
        "histogram": values.Histogram(np.arange(10.0), num_buckets=5),
        "audio": values.Audio(np.zeros((1, 4, 1)), sample_rate=8),
    }
    clu.write_values(writer, 7, typed)
    writer.close()
    events = read(tmp_path)
    for tag, value in (("plain", 0.5), ("scalar", 1.5)):
        assert [(event.step, event.value) for event in events.Scalars(tag)] == [(7, value)]
    assert (events.Images("picture")[0].step, events.Images("picture")[0].width) == (7, 4)
    assert events.Tensors("text/text_summary")[0].tensor_proto.string_val[0] == b"hello"
    assert make_ndarray(events.Tensors("histogram")[0].tensor_proto).shape == (5, 3)


def test_an_error_in_clus_threads_is_reported_once(clu: Any, tmp_path: Path) -> None:
    class Full(SilentWriter):
        def write_scalars(self, step: int, scalars: Any) -> None:
            raise OSError(28, "No space left on device")

    with pytest.warns(LoggerWarning, match=r"AsyncMultiWriter failed .*No space left") as caught:
        result = ran(tmp_path, clu.AsyncMultiWriter([Full()]))
    assert len([one for one in caught if one.category is LoggerWarning]) == 1
    assert result.summary["status"] == "finished"
