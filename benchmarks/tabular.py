"""Streams of tasks from tables.

The tasks have different classes, or different domains: ranges of one feature, bounded by its quantiles in the
training set.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sequel_benchmarks.streams import StreamOptions, StreamSettings, choose, first_rows, hold_out
from sequel_benchmarks.tables import Table
from sequel_core.settings import as_text, check_name, setting
from sequel_core.stream.arrays import IntArray
from sequel_core.stream.benchmark import Benchmark, Scenario
from sequel_core.stream.task import Split, Task


@dataclass(frozen=True)
class TabularSettings(StreamSettings):
    """Settings of `tabular`: domains or classes of a table are divided among the tasks.

    Example:
        >>> from sequel_benchmarks import TabularSettings
        >>> TabularSettings(num_tasks=3, feature="bmi").plain()["standardise"]
        True
    """

    scenario: Scenario = setting(
        "domain",
        "`domain` (a feature divides the samples; every task has all classes), or `task` or `class` (the "
        "classes are divided among the tasks)",
    )
    feature: str | None = setting(
        None,
        "only in the domain scenario: the feature that divides the samples. Task t has the samples between "
        "its quantiles t / num_tasks and (t + 1) / num_tasks in the training set",
    )
    standardise: bool = setting(
        True,
        "shift and scale every feature, and the targets of a regression, to mean 0 and deviation 1 in the "
        "training set of all tasks",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.scenario == "domain") != (self.feature is not None):
            rule = "be given" if self.scenario == "domain" else "be null"
            raise ValueError(
                f"feature must {rule} with scenario={self.scenario}, got {as_text(self.feature)}"
            )


class TabularOptions(StreamOptions, total=False):
    """The fields of `TabularSettings` as keyword arguments, without num_tasks, scenario and feature."""

    standardise: bool


class _Division(NamedTuple):
    """Which samples belong to which task."""

    train: IntArray  # task of each training sample [N]
    test: IntArray  # task of each test sample [M]
    names: list[str]  # of the tasks


def tabular(table: Table, settings: TabularSettings) -> Benchmark:
    """Return a stream whose tasks have different domains or different classes of a table.

    Labels and features are the same in all tasks. Standardisation uses the mean and the deviation of the
    training samples of all tasks, including those that are held out for validation, but no test sample.

    Args:
        table: the data set.
        settings: see `TabularSettings`.

    Returns:
        A benchmark with float32 inputs `[N, D]`, and labels or float32 targets `[N]`.

    Raises:
        ValueError: the feature is unknown, has too few different values or is missing for a regression;
            num_tasks does not divide the number of classes; or a task has too few samples.

    Example:
        >>> from sequel_benchmarks import TabularSettings, load_table, tabular
        >>> stream = tabular(load_table("diabetes"), TabularSettings(num_tasks=2, feature="age"))
        >>> [task.name for task in stream.tasks], stream.spec.x, stream.scenario
        (['age < 50', 'age >= 50'], LeafSpec(shape=(10,), dtype='float32'), 'domain')
    """
    division = _by_class(table, settings) if settings.feature is None else _by_feature(table, settings)
    (train_x, test_x), (train_y, test_y) = (table.train_x, table.test_x), (table.train_y, table.test_y)
    if settings.standardise:
        train_x, test_x = standardised(train_x, test_x)
        if table.class_names is None:
            train_y, test_y = standardised(train_y, test_y)
    train_x, test_x = train_x.astype(np.float32), test_x.astype(np.float32)
    if table.class_names is None:
        train_y, test_y = train_y.astype(np.float32), test_y.astype(np.float32)
    tasks = []
    for t, name in enumerate(division.names):
        rows, held_out = hold_out(np.flatnonzero(division.train == t), settings, t)
        test_rows = first_rows(np.flatnonzero(division.test == t), settings, t)
        classes: tuple[int, ...] = ()
        if table.class_names is not None and settings.feature is not None:
            classes = tuple(range(len(table.class_names)))
        elif table.class_names is not None:
            classes = tuple(np.unique(table.train_y[division.train == t]).tolist())
        tasks.append(
            Task(
                index=t,
                name=name,
                classes=classes,
                train=Split(train_x, train_y, t, choose(rows, settings, t)),
                validation=Split(train_x, train_y, t, held_out),
                test=Split(test_x, test_y, t, test_rows),
            )
        )
    return Benchmark(
        table.name,
        tuple(tasks),
        table.num_classes or 1,
        settings.scenario,
        settings=settings.plain(),
    )


def standardised(train: NDArray[Any], test: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return both arrays with the mean and the deviation of the training rows removed, per column."""
    mean, deviation = train.mean(0), train.std(0)
    deviation = np.where(deviation > 0, deviation, 1)
    return (train - mean) / deviation, (test - mean) / deviation


def _by_class(table: Table, settings: TabularSettings) -> _Division:
    """Divide the classes equally, in their order."""
    if table.class_names is None:
        raise ValueError(
            f"scenario must be domain for a regression, got {settings.scenario!r}; give a feature, one of "
            f"{', '.join(table.feature_names)}"
        )
    count = len(table.class_names)
    if count % settings.num_tasks:
        divisors = [n for n in range(1, count + 1) if count % n == 0]
        raise ValueError(
            f"num_tasks must divide the {count} classes, got {settings.num_tasks}; use one of "
            f"{', '.join(map(str, divisors))}"
        )
    size = count // settings.num_tasks
    names = [", ".join(table.class_names[t * size : (t + 1) * size]) for t in range(settings.num_tasks)]
    return _Division(table.train_y // size, table.test_y // size, names)


def _by_feature(table: Table, settings: TabularSettings) -> _Division:
    """Divide the samples at quantiles of a feature in the training set."""
    feature = str(settings.feature)
    check_name("feature", feature, table.feature_names)
    column = table.feature_names.index(feature)
    quantiles = np.arange(1, settings.num_tasks) / settings.num_tasks
    bounds = np.quantile(table.train_x[:, column], quantiles)
    train, test = (np.searchsorted(bounds, x[:, column], side="right") for x in (table.train_x, table.test_x))
    for part, tasks in (("training", train), ("test", test)):
        counts = np.bincount(tasks, minlength=settings.num_tasks)
        if not counts.all():
            raise ValueError(
                f"num_tasks must leave {part} samples in every task, got {settings.num_tasks} with none "
                f"in task {int(np.argmin(counts))} of feature={feature}; use fewer tasks or another feature"
            )
    texts = [f"{bound:.4g}" for bound in bounds]
    if not texts:
        return _Division(train, test, [f"all {feature}"])
    inner = [f"{low} <= {feature} < {high}" for low, high in pairwise(texts)]
    return _Division(train, test, [f"{feature} < {texts[0]}", *inner, f"{feature} >= {texts[-1]}"])
