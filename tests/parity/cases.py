"""The table that every parity test walks: algorithms x settings, on three tasks of at least 200 steps."""

from __future__ import annotations

from functools import cache
from typing import Any

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
from sequel_core.hparams import AlgorithmHParams, OptimizerHParams
from sequel_core.runs.learner import Learner
from sequel_core.testing.parity import OPTIMIZERS, Stream, Weights, learner, stream, train

DECAY: dict[str, Any] = {"lr_decay": 0.7, "min_lr": 0.01}
CARRY: dict[str, Any] = {"lr_decay": 0.7, "reset_optimizer": False}
GIVEN: dict[str, Any] = {"task_given": True}

CASES: list[tuple[AlgorithmHParams, str]] = [
    (NaiveHParams(), "sgd"),
    (NaiveHParams(**DECAY), "momentum"),
    (NaiveHParams(**CARRY), "momentum"),
    (NaiveHParams(**CARRY), "adam"),
    (JointHParams(), "sgd"),
    (JointHParams(**DECAY), "adam"),
    (JointHParams(policy="once", lr_decay=0.7), "momentum"),
    *((EWCHParams(ewc_lambda=20, fisher_samples=101), name) for name in ("momentum", "adamw", "clipping")),
    (EWCHParams(ewc_lambda=50, fisher_samples=None, **DECAY), "sgd"),
    (EWCHParams(ewc_lambda=20, fisher_samples=100, **CARRY), "adam"),
    (EWCHParams(ewc_lambda=10, accumulation="online", gamma=0.8, fisher_samples=50), "sgd"),
    (EWCHParams(ewc_lambda=50, accumulation="online", gamma=0.8, fisher_samples=50, **CARRY), "momentum"),
    *((SIHParams(si_lambda=0.3), name) for name in ("sgd", "momentum", "adam and weight decay", "clipping")),
    (EWCHParams(ewc_lambda=200, fisher="mean", fisher_samples=20), "sgd"),
    (EWCHParams(ewc_lambda=20, fisher="weighted", fisher_samples=101), "sgd"),
    (SIHParams(si_lambda=1, xi=0.01, clamp=True, **CARRY), "adam"),
    (SIHParams(si_lambda=0.3, path_gradient="total"), "clipping by value"),
    (MASHParams(mas_lambda=0.01, mas_samples=101), "sgd"),
    (MASHParams(mas_lambda=0.01, **CARRY), "adam"),
    (MASHParams(mas_lambda=0.05, gradients="batch", mas_samples=100), "clipping"),
    (LFLHParams(lfl_lambda=0.1), "nesterov and weight decay"),
    (LFLHParams(lfl_lambda=0.1), "clipping"),
    (LFLHParams(lfl_lambda=0.05, **CARRY), "adam"),
    (LFLHParams(lfl_lambda=0.1, freeze_head=False), "sgd"),
    (LwFHParams(lwf_lambda=2), "momentum"),
    (LwFHParams(distillation="distance", lwf_lambda=0.1, **CARRY), "adam"),
    (StableSGDHParams(lr_decay=0.7), "momentum"),
    (StableSGDHParams(lr_decay=0.5, decay_first=False), "adam"),
    (AGEMHParams(mem_size=60, mem_batch_size=20), "sgd"),
    (AGEMHParams(mem_size=120, mem_batch_size=64), "clipping"),
    (AGEMHParams(memory="task_quota", mem_size=60, mem_batch_size=60, **CARRY), "momentum"),
    (GEMHParams(mem_size=60), "sgd"),
    (GEMHParams(memory="task_quota", mem_size=60, mem_batch_size=9, margin=0, **CARRY), "momentum"),
    (GEMHParams(mem_size=60, margin_rule="bound", ridge=0.001), "clipping"),
    (ERHParams(mem_size=50, mem_batch_size=9), "sgd"),
    (ERHParams(mem_size=50, mem_batch_size=50), "clipping"),
    (ERHParams(mem_size=50, mem_batch_size=9, mem_replacement=True), "sgd"),
    (ERHParams(memory="ring", mem_size=60, mem_batch_size=7), "momentum"),
    (ERHParams(memory="class_balanced", mem_size=50, mem_batch_size=7, **CARRY), "adam"),
    (ERHParams(memory="task_quota", per_task_memory_samples=20, mem_batch_size=7), "sgd"),
    (ERACEHParams(mem_size=50, mem_batch_size=9), "sgd"),
    (ERACEHParams(classes="unseen", memory="class_balanced", mem_size=50, **CARRY), "momentum"),
    (DERHParams(mem_size=50, mem_batch_size=9), "sgd"),
    (DERHParams(mem_size=50, mem_batch_size=7, alpha=0.5, distance="mean", **CARRY), "momentum"),
    (DERHParams(memory="class_quota", mem_size=60, mem_batch_size=7), "clipping"),
    (DERppHParams(mem_size=50, mem_batch_size=9), "sgd"),
    (DERppHParams(mem_size=50, mem_batch_size=7, alpha=0.5, beta=1, distance="mean"), "adam"),
    (DERppHParams(memory="ring", mem_size=60, mem_batch_size=7), "nesterov and weight decay"),
    (GDumbHParams(mem_size=50, phase_epochs=4, phase_lr=0.02, phase_weight_decay=0.01), "momentum"),
    (
        GDumbHParams(
            memory="reservoir", mem_size=60, phase_epochs=5, phase_batch_size=9, phase_grad_clip=0.5
        ),
        "adam",
    ),
    (MIRHParams(mem_size=50, mem_batch_size=9, num_candidates=20), "sgd"),
    (
        MIRHParams(memory="ring", mem_size=60, mem_batch_size=7, virtual_lr=0.5, loss="sum", **CARRY),
        "momentum",
    ),
    (BiCHParams(mem_size=90, phase_epochs=5), "momentum"),
    (BiCHParams(mem_size=80, val_fraction=0.3, temperature=1, phase_epochs=3, **CARRY), "adam"),
    (MCSGDHParams(mem_size=60, lmc_batch_size=16, lmc_lr=0.2), "momentum"),
    (
        MCSGDHParams(
            memory="class_quota", mem_size=60, lmc_gradient="plain", lmc_start="w_bar", lmc_line_samples=4
        ),
        "clipping",
    ),
    (LaMAMLHParams(mem_size=50, glances=1, mem_batch_size=6), "sgd"),
    (LaMAMLHParams(n_inner_updates=1, sync_update=True, glances=1, lr_alpha=0.05, **CARRY), "momentum"),
    (ICaRLHParams(mem_size=60), "momentum"),
    (ICaRLHParams(mem_size=100, quota="ceil", flip=True, **CARRY), "adam"),
    (ICaRLHParams(mem_size=60, outputs="all", flip=True), "clipping"),
    (ICaRLHParams(mem_size=45, quota="ceil", outputs="all", **DECAY), "two epochs"),
    (ICaRLHParams(mem_size=60, normalise_features=False), "sgd"),
    # lambda far from 0, where |lambda| turns about and rounding errors double every few steps
    (KCLHParams(**GIVEN, core_size=10, d_rn_f=33, tau=1, normalisation="minmax", lmd=-2, **CARRY), "adam"),
    (KCLHParams(**GIVEN, core_size=20, d_rn_f=64, tau=0.1, lmd=10), "sgd"),
    (
        KCLHParams(**GIVEN, core_size=20, kernel_type="rbf", bandwidth=4, normalisation="minmax", lmd=10),
        "two epochs",
    ),
]

