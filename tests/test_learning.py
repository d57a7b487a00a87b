"""Methods reduce forgetting on MNIST. Each test takes minutes, so `make slow` runs them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest

from sequel_core import load_result
from sequel_core.cli import main
from sequel_core.runs.results import Result

pytestmark = pytest.mark.slow

MODES = ("pytorch", "jax")
ROTATED = ("benchmark=rotatedmnist", "benchmark.num_tasks=5", "benchmark.per_task_rotation=36")
INCREMENTAL = ("benchmark=splitmnist", "benchmark.scenario=class")
PERMUTED = ("benchmark=permutedmnist", "benchmark.num_tasks=10")
STRENGTHS = {
    "ewc": ("algo.ewc_lambda=10",),
    "si": ("algo.si_lambda=0.5",),
    "mas": ("algo.mas_lambda=0.01", "algo.mas_samples=2000"),
}
RATE = {"ewc": "optimizer.lr=0.03", "si": "optimizer.lr=0.01", "mas": "optimizer.lr=0.01"}


@cache
def run(*overrides: str) -> Result:
    """Return the result of `sequel run` with these arguments: MLP 256-256, SGD, batch 10, one epoch."""
    run_dir = mkdtemp()
    assert main(["run", *overrides, f"run_dir={run_dir}"]) == 0
    return load_result(run_dir)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stream", [ROTATED, INCREMENTAL], ids=["rotated", "class-incremental"])
@pytest.mark.parametrize("algo", ["er", "der", "derpp"])
def test_replay_halves_the_forgetting_of_naive_finetuning(
    algo: str, stream: tuple[str, ...], mode: str
) -> None:
    naive = run("algo=naive", *stream, f"mode={mode}")
    replay = run(f"algo={algo}", "algo.mem_size=200", *stream, f"mode={mode}")
    assert naive.forgetting > 0.4
    assert replay.forgetting < 0.5 * naive.forgetting
    assert replay.average_accuracy > naive.average_accuracy


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("algo", STRENGTHS)
def test_penalties_beat_naive_finetuning_by_five_points(algo: str, mode: str) -> None:
    """All other settings are the same."""
    naive = run("algo=naive", *PERMUTED, RATE[algo], f"mode={mode}")
    ours = run(f"algo={algo}", *STRENGTHS[algo], *PERMUTED, RATE[algo], f"mode={mode}")
    assert ours.average_accuracy - naive.average_accuracy > 0.05


@pytest.mark.parametrize(
    ("algo", "stream"),
    [("er", ROTATED), ("derpp", INCREMENTAL), ("mas", PERMUTED)],
    ids=["er", "derpp", "mas"],
)
def test_both_frameworks_reach_the_same_accuracy(algo: str, stream: tuple[str, ...]) -> None:
    rate = (RATE[algo],) if algo in RATE else ()
    settings = (*STRENGTHS.get(algo, ("algo.mem_size=200",)), *stream, *rate)
    torch, flax = (run(f"algo={algo}", *settings, f"mode={mode}") for mode in MODES)
    assert abs(torch.average_accuracy - flax.average_accuracy) < 0.01


@pytest.mark.parametrize("name", ["mcsgd", "lamaml"])
def test_published_numbers_are_reached(name: str, tmp_path: Path) -> None:
    """Run one seed in JAX. The default of `sequel reproduce NAME` is three seeds in both frameworks."""
    command = ["reproduce", name, "--mode", "jax", "--seeds", "1", "--results", str(tmp_path)]
    assert main(command) == 0


@pytest.mark.parametrize("mode", MODES)
def test_icarl_beats_its_head_and_naive_finetuning_and_kcl_does_not_forget(mode: str) -> None:
    naive = run("algo=naive", *INCREMENTAL, f"mode={mode}")
    settings = ("optimizer.lr=0.05", "benchmark.batch_size=64", f"mode={mode}")
    icarl = run("algo=icarl", *INCREMENTAL, *settings)
    assert icarl.average_accuracy > icarl.summary["head_average_accuracy"] + 0.05
    assert icarl.average_accuracy > naive.average_accuracy + 0.4
    kcl = run("algo=kcl", "benchmark=splitmnist", "benchmark.subset=4000", RATE["ewc"], f"mode={mode}")
    assert kcl.average_accuracy > 0.95
    assert kcl.forgetting < 0.05
