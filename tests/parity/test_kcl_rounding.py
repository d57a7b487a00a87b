"""KCL in both frameworks on long runs: the same computation, which amplifies rounding errors.

If lambda is near 0, a difference of the weights doubles every few steps. Two runs of one framework that start
with weights which differ in the last bits part as fast as the two frameworks do, and from the same weights a
step of the two agrees to rounding.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import unflatten_dict

import sequel_flax
import sequel_lightning
from sequel_benchmarks import RotatedDigits
from sequel_core.algorithms.kcl import KCLHParams
from sequel_core.hparams import OptimizerHParams, TrainingHParams
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.benchmark import Benchmark
from sequel_core.testing.parity import SILENT, difference
from sequel_flax.hooks import Hook

Weights = dict[str, FloatArray]

BATCH, SEED, EPSILON = 7, 3, 1e-15
RFF = KCLHParams(core_size=20, d_rn_f=64, tau=0.1, task_given=True)
RBF = KCLHParams(core_size=20, kernel_type="rbf", bandwidth=0.7, task_given=True)


class Keep(Hook):
    """Appends the weights after every step to a list."""

    def __init__(self, kept: list[Weights]) -> None:
        super().__init__()
        self.kept = kept

    def after_step(self, ts: Any, *others: Any) -> None:
        self.kept.append(flat(ts.params))


def flat(params: Any) -> Weights:
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(params))
    return {"/".join(k.key for k in path): np.array(leaf) for path, leaf in leaves}


def named_as_flax(module: Any) -> dict[str, torch.Tensor]:
    """Return the parameters by their names in Flax; kernels are transposed."""
    return {
        (f"{name}/" if name else "") + k.replace(".", "/").replace("weight", "kernel"): p
        for name, part in module.trained().items()
        for k, p in part.named_parameters()
    }


def learner(mode: str, hparams: KCLHParams, stream: Benchmark, momentum: float, *watchers: Any) -> Any:
    optimizer = OptimizerHParams(lr=0.1, momentum=momentum)
    training = TrainingHParams(batch_size=BATCH, dtype="float64", seed=SEED)
    if mode == "jax":
        tx = sequel_flax.build_optimizer(optimizer)
        return sequel_flax.make_learner(
            hparams, sequel_flax.MLP((32, 24), 10), tx, stream, training, steps_per_call=1, hooks=watchers
        )
    net = sequel_lightning.MLP((32, 24), 10, image_shape=stream.image_shape)
    factory = sequel_lightning.build_optimizer(optimizer)
    return sequel_lightning.make_learner(hparams, net, factory, stream, training, callbacks=watchers)


def start_from(learner: Any, weights: Weights) -> None:
    if learner.mode == "jax":
        params = unflatten_dict({k: jnp.asarray(v) for k, v in weights.items()}, sep="/")
        learner.ts = learner.ts.replace(params=params)
        return
    with torch.no_grad():
        for path, p in named_as_flax(learner.module).items():
            p.copy_(torch.tensor(weights[path].T if path.endswith("kernel") else weights[path]))


def trajectory(
    mode: str, hparams: KCLHParams, stream: Benchmark, tasks: int, relative: float = 0.0
) -> list[Weights]:
    """Return the weights after each step on the first tasks, from initial weights that are off by so much."""
    kept: list[Weights] = []
    if mode == "jax":
        watcher: Any = Keep(kept)
    else:
        from pytorch_lightning.callbacks import LambdaCallback  # torchvision is mended by now

        watcher = LambdaCallback(on_train_batch_end=lambda *_: kept.append(run.weights()))
    run = learner(mode, hparams, stream, 0.8, watcher)
    signs = np.random.default_rng(0)
    start_from(
        run, {k: v * (1 + relative * signs.choice([-1.0, 1.0], v.shape)) for k, v in run.weights().items()}
    )
    for task in islice(hparams.training_tasks(stream, SEED), tasks):
        run.fit_task(task, SILENT)
    return kept


@pytest.mark.parametrize(
    ("hparams", "tasks", "subset"),
    [
        pytest.param(RFF, 1, 20 + 62 * BATCH, id="rff"),
        pytest.param(RFF, 3, None, marks=pytest.mark.slow, id="rff, three tasks"),
        pytest.param(RBF, 3, None, marks=pytest.mark.slow, id="rbf, three tasks"),
    ],
)
def test_the_frameworks_part_as_fast_as_runs_that_differ_in_the_last_bits(
    hparams: KCLHParams, tasks: int, subset: int | None
) -> None:
    stream = RotatedDigits(num_tasks=5, subset=subset)
    flax, torch_ = (trajectory(mode, hparams, stream, tasks) for mode in ("jax", "pytorch"))
    off = trajectory("jax", hparams, stream, tasks, EPSILON)
    across = np.array([difference(a, b) for a, b in zip(torch_, flax, strict=True)])
    within = np.array([difference(a, b) for a, b in zip(off, flax, strict=True)])
    assert across[0] < 1e-13
    assert within[61] > 1e6 * within[0]
    assert (across / within).min() > 0.01
    assert (across / within).max() < 100

    steps = [learner(mode, hparams, stream, 0.0) for mode in ("jax", "pytorch")]
    points = flax[:: len(flax) // 4]
    for task, point in zip(hparams.training_tasks(stream, SEED), points, strict=True):
        weights = point | {"kcl/lmd": np.full(5, point["kcl/lmd"][0])}
        moves = []
        for step in steps:
            start_from(step, weights)
            step.fit_task(replace(task, train=task.train.pick(np.arange(BATCH))), SILENT)
            moves.append({k: v - weights[k] for k, v in step.weights().items()})
        assert max(np.abs(v).max() for v in moves[0].values()) > 1e-3
        assert difference(*moves) < 1e-12
