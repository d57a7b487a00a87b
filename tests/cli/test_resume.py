"""`sequel run resume=...` and `--check` with a NumPy learner and real signals."""

import json
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sequel_core.cli import main
from sequel_core.runs.checkpoints import MANIFEST, _files
from sequel_core.runs.files import write_json
from sequel_core.runs.results import load_result, load_weights
from sequel_core.runs.signals import InterruptedRunError
from sequel_core.stream.task import Task
from tests.cli.conftest import NearestMean, Plugin

SMALL = ["benchmark.num_tasks=3", "benchmark.subset=100"]


class Stop:
    """Interrupts a run once, at the start of a task, like a signal; `trained` lists the started tasks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, task: int) -> None:
        self.trained: list[int] = []
        fit = NearestMean.fit_task

        def fit_task(model: NearestMean, this: Task, monitor: Any) -> None:
            self.trained.append(this.index)
            if self.trained == [*range(task + 1)]:
                raise InterruptedRunError(signal.SIGTERM)
            fit(model, this, monitor)

        monkeypatch.setattr(NearestMean, "fit_task", fit_task)


def outcome(directory: str) -> tuple[Any, Any, Any]:
    result = load_result(directory)
    return result.summary["status"], str(result.matrix.tolist()), load_weights(directory)["means"].tolist()


def test_resume_uses_the_settings_of_the_run_and_trains_the_remaining_tasks(
    numpy_plugin: Plugin, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "algo=er", "algo.mem_size=77", *SMALL, "run_dir=straight"]) == 0
    stop = Stop(monkeypatch, task=1)
    line = ["run", "algo=er", "algo.mem_size=77", *SMALL, "run_dir=runs/a b"]
    assert main(line) == 128 + signal.SIGTERM
    ended = f"ended by SIGTERM; to go on: sequel run 'resume={Path('runs/a b').resolve()}'"
    assert capsys.readouterr().err == f"sequel: {ended}\n"
    assert load_result("runs/a b").summary["status"] == "interrupted"
    assert main(["run", "resume=runs/a b"]) == 0
    assert stop.trained == [0, 1, 1, 2]
    assert numpy_plugin.built[-1].algo.mem_size == 77  # type: ignore[attr-defined]
    assert outcome("runs/a b") == outcome("straight")
    assert main(["run", "resume=runs/a b"]) == 0  # a finished run is only read
    assert main([*line, "resume=auto"]) == 0
    assert stop.trained == [0, 1, 1, 2]


@pytest.mark.filterwarnings("default::sequel_core.runs.checkpoints.CheckpointWarning")
def test_a_damaged_checkpoint_and_other_versions_are_reported_in_a_line_each(
    numpy_plugin: Plugin, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["run", *SMALL, "run_dir=a", "resume=auto"]
    Stop(monkeypatch, task=2)
    assert main(line) == 143
    first, second = (Path.cwd() / "a" / "checkpoints" / name for name in ("1", "2"))
    (second / "run.json").write_text("{}")
    state = json.loads((first / "run.json").read_text())
    state["versions"] |= {"numpy": "1.0", "sequel-cl": "0.0", "of nothing loaded": "3"}
    write_json(first / "run.json", state)
    write_json(first / MANIFEST, _files(first))
    capsys.readouterr()
    assert main(line) == 0
    assert capsys.readouterr().err.splitlines() == [
        f"sequel: checkpoint {second} is damaged: run.json differs; an older checkpoint is used, if there is "
        "one",
        f"sequel: checkpoint {first} was written with numpy 1.0 (now {np.__version__}), sequel-cl 0.0 (now "
        f"{metadata.version('sequel-cl')}); the run continues, but its results may differ by rounding from "
        "those of an uninterrupted run",
    ]
    assert main(line) == 0  # the run is finished
    assert capsys.readouterr().err == ""


def test_resume_auto_starts_or_resumes_a_run_and_all_runs_of_a_sweep(
    numpy_plugin: Plugin, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = Stop(monkeypatch, task=2)
    line = ["run", "algo=naive", *SMALL, "run_dir=one", "resume=auto"]
    assert main(line) == 143
    assert main(line) == 0
    assert stop.trained == [0, 1, 2, 2]
    stop = Stop(monkeypatch, task=2)
    sweep = ["run", "-m", "seed=0,1", *SMALL, "run_dir=sweep", "resume=auto"]
    assert main(sweep) == 143  # the second run has not started
    assert main(sweep) == 0
    assert stop.trained == [0, 1, 2, 2, 0, 1, 2]
    assert [load_result(f"sweep/{k}").summary["status"] for k in range(2)] == ["finished"] * 2
    capsys.readouterr()


def test_a_repeated_sweep_runs_what_is_missing_and_finds_finished_runs_by_their_settings(
    numpy_plugin: Plugin, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["run", "-m", *SMALL, "run_dir=sweep", "resume=auto"]
    assert main([*line, "seed=0,1"]) == 0
    before = {path: path.stat().st_mtime_ns for path in Path("sweep").glob("?/**/*")}
    Path("sweep/2").mkdir()
    Path("sweep/2/error.txt").write_text("no space left\n")
    stop = Stop(monkeypatch, task=9)  # never
    capsys.readouterr()
    assert main([*line, "seed=4,1,5,0"]) == 0
    assert "note: 2 of 4 runs are finished" in capsys.readouterr().out
    assert stop.trained == [0, 1, 2, 0, 1, 2]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    seeds = {path.name: load_result(path).config["training"]["seed"] for path in Path("sweep").glob("?")}
    assert seeds == {"0": 0, "1": 1, "2": 5, "4": 4}
    assert not Path("sweep/2/error.txt").exists()
    rows = Path("sweep/sweep.csv").read_text().splitlines()[1:]
    assert sorted(row.split(",")[1] for row in rows) == ["0", "1", "2", "4"]
    assert main([*line, "seed=4,1,5,0"]) == 0  # nothing is missing
    assert len(stop.trained) == 6


def test_an_error_of_a_launcher_is_a_line_that_says_how_to_run_what_is_missing(
    numpy_plugin: Plugin, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def launch(*_: object) -> None:
        raise RuntimeError("a worker\nwas killed")

    monkeypatch.setattr("sequel_core.cli.run._launch", launch)
    assert main(["run", "-m", *SMALL, "seed=0,1", "run_dir=sweep"]) == 1
    captured = capsys.readouterr()
    assert captured.err == (
        "sequel: the launcher failed: RuntimeError: a worker was killed; repeat the command with "
        f"run_dir={Path.cwd() / 'sweep'} resume=auto to run what is missing\n"
    )
    assert captured.out.count("not started") == 2


def test_a_sweep_may_be_launched_in_parts(numpy_plugin: Plugin, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["run", "-m", *SMALL, "seed=0,1,2"]
    assert main([*line, "hydra.sweeper.max_batch_size=2", "run_dir=sweep"]) == 0
    assert [load_result(f"sweep/{k}").config["training"]["seed"] for k in range(3)] == [0, 1, 2]
    assert main([*line, "hydra.sweeper.max_batch_size=0"]) == 2
    assert "hydra.sweeper.max_batch_size must be >= 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["resume=auto"], "resume=auto needs run_dir=DIR, got none"),
        (["resume=nowhere"], "resume must be a run directory or auto, got nowhere, which has no"),
        (["resume=done", "run_dir=x"], "uses the settings and directory of its run; remove run_dir=x"),
        (["resume=done", "+experiment=naive_rotateddigits"], "remove +experiment=naive_rotateddigits"),
        (
            ["resume=done", "algo.lr_decay=0.5", "optimizer.lr=0.2"],
            "algo.lr_decay is 1.0 there and 0.5 here; optimizer.lr is 0.01 there and 0.2 here",
        ),
        (["run_dir=done", "resume=auto", *SMALL, "seed=1"], "training.seed is 0 there and 1 here"),
        (["-m", "seed=0,1", "hydra/launcher=joblib"], "pip install 'sequel-cl[joblib]'"),
        (["-m", "resume=done", "seed=0,1"], "resume must be auto for a sweep"),
        (["run_dir=done", *SMALL], "run_dir must be empty or new"),
    ],
)
def test_a_run_that_cannot_be_resumed_is_one_line_and_changes_no_file(
    numpy_plugin: Plugin, capsys: pytest.CaptureFixture[str], line: list[str], message: str
) -> None:
    assert main(["run", *SMALL, "run_dir=done"]) == 0
    capsys.readouterr()
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert main(["run", *line]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_check_builds_everything_and_writes_nothing(
    numpy_plugin: Plugin, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "algo=er", *SMALL, "run_dir=x", "--check"]) == 0
    assert "valid: er on rotateddigits in pytorch, 3 tasks, 640 parameters" in capsys.readouterr().out
    assert main(["run", "-m", "algo=er,ewc", *SMALL, "--check"]) == 0
    assert capsys.readouterr().out.count("valid: ") == 2
    assert main(["run", "algo=er", "training.batch_size=5000", "--check"]) == 2
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("mode", "number"),
    [
        ("pytorch", signal.SIGTERM),
        pytest.param("pytorch", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("jax", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("jax", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("jax", signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_a_run_resumes_from_the_checkpoint_that_a_signal_writes(
    mode: str, number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subprocess receives a real signal; this process resumes its run and repeats it uninterrupted."""
    monkeypatch.chdir(tmp_path)
    line = ["run", "algo=er", f"mode={mode}", *SMALL, "evaluate_every=100"]
    line += ["training.epochs_per_task=16", "training.batch_size=5"]
    command = [str(Path(sys.executable).with_name("sequel")), *line, "run_dir=a", "resume=auto"]
    process = subprocess.Popen(command, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    for text in process.stdout:
        if text.startswith("task 1/"):  # the second task has started
            process.send_signal(number)
            break
    _, err = process.communicate()
    assert process.returncode == 128 + number
    assert f"sequel: ended by {number.name}" in err
    summary = json.loads(Path("a", "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert 320 <= summary["steps"] < 960
    assert main([*line, "run_dir=a", "resume=auto"]) == 0
    assert main([*line, "run_dir=b"]) == 0
    matrices = [Path(run_dir, "accuracy_matrix.csv").read_text() for run_dir in ("a", "b")]
    assert matrices[0] == matrices[1]
    for name, array in load_weights("b").items():
        np.testing.assert_array_equal(load_weights("a")[name], array)
