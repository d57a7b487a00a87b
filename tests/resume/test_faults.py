"""Machine faults: the command ends with a one-line error, and the resumed run has the same result."""

import csv
import json
import multiprocessing
import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from sequel_core.cli import main
from sequel_core.runs.directory import RunDirectory
from sequel_core.runs.results import load_result
from sequel_core.testing.resume import assert_same_records
from tests.disks import enlarge, small_disk, write_protected
from tests.events import scalars
from tests.quick import some
from tests.resume.faulty import After, write_files
from tests.resume.short_runs import MODES

SMALL = ["algo=er", "algo.mem_size=20", "backbone.widths=[12]", "benchmark.batch_size=5", "-q"]
DIGITS = ["benchmark.num_tasks=3", "benchmark.subset=60", "checkpoint.every_n_steps=5", "evaluate_every=4"]
HARM = ["callbacks={after: {_target_: tests.resume.faulty.After}}"]
ROOM = 4  # KiB: of a page, which is what a file's size is rounded up to

# orbax and tensorstore leave loops and files to the garbage collector if a write fails.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def ended(mode: str, run_dir: Path, *line: str) -> tuple[int, str]:
        code = main(["run", *SMALL, *line, f"mode={mode}", f"run_dir={run_dir}", "resume=auto"])
        captured = capsys.readouterr()
        assert captured.out == ""
        return code, captured.err

    return ended


def full_at(run: Run, mode: str, size: int, straight: Path, disk: Path) -> bool:
    """Run on a disk of so many KiB, then on with more; return whether it was too small."""
    with small_disk(disk, size):
        code, err = run(mode, disk / "run", *DIGITS)
        if code == 0:
            return False
        assert code == 2
        assert re.fullmatch(rf"sequel: {disk}/run.*: No space left on device\n", err)
        enlarge(disk)
        assert run(mode, disk / "run", *DIGITS) == (0, "")
        assert_same_records(disk / "run", straight)
    return True


@pytest.mark.parametrize("mode", MODES)
def test_a_disk_that_is_full_half_way(mode: str, run: Run, tmp_path: Path) -> None:
    assert run(mode, tmp_path / "straight", *DIGITS) == (0, "")
    used = sum(path.stat().st_size for path in (tmp_path / "straight").rglob("*")) // 1024
    assert full_at(run, mode, used // 2, tmp_path / "straight", tmp_path / "disk")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_disk_that_is_full_at_any_write(mode: str, run: Run, tmp_path: Path) -> None:
    assert run(mode, tmp_path / "straight", *DIGITS) == (0, "")
    size = ROOM
    while full_at(run, mode, size, tmp_path / "straight", tmp_path / f"disk_{size}"):
        size += ROOM
    assert size > 10 * ROOM


@pytest.mark.parametrize("mode", some(MODES, ["jax"]))
def test_a_disk_that_can_only_be_read_all_at_once(mode: str, run: Run, tmp_path: Path) -> None:
    assert run(mode, tmp_path / "straight", *DIGITS) == (0, "")
    disk = tmp_path / "disk"
    with small_disk(disk, 9000), ExitStack() as protection:
        After.harm = partial(protection.enter_context, write_protected(disk))
        code, err = run(mode, disk / "run", *DIGITS, *HARM)
        assert code == 2
        assert err.count("\n") == 1
        assert "Read-only file system" in err
        assert (
            load_result(disk / "run").summary["status"] == "unfinished"
        )  # nothing could be written any more
        protection.close()
        assert run(mode, disk / "run", *DIGITS, *HARM) == (0, "")
        assert_same_records(disk / "run", tmp_path / "straight")


@pytest.mark.parametrize("mode", some(MODES, ["pytorch"]))
def test_data_that_go_while_it_runs(mode: str, run: Run, tmp_path: Path) -> None:
    write_files(tmp_path / "data")
    line = ["benchmark._target_=tests.resume.faulty.of_files", f"benchmark.folder={tmp_path / 'data'}", *HARM]
    line += ["training.log_every_n_steps=2", "logger=[csv,jsonl,tensorboard]"]
    assert run(mode, tmp_path / "straight", *line) == (0, "")
    gone = tmp_path / "data" / "1" / "7.npy"
    kept = shutil.copy(gone, tmp_path / "kept.npy")
    After.harm = gone.unlink
    code, err = run(mode, tmp_path / "run", *line)
    assert code == 2
    assert err.count("\n") == 1
    assert str(gone) in err
    assert load_result(tmp_path / "run").summary["status"] == "failed"
    shutil.copy(kept, gone)
    assert run(mode, tmp_path / "run", *line) == (0, "")
    assert_same_records(tmp_path / "run", tmp_path / "straight")
    assert logged(tmp_path / "run") == logged(tmp_path / "straight")


def logged(run_dir: Path) -> list[Any]:
    """Return what three loggers have written, but for how fast the run was."""
    with (run_dir / "csv" / "metrics.csv").open(newline="") as file:
        rows: list[Any] = list(csv.DictReader(file))
    rows += map(json.loads, (run_dir / "jsonl" / "metrics.jsonl").read_text().splitlines())
    events = scalars(run_dir / "tensorboard")
    assert len(events["train/loss"]) == 9  # 6 steps for each of three tasks
    assert all(steps == sorted(set(steps)) for steps in ([step for step, _ in events[tag]] for tag in events))
    return [{k: v for k, v in row.items() if k != "train/samples_per_second"} for row in [*rows, events]]


def hold(path: Path, connection: Connection) -> None:
    """Hold the lock of a run directory until a message comes."""
    with RunDirectory(path).locked():
        connection.send("held")
        connection.recv()


def test_a_directory_that_another_process_runs_in(run: Run, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    here, there = multiprocessing.Pipe()
    other = multiprocessing.get_context("spawn").Process(target=hold, args=(run_dir, there))
    other.start()
    assert here.recv() == "held"
    code, err = run("pytorch", run_dir, *DIGITS)
    here.send("let go")
    other.join()
    assert code == 2
    assert err.count("\n") == 1
    assert str(other.pid) in err
    assert run("pytorch", run_dir, *DIGITS) == (0, "")
