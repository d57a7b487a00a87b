"""Device and dtype of a replay memory: the settings mem_device and mem_dtype."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import sequel_flax
import sequel_lightning
from sequel_core.algorithms.agem import AGEMHParams
from sequel_core.algorithms.der import DERHParams
from sequel_core.algorithms.derpp import DERppHParams
from sequel_core.algorithms.er import ERHParams
from sequel_core.algorithms.lamaml import LaMAMLHParams
from sequel_core.algorithms.mcsgd import MCSGDHParams
from sequel_core.hparams import MemoryHParams, OptimizerHParams, TrainingHParams
from sequel_core.runs.learner import FitMonitor
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.task import Batch
from sequel_core.testing.parity import difference
from sequel_core.testing.streams import table

SILENT = FitMonitor(on_progress=lambda progress: None, on_evaluate=lambda: None)
FRAMEWORKS = {"jax": sequel_flax, "pytorch": sequel_lightning}
each_framework = pytest.mark.parametrize("mode", FRAMEWORKS)
METHODS: list[MemoryHParams] = [
    ERHParams(mem_size=30, mem_batch_size=6),
    DERppHParams(mem_size=30, mem_batch_size=6),
    AGEMHParams(mem_size=36, mem_batch_size=12),
    LaMAMLHParams(mem_size=30, mem_batch_size=6, glances=2, n_inner_updates=1),
    MCSGDHParams(mem_size=36, lmc_batch_size=8, lmc_lr=0.05),
    MCSGDHParams(mem_size=36, lmc_batch_size=8, lmc_lr=0.002, lmc_policy="online"),
]


def stream() -> Benchmark:
    """Return three tasks of 15 steps."""
    return table("classes", train=105)


def learner(mode: str, hparams: MemoryHParams, dtype: Any = "float64") -> Any:
    plugin: Any = FRAMEWORKS[mode]
    kwargs = {"image_shape": stream().spec.x.shape} if mode == "pytorch" else {}
    net = plugin.MLP((10,), stream().num_classes, **kwargs)
    optimizer = plugin.build_optimizer(OptimizerHParams(lr=0.05))
    training = TrainingHParams(batch_size=7, dtype=dtype, seed=3)
    return plugin.make_learner(hparams, net, optimizer, stream(), training)


@cache
def trained(mode: str, hparams: MemoryHParams) -> Any:
    made = learner(mode, hparams)
    for task in stream().tasks:
        made.fit_task(task, SILENT)
    return made


def weights(mode: str, hparams: MemoryHParams) -> dict[str, FloatArray]:
    result: dict[str, FloatArray] = trained(mode, hparams).weights()
    return result


def memory(made: Any) -> Any:
    """Return the memory of a learner."""
    state = made.module.state if hasattr(made, "module") else made.state.memory
    return state if hasattr(state, "t") else state.memory


def dtypes(made: Any) -> list[str]:
    """Return the dtypes of inputs, targets and outputs."""
    x, y, _, outputs = memory(made)
    return [str(a.dtype).removeprefix("torch.") for a in (x, y, outputs) if a is not None]


def cases() -> list[Any]:
    """Return methods in both frameworks; most of Flax, which compiles each, are slow."""
    pairs = [(mode, hparams) for mode in FRAMEWORKS for hparams in METHODS]
    return [
        pytest.param(
            mode,
            hparams,
            id=f"{mode} {hparams.name} {getattr(hparams, 'lmc_policy', '')}",
            marks=[pytest.mark.slow] if mode == "jax" and hparams.name not in ("derpp",) else [],
        )
        for mode, hparams in pairs
    ]


@pytest.mark.parametrize(("mode", "hparams"), cases())
def test_host_memory_changes_no_number(mode: str, hparams: MemoryHParams) -> None:
    """Lightning runs the same code; Flax takes each step with a small copy of the memory."""
    on_host = replace(hparams, mem_device="cpu")
    assert difference(weights(mode, on_host), weights(mode, hparams)) < 1e-12
    a, b = (trained(mode, h).memory_samples() for h in (on_host, hparams))
    assert [part.tolist() for part in a] == [part.tolist() for part in b]


@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("hparams", [METHODS[1]], ids=lambda h: h.name)
def test_small_dtypes_round_alike(hparams: MemoryHParams, dtype: Any) -> None:
    """The frameworks round inputs and outputs to the same numbers, and compute with them in float64."""
    small = replace(hparams, mem_dtype=dtype)
    assert difference(weights("jax", small), weights("pytorch", small)) < 1e-10
    assert difference(weights("jax", small), weights("jax", hparams)) > 1e-5
    for mode in FRAMEWORKS:
        made = trained(mode, small)
        assert dtypes(made) == [dtype, "int32", dtype][: 2 + (hparams.name == "derpp")]
        full = trained(mode, hparams).memory_samples()
        rounded = jnp.asarray(full.x).astype(dtype).astype(np.float32)
        assert np.array_equal(made.memory_samples().x, rounded)
        assert made.memory_bytes() < trained(mode, hparams).memory_bytes()


@each_framework
def test_the_default_is_the_dtype_of_stream_and_network(mode: str) -> None:
    """Inputs of a float64 network stay float32, which they are; its outputs are float64."""
    assert dtypes(trained(mode, METHODS[1])) == ["float32", "int32", "float64"]


@each_framework
def test_host_memory_is_resumed(mode: str, tmp_path: Path) -> None:
    hparams = DERHParams(mem_size=30, mem_batch_size=6, mem_device="cpu", mem_dtype="bfloat16")
    first, second = learner(mode, hparams), learner(mode, hparams)
    first.fit_task(stream().tasks[0], SILENT)
    first.save(tmp_path / "1")()
    second.restore(tmp_path / "1")
    for made in (first, second):
        made.fit_task(stream().tasks[1], SILENT)
    for name, array in first.weights().items():
        assert np.array_equal(second.weights()[name], array)
    if mode == "jax":
        assert all(leaf.committed for leaf in jax.tree.leaves(memory(second)))


# -- Lightning


@pytest.mark.parametrize("mem_dtype", ["auto", "float32"])
def test_conversions_of_a_module(mem_dtype: Any) -> None:
    """Inputs keep the dtype of the stream, and outputs follow the network unless their dtype is given."""
    hparams = DERHParams(mem_size=30, mem_device="cpu", mem_dtype=mem_dtype)
    module = learner("pytorch", hparams, "float32").module
    outputs = {"auto": torch.float64, "float32": torch.float32}[mem_dtype]
    x, y, t, kept = module.double().contents
    assert [a.dtype for a in (x, y, t, kept)] == [torch.float32, torch.int32, torch.int32, outputs]
    module.to("meta")
    assert module.net.head.weight.device.type == "meta"
    assert {a.device.type for a in module.contents} == {"cpu"}


def test_auto_follows_the_module() -> None:
    module = learner("pytorch", DERHParams(mem_size=30), "float32").module.to("meta")
    assert {a.device.type for a in module.contents} == {"meta"}


# -- Flax


def test_a_step_with_host_memory_is_not_traced() -> None:
    made = learner("jax", ERHParams(mem_size=30, mem_device="cpu"))
    x, y, t = stream().tasks[0].train.take(np.arange(7))
    batch = Batch(x, y, t, made.planner.next(y, t))
    with pytest.raises(ValueError, match=r"mem_device=cpu .* cannot be traced; call it without jax.jit"):
        jax.jit(made.algorithm.train_step)(made.ts, made.state, batch)
    with pytest.raises(ValueError, match=r"no plan, .*algorithm.planner\(spec, state\)"):
        made.algorithm.train_step(made.ts, made.state, batch._replace(plan=()))


def test_steps_per_call_with_host_memory() -> None:
    hparams, net = ERHParams(mem_device="cpu"), sequel_flax.MLP((10,), 4)
    make = partial(sequel_flax.make_learner, hparams, net, sequel_flax.build_optimizer(OptimizerHParams()))
    with pytest.raises(
        ValueError, match=r"steps_per_call must be 1 with mem_device=cpu, .* got 8; leave it out"
    ):
        make(stream(), TrainingHParams(), steps_per_call=8)


TWO_DEVICES = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import sys
import jax
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_default_device", jax.devices()[1])
from tests.parity.test_placement import METHODS, SILENT, learner, memory, stream
from dataclasses import replace

for hparams in METHODS:
    made = learner("jax", replace(hparams, mem_device="cpu"))
    for task in stream().tasks:
        made.fit_task(task, SILENT)
        made.evaluate(task, "test")
    host, device = jax.devices()
    assert {d for leaf in jax.tree.leaves(memory(made)) for d in leaf.devices()} == {host}, hparams
    assert {d for leaf in jax.tree.leaves(made.ts) for d in leaf.devices()} == {device}, hparams
    print(hparams.name, float(sum(abs(a).sum() for a in made.weights().values())))
"""


@pytest.mark.slow
def test_two_devices() -> None:
    """The network is on the second of two devices, the memory on the first."""
    done = subprocess.run([sys.executable, "-c", TWO_DEVICES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sums = [float(line.split()[1]) for line in done.stdout.splitlines()]
    expected = [sum(abs(a).sum() for a in weights("jax", hparams).values()) for hparams in METHODS]
    assert sums == pytest.approx(expected, rel=1e-12)
