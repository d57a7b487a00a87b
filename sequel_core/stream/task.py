"""Tasks and their splits: views of NumPy arrays, without loaders and independent of the frameworks.

A split never copies its data set. It is a view (row indices and a fixed pixel map) of arrays that all tasks
share, so memory does not grow with the number of tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from sequel_core.stream.arrays import ImageArray, IntArray
from sequel_core.stream.images import PixelMap
from sequel_core.stream.items import ItemImages, check_images, check_labels


class Batch(NamedTuple):
    """A training batch.

    Images are `[B, C, H, W]` in PyTorch and `[B, H, W, C]` everywhere else.

    Example:
        >>> import numpy as np
        >>> x, y, t = np.zeros((4, 28, 28, 1), np.uint8), np.arange(4), np.zeros(4, np.int64)
        >>> Batch(x, y, t).plan
        ()
    """

    x: Any  # images [B, H, W, C], uint8 in the built-in benchmarks
    y: Any  # labels [B]
    t: Any  # task index of each sample [B], from 0
    plan: Any = ()  # what the planner decided for this step; () for methods without a planner


class Samples(NamedTuple):
    """Samples of a split, as arrays."""

    x: ImageArray  # [n, H, W, C]
    y: IntArray  # [n]
    t: IntArray  # [n]


@dataclass(frozen=True, eq=False)
class Split:
    """Part of a data set: a view of shared arrays.

    Args:
        images: `[N, H, W, C]`, uint8, or float32, which is used as it is. An array, a memory map, or a data
            set that is read item by item.
        labels: integers `[N]`.
        task: index of the task that the samples belong to, >= 0.
        indices: rows that belong to the split, `[n]`; None for all.
        pixel_map: applied to uint8 images when they are read.
        channels_last: confirm that images are `[N, H, W, C]` if their shape looks like `[N, C, H, W]`, that
            is, if H <= 4 < min(W, C).

    Raises:
        ValueError: the arrays have another dtype or shape, or differ in length.

    Example:
        >>> import numpy as np
        >>> split = Split(np.zeros((6, 8, 8, 1), np.uint8), np.arange(6) % 2)
        >>> len(split), split.image_shape, split.take(np.array([1, 5])).y.tolist()
        (6, (8, 8, 1), [1, 1])
    """

    images: ImageArray | ItemImages
    labels: IntArray
    task: int = 0
    indices: IntArray | None = None
    pixel_map: PixelMap | None = None
    channels_last: bool = False

    def __post_init__(self) -> None:
        check_images(self.images, self.channels_last)
        if self.pixel_map is not None and self.images.dtype != np.uint8:
            raise ValueError(
                f"a pixel map needs uint8 images, got {self.images.dtype}; apply the map to the arrays first"
            )
        check_labels(self.labels)
        if len(self.images) != len(self.labels):
            raise ValueError(f"images and labels differ in number: {len(self.images)} and {len(self.labels)}")

    def __len__(self) -> int:
        return len(self.labels) if self.indices is None else len(self.indices)

    @property
    def parts(self) -> tuple[Split, ...]:
        """The splits that this one consists of: itself."""
        return (self,)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    @property
    def image_dtype(self) -> str:
        """Dtype of the images: uint8 or float32."""
        return str(self.images.dtype)

    @property
    def targets(self) -> IntArray:
        """Labels of the split, int64 `[n]`, computed at each access because splits share their arrays."""
        labels = self.labels if self.indices is None else self.labels[self.indices]
        return np.asarray(labels, np.int64)

    def take(self, positions: IntArray) -> Samples:
        """Return the samples at positions `[n]` of the split, with the pixel map applied."""
        rows = positions if self.indices is None else self.indices[positions]
        images = np.asarray(self.images[rows])
        if self.pixel_map is not None:
            images = self.pixel_map(images)
        labels = np.asarray(self.labels[rows], np.int64)
        return Samples(images, labels, np.full(len(positions), self.task, np.int64))

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
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.parts[0].image_shape

    @property
    def image_dtype(self) -> str:
        """Dtype of the images: uint8 or float32."""
        return self.parts[0].image_dtype

    @property
    def targets(self) -> IntArray:
        """Labels of the split, int64 `[n]`, computed at each access."""
        return np.concatenate([np.empty(0, np.int64), *(part.targets for part in self.parts)])

    def take(self, positions: IntArray) -> Samples:
        """Return the samples at positions `[n]`, in that order."""
        owner = np.searchsorted(self._offsets, positions, side="right") - 1
        images = np.empty((len(positions), *self.image_shape), self.image_dtype)
        labels, tasks = np.empty(len(positions), np.int64), np.empty(len(positions), np.int64)
        for k in np.unique(owner):
            rows = owner == k
            samples = self.parts[k].take(positions[rows] - self._offsets[k])
            images[rows], labels[rows], tasks[rows] = samples
        return Samples(images, labels, tasks)

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
        classes: labels that occur in the task, each >= 0.
        train: training samples, at least one.
        test: test samples, at least one.
        validation: held-out training samples; may be empty.
        coreset: samples taken out of the training samples, for methods that need a coreset.

    Raises:
        ValueError: no training or no test samples, a label that is not in `classes`, or a label below 0.

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
