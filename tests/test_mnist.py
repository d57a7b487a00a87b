"""The main experiment of the paper on MNIST. Each test takes minutes, so `make slow` runs them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest

from sequel_core import load_result, load_weights
from sequel_core.cli import main
from sequel_core.runs.results import Result

pytestmark = pytest.mark.slow

CODE_2 = Path(__file__).parent / "cli" / "fixtures" / "code2_ewc.yaml"
MODES = ("pytorch", "jax")
SEEDS = (0, 1, 2)
ROTATED = ("benchmark=rotatedmnist", "benchmark.num_tasks=20", "benchmark.per_task_rotation=9")


@cache
def run(*overrides: str) -> Result:
    """Return the result of `sequel run` with these arguments."""
    run_dir = mkdtemp()
    assert main(["run", *overrides, f"run_dir={run_dir}"]) == 0
    return load_result(run_dir)


@pytest.mark.parametrize("mode", MODES)
def test_naive_finetuning_reaches_the_published_accuracy(mode: str) -> None:
    """The MC-SGD paper reports 46.3 (1.37)."""
    result = run("algo=naive", *ROTATED, f"mode={mode}")
    assert result.summary["steps"] == 120_000
    assert 0.44 < result.average_accuracy < 0.49


def test_both_frameworks_reach_the_same_accuracy() -> None:
    torch, flax = (run("algo=naive", *ROTATED, f"mode={mode}") for mode in MODES)
    assert abs(torch.average_accuracy - flax.average_accuracy) < 0.003
    assert abs(torch.matrix[0, 0] - flax.matrix[0, 0]) < 0.001
    assert torch.run_dir is not None
    assert flax.run_dir is not None
    assert load_weights(torch.run_dir).keys() == load_weights(flax.run_dir).keys()


@pytest.mark.parametrize("mode", MODES)
def test_code_2_beats_naive_finetuning_with_the_same_settings(mode: str) -> None:
    """Compare EWC and naive finetuning with the settings of Code 2 in the paper, over three paired seeds."""
    gains = []
    for seed in SEEDS:
        common = (str(CODE_2), "wandb=null", f"mode={mode}", f"seed={seed}")
        gains.append(run(*common).average_accuracy - run(*common, "algo=naive").average_accuracy)
    assert np.mean(gains) > 0.005
