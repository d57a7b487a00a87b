"""The runs on which both plug-ins are compared with the references, and the results of the references."""

from __future__ import annotations

from dataclasses import MISSING, fields, replace
from functools import cache
from typing import Any, NamedTuple

import pytest

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
from sequel_core.hparams import AlgorithmHParams, OptimizerHParams, TrainingHParams
from sequel_core.stream.benchmark import Benchmark
from sequel_core.testing.streams import table
from tests.reference.algorithms import make_reference
from tests.reference.network import Weights
from tests.reference.streams import Reference, Stage

WIDTHS = (16, 12)
SGD = OptimizerHParams(lr=0.05)
HIGH_RATE = OptimizerHParams(lr=0.8)  # for losses that are averaged over outputs
MOMENTUM = OptimizerHParams(lr=0.02, momentum=0.9, weight_decay=0.01)
ADAM = OptimizerHParams(type="adam", lr=0.005, weight_decay=0.01)
TRAINING = TrainingHParams(batch_size=7, dtype="float64", seed=5, log_every_n_steps=1)
CLIPPED = replace(TRAINING, grad_clip=0.8)
BY_VALUE = replace(TRAINING, grad_clip=0.05, grad_clip_algorithm="value")
CLIPPED_MORE = replace(TRAINING, grad_clip=0.1)
EPOCHS = replace(TRAINING, epochs_per_task=(1, 2, 1))
BATCH_6 = replace(TRAINING, batch_size=6)

ONLINE_EWC: dict[str, Any] = {"accumulation": "online"}
NO_RESET: dict[str, Any] = {"reset_optimizer": False}
MEMORY: dict[str, Any] = {"mem_size": 60, "mem_batch_size": 9}
PHASE: dict[str, Any] = {"mem_size": 50, "phase_epochs": 4, "phase_batch_size": 9, "phase_lr": 0.02}
FIT: dict[str, Any] = {"phase_epochs": 8, "phase_batch_size": 5, "phase_lr": 0.05}
LMC: dict[str, Any] = {"mem_size": 66, "lmc_batch_size": 8, "lmc_line_samples": 4, "lmc_init_position": 0.4}
ONLINE_LMC: dict[str, Any] = {
    "mem_size": 66,
    "lmc_batch_size": 8,
    "lmc_policy": "online",
    "lmc_start": "w_bar",
}
PLAIN_LMC: dict[str, Any] = {"lmc_lr": 0.01, "lmc_loss": "mean", "lmc_gradient": "plain", "lmc_momentum": 0.5}
EPOCH_LMC: dict[str, Any] = {"lmc_lr": 0.2, "lmc_steps": "epoch", "lmc_epochs": 3}
SECOND_ORDER: dict[str, Any] = {"glances": 2, "second_order": True}
RFF: dict[str, Any] = {"core_size": 20, "d_rn_f": 32, "task_given": True}
RBF: dict[str, Any] = {"core_size": 20, "kernel_type": "rbf", "task_given": True}
COMMON = {
    *MEMORY,
    "per_task_memory_samples",
    "core_size",
    "task_given",
    "lr",
    *(vars(TRAINING).keys() - {"grad_clip"}),
}
"""Settings that `without_each_setting` leaves as they are."""


class Case(NamedTuple):
    """Stream, method, optimizer and training settings of one run."""

    stream: str
    hparams: AlgorithmHParams
    optimizer: OptimizerHParams
    training: TrainingHParams = TRAINING

    def __str__(self) -> str:
        values = [(spec, getattr(self.hparams, spec.name)) for spec in fields(self.hparams)]
        chosen = [f"{s.name}={v}" for s, v in values if isinstance(v, str | bool) and v != s.default]
        optimizer = "momentum" if self.optimizer.momentum else self.optimizer.type
        clip = ["clipped"] if self.training.grad_clip else []
        return " ".join([self.stream, self.hparams.name, *chosen, optimizer, *clip])


