"""The examples of docs/logging.md: what they write, read back with TensorBoard's own reader."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.events import scalars
from tests.pages import ROOT, code_blocks, run_block

PAGE = ROOT / "docs" / "logging.md"
TRAINER, LOOP, CALLBACK = code_blocks(PAGE, "python")


def test_own_trainer_callbacks_and_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on speed
        actual = run_block(PAGE, TRAINER)
    assert int(actual["module"].task_index) == 2
    logged = scalars(Path(actual["logger"].log_dir))
    assert {"train/loss", "train/accuracy", "val/accuracy", "test/accuracy", "lr-SGD"} <= logged.keys()
    for tag in ("epoch", "hp_metric"):  # Lightning writes one beside all else, the other at each start
        logged.pop(tag)
    for tag, points in logged.items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), tag
    assert logged["train/loss"][-1][0] == actual["module"].running_metrics.steps_done
    assert logged["test/accuracy"][-1][1] == pytest.approx(
        float(actual["trainer"].callback_metrics["test/accuracy"]), abs=1e-6
    )


def test_own_loop_and_writer_then_a_stream_callback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    actual = run_block(PAGE, LOOP)
    steps = 3 * (len(actual["benchmark"].tasks[0].train) // 10)
    assert int(actual["ts"].step) == steps
    points = scalars(tmp_path / "logs")["train/loss"]
    assert [step for step, _ in points] == list(range(50, steps + 1, 50))
    assert all(0 < loss < 3 for _, loss in points)  # below that of chance, log(10), once trained
    events = EventAccumulator(str(tmp_path / "logs"), size_guidance={"images": 0})
    events.Reload()
    (tag,) = events.Tags()["images"]
    assert [event.step for event in events.Images(tag)] == list(range(200, steps + 1, 200))
    capsys.readouterr()
    matrix = run_block(PAGE, CALLBACK, actual)["result"].matrix
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"after task {i}: {matrix[i, : i + 1]}" for i in range(3)]
