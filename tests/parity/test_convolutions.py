"""Whole runs of convolutional networks end with the same weights and running statistics in both frameworks.

On real CIFAR-10 where it is, else on random colour images: float64, two tasks, the real learners.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

import sequel_flax
import sequel_lightning
from sequel_benchmarks import DataSet, SplitDigits, SplitSettings, split
from sequel_benchmarks.data import available, load
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
from sequel_core.backbones import BACKBONES, BackboneHParams
from sequel_core.hparams import AlgorithmHParams, OptimizerHParams, TrainingHParams
from sequel_core.runs.learner import Learner
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.benchmark import Benchmark, Scenario
from sequel_core.testing.parity import SILENT, difference

SGD = OptimizerHParams(lr=0.02, momentum=0.5)
TRAINING = TrainingHParams(batch_size=6, dtype="float64", seed=3, eval_batch_size=25)
CNN = BACKBONES["cnn"]
THIN = BACKBONES["resnet18_thin"]

NETWORKS: dict[str, BackboneHParams] = {
    "cnn": CNN(channels=(6, 8), linear_widths=(16,), stride=1, max_pool=True, activation="gelu"),  # type: ignore[call-arg]
    "cnn batch": CNN(channels=(6, 8), linear_widths=(), norm="batch"),  # type: ignore[call-arg]
    "cnn group": CNN(channels=(6, 8), norm="group", norm_groups=2, kernel_size=5),  # type: ignore[call-arg]
    "thin batch": THIN(),
    "thin group": THIN(norm="group"),  # type: ignore[call-arg]
}

METHODS: list[AlgorithmHParams] = [
    NaiveHParams(),
    EWCHParams(ewc_lambda=20, fisher_samples=15),
    ERHParams(mem_size=20, mem_batch_size=7),
    DERppHParams(mem_size=20, mem_batch_size=7),
    SIHParams(si_lambda=0.3),
    MASHParams(mas_lambda=0.01, mas_samples=15),
    LFLHParams(lfl_lambda=0.1),
    AGEMHParams(mem_size=20, mem_batch_size=7),
    GDumbHParams(mem_size=20, phase_epochs=4, phase_batch_size=6),
    BiCHParams(mem_size=40, phase_epochs=4, phase_batch_size=6),
    MCSGDHParams(mem_size=20, lmc_line_samples=3, lmc_batch_size=8),
    LaMAMLHParams(mem_size=20, mem_batch_size=7, n_inner_updates=2, glances=2),
    ICaRLHParams(mem_size=20),
    KCLHParams(core_size=10, d_rn_f=32, tau=0.1, lmd=10),
    JointHParams(),
    StableSGDHParams(lr_decay=0.7),
    DERHParams(mem_size=20, mem_batch_size=7),
    ERACEHParams(mem_size=20, mem_batch_size=7),
    LwFHParams(lwf_lambda=2, temperature=1),
    MIRHParams(mem_size=20, mem_batch_size=7, num_candidates=12),
    GEMHParams(mem_size=20),
]

QUICK = {"cnn batch": {"ewc", "icarl"}, "cnn group": {"derpp"}}
"""What runs by default; the rest is `slow`."""


@cache
def stream(scenario: Scenario = "class") -> Benchmark:
    """Two tasks of five classes, 36 training images of 32x32 each, augmented, and about 100 test images."""
    if available("cifar10"):
        data = load("cifar10")
        data = replace(data, test_images=data.test_images[:200], test_labels=data.test_labels[:200])
    else:
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (2, 200, 32, 32, 3), dtype=np.uint8)
        labels = np.arange(200) % 10
        data = DataSet("noise", images[0], labels, images[1], labels, 10)
    return split(data, SplitSettings(2, scenario, subset=36, crop_padding=3, horizontal_flip=True))


def stream_of(hparams: AlgorithmHParams) -> Benchmark:
    """Return the stream in a scenario in which the method runs."""
    return stream("task" if isinstance(hparams, KCLHParams) else "class")


def learners(
    hparams: AlgorithmHParams, network: str, benchmark: Benchmark, training: TrainingHParams = TRAINING
) -> list[Learner]:
    backbone = NETWORKS[network]
    settings: dict[str, Any] = {**backbone.arguments(), "num_classes": benchmark.num_classes}
    shape = benchmark.image_shape
    theirs = sequel_lightning.backbones.BACKBONES[backbone.type](**settings, image_shape=shape)
    factory = sequel_lightning.build_optimizer(SGD)
    ours = sequel_flax.backbones.BACKBONES[backbone.type](**settings)
    tx = sequel_flax.build_optimizer(SGD)
    return [
        sequel_lightning.make_learner(hparams, theirs, factory, benchmark, training),
        sequel_flax.make_learner(hparams, ours, tx, benchmark, training),
    ]


def trained(learner: Learner) -> dict[str, FloatArray]:
    for task in learner.hparams.training_tasks(stream_of(learner.hparams), learner.training.seed):
        learner.fit_task(task, SILENT)
    return learner.weights()


CASES = [
    pytest.param(
        method,
        network,
        id=f"{network}-{method.name}",
        marks=[] if method.name in QUICK.get(network, ()) else [pytest.mark.slow],
    )
    for network in NETWORKS
    for method in METHODS
    if not ("batch" in network and method.name in ("mcsgd", "lamaml"))
]


@pytest.mark.parametrize(("hparams", "network"), CASES)
def test_same_weights_and_running_statistics(hparams: AlgorithmHParams, network: str) -> None:
    torch_, flax_ = learners(hparams, network, stream_of(hparams))
    before = flax_.weights()
    assert difference(torch_.weights(), before) == 0
    ends = [trained(learner) for learner in (torch_, flax_)]
    assert difference(*ends) < 1e-8
    statistics = {name for name in before if name.endswith(("/mean", "/var"))}
    assert bool(statistics) == ("batch" in network)
    assert all(difference({n: ends[0][n]}, {n: before[n]}) > 1e-3 for n in statistics if n.endswith("/mean"))
    first = stream().tasks[0]
    (one, two) = (learner.evaluate(first, "test") for learner in (torch_, flax_))
    assert one.score == two.score
    np.testing.assert_allclose(one.loss, two.loss, rtol=1e-8)


SIZES: dict[str, Any] = {"mem_size": 50, "mem_batch_size": 9}
LONG: list[AlgorithmHParams] = [
    LwFHParams(lwf_lambda=2, temperature=1),
    LwFHParams(distillation="sigmoid"),
    ERACEHParams(**SIZES),
    ERACEHParams(**SIZES, classes="unseen"),
    MIRHParams(**SIZES, num_candidates=20),
    MIRHParams(**SIZES, num_candidates=20, loss="sum"),
    GEMHParams(mem_size=60),
    GEMHParams(mem_size=60, margin_rule="bound", ridge=0.001),
    BiCHParams(mem_size=60, phase_epochs=4, phase_batch_size=6),
    BiCHParams(mem_size=60, phase_epochs=3, val_fraction=0.3, temperature=1),
    GDumbHParams(mem_size=60, phase_epochs=6),
    GDumbHParams(mem_size=60, phase_epochs=6, memory="reservoir", phase_lr=0.02),
]


@pytest.mark.slow
@pytest.mark.parametrize("hparams", LONG, ids=lambda hparams: hparams.name)
def test_same_weights_after_three_tasks_of_200_steps(hparams: AlgorithmHParams) -> None:
    digits = SplitDigits(num_tasks=5, scenario="class")
    ends = []
    for learner in learners(hparams, "cnn", digits, replace(TRAINING, batch_size=7, epochs_per_task=5)):
        for task in list(hparams.training_tasks(digits, TRAINING.seed))[:3]:
            learner.fit_task(task, SILENT)
        assert learner.step >= 600
        ends.append(learner.weights())
    assert difference(*ends) < 1e-10
