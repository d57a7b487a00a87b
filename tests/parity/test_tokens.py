"""Runs on tokens with padding: three tasks of 205 steps in float64, with a transformer and with a GRU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest

import sequel_flax
import sequel_lightning
from sequel_core.algorithms.der import DERHParams
from sequel_core.algorithms.derpp import DERppHParams
from sequel_core.algorithms.er import ERHParams
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.algorithms.si import SIHParams
from sequel_core.hparams import AlgorithmHParams
from sequel_core.runs.learner import Learner
from tests.parity.cases import (
    ON_TOKENS,
    SGD,
    SILENT,
    benchmark,
    difference,
    flax_learner,
    name_of,
    torch_learner,
    trained,
    training,
)
from tests.tables import TokenRun, token_network

RUNS: tuple[TokenRun, ...] = get_args(TokenRun)
DEFAULT = {("transformer next_token", "er")}
cases = pytest.mark.parametrize(
    ("run", "hparams", "optimizer"),
    [
        pytest.param(
            run,
            *case,
            id=f"{run} {name_of(case)}",
            marks=[] if (run, case[0].name) in DEFAULT else [pytest.mark.slow],
        )
        for run in RUNS
        for case in ON_TOKENS
    ],
)


@cases
def test_same_weights_in_both_frameworks(run: TokenRun, hparams: AlgorithmHParams, optimizer: str) -> None:
    torch_, flax_ = (trained(make, hparams, optimizer, run) for make in (torch_learner, flax_learner))
    assert difference(flax_, torch_) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_a_usual_strength_changes_the_weights(run: TokenRun) -> None:
    for hparams, optimizer in ON_TOKENS[1:]:
        naive, weights = (trained(flax_learner, each, optimizer, run) for each in (NaiveHParams(), hparams))
        assert difference(weights, naive) > 1e-3


ZERO = [
    EWCHParams(ewc_lambda=0, fisher_samples=20),
    SIHParams(si_lambda=0),
    ERHParams(mem_size=0),
    DERHParams(alpha=0, mem_size=50, mem_batch_size=7),
    DERppHParams(alpha=0, beta=0, mem_size=50, mem_batch_size=7),
]


@pytest.mark.slow
@pytest.mark.parametrize("framework", [torch_learner, flax_learner], ids=["torch", "flax"])
@pytest.mark.parametrize("hparams", ZERO, ids=lambda hparams: hparams.name)
@pytest.mark.parametrize("run", ["transformer next_token", "gru chain"])
def test_strength_zero_is_naive(
    run: TokenRun, hparams: AlgorithmHParams, framework: Callable[..., Learner]
) -> None:
    """Exactly in torch. XLA fuses the softmax with other operations, which rounds differently."""
    zero, naive = (trained(framework, each, "momentum", run) for each in (hparams, NaiveHParams()))
    assert difference(zero, naive) <= (0 if framework is torch_learner else 1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["transformer next_token", "gru chain"])
@pytest.mark.parametrize("hparams", [case[0] for case in ON_TOKENS], ids=lambda hparams: hparams.name)
def test_frozen_embeddings_stay_as_they_are(run: TokenRun, hparams: AlgorithmHParams) -> None:
    net = token_network(run, sequel_lightning)
    net.token_embedding.requires_grad_(False)
    stream = benchmark(run)
    factory, tx = sequel_lightning.build_optimizer(SGD), sequel_flax.build_optimizer(SGD)
    learners: list[Any] = [
        sequel_lightning.make_learner(hparams, net, factory, stream, training()),
        sequel_flax.make_learner(
            hparams,
            token_network(run, sequel_flax),
            tx,
            stream,
            training(),
            trainable=lambda path: path[0] != "token_embedding",
        ),
    ]
    before = learners[0].weights()
    for learner in learners:
        for task in stream.tasks:
            learner.fit_task(task, SILENT)
    torch_, flax_ = (learner.weights() for learner in learners)
    assert difference(flax_, torch_) < 1e-10
    np.testing.assert_array_equal(torch_["token_embedding/embedding"], before["token_embedding/embedding"])
    np.testing.assert_array_equal(flax_["token_embedding/embedding"], before["token_embedding/embedding"])
    assert difference({"head/bias": torch_["head/bias"]}, {"head/bias": before["head/bias"]}) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_same_scores_and_losses(run: TokenRun) -> None:
    """The scores are also those of a loop over the samples, which counts the tokens that are not padding."""
    learners = [make(NaiveHParams(), SGD, run) for make in (torch_learner, flax_learner)]
    task = benchmark(run).tasks[0]
    for learner in learners:
        learner.fit_task(task, SILENT)
    torch_, flax_ = (learner.evaluate(task, "test") for learner in learners)
    assert torch_.score == flax_.score
    np.testing.assert_allclose(torch_.loss, flax_.loss, rtol=1e-10)
    samples = task.test.take(np.arange(len(task.test)))
    made: Any = learners[1]
    logits = np.asarray(made.model.apply({"params": made.ts.params}, **samples.x, train=False))
    right, counted = 0, 0
    for row in range(len(task.test)):
        length = int(samples.x["attention_mask"][row].sum())
        guesses, targets = logits[row].argmax(-1), samples.y[row]
        tokens = range(length) if benchmark(run).spec.per_token else [()]
        right += sum(int(guesses[i] == targets[i]) for i in tokens)
        counted += len(tokens)
    assert torch_.score == pytest.approx(right / counted, rel=1e-6)
