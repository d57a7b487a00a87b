"""Streams of Avalanche and Continuum, with the real packages; `make adapters` installs them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

import sequel_flax
import sequel_lightning  # first: see sequel_benchmarks.user_data
from sequel_benchmarks import data_directory, from_avalanche, from_continuum
from sequel_core import run
from sequel_core.algorithms.er import ERHParams
from sequel_core.hparams import OptimizerHParams, TrainingHParams
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.task import AnySplit

pytestmark = pytest.mark.slow

SIDE, CLASSES = 6, 6


def package(name: str) -> ModuleType:
    """Import a package, ignoring its warnings, or skip the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module: ModuleType = pytest.importorskip(name)
    return module


@pytest.fixture(scope="module")
def avalanche() -> Any:
    return package("avalanche.benchmarks")


@pytest.fixture(scope="module")
def continuum() -> Any:
    return package("continuum")


class Bars(Dataset[Any]):
    """Noisy colour images whose bright column is the class, as floats in [0, 1] like those of `ToTensor`."""

    def __init__(self, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.targets = np.resize(np.arange(CLASSES), count).tolist()
        self.images = rng.integers(0, 90, (count, SIDE, SIDE, 3), dtype=np.uint8)
        for image, label in zip(self.images, self.targets, strict=True):
            image[:, label] += 150

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self.images[index]).movedim(-1, 0) / 255, self.targets[index]


TRAIN, TEST = Bars(90, 0), Bars(36, 1)


def images(split: AnySplit) -> Any:
    return split.take(np.arange(len(split))).x


def head(split: AnySplit, count: int) -> AnySplit:
    return split.pick(np.arange(count))


def images_of(data: Bars, classes: set[int]) -> Any:
    return data.images[np.isin(data.targets, list(classes))] / np.float32(255)


def assert_same_images(split: AnySplit, expected: Any) -> None:
    """Assert that a split has exactly these images, in any order."""
    actual = images(split)
    assert actual.dtype == expected.dtype
    assert sorted(x.tobytes() for x in actual) == sorted(x.tobytes() for x in expected)


def torch_learner(benchmark: Benchmark, training: TrainingHParams) -> Any:
    net = sequel_lightning.MLP((32,), benchmark.num_classes, image_shape=benchmark.image_shape)
    optimizer = sequel_lightning.build_optimizer(OptimizerHParams(lr=0.1))
    return sequel_lightning.make_learner(ERHParams(mem_size=40), net, optimizer, benchmark, training)


def flax_learner(benchmark: Benchmark, training: TrainingHParams) -> Any:
    net = sequel_flax.MLP((32,), benchmark.num_classes)
    optimizer = sequel_flax.build_optimizer(OptimizerHParams(lr=0.1))
    return sequel_flax.make_learner(ERHParams(mem_size=40), net, optimizer, benchmark, training)


both = pytest.mark.parametrize("make", [torch_learner, flax_learner])


def learn(make: Callable[..., Any], benchmark: Benchmark, directory: Path) -> None:
    """Assert that a run learns the stream."""
    training = TrainingHParams(batch_size=10, epochs_per_task=20)
    result = run(make(benchmark, training), benchmark, run_dir=directory, progress=False)
    assert result.matrix.shape == (3, 3)
    assert result.average_accuracy > 0.9


@both
def test_class_incremental_avalanche(make: Callable[..., Any], avalanche: Any, tmp_path: Path) -> None:
    stream = avalanche.nc_benchmark(TRAIN, TEST, n_experiences=3, task_labels=False, seed=4)
    benchmark = from_avalanche(stream)
    assert (benchmark.scenario, benchmark.num_classes, benchmark.spec.x.dtype) == ("class", 6, "float32")
    assert benchmark.image_shape == (SIDE, SIDE, 3)
    for task, experience in zip(benchmark.tasks, stream.train_stream, strict=True):
        classes = set(experience.classes_in_this_experience)
        assert set(task.classes) == classes
        assert_same_images(task.train, images_of(TRAIN, classes))
        assert_same_images(task.test, images_of(TEST, classes))
        samples = task.train.take(np.arange(len(task.train)))
        assert (
            samples.y.tolist() == samples.x[:, 0].mean(-1).argmax(-1).tolist() == task.train.targets.tolist()
        )
    learn(make, benchmark, tmp_path / "run")


@both
def test_task_incremental_avalanche(make: Callable[..., Any], avalanche: Any, tmp_path: Path) -> None:
    stream = avalanche.nc_benchmark(
        TRAIN, TEST, 3, task_labels=True, seed=4, class_ids_from_zero_in_each_exp=True
    )
    benchmark = from_avalanche(stream)
    assert (benchmark.scenario, benchmark.num_classes) == ("task", 6)
    assert [task.classes for task in benchmark.tasks] == [(0, 1), (2, 3), (4, 5)]  # a head for each task
    for t, task in enumerate(benchmark.tasks):
        assert_same_images(task.train, images_of(TRAIN, set(stream.original_classes_in_exp[t])))
    assert from_avalanche(stream, scenario="domain").num_classes == 2
    learn(make, benchmark, tmp_path / "run")


