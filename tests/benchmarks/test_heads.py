"""In the task scenario, all functions that make streams give each task separate outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

import sequel_flax
import sequel_lightning
from sequel_benchmarks import (
    from_arrays,
    from_avalanche,
    from_continuum,
    from_datamodules,
    from_datasets,
    from_prepared,
)
from sequel_core import Benchmark, separate_heads
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.hparams import OptimizerHParams, TrainingHParams
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.task import Split, Task
from sequel_core.testing.parity import SILENT

Pairs = list[tuple[tuple[Any, Any], tuple[Any, Any]]]
SIDE = 3


def pairs(*classes: tuple[int, ...], dtype: Any = np.int64) -> Pairs:
    """Return uint8 images and labels, 12 for training and 6 for testing of each task."""
    rng = np.random.default_rng(0)
    sizes = [(labels, count) for labels in classes for count in (12, 6)]
    arrays = [
        (rng.integers(0, 256, (n, SIDE, SIDE, 1), dtype=np.uint8), np.resize(np.array(labels, dtype), n))
        for labels, n in sizes
    ]
    return list(zip(arrays[::2], arrays[1::2], strict=True))


class Items:
    """A data set that is read item by item; its `targets` are compared with the items."""

    def __init__(self, pair: tuple[Any, Any]) -> None:
        self.images, self.targets = pair

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return torch.from_numpy(self.images[index]).movedim(-1, 0), int(self.targets[index])


class Data(pl.LightningDataModule):
    def __init__(self, train: Any, test: Any) -> None:
        super().__init__()
        items: list[Any] = [Items(pair) for pair in (train, test)]
        self.loaders = [DataLoader(data) for data in items]

    def train_dataloader(self) -> Any:
        return self.loaders[0]

    def test_dataloader(self) -> Any:
        return self.loaders[1]


def of_avalanche(tasks: Pairs, labels: list[int] | None = None, **options: Any) -> Benchmark:
    """Make a stream from objects with Avalanche's attributes; `test_adapters.py` uses Avalanche itself."""
    labels = list(range(len(tasks))) if labels is None else labels
    train, test = (
        [SimpleNamespace(dataset=Items(row[k]), task_label=t) for row, t in zip(tasks, labels, strict=True)]
        for k in (0, 1)
    )
    return from_avalanche(SimpleNamespace(train_stream=train, test_stream=test), **options)


def of_continuum(tasks: Pairs, **options: Any) -> Benchmark:
    streams = [
        [
            SimpleNamespace(
                _x=row[k][0], _y=row[k][1], trsf=None, target_trsf=None, bounding_boxes=None,
                data_type=SimpleNamespace(name="IMAGE_ARRAY"),
            )
            for row in tasks
        ]
        for k in (0, 1)
    ]  # fmt: skip
    return from_continuum(*streams, **options)


def of_prepared(tasks: Pairs, **options: Any) -> Benchmark:
    datasets = [{t + 1: Items(row[k]) for t, row in enumerate(tasks)} for k in (0, 1)]
    return from_prepared(SimpleNamespace(prepare_datasets=lambda: datasets), **options)


def by_hand(tasks: Pairs, **options: Any) -> Benchmark:
    """Make the benchmark with the constructors of Benchmark, Task and Split."""
    made = []
    for t, row in enumerate(tasks):
        train, test = (Split(*pair, t) for pair in row)
        made.append(Task(t, "t", tuple(np.unique(row[0][1]).tolist()), train, test, train.head(0)))
    kept = made if options.get("heads") == "shared" else list(separate_heads(made))
    return Benchmark("b", tuple(kept), 1 + max(max(task.classes) for task in kept), **options)


ADAPTERS: dict[str, Callable[..., Benchmark]] = {
    "arrays": from_arrays,
    "datasets": lambda tasks, **options: from_datasets(
        [[Items(pair) for pair in row] for row in tasks], **options
    ),
    "prepared": of_prepared,
    "datamodules": lambda tasks, **options: from_datamodules([Data(*row) for row in tasks], **options),
    "avalanche": of_avalanche,
    "continuum": of_continuum,
    "by hand": by_hand,
}
every_adapter = pytest.mark.parametrize("adapter", ADAPTERS)


def labels_of(split: Any) -> list[int]:
    """Return the labels that a split's `take` returns, after comparing them with `targets`."""
    labels: list[int] = split.take(np.arange(len(split))).y.tolist()
    assert labels == split.targets.tolist()
    return labels


@every_adapter
def test_labels_that_restart_have_separate_outputs(adapter: str) -> None:
    """Label y of task k becomes 3 k + y, as the largest label of any task is 2."""
    tasks = pairs((0, 1), (0, 1, 2), (0, 1))
    benchmark = ADAPTERS[adapter](tasks, scenario="task")
    assert benchmark.num_classes == 8
    assert [task.classes for task in benchmark.tasks] == [(0, 1), (3, 4, 5), (6, 7)]
    assert benchmark.mask.sum(0).tolist() == [1, 1, 0, 1, 1, 1, 1, 1]
    for t, (task, (train, test)) in enumerate(zip(benchmark.tasks, tasks, strict=True)):
        assert labels_of(task.train) == (train[1] + 3 * t).tolist()
        assert labels_of(task.test) == (test[1] + 3 * t).tolist()
    if adapter != "by hand":
        assert (benchmark.settings["heads"], benchmark.settings["label_offsets"]) == ("separate", [0, 3, 6])


