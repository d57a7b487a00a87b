"""Benchmarks: streams of tasks, and the specification that a model is built from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from sequel_core.settings import check_name
from sequel_core.stream.arrays import BoolArray
from sequel_core.stream.images import Augmentation, Normalisation
from sequel_core.stream.task import AnySplit, JoinedSplit, Task, join
from sequel_core.stream.trees import LeafSpec, Tree, is_image, is_label, shapes_text, specs_text

Scenario = Literal["domain", "task", "class"]
Heads = Literal["separate", "shared"]


class StreamSpec(NamedTuple):
    """What a model is built from: shapes, dtypes, classes and the scenario of a stream.

    Example:
        >>> spec = StreamSpec(LeafSpec((28, 28, 1), "uint8"), 10, 1, "domain", np.ones((1, 10), bool))
        >>> spec.images, spec.labelled, spec.image_shape
        (True, True, (28, 28, 1))
    """

    x: Tree  # the LeafSpec of each leaf of the inputs
    num_classes: int  # width of the output: number of classes, of labels or of values
    num_tasks: int
    scenario: Scenario
    mask: BoolArray  # [T, num_classes], True if the class belongs to the task; all True without labels
    normalisation: Normalisation = Normalisation()  # of uint8 images, applied in the step
    augmentation: Augmentation = Augmentation()  # of training images, applied in the step
    y: Tree = LeafSpec((), "int64")  # the LeafSpec of each leaf of the targets
    max_evaluated: int = 0  # samples of the largest test or validation split; 0 if it is not known

    @property
    def masks_logits(self) -> bool:
        """Whether logits outside a sample's task are masked in training and testing."""
        return self.scenario == "task"

    @property
    def images(self) -> bool:
        """Whether inputs are images `[H, W, C]`."""
        return is_image(self.x)

    @property
    def labelled(self) -> bool:
        """Whether targets are class labels, one integer per sample."""
        return is_label(self.y)

    @property
    def per_token(self) -> bool:
        """Whether targets are one integer per token, `[L]`."""
        return isinstance(self.y, LeafSpec) and np.dtype(self.y.dtype).kind in "iu" and len(self.y.shape) == 1

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C).

        Raises:
            ValueError: the inputs are not images.
        """
        return _image_shape(self.x)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the only array of the inputs; (H, W, C) for images.

        Raises:
            ValueError: the inputs are a dict.
        """
        return _input_shape(self.x)

    @property
    def groups(self) -> BoolArray:
        """The mask of a stream with labels, else one group per task, bool `[T, groups]`."""
        return self.mask if self.labelled else np.ones((self.num_tasks, 1), np.bool_)

    def group(self, y: Tree, t: Any) -> Any:
        """Return the column of `groups` of each sample: its label, or 0 without labels, `[..., B]`."""
        return np.asarray(y) if self.labelled else np.zeros_like(np.asarray(t))


