"""Tasks and their splits: views of NumPy arrays, without loaders and independent of the frameworks.

Inputs x and targets y are arrays, or (nested) dicts of arrays, with one row per sample.
A split never copies its data set. It is a view (row indices and a fixed pixel map) of arrays that all tasks
share, so memory does not grow with the number of tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from sequel_core.stream.arrays import IntArray
from sequel_core.stream.images import PixelMap
from sequel_core.stream.items import check_leaves, take_rows
from sequel_core.stream.trees import (
    LeafSpec,
    Tree,
    is_image,
    is_label,
    leaves,
    read_dtype,
    specs_of,
    specs_text,
    tree_map,
)


class Batch(NamedTuple):
    """A training batch. Inputs and targets are arrays `[B, ...]`, or (nested) dicts of arrays.

    Images are `[B, C, H, W]` in PyTorch and `[B, H, W, C]` everywhere else.

    Example:
        >>> import numpy as np
        >>> x, y, t = np.zeros((4, 28, 28, 1), np.uint8), np.arange(4), np.zeros(4, np.int64)
        >>> Batch(x, y, t).plan
        ()
    """

    x: Any  # inputs; images [B, H, W, C] of uint8 in most built-in benchmarks
    y: Any  # targets; labels [B] in classification
    t: Any  # task index of each sample [B], from 0
    plan: Any = ()  # what the planner decided for this step; () for methods without a planner


class Samples(NamedTuple):
    """Samples of a split, as arrays."""

    x: Tree  # [n, ...]
    y: Tree  # [n, ...]; labels are int64 [n]
    t: IntArray  # [n]


@dataclass(frozen=True, eq=False)
class Split:
    """Part of a data set: a view of shared arrays.

    An array x of uint8 or float32 `[N, H, W, C]` is taken for images. To give other data with three axes, use
    a dict, such as `{"x": array}`.

    Args:
        x: inputs, arrays `[N, ...]`: an array, a (nested) dict of arrays, a memory map, or a data set of
            images that is read item by item. Integers and booleans keep their dtype; float64 is read as
            float32.
        y: targets, arrays `[N, ...]` as for x. Integers `[N]` are class labels.
        task: index of the task that the samples belong to, >= 0.
        indices: rows that belong to the split, `[n]`; None for all.
        pixel_map: applied to uint8 images when they are read.
        channels_last: confirm that images are `[N, H, W, C]` if their shape looks like `[N, C, H, W]`, that
            is, if H <= 4 < min(W, C).

    Raises:
        ValueError: the arrays do not hold numbers, or differ in length.

    Example:
        >>> import numpy as np
        >>> split = Split(np.zeros((6, 8, 8, 1), np.uint8), np.arange(6) % 2)
        >>> len(split), split.x_spec.shape, split.take(np.array([1, 5])).y.tolist()
        (6, (8, 8, 1), [1, 1])
        >>> table = Split({"age": np.zeros(4), "words": np.zeros((4, 7), np.int64)}, np.zeros(4))
        >>> table.x_spec["words"], table.labelled
        (LeafSpec(shape=(7,), dtype='int64'), False)
    """

    x: Tree
    y: Tree
    task: int = 0
    indices: IntArray | None = None
    pixel_map: PixelMap | None = None
    channels_last: bool = False

    def __post_init__(self) -> None:
        check_leaves(self.x, self.y, self.channels_last)
        if self.pixel_map is not None and not (is_image(self.x_spec) and self.x.dtype == np.uint8):
            raise ValueError(
                f"a pixel map needs uint8 images, got {specs_text(self.x_spec)}; apply the map to the arrays "
                "first"
            )

    def __len__(self) -> int:
        return len(leaves(self.y)[0]) if self.indices is None else len(self.indices)

    @property
    def parts(self) -> tuple[Split, ...]:
        """The splits that this one consists of: itself."""
        return (self,)

    @property
    def x_spec(self) -> Tree:
        """The `LeafSpec` of each leaf of x."""
        return specs_of(self.x)

    @property
    def y_spec(self) -> Tree:
        """The `LeafSpec` of each leaf of y; labels are int64."""
        spec = specs_of(self.y)
        return LeafSpec((), "int64") if is_label(spec) else spec

    @property
    def labelled(self) -> bool:
        """Whether targets are class labels, one integer per sample."""
        return is_label(self.y_spec)

    @property
    def targets(self) -> Tree:
        """Targets of the split `[n, ...]`, computed at each access because splits share their arrays."""
        return self._taken(self.y, slice(None) if self.indices is None else self.indices, self.labelled)

    def take(self, positions: IntArray) -> Samples:
        """Return the samples at positions `[n]` of the split, with the pixel map applied."""
        rows = positions if self.indices is None else self.indices[positions]
        x = self._taken(self.x, rows)
        if self.pixel_map is not None:
            x = self.pixel_map(x)
        return Samples(
            x, self._taken(self.y, rows, self.labelled), np.full(len(positions), self.task, np.int64)
        )

    @staticmethod
    def _taken(tree: Tree, rows: Any, labels: bool = False) -> Tree:
        def converted(a: Any) -> Any:
            return np.asarray(a, np.int64 if labels else read_dtype(a.dtype))

        return tree_map(converted, take_rows(tree, rows))

    def pick(self, positions: IntArray) -> Split:
        """Return the samples at positions `[n]` as a split; no data is copied."""
        return replace(self, indices=positions if self.indices is None else self.indices[positions])

    def head(self, count: int | None) -> Split:
        """Return the first `count` samples (all for None) as a split; no data is copied."""
        if count is None or count >= len(self):
            return self
        rows = np.arange(count, dtype=np.int64) if self.indices is None else self.indices[:count]
        return replace(self, indices=rows)


@dataclass(frozen=True, eq=False)
class JoinedSplit:
    """Several splits in a row; each sample keeps its task index and pixel map."""

    parts: tuple[Split, ...]

    @cached_property
    def _offsets(self) -> IntArray:
        return np.cumsum([0, *(len(part) for part in self.parts)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._offsets[-1])

    @property
    def x_spec(self) -> Tree:
        """The `LeafSpec` of each leaf of x."""
        return self.parts[0].x_spec

    @property
    def y_spec(self) -> Tree:
        """The `LeafSpec` of each leaf of y."""
        return self.parts[0].y_spec

    @property
    def labelled(self) -> bool:
        """Whether targets are class labels, one integer per sample."""
        return not self.parts or self.parts[0].labelled

    @property
    def targets(self) -> Tree:
        """Targets of the split `[n, ...]`, computed at each access."""
        if not self.parts:
            return np.empty(0, np.int64)
        return tree_map(lambda *arrays: np.concatenate(arrays), *(part.targets for part in self.parts))

    def take(self, positions: IntArray) -> Samples:
        """Return the samples at positions `[n]`, in that order."""
        owner = np.searchsorted(self._offsets, positions, side="right") - 1

        def empty(leaf: LeafSpec) -> Any:
            return np.empty((len(positions), *leaf.shape), leaf.dtype)

        x, y = tree_map(empty, self.x_spec), tree_map(empty, self.y_spec)
        tasks = np.empty(len(positions), np.int64)
        for k in np.unique(owner):
            rows = owner == k
            samples = self.parts[k].take(positions[rows] - self._offsets[k])
            for all_rows, some in ((x, samples.x), (y, samples.y)):
                for target, values in zip(leaves(all_rows), leaves(some), strict=True):
                    target[rows] = values
            tasks[rows] = samples.t
        return Samples(x, y, tasks)

    def pick(self, positions: IntArray) -> JoinedSplit:
        """Return the samples at positions `[n]`, in that order, as a split; no data is copied."""
        owner = np.searchsorted(self._offsets, positions, side="right") - 1
        runs = np.split(np.arange(len(positions)), np.flatnonzero(np.diff(owner)) + 1)
        return JoinedSplit(
            tuple(
                self.parts[owner[run[0]]].pick(positions[run] - self._offsets[owner[run[0]]])
                for run in runs
                if len(run)
            )
        )


AnySplit = Split | JoinedSplit


@dataclass(frozen=True, eq=False)
class Task:
    """One task of a stream.

    Args:
        index: position in the stream, from 0.
        name: shown in tables and logs.
        classes: labels that occur in the task, each >= 0; () if targets are not class labels.
        train: training samples, at least one.
        test: test samples, at least one.
        validation: held-out training samples; may be empty.
        coreset: samples taken out of the training samples, for methods that need a coreset.

    Raises:
        ValueError: no training or no test samples, a label that is not in `classes`, a label below 0, or
            classes for targets that are not labels.

    Example:
        >>> import numpy as np
        >>> split = Split(np.zeros((6, 8, 8, 1), np.uint8), np.arange(6) % 2)
        >>> task = Task(0, "zeros", classes=(0, 1), train=split, test=split, validation=split.head(0))
        >>> len(task.train), len(task.validation)
        (6, 0)
    """

    index: int
    name: str
    classes: tuple[int, ...]
    train: AnySplit
    test: AnySplit
    validation: AnySplit
    coreset: AnySplit | None = None

    def __post_init__(self) -> None:
        if negative := [c for c in self.classes if c < 0]:
            raise ValueError(
                f"task {self.index} ({self.name}): labels must be >= 0, got {negative[:5]}; number them with "
                "np.unique(y, return_inverse=True)[1]"
            )
        for name in ("train", "test"):
            if len(getattr(self, name)) == 0:
                raise ValueError(
                    f"task {self.index} ({self.name}) has no {name} samples; it needs at least one"
                )
        if not self.train.labelled:
            if self.classes:
                raise ValueError(
                    f"task {self.index} ({self.name}): classes must be () for targets that are not integer "
                    f"labels [N], got {self.classes}; leave them out"
                )
            return
        for name in ("train", "validation", "test"):
            targets = getattr(self, name).targets
            unknown = targets[~np.isin(targets, self.classes)]
            if len(unknown):
                raise ValueError(
                    f"task {self.index} ({self.name}): {name} labels "
                    f"{np.unique(unknown)[:5].tolist()} are not among its classes {list(self.classes)}"
                )

    def split(self, name: str) -> AnySplit:
        """Return a split by its name: train, validation or test."""
        split: AnySplit = getattr(self, name)
        return split


def join(splits: Sequence[AnySplit]) -> JoinedSplit:
    """Return several splits as one; no data is copied."""
    return JoinedSplit(tuple(part for split in splits for part in split.parts))
