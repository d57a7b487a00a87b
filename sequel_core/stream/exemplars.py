"""Exemplars: which samples of each class are kept, chosen by herding in NumPy, and class means.

The frameworks compute the features. Which samples are kept, and in which slot, is decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from sequel_core.stream.arrays import BoolArray, FloatArray, IntArray
from sequel_core.stream.memory import memory_stream
from sequel_core.stream.task import AnySplit, Samples, join

TIE = 1e-7
"""Scores that differ by less are equal for herding, so that rounding decides nothing."""

EMBEDDED = 256
"""Number of exemplars whose features are computed at a time."""


def herding(features: FloatArray, count: int) -> IntArray:
    """Return the rows chosen by herding, in order, int64 `[min(count, n)]`.

    Row k is argmin ||mu - (f + f_1 + ... + f_{k-1}) / k|| over the remaining rows (Rebuffi et al. 2017,
    algorithm 4; Welling 2009), that is argmax f . (k mu - f_1 - ... - f_{k-1}) - |f|^2 / 2. The first of
    several rows within `TIE` of the best is chosen.

    Args:
        features: `[n, D]`; of unit length or 0 in the paper.
        count: number of rows, >= 0.

    Example:
        >>> herding(np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]), count=2).tolist()
        [2, 0]
    """
    f = np.asarray(features, np.float64)
    mean = f.mean(axis=0)
    target, used = mean.copy(), 0.5 * (f**2).sum(axis=1)
    chosen = np.empty(min(count, len(f)), np.int64)
    for k in range(len(chosen)):
        score = f @ target - used
        chosen[k] = np.argmax(score >= score.max() - TIE)
        used[chosen[k]] = np.inf
        target += mean - f[chosen[k]]
    return chosen


class Quota(Protocol):
    """The numbers of a memory of exemplars; `ExemplarHParams` has them."""

    def slots(self, num_sets: int) -> int:
        """Return the number of slots for so many sets."""
        ...

    def per_set(self, num_sets: int) -> int:
        """Return the number of exemplars of each set if there are `num_sets` of them."""
        ...


def renewed_exemplars(
    hparams: Quota,
    mask: BoolArray,
    task: int,
    held: Samples,
    candidates: Iterable[tuple[Samples, FloatArray]],
) -> Samples:
    """Return the exemplars after a task, in their slots; the task of an empty slot is -1.

    Each class of each task has a set, and all sets have the same quota. The sets of past tasks are cut to the
    quota, and those of the task follow. Classes ascend within a task, and each set is in the order of
    `herding`.

    Args:
        hparams: number of exemplars.
        mask: classes of each task, bool `[T, num_classes]`.
        task: index of the task that ends.
        held: exemplars of past tasks, in that order.
        candidates: batches of the task's samples, each sample once, with features `[n, D]`; samples of other
            tasks are ignored.
    """
    images, labels, features = list(held.x), list(held.y), []
    for (x, y, t), f in candidates:
        rows = t == task
        images += list(x[rows])
        labels += list(y[rows])
        features.append(f[rows])
    sets = np.argwhere(mask[: task + 1])
    quota, past = hparams.per_set(len(sets)), len(held.y)
    new = np.asarray(labels[past:], np.int64)
    points = np.concatenate(features) if features else np.empty((0, 0))
    kept: list[int] = []
    for owner, label in sets:
        if owner < task:
            kept += np.flatnonzero((held.t == owner) & (held.y == label))[:quota].tolist()
        else:
            rows = np.flatnonzero(new == label)
            if len(rows):
                kept += (past + rows[herding(points[rows], quota)]).tolist()
    slots = hparams.slots(int(mask.sum()))
    x = np.zeros((slots, *held.x.shape[1:]), held.x.dtype)
    y, t = np.zeros(slots, np.int64), np.full(slots, -1, np.int64)
    for slot, k in enumerate(kept):
        x[slot], y[slot], t[slot] = images[k], labels[k], held.t[k] if k < past else task
    return Samples(x, y, t)


def renewed_samples(
    quota: Quota, mask: BoolArray, task: int, held: Samples, new: Iterable[Samples]
) -> Samples:
    """Return the samples that a memory holds after it is divided among the sets again.

    It is `renewed_exemplars` without features: the first samples of each class are kept, so that samples in a
    random order give a random choice.

    Args:
        quota: number of samples.
        mask: see `renewed_exemplars`.
        task: index of the task of the new samples.
        held: samples of past tasks, as this function returned them, without empty slots.
        new: batches of samples of the task.

    Example:
        >>> from sequel_core import ICaRLHParams
        >>> x, none = np.zeros((6, 2)), np.zeros(0, np.int64)
        >>> new = Samples(x, np.array([0, 1, 0, 1, 0, 1]), np.zeros(6, np.int64))
        >>> held = Samples(x[:0], none, none)
        >>> kept = renewed_samples(ICaRLHParams(mem_size=4), np.ones((1, 2), bool), 0, held, [new])
        >>> kept.y.tolist()
        [0, 0, 1, 1]
    """
    return renewed_exemplars(quota, mask, task, held, ((s, np.zeros((len(s.y), 1))) for s in new))


def exemplar_means(
    embed: Callable[[Any], FloatArray],
    exemplars: Samples,
    num_classes: int,
    flip: bool,
    normalise: bool = True,
) -> tuple[FloatArray, BoolArray]:
    """Return the mean feature of each class `[num_classes, D]`, and which classes have it.

    Args:
        embed: returns features `[n, D]` of images `[n, H, W, C]`.
        exemplars: in their slots, as `renewed_exemplars` returns them.
        num_classes: number of rows; the mean of a class without exemplars is 0.
        flip: average with the mean over horizontally flipped images.
        normalise: scale the means to unit length.
    """
    blocks = [exemplars.x[start : start + EMBEDDED] for start in range(0, len(exemplars.y), EMBEDDED)]
    views = (blocks, [block[:, :, ::-1] for block in blocks]) if flip else (blocks,)
    features = [np.concatenate([embed(block) for block in view]) for view in views]
    return class_means(features, exemplars.y, exemplars.t, num_classes, normalise)


def class_means(
    features: Sequence[FloatArray], y: IntArray, t: IntArray, num_classes: int, normalise: bool = True
) -> tuple[FloatArray, BoolArray]:
    """Return the means of `exemplar_means` from features that are already computed.

    Args:
        features: `[slots, D]`, one array for the images and, with flip, one for the flipped images.
        y: label of each slot `[slots]`.
        t: task of each slot `[slots]`, -1 if it is empty.
        num_classes: number of rows.
        normalise: scale the means to unit length.
    """
    owner = (y == np.arange(num_classes)[:, None]) & (t >= 0)  # [num_classes, slots]
    weights = owner / np.maximum(owner.sum(axis=1, keepdims=True), 1)
    means = sum(weights @ view for view in features) / len(features)
    norm = np.linalg.norm(means, axis=1, keepdims=True)
    return means / np.where(normalise & (norm > 0), norm, 1), owner.any(axis=1)


def joined_with_samples(split: AnySplit, samples: Samples) -> AnySplit:
    """Return a split with the samples of a memory appended, sorted by task."""
    return join([split, memory_stream(samples)]) if len(samples.y) else split
