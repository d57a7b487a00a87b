"""The command with both frameworks on the bundled digits."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sequel_core.algorithms import ALGORITHMS
from sequel_core.cli import main
from sequel_core.runs.results import load_result

CODE2 = str(Path(__file__).parent / "fixtures" / "code2_ewc.yaml")
DIGITS = ["benchmark=rotateddigits", "benchmark.num_tasks=2", "benchmark.per_task_rotation=90"]


@pytest.mark.parametrize(
    "algo", ["ewc", *(pytest.param(algo, marks=pytest.mark.slow) for algo in ("naive", "joint"))]
)
def test_both_frameworks_agree(algo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    matrices = []
    for mode in ("pytorch", "jax"):
        line = [CODE2, *DIGITS, f"algo={algo}", f"mode={mode}", "backbone.dropout=0", "wandb=null"]
        assert main(["run", *line, "expected.avg_acc=60", f"run_dir={tmp_path / mode}"]) == 0
        result = load_result(tmp_path / mode)
        assert result.config["mode"] == mode
        assert result.config["algo"]["lr_decay"] == 0.8
        assert f"measured {100 * result.average_accuracy:.2f} %, expected 60 %" in capsys.readouterr().out
        matrices.append(result.matrix)
    assert matrices[0][0, 0] > 0.7  # chance is 0.1
    np.testing.assert_allclose(matrices[0], matrices[1], atol=0.01)


@pytest.mark.parametrize(
    "algo",
    [
        pytest.param(algo, marks=[] if algo in ("ewc", "er", "icarl") else [pytest.mark.slow])
        for algo in ALGORITHMS
    ],
)
def test_every_algorithm_runs_with_its_defaults_in_both_frameworks(algo: str, tmp_path: Path) -> None:
    results = {}
    for mode in ("pytorch", "jax"):
        size = 400 if algo == "kcl" else 300  # KCL uses 200 as its coreset
        line = [f"algo={algo}", *DIGITS, f"benchmark.subset={size}", f"mode={mode}"]
        line.append(f"run_dir={tmp_path / mode}")
        line += ["algo.task_given=true"] if algo == "kcl" else []
        assert main(["run", *line]) == 0
        results[mode] = load_result(tmp_path / mode)
    torch, flax = results["pytorch"], results["jax"]
    np.testing.assert_allclose(torch.matrix, flax.matrix, atol=0.02)
    assert torch.summary["memory_bytes"] == flax.summary["memory_bytes"]
    assert (torch.summary["memory_bytes"] > 0) == (algo not in ("naive", "joint", "stable_sgd"))
    if algo in ("er", "der", "derpp", "agem"):  # images, labels, tasks, and the logits of DER
        per_sample = 64 + 4 + 4 + (40 if algo.startswith("der") else 0)
        assert torch.summary["memory_bytes"] == torch.config["algo"]["mem_size"] * per_sample


def test_a_sweep_over_frameworks(tmp_path: Path) -> None:
    line = [
        "-m",
        "mode=pytorch,jax",
        "algo=naive,ewc",
        *DIGITS,
        "benchmark.subset=100",
        f"run_dir={tmp_path / 'sweep'}",
    ]
    assert main(["run", *line]) == 0
    rows = (tmp_path / "sweep" / "sweep.csv").read_text().splitlines()
    assert rows[0] == "rank,run,mode,algo,validation_average_accuracy,test_average_accuracy,seconds,status"
    assert len(rows) == 5


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pytorch", "jax"])
def test_the_papers_file_with_its_wandb_block_runs_offline(mode: str, tmp_path: Path) -> None:
    line = [CODE2, *DIGITS, "benchmark.subset=100", f"mode={mode}", "wandb.mode=offline", "run_dir=run"]
    program = "import sys; from sequel_core.cli import main; sys.exit(main(sys.argv[1:]))"
    # In a subprocess, because wandb starts threads and changes the state of the process.
    subprocess.run([sys.executable, "-c", program, "run", *line], cwd=tmp_path, check=True)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert len(list((tmp_path / "run").rglob("*.wandb"))) == 1
    assert load_result(tmp_path / "run").summary["status"] == "finished"


def test_a_diverged_run_keeps_its_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [*DIGITS, "mode=jax", "optimizer.lr=1e20", f"run_dir={tmp_path / 'run'}"]
    assert main(["run", *line]) == 1
    error = capsys.readouterr().err
    assert error.startswith("sequel: the training loss is no longer finite at task 0, epoch 0")
    assert error.count("\n") == 1
    assert load_result(tmp_path / "run").summary["status"] == "diverged"


@pytest.mark.parametrize(
    ("algo", "expected"),
    [("naive", "on"), ("lamaml", "off, because lamaml takes its steps itself")],
)
def test_verbose_says_how_steps_are_taken(
    algo: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [f"algo={algo}", *DIGITS, "benchmark.subset=20", "backbone.widths=[4]"]
    assert main(["run", "-v", *line, f"run_dir={tmp_path / 'run'}"]) == 0
    assert capsys.readouterr().err.splitlines() == [f"sequel: fast path: {expected}"]  # once for both tasks
