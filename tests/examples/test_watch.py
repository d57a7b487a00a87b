"""The examples of docs/guides/logging.md, and the event files that they write."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.events import scalars
from tests.pages import ROOT, code_blocks, run_block

PAGE = ROOT / "docs" / "guides" / "logging.md"
TRAINER, LOOP, CALLBACK = code_blocks(PAGE, "python")


def test_user_defined_trainer_callbacks_and_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on speed
        names = run_block(PAGE, TRAINER)
    assert int(names["module"].task_index) == 2
    logged = scalars(Path(names["logger"].log_dir))
    assert {"train/loss", "train/accuracy", "val/accuracy", "test/accuracy", "lr-SGD"} <= logged.keys()
    for tag in ("epoch", "hp_metric"):  # logged with every value, and at each start
        logged.pop(tag)
    for tag, points in logged.items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), tag
    assert logged["train/loss"][-1][0] == names["module"].running_metrics.steps_done
    assert logged["test/accuracy"][-1][1] == pytest.approx(
        float(names["trainer"].callback_metrics["test/accuracy"]), abs=1e-6
    )


def test_user_defined_loop_writer_and_stream_callback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_block(PAGE, LOOP)
    steps = 3 * (len(names["benchmark"].tasks[0].train) // 10)
    assert int(names["ts"].step) == steps
    points = scalars(tmp_path / "logs")["train/loss"]
    assert [step for step, _ in points] == list(range(50, steps + 1, 50))
    assert all(0 < loss < 3 for _, loss in points)  # a network that guesses has log(10)
    events = EventAccumulator(str(tmp_path / "logs"), size_guidance={"images": 0})
    events.Reload()
    (tag,) = events.Tags()["images"]
    assert [event.step for event in events.Images(tag)] == list(range(200, steps + 1, 200))
    capsys.readouterr()
    matrix = run_block(PAGE, CALLBACK, names)["result"].matrix
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"after task {i}: {matrix[i, : i + 1]}" for i in range(3)]
