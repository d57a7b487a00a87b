"""The runs that the references and both plug-ins are compared on, and the references' results."""

from __future__ import annotations

from dataclasses import MISSING, fields, replace
from functools import cache
from typing import Any, NamedTuple

import pytest

from sequel_benchmarks import RotatedDigits, SplitDigits
from sequel_core.algorithms.agem import AGEMHParams
from sequel_core.algorithms.der import DERHParams
from sequel_core.algorithms.derpp import DERppHParams
from sequel_core.algorithms.er import ERHParams
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.icarl import ICaRLHParams
from sequel_core.algorithms.joint import JointHParams
from sequel_core.algorithms.kcl import KCLHParams
from sequel_core.algorithms.lamaml import LaMAMLHParams
from sequel_core.algorithms.lfl import LFLHParams
from sequel_core.algorithms.mas import MASHParams
from sequel_core.algorithms.mcsgd import MCSGDHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.algorithms.si import SIHParams
from sequel_core.algorithms.stable_sgd import StableSGDHParams
from sequel_core.hparams import AlgorithmHParams, OptimizerHParams, TrainingHParams
from sequel_core.stream.benchmark import Benchmark
from tests.reference.algorithms import reference
from tests.reference.network import Weights
from tests.reference.streams import Reference, Stage

WIDTHS = (16, 12)
SGD = OptimizerHParams(lr=0.05)
FAST = OptimizerHParams(lr=0.8)  # for losses that are means over outputs
MOMENTUM = OptimizerHParams(lr=0.02, momentum=0.9, weight_decay=0.01)
ADAM = OptimizerHParams(type="adam", lr=0.005, weight_decay=0.01)
TRAINING = TrainingHParams(batch_size=7, dtype="float64", seed=5, log_every_n_steps=1)
CLIPPED = replace(TRAINING, grad_clip=0.8)
SHORT = replace(TRAINING, grad_clip=0.1)
EPOCHS = replace(TRAINING, epochs_per_task=(1, 2, 1))
SIXES = replace(TRAINING, batch_size=6)

ONLINE: dict[str, Any] = {"accumulation": "online"}
KEPT: dict[str, Any] = {"reset_optimizer": False}
SIZES: dict[str, Any] = {"mem_size": 60, "mem_batch_size": 9}
LINES: dict[str, Any] = {"mem_size": 66, "lmc_batch_size": 8, "lmc_line_samples": 4, "lmc_init_position": 0.4}
ONWARD: dict[str, Any] = {"mem_size": 66, "lmc_batch_size": 8, "lmc_policy": "online", "lmc_start": "w_bar"}
CONNECTED: dict[str, Any] = {"lmc_lr": 0.01, "lmc_loss": "mean", "lmc_gradient": "plain", "lmc_momentum": 0.5}
WHOLE: dict[str, Any] = {"lmc_lr": 0.2, "lmc_steps": "epoch", "lmc_epochs": 3}
LOOKING: dict[str, Any] = {"glances": 2, "second_order": True}
CORE: dict[str, Any] = {"core_size": 20, "d_rn_f": 32, "task_given": True}
GAUSSIAN: dict[str, Any] = {"core_size": 20, "kernel_type": "rbf", "task_given": True}
COMMON = {*SIZES, "per_task_memory_samples", "core_size", "task_given", "lr", *vars(TRAINING)} - {"grad_clip"}


class Case(NamedTuple):
    """One run."""

    stream: str
    hparams: AlgorithmHParams
    optimizer: OptimizerHParams
    training: TrainingHParams = TRAINING

    def __str__(self) -> str:
        values = [(spec, getattr(self.hparams, spec.name)) for spec in fields(self.hparams)]
        chosen = [f"{s.name}={v}" for s, v in values if isinstance(v, str | bool) and v != s.default]
        kind = "momentum" if self.optimizer.momentum else self.optimizer.type
        clip = ["clipped"] if self.training.grad_clip else []
        return " ".join([self.stream, self.hparams.name, *chosen, kind, *clip])


