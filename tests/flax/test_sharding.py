"""Data parallelism: several devices end with the numbers of one."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from sequel_core.algorithms.er import ERHParams
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.hparams import OptimizerHParams, TrainingHParams
from sequel_core.runs.results import load_result
from sequel_core.stream.task import Batch
from sequel_core.testing.streams import table
from sequel_flax import MLP, FlaxLearner, Hook, make_learner, run_together
from sequel_flax.sharding import check_batch_size, device_mesh, sharded
from tests.flax.parts import SILENT
from tests.flax.sharded import METHODS, difference
from tests.pages import code_blocks

ROOT = Path(__file__).parents[2]
DEVICES = "--xla_force_host_platform_device_count"
ER = ERHParams(mem_size=20, mem_batch_size=6)


def forced(devices: int) -> dict[str, str]:
    """Return the environment of a process whose CPU has this number of devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}={devices}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "JAX_NUMPY_RANK_PROMOTION": "allow"}


def free_port() -> int:
    """Return a port of this machine that is not in use."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def reports(*arguments: str, devices: int = 4, seconds: float = 300) -> list[dict[str, Any]]:
    """Return what a process of `tests.flax.sharded` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.flax.sharded", *arguments],
        cwd=ROOT,
        env=forced(devices),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(report: dict[str, Any]) -> None:
    """Check the differences between all devices and one."""
    tolerance = 1e-8 if report["method"] == "kcl" else 1e-10
    assert report["weights"] < tolerance, report
    assert report["state"] < tolerance, report
    assert report["same_matrix"], report
    second_phase = report["method"] in ("bic", "gdumb")  # has a compiled step of its own
    assert report["compiled"] == [1 + second_phase] * 2, report
    assert report["copies_differ"] == 0, report
    assert report["devices"] == 4, report


def test_four_devices() -> None:
    for report in reports("10", "er"):
        check(report)


@pytest.mark.slow
def test_four_devices_with_every_method() -> None:
    measured = reports("200", seconds=1800)
    assert [report["method"] for report in measured] == [*METHODS]
    for report in measured:
        check(report)


@pytest.mark.slow
def test_four_devices_with_batch_normalisation() -> None:
    (report,) = reports("50", "batch_norm")
    check(report)


@pytest.mark.slow
def test_four_devices_with_a_jit_of_the_user() -> None:
    (report,) = reports("50", "own_loop")
    assert report["weights"] < 1e-10, report
    assert report["state"] < 1e-10, report
    assert report["compiled"] == [1, 1], report


@pytest.mark.slow
def test_many_runs_at_once_in_two_groups_of_two_devices() -> None:
    (report,) = reports("50", "together")
    assert report["weights"] < 1e-10, report
    assert report["state"] < 1e-10, report
    assert report["compiled"] == [1, 1], report


@pytest.mark.slow
def test_four_devices_replay_the_samples_that_one_device_replays() -> None:
    (report,) = reports("50", "replayed")
    assert report["same"], report
    assert report["distinct"][0] > ER.mem_size, report


