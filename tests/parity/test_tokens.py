"""Runs on tokens with padding: three tasks of 205 steps in float64, with a transformer and with a GRU."""

from __future__ import annotations

from functools import cache
from typing import Any, get_args

import numpy as np
import pytest

from sequel_core.algorithms.der import DERHParams
from sequel_core.algorithms.derpp import DERppHParams
from sequel_core.algorithms.er import ERHParams
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.algorithms.si import SIHParams
from sequel_core.hparams import AlgorithmHParams
from sequel_core.runs.learner import Mode, plugin
from sequel_core.stream.benchmark import Benchmark
from sequel_core.testing.parity import BOTH, OPTIMIZERS, SGD, SILENT, Weights, difference, train, training
from tests.parity.cases import name_of
from tests.tokens import TokenRun, token_network, tokens

CASES: list[tuple[AlgorithmHParams, str]] = [
    (NaiveHParams(), "momentum"),
    (EWCHParams(ewc_lambda=20, fisher_samples=101), "momentum"),
    (SIHParams(si_lambda=0.3), "momentum"),
    (ERHParams(mem_size=50, mem_batch_size=9), "clipping"),
    (DERppHParams(mem_size=50, mem_batch_size=9), "sgd"),
]
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
        for case in CASES
    ],
)


def benchmark(run: TokenRun) -> Benchmark:
    """Return three tasks of 205 batches."""
    return tokens(run, train=205 * 7)


@cache
def trained(mode: Mode, hparams: AlgorithmHParams, optimizer: str, run: TokenRun) -> Weights:
    """Return the weights after all tasks."""
    package: Any = plugin(mode)
    settings, changes = OPTIMIZERS[optimizer]
    learner = package.make_learner(
        hparams,
        token_network(run, package),
        package.build_optimizer(settings),
        benchmark(run),
        training(**changes),
    )
    return train(learner, benchmark(run)).weights()


@cases
def test_same_weights_in_both_frameworks(run: TokenRun, hparams: AlgorithmHParams, optimizer: str) -> None:
    torch, flax = (trained(mode, hparams, optimizer, run) for mode in BOTH)
    assert difference(flax, torch) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_a_usual_strength_changes_the_weights(run: TokenRun) -> None:
    for hparams, optimizer in CASES[1:]:
        naive, weights = (trained("jax", each, optimizer, run) for each in (NaiveHParams(), hparams))
        assert difference(weights, naive) > 1e-3


ZERO = [
    EWCHParams(ewc_lambda=0, fisher_samples=20),
    SIHParams(si_lambda=0),
    ERHParams(mem_size=0),
    DERHParams(alpha=0, mem_size=50, mem_batch_size=7),
    DERppHParams(alpha=0, beta=0, mem_size=50, mem_batch_size=7),
]


@pytest.mark.slow
@pytest.mark.parametrize("mode", BOTH)
@pytest.mark.parametrize("hparams", ZERO, ids=lambda hparams: hparams.name)
@pytest.mark.parametrize("run", ["transformer next_token", "gru chain"])
def test_strength_zero_is_naive(run: TokenRun, hparams: AlgorithmHParams, mode: Mode) -> None:
    """Exactly in torch. XLA fuses the softmax with other operations, which rounds differently."""
    zero, naive = (trained(mode, each, "momentum", run) for each in (hparams, NaiveHParams()))
    assert difference(zero, naive) <= (0 if mode == "pytorch" else 1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["transformer next_token", "gru chain"])
@pytest.mark.parametrize(("hparams", "optimizer"), [pytest.param(*case, id=case[0].name) for case in CASES])
def test_frozen_embeddings_stay_as_they_are(run: TokenRun, hparams: AlgorithmHParams, optimizer: str) -> None:
    settings, changes = OPTIMIZERS[optimizer]
    lightning, flax = map(plugin, BOTH)
    net = token_network(run, lightning)
    net.token_embedding.requires_grad_(False)
    stream, other = benchmark(run), token_network(run, flax)
    factory, tx = (package.build_optimizer(settings) for package in (lightning, flax))
    given = stream, training(**changes)
    torch_learner = lightning.make_learner(hparams, net, factory, *given)
    flax_learner = flax.make_learner(
        hparams, other, tx, *given, trainable=lambda path: "token_embedding" not in path
    )
    before = torch_learner.weights()
    ends = [train(learner, stream).weights() for learner in (torch_learner, flax_learner)]
    assert difference(*ends) < 1e-10
    for name, array in before.items():
        if name == "token_embedding/embedding":
            assert all(np.array_equal(weights[name], array) for weights in ends)
        elif not name.endswith("key/bias"):  # whose gradient is 0, because the softmax does not depend on it
            assert difference({name: ends[0][name]}, {name: array}) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_scores_are_the_accuracies_of_the_tokens_that_are_not_padding(run: TokenRun) -> None:
    stream = benchmark(run)
    task = stream.tasks[0]
    learners = []
    for mode in BOTH:
        package: Any = plugin(mode)
        net, optimizer = token_network(run, package), package.build_optimizer(SGD)
        learner = package.make_learner(NaiveHParams(), net, optimizer, stream, training())
        learner.fit_task(task, SILENT)
        learners.append(learner)
    torch, flax = (learner.evaluate(task, "test") for learner in learners)
    assert torch.score == flax.score
    np.testing.assert_allclose(torch.loss, flax.loss, rtol=1e-10)
    samples = task.test.take(np.arange(len(task.test)))
    flax_learner: Any = learners[1]
    params = {"params": flax_learner.ts.params}
    guesses = np.asarray(flax_learner.model.apply(params, **samples.x, train=False)).argmax(-1)
    rows = samples.x["attention_mask"] > 0 if stream.spec.per_token else slice(None)
    assert torch.score == pytest.approx((guesses[rows] == samples.y[rows]).mean(), rel=1e-6)
