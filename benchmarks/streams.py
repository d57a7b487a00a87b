"""Streams of tasks from any data set: split classes, permuted pixels, rotated images.

Each builder takes a `DataSet` (ours or a user's own arrays) and a settings dataclass. All tasks are views of
the data set's arrays. All random choices come from the plan with the stream's own seed, apart from the
training seed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from sequel_benchmarks.cifar import CIFAR100_SUPERCLASSES
from sequel_benchmarks.data import NUM_CLASSES, DataSet, load
from sequel_benchmarks.pixels import Interpolation, permutation, rotation
from sequel_core.settings import Settings, setting
from sequel_core.stream import plan
from sequel_core.stream.arrays import IntArray
from sequel_core.stream.benchmark import Benchmark, Scenario
from sequel_core.stream.images import Augmentation, Normalisation, PixelMap
from sequel_core.stream.task import Split, Task

Inputs = Literal["standardised", "unit"]
HALF_TURN = 180.0
MOST_TASKS = 10_000  # of which the maps of pixels and the accuracy matrix are still small


@dataclass(frozen=True)
class StreamSettings(Settings):
    """What all streams have."""

    num_tasks: int = setting(5, "number of tasks", ge=1, le=MOST_TASKS)
    scenario: Scenario = setting("domain", "domain, task or class")
    subset: int | None = setting(None, "training samples per task; null for all", ge=1)
    validation: float = setting(
        0.0, "fraction of the training samples that is held out, before subset", ge=0, lt=1
    )
    inputs: Inputs = setting("standardised", "standardised (mean 0, deviation 1) or unit (in [0, 1])")
    seed: int = setting(0, "of the stream: orders, permutations, angles, choice of samples", ge=0)
    crop_padding: int = setting(
        0,
        "black pixels on each side out of which each training image is cut at random; 0 for none",
        ge=0,
        le=256,
    )
    horizontal_flip: bool = setting(False, "mirror half of the training images, at random")

    def plain(self) -> dict[str, Any]:
        """Return all settings as plain values."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }


@dataclass(frozen=True)
class SplitSettings(StreamSettings):
    """Classes divided among tasks."""

    scenario: Scenario = setting(
        "task", "domain (labels within the task), task or class (labels of the whole stream)"
    )
    class_order: Literal["seeded", "superclass"] | tuple[int, ...] | None = setting(
        None,
        "classes in the order of the stream: null as they are, seeded, superclass (those of a superclass "
        "next to one another), or a list",
        ge=0,
    )

    def order(self, num_classes: int, superclasses: IntArray | None = None) -> IntArray:
        """Return the classes in the order of the stream, int64 `[num_classes]`.

        Args:
            num_classes: of the data set.
            superclasses: superclass of each class, `[num_classes]`, where the data set knows them.

        Raises:
            ValueError: num_tasks does not divide num_classes, class_order is not an order of all classes, or
                it asks for superclasses that there are not.
        """
        if num_classes % self.num_tasks:
            divisors = [n for n in range(1, num_classes + 1) if num_classes % n == 0]
            raise ValueError(
                f"num_tasks must divide the {num_classes} classes, got {self.num_tasks}; use one of "
                f"{', '.join(map(str, divisors))}"
            )
        if self.class_order is None:
            return np.arange(num_classes, dtype=np.int64)
        if self.class_order == "seeded":
            return plan.permutation(self.seed, "class order", count=num_classes)
        if self.class_order == "superclass":
            if superclasses is None:
                raise ValueError(
                    "class_order must be null, seeded or a list with a data set without superclasses, got "
                    "superclass; CIFAR-100 has them"
                )
            return np.argsort(superclasses, kind="stable")
        if sorted(self.class_order) != list(range(num_classes)):
            raise ValueError(
                f"class_order must name each class 0..{num_classes - 1} once, got {list(self.class_order)}"
            )
        return np.asarray(self.class_order, np.int64)