def start(folder: Path, devices: int, *options: str) -> subprocess.Popen[str]:
    """Start a process of `tests.flax.distributed`."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.flax.distributed", str(folder), *options],
        cwd=ROOT,
        env=forced(devices),
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(*processes: subprocess.Popen[str], seconds: float = 300) -> list[int]:
    """Return the exit codes of processes, which are killed if they take longer."""
    try:
        for process in processes:
            process.communicate(timeout=seconds)
    finally:
        for process in processes:
            process.kill()
            process.wait(10)
    return [process.returncode for process in processes]


def end(folder: Path, name: str, process: int = 0) -> dict[str, Any]:
    """Return what a run of a process ended with."""
    content: dict[str, Any] = pickle.loads((folder / f"{name}_{process}.end").read_bytes())
    return content


def compare(actual: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    """Compare what two runs ended with."""
    np.testing.assert_array_equal(actual["matrix"], expected["matrix"])
    for name, tree in expected["trees"].items():
        assert difference(actual["trees"][name], tree) <= tolerance, name


def two_processes(folder: Path, *options: str) -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
    """Start two processes with two devices each."""
    port = f"--port={free_port()}"
    first, second = (start(folder, 2, *options, port, f"--process={k}") for k in (0, 1))
    return first, second


def check_two_processes(folder: Path, steps: int, *names: str, seconds: float = 300) -> None:
    """Compare two processes of two devices each with one process and one device."""
    both, alone = folder / "both", folder / "alone"
    for path in (both, alone):
        path.mkdir()
    steps_of_task = f"--steps={steps}"
    assert finished(*two_processes(both, *names, steps_of_task), seconds=seconds) == [0, 0]
    assert finished(start(alone, 1, *names, steps_of_task), seconds=seconds) == [0]
    for name in names or METHODS:
        expected, second_phase = end(alone, name), name in ("bic", "gdumb")
        for process in (0, 1):
            actual = end(both, name, process)
            compare(actual, expected, 1e-8 if name == "kcl" else 1e-10)
            assert actual["compiled"] == 1 + second_phase
            assert (actual["devices"], actual["copies_differ"]) == (4, 0)
        assert (both / f"{name}_0" / "summary.json").exists()
        assert not (both / f"{name}_1").exists()


@pytest.mark.slow
def test_two_processes_of_two_devices(tmp_path: Path) -> None:
    check_two_processes(tmp_path, 12, "er", "ewc")


@pytest.mark.slow
def test_the_program_of_the_guide(tmp_path: Path) -> None:
    page = ROOT / "docs" / "guides" / "devices.md"
    (program,) = (code for code in code_blocks(page, "py") if "jax.distributed" in code)
    (tmp_path / "train.py").write_text(program)
    address = f"localhost:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "train.py", address, str(process)],
            cwd=tmp_path,
            env={**forced(2), "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    last = [process.communicate(timeout=120)[0].splitlines()[-1].split() for process in processes]
    accuracy = load_result(tmp_path / "runs" / "er").average_accuracy
    assert last == [[str(process), "4", str(accuracy)] for process in range(2)]


@pytest.mark.slow
def test_processes_of_slurm_share_a_run_of_the_command_line(tmp_path: Path) -> None:
    """Two processes have the variables of `srun`; one process has four devices."""
    command = [
        *(str(Path(sys.executable).with_name("sequel")), "run", "mode=jax", "jax.devices=4", "algo=er"),
        *("algo.mem_size=50", "algo.mem_batch_size=8", "benchmark=rotateddigits", "benchmark.num_tasks=2"),
        *("benchmark.subset=200", "training.batch_size=16", "training.dtype=float64"),
    ]
    subprocess.run([*command, f"run_dir={tmp_path / 'one'}"], env=forced(4), check=True, timeout=300)
    slurm = {
        **{"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost"},
        **{"JAX_COORDINATOR_PORT": str(free_port()), "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"},
    }
    processes = [
        subprocess.Popen(
            [*command, f"run_dir={tmp_path / 'two'}"],
            env={**forced(2), **slurm, "SLURM_PROCID": rank, "SLURM_LOCALID": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    assert finished(*processes) == [0, 0]
    actual, expected = (load_result(tmp_path / name) for name in ("two", "one"))
    np.testing.assert_array_equal(actual.matrix, expected.matrix)
    with np.load(tmp_path / "two" / "weights.npz") as two, np.load(tmp_path / "one" / "weights.npz") as one:
        for name in one.files:
            np.testing.assert_allclose(two[name], one[name], rtol=0, atol=1e-10, err_msg=name)


@pytest.mark.slow
def test_two_processes_of_two_devices_with_every_method(tmp_path: Path) -> None:
    check_two_processes(tmp_path, 200, seconds=3600)


@pytest.mark.slow
def test_a_run_that_is_killed_resumes_on_any_number_of_devices(tmp_path: Path) -> None:
    straight, killed, other = (tmp_path / name for name in ("straight", "killed", "other"))
    for folder in (straight, killed):
        folder.mkdir()
    assert finished(start(straight, 4, "derpp")) == [0]
    assert finished(start(killed, 4, "derpp", "--kill=5")) == [-signal.SIGKILL]  # in the second task
    assert not (killed / "derpp_0" / "summary.json").exists()
    shutil.copytree(killed, other)
    assert finished(start(killed, 4, "derpp")) == [0]
    compare(end(killed, "derpp"), end(straight, "derpp"), 0)
    assert finished(start(other, 1, "derpp")) == [0]
    compare(end(other, "derpp"), end(straight, "derpp"), 1e-10)
    assert json.loads((other / "derpp_0" / "summary.json").read_text())["num_devices"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_run_of_two_processes_of_which_one_is_killed(which: int, tmp_path: Path) -> None:
    straight, killed, other = (tmp_path / name for name in ("straight", "killed", "other"))
    for folder in (straight, killed):
        folder.mkdir()
    assert finished(*two_processes(straight, "derpp")) == [0, 0]
    port, kill = f"--port={free_port()}", "--kill=5"
    both = [
        start(killed, 2, "derpp", port, f"--process={k}", *([kill] if k == which else [])) for k in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in both]
    finally:
        codes = finished(*both)
    assert codes[which] == -signal.SIGKILL
    assert codes[1 - which] in ((1,) if which else (1, -signal.SIGABRT))  # JAX ends with process 0, too
    if which:
        assert errors[0] == (
            "sequel: process 1 of the run has ended or cannot be reached; start all processes again with "
            "resume='auto'\n"
        )
    shutil.copytree(killed, other)
    assert finished(*two_processes(killed, "derpp")) == [0, 0]
    compare(end(killed, "derpp"), end(straight, "derpp"), 0)
    assert finished(start(other, 1, "derpp")) == [0]
    compare(end(other, "derpp"), end(straight, "derpp"), 1e-10)


@pytest.mark.slow
def test_two_processes_with_different_settings(tmp_path: Path) -> None:
    port = f"--port={free_port()}"
    both = [start(tmp_path, 1, "er", port, f"--process={k}", f"--seed={k}") for k in (0, 1)]
    try:
        errors = [process.communicate(timeout=300)[1] for process in both]
    finally:
        finished(*both)
    for error in errors:
        assert (
            "ValueError: settings must be the same in every process, got training.seed=0 and 1 in processes "
            "0 and 1; start every process with the same settings\n"
        ) in error
    assert not (tmp_path / "er_0").exists()


def learner(hparams: Any = ER, batch_size: int = 12, **options: Any) -> FlaxLearner:
    stream = table("classes", train=60)
    training = TrainingHParams(batch_size=batch_size, drop_last=False)
    return make_learner(hparams, MLP((8,), 4), OptimizerHParams(lr=0.1), stream, training, **options)


def trained(made: FlaxLearner) -> FlaxLearner:
    for task in table("classes", train=60).tasks:
        made.fit_task(task, SILENT)
        made.evaluate(task, "test")
    return made


@pytest.mark.slow
def test_a_mesh_of_one_device_is_one_device(compiled: Counter[str]) -> None:
    plain = trained(learner(EWCHParams(ewc_lambda=10))).weights()
    compiled.clear()
    meshed = trained(learner(EWCHParams(ewc_lambda=10), devices=jax.make_mesh((1,), ("data",))))
    assert meshed.num_devices == 1
    assert compiled["jit(_traced_loop)"] == 1
    for name, weight in meshed.weights().items():
        np.testing.assert_array_equal(weight, plain[name])


@pytest.mark.slow
def test_a_mesh_saves_and_restores(tmp_path: Path) -> None:
    made = learner(devices=jax.make_mesh((1,), ("data",)))
    made.fit_task(table("classes", train=60).tasks[0], SILENT)
    made.save(tmp_path / "1")()
    plain = learner()
    plain.restore(tmp_path / "1")
    again = learner(devices=jax.make_mesh((1,), ("data",)))
    again.restore(tmp_path / "1")
    for other in (plain, again):
        for a, b in zip(
            jax.tree.leaves((made.ts, made.state)), jax.tree.leaves((other.ts, other.state)), strict=True
        ):
            np.testing.assert_array_equal(a, b)
    for one in (made, plain, again):
        one.close()


def test_draws_are_divided_and_plans_are_not() -> None:
    made = learner(replace(ER, mem_batch_size=8), batch_size=4, devices=jax.make_mesh((1,), ("data",)))
    task = table("classes", train=60).tasks[0]
    x, y, t = task.train.take(np.arange(4))
    batch = sharded(Batch(x, y, t, made.planner.next(y, t)), made.mesh)
    specs = [leaf.sharding.spec for leaf in (batch.x, batch.y, batch.plan.reads, batch.plan.write)]
    assert [tuple(spec) for spec in specs] == [("data",), ("data",), (None, "data"), ()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((99,), "devices must be from 1 to 1, the number of cpu devices that JAX has, got 99; lower it"),
        ((0,), "devices must be from 1 to 1"),
        ((1, 2), "runs must be a divisor of devices=1, got 2; use 1 or 1"),
        (
            (jax.make_mesh((1,), ("batch",)),),
            "mesh must have the axis 'data', and may have 'runs', got the axes 'batch'",
        ),
        ((jax.make_mesh((1, 1), ("data", "model")),), "got the axes 'data', 'model'; rename"),
    ],
    ids=["more than exist", "none", "runs", "another axis", "a further axis"],
)
def test_devices_that_cannot_be_used(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        device_mesh(*arguments)


def test_several_processes_need_all_their_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    meshes = [jax.make_mesh((1,), ("data",)), jax.make_mesh((1, 1), ("runs", "data"))]
    message = (
        r"devices must be 4, those of all 2 processes of jax\.distributed, without the axis 'runs', got "
    )
    for devices in (1, 2, *meshes):
        with pytest.raises(ValueError, match=message):
            learner(devices=devices)
    with pytest.raises(ValueError, match=message):
        device_mesh(4, runs=2)


def test_what_needs_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    made = learner()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="run_together needs one process, got 2 of jax"):
        run_together([made], table("classes", train=60), progress=False)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="hooks need one process, got 1 with 2 processes"):
        learner(devices=jax.make_mesh((1,), ("data",)), hooks=[Hook()])


@pytest.mark.parametrize(
    ("batch_size", "remedy"),
    [(10, "use 8 or 12, or 2 devices"), (9, "use 8 or 12, or 1 device"), (3, "use 4, or 1 device")],
    ids=["even", "odd", "below"],
)
def test_a_batch_size_that_four_devices_do_not_divide(batch_size: int, remedy: str) -> None:
    mesh: Any = AbstractMesh((4,), ("data",))
    message = (
        f"batch_size must be a multiple of 4, the number of devices that share a batch, got {batch_size}; "
    )
    with pytest.raises(ValueError, match=re.escape(message + remedy)):
        check_batch_size(mesh, batch_size)
    check_batch_size(mesh, 12)


def test_the_memory_cannot_be_in_host_memory() -> None:
    with pytest.raises(ValueError, match="mem_device must be auto with several devices"):
        learner(replace(ER, mem_device="cpu"), devices=jax.make_mesh((1,), ("data",)))
