"""Benchmarks: streams of tasks, and the specification that a model is built from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from sequel_core.stream.arrays import BoolArray
from sequel_core.stream.images import Augmentation, Normalisation
from sequel_core.stream.task import AnySplit, JoinedSplit, Task, join

Scenario = Literal["domain", "task", "class"]
Heads = Literal["separate", "shared"]


class StreamSpec(NamedTuple):
    """What a model is built from: shapes, classes and the scenario of a stream."""

    image_shape: tuple[int, int, int]  # (H, W, C)
    num_classes: int
    num_tasks: int
    scenario: Scenario
    mask: BoolArray  # [T, num_classes], True if the class belongs to the task
    normalisation: Normalisation  # of uint8 images, applied in the step
    image_dtype: str = "uint8"  # dtype of the images in batches and memories: uint8, float32, ...
    augmentation: Augmentation = Augmentation()  # of training samples, applied in the step

    @property
    def masks_logits(self) -> bool:
        """Whether logits outside a sample's task are masked in training and testing."""
        return self.scenario == "task"


@dataclass(frozen=True, eq=False)
class Benchmark:
    """A stream of tasks.

    Args:
        name: shown in tables and recorded with runs, for example `rotatedmnist`.
        tasks: in order, at least one.
        num_classes: width of the output, larger than every label.
        scenario: one of
            `domain`: one head, the same classes in every task;
            `task`: logits outside a sample's task are masked in training and testing;
            `class`: no mask; the masked accuracy is reported beside the plain one.
        normalisation: of uint8 images, applied in the step.
        settings: the arguments that the benchmark was made from, recorded with every run.
        augmentation: of training samples, applied in the step.
        heads: used in the task scenario. `separate`: each output belongs to one task (see `separate_heads`);
            `shared`: tasks may have classes in common.

    Raises:
        ValueError: no tasks, tasks out of order, a label outside the head, a label of two tasks with separate
            heads, images of different shapes or dtypes, or a normalisation of images that are not uint8.

    Example:
        >>> import numpy as np
        >>> from sequel_core import Split, Task
        >>> split = Split(np.zeros((6, 8, 8, 1), np.uint8), np.arange(6) % 2)
        >>> task = Task(0, "zeros", (0, 1), train=split, test=split, validation=split.head(0))
        >>> benchmark = Benchmark("example", (task,), num_classes=2, scenario="domain")
        >>> len(benchmark), benchmark.spec.image_shape
        (1, (8, 8, 1))
    """

    name: str
    tasks: tuple[Task, ...]
    num_classes: int
    scenario: Scenario
    normalisation: Normalisation = Normalisation()
    settings: Mapping[str, Any] = field(default_factory=dict)
    augmentation: Augmentation = Augmentation()
    heads: Heads = "separate"

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError(f"benchmark {self.name} has no tasks; it needs at least one")
        if self.scenario not in get_args(Scenario):
            raise ValueError(
                f"scenario must be one of {', '.join(get_args(Scenario))}, got {self.scenario!r}"
            )
        if self.heads not in get_args(Heads):
            raise ValueError(f"heads must be one of {', '.join(get_args(Heads))}, got {self.heads!r}")
        for i, task in enumerate(self.tasks):
            if task.index != i:
                raise ValueError(f"tasks must be numbered from 0 in order: task {i} has index {task.index}")
            outside = [c for c in task.classes if not 0 <= c < self.num_classes]
            if outside:
                raise ValueError(
                    f"task {i} ({task.name}) has labels {outside[:5]}, the head 0..{self.num_classes - 1}; "
                    "raise num_classes or relabel"
                )
            for part in (*task.train.parts, *task.validation.parts, *task.test.parts):
                if part.image_shape != self.image_shape:
                    raise ValueError(f"task {i} has images {part.image_shape}, task 0 has {self.image_shape}")
                if part.image_dtype != self.image_dtype:
                    raise ValueError(
                        f"the images of a stream must have one dtype, got {part.image_dtype} in task {i} and "
                        f"{self.image_dtype} in task 0; convert one of them"
                    )
        if self.scenario == "task" and self.heads == "separate":
            owners: dict[int, int] = {}
            for task in self.tasks:
                for c in task.classes:
                    if owners.setdefault(c, task.index) != task.index:
                        raise ValueError(
                            f"tasks {owners[c]} and {task.index} both have label {c}, so in the task "
                            "scenario they would share an output; relabel them with separate_heads(tasks), "
                            "or give heads='shared' if that is meant"
                        )
        if self.image_dtype != "uint8" and self.normalisation != Normalisation():
            raise ValueError(
                f"normalisation needs uint8 images, got {self.image_dtype} images; normalise the arrays and "
                "leave normalisation out"
            )
        channels = self.image_shape[-1]
        if len(self.normalisation.mean) not in (1, channels):
            raise ValueError(
                f"normalisation has {len(self.normalisation.mean)} channels, the images {channels}; "
                f"give 1 or {channels}"
            )

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.tasks[0].train.image_shape

    @property
    def image_dtype(self) -> str:
        """Dtype of the images: uint8 or float32."""
        return self.tasks[0].train.image_dtype

    @property
    def mask(self) -> BoolArray:
        """Classes of each task, bool `[T, num_classes]`."""
        mask = np.zeros((len(self.tasks), self.num_classes), np.bool_)
        for task in self.tasks:
            mask[task.index, list(task.classes)] = True
        return mask

    @property
    def spec(self) -> StreamSpec:
        """The specification that a model is built from."""
        return StreamSpec(
            self.image_shape,
            self.num_classes,
            len(self),
            self.scenario,
            self.mask,
            self.normalisation,
            self.image_dtype,
            self.augmentation,
        )

    def joined(self, i: int) -> Task:
        """Return tasks 0 to i as one task of index i, with their splits joined.

        Raises:
            ValueError: i is not the index of a task.
        """
        if not 0 <= i < len(self):
            raise ValueError(f"joined(i) needs 0 <= i < {len(self)}, got {i}")
        seen = self.tasks[: i + 1]
        return Task(
            index=i,
            name=f"tasks 0 to {i}",
            classes=tuple(sorted({c for task in seen for c in task.classes})),
            train=join([task.train for task in seen]),
            validation=join([task.validation for task in seen]),
            test=join([task.test for task in seen]),
        )


