"""Many runs at once: the members of a program end with the numbers of single runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from sequel_benchmarks import RotatedDigits
from sequel_core import DivergenceError, run
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
from sequel_core.runs.directory import read_file
from sequel_core.stream.benchmark import Benchmark
from sequel_core.testing.parity import difference
from sequel_flax import MLP, FlaxLearner, make_learner, run_together
from sequel_flax.grouping import grouped

MIXED: list[list[AlgorithmHParams]] = [
    [NaiveHParams(lr_decay=decay) for decay in (1.0, 0.8, 0.5)],
    [JointHParams(min_lr=least, lr_decay=0.5) for least in (0.0, 0.01, 0.02)],
    [EWCHParams(ewc_lambda=strength, fisher_samples=50) for strength in (0.0, 10.0, 30.0)],
    [
        EWCHParams(ewc_lambda=10.0, accumulation="online", gamma=gamma, fisher_samples=50)
        for gamma in (0.5, 0.8, 1.0)
    ],
    [SIHParams(si_lambda=strength, xi=xi) for strength, xi in ((0.1, 0.1), (0.5, 0.01), (1.0, 0.1))],
    [MASHParams(mas_lambda=strength, mas_samples=50) for strength in (0.0, 0.01, 0.05)],
    [LFLHParams(lfl_lambda=strength) for strength in (0.0, 0.05, 0.1)],
    [StableSGDHParams(lr_decay=decay) for decay in (0.5, 0.7, 0.9)],
    [AGEMHParams(mem_size=60, mem_batch_size=20, lr_decay=decay) for decay in (1.0, 0.8, 0.5)],
    [ERHParams(mem_size=50, mem_batch_size=9, lr_decay=decay) for decay in (1.0, 0.8, 0.5)],
    [DERHParams(mem_size=50, mem_batch_size=9, alpha=alpha) for alpha in (0.1, 0.3, 0.5)],
    [
        DERppHParams(mem_size=50, mem_batch_size=9, alpha=alpha, beta=beta)
        for alpha, beta in ((0.1, 1.0), (0.3, 0.5), (0.5, 0.1))
    ],
    [ICaRLHParams(mem_size=60, lr_decay=decay) for decay in (1.0, 0.8, 0.5)],
    [MCSGDHParams(mem_size=60, lmc_batch_size=16, lmc_lr=rate) for rate in (0.05, 0.1, 0.2)],
    [LaMAMLHParams(mem_size=50, glances=2, mem_batch_size=6, lr_alpha=rate) for rate in (0.05, 0.1, 0.2)],
    [LwFHParams(lwf_lambda=strength, temperature=2 * strength) for strength in (0.5, 1.0, 2.0)],
    [ERACEHParams(mem_size=50, mem_batch_size=9, lr_decay=decay) for decay in (1.0, 0.8, 0.5)],
    [
        MIRHParams(mem_size=50, mem_batch_size=9, num_candidates=20, virtual_lr=rate)
        for rate in (0.01, 0.05, 0.1)
    ],
    [GEMHParams(mem_size=60, margin=margin) for margin in (0.0, 0.3, 0.6)],
    [KCLHParams(task_given=True, core_size=20, d_rn_f=64, tau=tau, lmd=10.0) for tau in (0.1, 0.5, 1.0)],
]
"""For each method, settings of three runs in one program."""

EWC = [EWCHParams(ewc_lambda=strength, fisher_samples=20) for strength in (3.0, 10.0, 30.0)]
DIGITS = RotatedDigits(num_tasks=2, subset=60)
DECAYING = [OptimizerHParams(lr=0.05, weight_decay=decay) for decay in (0.1, 0.01)]
OPTIMIZERS = [OptimizerHParams(lr=rate, momentum=m) for rate, m in ((0.05, 0.5), (0.02, 0.8), (0.03, 0.2))]


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    jax.config.update("jax_enable_x64", True)  # also for the threads of callbacks, unlike jax.enable_x64
    yield
    jax.config.update("jax_enable_x64", False)


def learner(
    hparams: AlgorithmHParams,
    benchmark: Benchmark,
    seed: int,
    optimizer: OptimizerHParams = OPTIMIZERS[0],
    **training: Any,
) -> FlaxLearner:
    settings = TrainingHParams(**{"batch_size": 7, "dtype": "float64", "seed": seed, **training})
    return make_learner(hparams, MLP((16, 12), benchmark.num_classes), optimizer, benchmark, settings)


def check(
    members: Sequence[FlaxLearner],
    alone: Mapping[int, FlaxLearner],
    benchmarks: Sequence[Benchmark],
    folder: Path,
    tolerance: float = 1e-10,
) -> list[Any]:
    """Check that runs in one program end with the states and the matrices of single runs; return results."""
    assert len(grouped(members, benchmarks)) == 1
    folders = [folder / f"together_{k}" for k in range(len(members))]
    results: list[Any] = run_together(members, benchmarks, folders, progress=False)
    for k, single in alone.items():
        expected = run(single, benchmarks[k], run_dir=folder / f"alone_{k}", progress=False)
        if tolerance < 1e-6:  # otherwise a sample may change its class
            np.testing.assert_allclose(results[k].matrix, expected.matrix, atol=1e-12)
        trees = [jax.device_get((one.ts.params, one.ts.opt_state, one.state)) for one in (members[k], single)]
        here, there = (
            {str(k): np.asarray(leaf, np.float64) for k, leaf in enumerate(jax.tree.leaves(tree))}
            for tree in trees
        )
        assert difference(here, there) < tolerance
        assert members[k].step == single.step
    return results


def mixed(
    hparams: Sequence[AlgorithmHParams], benchmark: Benchmark, dtype: str = "float64"
) -> list[FlaxLearner]:
    """Return learners with other seeds, strengths, learning rates and momenta."""
    settings = zip(hparams, range(3), OPTIMIZERS, strict=True)
    return [learner(h, benchmark, seed, optimizer, dtype=dtype) for h, seed, optimizer in settings]


def test_a_run_that_diverges_does_not_change_the_others(tmp_path: Path) -> None:
    def runs() -> list[FlaxLearner]:
        made = mixed(EWC, DIGITS)
        too_fast = OptimizerHParams(lr=1e30, momentum=0.8)
        made[1] = learner(EWC[1], DIGITS, 1, too_fast)
        return made

    members, alone = runs(), runs()
    results = check(members, {2: alone[2]}, [DIGITS] * 3, tmp_path)
    assert difference(members[0].weights(), members[2].weights()) > 1e-3
    with pytest.raises(DivergenceError) as diverged:
        run(alone[1], DIGITS, run_dir=tmp_path / "alone_1", progress=False)
    assert isinstance(results[1], DivergenceError)
    assert results[1].position == diverged.value.position
    statuses = [read_file(tmp_path / f"together_{k}" / "summary.json")["status"] for k in range(3)]
    assert statuses == ["finished", "diverged", "finished"]


def test_streams_with_other_numbers_of_samples_are_padded(tmp_path: Path) -> None:
    streams = [DIGITS, RotatedDigits(num_tasks=2, subset=47)]
    hparams = [ERHParams(mem_size=30, mem_batch_size=5, lr_decay=decay) for decay in (1.0, 0.5)]

    def runs() -> list[FlaxLearner]:
        return [
            learner(h, stream, seed, weight_decay)
            for seed, (h, stream, weight_decay) in enumerate(zip(hparams, streams, DECAYING, strict=True))
        ]

    check(runs(), dict(enumerate(runs())), streams, tmp_path)


def test_runs_of_another_structure_have_another_program() -> None:
    sizes = [ERHParams(mem_size=size, mem_batch_size=5) for size in (20, 30, 20)]
    ring = ERHParams(memory="ring", mem_size=20, mem_batch_size=5)
    learners = [learner(hparams, DIGITS, seed) for seed, hparams in enumerate([*sizes, ring])]
    learners.append(learner(sizes[0], DIGITS, 4, OptimizerHParams(lr=0.05, momentum=0.9)))
    learners.append(learner(sizes[0], DIGITS, 5, OptimizerHParams(lr=0.05)))
    groups = grouped(learners, [DIGITS] * 6)
    assert [group.members for group in groups] == [[0, 2, 4], [1], [3], [5]]
    assert [group.names for group in groups] == [("optimizer.momentum",), (), (), ()]
    assert [group.reason for group in groups] == [
        "",
        "algo.mem_size",
        "algo.memory",
        "the shapes of the state",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learners": []}, "learners must have at least one learner"),
        ({"run_dirs": ["a"]}, "run_dirs must have one entry for each of the 2 learners, got 1"),
        ({"run_dirs": ["a", "a"]}, "learners and run_dirs must be different for each run"),
        ({"width": 0}, "width must be >= 1, got 0"),
        ({"evaluate_every": 0}, "evaluate_every must be end, task, epoch or a number of steps >= 1, got 0"),
    ],
)
def test_invalid_arguments_raise_before_training(arguments: dict[str, Any], message: str) -> None:
    learners = [learner(NaiveHParams(), DIGITS, seed) for seed in range(2)]
    with pytest.raises(ValueError, match=message):
        run_together(**{"learners": learners, "benchmark": DIGITS, "progress": False, **arguments})
    assert learners[0].step == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "hparams", [GDumbHParams(mem_size=40), BiCHParams(mem_size=40)], ids=lambda hparams: hparams.name
)
def test_a_method_with_a_second_phase_has_a_program_for_each_run(
    hparams: AlgorithmHParams, tmp_path: Path
) -> None:
    """So its runs are ordinary ones, bit by bit."""
    members, alone = ([learner(hparams, DIGITS, seed) for seed in range(2)] for _ in range(2))
    assert [group.members for group in grouped(members, [DIGITS] * 2)] == [[0], [1]]
    run_together(members, DIGITS, [tmp_path / "0", tmp_path / "1"], progress=False)
    run(alone[1], DIGITS, run_dir=tmp_path / "alone", progress=False)
    assert difference(members[1].weights(), alone[1].weights()) == 0
    assert difference(members[0].weights(), members[1].weights()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("hparams", MIXED, ids=lambda hparams: hparams[0].name)
def test_every_method_ends_with_the_states_of_single_runs(
    hparams: Sequence[AlgorithmHParams], tmp_path: Path
) -> None:
    kcl = hparams[0].name == "kcl"  # its solves amplify rounding errors
    benchmark = RotatedDigits(num_tasks=3, subset=350 if kcl else None)
    members, alone = (mixed(hparams, benchmark) for _ in range(2))
    check(members, dict(enumerate(alone)), [benchmark] * 3, tmp_path, 1e-8 if kcl else 1e-10)
    assert difference(members[0].weights(), members[1].weights()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("hparams", MIXED, ids=lambda hparams: hparams[0].name)
def test_every_method_takes_the_first_fifty_steps_of_single_runs_in_float32(
    hparams: Sequence[AlgorithmHParams], tmp_path: Path
) -> None:
    """Later, training amplifies the rounding errors."""
    jax.config.update("jax_enable_x64", False)
    benchmark = RotatedDigits(num_tasks=2, subset=175)
    members, alone = (mixed(hparams, benchmark, "float32") for _ in range(2))
    check(members, dict(enumerate(alone)), [benchmark] * 3, tmp_path, 1e-4)
    assert members[0].step >= (44 if hparams[0].name == "kcl" else 50)  # KCL holds out its coreset
