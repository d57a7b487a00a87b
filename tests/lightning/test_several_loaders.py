"""Several validation or test loaders: scores by task while training, and a user's metrics of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassF1Score

from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.trees import LeafSpec
from sequel_lightning import ContinualModule, TaskDataModule
from tests.lightning.parts import (
    BATCH,
    CLASSES,
    At,
    arrays,
    module,
    own_loader,
    stream,
    trainer,
)

SIZES = (7, 20, 13)


def held_out(benchmark: Benchmark, task: int, with_task: bool) -> DataLoader[Any]:
    """Return some samples of a task; the number differs between the tasks."""
    tensors = [a[: SIZES[task]] for a in arrays(benchmark, task)]
    return DataLoader(TensorDataset(*tensors[: 2 + with_task]), batch_size=6)


def by_hand(
    model: ContinualModule, benchmark: Benchmark, tasks: Any, masked: bool = False
) -> dict[str, float]:
    """Return loss and accuracy of each task and the means over tasks, from the network's own logits."""
    scores: dict[str, float] = {}
    for task in tasks:
        x, y, _ = (a[: SIZES[task]] for a in arrays(benchmark, task))
        logits = model.net(x).detach()
        if masked:
            outside = [c for c in range(benchmark.num_classes) if c not in benchmark.tasks[task].classes]
            logits[:, outside] = -1e30
        scores[f"val/loss/task_{task}"] = float(F.cross_entropy(logits, y))
        scores[f"val/accuracy/task_{task}"] = float((logits.argmax(1) == y).float().mean())
    for name in ("loss", "accuracy"):
        scores[f"val/{name}"] = sum(scores[f"val/{name}/task_{j}"] for j in tasks) / len(tasks)
    return scores


def vals(metrics: Any) -> dict[str, float]:
    return {k: float(v) for k, v in metrics.items() if k.startswith("val/")}


@pytest.mark.parametrize("with_task", [False, True])
@pytest.mark.parametrize("scenario", ["domain", "task"])
def test_forgetting_is_visible_while_training(with_task: bool, scenario: Any, tmp_path: Path) -> None:
    benchmark = stream(3, scenario)
    model = module(
        benchmark,
        EWCHParams(),
        spec=benchmark.spec._replace(x=LeafSpec(benchmark.spec.image_shape, "float32")),
    )
    for task in range(2):
        seen: list[tuple[dict[str, float], dict[str, float]]] = []

        def note(trainer: pl.Trainer, _: str, seen: Any = seen, tasks: Any = range(task + 1)) -> None:
            if not trainer.sanity_checking:
                wanted = by_hand(model, benchmark, tasks, scenario == "task")
                seen.append((vals(trainer.callback_metrics), wanted))

        best = ModelCheckpoint(tmp_path / f"{scenario}{task}", monitor="val/accuracy/task_0", mode="max")
        stop = EarlyStopping("val/loss/task_0", patience=9)
        callbacks: list[Any] = [best, stop, At(note, "on_validation_end")]
        new = trainer(2, callbacks=callbacks, enable_checkpointing=True, default_root_dir=tmp_path)
        new.fit(
            model,
            own_loader(benchmark, task, with_task),
            val_dataloaders=[held_out(benchmark, j, with_task) for j in range(task + 1)],
        )
        assert len(seen) == 2
        for actual, wanted in seen:
            assert actual == pytest.approx(wanted, rel=1e-5)
        assert float(best.best_model_score or -1) == max(actual["val/accuracy/task_0"] for actual, _ in seen)
        assert float(stop.best_score) == min(actual["val/loss/task_0"] for actual, _ in seen)


def test_the_tasks_in_one_loader_are_distinguished_by_t() -> None:
    benchmark = stream()
    model = module(benchmark, NaiveHParams(), spec=None)
    parts = [[a[: SIZES[j]] for a in arrays(benchmark, j)] for j in range(3)]
    x, y, t = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    actual = trainer().validate(model, DataLoader(TensorDataset(x, y, t), 16), verbose=False)
    assert actual == [pytest.approx(by_hand(model, benchmark, range(3)), rel=1e-5)]


def test_a_data_module_validates_on_several_tasks() -> None:
    benchmark = stream(validation=9)
    model = module(benchmark, NaiveHParams())
    new = trainer()
    new.fit(model, datamodule=TaskDataModule(benchmark.tasks[2], BATCH, validate_on=benchmark.tasks[1:]))
    for j, task in enumerate(benchmark.tasks[1:], 1):
        x, y, _ = task.validation.take(np.arange(9))
        logits = model.net(model.normalise(torch.from_numpy(x).movedim(-1, 1))).detach()
        expected = float((logits.argmax(1) == torch.from_numpy(y)).float().mean())
        assert float(new.callback_metrics[f"val/accuracy/task_{j}"]) == pytest.approx(expected)
    assert "val/accuracy/task_0" not in new.callback_metrics
    with pytest.raises(ValueError, match=r"validate_on needs tasks with .* got task 1 without"):
        TaskDataModule(benchmark.tasks[0], BATCH, validate_on=stream().tasks[1:])


