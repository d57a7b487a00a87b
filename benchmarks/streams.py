"""Streams of tasks from any data set of images: split classes, permuted pixels, rotated images.

Each builder takes a `DataSet` (a published one from `load`, or your own arrays) and a settings dataclass. All
tasks are views of the data set's arrays. The stream's seed, which is separate from the training seed,
determines all random choices.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypedDict

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
ClassOrder = Literal["seeded", "superclass"] | tuple[int, ...] | None
Rotation = Literal["fixed", "bins", "uniform"]
HALF_TURN = 180.0  # degrees
MAX_TASKS = 10_000  # the pixel maps and the accuracy matrix of this many tasks still fit into memory


@dataclass(frozen=True)
class StreamSettings(Settings):
    """Settings that all streams share."""

    num_tasks: int = setting(5, "number of tasks", ge=1, le=MAX_TASKS)
    scenario: Scenario = setting("domain", "`domain`; all tasks have the same classes")
    subset: int | None = setting(
        None, "number of training samples per task, chosen by the seed; None for all", ge=1
    )
    validation: float = setting(
        0.0, "fraction of the training samples to hold out, before `subset` is applied", ge=0, lt=1
    )
    test_subset: int | None = setting(
        None,
        "number of test samples per task, the first ones, in the order of the data set; None for all. The "
        "code of GEM (https://arxiv.org/abs/1706.08840) and La-MAML leaves out the last one",
        ge=1,
    )
    seed: int = setting(
        0, "seed of orders, permutations, angles and subsets; separate from the training seed", ge=0
    )

    def plain(self) -> dict[str, Any]:
        """Return all settings as plain values: numbers, text, lists and None."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }


class StreamOptions(TypedDict, total=False):
    """The fields of `StreamSettings` as keyword arguments, without num_tasks and scenario."""

    subset: int | None
    validation: float
    test_subset: int | None
    seed: int


@dataclass(frozen=True)
class ImageStreamSettings(StreamSettings):
    """Settings that all streams of images share."""

    inputs: Inputs = setting("standardised", "`standardised` (mean 0, deviation 1) or `unit` (in [0, 1])")
    crop_padding: int = setting(
        0,
        "black pixels to add on each side before a training image is cropped at random to its size; 0 for "
        "no crops",
        ge=0,
        le=256,
    )
    horizontal_flip: bool = setting(False, "mirror each training image with probability 1/2")


class ImageStreamOptions(StreamOptions, total=False):
    """The fields of `ImageStreamSettings` as keyword arguments, without num_tasks."""

    scenario: Scenario
    inputs: Inputs
    crop_padding: int
    horizontal_flip: bool


@dataclass(frozen=True)
class SplitSettings(ImageStreamSettings):
    """Settings of `split`: the classes are divided among the tasks.

    Example:
        >>> from sequel_benchmarks import SplitSettings
        >>> SplitSettings(num_tasks=2, class_order=(3, 1, 2, 0)).order(num_classes=4)
        array([3, 1, 2, 0])
    """

    scenario: Scenario = setting(
        "task",
        "`task` or `class` (labels are unique in the stream, one output per class), or `domain` (labels "
        "restart at 0 in each task)",
    )
    class_order: ClassOrder = setting(
        None,
        "classes in the order of the stream: None (0, 1, 2, ...), `seeded` (shuffled), `superclass` (grouped "
        "by superclass, only for CIFAR-100), or a list of all classes",
    )

    def order(self, num_classes: int, superclasses: IntArray | None = None) -> IntArray:
        """Return the classes in the order of the stream, int64 `[num_classes]`.

        Args:
            num_classes: number of classes of the data set.
            superclasses: superclass of each class, `[num_classes]`; None if the data set has none.

        Raises:
            ValueError: num_tasks does not divide num_classes, class_order does not contain each class once,
                or class_order is `superclass` and the data set has no superclasses.
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
                    "class_order must be null, seeded or a list for a data set without superclasses, got "
                    "superclass; only CIFAR-100 has superclasses"
                )
            return np.argsort(superclasses, kind="stable")
        if sorted(self.class_order) != list(range(num_classes)):
            raise ValueError(
                f"class_order must name each class 0..{num_classes - 1} once, got {list(self.class_order)}"
            )
        return np.asarray(self.class_order, np.int64)


class SplitOptions(ImageStreamOptions, total=False):
    """The fields of `SplitSettings` as keyword arguments, without num_tasks."""

    class_order: ClassOrder


@dataclass(frozen=True)
class _DomainSettings(ImageStreamSettings):
    """Settings of streams in which every task has all classes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scenario != "domain":
            raise ValueError(
                f"scenario must be domain if every task has the same classes, got {self.scenario!r}; "
                "for task or class use a split benchmark"
            )


