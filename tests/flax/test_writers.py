"""Metric writers: clu's interface, TensorBoard without TensorFlow or torch, contents of files, full disks."""

import ast
import inspect
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer.record_writer import RecordWriter

from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.runs.loggers import LoggerWarning
from sequel_core.runs.process import event_errors_left_to_the_caller
from sequel_flax import FlaxLearner
from sequel_flax.writers import (
    WRITERS,
    CsvWriter,
    JsonLinesWriter,
    SilentWriter,
    TensorBoardWriter,
    WandbWriter,
    close_writer,
)
from tests.disks import fill, small_disk
from tests.flax.parts import learner


def test_writers_have_all_methods_and_parameters_of_clus_interface() -> None:
    clu = find_spec("clu")
    assert clu is not None
    assert clu.submodule_search_locations is not None
    path = Path(clu.submodule_search_locations[0]) / "metric_writers" / "interface.py"
    (interface,) = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef))
    methods = [node for node in interface.body if isinstance(node, ast.FunctionDef)]
    assert len(methods) == 10
    for method in methods:
        expected = [a.arg for a in (*method.args.args, *method.args.kwonlyargs)]
        for writer in (SilentWriter, CsvWriter, JsonLinesWriter, TensorBoardWriter, WandbWriter):
            assert list(inspect.signature(getattr(writer, method.name)).parameters) == expected, method.name