LONG: list[tuple[AlgorithmHParams, str]] = [
    *(
        (EWCHParams(ewc_lambda=20, fisher_samples=101), name)
        for name in OPTIMIZERS
        if name not in ("momentum", "adamw", "clipping", "clipping by value")
    ),
    (AGEMHParams(memory="class_quota", mem_size=60, mem_batch_size=20), "adam"),
    (ERHParams(memory="task_balanced", mem_size=50, mem_batch_size=7), "two epochs"),
    (
        MCSGDHParams(
            per_task_memory_samples=20,
            lmc_epochs=3,
            lmc_batch_size=8,
            lmc_gradient="prefix",
            lmc_steps="epoch",
            **CARRY,
        ),
        "adam",
    ),
    (
        MCSGDHParams(
            mem_size=60,
            lmc_policy="online",
            lmc_loss="mean",
            lmc_batch_size=9,
            lmc_lr=0.002,
            lmc_line_samples=3,
        ),
        "sgd",
    ),
    (LaMAMLHParams(n_inner_updates=1, second_order=True, sync_update=True, glances=3, **DECAY), "sgd"),
    (LaMAMLHParams(n_inner_updates=1, learn_lr=False, alpha_init=0.02, inner_clip=0.05, glances=2), "sgd"),
    (KCLHParams(**GIVEN, core_size=20, d_rn_f=64, normalisation="minmax", lmd=10), "momentum"),
    (KCLHParams(**GIVEN, core_size=30, d_rn_f=64, normalisation="minmax", lmd=10), "clipping"),
]
"""Cases alike that take long; they run with `make slow`."""


