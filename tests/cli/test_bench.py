"""`sequel bench`: every algorithm has rows, and what it is compared with is the same method, and learns."""

import copy
import csv
import json
import math
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from sequel_core.algorithms import ALGORITHMS
from sequel_core.cli import bench, main
from sequel_core.cli.bench import CONVOLUTIONAL, NETWORKS, Row, _table, benched, stream
from sequel_core.hparams import AlgorithmHParams, OptimizerHParams, TrainingHParams
from sequel_core.runs.learner import FitMonitor
from sequel_core.stream import plan
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.task import AnySplit, Samples, Task
from sequel_flax import bench as flax_bench
from sequel_flax.backbones import CNN as FlaxCNN
from sequel_flax.backbones import MLP as FlaxMLP
from sequel_flax.build import make_learner as make_flax_learner
from sequel_flax.bundle import batch_stats
from sequel_flax.optimizers import build_optimizer as build_flax_optimizer
from sequel_lightning import bench as lightning_bench
from sequel_lightning.backbones import CNN, MLP
from sequel_lightning.build import build_optimizer, make_learner
from sequel_lightning.data import as_batch

SIZE, SAMPLES, STEPS = 10, 40, 20
SILENT = FitMonitor(lambda progress: None, lambda: None)
DRAWN = ("er", "der", "derpp", "lamaml")  # whose loss is of draws too, which differ here
TRAINING = TrainingHParams(batch_size=SIZE, log_every_n_steps=1)
SGD = OptimizerHParams(lr=0.01)