def separate_heads(tasks: Sequence[Task], heads: Sequence[int] | None = None) -> tuple[Task, ...]:
    """Return the tasks relabelled such that no two heads share an output.

    Label y of head k becomes `k * width + y`, with width the largest label plus one. Tasks are returned
    unchanged if no class belongs to several heads.

    Args:
        tasks: their labels may restart at 0 in each task.
        heads: the head of each task, integers >= 0 `[T]`; None for one head per task.

    Example:
        >>> import numpy as np
        >>> from sequel_core import Split, Task
        >>> split = Split(np.zeros((6, 8, 8, 1), np.uint8), np.arange(6) % 2)
        >>> tasks = [Task(i, f"{i}", (0, 1), split, split, split.head(0)) for i in range(2)]
        >>> [task.classes for task in separate_heads(tasks)]
        [(0, 1), (2, 3)]
    """
    owners = range(len(tasks)) if heads is None else heads
    pairs = {(head, c) for head, task in zip(owners, tasks, strict=True) for c in task.classes}
    if len({c for _, c in pairs}) == len(pairs):
        return tuple(tasks)
    width = 1 + max(c for _, c in pairs)
    return tuple(_relabelled(task, head * width) for head, task in zip(owners, tasks, strict=True))


def _relabelled(task: Task, offset: int) -> Task:
    """Return the task with an offset added to its labels."""

    def shift(split: AnySplit) -> AnySplit:
        if isinstance(split, JoinedSplit):
            return join([shift(part) for part in split.parts])
        return replace(split, labels=split.labels.astype(np.int64) + offset)

    return replace(
        task,
        classes=tuple(c + offset for c in task.classes),
        train=shift(task.train),
        test=shift(task.test),
        validation=shift(task.validation),
        coreset=None if task.coreset is None else shift(task.coreset),
    )