@dataclass(frozen=True)
class PermutedSettings(_DomainSettings):
    """Settings of `permute`: each task permutes the pixels of all images.

    Example:
        >>> from sequel_benchmarks import PermutedSettings
        >>> PermutedSettings(num_tasks=3, first_identity=True).plain()["first_identity"]
        True
    """

    num_tasks: int = setting(10, "number of tasks", ge=1, le=MAX_TASKS)
    first_identity: bool = setting(False, "leave the pixels of the first task unchanged")


class PermutedOptions(ImageStreamOptions, total=False):
    """The fields of `PermutedSettings` as keyword arguments, without num_tasks."""

    first_identity: bool


@dataclass(frozen=True)
class RotatedSettings(_DomainSettings):
    """Settings of `rotate`: each task rotates all images by a fixed angle.

    Example:
        >>> from sequel_benchmarks import RotatedSettings
        >>> RotatedSettings(num_tasks=4).degrees()
        (0.0, 45.0, 90.0, 135.0)
    """

    num_tasks: int = setting(20, "number of tasks", ge=1, le=MAX_TASKS)
    rotation: Rotation = setting(
        "fixed",
        "how the angle of task t is chosen: `fixed` (t * per_task_rotation, or item t of angles), `bins` "
        "(uniform in [t, t + 1) * per_task_rotation) or `uniform` (uniform in [0, 180))",
    )
    per_task_rotation: float | None = setting(
        None, "degrees from one task to the next; None for 180 / num_tasks", ge=-360, le=360
    )
    angles: tuple[float, ...] | None = setting(
        None, "degrees of each task, instead of rotation and per_task_rotation", ge=-360, le=360
    )
    interpolation: Interpolation = setting("bilinear", "`nearest` or `bilinear`")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.angles is not None:
            if self.rotation != "fixed" or self.per_task_rotation is not None:
                raise ValueError(
                    "angles replaces rotation and per_task_rotation, got rotation="
                    f"{self.rotation} and per_task_rotation={self.per_task_rotation}; leave them out"
                )
            if len(self.angles) != self.num_tasks:
                raise ValueError(
                    f"angles must have one angle per task, got {len(self.angles)} with "
                    f"num_tasks={self.num_tasks}"
                )
        if self.rotation == "uniform" and self.per_task_rotation is not None:
            raise ValueError(
                f"per_task_rotation must be left out if rotation=uniform, got {self.per_task_rotation}"
            )

    def degrees(self) -> tuple[float, ...]:
        """Return the counter-clockwise angle of every task, in degrees."""
        if self.angles is not None:
            return self.angles
        step = HALF_TURN / self.num_tasks if self.per_task_rotation is None else self.per_task_rotation
        if self.rotation == "fixed":
            return tuple(t * step for t in range(self.num_tasks))
        draws = plan.uniform(self.seed, "rotation", count=self.num_tasks)
        if self.rotation == "uniform":
            return tuple((HALF_TURN * draws).tolist())
        return tuple(((np.arange(self.num_tasks) + draws) * step).tolist())


class RotatedOptions(ImageStreamOptions, total=False):
    """The fields of `RotatedSettings` as keyword arguments, without num_tasks."""

    rotation: Rotation
    per_task_rotation: float | None
    angles: tuple[float, ...] | None
    interpolation: Interpolation


