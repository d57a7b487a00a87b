"""Benchmarks: streams of tasks, and what a model has to know of them."""

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
    """What a model has to know of a stream before its first task."""

    image_shape: tuple[int, int, int]  # (H, W, C)
    num_classes: int
    num_tasks: int
    scenario: Scenario
    mask: BoolArray  # [T, num_classes], True where the class belongs to the task
    normalisation: Normalisation
    image_dtype: str = "uint8"  # of the images in a batch, as a replay memory keeps them: uint8, float32, ...
    augmentation: Augmentation = Augmentation()  # of training samples, applied inside the step

    @property
    def masks_logits(self) -> bool:
        """Whether training and testing see only the logits of a sample's own task."""
        return self.scenario == "task"


@dataclass(frozen=True, eq=False)
class Benchmark:
    """A stream of tasks.

    Args:
        name: as in configs, for example `rotatedmnist`.
        tasks: in order, at least one.
        num_classes: width of the output.
        scenario: `domain` (one head, the same classes in every task), `task` (logits outside the sample's
            task are masked in training and testing) or `class` (no mask; the masked accuracy is reported
            beside the plain one).
        normalisation: of uint8 images, applied inside the step.
        settings: the arguments that made it, recorded with every run.
        augmentation: of training samples, applied inside the step.
        heads: in the task scenario, `separate` if each output belongs to one task (see `separate_heads`), or
            `shared` if tasks may have classes, and so outputs, in common.

    Raises:
        ValueError: no task, tasks out of order, a class outside the head, a class of two tasks with separate
            heads, images of different shapes or dtypes, or a normalisation of images that are not uint8.
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
                f"normalisation is of uint8 images, got it with {self.image_dtype}, which are taken as they "
                "are; normalise them yourself"
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
        """Of the images: uint8 or float32."""
        return self.tasks[0].train.image_dtype

    @property
    def mask(self) -> BoolArray:
        """`[T, num_classes]`, True where a class belongs to a task."""
        mask = np.zeros((len(self.tasks), self.num_classes), np.bool_)
        for task in self.tasks:
            mask[task.index, list(task.classes)] = True
        return mask

    @property
    def spec(self) -> StreamSpec:
        """What a model has to know of the stream."""
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
        """Return tasks 0 to i as one task with index i: their training, validation and test streams joined.

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
    """Return tasks of which no two share an output: label y of head k becomes `k * width + y`.

    The width is the largest label plus one. Tasks stay as they are if no class belongs to several heads.

    Args:
        tasks: whose labels may restart at 0 in each.
        heads: the head of each task, `[T]`, from 0; None for one head per task.
    """
    owners = range(len(tasks)) if heads is None else heads
    seen = {(head, c) for head, task in zip(owners, tasks, strict=True) for c in task.classes}
    if len({c for _, c in seen}) == len(seen):
        return tuple(tasks)
    width = 1 + max(c for _, c in seen)
    return tuple(_relabelled(task, head * width) for head, task in zip(owners, tasks, strict=True))


def _relabelled(task: Task, offset: int) -> Task:
    """Return a task with an offset added to its labels."""

    def moved(split: AnySplit) -> AnySplit:
        if isinstance(split, JoinedSplit):
            return join([moved(part) for part in split.parts])
        return replace(split, labels=split.labels.astype(np.int64) + offset)

    return replace(
        task,
        classes=tuple(c + offset for c in task.classes),
        train=moved(task.train),
        test=moved(task.test),
        validation=moved(task.validation),
        coreset=None if task.coreset is None else moved(task.coreset),
    )