@pytest.mark.parametrize("mode", ["pytorch", "jax"])
@pytest.mark.parametrize(
    "algo", ["naive", "er", *(pytest.param(a, marks=pytest.mark.slow) for a in ALGORITHMS)]
)
def test_every_algorithm_has_rows(algo: str, mode: str, tmp_path: Path) -> None:
    line = ["--algo", algo, "--mode", mode, "--batch-size", "10", "--steps", "3", "--rounds", "1"]
    assert main(["bench", *line, "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == (2 if mode == "jax" or algo == "naive" else 3)
    assert all(row["algo"] == algo and row["steps_per_second"] > 0 and row["ratio"] > 0 for row in rows)


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
    assert main(["bench", *line, "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    torch_rows = ["bare LightningModule", "PyTorch loop", *(["sequel, naive"] if algo != "naive" else [])]
    assert [row["reference"] for row in rows] == [*torch_rows, "JAX step, dispatched"]
    assert all(row["steps_per_second"] > 0 and row["ratio"] > 0 for row in rows)
    out = " ".join(capsys.readouterr().out.split())
    assert f"{NETWORKS[backbone].title}, 32x32x3 pixels in 100 classes, median of 1" in out
    assert "scanned ones are left out" in out


@pytest.mark.parametrize("mode", ["pytorch", "jax"])
def test_logging_is_compared_with_none(
    mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(bench, "TemporaryDirectory", lambda: nullcontext(str(tmp_path)))
    line = ["--algo", "naive", "--mode", mode, "--batch-size", "4", "--steps", "60", "--rounds", "2"]
    assert main(["bench", "--logging", *line, "--json", str(tmp_path / "rows.json")]) == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["reference"] == "sequel, no logger"
    assert row["ratio"] > 0
    assert "With console, csv, tensorboard" in " ".join(capsys.readouterr().out.split())
    with (tmp_path / "csv" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    turns = range(4)  # the first task, what compiles, and two turns, of 60 steps each
    assert [int(row["step"]) for row in rows] == [60 * turn + step for turn in turns for step in (50, 60)]
    assert all(float(row["train/loss"]) > 0 for row in rows)
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_a_perceptrons_table_names_it_alone() -> None:
    table = _table([Row("naive", "jax", 10, 1234.5, "JAX step, scanned", 0.5)], 7, "mlp")
    assert (table.title, table.caption) == ("Training steps per second, MLP 256-256, median of 7", None)
    assert [next(iter(column.cells)) for column in table.columns] == [
        *("naive", "jax", "10", "1,234", "JAX step, scanned", "2,469", "0.50")
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--backbone", "cnn", "--algo", "lfl"], r"--algo must be one of naive, .*, er with --backbone cnn"),
        (["--backbone", "resnet"], r"backbone must be one of mlp, cnn, resnet18, resnet18_thin, got 'resn"),
    ],
)
def test_what_is_not_measured_is_refused(
    line: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["bench", *line]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(("size", "steps"), [(10, 5), (64, 4), (7, 1), (1, 1)])
def test_inner_steps_divide_the_batch(size: int, steps: int) -> None:
    assert vars(benched("lamaml", size))["n_inner_updates"] == steps


def stored_in(task: Task) -> Samples:
    split = task.train if task.coreset is None else task.coreset
    return split.take(np.arange(len(split)))


def first_batch(split: AnySplit) -> Samples:
    return split.take(plan.epoch_batches(0, 1, 0, len(split), SIZE)[0])


def check(algo: str, losses: list[float], learner: Any, task: Task) -> None:
    """Compare with the learner's first loss on the same weights and batch, where the draws are the same."""
    ours: list[float] = []
    learner.fit_task(task, FitMonitor(lambda progress: ours.append(progress.loss), lambda: None))
    if algo in DRAWN:
        assert math.isfinite(losses[0])
    else:  # KCL's bases are drawn from generators of their own, but they are many
        np.testing.assert_allclose(losses[0], ours[0], rtol=0.05 if algo == "kcl" else 1e-5)
    assert min(losses[-3:]) < 0.95 * losses[0]


@pytest.mark.parametrize(
    "algo",
    [
        pytest.param(a, marks=[] if a in ("naive", "ewc", "er", "agem", "icarl") else [pytest.mark.slow])
        for a in ALGORITHMS
    ],
)
def test_the_jax_step_is_the_same_method_and_learns(algo: str) -> None:
    hparams = benched(algo, SIZE)
    benchmark = stream(hparams, SAMPLES)
    first, task = benchmark.tasks
    model = FlaxMLP(flax_bench.WIDTHS, benchmark.num_classes)
    learner = make_flax_learner(hparams, model, build_flax_optimizer(SGD), benchmark, TRAINING)
    learner.fit_task(first, SILENT)
    x, y, _ = first_batch(learner.algorithm.training_split(learner.state, task.train))
    images, labels, _ = stored_in(task)
    scale, shift = (float(a[0]) for a in (benchmark.normalisation.scale, benchmark.normalisation.shift))
    layers = jax.tree.map(np.array, flax_bench._layers(learner.ts.params))
    step, kept = flax_bench.hand_written(hparams, layers, images, labels, SIZE, scale, shift)
    compiled, losses = jax.jit(step), []
    for _ in range(STEPS):
        layers, kept, loss = compiled(layers, kept, x, y.astype(np.int32))
        losses.append(float(loss))
    check(algo, losses, learner, task)


SMALL: Any = {"channels": (8,), "linear_widths": (), "norm": "batch", "num_classes": 100}


@pytest.mark.parametrize(
    "algo", ["naive", *(pytest.param(a, marks=pytest.mark.slow) for a in CONVOLUTIONAL if a != "naive")]
)
def test_the_jax_step_of_a_module_is_the_same_method_and_learns(algo: str) -> None:
    hparams = benched(algo, SIZE)
    benchmark = stream(hparams, SAMPLES, "cnn")
    first, task = benchmark.tasks
    model = FlaxCNN(**SMALL)
    learner = make_flax_learner(hparams, model, build_flax_optimizer(SGD), benchmark, TRAINING)
    learner.fit_task(first, SILENT)
    x, y, _ = first_batch(task.train)
    images, labels, _ = stored_in(task)
    layers = jax.tree.map(np.array, (learner.ts.params, batch_stats(learner.ts)))
    scale, shift = benchmark.normalisation.scale, benchmark.normalisation.shift
    step, kept = flax_bench.of_module(hparams, model, layers, images, labels, scale, shift)
    compiled, losses = jax.jit(step), []
    for _ in range(STEPS):
        layers, kept, loss = compiled(layers, kept, x, y.astype(np.int32))
        losses.append(float(loss))
    check(algo, losses, learner, task)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_the_torch_step_is_the_same_method_and_learns(algo: str) -> None:
    hparams = benched(algo, SIZE)
    benchmark = stream(hparams, SAMPLES)
    net = MLP(lightning_bench.WIDTHS, benchmark.num_classes, image_shape=benchmark.image_shape)
    check_torch(hparams, benchmark, net)


@pytest.mark.parametrize("algo", CONVOLUTIONAL)
def test_the_torch_step_of_a_convolutional_network_is_the_same_method_and_learns(algo: str) -> None:
    hparams = benched(algo, SIZE)
    benchmark = stream(hparams, SAMPLES, "cnn")
    check_torch(hparams, benchmark, CNN(**SMALL, image_shape=benchmark.image_shape))


def check_torch(hparams: AlgorithmHParams, benchmark: Benchmark, net: torch.nn.Module) -> None:
    first, task = benchmark.tasks
    learner = make_learner(hparams, net, build_optimizer(SGD), benchmark, TRAINING)
    learner.fit_task(first, SILENT)
    x, y, _, _ = as_batch(first_batch(learner.module.training_split(task.train)))
    scale, shift = (
        torch.tensor(a, dtype=torch.float32).reshape(-1, 1, 1)
        for a in (benchmark.normalisation.scale, benchmark.normalisation.shift)
    )
    stored = as_batch(stored_in(task))[:2]
    module = lightning_bench.BareModule(copy.deepcopy(learner.module.net), scale, shift, hparams, stored)
    optimizer = module.configure_optimizers()
    losses = [float(lightning_bench.plain_step(module, optimizer, (x, y))) for _ in range(STEPS)]
    check(hparams.name, losses, learner, task)