EWC_CASE = Case("rotated", EWCHParams(ewc_lambda=30, fisher_samples=50), SGD)
CASES = [
    Case("rotated", NaiveHParams(), SGD),
    Case("rotated", NaiveHParams(lr_decay=0.6, min_lr=0.01), MOMENTUM),
    Case("rotated", JointHParams(), SGD),
    Case("rotated", JointHParams(policy="once", lr_decay=0.8), MOMENTUM),
    EWC_CASE,
    Case("rotated", EWCHParams(ewc_lambda=10, fisher_samples=None, lr_decay=0.8), MOMENTUM),
    Case("masked", EWCHParams(ewc_lambda=30, fisher_samples=50), SGD),
    Case("rotated", EWCHParams(**ONLINE_EWC, ewc_lambda=30, gamma=0.6, fisher_samples=50), SGD),
    Case("rotated", EWCHParams(**ONLINE_EWC, ewc_lambda=10, fisher_samples=40, **NO_RESET), MOMENTUM),
    Case("rotated", EWCHParams(ewc_lambda=200, fisher="mean", fisher_samples=10), SGD),
    Case("incremental", EWCHParams(ewc_lambda=30, fisher="weighted", fisher_samples=50), SGD, BY_VALUE),
    Case("rotated", SIHParams(si_lambda=1, xi=0.01, lr_decay=0.8), MOMENTUM),
    Case("masked", SIHParams(si_lambda=6, xi=0.01, path_gradient="total"), SGD, BY_VALUE),
    Case("masked", SIHParams(si_lambda=3, xi=0.01, clamp=True, **NO_RESET), ADAM),
    Case("incremental", SIHParams(si_lambda=0.3, xi=0.02), SGD, CLIPPED),
    Case("rotated", MASHParams(mas_lambda=0.1, lr_decay=0.8), MOMENTUM),
    Case("incremental", MASHParams(mas_lambda=0.1, gradients="batch", **NO_RESET), ADAM),
    Case("masked", MASHParams(mas_lambda=0.3, gradients="batch", mas_samples=50), SGD, CLIPPED),
    Case("rotated", LFLHParams(lfl_lambda=0.3, **NO_RESET), MOMENTUM),
    Case("masked", LFLHParams(lfl_lambda=0.3), SGD, CLIPPED),
    Case("incremental", LFLHParams(lfl_lambda=0.3, freeze_head=False), ADAM),
    Case("rotated", LwFHParams(lwf_lambda=2, **NO_RESET), MOMENTUM),
    Case("masked", LwFHParams(lwf_lambda=0.5, temperature=1), SGD, CLIPPED),
    Case("incremental", LwFHParams(lwf_lambda=3), ADAM),
    Case("incremental", LwFHParams(distillation="sigmoid"), HIGH_RATE),
    Case("masked", LwFHParams(distillation="sigmoid", lr_decay=0.8), MOMENTUM),
    Case("values", LwFHParams(lwf_lambda=0.3), SGD),
    Case("labels", LwFHParams(distillation="distance", lwf_lambda=0.2), ADAM),
    Case("rotated", StableSGDHParams(lr_decay=0.7), MOMENTUM),
    Case("masked", StableSGDHParams(lr_decay=0.6, min_lr=0.02, decay_first=False), SGD),
    Case("rotated", AGEMHParams(mem_size=60, mem_batch_size=30), MOMENTUM),
    Case("rotated", AGEMHParams(**MEMORY, memory="task_quota"), SGD, CLIPPED),
    Case("masked", AGEMHParams(**MEMORY, memory="class_quota"), ADAM),
    Case("rotated", GEMHParams(mem_size=60), MOMENTUM),
    Case("rotated", GEMHParams(**MEMORY, memory="task_quota", margin=0), SGD, CLIPPED),
    Case("masked", GEMHParams(mem_size=60, margin_rule="bound", ridge=0.05, margin=0.3), SGD),
    Case("values", GEMHParams(mem_size=60), SGD),
    Case("rotated", ERHParams(**MEMORY), SGD, EPOCHS),
    Case("rotated", ERHParams(**MEMORY, memory="ring"), MOMENTUM),
    Case("incremental", ERHParams(**MEMORY, memory="class_balanced"), SGD, CLIPPED),
    Case("masked", ERHParams(memory="task_quota", per_task_memory_samples=20, mem_batch_size=9), SGD),
    Case("rotated", ERACEHParams(**MEMORY), SGD),
    Case("incremental", ERACEHParams(**MEMORY, classes="unseen", memory="class_balanced"), MOMENTUM),
    Case("masked", ERACEHParams(**MEMORY), SGD, CLIPPED),
    Case("rotated", MIRHParams(**MEMORY, num_candidates=25, lr_decay=0.8), MOMENTUM),
    Case("incremental", MIRHParams(**MEMORY, num_candidates=20, loss="sum", virtual_lr=0.3), SGD, CLIPPED),
    Case("masked", MIRHParams(**MEMORY, num_candidates=20, memory="class_balanced"), ADAM),
    Case("values", MIRHParams(**MEMORY, num_candidates=20), SGD),
    Case("rotated", DERHParams(**MEMORY, alpha=0.3), SGD),
    Case("masked", DERHParams(**MEMORY, alpha=1.5, distance="mean", memory="task_balanced"), MOMENTUM),
    Case("incremental", DERppHParams(**MEMORY, alpha=0.2, memory="class_balanced"), SGD, CLIPPED),
    Case("masked", DERppHParams(**MEMORY, alpha=1.5, beta=0.8, distance="mean"), ADAM),
    Case("rotated", GDumbHParams(**PHASE), MOMENTUM),
    Case("masked", GDumbHParams(**PHASE, memory="reservoir", phase_grad_clip=0.3), SGD),
    Case("incremental", GDumbHParams(**PHASE, phase_weight_decay=0.01, phase_momentum=0.5), ADAM),
    Case("rotated", BiCHParams(mem_size=90, phase_epochs=3), MOMENTUM),
    Case("incremental", BiCHParams(mem_size=50, val_fraction=0.3, **FIT, lr_decay=0.8), SGD),
    Case("incremental", BiCHParams(mem_size=70, temperature=1, **FIT, phase_grad_clip=0.1), ADAM, CLIPPED),
    Case("masked", BiCHParams(mem_size=60, **FIT, phase_weight_decay=0.1), MOMENTUM),
    Case("incremental", BiCHParams(mem_size=50, val_fraction=0), SGD),
    Case("rotated", MCSGDHParams(**LMC, lmc_lr=0.3, lmc_epochs=2, lr_decay=0.8), MOMENTUM),
    Case("rotated", MCSGDHParams(**LMC, **PLAIN_LMC, lmc_policy="online"), SGD),
    Case("masked", MCSGDHParams(**LMC, **EPOCH_LMC, memory="class_quota", lmc_gradient="prefix"), ADAM),
    Case("incremental", MCSGDHParams(**LMC, lmc_lr=0.3, lmc_start="w_bar"), SGD, CLIPPED),
    Case("masked", MCSGDHParams(**ONLINE_LMC, lmc_lr=0.02, memory="class_quota"), MOMENTUM),
    Case("rotated", LaMAMLHParams(**MEMORY, glances=2, alpha_init=0.1), SGD),
    Case(
        "masked",
        LaMAMLHParams(**MEMORY, **SECOND_ORDER, sync_update=True, inner_clip=0.1, **NO_RESET),
        MOMENTUM,
    ),
    Case("incremental", LaMAMLHParams(**MEMORY, **SECOND_ORDER, memory="class_balanced", lr_alpha=1), SGD),
    Case(
        "rotated", LaMAMLHParams(**MEMORY, learn_lr=False, n_inner_updates=3, grad_clip_norm=1), SGD, BATCH_6
    ),
    Case("rotated", ICaRLHParams(mem_size=420, flip=True, lr_decay=0.8), HIGH_RATE),
    Case("incremental", ICaRLHParams(mem_size=21, quota="ceil"), HIGH_RATE, CLIPPED_MORE),
    Case("masked", ICaRLHParams(mem_size=23, outputs="all", lr_decay=0.7), ADAM),
    Case("incremental", ICaRLHParams(mem_size=30, flip=True, **NO_RESET), MOMENTUM, EPOCHS),
    Case("incremental", ICaRLHParams(mem_size=40, normalise_features=False), SGD),
    Case("rotated", KCLHParams(**RFF, tau=0.2, lmd=0.3, lr_decay=0.8), MOMENTUM),
    Case("masked", KCLHParams(**RFF, tau=0.1, normalisation="minmax", task_parameters="current"), ADAM),
    Case("masked", KCLHParams(**RBF, bandwidth=0.5), SGD, CLIPPED),
    Case("rotated", KCLHParams(**RBF, normalisation="minmax", lmd=1, **NO_RESET), MOMENTUM),
    Case("classes", ERHParams(**MEMORY), MOMENTUM),
    Case("labels", EWCHParams(ewc_lambda=10, fisher_samples=100), SGD),
    Case("labels", ERHParams(**MEMORY, memory="task_quota"), ADAM),
    Case("labels", DERppHParams(**MEMORY, alpha=0.3, beta=0.5), SGD),
    Case("values", EWCHParams(ewc_lambda=10, fisher_samples=None), MOMENTUM),
    Case("values", EWCHParams(ewc_lambda=10, gamma=0.8, fisher_samples=64, **ONLINE_EWC), SGD),
    Case("values", ERHParams(**MEMORY, memory="ring"), SGD, CLIPPED),
    Case("values", DERppHParams(**MEMORY, alpha=0.3, beta=0.5), SGD),
]