@every_adapter
def test_tasks_may_share_outputs_on_purpose(adapter: str) -> None:
    tasks = pairs((0, 1), (1, 2))
    benchmark = ADAPTERS[adapter](tasks, scenario="task", heads="shared")
    assert benchmark.num_classes == 3
    assert [task.classes for task in benchmark.tasks] == [(0, 1), (1, 2)]
    assert labels_of(benchmark.tasks[1].train) == tasks[1][0][1].tolist()
    if adapter != "by hand":
        assert (benchmark.settings["heads"], benchmark.settings["label_offsets"]) == ("shared", None)


@every_adapter
def test_labels_of_different_tasks_stay_as_they_are(adapter: str) -> None:
    tasks = pairs((3, 1), (0, 2))
    for scenario, heads in (("task", "separate"), ("class", None)):
        benchmark = ADAPTERS[adapter](tasks, scenario=scenario)
        assert [task.classes for task in benchmark.tasks] == [(1, 3), (0, 2)]
        if adapter != "by hand":
            assert (benchmark.settings["heads"], benchmark.settings["label_offsets"]) == (heads, None)


def test_labels_of_the_domain_scenario_are_shared() -> None:
    benchmark = from_arrays(pairs((0, 1), (0, 1)))
    assert (benchmark.scenario, benchmark.num_classes, benchmark.settings["heads"]) == ("domain", 2, None)


def test_experiences_with_one_task_label_have_one_head() -> None:
    tasks = pairs((0, 1), (0, 1), (1, 2), (0, 2))
    benchmark = of_avalanche(tasks, [4, 7, 4, 7])
    assert (benchmark.scenario, benchmark.num_classes) == ("task", 6)
    assert [task.classes for task in benchmark.tasks] == [(0, 1), (3, 4), (1, 2), (3, 5)]
    assert benchmark.settings["label_offsets"] == [0, 3, 0, 3]
    alike = of_avalanche(tasks, [0, 0, 0, 0], scenario="task")  # whose task labels are all equal
    assert [task.classes for task in alike.tasks] == [(0, 1), (3, 4), (7, 8), (9, 11)]


def test_small_label_types_do_not_overflow() -> None:
    benchmark = from_arrays(pairs((0, 200), (0, 200), dtype=np.uint8), scenario="task", num_classes=402)
    assert benchmark.tasks[1].classes == (201, 401)
    assert set(labels_of(benchmark.tasks[1].test)) == {201, 401}


def test_a_benchmark_by_hand_says_how_to_separate_its_tasks() -> None:
    first, second = by_hand(pairs((0, 1), (0, 1)), scenario="domain", heads="shared").tasks
    message = (
        r"tasks 0 and 1 both have label 0, .* with separate_heads\(tasks\), or give heads='shared' if that is"
    )
    with pytest.raises(ValueError, match=message):
        Benchmark("b", (first, second), 2, "task")
    tasks = separate_heads((first, replace(second, coreset=second.train.pick(np.arange(2)))))
    assert Benchmark("b", tasks, 4, "task").mask.astype(int).tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    assert tasks[1].coreset is not None
    assert tasks[1].coreset.targets.tolist() == [2, 3]
    joined = Benchmark("b", tasks, 4, "class").joined(1)
    assert separate_heads([joined, second], [0, 0]) == (joined, second)
    relabelled = separate_heads([joined, replace(joined, index=1)])[1]
    assert labels_of(relabelled.train) == [y + 4 for y in labels_of(joined.train)]


@pytest.mark.parametrize(
    ("classes", "options", "message"),
    [
        (((0, 1), (0, 1)), {"num_classes": 2}, "num_classes must be >= 4, as every task .*, got 2; leave"),
        (((0, 1), (0, 1)), {"heads": "both"}, "heads must be one of separate, shared, got 'both'"),
        (((0, 1), (0, 1)), {"scenario": "domain", "heads": "shared"}, "is only used with scenario=task"),
        (((0, 1), (-1, 1)), {}, r"task 1 \(task 1\): labels must be >= 0, got \[-1\]; number them"),
    ],
)
def test_bad_options(classes: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_arrays(pairs(*classes), **{"scenario": "task", **options})


@pytest.mark.parametrize("mode", ["pytorch", "jax"])
def test_the_second_task_leaves_the_outputs_of_the_first_alone(mode: str) -> None:
    """With separate outputs their weights get no gradient; with shared outputs they change."""
    changes = []
    for heads in ("separate", "shared"):
        benchmark = from_arrays(pairs((0, 1), (0, 1)), scenario="task", heads=heads)
        settings = NaiveHParams(), TrainingHParams(batch_size=6), OptimizerHParams(lr=0.5)
        learner = make_learner(mode, benchmark, *settings)
        ends: list[FloatArray] = []
        for task in benchmark.tasks:
            learner.fit_task(task, SILENT)
            ends.append(learner.weights()["head/kernel"][:, :2])
        changes.append(float(np.abs(ends[1] - ends[0]).max()))
    assert changes[0] == 0
    assert changes[1] > 1e-4


def make_learner(mode: str, benchmark: Benchmark, hparams: Any, training: Any, optimizer: Any) -> Any:
    if mode == "jax":
        net = sequel_flax.MLP((4,), benchmark.num_classes)
        tx = sequel_flax.build_optimizer(optimizer)
        return sequel_flax.make_learner(hparams, net, tx, benchmark, training, steps_per_call=1)
    ours = sequel_lightning.MLP((4,), benchmark.num_classes, image_shape=benchmark.image_shape)
    factory = sequel_lightning.build_optimizer(optimizer)
    return sequel_lightning.make_learner(hparams, ours, factory, benchmark, training)