def test_other_avalanche_benchmarks(avalanche: Any) -> None:
    instances = from_avalanche(avalanche.ni_benchmark(TRAIN, TEST, 3, task_labels=False, seed=0))
    assert (instances.scenario, instances.num_classes) == ("domain", 6)
    assert [len(task.test) for task in instances.tasks] == [36] * 3  # one test set for all
    assert sum(len(task.train) for task in instances.tasks) == 90
    whole = avalanche.nc_benchmark(TRAIN, TEST, 3, task_labels=False, seed=4, one_dataset_per_exp=False)
    assert [len(task.test) for task in from_avalanche(whole).tasks] == [12] * 3
    datasets = [avalanche.utils.as_classification_dataset(part) for part in (TRAIN, TEST)]
    plain = avalanche.benchmark_from_datasets(train=[datasets[0]] * 2, test=[datasets[1]] * 2)
    assert from_avalanche(plain).scenario == "domain"
    benchmark = from_avalanche(avalanche.task_incremental_benchmark(plain))
    assert (benchmark.scenario, benchmark.num_classes, benchmark.tasks[1].classes[0]) == ("task", 12, 6)
    held = avalanche.benchmark_with_validation_stream(plain, 0.2)
    assert [len(task.validation) for task in from_avalanche(held).tasks] == [18, 18]
    uneven = avalanche.benchmark_from_datasets(train=[datasets[0]] * 3, test=[datasets[1]] * 2)
    with pytest.raises(ValueError, match="got 3 of train, 2 of test; give one for each, or one for all"):
        from_avalanche(uneven)


@both
def test_classic_avalanche_benchmark(make: Callable[..., Any], avalanche: Any, tmp_path: Path) -> None:
    root = data_directory()
    if not (root / "MNIST" / "raw").is_dir():
        pytest.skip(f"needs MNIST as torchvision downloads it in {root}")
    stream = avalanche.SplitMNIST(n_experiences=5, return_task_id=True, seed=1, dataset_root=root)
    benchmark = from_avalanche(stream)
    assert (benchmark.scenario, benchmark.num_classes, benchmark.image_shape) == ("task", 10, (28, 28, 1))
    assert sum(len(task.train) for task in benchmark.tasks) == 60_000
    assert sum(len(task.test) for task in benchmark.tasks) == 10_000
    tasks = [replace(t, train=head(t.train, 500), test=head(t.test, 300)) for t in benchmark.tasks]
    short = replace(benchmark, tasks=tuple(tasks))
    learner = make(short, TrainingHParams(batch_size=10))
    result = run(learner, short, run_dir=tmp_path / "run", progress=False)
    assert result.average_accuracy > 0.85


def in_memory(continuum: Any, part: Bars, train: bool) -> Any:
    return continuum.datasets.InMemoryDataset(part.images, np.array(part.targets), train=train)


@both
def test_class_incremental_continuum(make: Callable[..., Any], continuum: Any, tmp_path: Path) -> None:
    scenarios = [
        continuum.ClassIncremental(
            in_memory(continuum, part, train), increment=2, class_order=[3, 1, 5, 0, 2, 4]
        )
        for part, train in ((TRAIN, True), (TEST, False))
    ]
    benchmark = from_continuum(*scenarios)
    assert (benchmark.scenario, benchmark.num_classes, benchmark.spec.x.dtype) == ("class", 6, "uint8")
    for t, (task, task_set) in enumerate(zip(benchmark.tasks, scenarios[0], strict=True)):
        assert task.classes == (2 * t, 2 * t + 1)
        samples = task.train.take(np.arange(len(task.train)))
        for k in (0, 7, len(task_set) - 1):
            image, label, _ = task_set[k]
            np.testing.assert_array_equal(samples.x[k] / np.float32(255), image.permute(1, 2, 0).numpy())
            assert samples.y[k] == label
    assert from_continuum(*scenarios, scenario="task").mask.sum() == 6
    learn(make, benchmark, tmp_path / "run")


@both
def test_transformed_continuum(make: Callable[..., Any], continuum: Any, tmp_path: Path) -> None:
    scenarios = [
        continuum.Permutations(in_memory(continuum, part, train), nb_tasks=3, seed=2, shared_label_space=True)
        for part, train in ((TRAIN, True), (TEST, False))
    ]
    benchmark = from_continuum(*scenarios)
    assert (benchmark.scenario, benchmark.num_classes, benchmark.spec.x.dtype) == ("domain", 6, "float32")
    for task, task_set in zip(benchmark.tasks, scenarios[0], strict=True):
        actual = images(task.train)
        for k in (0, 50):
            np.testing.assert_array_equal(actual[k], task_set[k][0].permute(1, 2, 0).numpy())
    assert not np.array_equal(images(benchmark.tasks[0].train), images(benchmark.tasks[1].train))
    with pytest.raises(ValueError, match=r"got 3 of train, 2 of test; make both with the same increment"):
        from_continuum(scenarios[0], [scenarios[1][0], scenarios[1][1]])
    learn(make, benchmark, tmp_path / "run")


def test_continuum_with_labels_of_each_task(continuum: Any) -> None:
    scenarios = [
        continuum.Permutations(
            in_memory(continuum, part, train), nb_tasks=2, seed=2, shared_label_space=False
        )
        for part, train in ((TRAIN, True), (TEST, False))
    ]
    benchmark = from_continuum(*scenarios)
    assert (benchmark.scenario, benchmark.num_classes) == ("class", 12)
    assert [task.classes for task in benchmark.tasks] == [tuple(range(6)), tuple(range(6, 12))]