SEPARATE = Case("rotated", EWCHParams(ewc_lambda=30, fisher_samples=50), SGD)
CASES = [
    Case("rotated", NaiveHParams(), SGD),
    Case("rotated", NaiveHParams(lr_decay=0.6, min_lr=0.01), MOMENTUM),
    Case("rotated", JointHParams(), SGD),
    Case("rotated", JointHParams(policy="once", lr_decay=0.8), MOMENTUM),
    SEPARATE,
    Case("rotated", EWCHParams(ewc_lambda=10, fisher_samples=None, lr_decay=0.8), MOMENTUM),
    Case("masked", EWCHParams(ewc_lambda=30, fisher_samples=50), SGD),
    Case("rotated", EWCHParams(**ONLINE, ewc_lambda=30, gamma=0.6, fisher_samples=50), SGD),
    Case("rotated", EWCHParams(**ONLINE, ewc_lambda=10, fisher_samples=40, **KEPT), MOMENTUM),
    Case("rotated", SIHParams(si_lambda=1, xi=0.01, lr_decay=0.8), MOMENTUM),
    Case("masked", SIHParams(si_lambda=3, xi=0.01, clamp=True, **KEPT), ADAM),
    Case("incremental", SIHParams(si_lambda=0.3, xi=0.02), SGD, CLIPPED),
    Case("rotated", MASHParams(mas_lambda=0.1, lr_decay=0.8), MOMENTUM),
    Case("incremental", MASHParams(mas_lambda=0.1, gradients="batch", **KEPT), ADAM),
    Case("masked", MASHParams(mas_lambda=0.3, gradients="batch", mas_samples=50), SGD, CLIPPED),
    Case("rotated", LFLHParams(lfl_lambda=0.3, **KEPT), MOMENTUM),
    Case("masked", LFLHParams(lfl_lambda=0.3), SGD, CLIPPED),
    Case("incremental", LFLHParams(lfl_lambda=0.3, freeze_head=False), ADAM),
    Case("rotated", StableSGDHParams(lr_decay=0.7), MOMENTUM),
    Case("masked", StableSGDHParams(lr_decay=0.6, min_lr=0.02, decay_first=False), SGD),
    Case("rotated", AGEMHParams(mem_size=60, mem_batch_size=30), MOMENTUM),
    Case("rotated", AGEMHParams(**SIZES, memory="task_quota"), SGD, CLIPPED),
    Case("masked", AGEMHParams(**SIZES, memory="class_quota"), ADAM),
    Case("rotated", ERHParams(**SIZES), SGD, EPOCHS),
    Case("rotated", ERHParams(**SIZES, memory="ring"), MOMENTUM),
    Case("incremental", ERHParams(**SIZES, memory="class_balanced"), SGD, CLIPPED),
    Case("masked", ERHParams(memory="task_quota", per_task_memory_samples=20, mem_batch_size=9), SGD),
    Case("rotated", DERHParams(**SIZES, alpha=0.3), SGD),
    Case("masked", DERHParams(**SIZES, alpha=1.5, distance="mean", memory="task_balanced"), MOMENTUM),
    Case("incremental", DERppHParams(**SIZES, alpha=0.2, memory="class_balanced"), SGD, CLIPPED),
    Case("masked", DERppHParams(**SIZES, alpha=1.5, beta=0.8, distance="mean"), ADAM),
    Case("rotated", MCSGDHParams(**LINES, lmc_lr=0.3, lmc_epochs=2, lr_decay=0.8), MOMENTUM),
    Case("rotated", MCSGDHParams(**LINES, **CONNECTED, lmc_policy="online"), SGD),
    Case("masked", MCSGDHParams(**LINES, **WHOLE, memory="class_quota", lmc_gradient="prefix"), ADAM),
    Case("incremental", MCSGDHParams(**LINES, lmc_lr=0.3, lmc_start="w_bar"), SGD, CLIPPED),
    Case("masked", MCSGDHParams(**ONWARD, lmc_lr=0.02, memory="class_quota"), MOMENTUM),
    Case("rotated", LaMAMLHParams(**SIZES, glances=2, alpha_init=0.1), SGD),
    Case("masked", LaMAMLHParams(**SIZES, **LOOKING, sync_update=True, inner_clip=0.1, **KEPT), MOMENTUM),
    Case("incremental", LaMAMLHParams(**SIZES, **LOOKING, memory="class_balanced", lr_alpha=1), SGD),
    Case("rotated", LaMAMLHParams(**SIZES, learn_lr=False, n_inner_updates=3, grad_clip_norm=1), SGD, SIXES),
    Case("rotated", ICaRLHParams(mem_size=420, flip=True, lr_decay=0.8), FAST),
    Case("incremental", ICaRLHParams(mem_size=21, quota="ceil"), FAST, SHORT),
    Case("masked", ICaRLHParams(mem_size=23, outputs="all", lr_decay=0.7), ADAM),
    Case("incremental", ICaRLHParams(mem_size=30, flip=True, **KEPT), MOMENTUM, EPOCHS),
    Case("rotated", KCLHParams(**CORE, tau=0.2, lmd=0.3, lr_decay=0.8), MOMENTUM),
    Case("masked", KCLHParams(**CORE, tau=0.1, normalisation="minmax", task_parameters="current"), ADAM),
    Case("masked", KCLHParams(**GAUSSIAN, bandwidth=0.5), SGD, CLIPPED),
    Case("rotated", KCLHParams(**GAUSSIAN, normalisation="minmax", lmd=1, **KEPT), MOMENTUM),
]


