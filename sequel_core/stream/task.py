"""Tasks and benchmarks as arrays: what is learned, without loaders and without any framework.

A task never copies its data set: a split is a view (row indices and one fixed pixel map) of arrays that all
tasks share, so that memory does not grow with the number of tasks.
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
    """One training batch; in PyTorch the images are `[B, C, H, W]`, everywhere else `[B, H, W, C]`."""

    x: Any  # images [B, H, W, C], uint8 from our own data
    y: Any  # labels [B]
    t: Any  # task index of each sample [B], from 0
    plan: Any = ()  # the plan's integers for this step; empty for methods that need none


class Samples(NamedTuple):
    """Samples taken from a split."""

    x: ImageArray  # [n, H, W, C]
    y: IntArray  # [n]
    t: IntArray  # [n]


@dataclass(frozen=True, eq=False)
class Split:
    """Part of a data set: shared arrays, optionally a subset of rows and a pixel map.

    Args:
        images: uint8, or float32 that are taken as they are, `[N, H, W, C]`: an array, a memory map, or a
            data set that is read item by item.
        labels: int64 `[N]`.
        task: index of the task that the samples belong to, from 0.
        indices: rows that belong to the split, `[n]`; None for all.
        pixel_map: applied to uint8 images as they are taken.
        channels_last: whether images are `[N, H, W, C]` although they look like `[N, C, H, W]`: at most 4
            rows, and more than 4 columns and channels.

    Raises:
        ValueError: arrays of another type, shape or length.
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
                f"a pixel map needs uint8 images, got {self.images.dtype}; map the pixels yourself"
            )
        check_labels(self.labels)
        if len(self.images) != len(self.labels):
            raise ValueError(f"images and labels differ in number: {len(self.images)} and {len(self.labels)}")

    def __len__(self) -> int:
        return len(self.labels) if self.indices is None else len(self.indices)

    @property
    def parts(self) -> tuple[Split, ...]:
        """The splits that this one is made of: itself."""
        return (self,)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    @property
    def image_dtype(self) -> str:
        """Of the images: uint8 or float32."""
        return str(self.images.dtype)

    @property
    def targets(self) -> IntArray:
        """Labels of the split's samples, int64 `[n]`; not kept: many splits share one array."""
        labels = self.labels if self.indices is None else self.labels[self.indices]
        return np.asarray(labels, np.int64)

    def take(self, positions: IntArray) -> Samples:
        """Return the samples at these positions of the split, `[n]`, pixel map applied."""
        rows = positions if self.indices is None else self.indices[positions]
        images = np.asarray(self.images[rows])
        if self.pixel_map is not None:
            images = self.pixel_map(images)
        labels = np.asarray(self.labels[rows], np.int64)
        return Samples(images, labels, np.full(len(positions), self.task, np.int64))

    def pick(self, positions: IntArray) -> Split:
        """Return the samples at these positions as a split; views are nested, data is not copied."""
        return replace(self, indices=positions if self.indices is None else self.indices[positions])

    def head(self, count: int | None) -> Split:
        """Return the first `count` samples (all for None); views are nested, data is not copied."""
        if count is None or count >= len(self):
            return self
        rows = np.arange(count, dtype=np.int64) if self.indices is None else self.indices[:count]
        return replace(self, indices=rows)


@dataclass(frozen=True, eq=False)
class JoinedSplit:
    """Several splits, one after the other; each sample keeps its own task index and pixel map."""

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
        """Of the images: uint8 or float32."""
        return self.parts[0].image_dtype

    @property
    def targets(self) -> IntArray:
        """Labels of the split's samples, int64 `[n]`; not kept."""
        return np.concatenate([np.empty(0, np.int64), *(part.targets for part in self.parts)])

    def take(self, positions: IntArray) -> Samples:
        """Return the samples at these positions, `[n]`, in the order asked for."""
        owner = np.searchsorted(self._offsets, positions, side="right") - 1
        images = np.empty((len(positions), *self.image_shape), self.image_dtype)
        labels, tasks = np.empty(len(positions), np.int64), np.empty(len(positions), np.int64)
        for k in np.unique(owner):
            here = owner == k
            samples = self.parts[k].take(positions[here] - self._offsets[k])
            images[here], labels[here], tasks[here] = samples
        return Samples(images, labels, tasks)

    def pick(self, positions: IntArray) -> JoinedSplit:
        """Return the samples at these positions, in the order asked for; data is not copied."""
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
        name: for people.
        classes: labels that occur, after any relabelling by a class order.
        train: training samples, at least one.
        test: test samples, at least one.
        validation: held-out training samples; may be empty.
        coreset: samples set aside from the training samples for a method that asks for them.

    Raises:
        ValueError: no training or no test samples, a label that `classes` lacks, or one below 0.
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
            strangers = targets[~np.isin(targets, self.classes)]
            if len(strangers):
                raise ValueError(
                    f"task {self.index} ({self.name}): {name} labels "
                    f"{np.unique(strangers)[:5].tolist()} are not among its classes {list(self.classes)}"
                )

    def split(self, name: str) -> AnySplit:
        """Return the split called train, validation or test."""
        split: AnySplit = getattr(self, name)
        return split


def join(splits: Sequence[AnySplit]) -> JoinedSplit:
    """Return the splits one after the other."""
    return JoinedSplit(tuple(part for split in splits for part in split.parts))
