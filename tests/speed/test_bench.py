"""`make bench`: every algorithm has rows, and the hand-written loops are the same methods, and learn."""

import csv
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from sequel_core.algorithms import ALGORITHMS
from sequel_core.hparams import OptimizerHParams, TrainingHParams
from sequel_core.runs.learner import FitMonitor, Mode
from sequel_core.stream import plan
from sequel_core.stream.task import AnySplit, Samples
from sequel_flax.backbones import CNN as FlaxCNN
from sequel_flax.backbones import MLP as FlaxMLP
from sequel_lightning.backbones import CNN, MLP
from sequel_lightning.data import as_batch
from tests.speed import bench, loops_flax, loops_lightning
from tests.speed.bench import (
    CONVOLUTIONAL,
    NETWORKS,
    SILENT,
    WIDTHS,
    Row,
    main,
    settings,
    stream,
    table,
)
from tests.speed.many import five_tasks

MODES: list[Mode] = ["pytorch", "jax"]
MODULES = {"pytorch": loops_lightning, "jax": loops_flax}
ROOT = Path(__file__).resolve().parents[2]
SIZE, SAMPLES, STEPS = 10, 40, 20
RANDOM = ("er", "er_ace", "mir", "der", "derpp", "lamaml")  # draws from the memory, which differ
TRAINING = TrainingHParams(batch_size=SIZE, log_every_n_steps=1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "algo", ["naive", *(pytest.param(a, marks=pytest.mark.slow) for a in ALGORITHMS if a != "naive")]
)
def test_every_algorithm_has_rows(algo: str, mode: str, tmp_path: Path) -> None:
    line = ["--algo", algo, "--mode", mode, "--batch-size", "10", "--steps", "3", "--rounds", "1"]
    main([*line, "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == (2 if mode == "jax" else 3 if algo == "naive" else 4)
    assert all(row["algo"] == algo and row["steps_per_second"] > 0 and row["ratio"] > 0 for row in rows)


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_has_rows(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learner and the loop have the same score, or an error is raised."""
    monkeypatch.setattr(bench, "EVALUATED", 2000)
    main(["--evaluation", "--mode", mode, "--rounds", "1", "--json", str(tmp_path / "rows.json")])
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert (row["algo"], row["mode"]) == ("naive", mode)
    assert min(row["steps_per_second"], row["ratio"]) > 0


@pytest.mark.slow
def test_runs_at_once_have_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--together", "--algo", "ewc", "--batch-size", "10", "--steps", "20", "--rounds", "1"]
    main([*line, "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["algo"], row["members"]) for row in rows] == [("ewc", 1), ("ewc", 4), ("ewc", 10)]
    assert all(row["seconds"] > 0 for row in rows)
    assert rows[0]["ratio"] == 1
    assert "Seconds of runs at once in JAX" in capsys.readouterr().out


def test_five_tasks_have_the_batches_that_are_asked_for() -> None:
    benchmark = five_tasks("er", 10, 3)
    assert [(task.index, len(task.train), len(task.test)) for task in benchmark.tasks] == [
        (i, 30, 5) for i in range(5)
    ]


@pytest.mark.slow
def test_starts_have_rows(tmp_path: Path) -> None:
    main(["--startup", "--rounds", "1", "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["mode"] for row in rows] == MODES
    assert all(min(row["first"], row["second"]) > 0 for row in rows)


@pytest.mark.slow
def test_a_fresh_process_measures() -> None:
    """By default `test_every_algorithm_has_rows` runs the same command in this process."""
    line = ["--algo", "naive", "--mode", "pytorch", "--batch-size", "10", "--steps", "2", "--rounds", "1"]
    command = [sys.executable, "-m", "tests.speed", *line]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert "PyTorch loop" in child.stdout


@pytest.mark.parametrize(
    ("backbone", "algo"),
    [
        ("cnn", "er"),
        *(pytest.param("cnn", a, marks=pytest.mark.slow) for a in CONVOLUTIONAL if a != "er"),
        *(pytest.param("resnet18_thin", a, marks=pytest.mark.slow) for a in CONVOLUTIONAL),
        pytest.param("resnet18", "naive", marks=pytest.mark.slow),
    ],
)
def test_convolutional_networks_have_rows(
    backbone: str, algo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    line = ["--backbone", backbone, "--algo", algo, "--batch-size", "4", "--steps", "2", "--rounds", "1"]
    main([*line, "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    torch_rows = ["bare LightningModule", "PyTorch loop", "sequel, step by step"]
    torch_rows += ["sequel, naive"] if algo != "naive" else []
    assert [row["reference"] for row in rows] == [*torch_rows, "JAX step, dispatched"]
    assert all(row["steps_per_second"] > 0 and row["ratio"] > 0 for row in rows)
    out = " ".join(capsys.readouterr().out.split())
    assert f"{NETWORKS[backbone].title}, 32x32x3 pixels in 100 classes, median of 1" in out
    assert "Scanned steps are left out" in out


@pytest.mark.parametrize("mode", MODES)
def test_logging_is_compared_with_none(
    mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(bench, "TemporaryDirectory", lambda: nullcontext(str(tmp_path)))
    line = ["--algo", "naive", "--mode", mode, "--batch-size", "4", "--steps", "60", "--rounds", "2"]
    main(["--logging", *line, "--json", str(tmp_path / "rows.json")])
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["reference"] == "sequel, no logger"
    assert row["ratio"] > 0
    assert "Each of console, csv, tensorboard gets" in " ".join(capsys.readouterr().out.split())
    with (tmp_path / "csv" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    fits = range(4)  # the first task, the compilation, and two turns, of 60 steps each
    assert [int(row["step"]) for row in rows] == [60 * fit + step for fit in fits for step in (50, 60)]
    assert all(float(row["train/loss"]) > 0 for row in rows)
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_the_table_of_an_mlp_has_no_caption() -> None:
    made = table([Row("naive", "jax", 10, 1234.5, "JAX step, scanned", 0.5)], 7, "mlp")
    assert (made.title, made.caption) == ("Training steps per second, MLP 256-256, median of 7", None)
    assert [next(iter(column.cells)) for column in made.columns] == [
        *("naive", "jax", "10", "1,234", "JAX step, scanned", "2,469", "0.50")
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--backbone", "cnn", "--algo", "lfl"], r"--algo must be one of naive, .*, er with --backbone cnn"),
        (["--backbone", "resnet"], r"--backbone: invalid choice: 'resnet' \(choose from '?mlp'?, '?cnn"),
        (["--algo", "ewd"], r"--algo: invalid choice: 'ewd' \(choose from "),
        (
            ["--together", "--algo", "kcl"],
            r"--algo must be one of naive, .*, mcsgd with --together, got 'kcl'",
        ),
        (["--mode", "torch"], r"--mode: invalid choice: 'torch' \(choose from '?pytorch'?, '?jax"),
        (["--rounds", "0"], r"--rounds: invalid positive value: '0'"),
        (["--steps", "0"], r"--steps: invalid positive value: '0'"),
        (["--batch-size", "10", "0"], r"--batch-size: invalid positive value: '0'"),
        (["--json", "missing/rows.json"], r"--json must be in a directory that exists, got missing"),
    ],
)
def test_a_wrong_option_is_an_error(
    line: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(line)
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(("size", "steps"), [(10, 5), (64, 4), (7, 1), (1, 1)])
def test_inner_steps_divide_the_batch(size: int, steps: int) -> None:
    assert vars(settings("lamaml", size))["n_inner_updates"] == steps


def flax_losses(start: Any, batch: Samples) -> list[float]:
    step, (params, kept) = jax.jit(start[0]), jax.tree.map(np.array, start[1:])
    losses = []
    for _ in range(STEPS):
        params, kept, loss = step(params, kept, batch.x, batch.y.astype(np.int32))
        losses.append(float(loss))
    return losses


def torch_losses(module: Any, batch: Samples) -> list[float]:
    optimizer = module.configure_optimizers()
    x, y = as_batch(batch)[:2]
    return [float(loops_lightning.plain_step(module, optimizer, (x, y))) for _ in range(STEPS)]


def check(algo: str, mode: Mode, backbone: str, network: Callable[..., Any]) -> None:
    """Train on one batch. Unless the memory is read, the first loss is the learner's at the same weights."""
    loops: Any = MODULES[mode]
    hparams = settings(algo, SIZE)
    benchmark = stream(hparams, SAMPLES, backbone)
    first, task = benchmark.tasks
    sizes: Any = {"image_shape": benchmark.image_shape} if mode == "pytorch" else {}
    net = network(num_classes=benchmark.num_classes, **sizes)
    optimizer = loops.build_optimizer(OptimizerHParams(lr=0.01))
    learner = loops.make_learner(hparams, net, optimizer, benchmark, TRAINING)
    learner.fit_task(first, SILENT)
    stored: AnySplit = task.train if task.coreset is None else task.coreset
    start = loops.hand_written(learner, benchmark.normalisation, stored.take(np.arange(len(stored))))
    if mode == "jax":
        split = learner.algorithm.training_split(learner.state, task.train)
        losses = flax_losses(start, first_batch(split))
    else:
        losses = torch_losses(start, first_batch(learner.module.training_split(task.train)))
    expected: list[float] = []
    learner.fit_task(task, FitMonitor(lambda progress: expected.append(progress.loss), lambda: None))
    if algo in RANDOM:
        assert math.isfinite(losses[0])
    else:  # KCL's bases come from other generators, but there are many of them
        np.testing.assert_allclose(losses[0], expected[0], rtol=0.05 if algo == "kcl" else 1e-5)
    if algo != "gdumb":  # it learns at the end of the task
        assert min(losses[-3:]) < 0.95 * losses[0]


def first_batch(split: AnySplit) -> Samples:
    return split.take(plan.epoch_batches(0, 1, 0, len(split), SIZE)[0])


SMALL: Any = {"channels": (8,), "linear_widths": (), "norm": "batch"}
QUICK = ("naive", "ewc", "er")  # of the JAX steps, which take long to compile


def slow_unless(quick: tuple[str, ...], algos: Any) -> list[Any]:
    return [pytest.param(a, marks=() if a in quick else pytest.mark.slow) for a in algos]


@pytest.mark.parametrize("algo", slow_unless(QUICK, ALGORITHMS))
def test_the_jax_step_is_the_same_method_and_learns(algo: str) -> None:
    check(algo, "jax", "mlp", lambda **sizes: FlaxMLP(WIDTHS, **sizes))


@pytest.mark.parametrize("algo", slow_unless(("naive",), CONVOLUTIONAL))
def test_the_jax_step_of_a_convolutional_network_is_the_same_method_and_learns(algo: str) -> None:
    check(algo, "jax", "cnn", lambda **sizes: FlaxCNN(**SMALL, **sizes))


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_the_torch_step_is_the_same_method_and_learns(algo: str) -> None:
    check(algo, "pytorch", "mlp", lambda **sizes: MLP(WIDTHS, **sizes))


@pytest.mark.parametrize("algo", CONVOLUTIONAL)
def test_the_torch_step_of_a_convolutional_network_is_the_same_method_and_learns(algo: str) -> None:
    check(algo, "pytorch", "cnn", lambda **sizes: CNN(**SMALL, **sizes))