@dataclass(frozen=True)
class _SharedClasses(StreamSettings):
    """Streams in which every task has all classes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scenario != "domain":
            raise ValueError(
                f"scenario must be domain where every task has the same classes, got {self.scenario!r}; "
                "for task or class use a split benchmark"
            )


@dataclass(frozen=True)
class PermutedSettings(_SharedClasses):
    """A permutation of pixels per task."""

    num_tasks: int = setting(10, "number of tasks", ge=1, le=MOST_TASKS)
    first_identity: bool = setting(False, "leave the first task's pixels as they are")


@dataclass(frozen=True)
class RotatedSettings(_SharedClasses):
    """A rotation per task."""

    num_tasks: int = setting(20, "number of tasks", ge=1, le=MOST_TASKS)
    rotation: Literal["fixed", "bins", "uniform"] = setting(
        "fixed",
        "fixed: task t turns by t * per_task_rotation, or by angles[t]; "
        "bins: uniform in [t, t + 1) * per_task_rotation; uniform: uniform in [0, 180)",
    )
    per_task_rotation: float | None = setting(
        None, "degrees from task to task; null for 180 / num_tasks", ge=-360, le=360
    )
    angles: tuple[float, ...] | None = setting(
        None, "degrees of each task, in place of per_task_rotation", ge=-360, le=360
    )
    interpolation: Interpolation = setting("bilinear", "nearest or bilinear")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.angles is not None:
            if self.rotation != "fixed" or self.per_task_rotation is not None:
                raise ValueError(
                    "angles takes the place of rotation and per_task_rotation, got rotation="
                    f"{self.rotation} and per_task_rotation={self.per_task_rotation}; leave them out"
                )
            if len(self.angles) != self.num_tasks:
                raise ValueError(
                    f"angles must have one angle per task, got {len(self.angles)} with "
                    f"num_tasks={self.num_tasks}"
                )
        if self.rotation == "uniform" and self.per_task_rotation is not None:
            raise ValueError(
                f"per_task_rotation has no meaning with rotation=uniform, got {self.per_task_rotation}; "
                "leave it out"
            )

    def degrees(self) -> tuple[float, ...]:
        """Return the angle of every task, counter-clockwise."""
        if self.angles is not None:
            return self.angles
        step = HALF_TURN / self.num_tasks if self.per_task_rotation is None else self.per_task_rotation
        if self.rotation == "fixed":
            return tuple(t * step for t in range(self.num_tasks))
        draws = plan.uniform(self.seed, "rotation", count=self.num_tasks)
        if self.rotation == "uniform":
            return tuple((HALF_TURN * draws).tolist())
        return tuple(((np.arange(self.num_tasks) + draws) * step).tolist())


def split(data: DataSet, settings: SplitSettings | None = None) -> Benchmark:
    """Return a stream whose tasks have different classes, equally many each.

    With k = num_classes / num_tasks and a class order o, task t has the classes `o[t k]` to `o[t k + k - 1]`,
    labelled `t k` to `t k + k - 1` in the task and class scenarios, 0 to k - 1 in the domain scenario.

    Args:
        data: the data set.
        settings: see `SplitSettings`; None for its defaults.

    Raises:
        ValueError: a wrong number of tasks, a wrong order, or more samples asked for than there are.
    """
    settings = settings or SplitSettings()
    order = settings.order(data.num_classes, data.superclasses)
    size = data.num_classes // settings.num_tasks
    position = np.argsort(order)  # of each class in the order
    train_labels, test_labels = position[data.train_labels], position[data.test_labels]
    owners = train_labels // size, test_labels // size
    if settings.scenario == "domain":
        train_labels, test_labels = train_labels % size, test_labels % size
    tasks = []
    for t in range(settings.num_tasks):
        rows, held_out = hold_out(np.flatnonzero(owners[0] == t), settings, t)
        first = 0 if settings.scenario == "domain" else t * size
        classes = sorted(order[t * size : (t + 1) * size].tolist())
        names = [str(c) if data.class_names is None else data.class_names[c] for c in classes]
        train = Split(data.train_images, train_labels, t, _choose(rows, settings, t))
        tasks.append(
            Task(
                index=t,
                name=f"classes {', '.join(names)}",
                classes=tuple(range(first, first + size)),
                train=train,
                validation=Split(data.train_images, train_labels, t, held_out),
                test=Split(data.test_images, test_labels, t, np.flatnonzero(owners[1] == t)),
            )
        )
    num_classes = size if settings.scenario == "domain" else data.num_classes
    return _benchmark(f"split{data.name}", tasks, num_classes, data, settings)


def split_known(
    name: str, settings: SplitSettings, data_dir: str | os.PathLike[str] | None = None
) -> Benchmark:
    """Return `split` of one of our data sets; wrong settings are refused before any data is read.

    Args:
        name: of the data set, see `load`.
        settings: see `SplitSettings`.
        data_dir: see `data_directory`.

    Raises:
        ValueError: as `load` and `split`.
    """
    settings.order(NUM_CLASSES[name], CIFAR100_SUPERCLASSES if name == "cifar100" else None)
    return split(load(name, data_dir), settings)


def permute(data: DataSet, settings: PermutedSettings | None = None) -> Benchmark:
    """Return a stream whose tasks have all samples, the pixels of each task in an order of its own.

    Args:
        data: the data set.
        settings: see `PermutedSettings`; None for its defaults.

    Raises:
        ValueError: more samples asked for than there are.
    """
    settings = settings or PermutedSettings()
    num_pixels = int(np.prod(data.train_images.shape[1:3]))
    maps: list[PixelMap | None] = [
        permutation(settings.seed, t, num_pixels) for t in range(settings.num_tasks)
    ]
    names = [f"permutation {t}" for t in range(settings.num_tasks)]
    if settings.first_identity:
        maps[0], names[0] = None, "identity"
    return _benchmark(
        f"permuted{data.name}", _mapped(data, settings, maps, names), data.num_classes, data, settings
    )


def rotate(data: DataSet, settings: RotatedSettings | None = None) -> Benchmark:
    """Return a stream whose tasks have all samples, each task's images rotated by an angle of its own.

    Args:
        data: the data set.
        settings: see `RotatedSettings`; None for its defaults.

    Raises:
        ValueError: more samples asked for than there are.
    """
    settings = settings or RotatedSettings()
    height, width = data.train_images.shape[1:3]
    degrees = settings.degrees()
    maps = [
        rotation(height, width, angle, settings.interpolation) if angle % 360 else None for angle in degrees
    ]
    names = [f"{angle:g} degrees" for angle in degrees]
    return _benchmark(
        f"rotated{data.name}", _mapped(data, settings, maps, names), data.num_classes, data, settings
    )


def _mapped(
    data: DataSet, settings: StreamSettings, maps: Sequence[PixelMap | None], names: Sequence[str]
) -> list[Task]:
    """Return tasks of all samples, one per pixel map; what is held out, no task trains on."""
    everything = np.arange(len(data.train_labels), dtype=np.int64)
    rows, held_out = hold_out(everything, settings, 0)
    tasks = []
    for t, (pixel_map, name) in enumerate(zip(maps, names, strict=True)):
        whole = settings.subset is None and len(held_out) == 0
        chosen = None if whole else _choose(rows, settings, t)
        tasks.append(
            Task(
                index=t,
                name=name,
                classes=tuple(range(data.num_classes)),
                train=Split(data.train_images, data.train_labels, t, chosen, pixel_map),
                validation=Split(data.train_images, data.train_labels, t, held_out, pixel_map),
                test=Split(data.test_images, data.test_labels, t, None, pixel_map),
            )
        )
    return tasks


def hold_out(rows: IntArray, settings: StreamSettings, task: int) -> tuple[IntArray, IntArray]:
    """Return the rows to train on and those held out for validation, both ascending."""
    count = round(settings.validation * len(rows))
    if settings.validation > 0 and not 0 < count < len(rows):
        raise ValueError(
            f"validation must leave at least one sample on each side, got {settings.validation:g} of the "
            f"{len(rows)} training samples of task {task}"
        )
    order = plan.permutation(settings.seed, "validation", task, count=len(rows))
    return np.sort(rows[order[count:]]), np.sort(rows[order[:count]])


def _choose(rows: IntArray, settings: StreamSettings, task: int) -> IntArray:
    """Return the rows of a task's subset, ascending; all where none is asked for."""
    if settings.subset is None:
        return rows
    if settings.subset > len(rows):
        raise ValueError(
            f"subset must be <= the training samples of a task, got {settings.subset} with {len(rows)} in "
            f"task {task}"
        )
    order = plan.permutation(settings.seed, "subset", task, count=len(rows))
    return np.sort(rows[order[: settings.subset]])


def _benchmark(
    name: str, tasks: Sequence[Task], num_classes: int, data: DataSet, settings: StreamSettings
) -> Benchmark:
    normalisation = data.normalisation if settings.inputs == "standardised" else Normalisation()
    return Benchmark(
        name,
        tuple(tasks),
        num_classes,
        settings.scenario,
        normalisation,
        settings.plain(),
        Augmentation(settings.crop_padding, settings.horizontal_flip),
    )
