"""Data parallelism: several devices end with the numbers of one."""

from __future__ import annotations

import json
import os
import re
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
from sequel_core.stream.task import Batch
from sequel_core.testing.streams import table
from sequel_flax import MLP, FlaxLearner, make_learner
from sequel_flax.sharding import check_batch_size, device_mesh, sharded
from tests.flax.parts import SILENT
from tests.flax.sharded import METHODS

ROOT = Path(__file__).parents[2]
DEVICES = "--xla_force_host_platform_device_count"
ER = ERHParams(mem_size=20, mem_batch_size=6)


def forced(devices: int) -> dict[str, str]:
    """Return the environment of a process whose CPU has this number of devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}={devices}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "JAX_NUMPY_RANK_PROMOTION": "allow"}


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


def test_several_processes_cannot_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for devices in (2, jax.make_mesh((1,), ("data",))):
        with pytest.raises(ValueError, match=r"devices must be 1 with 2 processes of jax.distributed, got "):
            device_mesh(devices)
    assert device_mesh(1) is None


@pytest.mark.parametrize(
    ("batch_size", "remedy"),
    [(10, "use 8 or 12, or 2 devices"), (9, "use 8 or 12, or 1 devices"), (3, "use 4, or 1 devices")],
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
