"""Budgets of `compare`: sizes and epochs against closed forms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import sequel_lightning  # noqa: F401 - declares the operators of torchvision, which Lightning imports
from sequel_benchmarks import RotatedDigits
from sequel_core import compare, load_result, report
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.cli import main
from sequel_core.experiment.compose import compose
from sequel_core.experiment.schema import ExperimentConfig
from sequel_core.runs import learner
from sequel_core.runs.budget import Budget, epochs_in, parse_budget, within_budget
from tests.core.scripted import STEPS, ScriptedPlugin, scripted

SMALL = ["benchmark=rotateddigits", "benchmark.num_tasks=2", "benchmark.subset=100"]
"""Two tasks of 100 training images of 8 x 8 bytes: 10 steps each with batches of 10."""


def config(*overrides: str) -> ExperimentConfig:
    return compose([*SMALL, *overrides]).config


def silent(line: str) -> None:
    pass


def test_budgets_are_parsed() -> None:
    assert parse_budget("steps=2000") == Budget("steps", 2000)
    assert parse_budget("seconds=1.5") == Budget("seconds", 1.5)
    sizes = {"4MB": 4e6, "1.5kB": 1500, "2 MiB": 2 * 2**20, "100": 100, "3B": 3, "1GiB": 2**30}
    assert {text: parse_budget(f"memory={text}").amount for text in sizes} == sizes


@pytest.mark.parametrize(
    "text", ["steps", "steps=", "steps=0", "steps=1.5", "steps=5MB", "memory=4XB", "seconds=-1", "epochs=3"]
)
def test_other_budgets_are_errors(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"budget must be steps=N, seconds=S or memory=SIZE .* got {text}"):
        compare([*SMALL, "mode=jax"], run_dir=tmp_path / "new", budget=text)
    assert not (tmp_path / "new").exists()


def test_epochs_give_every_run_the_same_steps() -> None:
    """10 steps per task and epoch with batches of 10, 4 with batches of 25; joint training has 10 and 20."""
    runs = {
        "naive": [config("algo=naive", f"seed={seed}") for seed in (0, 1)],
        "larger": [config("algo=naive", "training.batch_size=25")],
        "odd": [config("algo=naive", "training.batch_size=30", "training.drop_last=false")],
        "joint": [config("algo=joint")],
    }
    done = within_budget(runs, Budget("steps", 120), silent)
    epochs = {label: [one.training.epochs_per_task for one in group] for label, group in done.items()}
    assert epochs == {"naive": [6, 6], "larger": [15], "odd": [15], "joint": [4]}
    assert [one.training.seed for one in done["naive"]] == [0, 1]


@pytest.mark.parametrize(
    ("steps", "overrides", "message"),
    [
        (50, ["algo=naive"], "must be a multiple of 20, .* for a, pytorch, got 50; use 40 or 60"),
        (10, ["algo=naive"], "got 10; use 20"),
        (40, ["algo=icarl"], "got a, pytorch, which also trains on its exemplars; use seconds or memory"),
    ],
)
def test_steps_that_cannot_be_taken(steps: int, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        within_budget({"a": [config(*overrides)]}, Budget("steps", steps), silent)


def clock(start: float, epoch: float, asked: list[int]) -> Callable[[int], float]:
    def train(epochs: int) -> float:
        asked.append(epochs)
        return start + epochs * epoch

    return train


@pytest.mark.parametrize(
    ("seconds", "start", "epoch", "epochs", "asked"),
    [
        (60, 5.0, 0.5, 110, [1, 2, 4, 8, 16, 32]),  # (60 - 5) / 0.5; 32 epochs take 21 s
        (60, 0.0, 7.0, 8, [1, 2, 4]),
        (60, 0.0, 16.0, 3, [1]),
        (60, 30.0, 30.0, 1, [1]),
    ],
)
def test_epochs_that_fit_into_the_time(
    seconds: float, start: float, epoch: float, epochs: int, asked: list[int]
) -> None:
    """A run takes a time to compile and a time per epoch."""
    shorter: list[int] = []
    assert epochs_in(seconds, clock(start, epoch, shorter), "a") == epochs
    assert shorter == asked
    with pytest.raises(
        ValueError, match=r"one epoch of every task, which took 61\.0 s for a, got 60; raise it"
    ):
        epochs_in(60, clock(1, 60, []), "a")


@pytest.mark.parametrize("mode", ["pytorch", "jax"])
def test_the_largest_memory_that_fits(mode: str) -> None:
    """A slot has 64 bytes of image, a label and a task of 4 bytes each, and for DER 40 bytes of logits."""
    limit, lines = 20_000, list[str]()
    runs = {
        "er": [config("algo=er", f"mode={mode}", "algo.mem_size=50", f"seed={seed}") for seed in (0, 1)],
        "agem": [
            config("algo=agem", "algo.per_task_memory_samples=10", "algo.mem_batch_size=10", f"mode={mode}")
        ],
        "der": [config("algo=der", f"mode={mode}")],
        "naive": [config("algo=naive", f"mode={mode}")],
    }
    done = within_budget(runs, Budget("memory", limit), lines.append)
    sizes = {label: {vars(one.algo).get("mem_size") for one in group} for label, group in done.items()}
    er = limit // 72
    assert sizes["er"] == {er}
    assert sizes["agem"] == {er // 20 * 20}  # as many of each class of each task
    assert sizes["der"] == {limit // (72 + 40)}
    assert done["naive"] == runs["naive"]
    assert lines[0] == f"er, {mode}: mem_size={er} keeps {er * 72:,} bytes"
    parameters = sum(i * o + o for i, o in ((64, 256), (256, 256), (256, 10)))
    with pytest.raises(ValueError, match=rf"at least \d+ bytes, which ewc, {mode} keeps whatever") as error:
        within_budget({"ewc": [config("algo=ewc", f"mode={mode}")]}, Budget("memory", limit), silent)
    assert abs(int(str(error.value).split("at least ")[1].split()[0]) - 8 * parameters) < 64
    with pytest.raises(
        ValueError, match=r"budget=memory must be at least 720 bytes, 10 samples of er, jax, got"
    ):
        within_budget({"er": [config("algo=er", "mode=jax")]}, Budget("memory", 100), silent)


def test_tables_and_reports_state_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin, asked = ScriptedPlugin(), list[dict[str, Any]]()
    monkeypatch.setattr(learner, "plugin", lambda mode: plugin)
    monkeypatch.setattr(report, "write_report", lambda *_, **settings: asked.append(settings))
    comparison = compare([*SMALL, "algo=naive,ewc"], run_dir=tmp_path / "all", budget="steps=60")
    assert [one.training.epochs_per_task for one in plugin.built] == [3] * 4
    stated = "equal steps, 60 of training in every run"
    assert asked == [{"budget": stated}]
    out = capsys.readouterr().out
    assert "naive, pytorch: 3 epochs of each task, 60 steps\n" in out
    assert out.count(f"{stated} ") == 1
    assert f"note: ewc, jax, seed 0 used {2 * STEPS} steps, which is not {stated}\n" in out
    assert comparison.budget == Budget("steps", 60)
    digits = RotatedDigits(num_tasks=2, subset=60)
    with pytest.raises(ValueError, match="budget is for overrides and configurations, got a Scripted"):
        compare([scripted("jax", NaiveHParams(), digits)], digits, budget="steps=60")


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["steps=60", "memory=20kB", "seconds=5"])
def test_runs_use_their_budget(budget: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *SMALL, "algo=naive,er", "run_dir=all", "--budget", budget]) == 0
    assert f"Budget: {parse_budget(budget)}." in Path("all/report.html").read_text()
    for path in sorted(Path("all").glob("*_seed0")):
        result = load_result(path)
        if budget.startswith("steps"):
            assert result.summary["steps"] == 60
        elif budget.startswith("memory"):
            assert result.summary["memory_bytes"] == (
                0 if "naive" in path.name else pytest.approx(20e3, abs=80)
            )
        else:
            assert yaml.safe_load((path / "config.yaml").read_text())["training"]["epochs_per_task"] > 1
