"""Tabular data sets and streams, compared with scikit-learn's data and plain NumPy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn import datasets

from sequel_benchmarks import (
    TABLES,
    BreastCancer,
    Diabetes,
    Table,
    TabularSettings,
    Wine,
    available,
    fetch,
    load,
    load_table,
    tabular,
)
from sequel_core.stream.trees import LeafSpec

PUBLISHED: dict[str, Any] = {
    "wine": datasets.load_wine,
    "breastcancer": datasets.load_breast_cancer,
    "diabetes": lambda: datasets.load_diabetes(scaled=False),
}
STREAMS: dict[str, Any] = {"wine": Wine, "breastcancer": BreastCancer, "diabetes": Diabetes}


def small_table(count: int = 40, classes: int | None = 4) -> Table:
    """Return a table whose first feature is the number of the sample."""
    rng = np.random.default_rng(2)
    arrays: list[Any] = []
    for rows in (count, count // 2):
        x = rng.normal(3, 5, (rows, 3))
        x[:, 0] = rng.permutation(rows) * (count / rows)
        arrays += [x, rng.normal(size=rows) if classes is None else np.arange(rows) % classes]
    names = None if classes is None else tuple("abcdefgh"[:classes])
    train_x, train_y, test_x, test_y = arrays
    return Table("mine", train_x, train_y, test_x, test_y, ("order", "size", "age"), names)


def everything(split: Any) -> Any:
    return split.take(np.arange(len(split)))


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_the_published_ones(name: str) -> None:
    bunch, table = PUBLISHED[name](), load_table(name)
    expected = np.column_stack([bunch.data, bunch.target])
    parts = [(table.train_x, table.train_y), (table.test_x, table.test_y)]
    actual = np.concatenate([np.column_stack(part) for part in parts])
    np.testing.assert_array_equal(actual[np.lexsort(actual.T)], expected[np.lexsort(expected.T)])
    assert len(table.feature_names) == bunch.data.shape[1]
    assert abs(len(table.test_y) - len(bunch.target) / 5) < 1
    assert available(name)
    if name == "diabetes":
        assert table.num_classes is None
        assert table.train_y.dtype == np.float64
    else:
        assert table.class_names == tuple(bunch.target_names)
        shares = np.bincount(table.test_y) / np.bincount(bunch.target)
        assert np.abs(shares - 0.2).max() < 0.01
    info = fetch(name)
    assert (info.train, info.test, info.folder, info.verified) == (
        *map(len, (parts[0][1], parts[1][1])),
        None,
        True,
    )
    assert (info.input_shape, info.num_classes) == ((bunch.data.shape[1],), table.num_classes)


@pytest.mark.parametrize("name", TABLES)
def test_streams_are_standardised_with_the_training_set(name: str) -> None:
    table, stream = load_table(name), STREAMS[name]()
    mean, deviation = table.train_x.mean(0), table.train_x.std(0)
    for part, x in (("train", table.train_x), ("test", table.test_x)):
        expected = ((x - mean) / deviation).astype(np.float32)
        actual = np.concatenate([everything(task.split(part)).x for task in stream.tasks])
        assert actual.dtype == np.float32
        np.testing.assert_array_equal(actual[np.lexsort(actual.T)], expected[np.lexsort(expected.T)])
    assert stream.spec.x == LeafSpec((table.train_x.shape[1],), "float32")
    if name == "diabetes":
        assert (stream.spec.y, stream.num_classes) == (LeafSpec((), "float32"), 1)
        targets = np.concatenate([task.test.targets for task in stream.tasks])
        expected = (table.test_y - table.train_y.mean()) / table.train_y.std()
        np.testing.assert_allclose(np.sort(targets), np.sort(expected), rtol=1e-6)
    else:
        assert (stream.spec.y, stream.num_classes) == (LeafSpec((), "int64"), len(table.class_names or ()))


@pytest.mark.parametrize("classes", [4, None])
def test_test_samples_do_not_change_training_samples(classes: int | None) -> None:
    table = small_table(classes=classes)
    order = TabularSettings(2, feature="order")
    later = np.column_stack([table.test_x[:, :1], 1000 * table.test_x[:, 1:]])
    other = replace(table, test_x=later, test_y=table.test_y[::-1])
    for first, second in zip(tabular(table, order).tasks, tabular(other, order).tasks, strict=True):
        np.testing.assert_array_equal(everything(first.train).x, everything(second.train).x)
        np.testing.assert_array_equal(first.train.targets, second.train.targets)


@pytest.mark.parametrize("num_tasks", [1, 3, 4])
def test_domains_are_ranges_of_a_feature(num_tasks: int) -> None:
    table = small_table()
    stream = tabular(table, TabularSettings(num_tasks, feature="order", standardise=False))
    assert (stream.scenario, stream.num_classes) == ("domain", 4)
    bounds = [-np.inf, *(np.quantile(np.arange(40), t / num_tasks) for t in range(1, num_tasks)), np.inf]
    for t, task in enumerate(stream.tasks):
        assert task.classes == (0, 1, 2, 3)
        for part, x, y in (("train", table.train_x, table.train_y), ("test", table.test_x, table.test_y)):
            samples = everything(task.split(part))
            rows = [i for i, value in enumerate(x[:, 0]) if bounds[t] <= value < bounds[t + 1]]
            np.testing.assert_array_equal(samples.x, x[rows].astype(np.float32))
            assert samples.y.tolist() == y[rows].tolist()
            assert set(samples.t.tolist()) == {t}
    names = {1: ["all order"], 3: ["order < 13", "13 <= order < 26", "order >= 26"]}
    if num_tasks in names:
        assert [task.name for task in stream.tasks] == names[num_tasks]


@pytest.mark.parametrize("scenario", ["task", "class"])
def test_classes_are_divided(scenario: Any) -> None:
    table = small_table()
    stream = tabular(table, TabularSettings(2, scenario))
    assert (stream.scenario, stream.num_classes) == (scenario, 4)
    assert [task.classes for task in stream.tasks] == [(0, 1), (2, 3)]
    assert [task.name for task in stream.tasks] == ["a, b", "c, d"]
    for task in stream.tasks:
        assert len(task.train) == 20
        assert set(task.test.targets.tolist()) == set(task.classes)


def test_streams_are_deterministic() -> None:
    def arrays(**options: Any) -> list[Any]:
        tasks = Diabetes(**options).tasks
        return [everything(task.split(part)) for task in tasks for part in ("train", "validation", "test")]

    options = {"validation": 0.25, "subset": 20}
    for first, again in zip(arrays(**options, seed=3), arrays(**options, seed=3), strict=True):
        np.testing.assert_array_equal(first.x, again.x)
        np.testing.assert_array_equal(first.y, again.y)
    other = arrays(**options, seed=4)
    assert any(not np.array_equal(a.x, b.x) for a, b in zip(arrays(**options, seed=3), other, strict=True))
    for k in range(2, 15, 3):  # test samples do not depend on the seed
        np.testing.assert_array_equal(arrays()[k].x, other[k].x)
    assert [len(samples.y) for samples in other[:2]] == [20, 17]  # of 68


def test_a_constant_feature_is_only_shifted() -> None:
    table = small_table()
    constant = replace(
        table,
        train_x=np.column_stack([table.train_x[:, :2], np.full(40, 5.0)]),
        test_x=np.column_stack([table.test_x[:, :2], np.full(20, 6.0)]),
    )
    (task,) = tabular(constant, TabularSettings(1, feature="order")).tasks
    assert set(everything(task.train).x[:, 2].tolist()) == {0.0}
    assert set(everything(task.test).x[:, 2].tolist()) == {1.0}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Wine(scenario="domain"), "feature must be given with scenario=domain, got null"),
        (lambda: Wine(feature="hue"), "feature must be null with scenario=class, got hue"),
        (lambda: Wine(num_tasks=2), "num_tasks must divide the 3 classes, got 2; use one of 1, 3"),
        (lambda: BreastCancer(feature="mean_textur"), "feature must be one of .*; did you mean mean_texture"),
        (
            lambda: Diabetes(scenario="class", feature=None),
            "scenario must be domain for a regression, got 'cl",
        ),
        (
            lambda: Diabetes(feature="sex"),
            "num_tasks must leave training samples in every task, got 5 with none",
        ),
        (lambda: Diabetes(subset=500), "subset must be <= the training samples of a task, got 500 with 68"),
        (lambda: Diabetes(validation=0.001), "validation must leave at least one sample on each side"),
        (lambda: load_table("wines"), "table must be one of wine, .* got 'wines'; did you mean wine"),
        (lambda: load("wine"), r"data set must be images, got 'wine'; use load_table\('wine'\)"),
        (
            lambda: replace(small_table(), feature_names=("a", "b")),
            r"train_x and train_y must be \[N, 2\] and \[N\] with 2 feature names, got \[40, 3\] and \[40\]",
        ),
        (
            lambda: replace(small_table(), class_names=("a", "b")),
            r"train_y must be labels 0\.\.1, one for each class name, got int64 from 0 to 3; leave",
        ),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