def case_parameters(cases: list[Case]) -> list[Any]:
    """Return the cases as parameters of a test; those that take long are marked slow."""
    marked = []
    for case in cases:
        hparams: Any = case.hparams
        long = (hparams.name, hparams.name == "mcsgd" and hparams.lmc_policy, case.stream) in {
            ("mcsgd", "online", "masked"),
            ("mcsgd", "online", "rotated"),
            ("lamaml", False, "incremental"),
            ("lamaml", False, "masked"),
        }
        marked.append(pytest.param(case, id=str(case), marks=[pytest.mark.slow] if long else []))
    return marked


@cache
def benchmark(stream: str) -> Benchmark:
    """Return a stream of three tasks of 30 steps; see `table` for those without images.

    In `incremental`, the last batch of an end-of-task pass over all samples is incomplete.
    """
    if stream in ("classes", "labels", "values"):
        return table(stream)
    if stream == "rotated":
        return RotatedDigits(num_tasks=3, subset=210)
    if stream == "masked":
        whole = SplitDigits(num_tasks=5, scenario="task", subset=210)
        return Benchmark("masked", whole.tasks[:3], whole.num_classes, "task", whole.normalisation)
    whole = SplitDigits(num_tasks=5, scenario="class", subset=215)
    return Benchmark("incremental", whole.tasks[:3], whole.num_classes, "class", whole.normalisation)