def test_unsupported_data_is_ignored(tmp_path: Path) -> None:
    writer = CsvWriter(tmp_path / "csv")
    writer.write_images(1, {"a": np.zeros((1, 2, 2, 3), np.uint8)})
    writer.write_texts(1, {"a": "b"})
    writer.write_histograms(1, {"a": np.zeros(3)}, {"a": 2})
    writer.write_audios(1, {"a": np.zeros((1, 5, 1))}, sample_rate=5)
    writer.write_videos(1, {"a": np.zeros((1, 2, 2, 2, 1))})
    writer.write_summaries(1, {"a": np.zeros(3)})
    writer.flush()
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_loads_neither_torch_nor_tensorflow_nor_nnx(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
import numpy as np
from sequel_flax.writers import WRITERS
writer = WRITERS["tensorboard"](Path(sys.argv[1]), {})
writer.write_hparams({"a": {"b": 1}})
writer.write_scalars(1, {"a": 1.0})
writer.write_images(1, {"b": np.zeros((1, 2, 2, 3), np.uint8)})
writer.write_texts(1, {"c": "d"})
writer.write_histograms(1, {"e": np.arange(9)})
writer.close()
print([name for name in ("torch", "tensorflow", "tensorboardX", "flax.nnx") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def read(path: Path) -> EventAccumulator:
    events = EventAccumulator(str(path), dict.fromkeys(("scalars", "images", "tensors"), 0))
    events.Reload()
    return events


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
    grey = rng.random((5, 3, 1))
    writer = TensorBoardWriter(tmp_path / "made")
    assert not (tmp_path / "made").exists()
    writer.write_scalars(3, {"a": jnp.float32(0.5), "b": np.int64(7)})
    writer.write_scalars(5, {"a": 0.1})
    writer.write_images(5, {"several": images, "one": images[:1], "grey": grey})
    writer.write_texts(5, {"text": "**b**"})
    writer.write_histograms(5, {"h": np.arange(10.0)}, {"h": 5})
    writer.close()
    writer.close()
    events = read(tmp_path / "made")
    assert [(e.step, e.value) for e in events.Scalars("a")] == [(3, 0.5), (5, np.float32(0.1))]
    assert [(e.step, e.value) for e in events.Scalars("b")] == [(3, 7)]
    read_images = {
        tag: np.asarray(Image.open(io.BytesIO(events.Images(tag)[0].encoded_image_string)))
        for tag in events.Tags()["images"]
    }
    assert read_images.keys() == {"several/0", "several/1", "one", "grey"}
    for tag, expected in (("several/0", images[0]), ("several/1", images[1]), ("one", images[0])):
        np.testing.assert_array_equal(read_images[tag], expected)
    np.testing.assert_array_equal(read_images["grey"], np.rint(255 * grey[..., 0]).astype(np.uint8))
    (text,) = events.Tensors("text/text_summary")
    assert (text.step, list(text.tensor_proto.string_val)) == (5, [b"**b**"])
    (histogram,) = events.Tensors("h")
    counts = np.frombuffer(histogram.tensor_proto.tensor_content, np.float64).reshape(5, 3)
    np.testing.assert_allclose(counts[:, 2], 2)
    np.testing.assert_allclose(counts[:, 0], [0, 1.8, 3.6, 5.4, 7.2])


def test_tensorboard_resumes_after_an_interruption(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path)
    writer.write_hparams({"a": 1})
    for step in (1, 2, 3, 4):
        writer.write_scalars(step, {"a": step})
    close_writer(writer, failed=True)
    (first,) = tmp_path.iterdir()
    first.rename(tmp_path / "events.out.tfevents.0000000001")  # files of one second have no fixed order
    again = TensorBoardWriter(str(tmp_path))
    again.resume(2)
    for step in (3, 4, 5):
        again.write_scalars(step, {"a": 10 * step})
    close_writer(again, failed=False)
    events = read(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("a")] == [(1, 1), (2, 2), (3, 30), (4, 40), (5, 50)]


def test_contents_of_csv_and_json_lines(tmp_path: Path) -> None:
    for name in ("csv", "jsonl"):
        writer: Any = WRITERS[name](tmp_path, {})
        writer.write_hparams({"algo": {"name": "ewc"}, "n": None})
        writer.write_scalars(1, {"a": jnp.float32(0.5), "b": np.array(2)})
        writer.write_texts(2, {"t": "x"})
        close_writer(writer, failed=True)
    assert (tmp_path / "csv" / "metrics.csv").read_bytes() == b"a,b,step\r\n0.5,2,1\r\n"
    assert yaml.safe_load((tmp_path / "csv" / "hparams.yaml").read_text()) == {
        "algo": {"name": "ewc"},
        "n": None,
    }
    assert [json.loads(line) for line in (tmp_path / "jsonl" / "metrics.jsonl").read_text().splitlines()] == [
        {"hparams": {"algo": {"name": "ewc"}, "n": None}},
        {"step": 1, "a": 0.5, "b": 2},
        {"step": 2, "t": "x"},
    ]


IMAGE = np.zeros((4, 4, 3), np.uint8)


def log_everything(writer: Any, failed: bool = False) -> FlaxLearner:
    """Call every method of a writer that a run calls; return the learner that has the writer."""
    model = learner(NaiveHParams(), writers=[writer])
    model.start_stream({"algo": {"name": "naive"}})
    for _ in range(100):
        model.log({"train/loss": 0.5})
        model.log_image("picture", IMAGE)
        model.log_table("table", ["a"], [[1.0]])
    model.end_stream()
    model.close(failed)
    return model


@pytest.mark.parametrize(("failed", "status"), [(False, 1), (True, 2)])  # STATUS_SUCCESS, STATUS_FAILURE
def test_the_status_of_a_run_is_written(failed: bool, status: int, tmp_path: Path) -> None:
    log_everything(TensorBoardWriter(tmp_path), failed)
    content = read(tmp_path).PluginTagToContent("hparams")["_hparams_/session_end_info"]
    assert HParamsPluginData.FromString(content).session_end_info.status == status


def test_a_restarted_run_replaces_its_logs(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        for name in ("csv", "jsonl", "tensorboard"):
            writer = WRITERS[name](tmp_path, {})
            for step in range(1, 3 - int(value) // 2):
                writer.write_scalars(step, {"a": value})
            writer.close()
    assert (tmp_path / "csv" / "metrics.csv").read_text() == "a,step\n2.0,1\n"
    assert (tmp_path / "jsonl" / "metrics.jsonl").read_text() == '{"step": 1, "a": 2.0}\n'
    assert [(e.step, e.value) for e in read(tmp_path / "tensorboard").Scalars("a")] == [(1, 2.0)]


@pytest.mark.parametrize("failed", [False, True])
def test_a_wandb_run_finishes_with_its_exit_code(failed: bool, tmp_path: Path) -> None:
    exit_codes = []

    class FakeRun:
        def finish(self, exit_code: int) -> None:
            exit_codes.append(exit_code)

    writer = WandbWriter(tmp_path, {})
    writer._run = FakeRun()
    close_writer(writer, failed)
    assert exit_codes == [int(failed)]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as path:
        yield path


@pytest.fixture
def _thread_errors_as_in_a_run() -> Iterator[None]:
    with event_errors_left_to_the_caller():
        yield


@pytest.mark.usefixtures("_thread_errors_as_in_a_run")
@pytest.mark.parametrize("name", ["csv", "jsonl", "tensorboard"])
def test_a_full_disk_gives_one_warning_and_the_run_continues(
    name: str, disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    writer = WRITERS[name](disk, {})
    writer.write_scalars(0, {"a": 0.0})
    writer.flush()
    fill(disk)
    with pytest.warns(LoggerWarning, match="No space left on device.*; the run continues") as caught:
        model = log_everything(writer)
    assert len(caught) == 1
    assert not model.logs
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("_thread_errors_as_in_a_run")
@pytest.mark.parametrize("successes", [0, 1, 3, 150, 304])
def test_an_error_in_the_thread_of_tensorboard_gives_one_warning(
    successes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    calls, original = [], RecordWriter.write

    def write(self: Any, data: bytes) -> None:
        calls.append(1)
        if len(calls) > successes:
            raise OSError(28, "No space left on device")
        original(self, data)

    monkeypatch.setattr(RecordWriter, "write", write)
    with pytest.warns(LoggerWarning, match="TensorBoardWriter failed .*No space left") as caught:
        log_everything(TensorBoardWriter(tmp_path))
    assert len(caught) == 1
    assert capfd.readouterr().err == ""


def test_a_file_that_cannot_be_written_gives_one_warning(tmp_path: Path) -> None:
    writer = CsvWriter(tmp_path)
    writer.write_scalars(0, {"train/loss": 0.0})
    (tmp_path / "metrics.csv").unlink()
    (tmp_path / "metrics.csv").symlink_to("/dev/full")
    with pytest.warns(LoggerWarning, match="CsvWriter failed .*No space left") as caught:
        log_everything(writer)
    assert len(caught) == 1


@pytest.mark.parametrize(
    "method", ["write_scalars", "write_images", "write_texts", "write_hparams", "flush", "close"]
)
def test_an_error_in_any_method_gives_one_warning(method: str) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"{method} is broken")

    broken: Callable[[], Any] = type("Broken", (SilentWriter,), {method: fail})
    with pytest.warns(LoggerWarning, match=f"Broken failed .{method} is broken") as caught:
        log_everything(broken())
    assert len(caught) == 1
