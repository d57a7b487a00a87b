"""The hand-written loops are frozen, and end with the weights of the learners."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict

from sequel_core.hparams import AlgorithmHParams, MemoryHParams, OptimizerHParams, TrainingHParams
from sequel_core.runs.learner import Mode
from sequel_core.stream import plan
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.memory import MemoryPlanner, StepPlan
from sequel_core.stream.task import Samples, Task
from sequel_core.testing.parity import difference
from sequel_flax import MLP as FlaxMLP
from sequel_lightning import MLP
from sequel_lightning.backbones import canonical_weights
from sequel_lightning.data import as_batch
from tests.speed import loops_flax, loops_lightning
from tests.speed.bench import RATE, SILENT, WIDTHS, settings, stream

FROZEN = {
    "loops_flax.py": "3fcd324ee870a31dd95ebeac0a0437e645f7e37a974c48404716b4ac0f9630f7",
    "loops_lightning.py": "30be1b16e64db84311a2ef0c8630bafc121e1345b81ad08daa280fd8b6c90519",
}
"""SHA-256 of the files. A faster loop is a new baseline: measure everything again before you change these."""

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("naive", {}),
    ("ewc", {"ewc_lambda": 1.0}),
    ("si", {"si_lambda": 0.5}),
    ("er", {}),
    ("der", {}),
    ("derpp", {}),
    ("agem", {}),
]
"""Settings with which importances of 1 have the penalty of the loops, which have no factor."""

SIZE, STEPS = 10, 20
SMALL: dict[str, Any] = {"mem_size": 100, "mem_batch_size": SIZE}


@pytest.mark.parametrize("name", FROZEN)
def test_the_loops_are_frozen(name: str) -> None:
    text = Path(__file__).with_name(name).read_bytes()
    assert hashlib.sha256(text).hexdigest() == FROZEN[name]


def batches(task: Task) -> list[Samples]:
    return [task.train.take(rows) for rows in plan.epoch_batches(0, task.index, 0, len(task.train), SIZE)]


def second_task(hparams: AlgorithmHParams, benchmark: Benchmark) -> tuple[list[Samples], list[StepPlan]]:
    """Return the batches of the second task, and what the memory writes and reads at each of them."""
    first, second = map(batches, benchmark.tasks)
    if not isinstance(hparams, MemoryHParams):
        return second, []
    draws = 2 if hparams.name == "derpp" else 1
    planner = MemoryPlanner(hparams, benchmark.spec, 0, draws, past_only=hparams.name == "agem")
    plans = [planner.next(batch.y, batch.t) for batch in [*first, *second]]
    return second, plans[len(first) :]


def by_jax(learner: Any, benchmark: Benchmark, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Train the learner's loop on the second task; return its weights."""
    samples, plans = second_task(learner.hparams, benchmark)
    step, params, kept = loops_flax.hand_written(learner, benchmark.normalisation, samples[0])
    if plans:
        memory = learner.state.memory
        stored = {"x": memory.x, "y": memory.y, "logits": memory.outputs}
        kept |= {name: a for name, a in stored.items() if a is not None}

    def read(kept: Any, draw: int, count: int) -> Any:
        slots = kept["reads"][draw - 1]
        assert len(slots) == count
        return kept["x"][slots], kept["y"][slots], kept["logits"][slots] if len(kept["logits"]) > 1 else None

    def write(kept: Any, **batch: Any) -> Any:
        return kept | {k: kept[k].at[kept["write"]].set(a, mode="drop") for k, a in batch.items()}

    patch.setattr(loops_flax, "read", read)
    patch.setattr(loops_flax, "write", write)
    compiled = jax.jit(step)
    for k, batch in enumerate(samples):
        slots = {"reads": plans[k].reads, "write": plans[k].write} if plans else {}
        params, kept, _ = compiled(params, {**kept, **slots}, batch.x, batch.y.astype(np.int32))
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(jax.device_get(params), sep="/").items()}


def by_pytorch(learner: Any, benchmark: Benchmark, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Train the learner's loop on the second task; return its weights."""
    samples, plans = second_task(learner.hparams, benchmark)
    loop: Any = loops_lightning.hand_written(learner, benchmark.normalisation, samples[0])
    optimizer = loop.configure_optimizers()
    if plans:
        memory = learner.module.state
        loop.memory = [a.clone() for a in (memory.x, memory.y.long(), memory.outputs) if a is not None]
    for k, batch in enumerate(samples):
        if plans:
            reads = iter(plans[k].reads)

            def read(count: int, reads: Any = reads) -> list[Any]:
                slots = torch.from_numpy(next(reads).astype(np.int64))
                assert len(slots) == count
                samples = [a[slots] for a in loop.memory]
                return [*samples, None][:3]

            def write(*new: Any, slots: Any = plans[k].write) -> None:
                kept = np.flatnonzero(slots < len(loop.memory[1]))
                for a, b in zip(loop.memory, new, strict=False):
                    a[slots[kept]] = b[kept]

            loop.read, loop.write = read, write
        loops_lightning.plain_step(loop, optimizer, as_batch(batch)[:2])
    return dict(canonical_weights(loop.net))


def make_learner(hparams: AlgorithmHParams, mode: Mode, benchmark: Benchmark) -> Any:
    loops: Any = {"pytorch": loops_lightning, "jax": loops_flax}[mode]
    net: Any = FlaxMLP(WIDTHS, benchmark.num_classes)
    if mode == "pytorch":
        net = MLP(WIDTHS, num_classes=benchmark.num_classes, image_shape=benchmark.image_shape)
    optimizer = loops.build_optimizer(OptimizerHParams(lr=RATE))
    return loops.make_learner(hparams, net, optimizer, benchmark, TrainingHParams(batch_size=SIZE))


def set_importances_to_one(learner: Any, mode: Mode) -> None:
    if mode == "jax":
        ones = jax.tree.map(np.ones_like, learner.ts.params)
        memory = learner.state.memory._replace(importance=ones)
        learner.state = learner.state._replace(memory=memory)
    else:
        importance = learner.module.importance
        importance.set({name: torch.ones_like(a) for name, a in importance.get().items()})


CASES = [
    pytest.param(algo, chosen, mode, id=f"{algo}-{mode}", marks=marks)
    for algo, chosen in METHODS
    for mode, marks in (("pytorch", ()), ("jax", () if algo == "er" else pytest.mark.slow))
]


@pytest.mark.parametrize(("algo", "chosen", "mode"), CASES)
def test_the_loops_end_with_the_weights_of_the_learners(
    algo: str, chosen: dict[str, Any], mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The random choices of the memory are those of the plan."""
    hparams = settings(algo, SIZE)
    hparams = replace(hparams, **chosen, **(SMALL if isinstance(hparams, MemoryHParams) else {}))
    benchmark = stream(hparams, SIZE * STEPS)
    first, second = benchmark.tasks
    learner = make_learner(hparams, mode, benchmark)
    learner.fit_task(first, SILENT)
    if algo in ("ewc", "si"):
        set_importances_to_one(learner, mode)
    train = by_jax if mode == "jax" else by_pytorch
    loop = train(learner, benchmark, monkeypatch)
    learner.fit_task(second, SILENT)
    assert difference(loop, learner.weights()) < 1e-5
    if algo != "naive":
        naive = make_learner(settings("naive", SIZE), mode, benchmark)
        for task in benchmark.tasks:
            naive.fit_task(task, SILENT)
        assert difference(loop, naive.weights()) > 1e-4
