"""Trains on all devices and on one, and prints how they differ: `python -m tests.flax.sharded STEPS NAME...`.

`JAX_PLATFORMS=cpu` and `XLA_FLAGS=--xla_force_host_platform_device_count=4` give a CPU four devices.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax import monitoring
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.kcl import KCLHParams
from sequel_core.hparams import AlgorithmHParams, OptimizerHParams, TrainingHParams
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.task import Batch
from sequel_core.testing.parity import SILENT, WIDTHS
from sequel_core.testing.streams import table
from sequel_flax import MLP, FlaxLearner, make_learner, run_together
from sequel_flax.backbones import BatchNorm
from sequel_flax.evaluation import as_batch
from sequel_flax.sharding import sharded
from tests.parity.cases import CASES

BATCH = 12
METHODS: dict[str, AlgorithmHParams] = {hparams.name: hparams for hparams, _ in reversed(CASES)}
METHODS["kcl"] = KCLHParams(task_given=True, core_size=12, d_rn_f=64, tau=0.1, lmd=10)  # 3 of each class
COMPILED: Counter[str] = Counter()


class Normalised(nn.Module):
    """A network with batch normalisation."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return logits."""
        hidden = BatchNorm()(nn.Dense(16, use_bias=False)(x), use_running_average=not train)
        return nn.Dense(self.num_classes)(nn.relu(hidden))


def learner(
    hparams: AlgorithmHParams, stream: Benchmark, devices: int | Mesh, seed: int = 3, **options: Any
) -> FlaxLearner:
    """Return a learner with batches of 12 on all devices together."""
    training = TrainingHParams(batch_size=BATCH, dtype="float64", seed=seed)
    optimizer = OptimizerHParams(lr=0.02, momentum=0.9)
    model = options.pop("model", MLP(WIDTHS, stream.num_classes))
    return make_learner(hparams, model, optimizer, stream, training, devices=devices, **options)


def trained(hparams: AlgorithmHParams, stream: Benchmark, devices: int, **options: Any) -> dict[str, Any]:
    """Return what three tasks end with: trees, the matrix, and the compilations of the step."""
    COMPILED.clear()
    made = learner(hparams, stream, devices, **options)
    matrix = []
    for task in made.hparams.training_tasks(stream, made.training.seed):
        made.fit_task(task, SILENT)
        matrix.append([made.evaluate(other, "test").score for other in stream.tasks])
    return {**ended(made.ts, made.state), "matrix": matrix, "learner": made}


def own_loop(stream: Benchmark, mesh: Mesh) -> dict[str, Any]:
    """Return what a loop ends with that compiles the step of ER with shardings of its own."""
    COMPILED.clear()
    made = learner(METHODS["er"], stream, 1)
    algorithm, planner = made.algorithm, made.planner
    rows, copies = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    options: Any = {"in_shardings": (copies, copies, None), "out_shardings": (copies, copies, None)}
    step = jax.jit(algorithm.train_step, **options)
    ts, state = jax.device_put((made.ts, made.state), copies)
    for task in stream.tasks:
        batches = [
            as_batch(task.train.take(np.arange(k, k + BATCH))) for k in range(0, len(task.train), BATCH)
        ]
        ts, state = jax.device_put(algorithm.start_task(ts, state, task), copies)
        for x, y, t, _ in batches:
            plan = planner.next(y, t)
            x, y, t = jax.device_put((x, y, t), rows)
            ts, state, _ = step(ts, state, Batch(x, y, t, plan))
        ts, state = jax.device_put(algorithm.end_task(ts, state, batches), copies)
    return ended(ts, state, "train_step")


def replayed(stream: Benchmark, devices: int) -> set[bytes]:
    """Return the distinct samples that the devices replay, each from its own copy of the memory of ER."""
    made: Any = learner(METHODS["er"], stream, devices, steps_per_call=1)
    samples: set[bytes] = set()
    train = made._train

    def counted(running: Any, batch: Batch, steps: int) -> Any:
        reads = jax.device_put(sharded(batch, made.mesh).plan.reads)
        memory = made.state.memory.x
        contents = {shard.device: np.asarray(shard.data) for shard in memory.addressable_shards}
        for shard in reads.addressable_shards:
            slots = np.asarray(shard.data).ravel()
            samples.update(x.tobytes() for x in contents[shard.device][slots[slots < len(memory)]])
        return train(running, batch, steps)

    made._train = counted
    for task in stream.tasks:
        made.fit_task(task, SILENT)
    return samples


