"""Runs on tokens with padding, with dropout, that are resumed in the middle of a task end bit-identical."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sequel_core.algorithms.derpp import DERppHParams
from sequel_core.hparams import OptimizerHParams, TrainingHParams
from sequel_core.runs.learner import Mode, plugin
from sequel_core.testing.parity import BOTH
from sequel_core.testing.resume import EVERYTHING, assert_same_end, cut_back, go
from tests.tokens import TokenRun, token_network, tokens


@pytest.mark.slow
@pytest.mark.parametrize("mode", BOTH)
@pytest.mark.parametrize("run", ["transformer next_token", "gru chain"])
def test_a_run_is_resumed_in_the_middle_of_a_task(run: TokenRun, mode: Mode, tmp_path: Path) -> None:
    benchmark, package = tokens(run, train=60), plugin(mode)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"

    def learner() -> Any:
        return package.make_learner(
            DERppHParams(mem_size=25, mem_batch_size=6, reset_optimizer=False),
            token_network(run, package, dropout=0.2),
            package.build_optimizer(OptimizerHParams(lr=0.05, momentum=0.9)),
            benchmark,
            TrainingHParams(batch_size=5, seed=3, epochs_per_task=2, log_every_n_steps=5),
        )

    go(learner(), benchmark, straight, EVERYTHING)
    cut_back(straight, resumed)
    go(learner(), benchmark, resumed, EVERYTHING)
    assert_same_end(resumed, straight)