def parameters(cases: list[Case]) -> list[Any]:
    """Return cases as parameters of a test; those that take long to compute and to compile are slow."""
    found = []
    for case in cases:
        hparams: Any = case.hparams
        long = (hparams.name, hparams.name == "mcsgd" and hparams.lmc_policy, case.stream) in {
            ("mcsgd", "online", "masked"),
            ("mcsgd", "online", "rotated"),
            ("lamaml", False, "incremental"),
            ("lamaml", False, "masked"),
        }
        found.append(pytest.param(case, id=str(case), marks=[pytest.mark.slow] if long else []))
    return found


@cache
def benchmark(stream: str) -> Benchmark:
    """Three tasks of 30 steps; end-of-task work on all of `incremental` has an incomplete last batch."""
    if stream == "rotated":
        return RotatedDigits(num_tasks=3, subset=210)
    if stream == "masked":
        whole = SplitDigits(num_tasks=5, scenario="task", subset=210)
        return Benchmark("masked", whole.tasks[:3], whole.num_classes, "task", whole.normalisation)
    whole = SplitDigits(num_tasks=5, scenario="class", subset=215)
    return Benchmark("incremental", whole.tasks[:3], whole.num_classes, "class", whole.normalisation)


@cache
def ran(case: Case) -> tuple[Reference, list[Stage]]:
    """Return the reference of a case after its stream, and what each stage ended with."""
    stream, hparams, optimizer, training = case
    by_hand = reference(benchmark(stream), hparams, optimizer, training, WIDTHS)
    return by_hand, list(by_hand.stages())


def final(case: Case) -> Weights:
    """Return the weights at the end of a case's stream."""
    return ran(case)[1][-1].weights


def naive(case: Case) -> Case:
    """Return a case of naive finetuning with the same optimizer, and the same rates but for Stable SGD."""
    shared = {spec.name for spec in fields(AlgorithmHParams)}
    if isinstance(case.hparams, StableSGDHParams):
        shared = {"reset_optimizer"}
    return case._replace(hparams=NaiveHParams(**{name: getattr(case.hparams, name) for name in shared}))


def without_each_setting(case: Case) -> dict[str, Case]:
    """Return the case with one setting at its default, for all settings but COMMON, by their names.

    A setting that is read with that one's value alone goes with it.
    """
    variants = {}
    for part in ("hparams", "optimizer", "training"):
        settings = getattr(case, part)
        for spec in fields(settings):
            if spec.name not in COMMON and spec.default not in (MISSING, getattr(settings, spec.name)):
                left = [
                    s for s in fields(settings) if spec.name in (s.name, s.metadata.get("only", ("",))[0])
                ]
                changed = replace(settings, **{s.name: s.default for s in left})
                variants[spec.name] = case._replace(**{part: changed})
    return variants