def split(data: DataSet, settings: SplitSettings | None = None) -> Benchmark:
    """Return a stream whose tasks have different classes, the same number each.

    With k = num_classes / num_tasks and the class order o, task t has the classes `o[t k]` to
    `o[t k + k - 1]`. Their labels are `t k` to `t k + k - 1` in the task and class scenarios, and 0 to k - 1
    in the domain scenario.

    Args:
        data: the data set.
        settings: see `SplitSettings`; None for its defaults.

    Returns:
        A benchmark of num_tasks tasks, with num_classes outputs (k outputs in the domain scenario).

    Raises:
        ValueError: num_tasks does not divide the number of classes, class_order does not fit, or a task has
            fewer samples than `subset`.

    Example:
        >>> import numpy as np
        >>> from sequel_benchmarks import DataSet, SplitSettings, split
        >>> images = np.zeros((8, 4, 4, 1), np.uint8)
        >>> labels = np.arange(8) % 4
        >>> data = DataSet("mine", images, labels, images, labels, num_classes=4)
        >>> [task.classes for task in split(data, SplitSettings(num_tasks=2)).tasks]
        [(0, 1), (2, 3)]
    """
    settings = settings or SplitSettings()
    order = settings.order(data.num_classes, data.superclasses)
    size = data.num_classes // settings.num_tasks
    position = np.argsort(order)  # of each class in the order
    train_labels, test_labels = position[data.train_labels], position[data.test_labels]
    train_tasks, test_tasks = train_labels // size, test_labels // size
    if settings.scenario == "domain":
        train_labels, test_labels = train_labels % size, test_labels % size
    tasks = []
    for t in range(settings.num_tasks):
        rows, held_out = hold_out(np.flatnonzero(train_tasks == t), settings, t)
        first = 0 if settings.scenario == "domain" else t * size
        classes = sorted(order[t * size : (t + 1) * size].tolist())
        names = [str(c) if data.class_names is None else data.class_names[c] for c in classes]
        tasks.append(
            Task(
                index=t,
                name=f"classes {', '.join(names)}",
                classes=tuple(range(first, first + size)),
                train=Split(data.train_images, train_labels, t, choose(rows, settings, t)),
                validation=Split(data.train_images, train_labels, t, held_out),
                test=Split(
                    data.test_images, test_labels, t, first_rows(np.flatnonzero(test_tasks == t), settings, t)
                ),
            )
        )
    num_classes = size if settings.scenario == "domain" else data.num_classes
    return _benchmark(f"split{data.name}", tasks, num_classes, data, settings)


def split_published(
    name: str, settings: SplitSettings, data_dir: str | os.PathLike[str] | None = None
) -> Benchmark:
    """Return `split` of a published data set. Settings are checked before any data is read.

    Args:
        name: name of the data set, see `load`.
        settings: see `SplitSettings`.
        data_dir: see `data_directory`.

    Raises:
        ValueError: as `load` and `split`.
    """
    settings.order(NUM_CLASSES[name], CIFAR100_SUPERCLASSES if name == "cifar100" else None)
    return split(load(name, data_dir), settings)


def permute(data: DataSet, settings: PermutedSettings | None = None) -> Benchmark:
    """Return a stream whose tasks have all samples, each task with its own permutation of the pixels.

    Args:
        data: the data set.
        settings: see `PermutedSettings`; None for ten random permutations.

    Raises:
        ValueError: the data set has fewer training samples than `subset`.

    Example:
        >>> from sequel_benchmarks import PermutedSettings, load, permute
        >>> stream = permute(load("digits"), PermutedSettings(num_tasks=3, first_identity=True))
        >>> [task.name for task in stream.tasks]
        ['identity', 'permutation 1', 'permutation 2']
    """
    settings = settings or PermutedSettings()
    num_pixels = int(np.prod(data.train_images.shape[1:3]))
    maps: list[PixelMap | None] = [
        permutation(settings.seed, t, num_pixels) for t in range(settings.num_tasks)
    ]
    names = [f"permutation {t}" for t in range(settings.num_tasks)]
    if settings.first_identity:
        maps[0], names[0] = None, "identity"
    tasks = _mapped_tasks(data, settings, maps, names)
    return _benchmark(f"permuted{data.name}", tasks, data.num_classes, data, settings)


