"""Tasks and benchmarks as arrays: what is learned, without loaders and without any framework.

A task never copies its data set: a split is a view (row indices and one fixed pixel map) of arrays that all
tasks share, so that memory does not grow with the number of tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from sequel_core.items import ItemImages, check_images, check_labels

ImageArray = NDArray[Any]  # uint8 or float32
UInt8Array = NDArray[np.uint8]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]

Scenario = Literal["domain", "task", "class"]
Heads = Literal["separate", "shared"]

BLOCK = 256
"""Images that a weighted pixel map works on at a time."""


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


@dataclass(frozen=True)
class Normalisation:
    """`(x / 255 - mean) / std` per channel, written as `x * scale + shift`.

    Both frameworks then do the same arithmetic.

    Args:
        mean: channel means of the inputs scaled to [0, 1].
        std: channel standard deviations of the same, > 0.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(
                f"normalisation needs a mean and a std per channel, got {len(self.mean)} and {len(self.std)}"
            )
        if min(self.std) <= 0:
            raise ValueError(f"normalisation std must be > 0, got {self.std}")

    @property
    def scale(self) -> FloatArray:
        """Factor of a uint8 image, `1 / (255 std)`, shape `[C]`."""
        return 1.0 / (255.0 * np.asarray(self.std, np.float64))

    @property
    def shift(self) -> FloatArray:
        """Offset of a uint8 image, `-mean / std`, shape `[C]`."""
        return -np.asarray(self.mean, np.float64) / np.asarray(self.std, np.float64)


@dataclass(frozen=True)
class Augmentation:
    """Random crops and mirror images of training samples, drawn anew whenever a sample is trained on.

    Args:
        padding: black pixels (0 in images that are not uint8) on each side, out of which an image of the old
            size is cut, >= 0; 0 for no crops.
        flip: whether half of the images are mirrored, left for right.
    """

    padding: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ValueError(f"augmentation padding must be >= 0, got {self.padding}")

    def __bool__(self) -> bool:
        return bool(self.padding or self.flip)


@dataclass(frozen=True, eq=False)
class PixelMap:
    """A fixed linear map of pixels: `out[p] = sum_k weights[p, k] * in[indices[p, k]]`.

    A permutation or a nearest-neighbour rotation has one source per pixel and no weights; a bilinear rotation
    has four.

    Args:
        indices: source pixel (row-major) of each target pixel, int `[H * W, K]`; -1 reads a black pixel.
        weights: float `[H * W, K]`, or None for weights of one (then K must be 1).
    """

    indices: NDArray[np.int32]
    weights: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        if self.indices.ndim != 2:
            raise ValueError(f"pixel map indices must be [H * W, K], got shape {self.indices.shape}")
        if self.weights is None and self.indices.shape[1] != 1:
            raise ValueError(f"pixel map with {self.indices.shape[1]} sources per pixel needs weights")
        if self.weights is not None and self.weights.shape != self.indices.shape:
            raise ValueError(
                f"pixel map weights have shape {self.weights.shape}, indices {self.indices.shape}"
            )

    def __call__(self, images: UInt8Array) -> UInt8Array:
        """Return the mapped images, uint8 `[N, H, W, C]`; weighted sums are rounded half to even."""
        n, height, width, channels = images.shape
        if height * width != len(self.indices):
            raise ValueError(
                f"pixel map is for {len(self.indices)} pixels, the images have {height} x {width}"
            )
        pixels = images.reshape(n, height * width, channels)
        black = self.indices < 0
        sources = np.where(black, 0, self.indices)
        if self.weights is None:
            out = np.take(pixels, sources[:, 0], axis=1)
            if black.any():
                out[:, black[:, 0]] = 0
        else:
            weights = np.where(black, np.float32(0), self.weights)[:, :, None]  # [H * W, K, 1]
            out = np.empty_like(pixels)
            for start in range(0, n, BLOCK):  # few enough images for their sums to stay in the cache
                block = pixels[start : start + BLOCK]
                total = np.take(block, sources[:, 0], axis=1) * weights[:, 0]
                for k in range(1, sources.shape[1]):
                    total += np.take(block, sources[:, k], axis=1) * weights[:, k]
                out[start : start + BLOCK] = np.rint(total).clip(0, 255)
        return out.reshape(images.shape)


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


def join(splits: Sequence[AnySplit]) -> JoinedSplit:
    """Return the splits one after the other."""
    return JoinedSplit(tuple(part for split in splits for part in split.parts))
