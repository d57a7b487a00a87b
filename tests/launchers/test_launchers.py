"""Sweeps with the real launchers of Hydra, in processes of their own; `make launchers` installs them."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from sequel_core import load_result

pytestmark = pytest.mark.slow

LIMIT = 600  # seconds that a command may take
STREAM = ["benchmark=rotateddigits", "benchmark.num_tasks=3", "benchmark.subset=200"]
SWEEP = ["algo=naive,er", "seed=0,1,2,3", *STREAM]
LAUNCHERS = {
    "joblib": ["hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra.sweeper.max_batch_size=2", "hydra.launcher.timeout_min=5"],
    "ray": ["+hydra.launcher.ray.init.num_cpus=2", "+hydra.launcher.ray.init.include_dashboard=false"],
}
"""Each launcher with settings for two processes at a time."""


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def sweep(folder: Path, *arguments: str) -> Ended:
    """Run `sequel run -m` in a folder. After `LIMIT` seconds, it is killed with its processes."""
    program = "import sys; from sequel_core.cli import main; sys.exit(main(sys.argv[1:]))"
    line = [sys.executable, "-c", program, "run", "-m", *arguments]
    files = folder / "out.txt", folder / "err.txt"
    with files[0].open("w") as out, files[1].open("w") as err:
        child = subprocess.Popen(line, cwd=folder, stdout=out, stderr=err, start_new_session=True)
        try:
            code = child.wait(LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait(LIMIT)
            raise
    return Ended(code, *(file.read_text() for file in files))


def table(directory: Path) -> list[dict[str, str]]:
    with (directory / "sweep.csv").open() as file:
        rows = [
            {key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)
        ]
    assert {row["status"] for row in rows} == {"finished"}
    return rows


def finished(directory: Path) -> dict[Path, int]:
    """Return when each file of the finished runs was written."""
    runs = [path.parent for path in directory.glob("*/summary.json")]
    done = [run for run in runs if load_result(run).summary["status"] == "finished"]
    return {path: path.stat().st_mtime_ns for run in done for path in run.rglob("*")}


def launched(name: str) -> list[str]:
    """Return the overrides that choose a launcher, or skip the test if it is not installed."""
    package = name.partition("_")[0]
    pytest.importorskip(f"hydra_plugins.hydra_{package}_launcher")
    return [f"hydra/launcher={name}", *LAUNCHERS[name]]


@pytest.fixture(scope="module")
def basic(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """The table of the basic launcher."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")  # else nothing compares with it
    folder = tmp_path_factory.mktemp("basic")
    ended = sweep(folder, *SWEEP, "run_dir=results")
    assert ended.code == 0, ended.err
    rows = table(folder / "results")
    assert len(rows) == 8
    return rows


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_table_is_that_of_the_basic_launcher(
    name: str, basic: list[dict[str, str]], tmp_path: Path
) -> None:
    ended = sweep(tmp_path, *SWEEP, *launched(name), "run_dir=results")
    assert ended.code == 0, ended.err
    assert table(tmp_path / "results") == basic


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_sweep_whose_worker_was_killed_is_completed_by_the_same_command(
    name: str, basic: list[dict[str, str]], tmp_path: Path
) -> None:
    """Ray starts the run of a killed worker again by itself; the others end the sweep."""
    shutil.copy(Path(__file__).with_name("kill.py"), tmp_path)
    killed = "callbacks=[{_target_: kill.SignalOnce, name: SIGKILL}]"
    line = [*SWEEP, killed, *launched(name), "run_dir=results", "resume=auto"]
    ended = sweep(tmp_path, *line)
    assert (tmp_path / "results" / "sent").exists()
    if name != "ray":
        assert ended.code == 1
        (message,) = [text for text in ended.err.splitlines() if text.startswith("sequel: ")]
        assert message.startswith("sequel: the launcher failed: ")
        assert "Traceback" not in ended.err.partition("sequel: the launcher failed")[2]
    before = finished(tmp_path / "results")
    assert before
    ended = sweep(tmp_path, *line)
    assert ended.code == 0, ended.err
    assert table(tmp_path / "results") == basic
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_job_that_submitit_ends_is_queued_again_and_resumes(
    basic: list[dict[str, str]], tmp_path: Path
) -> None:
    """SIGUSR2 is what SLURM sends before the time is over; the local executor queues the job again, too."""
    shutil.copy(Path(__file__).with_name("kill.py"), tmp_path)
    ended_early = "callbacks=[{_target_: kill.SignalOnce, name: SIGUSR2}]"
    line = [*SWEEP, ended_early, *launched("submitit_local"), "run_dir=results", "resume=auto"]
    ended = sweep(tmp_path, *line)
    assert ended.code == 0, ended.err
    assert (tmp_path / "results" / "sent").exists()
    assert table(tmp_path / "results") == basic


def test_the_script_for_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command `sbatch` keeps the script and fails, so no job is waited for."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    commands = tmp_path / "commands"
    commands.mkdir()
    script = tmp_path / "script.sh"
    for name, code in {
        "sbatch": f'cp "$1" {script}; echo no such partition >&2; exit 1',
        "srun": "exit 1",
    }.items():
        (commands / name).write_text(f"#!/bin/sh\n{code}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    line = [*SWEEP, "hydra/launcher=slurm", "hydra.launcher.partition=gpu", "run_dir=results", "resume=auto"]
    ended = sweep(tmp_path, *line)
    assert ended.code == 1
    assert "sequel: the launcher failed: " in ended.err
    assert "no such partition" in ended.err
    lines = script.read_text().splitlines()
    expected = {
        "--array=0-7%8",
        "--cpus-per-task=2",
        "--job-name=sequel",
        "--mem=8GB",
        "--nodes=1",
        "--open-mode=append",
        "--partition=gpu",
        "--requeue",
        "--signal=USR2@120",
        "--time=240",
    }
    assert expected <= {text.removeprefix("#SBATCH ") for text in lines if text.startswith("#SBATCH")}
    assert "export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK" in lines
