"""The README's examples of watching a run: what they write, read back with TensorBoard's own reader."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.events import scalars

HERE, README = Path(__file__).parent, Path(__file__).parents[2] / "README.md"


@pytest.mark.parametrize("name", ["watch_lightning", "watch_flax"])
def test_the_readme_shows_them_as_they_are(name: str) -> None:
    assert f"```python\n{(HERE / f'{name}.py').read_text()}```" in README.read_text()


def test_own_trainer_callbacks_and_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on speed
        found = runpy.run_path(str(HERE / "watch_lightning.py"))
    assert int(found["module"].task_index) == 2
    logged = scalars(Path(found["logger"].log_dir))
    assert {"train/loss", "train/accuracy", "val/accuracy", "test/accuracy", "lr-SGD"} <= logged.keys()
    for tag in ("epoch", "hp_metric"):  # Lightning writes one beside all else, the other at each start
        logged.pop(tag)
    for tag, points in logged.items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), tag
    assert logged["train/loss"][-1][0] == found["module"].running_metrics.steps_done
    assert logged["test/accuracy"][-1][1] == pytest.approx(
        float(found["trainer"].callback_metrics["test/accuracy"]), abs=1e-6
    )


def test_own_loop_and_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(HERE / "watch_flax.py"))
    steps = 3 * (len(found["benchmark"].tasks[0].train) // 10)
    assert int(found["ts"].step) == steps
    points = scalars(tmp_path / "logs")["train/loss"]
    assert [step for step, _ in points] == list(range(50, steps + 1, 50))
    assert all(0 < loss < 3 for _, loss in points)  # below that of chance, log(10), once trained
    events = EventAccumulator(str(tmp_path / "logs"), size_guidance={"images": 0})
    events.Reload()
    (tag,) = events.Tags()["images"]
    assert [event.step for event in events.Images(tag)] == list(range(200, steps + 1, 200))