def test_a_single_loader_without_t_is_of_the_current_task() -> None:
    benchmark = stream()
    model = module(benchmark, NaiveHParams(), spec=None)
    for task in range(2):
        new = trainer(num_sanity_val_steps=0)
        new.fit(model, own_loader(benchmark, task, False), held_out(benchmark, task, False))
        assert vals(new.callback_metrics) == pytest.approx(by_hand(model, benchmark, [task]), rel=1e-5)


def test_several_test_loaders() -> None:
    benchmark = stream()
    model = module(benchmark, NaiveHParams(), spec=None)
    loaders = [held_out(benchmark, j, with_task=False) for j in range(3)]
    actual = trainer().test(model, loaders, verbose=False)
    expected = {k.replace("val/", "test/"): v for k, v in by_hand(model, benchmark, range(3)).items()}
    assert len(actual) == 3
    assert all(scores == pytest.approx(expected, rel=1e-5) for scores in actual)


def test_a_loader_of_another_task_raises() -> None:
    benchmark = stream(2, "task")
    model = module(
        benchmark,
        NaiveHParams(),
        spec=benchmark.spec._replace(x=LeafSpec(benchmark.spec.image_shape, "float32")),
    )
    swapped = [held_out(benchmark, j, with_task=False) for j in (1, 0)]
    with pytest.raises(ValueError, match=r"loader 0 has labels \[2, 3\].*not classes of task 0"):
        trainer().validate(model, swapped)
    three = [held_out(benchmark, j, with_task=False) for j in (0, 1, 1)]
    with pytest.raises(ValueError, match="belong to the 2 tasks in order"):
        trainer().validate(model, three)
    swapped = [held_out(benchmark, j, with_task=True) for j in (1, 0)]
    actual, _ = trainer().validate(model, swapped, verbose=False)
    assert actual == pytest.approx(by_hand(model, benchmark, range(2), masked=True), rel=1e-5)


def f1_by_hand(logits: Tensor, y: Tensor) -> float:
    """Return the mean over classes of 2 tp / (2 tp + fp + fn)."""
    guess, scores = logits.argmax(1), []
    for c in range(CLASSES):
        hit = int(((guess == c) & (y == c)).sum())
        wrong = int(((guess == c) != (y == c)).sum())
        scores.append(2 * hit / (2 * hit + wrong) if hit + wrong else 0.0)
    return sum(scores) / CLASSES


def test_a_users_metrics_score_validation_and_test_samples_too() -> None:
    benchmark = stream()
    metrics = MetricCollection({"f1": MulticlassF1Score(CLASSES, average="macro")}, prefix="train/")
    model = module(benchmark, NaiveHParams(), spec=None, metrics=metrics)
    loaders = [held_out(benchmark, j, with_task=True) for j in range(2)]
    new = trainer(2)
    new.fit(model, own_loader(benchmark, 0, with_task=True), loaders)
    validated = {k: float(v) for k, v in new.callback_metrics.items()}
    tested = trainer().test(model, loaders, verbose=False)[0]
    parts = [[a[: SIZES[j]] for a in arrays(benchmark, j)[:2]] for j in range(2)]
    logits = [model.net(x).detach() for x, _ in parts]
    labels = [y for _, y in parts]
    expected = {f"f1/task_{j}": f1_by_hand(logits[j], labels[j]) for j in range(2)}
    expected["f1"] = f1_by_hand(torch.cat(logits), torch.cat(labels))
    for stage, actual in (("val", validated), ("test", tested)):
        assert {k: actual[f"{stage}/{k}"] for k in expected} == pytest.approx(expected, rel=1e-5)
    assert "train/f1" in validated
    assert not [name for name in model.state_dict() if "f1" in name]
    assert metrics["f1"].update_count == 0  # of training alone, and reset with the last report


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (MulticlassF1Score(CLASSES), "must be a torchmetrics.MetricCollection, got a MulticlassF1Score"),
        (MetricCollection({"accuracy": MulticlassF1Score(CLASSES)}), "logs these itself, got accuracy"),
        (MetricCollection({"train/loss": MulticlassF1Score(CLASSES)}), "logs these itself, got train/loss"),
    ],
)
def test_metrics_that_cannot_be_logged_raise(metrics: Any, message: str) -> None:
    benchmark = stream()
    with pytest.raises(ValueError, match=message):
        module(benchmark, NaiveHParams(), metrics=metrics)