EVERY_TARGET: list[tuple[AlgorithmHParams, str]] = [
    (NaiveHParams(), "adam"),
    (EWCHParams(ewc_lambda=20, fisher_samples=101), "momentum"),
    (EWCHParams(ewc_lambda=10, accumulation="online", gamma=0.8, fisher_samples=50), "sgd"),
    (SIHParams(si_lambda=0.3), "momentum"),
    (MASHParams(mas_lambda=0.01, mas_samples=101), "sgd"),
    (ERHParams(mem_size=50, mem_batch_size=9), "sgd"),
    (DERHParams(mem_size=50, mem_batch_size=9), "momentum"),
    (DERppHParams(mem_size=50, mem_batch_size=9), "clipping"),
    (AGEMHParams(memory="task_quota", mem_size=60, mem_batch_size=20), "sgd"),
    (LwFHParams(lwf_lambda=0.5), "momentum"),
    (GEMHParams(mem_size=60, mem_batch_size=9), "sgd"),
    (MIRHParams(mem_size=50, mem_batch_size=9, num_candidates=20), "sgd"),
]
LABELLED: list[tuple[AlgorithmHParams, str]] = [
    (LFLHParams(lfl_lambda=0.1), "momentum"),
    (MCSGDHParams(mem_size=60, lmc_batch_size=16, lmc_lr=0.2), "momentum"),
    (LaMAMLHParams(mem_size=50, glances=1, mem_batch_size=6), "sgd"),
]
"""Methods on streams of tables, with the loss that fits their targets; the latter with class labels only."""


def bar(hparams: AlgorithmHParams) -> float:
    """Return how far apart, at most, the weights of the two frameworks may be; KCL solves linear systems."""
    return 1e-8 if hparams.name == "kcl" else 1e-10


def name_of(case: tuple[AlgorithmHParams, str]) -> str:
    """Return a readable test name."""
    hparams, optimizer = case
    changed = {k: v for k, v in vars(hparams).items() if v != type(hparams)().__dict__[k]}
    return f"{hparams.name} {optimizer} {changed}"


def torch_learner(
    hparams: AlgorithmHParams, optimizer: OptimizerHParams, scenario: Stream = "domain", **changes: Any
) -> Learner:
    """Return a LightningLearner; its Trainers are real ones."""
    return learner("pytorch", hparams, optimizer, stream(scenario), **changes)


def flax_learner(
    hparams: AlgorithmHParams,
    optimizer: OptimizerHParams,
    scenario: Stream = "domain",
    steps_per_call: int = 1,
    **changes: Any,
) -> Learner:
    """Return a FlaxLearner, dispatched (1) or scanned (more)."""
    options = {"steps_per_call": steps_per_call}
    return learner("jax", hparams, optimizer, stream(scenario), options=options, **changes)


@cache
def scanned(hparams: AlgorithmHParams, optimizer: str, scenario: Stream = "domain") -> Weights:
    """Return the weights of a scanned run after all tasks."""
    settings, changes = OPTIMIZERS[optimizer]
    made = flax_learner(hparams, settings, scenario, steps_per_call=8, **changes)
    return train(made, stream(scenario)).weights()
