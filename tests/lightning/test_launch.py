"""The command line starts the processes of a run, which may be killed, resumed and swept."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sequel_core.runs.checkpoints import Checkpoints
from sequel_core.runs.results import load_result
from sequel_core.testing.resume import assert_same_records
from tests.lightning.processes import free_port
from tests.pages import code_blocks

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EXPERIMENT = [
    *("algo=er", "algo.mem_size=50", "algo.mem_batch_size=6", "optimizer.lr=0.05"),
    *("benchmark=rotateddigits", "benchmark.num_tasks=3", "benchmark.subset=240"),
    *("training.batch_size=12", "training.dtype=float64", "trainer.accelerator=cpu"),
    *("checkpoint.every_n_steps=6", "checkpoint.keep=100"),
]
TWO = ["trainer.devices=2", "trainer.strategy=ddp"]


def started(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start `sequel run`; the processes that it starts end when it does."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    command = [str(Path(sys.executable).with_name("sequel")), "run", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=variables, stdout=pipe, stderr=pipe, text=True)


def ended(*processes: subprocess.Popen[str]) -> list[tuple[int, str, str]]:
    """Return exit code, output and error output of processes, with a time limit."""
    try:
        texts = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def sequel(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `sequel run` with a time limit."""
    ((code, output, error),) = ended(started(*arguments))
    return subprocess.CompletedProcess(arguments, code, output, error)


def two_nodes(*arguments: str) -> list[tuple[int, str, str]]:
    """Run `sequel run` as on two machines, with two processes on each."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    options = [*EXPERIMENT, *TWO, "trainer.num_nodes=2", *arguments]
    return ended(*(started(*options, NODE_RANK=rank, **address) for rank in ("0", "1")))


def finished(folder: Path, *arguments: str) -> Path:
    result = sequel(*EXPERIMENT, f"run_dir={folder}", *arguments)
    assert result.returncode == 0, result.stderr
    return folder


def matrix(run_dir: Path) -> str:
    return (run_dir / "accuracy_matrix.csv").read_text()


def assert_close(run_dir: Path, expected: Path) -> None:
    assert matrix(run_dir) == matrix(expected)
    with np.load(run_dir / "weights.npz") as actual, np.load(expected / "weights.npz") as arrays:
        assert sorted(actual.files) == sorted(arrays.files)
        for name in arrays.files:
            np.testing.assert_allclose(actual[name], arrays[name], rtol=0, atol=1e-10, err_msg=name)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("one") / "run")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("two") / "run", *TWO)


def test_two_processes_end_as_one(one: Path, two: Path) -> None:
    assert_close(two, one)
    numbers = [json.loads((run_dir / "summary.json").read_text())["num_devices"] for run_dir in (one, two)]
    assert numbers == [1, 2]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_others_and_the_run_resumes(
    rank: int, one: Path, two: Path, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    mark = tmp_path / "mark"
    callback = f"{{_target_: tests.lightning.killing.KillProcess, rank: {rank}, step: 9, mark: {mark}}}"
    result = sequel(*EXPERIMENT, *TWO, f"run_dir={killed}", f"callbacks=[{callback}]")
    seconds = time.time() - mark.stat().st_mtime
    print(f"rank {rank} killed: {seconds:.1f} s, code {result.returncode}, {result.stderr!r}")
    assert result.returncode == (1 if rank else -9)
    (line,) = result.stderr.splitlines()
    assert line.startswith("sequel: a process of the run has ended")
    checkpoint = Checkpoints(killed).newest()
    assert checkpoint is not None
    assert checkpoint.run["num_devices"] == 2
    shutil.copytree(killed, tmp_path / "resumed_on_one")
    assert_same_records(finished(killed, *TWO, "resume=auto"), two)
    assert_close(finished(tmp_path / "resumed_on_one", "resume=auto"), one)


def test_two_nodes_end_as_one_process(one: Path, tmp_path: Path) -> None:
    results = two_nodes(f"run_dir={tmp_path / 'run'}")
    assert [(code, error) for code, _, error in results] == [(0, ""), (0, "")]
    assert [bool(output) for _, output, _ in results] == [True, False]  # the first process reports the run
    assert_close(tmp_path / "run", one)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["num_devices"] == 4


def test_torchrun_may_start_the_processes(one: Path, tmp_path: Path) -> None:
    torchrun, command = (str(Path(sys.executable).with_name(name)) for name in ("torchrun", "sequel"))
    options = ["run", *EXPERIMENT, *TWO, f"run_dir={tmp_path / 'run'}"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [torchrun, "--nproc-per-node=2", command, *options], env=variables, check=True, timeout=300
    )
    assert_close(tmp_path / "run", one)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["num_devices"] == 2


@pytest.mark.parametrize("rank", [0, 3])
def test_a_killed_process_ends_those_of_the_other_node(rank: int, one: Path, tmp_path: Path) -> None:
    callback = (
        f"{{_target_: tests.lightning.killing.KillProcess, rank: {rank}, step: 9, mark: {tmp_path / 'mark'}}}"
    )
    results = two_nodes(f"run_dir={tmp_path / 'run'}", f"callbacks=[{callback}]")
    seconds = time.time() - (tmp_path / "mark").stat().st_mtime
    print(f"rank {rank} killed: {seconds:.1f} s, {results}")
    assert seconds < 60
    for node, (code, _, error) in enumerate(results):
        assert code == (-9 if (rank, node) == (0, 0) else 1)
        assert len(error.splitlines()) == 1
        assert error.startswith("sequel: a process of the run has ended")
    assert_close(finished(tmp_path / "run", "resume=auto"), one)


def test_ddp_spawn_ends_as_ddp(two: Path, tmp_path: Path) -> None:
    spawned = finished(tmp_path / "run", "trainer.devices=2", "trainer.strategy=ddp_spawn")
    assert_same_records(spawned, two)


def test_the_settings_of_a_sweep_reach_every_process(one: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    result = sequel("-m", *EXPERIMENT, *TWO, "seed=0,1", f"run_dir={folder}")
    assert result.returncode == 0, result.stderr
    assert_close(folder / "0", one)
    assert matrix(folder / "1") != matrix(folder / "0")
    rows = list(csv.DictReader((folder / "sweep.csv").read_text().splitlines()))
    assert [(row["seed"], row["status"]) for row in rows] == [("0", "finished"), ("1", "finished")]
    for run_dir in (folder / "0", folder / "1"):
        assert json.loads((run_dir / "summary.json").read_text())["num_devices"] == 2


SCRIPT = """
from functools import partial
import torch
from sequel_benchmarks import RotatedDigits
from sequel_core import ERHParams, run
from sequel_core.hparams import TrainingHParams
from sequel_lightning import MLP, initialise, make_learner