def together(stream: Benchmark, devices: int | Mesh) -> dict[str, Any]:
    """Return what four runs at once of EWC end with; a mesh has two groups of two devices."""
    COMPILED.clear()
    settings = [(strength, seed) for strength in (1, 20) for seed in (0, 1)]
    made = [
        learner(EWCHParams(ewc_lambda=strength, fisher_samples=20), stream, devices, seed)
        for strength, seed in settings
    ]
    with TemporaryDirectory() as folder:
        results = run_together(made, stream, [Path(folder) / str(k) for k in range(4)], progress=False)
    failures = [result for result in results if isinstance(result, Exception)]
    if failures:
        raise failures[0]
    return ended([one.ts for one in made], [one.state for one in made])


def ended(ts: Any, state: Any, *steps: str) -> dict[str, Any]:
    """Return the trees at the end, and how often a step was compiled."""
    names = steps or ("_traced_loop", "_traced_step")
    compiled = sum(COMPILED[f"jit({name})"] for name in names)
    return {"trees": jax.device_get({"weights": ts, "state": state}), "compiled": compiled}


def difference(a: Any, b: Any) -> float:
    """Return the greatest |a - b| / |b| of an array of two trees."""
    gaps = [0.0]
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        left, right = np.asarray(x, float), np.asarray(y, float)
        gaps.append(float(np.linalg.norm(left - right) / (np.linalg.norm(right) or 1)))
    return max(gaps)


def copies_differ(made: FlaxLearner) -> int:
    """Return the number of arrays of which the devices have different copies."""
    differ = 0
    for leaf in jax.tree.leaves((made.ts, made.state)):
        first, *others = (np.asarray(shard.data) for shard in leaf.addressable_shards)
        differ += any(not np.array_equal(first, other, equal_nan=first.dtype.kind == "f") for other in others)
    return differ


def count_compilations() -> None:
    """Count what JAX compiles from now on."""

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            COMPILED[str(kwargs["fun_name"])] += 1

    monitoring.register_event_duration_secs_listener(listen)


def main(steps: int, *names: str) -> None:
    """Print a line of JSON for each method."""
    jax.config.update("jax_enable_x64", True)
    count_compilations()
    stream = table("classes", train=steps * BATCH)
    for name in names or METHODS:
        if name == "replayed":
            sets = [replayed(stream, devices) for devices in (1, jax.device_count())]
            print(json.dumps({"distinct": [*map(len, sets)], "same": sets[0] == sets[1]}), flush=True)
            continue
        one, all_devices = both(name, stream)
        gaps = {key: difference(all_devices["trees"][key], tree) for key, tree in one["trees"].items()}
        report = {"method": name, **gaps, "compiled": [one["compiled"], all_devices["compiled"]]}
        if "learner" in one:
            report["same_matrix"] = all_devices["matrix"] == one["matrix"]
            report["copies_differ"] = copies_differ(all_devices["learner"])
            report["devices"] = all_devices["learner"].num_devices
        print(json.dumps(report), flush=True)


def both(name: str, stream: Benchmark) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what one device ends with, and what all devices end with."""
    devices = np.array(jax.devices())
    if name == "own_loop":
        return own_loop(stream, Mesh(devices[:1], ("data",))), own_loop(stream, Mesh(devices, ("data",)))
    if name == "together":
        return together(stream, 1), together(stream, Mesh(devices.reshape(2, -1), ("runs", "data")))
    options = {"model": Normalised(stream.num_classes)} if name == "batch_norm" else {}
    hparams = METHODS.get(name, METHODS["er"])
    return trained(hparams, stream, 1, **options), trained(hparams, stream, len(devices), **options)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
