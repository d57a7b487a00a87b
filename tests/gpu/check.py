"""Trains on a GPU and on the CPU, in both modes, and compares the weights: `python -m tests.gpu.check`.

Two tasks of 60 steps in float64. A memory is on the GPU (auto), then in host memory (cpu). Each line has the
greatest relative difference of a weight matrix between the devices, which must be below 1e-9. With several
GPUs, JAX divides the batches among them, too.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch uses the same GPU

import jax
import numpy as np
import torch
from jax.sharding import Mesh

import sequel_flax
import sequel_lightning
from sequel_core.algorithms.agem import AGEMHParams
from sequel_core.algorithms.derpp import DERppHParams
from sequel_core.algorithms.er import ERHParams
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.hparams import AlgorithmHParams, OptimizerHParams, TrainingHParams
from sequel_core.runs.learner import FitMonitor
from sequel_core.testing.streams import table

STEPS, BATCH, BAR = 60, 7, 1e-9
SILENT = FitMonitor(on_progress=lambda progress: None, on_evaluate=lambda: None)
METHODS: list[AlgorithmHParams] = [
    ERHParams(mem_size=50, mem_batch_size=9),
    DERppHParams(mem_size=50, mem_batch_size=9),
    EWCHParams(ewc_lambda=20, fisher_samples=101),
    AGEMHParams(mem_size=60, mem_batch_size=20),
]


def trained(
    mode: str, hparams: AlgorithmHParams, device: str, batch_size: int = BATCH, shared: int = 1
) -> Any:
    """Return a learner after two tasks on a device, `cpu` or `gpu`; with JAX, `shared` ones share a batch."""
    stream = table("classes", train=STEPS * batch_size)
    training = TrainingHParams(batch_size=batch_size, dtype="float64", seed=3)
    optimizer = OptimizerHParams(lr=0.05)
    context: AbstractContextManager[Any] = nullcontext()
    learner: Any
    if mode == "jax":
        context = jax.default_device(jax.devices(device)[0])
    with context:
        if mode == "jax":
            tx = sequel_flax.build_optimizer(optimizer)
            mesh = Mesh(np.array(jax.devices(device)[:shared]), ("data",))
            devices: Any = {"devices": mesh} if shared > 1 else {}
            learner = sequel_flax.make_learner(
                hparams, sequel_flax.MLP((32, 24), 4), tx, stream, training, **devices
            )
        else:
            net = sequel_lightning.MLP((32, 24), 4, image_shape=stream.spec.x.shape).double()
            factory = sequel_lightning.build_optimizer(optimizer)
            trainer = {"accelerator": device, "devices": 1}
            learner = sequel_lightning.make_learner(hparams, net, factory, stream, training, trainer=trainer)
        for task in stream.tasks[:2]:
            learner.fit_task(task, SILENT)
            learner.evaluate(task, "test")
    return learner


def places(mode: str, learner: Any) -> tuple[set[str], set[str]]:
    """Return the types of the devices of the weights and of the memory, which is empty for EWC."""
    if mode == "jax":
        state = learner.state.memory
        memory = state if hasattr(state, "t") else ()
        trees = (jax.tree.leaves(tree) for tree in (learner.ts.params, memory))
        weights, samples = ({d.platform for leaf in leaves for d in leaf.devices()} for leaves in trees)
        return weights, samples
    module = learner.module
    memory = dict(module.named_buffers(prefix="")).items()
    samples = {b.device.type for name, b in memory if name.startswith("memory.")}
    return {p.device.type for p in module.net.parameters()}, samples


def difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Return the greatest relative difference of an array, |a - b| / |b|."""
    return max(float(np.linalg.norm(a[k] - b[k]) / (np.linalg.norm(b[k]) or 1)) for k in b)


def main() -> int:
    """Print a line for each run; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    device = parser.parse_args().device
    jax.config.update("jax_enable_x64", True)
    print("torch", torch.__version__, "jax", jax.__version__, jax.devices(device)[0].device_kind, flush=True)
    failed = False
    for mode in ("pytorch", "jax"):
        for hparams in METHODS:
            on_cpu = trained(mode, hparams, "cpu").weights()
            for placement in ("auto", "cpu") if hasattr(hparams, "mem_device") else ("none",):
                start = time.perf_counter()
                settings = hparams if placement == "none" else replace(hparams, mem_device=placement)  # type: ignore[call-arg]
                learner = trained(mode, settings, device)
                largest = difference(learner.weights(), on_cpu)
                weights, samples = places(mode, learner)
                on_device = "cpu" not in weights or device == "cpu"
                placed = samples == ({"none": set(), "auto": weights, "cpu": {"cpu"}}[placement])
                passed = largest < BAR and on_device and placed
                failed |= not passed
                print(
                    f"{mode:8s} {hparams.name:6s} memory={placement:5s} difference={largest:.1e} "
                    f"weights on {weights}, memory on {samples or 'nothing'} "
                    f"{time.perf_counter() - start:.1f} s {'ok' if passed else 'FAILED'}",
                    flush=True,
                )
    return int(sharding_failed(device) or failed)


def sharding_failed(device: str) -> bool:
    """Print a line for each method that JAX trains on all devices; return whether one failed."""
    count = len(jax.devices(device))
    failed = False
    for hparams in METHODS if count > 1 else ():
        one, several = (trained("jax", hparams, device, 4 * count, shared).weights() for shared in (1, count))
        passed = (largest := difference(several, one)) < BAR
        failed |= not passed
        verdict = "ok" if passed else "FAILED"
        print(f"jax      {hparams.name:6s} {count} devices difference={largest:.1e} {verdict}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
