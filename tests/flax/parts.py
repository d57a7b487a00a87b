"""Shared by the tests of the Flax plug-in: short streams, user-defined modules, and a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict

from sequel_benchmarks import RotatedDigits, SplitDigits
from sequel_core.algorithms.agem import AGEMHParams
from sequel_core.algorithms.bic import BiCHParams
from sequel_core.algorithms.der import DERHParams
from sequel_core.algorithms.derpp import DERppHParams
from sequel_core.algorithms.er import ERHParams
from sequel_core.algorithms.er_ace import ERACEHParams
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.gdumb import GDumbHParams
from sequel_core.algorithms.gem import GEMHParams
from sequel_core.algorithms.icarl import ICaRLHParams
from sequel_core.algorithms.joint import JointHParams
from sequel_core.algorithms.kcl import KCLHParams
from sequel_core.algorithms.lamaml import LaMAMLHParams
from sequel_core.algorithms.lfl import LFLHParams
from sequel_core.algorithms.lwf import LwFHParams
from sequel_core.algorithms.mas import MASHParams
from sequel_core.algorithms.mcsgd import MCSGDHParams
from sequel_core.algorithms.mir import MIRHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.algorithms.si import SIHParams
from sequel_core.algorithms.stable_sgd import StableSGDHParams
from sequel_core.hparams import AlgorithmHParams, TrainingHParams
from sequel_core.runs.learner import FitMonitor
from sequel_core.stream import plan
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.benchmark import Benchmark, Scenario, StreamSpec
from sequel_core.stream.task import AnySplit, Batch, Task
from sequel_flax import ALGORITHMS, Algorithm, FlaxLearner, State

BATCH, STEPS = 8, 5
SILENT = FitMonitor(lambda progress: None, lambda: None)

EWC = EWCHParams(ewc_lambda=30, fisher_samples=20, lr_decay=0.8)
SI = SIHParams(si_lambda=2.0, xi=0.01)
MAS = MASHParams(mas_lambda=0.1, mas_samples=20)
LFL = LFLHParams(lfl_lambda=0.5)
KCL = KCLHParams(core_size=10, d_rn_f=16, task_given=True)  # one of each class
AGEM = AGEMHParams(mem_size=150, mem_batch_size=12)  # five of each class of each of three tasks
ER = ERHParams(mem_size=20, mem_batch_size=6)  # full within the first task
DER = DERHParams(mem_size=20, mem_batch_size=6, distance="mean")
DERPP = DERppHParams(mem_size=20, mem_batch_size=6, memory="class_balanced")
MCSGD = MCSGDHParams(per_task_memory_samples=10, lmc_batch_size=4, lmc_lr=0.1)
ONLINE = replace(MCSGD, lmc_policy="online")
LAMAML = LaMAMLHParams(mem_size=20, mem_batch_size=6, glances=2, sync_update=True, lr_alpha=0.05)
BIC = BiCHParams(mem_size=50, val_fraction=0)  # without a correction: no samples are set aside
GDUMB = GDumbHParams(mem_size=9, phase_epochs=2, phase_batch_size=4)
ICARL = ICaRLHParams(mem_size=50)  # one of each class of each of five tasks
EVERY: tuple[AlgorithmHParams, ...] = (
    NaiveHParams(lr_decay=0.8),
    JointHParams(),
    EWC,
    SI,
    MAS,
    LFL,
    LwFHParams(),
    KCL,
    StableSGDHParams(),
    AGEM,
    GEMHParams(mem_size=15),
    ER,
    ERACEHParams(mem_size=20, mem_batch_size=6),
    DER,
    DERPP,
    BIC,
    GDUMB,
    ICARL,
    MIRHParams(mem_size=20, mem_batch_size=4, num_candidates=8),
    MCSGD,
    ONLINE,
    LAMAML,
)
every_replay = pytest.mark.parametrize("hparams", [AGEM, ER, DER, DERPP], ids=lambda hparams: hparams.name)


class Net(nn.Module):
    """A user-defined compact module with tanh."""

    width: int = 12
    outputs: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.tanh(nn.Dense(self.width)(x.reshape((x.shape[0], -1))))
        return nn.Dense(self.outputs)(x)


class Layered(nn.Module):
    """The same module with setup and a layer `head`, which less-forgetting learning needs."""

    width: int = 12
    outputs: int = 10

    def setup(self) -> None:
        self.stem = nn.Dense(self.width)
        self.head = nn.Dense(self.outputs)

    def features(self, x: jax.Array, train: bool = False) -> jax.Array:
        return nn.tanh(self.stem(x.reshape((x.shape[0], -1))))

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        logits: jax.Array = self.head(self.features(x, train))
        return logits


NEED_FEATURES = ("lfl", "icarl", "kcl")


def user_model(hparams: AlgorithmHParams) -> nn.Module:
    return Layered() if hparams.name in NEED_FEATURES else Net()


@cache
def rotated(num_tasks: int = 3, validation: float = 0.0, subset: int = BATCH * STEPS + 3) -> Benchmark:
    """Rotated digits, five steps a task."""
    return RotatedDigits(num_tasks=num_tasks, subset=subset, validation=validation)


def stream_for(hparams: AlgorithmHParams, num_tasks: int = 3) -> Benchmark:
    """Return rotated digits; for KCL with enough samples of each class for its coreset, six steps a task."""
    return rotated(num_tasks, subset=63) if hparams.name == "kcl" else rotated(num_tasks)


@cache
def divided(scenario: Scenario) -> Benchmark:
    """Five pairs of digits, five steps a task."""
    return SplitDigits(num_tasks=5, scenario=scenario, subset=BATCH * STEPS + 3)


def settings(**changes: Any) -> TrainingHParams:
    return TrainingHParams(**{"batch_size": BATCH, **changes})


def sgd(learning_rate: Any = 0.1, momentum: float | None = 0.9) -> optax.GradientTransformation:
    return optax.inject_hyperparams(optax.sgd)(learning_rate=learning_rate, momentum=momentum)


def learner(
    hparams: AlgorithmHParams,
    benchmark: Benchmark | None = None,
    training: TrainingHParams | None = None,
    *,
    model: nn.Module | None = None,
    tx: optax.GradientTransformation | None = None,
    seed: int = 0,
    **options: Any,
) -> FlaxLearner:
    """Return a learner with a user-defined module and optimizer; `seed` is the seed of dropout."""
    return FlaxLearner(
        ALGORITHMS[hparams.name](hparams, seed=seed),
        model or user_model(hparams),
        tx or sgd(),
        (benchmark or rotated()).spec,
        training or settings(),
        **options,
    )


def initial_states(
    algorithm: Algorithm,
    spec: StreamSpec,
    *,
    model: nn.Module | None = None,
    tx: optax.GradientTransformation | None = None,
    seed: int = 0,
    dtype: str = "float32",
) -> tuple[TrainState, State]:
    """Return the train state and the state before the first task, as a user-defined loop creates them."""
    model = model or user_model(algorithm.hparams)
    image = np.zeros((1, *spec.image_shape), dtype)
    params = jax.tree.map(lambda p: p.astype(dtype), model.init(jax.random.key(seed), image)["params"])
    ts = algorithm.prepare(TrainState.create(apply_fn=model.apply, params=params, tx=tx or sgd()), spec)
    return ts, algorithm.init(ts, spec)


def batches(task: Task, training: TrainingHParams, split: AnySplit | None = None) -> Iterable[Batch]:
    """Yield the batches of a task, or those of another split."""
    split = task.train if split is None else split
    for epoch in range(training.epochs(task.index)):
        for rows in plan.epoch_batches(training.seed, task.index, epoch, len(split), training.batch_size):
            yield Batch(*split.take(rows))


def user_loop(
    algorithm: Algorithm,
    benchmark: Benchmark,
    training: TrainingHParams,
    tx: optax.GradientTransformation,
    *,
    spec: StreamSpec | None = None,
    images: Callable[[Any], Any] = lambda x: x,
    **jit: Any,
) -> tuple[TrainState, State, list[float]]:
    """Train in a plain loop; return the train state, the state and the loss of every step.

    `images` converts the images of a batch, and `spec` gives their dtype.
    """
    spec = spec or benchmark.spec
    ts, state = initial_states(algorithm, spec, tx=tx, seed=training.seed, dtype=training.dtype)
    planner = algorithm.planner(spec, state)
    step = jax.jit(algorithm.train_step, **jit)
    losses = []
    for task in algorithm.hparams.training_tasks(benchmark, training.seed):
        split = algorithm.training_split(state, task.train)
        ts, state = algorithm.start_task(ts, state, task)
        for x, y, t, _ in batches(task, training, split):
            ts, state, outputs = step(ts, state, Batch(images(x), y, t, planner.next(y, t)))
            losses.append(float(outputs["loss"]))
        order = plan.consolidation_batches(training.seed, task, training.batch_size)
        ts, state = algorithm.end_task(ts, state, (Batch(*samples) for samples in order))
    return ts, state, losses


def flat(params: Any) -> dict[str, FloatArray]:
    return {k: np.asarray(v) for k, v in flatten_dict(jax.device_get(params), sep="/").items()}


def same(a: Mapping[str, FloatArray], b: Mapping[str, FloatArray]) -> bool:
    """Return whether two sets of weights are bit-identical."""
    assert a.keys() == b.keys()
    return all(np.array_equal(a[k], b[k]) for k in a)