@cache
def run_reference(case: Case) -> tuple[Reference, list[Stage]]:
    """Return the reference of a case after its last task, and the results of each task."""
    stream, hparams, optimizer, training = case
    reference = make_reference(benchmark(stream), hparams, optimizer, training, WIDTHS)
    return reference, list(reference.stages())


def final_weights(case: Case) -> Weights:
    """Return the reference's weights after the last task of a case."""
    return run_reference(case)[1][-1].weights


def naive_case(case: Case) -> Case:
    """Return the case with naive finetuning in place of the method.

    The optimizer stays the same, and so do the learning rates, except for those of Stable SGD.
    """
    shared = {spec.name for spec in fields(AlgorithmHParams)}
    if isinstance(case.hparams, StableSGDHParams):
        shared = {"reset_optimizer"}
    return case._replace(hparams=NaiveHParams(**{name: getattr(case.hparams, name) for name in shared}))


def without_each_setting(case: Case) -> dict[str, Case]:
    """Return variants of a case by the name of the setting that is at its default in each.

    The settings in COMMON have no variant, nor do those that do not change the weights: GDumb does not use
    the optimizer, and the second phase of BiC changes predictions. A setting that is only read for one value
    of the named setting is at its default too.
    """
    variants = {}
    for part in ("hparams", "optimizer", "training"):
        settings = getattr(case, part)
        for spec in fields(settings):
            name = f"{case.hparams.name} {part} {spec.name}"
            if name.startswith(("gdumb optimizer", "bic hparams phase_")):
                continue
            if spec.name not in COMMON and spec.default not in (MISSING, getattr(settings, spec.name)):
                reset = [
                    s for s in fields(settings) if spec.name in (s.name, s.metadata.get("only", ("",))[0])
                ]
                changed = replace(settings, **{s.name: s.default for s in reset})
                variants[spec.name] = case._replace(**{part: changed})
    return variants
