"""Both versions of an algorithm end with the same weights: three tasks, float64, the real learners."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from typing import Any

import numpy as np
import pytest

from sequel_core.algorithms import ALGORITHMS
from sequel_core.algorithms.agem import AGEMHParams
from sequel_core.algorithms.der import DERHParams
from sequel_core.algorithms.derpp import DERppHParams
from sequel_core.algorithms.er import ERHParams
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.gem import GEMHParams
from sequel_core.algorithms.lfl import LFLHParams
from sequel_core.algorithms.lwf import LwFHParams
from sequel_core.algorithms.mas import MASHParams
from sequel_core.algorithms.mcsgd import MCSGDHParams
from sequel_core.algorithms.mir import MIRHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.algorithms.si import SIHParams
from sequel_core.algorithms.stable_sgd import StableSGDHParams
from sequel_core.hparams import AlgorithmHParams
from sequel_core.runs.learner import Mode
from sequel_core.stream.benchmark import Scenario
from sequel_core.testing import check_effect, check_parity, check_strength_zero
from sequel_core.testing.parity import (
    BOTH,
    OPTIMIZERS,
    SGD,
    SILENT,
    Stream,
    difference,
    stream,
    train,
    trained,
    training,
)
from sequel_core.testing.streams import Targets
from tests.parity.cases import (
    CASES,
    EVERY_TARGET,
    LABELLED,
    LONG,
    bar,
    flax_learner,
    name_of,
    scanned,
    torch_learner,
)
from tests.quick import some


def marked(
    cases: list[tuple[AlgorithmHParams, str]], place: int, names: Container[str] = ALGORITHMS
) -> list[Any]:
    """Return cases as parameters; all but the case at this place of each of these methods are slow."""
    marked_cases, seen = [], Counter[str]()
    for case in cases:
        name = case[0].name
        marks = [] if seen[name] == place and name in names else [pytest.mark.slow]
        marked_cases.append(pytest.param(*case, id=name_of(case), marks=marks))
        seen[name] += 1
    return marked_cases


@pytest.mark.parametrize(("hparams", "optimizer"), marked([*CASES, *LONG], 0))
def test_same_weights_in_both_frameworks(hparams: AlgorithmHParams, optimizer: str) -> None:
    check_parity(hparams, optimizer, tolerance=bar(hparams))


INCOMPLETE = [
    case
    for case in CASES
    if getattr(case[0], "n_inner_updates", None) is None and getattr(case[0], "memory", "") != "greedy"
]
"""Cases that can train on the 2 samples that are left of 205 batches of 7; a full greedy memory has no use
for them."""


@pytest.mark.parametrize(("hparams", "optimizer"), marked(INCOMPLETE, 0, ("er",)))
def test_same_weights_with_the_incomplete_last_batch(hparams: AlgorithmHParams, optimizer: str) -> None:
    settings, changes = OPTIMIZERS[optimizer]
    torch_ = train(torch_learner(hparams, settings, drop_last=False, **changes), stream())
    flax_ = train(flax_learner(hparams, settings, steps_per_call=8, drop_last=False, **changes), stream())
    assert torch_.step == flax_.step
    assert difference(flax_.weights(), torch_.weights()) < bar(hparams)
    assert difference(torch_.weights(), trained("pytorch", hparams, optimizer)) > 1e-4


TARGETS: tuple[Targets, ...] = ("classes", "labels", "values")


def on_tables() -> list[Any]:
    """Return the cases as parameters; by default each method has one of the three types of targets."""
    cases = [(t, i % 3 == k, case) for k, t in enumerate(TARGETS) for i, case in enumerate(EVERY_TARGET)]
    labelled = [("classes", case[0].name != "lamaml", case) for case in LABELLED]
    return [
        pytest.param(
            targets, *case, id=f"{targets} {name_of(case)}", marks=[] if default else [pytest.mark.slow]
        )
        for targets, default, case in [*cases, *labelled]
    ]


@pytest.mark.parametrize(("targets", "hparams", "optimizer"), on_tables())
def test_same_weights_on_tables(targets: Targets, hparams: AlgorithmHParams, optimizer: str) -> None:
    check_parity(hparams, optimizer, targets, tolerance=bar(hparams))


@pytest.mark.parametrize(
    "optimizer", some(OPTIMIZERS, ["nesterov and weight decay", "adam and weight decay", "adamw", "clipping"])
)
def test_same_weights_with_every_optimizer(optimizer: str) -> None:
    check_parity(NaiveHParams(), optimizer)


@pytest.mark.parametrize(("hparams", "optimizer"), marked(CASES, 1, ("kcl", "mcsgd")))
def test_scanned_steps_are_the_dispatched_steps(hparams: AlgorithmHParams, optimizer: str) -> None:
    """By default with the second case of methods that differ most; the one above takes everyone's first.

    In `tests/flax/test_step_loop.py` a plain loop of steps is compared with a scanned run for the others.
    """
    assert difference(scanned(hparams, optimizer), trained("pytorch", hparams, optimizer)) < bar(hparams)


ONE_EACH = {hparams.name: (hparams, optimizer) for hparams, optimizer in reversed(CASES)}
OWN = [case for case in [*CASES, *LONG] if case[0].name not in ("naive", "joint")]
ZERO = [
    EWCHParams(ewc_lambda=0, fisher_samples=20),
    SIHParams(si_lambda=0),
    MASHParams(mas_lambda=0, mas_samples=20),
    LFLHParams(lfl_lambda=0, freeze_head=False),
    LwFHParams(lwf_lambda=0),
    StableSGDHParams(lr_decay=1),
    *(cls(mem_size=0) for cls in (AGEMHParams, GEMHParams, ERHParams, MIRHParams, DERHParams, DERppHParams)),
    DERHParams(alpha=0, mem_size=50, mem_batch_size=7),
    DERppHParams(alpha=0, beta=0, mem_size=50, mem_batch_size=7),
    MCSGDHParams(lmc_init_position=1, lmc_lr=0, mem_size=60),
]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["task", "class"])
@pytest.mark.parametrize(("hparams", "optimizer"), ONE_EACH.values(), ids=ONE_EACH)
def test_same_weights_in_every_scenario(
    hparams: AlgorithmHParams, optimizer: str, scenario: Scenario
) -> None:
    """Replayed samples are of other tasks than the batch, each with its own mask.

    By default `tests/reference` compares both frameworks with NumPy in these scenarios.
    """
    check_parity(hparams, optimizer, scenario, tolerance=bar(hparams))


@pytest.mark.parametrize(("hparams", "optimizer"), marked(OWN, 0))
def test_a_usual_strength_moves_the_weights(hparams: AlgorithmHParams, optimizer: str) -> None:
    naive = None if hparams.name != "stable_sgd" else NaiveHParams(reset_optimizer=hparams.reset_optimizer)
    check_effect(hparams, optimizer, modes=["jax"], naive=naive)


@pytest.mark.parametrize("mode", BOTH)
def test_mir_is_er_if_all_candidates_are_replayed(mode: Mode) -> None:
    mir = trained(mode, MIRHParams(mem_size=50, mem_batch_size=9, num_candidates=9), "sgd")
    er = trained(mode, ERHParams(mem_size=50, mem_batch_size=9), "sgd")
    for name, array in er.items():
        np.testing.assert_array_equal(mir[name], array)


def zero_id(hparams: AlgorithmHParams) -> str:
    return f"{hparams.name} {getattr(hparams, 'mem_size', '')}"


@pytest.mark.parametrize("mode", BOTH)
@pytest.mark.parametrize("hparams", ZERO, ids=zero_id)
def test_strength_zero_is_naive_exactly(mode: Mode, hparams: AlgorithmHParams) -> None:
    check_strength_zero(hparams, modes=[mode])


@pytest.mark.slow
@pytest.mark.parametrize("hparams", ZERO, ids=zero_id)
def test_strength_zero_is_naive_exactly_in_scanned_steps(hparams: AlgorithmHParams) -> None:
    zero, naive = (scanned(each, "momentum", "class") for each in (hparams, NaiveHParams()))
    for name, array in naive.items():
        np.testing.assert_array_equal(zero[name], array)


@pytest.mark.parametrize("scenario", ["domain", "task", "class", *TARGETS])
def test_the_streams_have_at_least_200_steps(scenario: Stream) -> None:
    assert sum(len(task.train) // training().batch_size for task in stream(scenario).tasks) >= 200


def test_same_accuracies_and_losses_in_both_frameworks() -> None:
    learners = [make(NaiveHParams(), SGD) for make in (torch_learner, flax_learner)]
    for learner in learners:
        learner.fit_task(stream().tasks[0], SILENT)
    for task in stream().tasks:
        torch_, flax_ = (learner.evaluate(task, "test") for learner in learners)
        assert torch_[:2] == flax_[:2]
        assert torch_.masked_score == flax_.masked_score
        np.testing.assert_allclose(torch_.loss, flax_.loss, rtol=1e-10)


def test_initial_weights_are_torch_layers_distribution() -> None:
    weights = flax_learner(NaiveHParams(), SGD).weights()
    assert difference(weights, torch_learner(NaiveHParams(), SGD).weights()) == 0
    for name, fan_in in (("dense_0", 64), ("dense_1", 32), ("head", 24)):
        draws = np.concatenate([weights[f"{name}/kernel"].ravel(), weights[f"{name}/bias"]]) * np.sqrt(fan_in)
        assert np.abs(draws).max() < 1
        np.testing.assert_allclose(draws.mean(), 0, atol=4 / np.sqrt(3 * draws.size))
        np.testing.assert_allclose(draws.var(), 1 / 3, rtol=0.25)


def test_every_optimizer_of_the_table_differs() -> None:
    ends = [trained("jax", NaiveHParams(), name) for name in OPTIMIZERS]
    for i, a in enumerate(ends):
        for b in ends[:i]:
            assert difference(a, b) > 1e-3