@dataclass(frozen=True, eq=False)
class Benchmark:
    """A stream of tasks.

    Args:
        name: shown in tables and recorded with runs, for example `rotatedmnist`.
        tasks: in order, at least one.
        num_classes: width of the output: the number of classes, larger than every label; without labels, the
            number of values that the network predicts for a target.
        scenario: one of
            `domain`: one head, the same classes in every task, or targets that are not class labels;
            `task`: logits outside a sample's task are masked in training and testing;
            `class`: no mask; the masked accuracy is reported beside the plain one.
        normalisation: of uint8 images, applied in the step.
        settings: the arguments that the benchmark was made from, recorded with every run.
        augmentation: of training samples, applied in the step.
        heads: used in the task scenario. `separate`: each output belongs to one task (see `separate_heads`);
            `shared`: tasks may have classes in common.

    Raises:
        ValueError: no tasks, tasks out of order, a label outside the head, a label of two tasks with separate
            heads, arrays of different shapes or dtypes, a scenario of classes without labels, or a
            normalisation or augmentation of inputs that are not images.

    Example:
        >>> import numpy as np
        >>> from sequel_core import Split, Task
        >>> split = Split(np.zeros((6, 8, 8, 1), np.uint8), np.arange(6) % 2)
        >>> task = Task(0, "zeros", (0, 1), train=split, test=split, validation=split.head(0))
        >>> benchmark = Benchmark("example", (task,), num_classes=2, scenario="domain")
        >>> benchmark
        <Benchmark 'example', 1 task>
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
        check_name("scenario", self.scenario, get_args(Scenario))
        check_name("heads", self.heads, get_args(Heads))
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
                for name in ("x", "y"):
                    spec, first = (getattr(split, f"{name}_spec") for split in (part, self.tasks[0].train))
                    if spec != first:
                        raise ValueError(
                            f"the arrays of a stream must have one shape and dtype, got {name} = "
                            f"{specs_text(spec)} in task {i} and {specs_text(first)} in task 0; convert one "
                            "of them"
                        )
        if not self.labelled and self.scenario != "domain":
            raise ValueError(
                f"scenario must be domain if targets are not class labels, got {self.scenario!r}; the other "
                "scenarios are about classes"
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
        spec = self.tasks[0].train.x_spec
        if self.augmentation and not is_image(spec):
            raise ValueError(f"augmentation needs images [N, H, W, C], got {specs_text(spec)}; leave it out")
        if self.normalisation == Normalisation():
            return
        if not is_image(spec) or spec.dtype != "uint8":
            raise ValueError(
                f"normalisation needs uint8 images, got {specs_text(spec)}; normalise the arrays and leave "
                "normalisation out"
            )
        channels = self.image_shape[-1]
        if len(self.normalisation.mean) not in (1, channels):
            raise ValueError(
                f"normalisation has {len(self.normalisation.mean)} channels, the images {channels}; "
                f"give 1 or {channels}"
            )

    def __repr__(self) -> str:
        tasks = "1 task" if len(self) == 1 else f"{len(self)} tasks"
        return f"<{type(self).__name__} {self.name!r}, {tasks}>"

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images; see `StreamSpec.image_shape`."""
        return _image_shape(self.tasks[0].train.x_spec)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the only array of the inputs; see `StreamSpec.input_shape`."""
        return _input_shape(self.tasks[0].train.x_spec)

    @property
    def labelled(self) -> bool:
        """Whether targets are class labels, one integer per sample."""
        return self.tasks[0].train.labelled

    @property
    def mask(self) -> BoolArray:
        """Classes of each task, bool `[T, num_classes]`; all True without labels."""
        if not self.labelled:
            return np.ones((len(self.tasks), self.num_classes), np.bool_)
        mask = np.zeros((len(self.tasks), self.num_classes), np.bool_)
        for task in self.tasks:
            mask[task.index, list(task.classes)] = True
        return mask

    @property
    def spec(self) -> StreamSpec:
        """The specification that a model is built from."""
        first = self.tasks[0].train
        return StreamSpec(
            first.x_spec,
            self.num_classes,
            len(self),
            self.scenario,
            self.mask,
            self.normalisation,
            self.augmentation,
            first.y_spec,
            max(len(split) for task in self.tasks for split in (task.test, task.validation)),
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


def _image_shape(spec: Tree) -> tuple[int, int, int]:
    if not is_image(spec):
        raise ValueError(
            f"the network needs images [H, W, C], the stream has inputs {shapes_text(spec)}; use an mlp or "
            "a network of your own"
        )
    height, width, channels = spec.shape
    return height, width, channels


def _input_shape(spec: Tree) -> tuple[int, ...]:
    if not isinstance(spec, LeafSpec):
        raise ValueError(
            f"the network needs one input array, the stream has inputs {shapes_text(spec)}; use a network of "
            "your own"
        )
    return spec.shape


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
        return replace(split, y=split.y.astype(np.int64) + offset)

    return replace(
        task,
        classes=tuple(c + offset for c in task.classes),
        train=shift(task.train),
        test=shift(task.test),
        validation=shift(task.validation),
        coreset=None if task.coreset is None else shift(task.coreset),
    )