def rotate(data: DataSet, settings: RotatedSettings | None = None) -> Benchmark:
    """Return a stream whose tasks have all samples, each task's images rotated by its own angle.

    Args:
        data: the data set.
        settings: see `RotatedSettings`; None for 20 angles from 0 to 171 degrees.

    Raises:
        ValueError: `subset` exceeds the number of training samples.

    Example:
        >>> from sequel_benchmarks import RotatedSettings, load, rotate
        >>> stream = rotate(load("digits"), RotatedSettings(num_tasks=2, angles=(0, 30)))
        >>> [task.name for task in stream.tasks]
        ['0 degrees', '30 degrees']
    """
    settings = settings or RotatedSettings()
    height, width = data.train_images.shape[1:3]
    degrees = settings.degrees()
    maps = [
        rotation(height, width, angle, settings.interpolation) if angle % 360 else None for angle in degrees
    ]
    names = [f"{angle:g} degrees" for angle in degrees]
    tasks = _mapped_tasks(data, settings, maps, names)
    return _benchmark(f"rotated{data.name}", tasks, data.num_classes, data, settings)


def _mapped_tasks(
    data: DataSet, settings: ImageStreamSettings, maps: Sequence[PixelMap | None], names: Sequence[str]
) -> list[Task]:
    """Return one task of all samples per pixel map. All tasks hold out the same images for validation."""
    all_rows = np.arange(len(data.train_labels), dtype=np.int64)
    rows, held_out = hold_out(all_rows, settings, 0)
    test_rows = None
    if settings.test_subset is not None:
        test_rows = first_rows(np.arange(len(data.test_labels), dtype=np.int64), settings, 0)
    tasks = []
    for t, (pixel_map, name) in enumerate(zip(maps, names, strict=True)):
        uses_all = settings.subset is None and len(held_out) == 0
        train_rows = None if uses_all else choose(rows, settings, t)
        tasks.append(
            Task(
                index=t,
                name=name,
                classes=tuple(range(data.num_classes)),
                train=Split(data.train_images, data.train_labels, t, train_rows, pixel_map),
                validation=Split(data.train_images, data.train_labels, t, held_out, pixel_map),
                test=Split(data.test_images, data.test_labels, t, test_rows, pixel_map),
            )
        )
    return tasks


def hold_out(rows: IntArray, settings: StreamSettings, task: int) -> tuple[IntArray, IntArray]:
    """Return the rows to train on and the rows held out for validation, both in ascending order."""
    count = round(settings.validation * len(rows))
    if settings.validation > 0 and not 0 < count < len(rows):
        raise ValueError(
            f"validation must leave at least one sample on each side, got {settings.validation:g} of the "
            f"{len(rows)} training samples of task {task}"
        )
    order = plan.permutation(settings.seed, "validation", task, count=len(rows))
    return np.sort(rows[order[count:]]), np.sort(rows[order[:count]])


def choose(rows: IntArray, settings: StreamSettings, task: int) -> IntArray:
    """Return the rows of a task's subset in ascending order, or all rows if subset is None."""
    if settings.subset is None:
        return rows
    if settings.subset > len(rows):
        raise ValueError(
            f"subset must be <= the training samples of a task, got {settings.subset} with {len(rows)} in "
            f"task {task}"
        )
    order = plan.permutation(settings.seed, "subset", task, count=len(rows))
    return np.sort(rows[order[: settings.subset]])


def first_rows(rows: IntArray, settings: StreamSettings, task: int) -> IntArray:
    """Return the first `test_subset` of a task's test rows, or all rows if it is None."""
    if settings.test_subset is not None and settings.test_subset > len(rows):
        raise ValueError(
            f"test_subset must be <= the test samples of a task, got {settings.test_subset} with {len(rows)} "
            f"in task {task}"
        )
    return rows[: settings.test_subset]


def _benchmark(
    name: str, tasks: Sequence[Task], num_classes: int, data: DataSet, settings: ImageStreamSettings
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