digits = RotatedDigits(num_tasks=2, subset=100)
net = initialise(MLP((16,), num_classes=10, image_shape=digits.image_shape), seed=0).double()
learner = make_learner(
    ERHParams(mem_size=20), net, partial(torch.optim.SGD, lr=0.1), digits, TrainingHParams(dtype="float64"),
    trainer={"accelerator": "cpu", "devices": DEVICES, "strategy": "STRATEGY"},
)
run(learner, digits, run_dir="RUN_DIR", progress=False)
"""


def test_a_script_is_started_again_for_each_process(tmp_path: Path) -> None:
    for devices, strategy in ((1, "auto"), (2, "ddp")):
        text = SCRIPT.replace("DEVICES", str(devices)).replace("STRATEGY", strategy)
        script = tmp_path / f"script_{devices}.py"
        script.write_text(text.replace("RUN_DIR", str(tmp_path / f"run_{devices}")))
        subprocess.run([sys.executable, str(script)], check=True, timeout=300)
    assert_close(tmp_path / "run_2", tmp_path / "run_1")


def test_the_program_of_the_guide(tmp_path: Path) -> None:
    program, *_ = code_blocks(ROOT / "docs" / "guides" / "devices.md", "py")
    (tmp_path / "train.py").write_text(program)
    command = [sys.executable, "train.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300)
    result = load_result(tmp_path / "runs" / "er")
    assert result.summary["num_devices"] == 2
    lines = [f"{main} {result.average_accuracy}" for main in (True, False)]
    assert {*lines} <= {*done.stdout.splitlines()}


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
def test_strategies_that_divide_the_network_are_named(strategy: str, tmp_path: Path) -> None:
    options = [f"run_dir={tmp_path / 'run'}", "trainer.devices=2", f"trainer.strategy={strategy}"]
    result = sequel(*EXPERIMENT, *options)
    assert result.returncode == 2
    assert f"got {strategy}; set strategy=ddp" in result.stderr
    assert not (tmp_path / "run").exists()
